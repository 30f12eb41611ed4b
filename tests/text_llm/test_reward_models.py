"""The methods reward_model and ranking_model: data, options, and that they learn which answer is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign.config import parse
from mmalign.data.ranking import LABELS
from mmalign.errors import MmalignError
from mmalign.rewards.base import RewardSet
from mmalign.stages import make_plan, run_plan
from text_llm.preference.ranking_model import comparisons
from text_llm.preference.reward_model import RewardModelOptions

WORDS = ["the", "is", "and", "of", "to", "a", "in", "are"]
TRAIN = {"batch": {"examples_per_update": 16}, "steps": 60, "optimizers": [{"lr": 3e-3}], "model": {"path": "asset:tiny_llama"}}


def pairs(count: int, *, seed: int = 0, **columns: Any) -> list[dict[str, Any]]:
    """The right answer of a prompt ends in yes, the wrong one in no."""
    generator, rows = torch.Generator().manual_seed(seed), []
    for i in range(count):
        words = " ".join(WORDS[k] for k in torch.randint(len(WORDS), (3,), generator=generator).tolist())
        rows.append({"prompt": f"How {words}", "chosen": f" {WORDS[i % 8]} yes", "rejected": f" {WORDS[(3 * i) % 8]} no",
                     "id": str(i), **{name: make(i) for name, make in columns.items()}})
    return rows


def written(folder: Path, rows: list[dict[str, Any]]) -> dict[str, str]:
    file = folder / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return {"path": str(file)}


def run(folder: Path, **options: Any) -> dict[str, Any]:
    manifests = run_plan(make_plan({"run_dir": str(folder), **TRAIN, **options}, config_folder=folder.parent), quiet=True)
    return next(iter(manifests.values()))


def record(folder: Path) -> dict[str, float]:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_reward_model_learns_and_is_a_reward(tmp_path: Path, tuning: str) -> None:
    lr = [{"lr": 3e-3 if tuning == "full" else 1e-2}]
    done = run(tmp_path / "run", method="reward_model", data=written(tmp_path, pairs(128)), center_rewards_coefficient=0.01,
               tuning={"name": tuning}, optimizers=lr)
    assert record(tmp_path / "run")["accuracy"] > 0.9
    assert record(tmp_path / "run")["rewards/margin"] > 0.5
    held = pairs(32, seed=7)
    rewards = RewardSet([{"name": "reward_model", "path": done["outputs"]["model"]}])
    prompts = [row["prompt"] for row in held]
    better, worse = (rewards.score_samples(prompts, [row[side] for row in held]) for side in ("chosen", "rejected"))
    assert float((better > worse).float().mean()) > 0.9


def test_a_ranking_model_learns_and_ranks_either_way_round(tmp_path: Path) -> None:
    template = "{prompt} A{first} B{second} which"
    done = run(tmp_path / "run", method="ranking_model", data=written(tmp_path, pairs(256)), template=template, order="both",
               steps=160)
    held = pairs(32, seed=7)
    rewards = RewardSet([{"name": "pairwise_ranker", "path": done["outputs"]["model"]}])
    prompts, right, wrong = ([row[name] for row in held] for name in ("prompt", "chosen", "rejected"))
    values = rewards.score_samples(prompts, right, baseline=wrong)
    assert float((values > 0).float().mean()) > 0.9
    assert json.loads((Path(done["outputs"]["model"]) / "mmalign.json").read_text())["ranking_template"] == template


def test_a_margin_column_is_used_when_it_is_there(tmp_path: Path) -> None:
    data = written(tmp_path, pairs(16, margin=lambda i: 4.0))
    losses = {}
    for margin in (None, True, False):
        run(tmp_path / str(margin), method="reward_model", data=data, steps=1, margin=margin)
        losses[margin] = record(tmp_path / str(margin))
    assert losses[None]["loss/bt_reward_margin"] == losses[True]["loss/bt_reward_margin"] > losses[False]["loss/bt_reward"] + 2
    with pytest.raises(MmalignError, match="margin: the data have no column 'margin'"):
        run(tmp_path / "none", method="reward_model", data=written(tmp_path, pairs(16)), steps=1, margin=True)


def test_a_reward_model_resumes(tmp_path: Path) -> None:
    data = written(tmp_path, pairs(32))
    options = {"method": "reward_model", "data": data, "checkpoint": {"every": 2}, "tuning": {"name": "lora"}}
    whole = run(tmp_path / "whole", **options, steps=6)
    run(tmp_path / "part", **options, steps=6)
    checkpoints = tmp_path / "part" / "checkpoints"
    import shutil

    shutil.rmtree(checkpoints / "step-6")
    (tmp_path / "part" / "manifest.json").write_text(
        (tmp_path / "part" / "manifest.json").read_text().replace('"done"', '"running"'))
    again = run(tmp_path / "part", **options, steps=6)
    from safetensors.torch import load_file

    one, two = (load_file(Path(done["outputs"]["model"]) / "adapter_model.safetensors") for done in (whole, again))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(MmalignError, match="center_coef must be 0 or positive"):
        run(tmp_path / "a", method="reward_model", data=written(tmp_path, pairs(4)), center_coef=-1.0)
    with pytest.raises(MmalignError, match="evaluation samples from the model"):
        run(tmp_path / "b", method="reward_model", data=written(tmp_path, pairs(4)),
            evaluation={"data": {"path": "asset:arithmetic"}, "rewards": ["answer_match"]})
    with pytest.raises(MmalignError, match="needs a column 'rejected'"):
        run(tmp_path / "c", method="ranking_model", data=written(tmp_path, [{"prompt": "x", "chosen": "y"}]))
    with pytest.raises(MmalignError, match="once each"):
        run(tmp_path / "d", method="ranking_model", data=written(tmp_path, pairs(4)), template="{prompt}")


def test_long_rows_are_dropped_by_default() -> None:
    options = parse(RewardModelOptions, {"model": {"path": "x"}, "data": {"path": "y"}, "encoding": {"max_length": 8}})
    assert options.encoding.truncation == "drop"


def test_comparisons_flip_by_a_coin_of_the_row() -> None:
    rows = pairs(64)
    made = comparisons(rows, seed=1)
    flipped = [row["completion"] == LABELS[1] for row in made]
    assert 16 < sum(flipped) < 48
    for row, source, flip in zip(made, rows, flipped, strict=True):
        first, second = (source["rejected"], source["chosen"]) if flip else (source["chosen"], source["rejected"])
        assert row["prompt"] == f"[CONTEXT] {source['prompt']} [RESPONSE A] {first} [RESPONSE B] {second}"
    assert made == comparisons(rows, seed=1)
    assert made[:10] == comparisons(rows[:10], seed=1)
    assert made != comparisons(rows, seed=2)
    both = comparisons(rows, seed=1, order="both")
    assert [row["completion"] for row in both[:4]] == [*LABELS, *LABELS]
    assert len({row["id"] for row in both}) == 128


def test_comparisons_of_a_data_set_stay_on_disk_and_skip_equal_responses() -> None:
    from datasets import Dataset

    rows = [*pairs(5), {"prompt": "x", "chosen": "same", "rejected": "same", "id": "equal"}]
    made = comparisons(Dataset.from_list(rows), seed=1)
    assert set(made.column_names) == {"prompt", "completion", "id"}
    assert [dict(row) for row in made] == comparisons(rows, seed=1)
    assert len(made) == 5
