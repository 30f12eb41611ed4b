"""RedOne 2.0: its stages, what it refuses, and what soft labels and reinforcement keep of the general abilities."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_tasks import REWARDS, reinforced, rows, supervised, write

from mmalign.core.advantages import group_filter, grpo, overlong_penalty
from mmalign.data.loading import DataOptions, load_rows
from mmalign.data.short_tasks import make_short_tasks
from mmalign.errors import ConfigError, DataError
from mmalign.policies.loading import ModelOptions, load_policy
from mmalign.stage_kinds.records import save_records
from mmalign.stages import make_plan, run_plan

REWARD = {"exact": "exact_match", "sandbox": {"name": "execution_match", "seconds": 2}}


def plan(folder: Path, **options: Any) -> Any:
    tree = {"method": "redone2", "model": {"path": "asset:tiny_llama"}, "domain": {"path": "d.jsonl"}, "run_dir": str(folder),
            "general": {"path": "g.jsonl"}, "evaluation": {"path": "t.jsonl"}, "rewards": REWARD, **options}
    return make_plan(tree, config_folder=folder)


def stages(folder: Path, **options: Any) -> dict[str, Any]:
    return {stage.name: stage.tree for stage in plan(folder, **options).stages}


def test_three_stages(tmp_path: Path) -> None:
    made = stages(tmp_path, general_evaluation={"path": "gt.jsonl"}, overlong={"max_length": 8, "cache_length": 2, "weight": 0.5})
    training = [name for name in made if name in ("exploration", "targeted", "refinement")]
    assert training == ["exploration", "targeted", "refinement"]
    assert made["exploration-domain"]["by"] == "task"
    assert made["exploration-domain"]["compare_with"] == "${stages.start-domain.folder}"
    assert made["targeted-weak"]["evaluation"] == "${stages.exploration-domain.folder}"
    assert made["refinement-weak"]["evaluation"] == "${stages.targeted-domain.folder}"
    for name in ("exploration", "refinement"):
        rewards = made[name]["rewards"]
        assert [reward["name"] for reward in rewards] == ["route", "overlong"]
        assert made[name]["dynamic_sampling"] == {"filter_on": "score", "mode": "spread"}  # correctness, not the shaped sum
    assert [reward["name"] for reward in made["exploration-domain"]["rewards"]] == ["route"]
    assert made["exploration-rows"]["sources"][0]["exponent"] == 0.0
    assert made["targeted-rows"]["sources"][0]["exponent"] == 0.5  # rows weighted by 1 / sqrt(count)
    assert made["targeted-rows"]["sources"][1]["data"] == {"path": "${stages.soft-best.data}"}
    assert made["soft-sample"]["model"]["path"] == "${stages.exploration.model}"
    assert made["soft-sample"]["completions_per_prompt"] == 8
    assert made["soft-best"]["tie_break"] == "mean_logp"


def test_every_stage_can_be_left_out(tmp_path: Path) -> None:
    none = {"exploration": None, "targeted": None, "refinement": None}
    only = stages(tmp_path, **{**none, "targeted": {"general_share": 0}}, general=None)
    # Without general rows stage 2 is plain fine-tuning on weak tasks, known from an evaluation of the model as it is.
    assert list(only) == ["start-domain", "targeted-weak", "targeted-rows", "targeted", "targeted-domain"]
    assert only["targeted-weak"]["evaluation"] == "${stages.start-domain.folder}"
    assert len(only["targeted-rows"]["sources"]) == 1
    hard = stages(tmp_path, **{**none, "targeted": {"general_labels": "hard"}})
    assert "soft-sample" not in hard
    assert hard["targeted-rows"]["sources"][1]["data"] == {"path": "g.jsonl"}
    filtered = stages(tmp_path, **{**none, "refinement": {"filter": {"mode": "mixed", "max_pass_rate": 0.5}}})
    assert filtered["refinement-filter"]["max_pass_rate"] == 0.5
    assert filtered["refinement-rows"]["sources"][0]["data"] == {"path": "${stages.refinement-filter.data}"}


@pytest.mark.parametrize(("options", "message"), [
    ({"exploration": None, "targeted": None, "refinement": None}, "nothing to do"), ({"general": None}, "general: required"),
    ({"rewards": {}}, "rewards: map every reward_type"),
    ({"rewards": {"sandbox": "execution_match"}}, "a time limit must be given"),
    ({"rewards": {"sandbox": {"name": "execution_match"}}}, "rewards.sandbox: programs of a model may never end"),
    ({"rewards": {"sandbox": {"name": "execution_match", "seconds": float("inf")}}}, "a time limit must be given"),
    ({"exploration": {"general_share": 1.0}}, "general_share"), ({"targeted": {"weak_fraction": 0}}, "weak_fraction"),
    ({"targeted": {"completions_per_prompt": 0}}, "completions_per_prompt"),
    ({"refinement": {"rows": 0}}, "rows must be at least 1"),
    ({"targeted": {"train": {"model": {}}}}, "train.model: is set by the pipeline"),
    ({"exploration": {"train": {"stepz": 1}}}, "stepz"),
])
def test_refusals_name_the_key(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(tmp_path, **options)


def test_unknown_reward_type_is_refused_before_anything_is_sampled(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", [{**row, "reward_type": "judge"} for row in rows("b", 8, 0)])
    with pytest.raises(DataError, match="reward_type is 'judge' in some rows, and routes has exact, sandbox"):
        run_plan(plan(tmp_path / "run", domain=data, general=data, evaluation=data), quiet=True)


def test_closed_forms() -> None:
    group = torch.zeros(4, dtype=torch.long)
    advantages = grpo(torch.tensor([1.0, 1, 0, 1]), group, eps=0.0)
    assert advantages.tolist() == pytest.approx([0.5, 0.5, -1.5, 0.5])
    assert overlong_penalty(torch.tensor([4096, 6144, 8192]), max_length=8192, cache=4096).tolist() == [0.0, -0.5, -1.0]
    for value in (0.0, 1.0, 0.37):
        assert not group_filter(torch.full((4,), value), group).any()
    shaped = torch.ones(4) + overlong_penalty(torch.tensor([10, 10, 10, 16]), max_length=16, cache=8)
    assert bool(group_filter(shaped, group).any())  # equal in correctness, not in length: hence filter_on


def test_ties_go_to_the_sample_that_the_model_finds_most_likely(tmp_path: Path) -> None:
    save_records([{"prompt": "p", "completion": c, "group": 0, "id": c, "score": s, "mean_logp": l}
                  for c, s, l in (("a", 0.5, -0.1), ("b", 1.0, -2.0), ("c", 1.0, -1.0), ("d", 1.0, -1.0))], tmp_path / "data")
    for tie_break, expected in ((None, "b"), ("mean_logp", "c")):
        entry = {"name": "s", "kind": "select", "data": {"path": str(tmp_path / "data")}, "mode": "best", "tie_break": tie_break}
        tree = {"run_dir": str(tmp_path / expected), "stages": [entry]}
        found = run_plan(make_plan(tree, config_folder=tmp_path), quiet=True)["s"]["outputs"]["data"]
        assert [row["completion"] for row in load_rows(DataOptions(path=found))] == [expected]


def test_mean_logp_is_that_of_the_model(tmp_path: Path) -> None:
    entry = {"name": "g", "kind": "generate", "model": {"path": "asset:tiny_llama"}, "mean_logp": True,
             "data": write(tmp_path / "rows.jsonl", [{"prompt": "a 1 2 ="}]), "sampling": {"max_new_tokens": 3}}
    found = run_plan(make_plan({"run_dir": str(tmp_path / "run"), "stages": [entry]}, config_folder=tmp_path), quiet=True)
    row = load_rows(DataOptions(path=found["g"]["outputs"]["data"]))[0]
    assert row["mean_logp"] < 0
    policy: Any = load_policy(ModelOptions(path="asset:tiny_llama"))
    with torch.no_grad():
        rollout = policy.sample(["a 1 2 ="], 1, _sampling(), _first_generator(found["g"]["seed"]))
        again = policy.log_probs(rollout.rows).logp
    assert rollout.samples[0] == row["completion"]
    assert row["mean_logp"] == pytest.approx(float(again.sum() / rollout.mask.sum()), abs=1e-4)


def _sampling() -> Any:
    from mmalign.policies.base import TextSampling

    return TextSampling(max_new_tokens=3)


def _first_generator(seed: int) -> torch.Generator:
    from mmalign.core.seeding import generator

    return generator(seed, "g", "sampling", 0)


def test_short_tasks_have_a_right_answer_and_disjoint_splits() -> None:
    for source in ("domain", "general"):
        train, test = (make_short_tasks(split=split, source=source, seed=3) for split in ("train", "test"))
        assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
        assert {row["reward_type"] for row in train} <= {"exact", "metric", "pattern", "sandbox"}
    assert len({row["task"] for row in make_short_tasks()}) == 5
    assert len(make_short_tasks(7)) == 7
    assert make_short_tasks(3, form="messages")[0]["prompt"][0]["role"] == "user"
    for options, message in (({"split": "dev"}, "data.split"), ({"source": "web"}, "source"), ({"shares": {"x": 1}}, "shares"),
                             ({"n": 0}, "at least 1"), ({"form": "html"}, "form")):
        with pytest.raises(DataError, match=message):
            make_short_tasks(**options)  # type: ignore[arg-type]


# -- what it shows ---------------------------------------------------------------------------------------------------------


def _arms(folder: Path, base: Path, seed: int) -> dict[str, Any]:
    """Fine-tuning alone; stage 1; stage 2 after it with soft and with hard general labels."""
    (folder / "mine.py").write_text(REWARDS)
    general = [{**row, "completion": f" {row['completion']}"} for row in rows("a", 60, seed + 1)]  # right, in another form
    shared = {
        "method": "redone2", "rewards": {"exact": "mine.py:exact", "metric": "mine.py:parity"},
        "domain": write(folder / "d.jsonl", rows("b", 300, seed + 1, fixed=True), rows("c", 60, seed + 1, fixed=True)),
        "general": write(folder / "g.jsonl", general), "sampling": {"max_new_tokens": 3},
        "evaluation_sampling": {"temperature": 1.0},
        "evaluation": write(folder / "dt.jsonl", rows("b", 60, seed + 50), rows("c", 60, seed + 50)),
        "general_evaluation": write(folder / "gt.jsonl", rows("a", 100, seed + 50)), "refinement": None,
    }
    start, first = {"path": str(base)}, {"path": "${stages.one.model}"}
    second = {"weak_fraction": 1.0, "general_share": 0.5, "train": supervised(40, 5e-4)}
    explored = {"general_share": 0.3, "train": {**reinforced(36, 5e-4), "dynamic_sampling": {"max_rounds": 2}}}
    tree = {"run_dir": str(folder / "run"), "seed": seed, "stages": [
        {"name": "sft", "model": start, **shared, "exploration": None,
         "targeted": {"weak_fraction": 1.0, "general_share": 0, "train": supervised(40, 5e-4)}},
        {"name": "one", "model": start, **shared, "exploration": explored, "targeted": None},
        {"name": "soft", "model": first, **shared, "exploration": None, "targeted": second},
        {"name": "hard", "model": first, **shared, "exploration": None, "targeted": {**second, "general_labels": "hard"}},
    ]}
    return run_plan(make_plan(tree, config_folder=folder), quiet=True)


def _next_token(path: str, seed: int) -> torch.Tensor:
    """Log-probabilities of the answer's first token on general prompts, ``[N, V]``."""
    policy: Any = load_policy(ModelOptions(path=path))
    prompts = [policy.tokenizer(row["prompt"])["input_ids"] for row in rows("a", 40, seed + 70)]
    with torch.no_grad():
        logits = torch.stack([policy.module(input_ids=torch.tensor([ids])).logits[0, -1] for ids in prompts])
    return logits.double().log_softmax(-1)


@pytest.mark.slow
def test_reinforcement_and_soft_labels_keep_general_abilities(digit_base: Callable[[int], Path], tmp_path: Path) -> None:
    gained, divergences = [], []
    for seed in (30, 31, 32):
        folder = tmp_path / str(seed)
        folder.mkdir()
        manifests = _arms(folder, digit_base(seed), seed)
        change = {name: manifests[f"{name}-general"]["metrics"]["difference/score"]
                  for name in ("sft-targeted", "one-exploration")}
        assert change["sft-targeted"] < -0.25
        assert change["one-exploration"] > change["sft-targeted"] + 0.2
        assert change["one-exploration"] > -0.15
        gained.append(manifests["one-exploration-domain"]["metrics"]["difference/score"])
        one, soft, hard = (_next_token(manifests[name]["outputs"]["model"], seed)
                           for name in ("one-exploration", "soft-targeted", "hard-targeted"))
        divergences.append([float((stage.exp() * (stage - one)).sum(-1).mean()) for stage in (soft, hard)])
    assert sum(gained) / 3 > 0.05
    soft_mean, hard_mean = (sum(pair[arm] for pair in divergences) / 3 for arm in (0, 1))
    assert soft_mean < 0.5 * hard_mean, divergences
