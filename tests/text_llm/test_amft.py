"""AMFT on language models: its two ends are SFT and the policy gradient, a critic or none, what it refuses, resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import prepared_runs
import pytest
import torch
from prepared_runs import rollout_tree

from interrupted_runs import kill_at, records
from mmalign.data.columns import prompt_text
from mmalign.errors import ConfigError, DataError, MmalignError
from mmalign.methods.mixing import check_held_out, compared_patterns
from mmalign.stages import load_plan, run_plan

BATCH = {"prompts_per_rollout": 4, "completions_per_prompt": 2}
HELD_OUT = {"data": {"path": "asset:arithmetic", "split": "test", "limit": 8}, "prompts": 4}
META = {"name": "meta", "mu": 0.8, "warmup_steps": 1, "every": 1, "meta_scale": "cosine", "meta_lr": 0.1}
FIXED = {"name": "fixed", "mu": 0.5}


REWARD = """
def letters(prompts, completions, **columns):
    return [sum(map(ord, c[-1]["content"] if isinstance(c, list) else c)) % 7 / 7 for c in completions]
"""
SPREAD = [{"name": "spread.py:letters"}]
"""A reward that differs between the samples of an untrained model."""


def tree(**changes: Any) -> dict[str, Any]:
    defaults = {"method": "amft", "rewards": SPREAD, "batch": BATCH, "validation": HELD_OUT, "controller": META}
    return rollout_tree(1.0, **{**defaults, **changes})


def prepared(folder: Path, **changes: Any) -> Any:
    return prepared_with_reward(tree(**changes), folder)


def prepared_with_reward(options: dict[str, Any], folder: Path) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spread.py").write_text(REWARD)
    return prepared_runs.prepared(options, folder)


def trained(made: Any, steps: int = 3) -> list[dict[str, float]]:
    stream = iter(made.parts.experience)
    return [made.loop.update(next(stream)) for _ in range(steps)]


def same_weights(left: Any, right: Any) -> bool:
    pairs = zip(left.loop.bare["policy"].state_dict().items(), right.loop.bare["policy"].state_dict().items(), strict=True)
    return all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)


# -- the two ends ----------------------------------------------------------------------------------------------------------


def test_share_one_is_sft_bit_for_bit(tmp_path: Path) -> None:
    mixed = prepared(tmp_path / "amft", controller={"name": "fixed", "mu": 1.0})
    plain = rollout_tree(1.0, method="sft", batch={"examples_per_update": 4})
    del plain["rewards"], plain["sampling"]
    sft = prepared_runs.prepared(plain, tmp_path / "sft")
    ours, theirs = trained(mixed), trained(sft)
    assert same_weights(mixed, sft)
    assert [r["loss"] for r in ours] == [r["loss"] for r in theirs]
    assert "reward" not in ours[0]


@pytest.mark.parametrize("changes", [
    {"method": "grpo"},
    {"method": "grpo", "loss": {"name": "cispo"}, "advantage": "rloo", "kl": {"coef": 0.1, "adaptive": {"target": 1.0}}},
    {"method": "ppo", "kl": {"coef": 0.05, "placement": "token_reward"}, "value": {"kind": "separate", "coef": 0.1},
     "advantage": "gae", "loss": {"reduction": "token_mean"}},
    {"method": "ppo", "kl": {"coef": 0.0}, "value": {"kind": "shared", "coef": 0.1}, "advantage": "gae",
     "loss": {"reduction": "token_mean"}, "batch": {**BATCH, "examples_per_update": 4, "passes_per_rollout": 2}},
])
def test_share_zero_is_the_policy_gradient_bit_for_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    batch = {"passes_per_rollout": 1, **changes.get("batch", BATCH)}
    plain = prepared_with_reward(rollout_tree(1.0, **{"rewards": SPREAD, **changes, "batch": batch}), tmp_path / "plain")
    mixed = prepared(tmp_path / "amft", **{**changes, "method": "amft", "batch": batch,
                                           "controller": {"name": "fixed", "mu": 0.0}})
    ours, theirs = trained(mixed), trained(plain)
    assert same_weights(mixed, plain)
    assert [r["loss"] for r in ours] == [r["loss"] for r in theirs]
    assert max(r["grad_norm"] for r in ours) > 0
    assert "sft/epoch" not in ours[0]


# -- a critic, other utilities ---------------------------------------------------------------------------------------------


def test_the_published_form_has_a_critic_that_learns_beside_the_mixture(tmp_path: Path) -> None:
    made = prepared(tmp_path, value={"kind": "separate", "coef": 0.1}, advantage="gae", controller={**META, "warmup_steps": 1},
                    optimizers=[{"name": "policy", "match": ["policy.*"], "lr": 1e-3}, {"name": "value", "match": ["value.*"],
                                                                                       "lr": 1e-2}])
    records = trained(made, 3)
    assert set(made.loop.bare) == {"policy", "value"}
    assert records[0]["grad_norm/value"] == 0  # the warm-up is imitation alone
    assert records[1]["grad_norm/value"] > 0
    assert "value" not in made.loop.controller.weights(made.loop.state)  # not scaled by 1 - mu
    assert {"mixing/meta_gradient", "loss/value", "loss/sft_nll", "loss/policy"} <= records[1].keys()
    assert "loss/validation_policy" not in records[1]


def test_a_shared_critic_belongs_to_the_side_that_moves_the_policy(tmp_path: Path) -> None:
    made = prepared(tmp_path, value={"kind": "shared", "coef": 0.2}, advantage="gae", controller={**FIXED, "mu": 0.25})
    assert made.loop.controller.weights(made.loop.state) == pytest.approx({"sft_nll": 0.25, "policy": 0.75, "value": 0.75 * 0.2})


@pytest.mark.parametrize("loss", ["reinforce", "gspo", "cispo", "ppo_clip"])
def test_any_policy_loss_may_be_mixed(loss: str, tmp_path: Path) -> None:
    record = trained(prepared(tmp_path, loss={"name": loss}, kl={"coef": 0.1}), 2)[1]
    assert 0 < abs(record["mixing/meta_gradient"]) <= 1
    assert record["mixing/grad_norm_sft"] > 0
    assert record["mixing/grad_norm_rl"] > 0


def test_likelihood_of_held_out_demonstrations_as_utility(tmp_path: Path) -> None:
    made = prepared(tmp_path, controller={**META, "utility": "val_nll"})
    records = trained(made, 3)
    assert "validation/epoch" in records[1]
    assert "validation/reward" not in records[1]
    # The demonstrations of other sums are learned by imitation more than by rewards for short answers: more of it is better.
    assert records[1]["mixing/meta_gradient"] > 0.1
    assert records[1]["mu"] > 0.8


def test_the_demonstration_is_gold_where_there_is_one_and_only_its_tokens_are_learned(tmp_path: Path) -> None:
    rows = [{"question": f"What is {i} + 1?", "demonstration": f"It is {i + 1}.", "ground_truth": str(i + 1)} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = prepared(tmp_path / "run", data={"path": str(tmp_path / "rows.jsonl")}, controller=FIXED)
    update = next(iter(made.parts.experience))
    sft = update.parts["sft"]
    assert made.loop.objective.members["sft"].field == "gold"
    for ids, labels in zip(sft["gold_input_ids"], sft["gold_labels"], strict=True):
        kept = [token for token, label in zip(ids, labels, strict=True) if label != -100]
        assert 0 < len(kept) < len(ids)
        assert made.parts.policy.tokenizer.decode(kept).startswith("It is ")
    assert made.loop.objective.counts(update)["sft_nll"] == sum(sum(x != -100 for x in labels) for labels in sft["gold_labels"])
    assert trained(made, 1)[0]["loss/sft_nll"] > 0


def test_demonstrations_may_come_from_other_rows(tmp_path: Path) -> None:
    other = {"path": "asset:arithmetic", "limit": 6, "arguments": {"levels": [2]}}
    made = prepared(tmp_path, demonstrations=other, controller=FIXED,
                    batch={**BATCH, "demonstrations_per_update": 3, "examples_per_forward": 4})
    update = next(iter(made.parts.experience))
    assert (len(update.parts["sft"]), len(update.parts["train"])) == (3, 8)
    assert made.parts.experience.sources["sft"].sampler.size == 6


# -- the compared parameters -----------------------------------------------------------------------------------------------


def test_gradients_are_compared_on_the_named_parameters(tmp_path: Path) -> None:
    made = prepared(tmp_path, controller={**META, "meta_params": ["policy.*layers.1.mlp*"]})
    shapes: list[int] = []
    original = made.loop.controller.update
    made.loop.controller.update = lambda metrics, gradients, state: (
        shapes.extend(len(g) for g in gradients.values()), original(metrics, gradients, state))
    trained(made, 2)
    assert shapes == [3, 3, 3]
    made = prepared(tmp_path / "lora", tuning={"name": "lora", "r": 2}, controller=META)
    assert made.loop.controller.match == ("policy.*",)


def test_a_large_model_is_compared_on_its_last_block(monkeypatch: Any) -> None:
    import mmalign.methods.mixing as mixing

    blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(12))
    net = torch.nn.ModuleDict({"embed": torch.nn.Linear(4, 4), "layers": blocks})
    assert compared_patterns({"policy": net}, None) == ("policy.*",)
    monkeypatch.setattr(mixing, "COMPARED", 100)
    assert compared_patterns({"policy": net}, None) == ("policy.layers.11.*",)
    with pytest.raises(ConfigError, match=r"controller\.meta_params.*no numbered blocks"):
        compared_patterns({"policy": torch.nn.Linear(20, 20)}, None)


# -- refusals --------------------------------------------------------------------------------------------------------------


def test_prompts_are_compared_by_what_they_say() -> None:
    message = [{"role": "user", "content": " What is 1 + 1? "}]
    assert prompt_text(message) == prompt_text("What is 1 + 1?")
    with pytest.raises(DataError, match=r"validation\.data: 1 of 2 prompts.*'What is 1 \+ 1\?'"):
        check_held_out([{"prompt": "other"}, {"prompt": "What is 1 + 1?"}], [[{"prompt": message}]])
    with pytest.raises(DataError, match=r"validation\.data: the data set has no rows"):
        check_held_out([], [[{"prompt": "a"}]])
    check_held_out([{"prompt": "other"}], [[{"prompt": message}], [{"text": "a document"}]])


@pytest.mark.parametrize(("changes", "parts"), [
    ({"validation": None}, ["validation.data", "held-out"]),
    ({"validation": {"data": {"path": "asset:arithmetic", "limit": 8}}}, ["validation.data", "training data"]),
    ({"validation": {"data": {"path": "asset:arithmetic", "split": "tset"}}}, ["validation.", "tset"]),
    ({"validation": {**HELD_OUT, "prompts": 0}}, ["prompts", "at least 1"]),
    ({"validation": {**HELD_OUT, "completions_per_prompt": 1}}, ["validation.completions_per_prompt", "at least 2"]),
    ({"controller": {**META, "mu": 0.99}}, ["mu_min, mu_max"]),
    ({"controller": {**META, "warmup_steps": 0}}, ["target_entropy"]),
    ({"controller": {**META, "meta_params": ["policy.nothing"]}}, ["controller.meta_params", "policy.nothing"]),
    ({"controller": {"name": "mata"}}, ["controller.name", "meta"]),
    ({"value": {"kind": "separate"}}, ["value", "advantage gae"]),
    ({"advantage": "gae"}, ["value", "advantage gae"]),
    ({"data": {"path": "asset:arithmetic", "limit": 8, "columns": {"completion": None}}}, ["completion"]),
    ({"sft_losses": [{"name": "nil"}]}, ["sft_losses[0].name", "nil"]),
    ({"sft_losses": [{"name": "nll", "on": "gold"}]}, ["sft_losses.on"]),
    ({"sampling": {"temperature": 0.0}}, ["sampling.temperature"]),
    ({"batch": {**BATCH, "demonstrations_per_update": 0}}, ["demonstrations_per_update"]),
])
def test_bad_configurations_are_refused_by_name(changes: dict[str, Any], parts: list[str], tmp_path: Path) -> None:
    with pytest.raises(MmalignError) as error:
        prepared(tmp_path, **changes)
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_an_empty_validation_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(DataError, match=r"validation\.data"):
        prepared(tmp_path / "run", validation={"data": {"path": str(tmp_path / "none.jsonl")}})


# -- resuming --------------------------------------------------------------------------------------------------------------


def test_killed_between_two_looks_it_resumes_bit_for_bit(root: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """mu, the target entropy, the pending rollouts and the generators of the validation rollouts are part of the run."""
    def plan(name: str) -> Any:
        changes = ["steps=8", "checkpoint.every=1", "controller.every=3", "batch.examples_per_update=16"]
        return load_plan(root / "configs/text/amft.yaml", changes, run_dir=str(tmp_path / name))

    run_plan(plan("whole"), quiet=True)
    kill_at(5, lambda: run_plan(plan("parts"), quiet=True), monkeypatch)
    run_plan(plan("parts"), quiet=True)
    found = [records(tmp_path / name) for name in ("whole", "parts")]
    assert found[0] == found[1]
    assert sum("mixing/meta_gradient" in line for line in found[0]) == 2
    assert len({line["mu"] for line in found[0]}) == 7  # one of the warm-up, and another after every update
