"""RSO as a pipeline: what it plans, what it refuses, and that accepted samples teach more than plain ones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from mmalign.config import parse
from mmalign.data.loading import DataOptions, load_rows
from mmalign.errors import ConfigError
from mmalign.stages import load_plan, make_plan, run_plan
from text_llm.preference.rso import RSOOptions, rso

PAIRS = {"path": "asset:arithmetic", "limit": 16, "arguments": {"pairs": True, "form": "text", "levels": [1, 2]}}
PROMPTS = {"path": "asset:arithmetic", "limit": 8, "arguments": {"form": "text", "levels": [1, 2]}}
RULE = [{"name": "length_penalty", "unit": "characters", "max_length": 20}]
BASE: dict[str, Any] = {"model": {"path": "asset:tiny_llama"}, "data": PROMPTS}


def stages(**options: Any) -> dict[str, dict[str, Any]]:
    return {stage["name"]: stage for stage in rso(parse(RSOOptions, {**BASE, **options})).stages}


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "slic"])
@pytest.mark.parametrize("source", ["direct", "sft_sample_rank", "rso_sample_rank"])
def test_the_grid_of_losses_and_sources(loss: str, source: str, tmp_path: Path) -> None:
    options = {**BASE, "method": "rso", "loss": loss, "source": source, "preferences": PAIRS, "gamma": 0.2, "rewards": RULE}
    plan = make_plan({**options, "run_dir": str(tmp_path)}, config_folder=tmp_path)
    planned = {stage.name: stage for stage in plan.stages}
    assert planned["train"].tree["losses"] == [{"name": loss, "beta": 0.2}]
    if source == "direct":
        assert list(planned) == ["train"]
        assert planned["train"].tree["data"] == PAIRS
    else:
        assert list(planned) == ["samples", "scores", "pairs", "train"]
        assert planned["pairs"].tree["beta"] == (math.inf if source == "sft_sample_rank" else 0.5)
        assert planned["samples"].tree["sampling"] == {"temperature": 0.7, "top_k": 40}
        assert planned["train"].tree["model"] == BASE["model"]  # the reference is a copy of it


def test_a_ranking_model_scores_against_a_baseline_and_decides_pairs() -> None:
    made = stages(preferences=PAIRS, ranker={"steps": 3})
    assert list(made) == ["ranker", "baseline", "samples", "scores", "pairs", "train"]
    assert made["ranker"]["method"] == "ranking_model"
    assert made["ranker"]["data"] == PAIRS
    assert made["samples"]["data"]["columns"]["completion"] == "baseline"
    assert made["scores"]["rewards"][0]["name"] == "pairwise_ranker"
    assert made["pairs"]["ranker"] == {"path": "${stages.ranker.model}"}
    scored = stages(preferences=PAIRS, ranker={"method": "reward_model"}, sft={"data": PROMPTS})
    assert list(scored) == ["sft", "ranker", "samples", "scores", "pairs", "train"]
    assert scored["scores"]["rewards"] == [{"name": "reward_model", "path": "${stages.ranker.model}"}]
    assert "ranker" not in scored["pairs"]
    assert scored["train"]["model"]["path"] == scored["samples"]["model"]["path"] == "${stages.sft.model}"


def test_slic_regulariser() -> None:
    made = stages(rewards=RULE, loss="slic", slic_reg=0.3)
    assert made["train"]["losses"][1] == {"name": "nll", "on": "gold", "weight": 0.3}


@pytest.mark.parametrize(("options", "message"), [
    ({"gamma": 0.0, "rewards": RULE}, "gamma must be positive"),
    ({"source": "direct"}, "preferences: source direct"),
    ({"data": None, "rewards": RULE}, "data: source rso_sample_rank"),
    ({}, "rewards and ranker: give exactly one"), ({"rewards": RULE, "ranker": {}, "preferences": PAIRS}, "give exactly one"),
    ({"ranker": {}}, "preferences: the ranker"), ({"ranker": {"method": "dpo"}, "preferences": PAIRS}, "ranker.method: 'dpo'"),
    ({"rewards": RULE, "selection": {"n": 65}}, "selection.n is 65"),
    ({"rewards": RULE, "selection": {"n": 1}}, "selection.n is 1"),
    ({"rewards": RULE, "selection": {"beta": -1.0}}, "selection.beta"), ({"rewards": RULE, "loss": "ipo"}, "loss"),
    ({"rewards": RULE, "slic_reg": 0.1}, "slic_reg"), ({"rewards": RULE, "train": {"losses": []}}, "train.losses: is set by"),
])
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(RSOOptions, {**BASE, **options})


def test_a_wrong_key_of_an_inner_stage_is_found_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stages\.train\.stpes"):
        make_plan({**BASE, "method": "rso", "rewards": RULE, "train": {"stpes": 3}, "run_dir": str(tmp_path)},
                  config_folder=tmp_path)


def test_the_small_configuration_trains_on_what_its_ranker_prefers(root: Path, tmp_path: Path) -> None:
    plan = load_plan(root / "configs/text/rso.yaml", ["sft.steps=2", "ranker.steps=2", "train.steps=2", "data.limit=6"],
                     run_dir=str(tmp_path))
    manifests = run_plan(plan, quiet=True)
    scored = list(load_rows(DataOptions(path=manifests["scores"]["outputs"]["data"]), seed=0))
    assert len(scored) == 6 * 8
    assert all(row["baseline"] is not None for row in scored)
    same = [row["score"] for row in scored if row["completion"] == row["baseline"]]
    assert all(abs(score) < 1e-9 for score in same)
    assert (Path(manifests["train"]["outputs"]["model"]) / "config.json").is_file()


EVENNESS = '''
def evenness(completions, **columns):
    """Even digits minus odd digits, halved."""
    return [sum((1 if c in "02468" else -1) for c in text if c.isdigit()) / 2 for text in completions]
'''


def trained(folder: Path, seed: int) -> dict[str, dict[str, Any]]:
    """One SFT model, and from it a policy of each source with the same numbers of prompts and pairs."""
    folder.mkdir()
    (folder / "mine.py").write_text(EVENNESS)
    data = {**PROMPTS, "limit": 48}
    sampling, rewards = {"temperature": 1.0, "max_new_tokens": 4}, [{"name": "mine.py:evenness"}]

    def evaluated(name: str, model: str) -> dict[str, Any]:
        return {"name": name, "kind": "evaluate", "model": {"path": model}, "data": {**data, "split": "test", "limit": 64},
                "rewards": rewards, "sampling": sampling, "completions_per_prompt": 4}

    entries = [{"name": "sft", "method": "sft", "model": BASE["model"], "data": {**data, "limit": 256}, "steps": 80,
                "batch": {"examples_per_update": 16}, "optimizers": [{"lr": 3e-3}]}, evaluated("before", "${stages.sft.model}")]
    for source in ("sft_sample_rank", "rso_sample_rank"):
        entries += [{
            "name": source, "method": "rso", "model": {"path": "${stages.sft.model}"}, "data": data, "source": source,
            "rewards": rewards, "gamma": 0.1, "completions_per_prompt": 16, "sampling": sampling, "selection": {"n": 4},
            "train": {"batch": {"examples_per_update": 16}, "steps": 30, "optimizers": [{"lr": 5e-4}]},
        }, evaluated(f"after_{source}", f"${{stages.{source}.model}}")]
    tree = {"run_dir": str(folder / "run"), "seed": seed, "stages": entries}
    return run_plan(make_plan(tree, config_folder=folder), quiet=True)


@pytest.mark.slow
def test_accepted_samples_teach_more_than_plain_samples(tmp_path: Path) -> None:
    """Held-out reward of the policies of both sources, three seeds."""
    means = {"before": 0.0, "after_sft_sample_rank": 0.0, "after_rso_sample_rank": 0.0}
    for seed in range(3):
        manifests = trained(tmp_path / str(seed), seed)
        for name in means:
            means[name] += manifests[name]["metrics"]["eval/evenness"] / 3
        pairs = manifests["rso_sample_rank-pairs"]["metrics"]
        assert pairs["score/accepted"] > pairs["score/candidates"] + 0.2
    assert means["before"] + 0.3 < means["after_sft_sample_rank"] < means["after_rso_sample_rank"]
