"""The select stage: rejection and pairing, triples, streaming by prompt, resuming, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from mmalign.core.seeding import derive_seed
from mmalign.data.loading import DataOptions, load_rows
from mmalign.errors import MmalignError
from mmalign.stage_kinds import groups
from mmalign.stage_kinds import select as module
from mmalign.stage_kinds.records import save_records
from mmalign.stages import make_plan, run_plan


def samples(folder: Path, scores: dict[int, list[float | None]], *, texts: Any = None, shuffle: bool = False) -> Path:
    rows = [
        {"prompt": f"p{g}", "completion": texts(g, i) if texts else f"g{g}s{i}", "group": g, "id": f"{g}-{i}", "score": s,
         "reward_x": s, "finish_reason": "stop", "answer": str(g)}
        for g, values in scores.items() for i, s in enumerate(values)
    ]
    save_records(rows[::2] + rows[1::2] if shuffle else rows, folder)
    return folder


def run(folder: Path, data: Path, **options: Any) -> tuple[list[dict[str, Any]], dict[str, float]]:
    entry = {"name": "s", "kind": "select", "data": {"path": str(data)}, **options}
    tree = {"run_dir": str(folder), "seed": 3, "stages": [entry]}
    manifest = run_plan(make_plan(tree, config_folder=folder.parent), quiet=True)["s"]
    return [dict(row) for row in load_rows(DataOptions(path=manifest["outputs"]["data"]), seed=0)], manifest["metrics"]


REJECTION = {"mode": "statistical_rejection", "n": 4}


def test_accepted_samples_become_labelled_pairs(tmp_path: Path) -> None:
    scores = {g: [float((7 * i + g) % 9) for i in range(8)] for g in range(3)}
    rows, metrics = run(tmp_path / "run", samples(tmp_path / "data", scores, shuffle=True), **REJECTION, beta=2.0)
    assert len(rows) == 3 * 2
    for row in rows:
        group = int(row["prompt"][1:])
        assert row["chosen_score"] == scores[group][int(row["chosen"].split("s")[1])] > row["rejected_score"]
        assert row["answer"] == str(group)
        assert row["source"] == "rso_sample_rank"
        assert row["chosen_pass"] >= 0
        assert row["rejected_pass"] >= 0
    assert len({row["selection_seed"] for row in rows}) == 3
    assert len({row["id"] for row in rows}) == 6
    assert metrics["score/accepted"] > metrics["score/candidates"]
    assert metrics["accepted"] == 12
    assert metrics["share"] == 2.0


def test_order_of_rows_and_size_of_chunks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {g: [float((5 * i + g) % 7) for i in range(6)] for g in range(5)}
    data = samples(tmp_path / "data", scores)
    whole, _ = run(tmp_path / "a", data, **REJECTION)
    monkeypatch.setattr(groups, "ROWS_PER_CHUNK", 6)
    chunked, metrics = run(tmp_path / "b", data, **REJECTION)
    assert chunked == whole
    assert metrics["candidates"] == 30


def test_limits_of_beta(tmp_path: Path) -> None:
    data = samples(tmp_path / "data", {0: [0.0, 1.0, 5.0, 6.0, 2.0]})
    best, _ = run(tmp_path / "best", data, **REJECTION, beta=0.0)
    assert {row[side] for row in best for side in ("chosen", "rejected")} == {"g0s1", "g0s2", "g0s3", "g0s4"}
    first, _ = run(tmp_path / "first", data, **REJECTION, beta=math.inf)
    assert {row[side] for row in first for side in ("chosen", "rejected")} == {"g0s0", "g0s1", "g0s2", "g0s3"}
    assert {row["source"] for row in first} == {"sft_sample_rank"}


def test_tournament_and_another_label(tmp_path: Path) -> None:
    data = samples(tmp_path / "data", {0: [0.0, 1.0, 2.0, 3.0]})
    rows, _ = run(tmp_path / "run", data, **REJECTION, pairing="tournament", label_by="reward_x")
    assert len(rows) == 3
    assert sum(row["chosen"] == "g0s3" for row in rows) == 2
    with pytest.raises(MmalignError, match="needs the column 'other'"):
        run(tmp_path / "no", data, **REJECTION, label_by="other")


def test_equal_texts(tmp_path: Path) -> None:
    """Duplicates are candidates of their own; between two of them there is no pair."""
    data = samples(tmp_path / "data", {0: [1.0, 1.5, 1.0, 1.5]}, texts=lambda g, i: "same" if i < 3 else "other")
    _, metrics = run(tmp_path / "run", data, **REJECTION, pairing="tournament")
    assert metrics["accepted"] == 4
    assert metrics["rows"] + metrics.get("dropped/identical", 0) + metrics["dropped/undecided"] == 3
    _, metrics = run(tmp_path / "dedup", data, **REJECTION, deduplicate=True)
    assert (metrics["dropped/duplicates"], metrics["accepted"], metrics["short_groups"], metrics["rows"]) == (2, 2, 1, 1)


def test_samples_without_a_score_are_left_out_and_counted(tmp_path: Path) -> None:
    data = samples(tmp_path / "data", {0: [0.0, None, 2.0], 1: [None, None, None], 2: [math.nan, 1.0, 3.0]})
    rows, metrics = run(tmp_path / "run", data)
    assert [(row["chosen_score"], row["rejected_score"]) for row in rows] == [(2.0, 0.0), (3.0, 1.0)]
    assert metrics["dropped/unscored"] == 5


def test_triples(tmp_path: Path) -> None:
    scores = {0: [3.0, 9.0, 1.0, 5.0], 1: [1.0, 1.0, 1.0, 1.0], 2: [2.0, 2.0, 1.0, 0.0]}
    data = samples(tmp_path / "data", {**scores, 3: [1.0, 2.0]})
    rows, metrics = run(tmp_path / "run", data, mode="triples")
    assert [(r["gold"], r["chosen"], r["rejected"]) for r in rows] == [("g0s1", "g0s3", "g0s2"), ("g2s0", "g2s1", "g2s3")]
    assert (metrics["dropped/few_distinct"], metrics["dropped/equal_scores"], metrics["ties"]) == (1, 1, 4)
    third, _ = run(tmp_path / "third", data, mode="triples", chosen_rank=3)
    assert third[0]["chosen"] == "g0s0"


def test_top_k_skips_missing_scores(tmp_path: Path) -> None:
    rows, _ = run(tmp_path / "run", samples(tmp_path / "data", {0: [None, 2.0, 7.0], 1: [5.0]}), mode="top_k", k=2)
    assert [row["score"] for row in rows] == [7.0, 5.0]


def test_a_killed_stage_goes_on_at_the_first_chunk_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {g: [float((3 * i + g) % 11) for i in range(6)] for g in range(6)}
    data = samples(tmp_path / "data", scores)
    expected, _ = run(tmp_path / "whole", data, **REJECTION)
    monkeypatch.setattr(groups, "ROWS_PER_CHUNK", 12)
    seen: list[int] = []
    own = module.Selector.select

    def counted(self: Any, rows: Any) -> Any:
        if len(seen) == 4 and rows[0]["group"] == 4:
            raise KeyboardInterrupt
        seen.append(rows[0]["group"])
        return own(self, rows)

    monkeypatch.setattr(module.Selector, "select", counted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", data, **REJECTION)
    seen.append(-1)
    resumed, metrics = run(tmp_path / "run", data, **REJECTION)
    assert seen == [0, 1, 2, 3, -1, 4, 5]
    assert resumed == expected
    assert metrics["accepted"] == 24


def test_seeds_of_groups_are_recorded(tmp_path: Path) -> None:
    rows, _ = run(tmp_path / "run", samples(tmp_path / "data", {5: [0.0, 1.0, 2.0, 3.0]}), **REJECTION)
    stage_seed = derive_seed(3, "s") % 2**31
    assert {row["selection_seed"] for row in rows} == {derive_seed(stage_seed, "selection", 5) % 2**31}


@pytest.mark.parametrize(("options", "message"), [
    ({"mode": "statistical_rejection"}, "n: required by mode statistical_rejection"),
    ({**REJECTION, "n": 1}, "at least 2"), ({**REJECTION, "beta": -1.0}, "beta must be"),
    ({**REJECTION, "beta": math.nan}, "beta must be"),
    ({**REJECTION, "n": 9}, "n: 9 samples are to be accepted, but group 0 has 4"),
    ({**REJECTION, "pairing": "league"}, "pairing"), ({"mode": "triples", "chosen_rank": 1}, "chosen_rank must be at least 2"),
    ({"mode": "top_k", "k": 0}, "k: required"),
])
def test_refusals(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(MmalignError, match=message):
        run(tmp_path / "run", samples(tmp_path / "data", {0: [0.0, 1.0, 2.0, 3.0]}), **options)


def test_infinite_scores_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MmalignError, match="row '0-1' has the score -inf"):
        run(tmp_path / "run", samples(tmp_path / "data", {0: [0.0, -math.inf]}))
