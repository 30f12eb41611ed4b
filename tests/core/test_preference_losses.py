"""The pair-loss table and the pointwise losses: closed forms, gradients, identities between rows, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from mmalign.core.logprobs import ActionScores
from mmalign.core.preference import (
    INPUTS,
    POINTWISE_LOSSES,
    PREFERENCE_LOSSES,
    TRL_LOSS_TYPES,
    clipped_logratio,
    preference_loss,
    wpo_weights,
)
from mmalign.core.supervised import SUPERVISED_LOSSES

LN2 = math.log(2)


def loss(name, *tensors, **options):
    return PREFERENCE_LOSSES.get(name).function(*tensors, **options)


def draws(count, size=6, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(size, generator=g, dtype=torch.float64) for _ in range(count)]


def inputs_of(name, seed=0):
    """Inputs a row accepts: log-probs are negative, probabilities in (0, 1)."""
    row = PREFERENCE_LOSSES.get(name)
    values = draws(len(row.inputs), seed=seed, scale=2.0)
    for i, key in enumerate(row.inputs):
        if key == "win_prob":
            values[i] = values[i].sigmoid()
        elif not row.reference or key.endswith("logp"):
            values[i] = -values[i].abs() - 0.1
    return values


@pytest.mark.parametrize("name", PREFERENCE_LOSSES.names())
def test_every_row_has_known_inputs_one_value_per_pair_and_exact_gradients(name):
    row = PREFERENCE_LOSSES.get(name)
    assert set(row.inputs) <= INPUTS
    values = inputs_of(name)
    for key, value in zip(row.inputs, values, strict=True):
        value.requires_grad_(key not in ("shift", "teacher_logp"))  # statistics and other models' scores are constants
    result = row.function(*values)
    assert result.shape == (6,)
    assert gradcheck(row.function, tuple(values))


@pytest.mark.parametrize("name", PREFERENCE_LOSSES.names())
def test_permuting_pairs_permutes_the_losses(name):
    row, values = PREFERENCE_LOSSES.get(name), inputs_of(name)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    one, other = row.function(*values), row.function(*(value[order] for value in values))
    if row.coupling == "none":
        torch.testing.assert_close(other, one[order])
    else:
        torch.testing.assert_close(other.sum(), one.sum())


@pytest.mark.parametrize(
    ("name", "options", "value"),
    [
        ("sigmoid", {}, LN2), ("cdpo", {"label_smoothing": 0.3}, LN2), ("robust", {"label_smoothing": 0.3}, LN2),
        ("hinge", {}, 1.0), ("slic", {}, 1.0), ("ipo", {"beta": 0.2}, 1 / (4 * 0.04)), ("ipo_sum", {"beta": 0.2}, 6.25),
        ("sigmoid_len", {}, LN2), ("nca", {}, 2 * LN2), ("bco_pair", {}, 2 * LN2), ("sppo_hard", {"beta": 0.5}, 2.0),
        ("apo_zero", {}, 1.0), ("apo_down", {}, 1.0), ("discopop", {}, 0.5 * (1 + LN2)), ("cpo", {}, LN2),
        ("simpo", {"gamma": 0.0}, LN2), ("alphapo", {"gamma": 0.0}, LN2),
        ("exo", {"label_smoothing": 0.25}, -LN2 - 0.5 * math.log(0.25 * 0.75)), ("aot_unpaired", {}, LN2),
    ],
)
def test_value_where_policy_equals_reference(name, options, value):
    zero = torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(loss(name, zero, zero, **options), torch.full_like(zero, value))


@settings(deadline=None)
@given(e=st.floats(0.0, 0.45), d=st.floats(-30, 30))
def test_robust_is_unbiased_under_label_flips(e, d):
    """(1 - e) robust(D) + e robust(-D) is the loss without noise."""
    margin, zero = torch.tensor([d], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    mixed = (1 - e) * loss("robust", margin, zero, label_smoothing=e) + e * loss("robust", -margin, zero, label_smoothing=e)
    torch.testing.assert_close(mixed, loss("sigmoid", margin, zero), rtol=1e-9, atol=1e-9)


def slope(name, u_w, u_l=0.0, **options):
    chosen = torch.tensor([u_w], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([u_l], dtype=torch.float64, requires_grad=True)
    value = loss(name, chosen, rejected, **options)
    return value.item(), *(g.item() for g in torch.autograd.grad(value.sum(), (chosen, rejected)))


def test_minimisers():
    b, e = 0.5, 0.2
    at = math.log((1 - e) / e) / b
    assert slope("cdpo", at, beta=b, label_smoothing=e)[1] == pytest.approx(0, abs=1e-12)
    assert slope("exo", at, beta=b, label_smoothing=e)[:2] == pytest.approx((0, 0), abs=1e-12)
    assert slope("ipo", 1 / (2 * b), beta=b) == (0, 0, 0)
    assert slope("sppo_hard", 1 / (2 * b), -1 / (2 * b), beta=b) == (0, 0, 0)
    assert slope("nca", LN2 / b, beta=b)[1] == pytest.approx(0, abs=1e-12)
    assert all(slope("nca", 0.0, u, beta=b)[2] > 0 for u in (-20.0, 0.0, 5.0))
    assert slope("sigmoid", 0.7, beta=b)[1] == pytest.approx(-b / (1 + math.exp(b * 0.7)))


def test_losses_of_the_difference_ignore_a_common_shift():
    chosen, rejected = draws(2)
    for name in PREFERENCE_LOSSES.names():
        row = PREFERENCE_LOSSES.get(name)
        if row.inputs != ("chosen_logratio", "rejected_logratio") or name == "odds_ratio" or name == "aot_unpaired":
            continue
        same = torch.allclose(row.function(chosen - 3, rejected - 3), row.function(chosen, rejected), rtol=1e-6)
        assert same is row.difference_only, name
    torch.testing.assert_close(
        loss("bco_pair", chosen + 2.0, rejected + 2.0, beta=0.5, reward_shift=1.0), loss("bco_pair", chosen, rejected, beta=0.5)
    )


def test_shared_prefix_contributes_nothing_to_losses_of_the_difference():
    prefix = torch.tensor([0.3, -0.8], dtype=torch.float64, requires_grad=True)
    tails = [torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (0.4, -0.9)]
    chosen, rejected = (torch.cat([prefix, tail]).sum()[None] for tail in tails)
    for name in ("sigmoid", "cdpo", "robust", "hinge", "ipo_sum", "exo", "discopop", "cpo"):
        gradient = torch.autograd.grad(loss(name, chosen, rejected).sum(), prefix, retain_graph=True)[0]
        assert gradient.abs().max() <= 1e-17, name
    for name in ("nca", "bco_pair", "sppo_hard", "apo_zero"):
        assert torch.autograd.grad(loss(name, chosen, rejected).sum(), prefix, retain_graph=True)[0].abs().min() > 0, name


def test_aot_sorts_policy_and_reference_margins_apart():
    policy_w, policy_l, ref_w, ref_l = draws(4)
    value = loss("aot", policy_w, policy_l, ref_w, ref_l)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loss("aot", policy_w, policy_l, ref_w[order], ref_l[order]), value)
    one = [t[:1] for t in (policy_w, policy_l, ref_w, ref_l)]
    cdpo = loss("cdpo", one[0] - one[2], one[1] - one[3], beta=0.3, label_smoothing=0.1)
    torch.testing.assert_close(loss("aot", *one, beta=0.3, label_smoothing=0.1), cdpo)


def test_rows_that_coincide():
    chosen, rejected = draws(2)
    length = 7.0
    torch.testing.assert_close(
        loss("sigmoid_len", chosen / length, rejected / length, beta=0.4), loss("sigmoid", chosen, rejected, beta=0.4 / length)
    )
    torch.testing.assert_close(
        loss("simpo", chosen / length, rejected / length, beta=2.0, gamma=0.0), loss("cpo", chosen, rejected, beta=2.0 / length)
    )
    torch.testing.assert_close(loss("hinge", chosen, rejected), loss("slic", chosen, rejected))
    torch.testing.assert_close(
        loss("sppo_soft", chosen, rejected, torch.ones_like(chosen)), loss("sppo_hard", chosen, rejected)
    )
    torch.testing.assert_close(loss("bt_reward", chosen, rejected), loss("sigmoid", chosen, rejected, beta=1.0))
    torch.testing.assert_close(loss("alphapo", chosen, rejected, alpha=1e-9), loss("simpo", chosen, rejected), rtol=1e-6, atol=0)
    assert torch.equal(loss("linear", chosen), chosen)


def test_bt_reward_margin_and_centring():
    chosen, rejected = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0])
    value = loss("bt_reward", chosen, rejected, margin=torch.tensor([1.0, 0.0]), center_coef=0.01)
    torch.testing.assert_close(value, torch.tensor([LN2 + 0.09, LN2]))


def test_odds_ratio():
    chosen, rejected = torch.tensor([-0.5, -3.0]), torch.tensor([-0.5, -0.2])
    value = loss("odds_ratio", chosen, rejected)
    assert value[0].item() == pytest.approx(LN2)
    p, q = math.exp(-3.0), math.exp(-0.2)
    assert value[1].item() == pytest.approx(math.log1p((q / (1 - q)) / (p / (1 - p))), rel=1e-5)
    certain = torch.zeros(1, requires_grad=True)
    loss("odds_ratio", certain, torch.tensor([-1.0])).backward()
    assert certain.grad.isfinite().all()


def test_extreme_margins_stay_finite():
    far = torch.tensor([1e4, -1e4], requires_grad=True)
    for name in PREFERENCE_LOSSES.names():
        row = PREFERENCE_LOSSES.get(name)
        if row.inputs == ("chosen_logratio", "rejected_logratio") and row.reference:
            value = row.function(far, torch.zeros(2))
            assert value.isfinite().all(), name
            assert torch.autograd.grad(value.sum(), far)[0].isfinite().all(), name


def test_trl_loss_types_name_rows():
    for theirs, ours in TRL_LOSS_TYPES.items():
        assert ours in PREFERENCE_LOSSES or ours in SUPERVISED_LOSSES, theirs
        if theirs in PREFERENCE_LOSSES:
            assert PREFERENCE_LOSSES.canonical(theirs) == ours
    assert PREFERENCE_LOSSES.canonical("aot-pair") == "aot"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sigmoid", {"beta": 0.0}, "beta"), ("ipo", {"beta": -1.0}, "beta"),
        ("robust", {"label_smoothing": 0.5}, "label_smoothing"), ("cdpo", {"label_smoothing": 1.1}, "label_smoothing"),
        ("exo", {"label_smoothing": 0.0}, "label_smoothing"),
        ("discopop", {"tau": 0.0}, "tau"),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        loss(name, torch.zeros(2), torch.zeros(2), **options)


def test_bad_shapes_and_registrations_are_refused():
    with pytest.raises(ValueError, match="shapes"):
        loss("sigmoid", torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"all must be \[B\]"):
        loss("sigmoid", torch.zeros(2, 2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="win_prob"):
        loss("sppo_soft", torch.zeros(1), torch.zeros(1), torch.full((1,), 1.5))
    with pytest.raises(ValueError, match="pixels"):
        preference_loss("mine", inputs=("pixels",))
    with pytest.raises(ValueError, match="did you mean 'sigmoid'"):
        PREFERENCE_LOSSES.get("sigmiod")


def test_a_loss_can_be_added_from_outside():
    @preference_loss("test_only_square", logratio="mean", reference=False)
    def square(chosen_logratio, rejected_logratio):
        return (chosen_logratio - rejected_logratio).square()

    row = PREFERENCE_LOSSES.get("test-only-square")
    PREFERENCE_LOSSES._entries.pop("test_only_square")  # other tests walk the table
    assert (row.function, row.logratio, row.reference, row.default_beta) == (square, "mean", False, 1.0)


class TestPointwise:
    label = torch.tensor([True, False, True, False, True, False])

    @pytest.mark.parametrize("name", POINTWISE_LOSSES.names())
    def test_gradients(self, name):
        u = draws(1)[0].requires_grad_()
        assert gradcheck(lambda u: POINTWISE_LOSSES.get(name)(u, self.label), (u,))

    def test_kto(self):
        kto, zero = POINTWISE_LOSSES.get("kto"), torch.zeros(6)
        value = kto(zero, self.label, desirable_weight=1.0, undesirable_weight=1.2)
        torch.testing.assert_close(value, torch.tensor([0.5, 0.6] * 3))
        u = torch.tensor([1.0, 1.0])
        value = kto(u, torch.tensor([1, 0]), beta=0.5, kl=0.4)
        s = 1 / (1 + math.exp(-0.3))
        torch.testing.assert_close(value, torch.tensor([1 - s, s]))
        assert torch.equal(kto(u, torch.tensor([1, 0]), kl=-3.0), kto(u, torch.tensor([1, 0]), kl=0.0))

    def test_kto_offset_has_no_gradient(self):
        kl = torch.tensor(0.3, requires_grad=True)
        u = torch.zeros(2, requires_grad=True)
        POINTWISE_LOSSES.get("kto")(u, torch.tensor([1, 0]), kl=kl).sum().backward()
        assert kl.grad is None
        assert u.grad.abs().min() > 0

    def test_unpaired_forms_add_up_to_the_pair_losses(self):
        chosen, rejected = draws(2)
        yes, no = torch.ones(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool)
        for point, pair in (("bco", "bco_pair"), ("apo_zero_unpaired", "apo_zero")):
            function = POINTWISE_LOSSES.get(point)
            torch.testing.assert_close(
                function(chosen, yes, beta=0.3) + function(rejected, no, beta=0.3), loss(pair, chosen, rejected, beta=0.3)
            )
        shifted = POINTWISE_LOSSES.get("bco")(chosen, yes, beta=0.3, shift=0.7)
        torch.testing.assert_close(shifted, torch.nn.functional.softplus(0.7 - 0.3 * chosen))

    def test_refusals(self):
        for name in POINTWISE_LOSSES.names():
            with pytest.raises(ValueError, match="label"):
                POINTWISE_LOSSES.get(name)(torch.zeros(2), torch.tensor([1, 2]))
            with pytest.raises(ValueError, match="beta"):
                POINTWISE_LOSSES.get(name)(torch.zeros(2), torch.tensor([1, 0]), beta=0.0)


def test_wpo_weights():
    """Uniform distributions have weight 1 whatever the token; confident ones are weighed down when the token is unlikely."""
    logp = torch.tensor([[math.log(0.25), math.log(0.25)], [math.log(0.1), 0.0]])
    scores = ActionScores(logp, torch.tensor([[1, 1], [1, 0]]), sum_p2=torch.tensor([[0.25, 0.25], [0.82, 0.0]]))
    torch.testing.assert_close(wpo_weights(scores), torch.tensor([1.0, 0.1 / 0.82]))
    with pytest.raises(ValueError, match="sum_p2"):
        wpo_weights(ActionScores(logp, torch.ones(2, 2)))


def test_clipped_logratio_has_no_gradient_outside():
    logp = torch.tensor([0.0, 0.05, 1.0, -1.0], requires_grad=True)
    value = clipped_logratio(logp, torch.zeros(4), eps=0.1)
    torch.testing.assert_close(value.detach(), torch.tensor([0.0, 0.05, math.log(1.1), math.log(0.9)]))
    assert torch.autograd.grad(value.sum(), logp)[0].tolist() == [1.0, 1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="eps"):
        clipped_logratio(logp, logp, eps=1.0)
