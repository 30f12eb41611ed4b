"""The discriminative objective: closed forms, its constraint, splitting, and no bias by difficulty."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from toys import Bandit, BanditPolicy, make_loop

from mmalign.core.advantages import group_advantages
from mmalign.core.policy_gradient import disco
from mmalign.core.reduce import reduce
from mmalign.data.rows import Rows
from mmalign.errors import DataError, RewardError
from mmalign.policies.base import Rollout
from mmalign.rewards.base import RewardSet
from mmalign.training.discriminative import ConstraintOptions, Discriminative, correctness
from mmalign.training.experience import BatchShape, RolloutExperience, RolloutSettings
from mmalign.training.objective import TrainState, UpdateBatch
from mmalign.training.optimizers import OptimizerOptions
from mmalign.training.policy_gradient import PolicyGradient, PolicyLoss

STATE = TrainState(0, 1)
GROUP = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3])
SIGNS = torch.tensor([1.0, -1, -1, 1, 1, -1, -1, -1, -1, 1, 0, -1])
"""A hard question, an easy one, one without a right answer, one with an answer that was not judged."""


def rows(*, shift: float = 0.0, signs: Tensor = SIGNS, policy: BanditPolicy | None = None) -> Rows:
    """Twelve samples of several actions; ``shift`` moves the policy that sampled away from the current one."""
    source = torch.Generator().manual_seed(4)
    lengths = torch.randint(1, 4, (12,), generator=source).tolist()
    plain = Rows({"context": GROUP.clone(), "group": GROUP.clone(), "advantages": signs,
                  "choice": [torch.randint(0, 5, (n,), generator=source) for n in lengths]})
    with torch.no_grad():
        scores = (policy or BanditPolicy()).log_probs(plain)
    old = scores.logp + shift * torch.rand(scores.logp.shape, generator=source)
    return plain.with_columns(old_logp=old * scores.mask, action_mask=scores.mask)


def value_and_gradient(objective: Any, data: Rows) -> tuple[dict[str, float], Tensor]:
    """Weighted terms of one update in one forward, and the gradient of their sum."""
    update = UpdateBatch({"train": data})
    objective.policy.module.zero_grad()
    terms, _ = objective.loss(update, objective.prepare(update, STATE), STATE)
    counts = objective.counts(update)
    parts = {t.name: t.weight * reduce(t.values, t.mask, how=t.reduction, denominator=counts[t.name]) for t in terms}
    sum(parts.values(), torch.zeros(())).backward()
    return {name: float(part.detach()) for name, part in parts.items()}, objective.policy.module.logits.grad.clone()


# -- closed forms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["log_likelihood", "likelihood_ratio"])
@pytest.mark.parametrize("tau", [0.3, 10.0, math.inf])
def test_value_is_the_formula_question_by_question(score: Any, tau: float) -> None:
    data, policy = rows(shift=0.5), BanditPolicy()
    logp, mask = (getattr(policy.log_probs(data), name).detach() for name in ("logp", "mask"))
    expected = 0.0
    for question in range(4):
        found: dict[float, list[float]] = {1.0: [], -1.0: [], 0.0: []}
        for i in (question == GROUP).nonzero().flatten().tolist():
            kept = logp[i][mask[i]] if score == "log_likelihood" else (logp[i] - data["old_logp"][i])[mask[i]].exp()
            found[float(SIGNS[i])].append(float(kept.mean()))
        if found[1.0] and found[-1.0]:
            wrong = sum(found[-1.0]) / len(found[-1.0]) if math.isinf(tau) else \
                tau * math.log(sum(math.exp(s / tau) for s in found[-1.0]) / len(found[-1.0]))
            expected += wrong - sum(found[1.0]) / len(found[1.0])
    values, _ = value_and_gradient(Discriminative(policy, score=score, tau=tau), data)
    assert values["policy"] == pytest.approx(expected / 4, rel=1e-5)  # the question without a right answer stays in the mean
    valid, _ = value_and_gradient(Discriminative(policy, score=score, tau=tau, groups="valid"), data)
    assert valid["policy"] == pytest.approx(expected / 3, rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), constant=st.floats(-5, 5))
def test_temperatures_are_ordered_and_constants_cancel(seed: int, constant: float) -> None:
    source = torch.Generator().manual_seed(seed)
    score = torch.randn(6, generator=source, dtype=torch.float64)
    positive, group = torch.tensor([1, 1, 0, 0, 0, 0], dtype=torch.bool), torch.zeros(6, dtype=torch.long)
    losses = [float(disco(score, positive, group, tau=tau)) for tau in (math.inf, 1e4, 10.0, 1.0, 0.1, 1e-4)]
    assert losses == sorted(losses)  # the objective is at most DisCO-b's and falls with tau
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)
    assert losses[-1] == pytest.approx(float(score[~positive].max() - score[positive].mean()), abs=1e-3)
    gradients = []
    for shift in (0.0, constant):
        leaf = (score + shift).requires_grad_()
        value = disco(leaf, positive, group, tau=0.7)
        gradients.append(torch.autograd.grad(value.sum(), leaf)[0])
        assert float(value.detach()) == pytest.approx(float(disco(score, positive, group, tau=0.7)), abs=1e-9)
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(gradients[0][~positive], (score[~positive] / 0.7).softmax(0))


def test_at_the_policy_that_sampled_both_scores_have_one_gradient_and_there_is_no_penalty() -> None:
    found = {}
    for score in ("log_likelihood", "likelihood_ratio"):
        objective = Discriminative(BanditPolicy(), score=score, tau=math.inf, kl=ConstraintOptions(radius=0.0))  # type: ignore[arg-type]
        values, found[score] = value_and_gradient(objective, rows())
        assert values["kl"] == 0
    torch.testing.assert_close(found["log_likelihood"], found["likelihood_ratio"])
    assert found["log_likelihood"].any()


@pytest.mark.parametrize("right", [1, 3, 5])
def test_group_estimators_weigh_a_question_by_its_difficulty_and_this_does_not(right: int) -> None:
    """On-policy, one question: GRPO's gradient is sqrt(p(1-p)) that of DisCO-b, Dr. GRPO's p(1-p)."""
    size, p = 6, right / 6
    reward = (torch.arange(size) < right).double()
    group = torch.zeros(size, dtype=torch.long)
    source = torch.Generator().manual_seed(right)
    data = Rows({"context": torch.zeros(size, dtype=torch.long), "group": group, "advantages": torch.where(reward > 0, 1.0, -1.0),
                 "choice": [torch.randint(0, 5, (1 + i % 3,), generator=source) for i in range(size)]})
    data = data.with_columns(old_logp=BanditPolicy().log_probs(data).logp.detach())
    _, ours = value_and_gradient(Discriminative(BanditPolicy(), tau=math.inf, on_policy=True), data)
    assert ours.any()
    for advantages, weight in (
        (group_advantages(reward, group, ddof=0, eps=0.0), math.sqrt(p * (1 - p))),
        (group_advantages(reward, group, ddof=1, eps=0.0), math.sqrt(p * (1 - p)) * math.sqrt((size - 1) / size)),
        (group_advantages(reward, group, scale="none"), p * (1 - p)),
    ):
        objective = PolicyGradient(BanditPolicy(), PolicyLoss("reinforce", {}, "seq_mean_token_mean"))
        _, theirs = value_and_gradient(objective, data.with_columns(advantages=advantages))
        torch.testing.assert_close(theirs, weight * ours, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_without_a_contrast_only_the_constraint_acts(sign: float) -> None:
    flat = torch.full((12,), sign)
    values, gradient = value_and_gradient(Discriminative(BanditPolicy(), on_policy=True), rows(signs=flat))
    assert values == {"policy": 0.0}
    assert not gradient.any()
    values, gradient = value_and_gradient(Discriminative(BanditPolicy()), rows(shift=0.5, signs=flat))
    assert values["policy"] == 0
    assert values["kl"] > 0
    assert gradient.any()
    valid, _ = value_and_gradient(Discriminative(BanditPolicy(), groups="valid"), rows(shift=0.5, signs=flat))
    assert valid["policy"] == 0


# -- the constraint --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "factor"), [("linear", 1.0), ("squared", 2.0)])
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_penalty_is_that_of_the_whole_update(form: Any, factor: float, estimator: Any) -> None:
    data, policy = rows(shift=0.5), BanditPolicy()
    scores = policy.log_probs(data)
    gap = (data["old_logp"] - scores.logp)[scores.mask]
    kl = (gap if estimator == "k1" else torch.expm1(-gap) + gap).mean()
    excess = float(kl.detach()) - 0.01
    assert excess > 0
    expected = torch.autograd.grad(factor * 20.0 * excess * kl, policy.module.logits)[0]
    constraint = ConstraintOptions(radius=0.01, penalty=20.0, form=form, estimator=estimator)
    alone = Discriminative(BanditPolicy(), kl=constraint)
    _, found = value_and_gradient(alone, data.with_columns(advantages=torch.ones(12)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    for loose in (constraint.model_copy(update={"radius": 1.0}), constraint.model_copy(update={"penalty": 0.0})):
        _, found = value_and_gradient(Discriminative(BanditPolicy(), kl=loose), data.with_columns(advantages=torch.ones(12)))
        assert not found.any()


def test_a_negative_estimate_never_penalises() -> None:
    values, _ = value_and_gradient(Discriminative(BanditPolicy()), rows(shift=-0.5))
    assert values["kl"] == 0
    values, _ = value_and_gradient(Discriminative(BanditPolicy(), kl=ConstraintOptions(estimator="k3")), rows(shift=-0.5))
    assert values["kl"] > 0  # k3 sees the distance


@pytest.mark.parametrize("score", ["log_likelihood", "likelihood_ratio"])
def test_splitting_the_update_changes_nothing(score: Any, tmp_path: Path) -> None:
    found = []
    for size in (12, 6, 3):
        policy = BanditPolicy()
        objective = Discriminative(policy, score=score, tau=0.5, rows_per_forward=size)
        loop = make_loop(tmp_path / str(size), objective, None, policy=policy, per_update=12, per_forward=size,
                         optimizers=[OptimizerOptions(kind="sgd", lr=1.0, max_grad_norm=None)])
        data = rows(shift=0.1)
        record = loop.update(UpdateBatch({"train": data.take(torch.tensor([9, 0, 3, 6, 10, 1, 4, 7, 11, 2, 5, 8]))}))
        found.append((record, policy.module.logits.detach().clone()))
    for record, weights in found[1:]:
        torch.testing.assert_close(weights, found[0][1], rtol=1e-5, atol=1e-6)
        for name in ("loss", "loss/policy", "loss/kl", "kl_old", "score/right", "score/wrong", "kl/gate"):
            assert record[name] == pytest.approx(found[0][0][name], rel=1e-4), name
    assert found[0][0]["kl/gate"] > 1


# -- refusals --------------------------------------------------------------------------------------------------------------


def test_right_and_wrong_are_told_apart_by_rewards() -> None:
    strict = correctness(None)
    assert strict(None, torch.tensor([1.0, 0.0, math.nan])).tolist() == [1, -1, 0]  # type: ignore[arg-type]
    with pytest.raises(RewardError, match=r"sample 1 has the total reward 0\.5.*positive_threshold"):
        strict(None, torch.tensor([1.0, 0.5]))  # type: ignore[arg-type]
    assert correctness(0.5)(None, torch.tensor([0.5, 0.6, -3.0])).tolist() == [-1, 1, -1]  # type: ignore[arg-type]


def test_completions_without_actions_are_refused() -> None:
    data = Rows({**dict(rows()), "choice": [torch.zeros(0, dtype=torch.long), *rows()["choice"][1:]]})
    with pytest.raises(DataError, match="row 0 of the update has no action"):
        value_and_gradient(Discriminative(BanditPolicy()), data)


def test_cut_off_completions_leave_score_and_constraint() -> None:
    data = rows(shift=0.3)
    masked = data["action_mask"].clone()
    masked[1] = False
    values, _ = value_and_gradient(Discriminative(BanditPolicy()), data.with_columns(action_mask=masked))
    others = torch.tensor([i for i in range(12) if i != 1])
    expected, _ = value_and_gradient(Discriminative(BanditPolicy()), data.take(others))
    assert values == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("options", [
    {"radius": -1e-4}, {"penalty": -1.0}, {"radius": math.nan}, {"placement": "loss"}, {"estimator": "k2+"}, {"coef": 0.1},
])
def test_constraints_without_a_meaning_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(options))):
        ConstraintOptions(**options)


@pytest.mark.parametrize("tau", [0.0, -1.0, math.nan])
def test_temperatures_without_a_meaning_are_refused(tau: float) -> None:
    with pytest.raises(ValueError, match="tau"):
        Discriminative(BanditPolicy(), tau=tau)


# -- what it is for: no bias by difficulty -----------------------------------------------------------------------------------


class Questions(BanditPolicy):
    """Questions with 20 answers of which the first is right: a table of logits that is sampled, rewarded and trained."""

    def __init__(self, probabilities: Tensor) -> None:
        super().__init__(Bandit(*probabilities.shape))
        with torch.no_grad():
            self.module.logits.copy_(probabilities.log())

    def sample(self, prompts: Any, n: int, sampling: Any, generator: torch.Generator) -> Rollout:
        context = torch.tensor([int(prompt) for prompt in prompts]).repeat_interleave(n)
        with torch.no_grad():
            choice = self.module.logits[context].softmax(-1).multinomial(1, generator=generator)
            own = Rows({"context": context, "choice": list(choice)})
            scores = self.log_probs(own)
        return Rollout(prompts=[str(int(c)) for c in context], samples=[str(int(c)) for c in choice[:, 0]], rows=own,
                       group=torch.arange(len(prompts)).repeat_interleave(n), mask=scores.mask, old_logp=scores.logp)

    def unfold(self, rollout: Rollout, *, fraction: float, generator: torch.Generator) -> Rows:
        return rollout.rows.with_columns(old_logp=rollout.old_logp, group=rollout.group,
                                         advantages=torch.tensor(rollout.columns["advantages"]))

    def right(self) -> Tensor:
        return self.module.logits.detach().softmax(-1)[:, 0]


def is_first(completions: Any, **columns: Any) -> list[float]:
    return [float(text == "0") for text in completions]


def train(folder: Path, policy: Questions, objective: Any, advantage: Any, *, seed: int, steps: int, passes: int = 1,
          lr: float = 1.0, clip: float | None = 1e-4, samples: int = 16) -> list[dict[str, float]]:
    """Through the experience and the loop; gradients are clipped far below their size, so that every update has norm ``lr``."""
    count = len(policy.module.logits)
    shape = BatchShape(count * samples, count * samples, 1, 1, count, samples, passes)
    experience = RolloutExperience(policy, [{"prompt": str(i)} for i in range(count)], RewardSet([is_first]), shape,
                                   RolloutSettings(None, advantage, passes=passes), TrainState(seed, steps))
    optimizer = OptimizerOptions(kind="sgd", lr=lr / (clip or 1.0), max_grad_norm=clip)
    loop = make_loop(folder, objective, experience, policy=policy, steps=steps, per_update=count * samples,
                     per_forward=count * samples, optimizers=[optimizer], seed=seed)
    stream = iter(experience)
    return [loop.update(next(stream)) for _ in range(steps)]


def spread(right: Tensor, rest: int = 19) -> Tensor:
    """``[Q, 1 + rest]``: the right answer's probability, the remainder shared by the others."""
    return torch.cat([right[:, None], ((1 - right) / rest)[:, None].expand(-1, rest)], 1)


@pytest.mark.parametrize("seed", [10, 11, 12])
def test_hard_questions_are_learned_sooner_than_by_group_estimators(seed: int, tmp_path: Path) -> None:
    start = torch.tensor([0.03, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9, 0.97])

    def after(name: str) -> Tensor:
        policy = Questions(spread(start))
        if name == "disco_b":
            train(tmp_path / name, policy, Discriminative(policy, tau=math.inf, on_policy=True), correctness(None),
                  seed=seed, steps=20, lr=0.35)
        else:
            scale: Any = "group_std" if name == "grpo" else "none"
            train(tmp_path / name, policy, PolicyGradient(policy, PolicyLoss("reinforce", {}, "seq_mean_token_mean")),
                  lambda rollout, total: group_advantages(total, rollout.group, scale=scale), seed=seed, steps=20,
                  lr=0.35)
        return policy.right()

    found = {name: after(name) for name in ("disco_b", "grpo", "dr_grpo")}
    assert found["disco_b"][0] > 1.15 * found["grpo"][0] > 1.15 * found["dr_grpo"][0]
    # Questions in the middle pay for it: there the weights of the others are largest.
    assert float(found["disco_b"][2]) < float(found["grpo"][2]) < float(found["dr_grpo"][2])
    assert float((found["disco_b"][4:] - found["grpo"][4:]).abs().max()) < 0.1  # easy ones about alike


@pytest.mark.parametrize("seed", [10, 11, 12])
def test_worst_case_weights_push_a_dominating_wrong_answer_down(seed: int, tmp_path: Path) -> None:
    table = torch.cat([torch.tensor([0.05, 0.45]), torch.full((18,), 0.5 / 18)]).expand(4, -1).contiguous()
    left = {}
    for tau in (0.5, math.inf):
        policy = Questions(table)
        train(tmp_path / str(tau), policy, Discriminative(policy, tau=tau, on_policy=True), correctness(None), seed=seed,
              steps=20, lr=0.5)
        left[tau] = float(policy.module.logits.detach().softmax(-1)[:, 1].mean())
        assert float(policy.right().mean()) > 0.15
    assert left[0.5] < 0.85 * left[math.inf]


@pytest.mark.parametrize("seed", [10, 11, 12])
def test_the_constraint_bounds_the_divergence_of_several_updates(seed: int, tmp_path: Path) -> None:
    """Four updates per rollout at a large learning rate: with the penalty the policy stays near the one that sampled."""
    found = {}
    for penalty in (0.0, 1e3):
        policy = Questions(spread(torch.full((8,), 0.3)))
        kl = ConstraintOptions(radius=1e-3, penalty=penalty, estimator="k3")
        objective = Discriminative(policy, tau=10.0, kl=kl)
        records = train(tmp_path / str(penalty), policy, objective, correctness(None), seed=seed, steps=24, passes=4, lr=2.0,
                        clip=None)
        found[penalty] = [record["kl_old"] for record in records]
    assert max(found[1e3]) < 0.5 * max(found[0.0])
