"""The rollout_filter stage: which prompts the current model can learn from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.core.advantages import dr_grpo
from mmalign.data.loading import DataOptions, load_rows
from mmalign.errors import ConfigError, DataError
from mmalign.stage_kinds import groups
from mmalign.stage_kinds import rollout_filter as module
from mmalign.stage_kinds.records import save_records
from mmalign.stage_kinds.rollout_filter import RolloutFilterOptions, judge
from mmalign.stages import make_plan, run_plan

SCORES = {0: [0, 0, 0, 0], 1: [1, 1, 1, 1], 2: [0, 1, 0, 0], 3: [None, 1, 1, 0], 4: [None, None, None, None]}


def samples(folder: Path, scores: dict[int, list[Any]]) -> str:
    save_records([
        {"prompt": f"p{g}", "completion": f"text {g} {i % 2}", "answer": f"{g}", "group": g, "id": f"{g}-{i}",
         "score": None if s is None else float(s), "reward_x": s, "finish_reason": "stop", "gold": "kept"}
        for g, values in scores.items() for i, s in enumerate(values)
    ], folder)
    return str(folder)


def run(folder: Path, data: str, **options: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    entry = {"name": "f", "kind": "rollout_filter", "data": {"path": data}, **options}
    manifest = run_plan(make_plan({"run_dir": str(folder), "stages": [entry]}, config_folder=folder.parent), quiet=True)["f"]
    return [dict(row) for row in load_rows(DataOptions(path=manifest["outputs"]["data"]))], manifest


def test_modes_and_columns(tmp_path: Path) -> None:
    data = samples(tmp_path / "data", SCORES)
    rows, manifest = run(tmp_path / "any", data)
    assert [row["prompt"] for row in rows] == ["p1", "p2", "p3"]
    assert set(rows[0]) == {"prompt", "answer", "gold", "rollout_rewards", "pass_rate", "kept", "id"}
    assert [row["pass_rate"] for row in rows] == pytest.approx([1, 0.25, 2 / 3])
    assert rows[2]["rollout_rewards"] == [None, 1, 1, 0]
    metrics = manifest["metrics"]
    assert (metrics["prompts"], metrics["kept"], metrics["hopeless"], metrics["mastered"]) == (5, 3, 2, 1)
    assert (tmp_path / "any" / "f" / "pass_rates.png").stat().st_size > 1000
    bins = json.loads((tmp_path / "any" / "f" / "pass_rates.json").read_text())["bins"]
    assert bins == [2, 0, 1, 0, 0, 0, 1, 0, 0, 1]
    mixed, _ = run(tmp_path / "mixed", data, mode="mixed")
    assert [row["prompt"] for row in mixed] == ["p2", "p3"]
    hard, _ = run(tmp_path / "hard", data, max_pass_rate=0.5)
    assert [row["prompt"] for row in hard] == ["p2"]
    every, _ = run(tmp_path / "all", data, keep="all")
    assert [row["kept"] for row in every] == [False, True, True, True, False]


def test_successes_become_rows_once(tmp_path: Path) -> None:
    rows, _ = run(tmp_path / "run", samples(tmp_path / "data", SCORES), keep="successes")
    assert [(row["prompt"], row["completion"]) for row in rows] == [
        ("p1", "text 1 0"), ("p1", "text 1 1"), ("p2", "text 2 1"), ("p3", "text 3 1"), ("p3", "text 3 0")]


def test_an_empty_result_is_refused_with_the_histogram(tmp_path: Path) -> None:
    data = samples(tmp_path / "data", {0: [0, 0], 1: [0, 0], 2: [1, 1]})
    with pytest.raises(DataError, match=r"no prompt is left of 3: mode mixed.*0-10%: 2, 90-100%: 1"):
        run(tmp_path / "a", data, mode="mixed")
    with pytest.raises(DataError, match="no prompt of 3 passes"):
        run(tmp_path / "b", data, mode="mixed", keep="all")


@pytest.mark.parametrize(("options", "message"), [
    ({"threshold": 1.0, "top_score": 1.0}, "threshold is 1.0 and the largest score 1.0"),
    ({"threshold": float("nan")}, "threshold"), ({"max_pass_rate": 0}, "max_pass_rate"), ({"mode": "all"}, "mode"),
])
def test_senseless_options_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "run", "nowhere", **options)


def test_what_the_rows_lack_is_named(tmp_path: Path) -> None:
    data = samples(tmp_path / "data", {0: [1, 0]})
    with pytest.raises(DataError, match="needs the column 'reward_y'; score: names it"):
        run(tmp_path / "a", data, score="reward_y")
    single = samples(tmp_path / "single", {0: [1], 1: [0]})
    with pytest.raises(ConfigError, match="mixed compares the samples of a prompt and needs at least 2"):
        run(tmp_path / "b", single, mode="mixed")


def test_a_killed_stage_goes_on_at_the_next_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = samples(tmp_path / "data", {g: [g % 2, 1] for g in range(12)})
    monkeypatch.setattr(groups, "ROWS_PER_CHUNK", 8)
    whole, _ = run(tmp_path / "whole", data, mode="mixed")
    calls: list[int] = []
    original = module.judge

    def breaking(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(module, "judge", breaking)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", data, mode="mixed")
    assert len(list((tmp_path / "parts" / "f" / "parts").iterdir())) == 1
    resumed, _ = run(tmp_path / "parts", data, mode="mixed")
    assert resumed == whole
    assert len(calls) == 7 + 8  # the four prompts of the first chunk were not judged again


@given(st.lists(st.integers(0, 1), min_size=2, max_size=10), st.randoms())
@settings(deadline=None)
def test_mixed_keeps_exactly_the_groups_with_an_advantage(rewards: list[int], order: Any) -> None:
    def verdict(values: list[int], mode: str) -> bool:
        rows = [{"score": value, "group": 0} for value in values]
        return judge(rows, RolloutFilterOptions(data=DataOptions(path="x"), mode=mode))[0] is not None

    advantages = dr_grpo(torch.tensor(rewards, dtype=torch.float64), torch.zeros(len(rewards), dtype=torch.long))
    rate = sum(rewards) / len(rewards)
    assert float(advantages.square().mean()) == pytest.approx(rate * (1 - rate), abs=1e-6)
    shuffled = list(rewards)
    order.shuffle(shuffled)
    assert verdict(rewards, "mixed") == verdict(shuffled, "mixed") == bool(advantages.any())
    assert verdict(rewards, "any") == verdict(shuffled, "any") == any(rewards)
