"""PPO on language models: value functions, the whole update against a plain computation, refusals, resuming."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import prepared_runs
import pytest
import torch
from prepared_runs import rollout_tree
from torch import Tensor

from interrupted_runs import kill_at, records
from mmalign.data.assets import asset_path
from mmalign.data.rows import Rows
from mmalign.errors import ConfigError
from mmalign.policies.causal_lm import CausalLMPolicy
from mmalign.policies.loading import ModelOptions
from mmalign.policies.value import SeparateValue, SharedValue, ValueOptions, make_value
from mmalign.stages import load_plan, make_plan, run_plan
from mmalign.training.objective import TrainState, UpdateBatch

MODEL = ModelOptions(path="asset:tiny_llama", device="cpu")
ROWS = Rows({
    "input_ids": [[5, 6, 7, 8, 9, 10], [5, 6, 7, 11], [12, 13, 14, 15, 16]],
    "labels": [[-100, -100, -100, 8, 9, 10], [-100, -100, -100, 11], [-100, -100, 14, 15, 16]],
})


def policy() -> CausalLMPolicy:
    return CausalLMPolicy.from_pretrained(asset_path("tiny_llama"), device="cpu")


def tree(**changes: Any) -> dict[str, Any]:
    batch = {"prompts_per_rollout": 8, "examples_per_update": 4, "passes_per_rollout": 2}
    return rollout_tree(0.7, **{"method": "ppo", "batch": batch, **changes})


def prepared(folder: Path, **changes: Any) -> Any:
    return prepared_runs.prepared(tree(**changes), folder)


# -- value functions -----------------------------------------------------------------------------------------------------


def randomised(value: Any) -> Any:
    head = value.module.head if isinstance(value, SeparateValue) else value.module
    with torch.no_grad():
        head.weight.normal_(generator=torch.Generator().manual_seed(2))
        head.bias.fill_(0.5)
    return value


@pytest.mark.parametrize("kind", ["separate", "shared"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_values_are_of_the_state_before_each_action(kind: Any, layout: Any) -> None:
    model = MODEL.model_copy(update={"layout": layout})
    own = policy()
    own.layout = layout
    value = randomised(make_value(ValueOptions(kind=kind), own, model))
    assert isinstance(value, SharedValue if kind == "shared" else SeparateValue)
    head = value.module if kind == "shared" else value.module.head
    plain = policy().module.eval()
    with torch.no_grad():
        found = value.values(ROWS)
        for row, (ids, labels) in enumerate(zip(ROWS["input_ids"], ROWS["labels"], strict=True)):
            hidden = plain(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
            positions = [t - 1 for t, label in enumerate(labels) if label != -100]
            expected = hidden[positions] @ head.weight[0] + head.bias
            torch.testing.assert_close(found[row, : len(positions)], expected, rtol=1e-4, atol=1e-5)
            assert not found[row, len(positions) :].any()


def test_a_new_value_function_says_zero_and_learns_without_the_policy() -> None:
    own = policy()
    value = make_value(ValueOptions(), own, MODEL)
    assert not value.values(ROWS).any()
    randomised(value)
    value.values(ROWS).sum().backward()
    assert all(parameter.grad is None for parameter in own.module.parameters())
    trained = {name: p for name, p in value.module.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in trained.values())  # none is trained for nothing
    assert "trunk.lm_head.weight" not in trained
    shared = randomised(make_value(ValueOptions(kind="shared"), own, MODEL))
    own.log_probs(ROWS, want=shared.want).values.sum().backward()  # type: ignore[union-attr]
    assert own.module.model.embed_tokens.weight.grad is not None


def test_a_value_model_may_start_from_a_reward_model(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = asset_path("tiny_llama")
    reward = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    with torch.no_grad():
        reward.score.weight.normal_(generator=torch.Generator().manual_seed(4))
    reward.config.pad_token_id = 0
    reward.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    value: Any = make_value(ValueOptions(path=str(tmp_path)), policy(), MODEL)
    assert torch.equal(value.module.head.weight, reward.score.weight)
    rows = Rows({"input_ids": [[5, 6, 7, 8]], "labels": [[-100, -100, -100, 8]]})
    with torch.no_grad():
        expected = reward.eval()(input_ids=torch.tensor([[5, 6, 7]])).logits[0, 0]
        torch.testing.assert_close(value.values(rows)[0, 0], expected)


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    policy().save_pretrained(tmp_path)
    text = json.loads((tmp_path / "tokenizer.json").read_text())
    text["added_tokens"].append({**text["added_tokens"][0], "id": 10_000, "content": "<other>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(ConfigError, match=r"value\.path.*another vocabulary"):
        make_value(ValueOptions(path=str(tmp_path)), policy(), MODEL)


# -- the whole update ------------------------------------------------------------------------------------------------------


def plain_loss(model: Any, value_net: Any, reference: Any, rows: Rows, reward: Tensor, *, temperature: float, coef: float,
               old_values: Tensor, old_logp: Tensor) -> Tensor:
    """PPO on full logits, one row after the other."""
    kept: dict[str, list[Tensor]] = {name: [] for name in ("logp", "old", "advantage", "value", "old_value", "return")}
    for row, (ids, labels) in enumerate(zip(rows["input_ids"], rows["labels"], strict=True)):
        at = [t - 1 for t, label in enumerate(labels) if label != -100]
        tokens, count = torch.tensor([ids]), len(at)
        picked = torch.tensor(ids)[[t + 1 for t in at]]

        def scored(network: Any, tokens: Tensor = tokens, at: Any = at, picked: Tensor = picked) -> Tensor:
            table = (network(input_ids=tokens).logits[0, at] / temperature).log_softmax(-1)
            return table.gather(1, picked[:, None]).squeeze(1)

        hidden = value_net.trunk(input_ids=tokens, output_hidden_states=True).hidden_states[-1][0, at]
        values = hidden @ value_net.head.weight[0] + value_net.head.bias
        with torch.no_grad():
            rewards = -coef * (old_logp[row, :count] - scored(reference))
            rewards[-1] += reward[row]
            before, advantage = old_values[row, :count], torch.zeros(count)
            running, after = 0.0, 0.0
            for t in reversed(range(count)):
                running = float(rewards[t]) + after - float(before[t]) + 0.95 * running
                advantage[t], after = running, float(before[t])
        for name, part in (("logp", scored(model)), ("old", old_logp[row, :count]), ("advantage", advantage), ("value", values),
                           ("old_value", before), ("return", advantage + before)):
            kept[name].append(part)
    flat = {name: torch.cat(parts) for name, parts in kept.items()}
    whitened = (flat["advantage"] - flat["advantage"].mean()) / (flat["advantage"].std() + 1e-8)
    ratio = (flat["logp"] - flat["old"]).exp()
    policy_loss = torch.maximum(-whitened * ratio, -whitened * ratio.clamp(0.8, 1.2)).mean()
    near = torch.clamp(flat["value"], flat["old_value"] - 0.2, flat["old_value"] + 0.2)
    value_loss = 0.5 * torch.maximum((flat["value"] - flat["return"]) ** 2, (near - flat["return"]) ** 2).mean()
    return policy_loss + 0.1 * value_loss


def test_one_update_is_the_plain_computation(tmp_path: Path) -> None:
    made = prepared(tmp_path, batch={"prompts_per_rollout": 8, "examples_per_update": 8, "examples_per_forward": 3 + 1,
                                     "passes_per_rollout": 2}, kl={"coef": 0.1},
                    optimizers=[{"kind": "sgd", "lr": 1.0, "max_grad_norm": None}])
    loop, parts = made.loop, made.parts
    reference = copy.deepcopy(parts.policy.module).eval()
    with torch.no_grad():  # away from the reference before the rollout, so that its charges are not 0
        for parameter in parts.policy.module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    randomised(parts.objective.value)
    rollouts: list[Any] = []
    parts.experience.observers.append(lambda rollout, step: rollouts.append(rollout))
    rows = next(iter(parts.experience)).parts["train"]
    assert rows["values"].any()
    with torch.no_grad():  # and away from the rollout before the update
        for module in (parts.policy.module, parts.objective.value.module):
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.01)
    net, value_net = copy.deepcopy(parts.policy.module).eval(), copy.deepcopy(parts.objective.value.module).eval()
    reward = parts.experience.rewards.total(rollouts[0])
    order = [next(i for i, ids in enumerate(rollouts[0].rows["input_ids"]) if ids == row) for row in rows["input_ids"]]
    expected = plain_loss(net, value_net, reference, rows, reward[order], temperature=0.7, coef=0.1,
                          old_values=rows["values"], old_logp=rows["old_logp"])
    expected.backward()
    before = {name: {n: p.detach().clone() for n, p in module.named_parameters()} for name, module in loop.bare.items()}
    record = loop.update(UpdateBatch({"train": rows}))
    assert record["loss"] == pytest.approx(float(expected.detach()), rel=1e-4)
    assert record["clipped/high"] + record["clipped/low"] > 0
    for name, other in (("policy", net), ("value", value_net)):
        for key, parameter in loop.bare[name].named_parameters():
            if parameter.requires_grad:
                gradient = dict(other.named_parameters())[key].grad
                torch.testing.assert_close(before[name][key] - parameter.detach(), gradient, rtol=2e-3, atol=2e-6)


def test_charges_are_those_of_the_policy_that_acted(tmp_path: Path) -> None:
    """The first divergence is 0: the policy is its own reference until it has moved."""
    made = prepared(tmp_path, kl={"coef": 0.5})
    metrics = next(iter(made.parts.experience)).metrics
    assert metrics["kl/sample"] == pytest.approx(0.0, abs=1e-4)
    assert made.parts.reference.kind == "frozen_copy"


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_killed_between_two_rollouts_it_resumes_bit_for_bit(kind: str, root: Path, tmp_path: Path, monkeypatch: Any) -> None:
    overrides = ["steps=6", "checkpoint.every=1", f"value.kind={kind}", "kl.adaptive={target: 0.5, horizon: 50}"]

    def plan(name: str) -> Any:
        return load_plan(root / "configs/text/ppo.yaml", overrides, run_dir=str(tmp_path / name))

    run_plan(plan("whole"), quiet=True)
    # the fifth update starts the second rollout, with the values and coefficient of a resumed run
    kill_at(4, lambda: run_plan(plan("parts"), quiet=True), monkeypatch)
    run_plan(plan("parts"), quiet=True)
    found = [records(tmp_path / name) for name in ("whole", "parts")]
    assert found[0] == found[1]
    assert len({line["kl/coef"] for line in found[0]}) == 2


def test_the_gradient_does_not_depend_on_the_forward_size(tmp_path: Path) -> None:
    losses = []
    for size in (4, 1):
        made = prepared(tmp_path / str(size), batch={"prompts_per_rollout": 4, "examples_per_update": 4,
                                                     "examples_per_forward": size})
        rows = next(iter(made.parts.experience)).parts["train"]
        source = torch.Generator().manual_seed(0)
        rows = rows.with_columns(advantages=torch.randn(rows["advantages"].shape, generator=source),
                                 returns=torch.randn(rows["returns"].shape, generator=source))
        losses.append(made.loop.update(UpdateBatch({"train": rows})))
    for key in ("loss/policy", "loss/value", "grad_norm"):
        assert losses[0][key] == pytest.approx(losses[1][key], rel=1e-3, abs=1e-6)


def test_a_rollout_without_rewards_does_not_move_the_policy(tmp_path: Path) -> None:
    made = prepared(tmp_path, rewards=[{"name": "exact_match"}], advantage={"lam": 1.0})
    update = next(iter(made.parts.experience))
    assert update.metrics["reward_std"] == 0
    assert made.loop.update(update)["loss/policy"] == 0


def test_one_pass_over_one_batch_is_on_policy(tmp_path: Path) -> None:
    made = prepared(tmp_path, batch={"prompts_per_rollout": 4, "examples_per_update": 4, "passes_per_rollout": 1})
    assert made.parts.objective.on_policy
    terms, metrics = made.parts.objective.loss(next(iter(made.parts.experience)), {}, TrainState(0, 1))
    assert [term.name for term in terms] == ["policy", "value"]
    assert metrics["rollout_gap/max"].value < 1e-4


# -- refusals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "message"), [
    ({"sampling": {"temperature": 0.0}}, r"sampling\.temperature"),
    ({"sampling": {"top_k": 5}}, r"sampling\.top_k"),
    ({"advantage": {"name": "grpo"}, "batch": {"prompts_per_rollout": 2, "completions_per_prompt": 2}}, r"advantage\.name.*grpo"),
    ({"advantage": {"gamma": 2.0}}, r"advantage\.gamma"),
    ({"advantage": {"lamda": 0.9}}, r"advantage\.lamda"),
    ({"loss": {"name": "gspo"}}, r"loss\.name.*one ratio per sequence"),
    ({"loss": {"level": "sequence"}}, r"loss\.name.*one ratio per sequence"),
    ({"kl": {"placement": "advantage"}}, r"kl\.placement"),
    ({"kl": {"placement": "loss", "estimator": "k1"}}, "zero expected gradient"),
    ({"reference": {"kind": "precomputed"}}, r"reference\.kind: precomputed"),
    ({"reference": {"kind": "none"}}, r"reference\.kind: none"),
    ({"drop_flat_groups": True}, "drop_flat_groups"),
    ({"value": {"coef": 0.0}}, r"value.*coef must be positive"),
    ({"value": {"clip": -1.0}}, r"value.*clip"),
    ({"value": {"kind": "shared", "path": "x"}}, r"value.*path belongs to kind separate"),
    ({"value": {"path": "./nowhere"}}, r"value\.path.*does not exist"),
    ({"missing_eos_penalty": -1.0}, "missing_eos_penalty"),
])
def test_bad_configurations_are_refused_by_name(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        prepared(tmp_path, **changes)


@pytest.mark.parametrize(("changes", "message"), [
    ({"advantage": "gae"}, r"advantage\.name: gae needs a value function"),
    ({"kl": {"coef": 0.1, "placement": "token_reward"}}, r"kl\.placement: token_reward"),
    ({"loss": "gspo", "advantage": "rloo", "kl": {"coef": 0.1, "placement": "token_reward"}}, r"kl\.placement token_reward"),
])
def test_group_methods_refuse_what_needs_a_value_function(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    changed = tree(method="grpo", batch={"prompts_per_rollout": 2, "completions_per_prompt": 2}, **changes)
    with pytest.raises(ConfigError, match=message):
        run_plan(make_plan({**changed, "run_dir": str(tmp_path)}, config_folder=tmp_path), quiet=True)


@pytest.mark.parametrize("kl", [
    {"coef": 0.1, "placement": "token_reward"}, {"coef": 0.1, "placement": "advantage", "estimator": "k3"},
    {"coef": 0.1, "placement": "sequence_reward"}, {"coef": 0.1, "estimator": "k1+"},
])
def test_group_methods_take_every_placement(kl: dict[str, Any], tmp_path: Path) -> None:
    changed = tree(method="grpo", advantage="rloo", kl=kl, batch={"prompts_per_rollout": 2, "completions_per_prompt": 2})
    manifests = run_plan(make_plan({**changed, "run_dir": str(tmp_path)}, config_folder=tmp_path), quiet=True)
    assert next(iter(manifests.values()))["status"] == "done"
