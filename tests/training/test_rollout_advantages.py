"""Where the divergence enters, adaptive coefficients, and advantages of single actions, on a toy that samples."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from toys import Bandit, BanditPolicy, make_loop

from mmalign.core.advantages import group_advantages
from mmalign.core.policy_gradient import clipped_value_loss
from mmalign.core.reduce import reduce
from mmalign.data.rows import Rows
from mmalign.errors import ConfigError
from mmalign.policies.base import Rollout
from mmalign.rewards.base import RewardSet
from mmalign.training.experience import BatchShape, RolloutExperience, RolloutSettings
from mmalign.training.objective import TrainState, UpdateBatch
from mmalign.training.policy_gradient import PolicyGradient, PolicyLoss
from mmalign.training.rollout_advantages import GAE, AdaptiveKL, KLOptions, charge_onwards, moments

REWARDS = torch.tensor([1.0, 0.0, 0.5, 0.25, 2.0, -1.0])
CHOICES = [[0, 1, 2], [3], [4, 4], [1, 0], [2], [3, 3, 3]]
CONTEXTS = [0, 0, 1, 1, 2, 2]


class SamplingBandit(BanditPolicy):
    """Gives the same six samples of three prompts whenever it is asked."""

    def sample(self, prompts: Any, n: int, sampling: Any, generator: torch.Generator) -> Rollout:
        rows = Rows({"context": torch.tensor(CONTEXTS), "choice": [torch.tensor(choice) for choice in CHOICES]})
        with torch.no_grad():
            scores = self.log_probs(rows)
        return Rollout(prompts=[f"p{i}" for i in CONTEXTS], samples=[str(i) for i in range(6)], group=torch.tensor(CONTEXTS),
                       rows=rows, mask=scores.mask, old_logp=scores.logp,
                       finish_reason=["stop", "length", "stop", "stop", "stop", "stop"])

    def unfold(self, rollout: Rollout, *, fraction: float, generator: torch.Generator) -> Rows:
        columns: dict[str, Any] = {"old_logp": rollout.old_logp, "action_mask": rollout.mask, "group": rollout.group}
        for name in ("advantages", "returns"):
            if name in rollout.columns:
                values = rollout.columns[name]
                columns[name] = torch.stack(values) if isinstance(values[0], Tensor) else torch.tensor(values)
        for name in ("values", "ref_logp"):
            if getattr(rollout, name) is not None:
                columns[name] = getattr(rollout, name)
        return rollout.rows.with_columns(**columns)


class TableValue:
    """A value per context and position."""

    want: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.module: nn.Module = nn.Embedding(4, 3)
        nn.init.normal_(self.module.weight, generator=torch.Generator().manual_seed(1))

    def replace_module(self, module: nn.Module) -> None:
        self.module = module

    def values(self, rows: Rows, scores: Any = None) -> Tensor:
        table = self.module(rows["context"])
        width = max(len(choice) for choice in rows["choice"])
        lengths = torch.tensor([len(choice) for choice in rows["choice"]])
        return torch.where(torch.arange(width) < lengths[:, None], table[:, :width], 0.0)


def rewards(completions: Any, **columns: Any) -> list[float]:
    return [float(REWARDS[int(text)]) for text in completions]


def missing(completions: Any, **columns: Any) -> list[float | None]:
    return [None if text == "2" else float(REWARDS[int(text)]) for text in completions]


def reference() -> BanditPolicy:
    module = Bandit()
    with torch.no_grad():
        module.logits.copy_(torch.randn(4, 5, generator=torch.Generator().manual_seed(3)))
    return BanditPolicy(module)


def experience(reward: Any = rewards, *, value: Any = None, kl: KLOptions | None = None, policy: Any = None,
               advantage: Any = None, **options: Any) -> tuple[RolloutExperience, list[Rollout]]:
    kept: list[Rollout] = []
    settings = RolloutSettings(None, advantage or (lambda rollout, total: group_advantages(total, rollout.group, scale="none")),
                               kl=kl, **options)
    shape = BatchShape(6, 2, 3, 1, 3, 2, settings.passes)
    made = RolloutExperience(
        policy or SamplingBandit(), [{"prompt": f"p{i}"} for i in range(3)], RewardSet([reward]), shape, settings,
        TrainState(0, 10), reference=reference() if kl else None, value=value,
        observers=[lambda rollout, step: kept.append(dataclasses.replace(rollout))])
    return made, kept


def divergence() -> tuple[Tensor, Tensor]:
    """Log-ratios of the samples, and their mask."""
    rollout = SamplingBandit().sample(None, 2, None, torch.Generator())
    with torch.no_grad():
        other = reference().log_probs(rollout.rows).logp
    return (rollout.old_logp - other) * rollout.mask, rollout.mask


def made(*arguments: Any, **options: Any) -> Tensor:
    source, kept = experience(*arguments, **options)
    next(iter(source))
    values = kept[0].columns["advantages"]
    return torch.stack(values) if isinstance(values[0], Tensor) else torch.tensor(values)


# -- placements ----------------------------------------------------------------------------------------------------------


GROUP = torch.tensor(CONTEXTS)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_sequence_reward_is_subtracted_before_the_baseline(estimator: Any) -> None:
    gap, mask = divergence()
    estimate = {"k1": gap, "k2": gap.square() / 2, "k3": torch.expm1(-gap) + gap}[estimator] * mask
    found = made(kl=KLOptions(coef=0.3, estimator=estimator, placement="sequence_reward"))
    torch.testing.assert_close(found, group_advantages(REWARDS - 0.3 * estimate.sum(1), GROUP, scale="none"))


def test_token_reward_charges_every_action_for_what_follows() -> None:
    gap, mask = divergence()
    found = made(kl=KLOptions(coef=0.3, placement="token_reward"))
    plain = group_advantages(REWARDS, GROUP, scale="none")
    for row in range(6):
        for action in range(int(mask[row].sum())):
            assert float(found[row, action]) == pytest.approx(float(plain[row] - 0.3 * gap[row, action:].sum()), abs=1e-5)
    assert not found[~mask].any()
    # One action per sample: the same as charging the sample, up to the baseline of the charges.
    single = charge_onwards(plain[:1], gap[:1, :1], mask[:1, :1], coef=0.3)
    torch.testing.assert_close(single[0, 0], plain[0] - 0.3 * gap[0, 0])


def test_advantage_placement_gives_the_divergence_its_own_estimator() -> None:
    gap, mask = divergence()
    mean = gap.sum(1) / mask.sum(1)

    def standardised(rollout: Rollout, values: Tensor) -> Tensor:
        return group_advantages(values, rollout.group)

    found = made(kl=KLOptions(coef=0.2, placement="advantage"), advantage=standardised, kl_advantage=standardised)
    torch.testing.assert_close(found, group_advantages(REWARDS, GROUP) - 0.2 * group_advantages(mean, GROUP))
    clipped = made(kl=KLOptions(coef=0.2, placement="advantage"), advantage=standardised, advantage_clip=0.5)
    torch.testing.assert_close(clipped, (group_advantages(REWARDS, GROUP) - 0.2 * mean).clamp(-0.5, 0.5))


def test_loss_placement_scores_lazily_or_once_for_several_passes() -> None:
    for passes in (1, 3):
        source, kept = experience(kl=KLOptions(coef=0.1), passes=passes)
        stream = iter(source)
        gap, _ = divergence()
        for _ in range(passes):
            rows = next(stream).parts["train"]
            ratio = (rows["old_logp"] - rows["ref_logp"]) * rows["action_mask"]
            assert float(ratio.sum()) == pytest.approx(float(gap.sum()), rel=1e-5)
        assert (kept[0].ref_logp is not None) == (passes > 1)
        torch.testing.assert_close(torch.tensor(kept[0].columns["advantages"]), group_advantages(REWARDS, GROUP, scale="none"))


def test_divergence_is_logged_where_it_is_known() -> None:
    gap, mask = divergence()
    source, _ = experience(kl=KLOptions(coef=0.3, estimator="k3", placement="sequence_reward"))
    metrics = next(iter(source)).metrics
    assert metrics["kl/sample"] == pytest.approx(float(gap.sum(1).mean()), rel=1e-5)
    assert metrics["kl/action"] == pytest.approx(float((gap.sum(1) / mask.sum(1)).mean()), rel=1e-5)
    assert metrics["kl/coef"] == 0.3


@pytest.mark.parametrize(("options", "message"), [
    ({"coef": -1.0}, r"kl\.coef"),
    ({"coef": 0.1, "estimator": "k1"}, "zero expected gradient"),
    ({"coef": 0.1, "estimator": "abs"}, "expected gradient"),
    ({"coef": 0.1, "estimator": "k3+", "placement": "token_reward"}, "has none"),
    ({"adaptive": {"target": 1.0}}, "kl.adaptive multiplies"),
    ({"coef": 0.1, "adaptive": {"target": 0.0}}, "target and horizon"),
    ({"coef": 0.1, "placement": "reward"}, "token_reward"),
])
def test_divergences_without_a_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        KLOptions(**options)


def test_default_estimators() -> None:
    assert KLOptions(coef=0.1).kind == "k3"
    assert KLOptions(coef=0.1, placement="token_reward").kind == "k1"
    assert KLOptions(coef=0.1, estimator="k1+").kind == "k1+"  # the value of k1 with a gradient that exists


# -- adaptive coefficient --------------------------------------------------------------------------------------------------


def test_the_coefficient_follows_the_target_and_is_saved() -> None:
    options = KLOptions(coef=0.1, placement="sequence_reward", adaptive={"target": 100.0, "horizon": 60.0})  # type: ignore[arg-type]
    source, _ = experience(kl=options)
    stream = iter(source)
    assert next(stream).metrics["kl/coef"] == 0.1
    gap, _ = divergence()
    assert float(gap.sum(1).mean()) < 80
    assert source.kl.value == pytest.approx(0.1 * (1 - 0.2 * 6 / 60))  # far below the target: the clip, times n / horizon
    assert next(stream).metrics["kl/coef"] == source.kl.value / (1 - 0.2 * 6 / 60)
    restored = AdaptiveKL(options)
    restored.load_state_dict(source.kl.state_dict())
    assert restored.value == source.kl.value
    assert restored.weights(TrainState(0, 1)) == {}  # it acts on rewards, not on a term


def test_an_adaptive_loss_term_is_weighed_by_the_controller(tmp_path: Any) -> None:
    options = KLOptions(coef=0.5, adaptive={"target": 1e-3, "horizon": 6.0})  # type: ignore[arg-type]
    policy = SamplingBandit()
    source, _ = experience(kl=options, policy=policy)
    objective = PolicyGradient(policy, PolicyLoss("reinforce", {}, "token_mean"), kl=options)
    loop = make_loop(tmp_path, objective, source, policy=policy, per_update=6, per_forward=6, controller=source.kl)
    record = loop.update(next(iter(source)))
    assert source.kl.value == pytest.approx(0.6)
    assert record["loss"] == pytest.approx(record["loss/policy"] + 0.6 * record["loss/kl"], rel=1e-5)


# -- generalised advantages ------------------------------------------------------------------------------------------------


def plain_ppo_targets(reward: Tensor, kl: Tensor, values: Tensor, mask: Tensor, *, coef: float, gamma: float, lam: float,
                      whiten_rewards: bool = False) -> tuple[Tensor, Tensor]:
    """The textbook computation, token by token in Python numbers."""
    shaped = -coef * kl * mask
    for row in range(len(reward)):
        shaped[row, int(mask[row].sum()) - 1] += reward[row]
    if whiten_rewards:
        kept = shaped[mask]
        shaped = torch.where(mask, (shaped - kept.mean()) / (kept.std() + 1e-8) + kept.mean(), 0.0)
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    for row in range(len(reward)):
        after, running = 0.0, 0.0
        for t in reversed(range(int(mask[row].sum()))):
            running = float(shaped[row, t]) + gamma * after - float(values[row, t]) + gamma * lam * running
            advantages[row, t], returns[row, t] = running, running + float(values[row, t])
            after = float(values[row, t])
    kept = advantages[mask]
    return torch.where(mask, (advantages - kept.mean()) / (kept.std() + 1e-8), 0.0), returns


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), gamma=st.sampled_from([1.0, 0.9, 0.0]), lam=st.sampled_from([1.0, 0.95, 0.0]),
       whiten_rewards=st.booleans())
def test_gae_agrees_with_the_textbook(seed: int, gamma: float, lam: float, whiten_rewards: bool) -> None:
    source = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (4,), generator=source)
    mask = torch.arange(5) < lengths[:, None]
    reward = torch.randn(4, generator=source, dtype=torch.float64)
    kl, values = (torch.randn(4, 5, generator=source, dtype=torch.float64) * mask for _ in range(2))
    found = GAE(gamma=gamma, lam=lam, whiten_rewards=whiten_rewards)(reward, values, mask, kl=kl, kl_coef=0.1)
    expected = plain_ppo_targets(reward, kl, values, mask, coef=0.1, gamma=gamma, lam=lam, whiten_rewards=whiten_rewards)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_gae_in_closed_form() -> None:
    mask, zero = torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3)
    advantages, returns = GAE(lam=1.0, whiten=False)(torch.tensor([2.0, -1.0]), zero, mask)
    assert advantages.tolist() == returns.tolist() == [[2.0] * 3, [-1.0] * 3]  # V = 0, gamma = lam = 1: every A_t is R
    values = torch.tensor([[0.5, 1.0, 1.5], [0.0, 0.0, 1.0]])
    advantages, returns = GAE(lam=0.0, whiten=False)(torch.tensor([2.0, 0.0]), values, mask)
    assert advantages.tolist() == [[0.5, 0.5, 0.5], [0.0, 1.0, -1.0]]  # one-step differences
    assert returns.tolist() == [[1.0, 1.5, 2.0], [0.0, 1.0, 0.0]]
    whitened, same = GAE(lam=0.0)(torch.tensor([2.0, 0.0]), values, mask)
    assert torch.equal(same, returns)  # returns are taken before whitening
    assert float(whitened.mean()) == pytest.approx(0, abs=1e-6)
    assert float(whitened.std()) == pytest.approx(1, abs=1e-6)
    assert GAE(lam=0.0, clip=0.5)(torch.tensor([2.0, 0.0]), values, mask)[0].abs().max() == 0.5


def test_whitening_does_not_blow_up_rounding_errors() -> None:
    mask = torch.ones(4, 3, dtype=torch.bool)
    noise = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)) * 1e-7
    advantages, returns = GAE()(torch.zeros(4), torch.zeros(4, 3), mask, kl=noise, kl_coef=0.05)
    assert not advantages.any()
    assert returns.any()
    assert GAE()(torch.tensor([0.0, 0.0, 0.0, 0.1]), torch.zeros(4, 3), mask, kl=noise, kl_coef=0.05)[0].std() > 0.9


@pytest.mark.parametrize("options", [{"gamma": 1.1}, {"lam": -0.1}])
def test_discounts_outside_the_unit_interval_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        GAE(**options)  # type: ignore[arg-type]


def test_moments_skip_masked_entries() -> None:
    x, mask = torch.tensor([[1.0, 100.0], [3.0, 5.0]]), torch.tensor([[1, 0], [1, 1]], dtype=torch.bool)
    assert moments(x, mask) == (3.0, 2.0)
    assert moments(x, torch.zeros_like(mask)) == (0.0, 0.0)


PROCESS = """
import sys
import torch
from mmalign.core.advantages import whiten
from mmalign.training.rollout_advantages import mean_over_ranks, whiten_over_ranks
rank = int(sys.argv[2])
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
mask = torch.arange(3) < torch.tensor([1, 2, 3, 3, 1, 2])[:, None]
own = slice(0, 2) if rank == 0 else slice(2, 6)
torch.testing.assert_close(whiten_over_ranks(x[own], mask[own]), whiten(x, mask)[own])
assert mean_over_ranks(x[own, 0]) == (float(x[:, 0].double().mean()), 6)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_whitening_is_over_all_processes(tmp_path: Any) -> None:
    commands = [[sys.executable, "-c", PROCESS, str(tmp_path / "meeting"), str(rank)] for rank in range(2)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


# -- the experience and the objective of PPO -------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["token_reward", "sequence_reward"])
def test_rollout_rows_carry_the_targets_of_ppo(placement: Any) -> None:
    value, kl = TableValue(), KLOptions(coef=0.3, placement=placement)
    source, _ = experience(value=value, kl=kl, advantage=GAE(gamma=0.9), passes=2)
    rows = next(iter(source)).parts["train"]
    gap, mask = divergence()
    rollout = SamplingBandit().sample(None, 2, None, torch.Generator())
    values = value.values(rollout.rows).detach()
    charged = gap if placement == "token_reward" else torch.zeros_like(gap)
    reward = REWARDS if placement == "token_reward" else REWARDS - 0.3 * gap.sum(1)
    advantages, returns = plain_ppo_targets(reward, charged, values, mask, coef=0.3, gamma=0.9, lam=0.95)
    order = [next(i for i in range(6) if CONTEXTS[i] == int(c) and CHOICES[i] == choice.tolist())
             for c, choice in zip(rows["context"], rows["choice"], strict=True)]
    for name, expected in (("advantages", advantages), ("returns", returns), ("values", values)):
        torch.testing.assert_close(rows[name], expected[order], rtol=1e-5, atol=1e-6)


def test_samples_without_a_reward_and_cut_off_ones() -> None:
    source, kept = experience(missing, value=TableValue(), advantage=GAE())
    next(iter(source))
    assert not kept[0].mask[2].any()  # no reward: not trained on, not in the whitening
    assert torch.isfinite(torch.stack(kept[0].columns["advantages"])).all()
    counted = torch.stack(kept[0].columns["advantages"])[kept[0].mask]
    assert float(counted.mean()) == pytest.approx(0, abs=1e-6)
    source, kept = experience(value=TableValue(), advantage=GAE(whiten=False, lam=1.0), missing_eos_penalty=5.0)
    next(iter(source))
    assert float(kept[0].columns["returns"][1][0]) == pytest.approx(-5.0)
    assert float(kept[0].columns["returns"][0][0]) == pytest.approx(1.0)
    source, kept = experience(value=TableValue(), advantage=GAE(), mask_truncated=True)
    next(iter(source))
    assert not kept[0].mask[1].any()


def test_estimators_need_their_value_function() -> None:
    with pytest.raises(ConfigError, match="method ppo"):
        experience(advantage=GAE())


@pytest.mark.parametrize("per_forward", [1, 2, 3, 6])
def test_the_ppo_update_is_the_textbook_loss_however_it_is_split(tmp_path: Any, per_forward: int) -> None:
    policy, value = SamplingBandit(), TableValue()
    kl = KLOptions(coef=0.3, placement="token_reward")
    source, _ = experience(policy=policy, value=value, kl=kl, advantage=GAE(), passes=2)
    rows = next(iter(source)).parts["train"]
    with torch.no_grad():  # as after some updates: ratios and values have moved, some beyond their clips
        policy.module.logits.add_(torch.randn(4, 5, generator=torch.Generator().manual_seed(8)) * 0.3)
        value.module.weight.add_(torch.randn(4, 3, generator=torch.Generator().manual_seed(9)) * 0.3)
    scores, mask = policy.log_probs(rows), rows["action_mask"]
    ratio = (scores.logp - rows["old_logp"]).exp()
    policy_loss = torch.maximum(-rows["advantages"] * ratio, -rows["advantages"] * ratio.clamp(0.8, 1.2))
    predicted = value.values(rows)
    near = torch.clamp(predicted, rows["values"] - 0.2, rows["values"] + 0.2)
    value_loss = 0.5 * torch.maximum((predicted - rows["returns"]) ** 2, (near - rows["returns"]) ** 2)
    expected = policy_loss[mask].mean() + 0.1 * value_loss[mask].mean()
    expected.backward()
    gradients = [policy.module.logits.grad.clone(), value.module.weight.grad.clone()]
    assert all(float(gradient.abs().sum()) > 0 for gradient in gradients)
    policy.module.zero_grad()
    value.module.zero_grad()
    objective = PolicyGradient(policy, PolicyLoss("ppo_clip", {}, "token_mean"), on_policy=False, value=value)
    assert set(objective.modules()) == {"policy", "value"}
    total = 0.0
    counts = objective.counts(UpdateBatch({"train": rows}))
    for start in range(0, 6, per_forward):
        part = UpdateBatch({"train": rows.take(range(start, start + per_forward))})
        terms, metrics = objective.loss(part, {}, TrainState(0, 1))
        loss = sum(t.weight * reduce(t.values, t.mask, how=t.reduction, denominator=counts[t.name]) for t in terms)
        loss.backward()
        total += float(loss.detach())
        assert {"clipped/low", "clipped/high", "value/clipped"} <= metrics.keys()
    assert total == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(policy.module.logits.grad, gradients[0], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(value.module.weight.grad, gradients[1], rtol=1e-4, atol=1e-7)


def test_the_value_loss_stops_rewarding_moves_beyond_the_clip() -> None:
    old, returns = torch.tensor([[0.0]]), torch.tensor([[1.0]])
    inside, outside = (torch.tensor([[x]], requires_grad=True) for x in (0.1, 0.5))
    for predicted in (inside, outside):
        clipped_value_loss(predicted, old, returns, clip=0.2).sum().backward()
    assert float(inside.grad) == pytest.approx(-0.9)
    assert float(outside.grad) == 0.0  # already 0.2 nearer than the rollout's value
