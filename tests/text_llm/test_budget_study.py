"""The budget study: the cold start of preferences without fine-tuning, nested pools, and the surface it draws."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmalign.errors import ConfigError, DataError
from mmalign.stage_kinds.response_surface import best_shares, isoquant, summarise
from mmalign.stages import make_plan, run_plan
from text_llm.evaluation.budget_study import _batched

STYLE = "def style(prompts, completions, **columns):\n    return [float(text.startswith('#')) for text in completions]\n"
SMALL = {"encoding": {"max_length": 48}, "optimizers": [{"lr": 3e-3}]}
TRAIN = {"sft": {**SMALL, "epochs": 6}, "preference": {**SMALL, "epochs": 2, "optimizers": [{"lr": 1e-3}]}}


def files(folder: Path) -> dict[str, dict[str, Any]]:
    """Sums answered directly (what the base is taught), worked answers behind a marker, and right against wrong ones."""
    sums = [(a, b) for a in range(20) for b in range(20)]
    sums = sorted(sums, key=lambda pair: (31 * pair[0] + 17 * pair[1]) % 401)
    prompts = [f"{a}+{b}=" for a, b in sums]
    direct = [{"prompt": p, "completion": str(a + b)} for p, (a, b) in zip(prompts, sums, strict=True)]
    worked = [{"prompt": p, "completion": f"#{a},{b}:{a + b}"} for p, (a, b) in zip(prompts, sums, strict=True)]
    pairs = [{"prompt": p, "chosen": f"#{a},{b}:{a + b}", "rejected": f"#{a},{b}:{a + b + 1}"}
             for p, (a, b) in zip(prompts, sums, strict=True)]
    found = {}
    for name, rows in (("direct", direct), ("worked", worked[:360]), ("pairs", pairs[:360]), ("test", direct[360:])):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found[name] = {"path": str(path)}
    (folder / "mine.py").write_text(STYLE)
    return found


def study(folder: Path, data: dict[str, dict[str, Any]], **options: Any) -> Any:
    tree = {
        "run_dir": str(folder / "run"), "method": "budget_study", "model": {"path": "asset:tiny_llama"}, "rows": data["worked"],
        "pairs": data["pairs"], "evaluation": {"data": data["test"], "rewards": [{"name": "mine.py:style"}],
                                               "sampling": {"max_new_tokens": 3, "temperature": 0}}, **TRAIN, **options}
    return make_plan(tree, config_folder=folder)


@pytest.mark.slow
def test_preferences_alone_have_a_cold_start_that_a_tenth_of_the_budget_removes(tmp_path: Path) -> None:
    data = files(tmp_path)
    base = run_plan(make_plan({
        "run_dir": str(tmp_path / "base"), "method": "sft", "model": {"path": "asset:tiny_llama"}, "data": data["direct"],
        "steps": 100, "batch": {"examples_per_update": 16}, **SMALL}, config_folder=tmp_path), quiet=True)
    start = next(iter(base.values()))["outputs"]["model"]
    manifests = run_plan(study(tmp_path, data, model={"path": start}, budgets=[200], shares=[0, 0.9, 1], seeds=[0, 1, 2],
                               sft={**SMALL, "epochs": 8}, target=0.9), quiet=True)
    surface = manifests["surface"]
    metrics = surface["metrics"]
    print(metrics)
    assert metrics["start"] < 0.05
    assert metrics["value/200/1"] < 0.1  # same style in both answers of a pair: its tokens get no direct gradient
    assert metrics["value/200/0.9"] > 0.9
    assert metrics["value/200/0"] > 0.9
    assert "isoquant/1" not in metrics
    assert metrics["isoquant/0.9"] == 200
    table = list(csv.DictReader(Path(surface["outputs"]["table"]).read_text().splitlines()))
    assert [(row["share"], row["runs"]) for row in table] == [("0.0", "3"), ("0.9", "3"), ("1.0", "3")]
    runs = list(csv.DictReader((Path(surface["outputs"]["plot"]).parent / "runs.csv").read_text().splitlines()))
    assert {(row["rows"], row["pairs"]) for row in runs} == {("200", "0"), ("20", "180"), ("0", "200")}
    assert Path(surface["outputs"]["plot"]).stat().st_size > 10_000


def weights(folder: str) -> dict[str, torch.Tensor]:
    return load_file(next(Path(folder).glob("*.safetensors")))


def test_the_edges_are_plain_runs_and_pools_are_nested(tmp_path: Path) -> None:
    data = files(tmp_path)
    options = {"budgets": [12, 24], "shares": [0, 0.5, 1], "seeds": [3]}
    manifests = run_plan(study(tmp_path, data, **options), quiet=True)
    pools = manifests["pools-seed3"]["outputs"]
    for name, method, train in (("sft-24-seed3", "sft", "sft"), ("dpo-0-24-seed3", "dpo", "preference")):
        pool = pools["rows" if method == "sft" else "pairs"]
        plain = run_plan(make_plan({
            "run_dir": str(tmp_path / name), "method": method, "seed": 3, "model": {"path": "asset:tiny_llama"},
            "data": {"path": pool, "limit": 24}, "batch": {"examples_per_update": 6}, **TRAIN[train]},
            config_folder=tmp_path), quiet=True)
        mine, theirs = weights(manifests[name]["outputs"]["model"]), weights(next(iter(plain.values()))["outputs"]["model"])
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert manifests["dpo-12-12-seed3"]["config"]["model"]["path"] == manifests["sft-12-seed3"]["outputs"]["model"]
    assert manifests["dpo-12-12-seed3"]["config"]["batch"]["examples_per_update"] == 3  # four updates an epoch
    assert manifests["dpo-12-12-seed3"]["config"]["data"]["limit"] == 12  # the first rows of one order: always nested
    assert sum(name.startswith("sft-12-") for name in manifests) == 1  # bought by two cells, trained once
    first = Path(manifests["dpo-12-12-seed3"]["outputs"]["metrics"]).read_text().splitlines()[0]
    assert '"loss": 0.6931' in first  # the reference is the fine-tuned model


def test_pools_are_shuffled_by_the_seed(tmp_path: Path) -> None:
    from mmalign.data.loading import DataOptions, load_rows

    data = files(tmp_path)
    prompts = []
    for seed in (0, 0, 1):
        stage = {"name": "p", "kind": "budget_pools", "seed": seed, "rows": data["worked"], "pairs": data["pairs"],
                 "rows_needed": 20, "pairs_needed": 0}
        folder = tmp_path / f"run{len(prompts)}"
        made = run_plan(make_plan({"run_dir": str(folder), "stages": [stage]}, config_folder=tmp_path), quiet=True)
        prompts.append([row["prompt"] for row in load_rows(DataOptions(path=made["p"]["outputs"]["rows"]))])
    assert prompts[0] == prompts[1] != prompts[2]
    assert len(prompts[0]) == 20


def test_pools_refuse_repeats_and_test_prompts(tmp_path: Path) -> None:
    data = files(tmp_path)
    with pytest.raises(DataError, match="rows: the study buys up to 400 rows, and the pool has 360; nothing is repeated"):
        run_plan(study(tmp_path, data, budgets=[400], shares=[0], seeds=[0]), quiet=True)
    leaking = {**data, "test": data["direct"]}
    with pytest.raises(DataError, match=r"rows: the prompt of row .* is also in\s+evaluation.data"):
        run_plan(study(tmp_path / "..", leaking, run_dir=str(tmp_path / "leak"), budgets=[40], shares=[0], seeds=[0],
                       evaluation={"data": data["direct"], "rewards": [{"name": str(tmp_path / "mine.py:style")}],
                                   "sampling": {"max_new_tokens": 2}}), quiet=True)


@pytest.mark.parametrize(("options", "message"), [
    ({"budgets": [100], "shares": [1.5]}, r"share of preference pairs must be in \[0, 1\]"),
    ({"budgets": [100], "shares": [-0.1]}, "share of preference pairs"),
    ({"budgets": [100], "row_price": 0}, "prices must be positive"), ({"budgets": [0]}, "must be positive"),
    ({"budgets": []}, "budgets: give at least one value"), ({"budgets": [100], "seeds": [1, 1]}, "seeds: .* each once"),
    ({"budgets": [1], "pair_price": 2, "row_price": 2}, "buys neither a row nor a pair"),
    ({"budgets": [100], "sft": {"steps": 5}}, "sft.epochs: required"),
    ({"budgets": [100], "preference": {"epochs": 1, "model": {"path": "x"}}}, "preference.model: is set by the study"),
    ({"budgets": [100], "evaluation": {"rewards": []}}, "evaluation.data: required"),
])
def test_refusals(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        study(tmp_path, files(tmp_path), **options)


@pytest.mark.parametrize(("asked", "count", "expected"), [(16, 200, 16), (16, 20, 5), (16, 3, 1), (None, 1000, 16)])
def test_batches_are_at_most_a_quarter_of_the_rows(asked: int | None, count: int, expected: int) -> None:
    node = {"epochs": 1} if asked is None else {"epochs": 1, "batch": {"examples_per_update": asked}}
    assert _batched(node, count, "sft")["batch"]["examples_per_update"] == expected


def test_batches_stay_multiples_of_the_forward() -> None:
    node = {"batch": {"examples_per_update": 32, "examples_per_forward": 4}}
    assert _batched(node, 60, "sft")["batch"] == {"examples_per_update": 12, "examples_per_forward": 4}
    assert _batched(node, 8, "sft")["batch"] == {"examples_per_update": 2, "examples_per_forward": 2}


def test_surface_numbers() -> None:
    surface = summarise([(100, 0, 0.25), (100, 0, 0.75), (100, 1, 0.5), (300, 0, 0.5), (300, 1, 0.75)])
    assert surface[100, 0] == (0.5, 0.25, 2)
    assert math.isnan(surface[100, 1][1])
    assert best_shares(surface) == {100: 0, 300: 1}  # a tie goes to the smaller share
    assert best_shares(surface, higher_is_better=False) == {100: 0, 300: 0}
    assert isoquant(surface, 0.5) == {0: 100, 1: 100}
    assert isoquant(surface, 0.6) == {0: math.inf, 1: 300}
    assert isoquant(surface, 0.5, higher_is_better=False)[0] == 100
