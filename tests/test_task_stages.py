"""The stages mix, weak_tasks, forgetting_matrix and compare_learners."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mmalign.data.loading import DataOptions, load_rows
from mmalign.errors import ConfigError, DataError, MmalignError
from mmalign.stage_kinds.weak_tasks import weakest
from mmalign.stages import make_plan, run_plan
from run_folders import write_stage


def run(folder: Path, **entry: Any) -> dict[str, Any]:
    tree = {"run_dir": str(folder), "stages": [{"name": "s", **entry}]}
    return run_plan(make_plan(tree, config_folder=folder.parent), quiet=True)["s"]


def rows_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(row) for row in load_rows(DataOptions(path=manifest["outputs"]["data"]))]


def write(path: Path, rows: list[dict[str, Any]]) -> dict[str, str]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(path)}


# -- mix -------------------------------------------------------------------------------------------------------------------


def sources(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    domain = [{"prompt": f"d{i}", "completion": "x", "kind": "rare" if i < 4 else "common"} for i in range(104)]
    return write(folder / "domain.jsonl", domain), write(folder / "general.jsonl", [
        {"prompt": f"g{i}", "completion": "y", "note": i} for i in range(10)])


def test_shares_rows_and_added_columns(tmp_path: Path) -> None:
    domain, general = sources(tmp_path)
    manifest = run(tmp_path / "run", kind="mix", sources=[
        {"data": domain, "add": {"task": "shop"}}, {"data": general, "share": 0.2, "add": {"task": "talk"}}])
    rows = rows_of(manifest)
    assert Counter(row["task"] for row in rows) == {"shop": 104, "talk": 26}
    repeated = Counter(row["prompt"] for row in rows if row["task"] == "talk")
    assert set(repeated.values()) == {2, 3}  # none a third time before all came twice
    assert {row["note"] for row in rows if row["task"] == "shop"} == {None}
    assert len({row["id"] for row in rows}) == 130
    assert [row["task"] for row in rows] != sorted(row["task"] for row in rows)
    assert rows == rows_of(run(tmp_path / "again", kind="mix", sources=manifest["config"]["sources"]))


def test_a_share_of_zero_is_not_even_read(tmp_path: Path) -> None:
    domain, _ = sources(tmp_path)
    rows = rows_of(run(tmp_path / "run", kind="mix", shuffle=False, columns=["prompt"], sources=[
        {"data": domain}, {"data": {"path": str(tmp_path / "nowhere.jsonl")}, "share": 0}]))
    assert [row["prompt"] for row in rows] == [f"d{i}" for i in range(104)]
    assert set(rows[0]) == {"prompt", "id"}


@pytest.mark.parametrize(("exponent", "expected"), [(0.0, 0.5), (0.5, 2 / 12), (1.0, 4 / 104)])
def test_rare_groups_are_weighted_by_a_power_of_their_size(exponent: float, expected: float, tmp_path: Path) -> None:
    domain, _ = sources(tmp_path)
    source = {"data": domain, "by": "kind", "exponent": exponent, "rows": 3000}
    rows = rows_of(run(tmp_path / "run", kind="mix", sources=[source]))
    assert sum(row["kind"] == "rare" for row in rows) / 3000 == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(("entries", "message"), [
    ([], "sources is empty"), ([{"share": 0.5}], "leave nothing to be a share of"),
    ([{"rows": 3, "share": 0.5}, {}], "rows and share exclude"), ([{"share": 1.0}, {}], r"share must be in \[0, 1\)"),
    ([{"by": "sort"}], "sources.0.by: row 0 has no 'sort'"), ([{"exponent": -1}], "exponent must be 0 or positive"),
    ([{"rows": 0}], "every source is left out"),
])
def test_mix_refuses(entries: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    domain, _ = sources(tmp_path)
    with pytest.raises(MmalignError, match=message):
        run(tmp_path / "run", kind="mix", sources=[{"data": domain, **entry} for entry in entries])


def test_mix_refuses_two_forms_of_rows(tmp_path: Path) -> None:
    domain, _ = sources(tmp_path)
    text = write(tmp_path / "text.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match="some have 'text' and others 'completion'"):
        run(tmp_path / "run", kind="mix", sources=[{"data": domain}, {"data": text}])


# -- weak_tasks ------------------------------------------------------------------------------------------------------------


def test_weakest_tasks_by_threshold_and_by_fraction() -> None:
    scores = {"a": 0.9, "b": 0.2, "c": 0.5, "d": 0.2, "e": 0.7, "f": 0.95}
    assert weakest(scores, threshold=0.6, fraction=0.1) == ["b", "d", "c"]
    assert weakest(scores, threshold=None, fraction=1 / 3) == ["b", "d"]
    assert weakest(scores, threshold=0.1, fraction=1 / 3) == ["b", "d"]  # none is below: the worst third
    assert weakest({"a": 0.9}, threshold=None, fraction=0.2) == ["a"]


def test_rows_of_weak_tasks_are_kept(tmp_path: Path) -> None:
    folder = write_stage(tmp_path / "evaluation", metrics={
        "eval/score": 0.5, "group/x/score": 0.9, "group/x/score/error": 0.1, "group/y/score": 0.1, "group/z/score": 0.4,
        "group/x/other": 0.0, "group/y/other": 1.0, "group/z/other": 1.0})
    data = write(tmp_path / "rows.jsonl", [{"prompt": f"{i}", "task": "xyz"[i % 3]} for i in range(9)])
    manifest = run(tmp_path / "run", kind="weak_tasks", evaluation=str(folder), data=data)
    assert {row["task"] for row in rows_of(manifest)} == {"y"}
    assert manifest["metrics"]["score/z"] == 0.4
    assert manifest["details"]["weak"] == ["y"]
    other = run(tmp_path / "other", kind="weak_tasks", evaluation=str(folder), data=data, measure="other", weak_threshold=0.5)
    assert {row["task"] for row in rows_of(other)} == {"x"}


def test_without_a_map_of_capabilities_nothing_is_weak(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", [{"prompt": "p", "task": "x"}])
    plain = write_stage(tmp_path / "plain", metrics={"eval/score": 0.5})
    lacking = write_stage(tmp_path / "lacking", metrics={"group/y/score": 0.5})
    for folder, options, message in (
        (tmp_path / "none", {}, "no folder of a finished stage.*evaluate the model per task first"),
        (plain, {}, "was not measured per task"), (lacking, {}, "task 'y' is weak, and there are no training rows"),
        (lacking, {"measure": "bleu"}, "'bleu' was not measured"), (lacking, {"by": "sort"}, "no column 'sort'"),
        (lacking, {"weak_fraction": 0}, "weak_fraction must be"),
    ):
        with pytest.raises(MmalignError, match=message):
            run(tmp_path / "run", kind="weak_tasks", evaluation=str(folder), data=data, **options)


# -- forgetting_matrix, compare_learners -----------------------------------------------------------------------------------


def cells(folder: Path, scores: list[list[float]], start: list[float]) -> dict[str, Any]:
    def stage(name: str, value: float) -> str:
        return str(write_stage(folder / name, metrics={"eval/accuracy": value, "eval/accuracy/error": 0.1, "eval/style": 0.0}))

    return {"cells": [[stage(f"e{k}{j}", value) for j, value in enumerate(row)] for k, row in enumerate(scores)],
            "start": [stage(f"s{j}", value) for j, value in enumerate(start)]}


def test_matrix_of_a_sequence(tmp_path: Path) -> None:
    scores = [[0.60, 0.1, 0.2], [0.50, 0.70, 0.3], [0.45, 0.66, 0.80]]
    probe = {"before": str(write_stage(tmp_path / "p0", metrics={"nll": 2.0})),
             "after": str(write_stage(tmp_path / "p1", metrics={"nll": 2.5}))}
    manifest = run(tmp_path / "run", kind="forgetting_matrix", tasks=list("abc"), stages=list("abc"),
                   **cells(tmp_path, scores, [0.0, 0.05, 0.1]), general={"text": probe})
    metrics = manifest["metrics"]
    assert metrics["average_accuracy"] == pytest.approx(0.636667, abs=1e-6)
    assert metrics["backward_transfer"] == pytest.approx(-0.095)
    assert metrics["backward_transfer_over_all"] == pytest.approx(-0.063333, abs=1e-6)
    assert metrics["general/text/change"] == pytest.approx(-0.5)  # likelihoods are turned: higher is better
    folder = Path(manifest["outputs"]["folder"])
    assert json.loads((folder / "matrix.json").read_text())["scores"] == scores
    assert (folder / "matrix.csv").read_text().splitlines()[1] == "start,0.0,0.05,0.1"
    assert (folder / "matrix.png").stat().st_size > 1000


def test_matrix_of_training_on_all_at_once_has_no_forgetting(tmp_path: Path) -> None:
    metrics = run(tmp_path / "run", kind="forgetting_matrix", tasks=["a", "b"], stages=["all"],
                  **cells(tmp_path, [[0.5, 0.7]], [0.1, 0.1]))["metrics"]
    assert metrics["average_accuracy"] == pytest.approx(0.6)
    assert "forgetting" not in metrics


def test_missing_cells_are_refused(tmp_path: Path) -> None:
    made = cells(tmp_path, [[0.1, 0.2], [0.3, 0.4]], [0.0, 0.0])
    for change, message in (
        ({"cells": made["cells"][:1]}, "cells has 1 rows for 2 stages"),
        ({"cells": [made["cells"][0], made["cells"][1][:1]]}, "'b' has 1 of 2 evaluations"),
        ({"start": made["start"][:1]}, "'start' has 1 of 2"), ({"tasks": ["a", "a"]}, "used twice"),
        ({"measure": "bleu"}, r"'bleu' was not measured in .*cells\[0\]\[0\]"),
        ({"cells": [made["cells"][0], [str(tmp_path / "nowhere"), made["cells"][1][1]]]}, r"cells\[1\]\[0\].*no folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(tmp_path / "run", kind="forgetting_matrix", **{"tasks": ["a", "b"], "stages": ["a", "b"], **made, **change})


def curve(folder: Path, points: dict[int, dict[str, float]]) -> str:
    for step, scores in points.items():
        target = folder / "samples" / f"step-{step}"
        target.mkdir(parents=True)
        groups = {f"group/{task}/score{end}": value for task, value in scores.items() for end in ("", "/error")}
        (target / "metrics.json").write_text(json.dumps({"eval/score": 0.0} | groups))
    return str(folder)


def test_learners_are_read_where_they_reach_the_level(tmp_path: Path) -> None:
    before = {task: str(write_stage(tmp_path / f"before-{task}", metrics={"eval/accuracy": value}))
              for task, value in (("old", 0.9), ("new", 0.3))}
    fast = curve(tmp_path / "fast", {10: {"old": 0.5, "new": 0.95}, 20: {"old": 0.1, "new": 1.0}})
    slow = curve(tmp_path / "slow", {10: {"old": 0.88, "new": 0.6}, 20: {"old": 0.85, "new": 0.8}})
    never = curve(tmp_path / "never", {10: {"old": 0.9, "new": 0.4}})
    manifest = run(tmp_path / "run", kind="compare_learners", levels={"new": 0.8}, curves=[
        {"learner": name, "task": "new", "folder": folder, "before": before}
        for name, folder in (("sft", fast), ("rl", slow), ("lazy", never))])
    metrics = manifest["metrics"]
    assert (metrics["step/sft/new"], metrics["at_level/sft/new/old"]) == (10, 0.5)
    assert (metrics["step/rl/new"], metrics["at_level/rl/new/old"]) == (20, 0.85)
    assert metrics["change/sft/new"] == pytest.approx(-0.4)
    assert "step/lazy/new" not in metrics
    crossings = json.loads((Path(manifest["outputs"]["folder"]) / "comparison.json").read_text())["crossings"]
    assert crossings[2]["step"] is None
    assert crossings[2]["highest"] == 0.4


def test_compare_learners_refuses(tmp_path: Path) -> None:
    plain = tmp_path / "plain" / "samples" / "step-1"
    plain.mkdir(parents=True)
    (plain / "metrics.json").write_text('{"eval/score": 1.0}')
    entry = {"learner": "x", "task": "new"}
    for options, message in (
        ({}, "nothing to compare"), ({"curves": [{**entry, "folder": "f"}]}, "no level for task 'new'"),
        ({"curves": [{**entry, "folder": str(tmp_path)}], "levels": {"new": 1}}, "was not evaluated while it trained"),
        ({"curves": [{**entry, "folder": str(tmp_path / "plain")}], "levels": {"new": 1}}, "not per task; set evaluation.by"),
        ({"matrices": {"x": str(tmp_path)}}, "matrices.x: .* no folder of a finished forgetting_matrix"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(tmp_path / "run", kind="compare_learners", **options)


def test_the_report_shows_the_figures_of_a_stage(tmp_path: Path) -> None:
    from mmalign.report.page import write_report

    run(tmp_path / "run", kind="forgetting_matrix", tasks=["a"], stages=["a"], **cells(tmp_path, [[0.5]], [0.1]))
    page = write_report(tmp_path / "run").read_text()
    assert 'src="data:image/png;base64,' in page
    assert "<figcaption>matrix</figcaption>" in page
