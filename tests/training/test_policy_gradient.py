"""The policy-gradient objective: splitting an update changes nothing, whatever the loss, reduction and divergence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toys import BanditPolicy, FixedExperience, bandit_rows, make_loop

from mmalign.core.logprobs import ActionScores
from mmalign.core.policy_gradient import clip_bounds
from mmalign.data.rows import Rows
from mmalign.training.objective import TrainState, UpdateBatch
from mmalign.training.optimizers import OptimizerOptions
from mmalign.training.policy_gradient import KLOptions, PolicyGradient, PolicyLoss

LOSSES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "reinforce": ("reinforce", {}, ("token_mean", "seq_mean_token_sum")),
    "ppo": ("ppo_clip", {"clip_high": 0.28}, ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm", "sum_norm")),
    "dual": ("ppo_clip", {"dual_clip": 1.1}, ("token_mean", "seq_mean_token_mean")),
    "rloo": ("ppo_clip", {"level": "sequence_sum"}, ("seq_mean_token_mean",)),
    "gspo": ("gspo", {"clip_low": 0.05, "clip_high": 0.05}, ("seq_mean_token_mean",)),
    "cispo": ("cispo", {"clip_high": 1.05}, ("token_mean", "seq_mean_token_sum_norm")),
}


class Entropic(BanditPolicy):
    """A bandit that also gives the entropy of every choice."""

    def log_probs(self, rows: Rows, *, draw: Any = None, temperature: float = 1.0, want: Any = ()) -> ActionScores:
        table = (self.module.logits / temperature).log_softmax(-1)
        scores = self.scores_from(table, rows)
        entropy = -(table.exp() * table).sum(-1)[rows["context"]]
        scores.entropy = entropy[:, None] * scores.mask
        return scores


def rollout_rows(seed: int, *, per_action: bool) -> Rows:
    """Eight rows sampled by a policy that is a little elsewhere; one of them is cut off and trains nothing."""
    rows, noise = bandit_rows(8, seed=seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        now = BanditPolicy().log_probs(rows)
    shape = now.logp.shape
    old = (now.logp + 0.2 * torch.randn(shape, generator=noise)) * now.mask
    advantages = torch.randn(shape if per_action else shape[:1], generator=noise)
    keep = now.mask.clone()
    keep[3] = False
    return rows.with_columns(advantages=advantages.double(), old_logp=old.double(), ref_logp=(now.logp + 0.3).double() * now.mask,
                             action_mask=keep)


def gradient_of(rows: Rows, size: int, folder: Any, loss: PolicyLoss, **options: Any) -> Tensor:
    policy = Entropic()
    policy.module.double()
    objective = PolicyGradient(policy, loss, on_policy=loss.name == "reinforce", **options)
    loop = make_loop(folder, objective, FixedExperience(rows, 8), policy=policy, per_forward=size,
                     optimizers=[OptimizerOptions(kind="sgd", lr=1.0, max_grad_norm=None)])
    before = policy.module.logits.detach().clone()
    loop.update(UpdateBatch({"train": rows}))
    return before - policy.module.logits.detach()


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(sorted(LOSSES)), which=st.integers(0, 3), size=st.sampled_from([1, 2, 3, 5]), seed=st.integers(0, 9),
       kl=st.sampled_from([None, "k2", "k3", "k1+"]), entropy=st.sampled_from([0.0, 0.3]), per_action=st.booleans())
def test_the_gradient_is_the_same_however_rows_are_split(
    tmp_path_factory: Any, name: str, which: int, size: int, seed: int, kl: Any, entropy: float, per_action: bool,
) -> None:
    function, arguments, reductions = LOSSES[name]
    loss = PolicyLoss(function, arguments, reductions[which % len(reductions)], 4)
    rows = rollout_rows(seed, per_action=per_action and name not in ("gspo", "rloo"))
    options = {"entropy_coef": entropy, "kl": None if kl is None else KLOptions(coef=0.4, estimator=kl)}
    whole, split = (gradient_of(rows, size, tmp_path_factory.mktemp("split"), loss, **options) for size in (8, size))
    torch.testing.assert_close(whole, split, rtol=0, atol=1e-7)  # losses are reduced in float32
    assert whole.abs().sum() > 0


@pytest.mark.parametrize(("name", "arguments", "level", "bounds"), [
    ("reinforce", {}, "token", {}),
    ("ppo_clip", {}, "token", {"low": 0.8, "high": 1.2}),
    ("ppo_clip", {"clip_high": 0.5, "level": "sequence_sum"}, "sequence_sum", {"low": 0.8, "high": 1.5}),
    ("gspo", {}, "sequence", {"low": 1 - 3e-4, "high": 1 + 4e-4}),
    ("cispo", {}, "token", {"high": 5.0}),
])
def test_bounds_of_the_logged_clipping_are_those_of_the_loss(name: str, arguments: Any, level: str, bounds: Any) -> None:
    assert clip_bounds(name, arguments) == (level, pytest.approx(bounds))


def test_clipped_shares_are_of_the_side_that_loses_its_gradient() -> None:
    """Two actions: a ratio of 2 with a positive and one with a negative advantage."""
    policy = BanditPolicy()
    zeros = torch.tensor([0, 0])
    rows = Rows({"context": zeros, "choice": [torch.tensor([1]), torch.tensor([1])], "group": zeros})
    with torch.no_grad():
        now = policy.log_probs(rows).logp
    rows = rows.with_columns(advantages=torch.tensor([1.0, -1.0]), old_logp=now - torch.tensor(2.0).log())
    for name, high in (("ppo_clip", 0.5), ("gspo", 0.5), ("cispo", 0.0)):
        objective = PolicyGradient(policy, PolicyLoss(name, {}, "seq_mean_token_mean"), on_policy=False)
        _, metrics = objective.loss(UpdateBatch({"train": rows}), {}, TrainState(0, 1))
        assert metrics["clipped/high"].total / metrics["clipped/high"].count == pytest.approx(high), name
    objective = PolicyGradient(policy, PolicyLoss("cispo", {"clip_high": 1.5}, "token_mean"), on_policy=False)
    _, metrics = objective.loss(UpdateBatch({"train": rows}), {}, TrainState(0, 1))
    assert metrics["clipped/high"].total / metrics["clipped/high"].count == pytest.approx(1.0)  # for either sign
