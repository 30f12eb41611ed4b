"""Policy-gradient losses: gradients at ratio 1, clipping, levels, and the value loss."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from mmalign.core.policy_gradient import POLICY_LOSSES, clipped_value_loss, disco, policy_ratio
from mmalign.core.reduce import REDUCTIONS, reduce

MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
ADVANTAGES = torch.tensor([1.5, -0.5, 0.3], dtype=torch.float64)


def log_probs(seed=0):
    g = torch.Generator().manual_seed(seed)
    return (-torch.rand(3, 4, generator=g, dtype=torch.float64)).requires_grad_()


@pytest.mark.parametrize("name", POLICY_LOSSES.names())
def test_gradients_are_exact(name):
    old = log_probs(1).detach() * 0.3
    function = POLICY_LOSSES.get(name)
    if name in ("reinforce", "cispo"):  # straight-through: the derivative is that of another function
        logp = log_probs()
        weight = torch.ones(()) if name == "reinforce" else policy_ratio(logp, old).detach().clamp(max=5.0)
        gradient = torch.autograd.grad((function(logp, old, ADVANTAGES, mask=MASK) * MASK).sum(), logp)[0]
        torch.testing.assert_close(gradient, torch.where(MASK, -weight * ADVANTAGES[:, None], 0.0))
    else:
        assert gradcheck(lambda logp: function(logp, old, ADVANTAGES, mask=MASK), (log_probs(),))


@pytest.mark.parametrize("how", REDUCTIONS.names())
@pytest.mark.parametrize("old", ["none", "equal"])
def test_all_losses_have_the_reinforce_gradient_at_ratio_one(how, old):
    logp = log_probs()
    old_logp = None if old == "none" else logp.detach().clone()
    gradients = {}
    for name in ("reinforce", "ppo_clip", "cispo"):
        values = POLICY_LOSSES.get(name)(logp, old_logp, ADVANTAGES, mask=MASK)
        loss = reduce(values, MASK, how=how, norm_length=4)
        gradients[name] = torch.autograd.grad(loss, logp)[0]
    if how == "seq_mean_token_mean":
        loss = reduce(POLICY_LOSSES.get("gspo")(logp, old_logp, ADVANTAGES, mask=MASK), MASK.any(1), how=how)
        gradients["gspo"] = torch.autograd.grad(loss, logp)[0]
    plain = torch.autograd.grad(reduce(-ADVANTAGES[:, None] * logp, MASK, how=how, norm_length=4), logp)[0]
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain, msg=name)


def test_on_policy_value_is_minus_the_advantage():
    for name in ("reinforce", "ppo_clip"):
        value = POLICY_LOSSES.get(name)(log_probs(), None, ADVANTAGES)
        torch.testing.assert_close(value.detach(), -ADVANTAGES[:, None].expand(3, 4))


def test_clipping_stops_the_gradient_on_one_side_only():
    """A > 0 and the ratio above the range, or A < 0 and below it: nothing more to gain."""
    old = torch.zeros(1, 4, dtype=torch.float64)
    logp = torch.tensor([[0.5, -0.5, 0.5, -0.5]], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0]], dtype=torch.float64)
    value = POLICY_LOSSES.get("ppo_clip")(logp, old, advantages, clip_low=0.2, clip_high=0.3)
    up, down = math.exp(0.5), math.exp(-0.5)
    torch.testing.assert_close(value, torch.tensor([[-1.3, -down, up, 0.8]], dtype=torch.float64))
    gradient = torch.autograd.grad(value.sum(), logp)[0]
    torch.testing.assert_close(gradient, torch.tensor([[0.0, -down, up, 0.0]], dtype=torch.float64))


def test_infinite_clip_is_the_importance_weighted_gradient():
    logp, old = log_probs(), log_probs(1).detach()
    value = POLICY_LOSSES.get("ppo_clip")(logp, old, ADVANTAGES, clip_low=math.inf, clip_high=math.inf)
    torch.testing.assert_close(value, -ADVANTAGES[:, None] * (logp - old).exp())


def test_dual_clip_bounds_negative_advantages():
    old = torch.zeros(1, 2, dtype=torch.float64)
    logp = torch.tensor([[2.0, 2.0]], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([[-1.0, 1.0]], dtype=torch.float64)
    value = POLICY_LOSSES.get("ppo_clip")(logp, old, advantages, dual_clip=3.0)
    torch.testing.assert_close(value, torch.tensor([[3.0, -1.2]], dtype=torch.float64))
    assert torch.autograd.grad(value.sum(), logp)[0].tolist() == [[0.0, 0.0]]


def test_ratio_clamp_has_no_gradient_outside_the_range():
    logp = torch.tensor([[0.5, 0.0]], dtype=torch.float64, requires_grad=True)
    value = POLICY_LOSSES.get("ppo_clip")(logp, torch.zeros(1, 2).double(), -torch.ones(1).double(), ratio_clamp=True)
    assert torch.autograd.grad(value.sum(), logp)[0].tolist() == [[0.0, 1.0]]


def test_ratio_levels():
    logp, old = log_probs().detach(), log_probs(1).detach()
    gap = (logp - old) * MASK
    torch.testing.assert_close(policy_ratio(logp, old, MASK, level="sequence"), (gap.sum(1) / MASK.sum(1)).exp())
    torch.testing.assert_close(policy_ratio(logp, old, MASK, level="sequence_sum"), gap.sum(1).exp())
    assert policy_ratio(logp + 100, old).max().item() == pytest.approx(math.exp(20))
    dirty = torch.where(MASK, logp, float("nan"))
    assert policy_ratio(dirty, old, MASK).isfinite().all()


def test_advantages_per_action():
    logp = log_probs()
    table = torch.arange(12.0, dtype=torch.float64).view(3, 4)
    value = POLICY_LOSSES.get("reinforce")(logp, None, table)
    torch.testing.assert_close(value.detach(), -table)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("ppo_clip", {"clip_low": -0.1}, "clip_low"), ("ppo_clip", {"dual_clip": 1.0}, "dual_clip"),
        ("ppo_clip", {"level": "row"}, "level"), ("cispo", {"clip_high": 0.0}, "clip_high"),
        ("reinforce", {"advantages": torch.zeros(2)}, "advantages"), ("ppo_clip", {"old_logp": torch.zeros(3, 3)}, "old_logp"),
        ("ppo_clip", {"mask": torch.ones(3, 3)}, "mask"),
    ],
)
def test_refusals(name, change, message):
    arguments = {"logp": torch.zeros(3, 4), "old_logp": torch.zeros(3, 4), "advantages": torch.zeros(3)} | change
    with pytest.raises(ValueError, match=message):
        POLICY_LOSSES.get(name)(**arguments)


class TestDisco:
    score = torch.tensor([-1.0, -2.0, -0.5, -3.0, -4.0, -1.0], dtype=torch.float64, requires_grad=True)
    group = torch.tensor([0, 0, 0, 0, 1, 1])
    positive = torch.tensor([1, 1, 0, 0, 1, 1])

    def test_means(self):
        value = disco(self.score, self.positive, self.group)
        torch.testing.assert_close(value, torch.tensor([-1.75 + 1.5, 0.0], dtype=torch.float64))

    def test_gradient_on_negatives_is_a_softmax(self):
        value = disco(self.score, self.positive, self.group, tau=0.5)
        gradient = torch.autograd.grad(value.sum(), self.score)[0]
        expected = torch.cat([torch.tensor([-0.5, -0.5]).double(), (self.score.detach()[2:4] / 0.5).softmax(0), torch.zeros(2)])
        torch.testing.assert_close(gradient, expected)


class TestValueLoss:
    def test_pessimistic_of_plain_and_clipped(self):
        values = torch.tensor([[1.0, 0.0, 3.0]], requires_grad=True)
        loss = clipped_value_loss(values, torch.zeros(1, 3), torch.tensor([[2.0, 1.0, 3.0]]), clip=0.2)
        torch.testing.assert_close(loss, torch.tensor([[1.8**2 / 2, 0.5, 2.8**2 / 2]]))

    def test_infinite_clip_is_the_square(self):
        values = torch.tensor([[1.0]])
        assert clipped_value_loss(values, torch.tensor([[9.0]]), torch.tensor([[3.0]]), clip=math.inf).item() == 2.0

    def test_clip_must_be_positive(self):
        with pytest.raises(ValueError, match="clip"):
            clipped_value_loss(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1), clip=0.0)
