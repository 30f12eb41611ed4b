"""Weights of intuitive fine-tuning: closed forms, both published forms, traps and refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmalign.core.logprobs import ActionScores
from mmalign.core.reduce import reduce
from mmalign.core.supervised import propagated_nll, propagation_weights

ROW = torch.tensor([[1.0, 0.5, 2.0, 0.25]], dtype=torch.float64)
FULL = torch.ones(1, 4, dtype=torch.bool)
BATCH = torch.tensor([[1.0, 0.5, 2.0, 0.25], [0.3, 1.2, 7.0, 7.0]], dtype=torch.float64)
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)


def loss_of(nll: torch.Tensor, **options) -> torch.Tensor:
    values = propagated_nll(ActionScores(-nll, MASK), **options)
    return reduce(values, MASK, how="seq_mean_token_mean")


def test_weights_of_the_product_form():
    expected = torch.tensor([[1.623866, 1.220161, 1.039795, 0.116178]], dtype=torch.float64)
    torch.testing.assert_close(propagation_weights(ROW, FULL, gamma=0.95), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("gamma", "expected"), [(0.95, 0.897368), (1.0, 0.888194), (0.0, 0.84375)])
def test_loss_of_a_padded_batch(gamma, expected):
    assert float(loss_of(BATCH, gamma=gamma)) == pytest.approx(expected, abs=1e-6)


def test_gamma_zero_is_a_mean_of_row_means():
    assert torch.equal(propagation_weights(BATCH, MASK, gamma=0.0), MASK.double())


def test_gradient_with_and_without_detached_weights():
    nll = BATCH.clone().requires_grad_()
    loss_of(nll, gamma=0.95, detach=True).backward()
    weights = propagation_weights(BATCH, MASK, gamma=0.95)
    size = MASK.sum(1, keepdim=True)
    torch.testing.assert_close(nll.grad, weights / (size * 2), atol=1e-12, rtol=0)
    through = BATCH.clone().requires_grad_()
    loss_of(through, gamma=0.95, detach=False).backward()
    expected = torch.tensor([0.198008, 0.113774, 0.146280, -0.018529], dtype=torch.float64)
    torch.testing.assert_close(through.grad[0], expected, atol=1e-6, rtol=0)


def test_detached_weights_never_push_a_token_down():
    """The trap of the released code: through normalised weights the coefficient of a likely token turns negative."""
    nll = BATCH.clone().requires_grad_()
    loss_of(nll, gamma=0.95).backward()
    assert bool((nll.grad[MASK] > 0).all())


@given(gamma=st.floats(0.05, 1.0), length=st.integers(1, 8))
def test_equal_losses_weigh_by_what_is_left(gamma, length):
    nll = torch.full((1, length), 0.7, dtype=torch.float64)
    left = torch.tensor([sum(gamma**k for k in range(length - t)) for t in range(length)], dtype=torch.float64)
    weights = propagation_weights(nll, torch.ones(1, length, dtype=torch.bool), gamma=gamma)[0]
    torch.testing.assert_close(weights, left / left.mean(), atol=1e-9, rtol=0)


@given(gamma=st.floats(0.05, 1.0), seed=st.integers(0, 100))
def test_double_sum_is_equation_21(gamma, seed):
    """``sum_n sum_{i >= n} gamma^(i - n) l_i`` written out, up to one factor per row."""
    nll = torch.rand(1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.1
    mask = torch.ones(1, 6, dtype=torch.bool)
    written = sum(gamma ** (i - n) * float(nll[0, i]) for n in range(6) for i in range(n, 6))
    coefficients = torch.tensor([sum(gamma**k for k in range(i + 1)) for i in range(6)], dtype=torch.float64)
    weights = propagation_weights(nll, mask, gamma=gamma, form="double_sum")
    assert float((weights * nll).sum()) * float(coefficients.mean()) == pytest.approx(written, rel=1e-9)
    assert bool((weights[0, 1:] >= weights[0, :-1]).all())  # late tokens weigh more, early ones in the product


@pytest.mark.parametrize("options", [
    {}, {"norm": "softmax"}, {"norm": "log"}, {"side": "right"}, {"source": "mask"}, {"form": "double_sum"},
])
def test_mean_weight_is_one_and_padding_plays_no_part(options):
    weights = propagation_weights(BATCH, MASK, gamma=0.9, **options)
    torch.testing.assert_close(weights.sum(1), MASK.sum(1).double(), atol=1e-9, rtol=0)
    assert bool((weights[~MASK] == 0).all())
    alone = propagation_weights(BATCH[1:, :2], MASK[1:, :2], gamma=0.9, **options)
    torch.testing.assert_close(weights[1:, :2], alone, atol=1e-12, rtol=0)


def test_left_padding_gives_the_same_weights():
    shifted = torch.tensor([[9.0, 9.0, 0.3, 1.2]], dtype=torch.float64)
    mask = torch.tensor([[0, 0, 1, 1]], dtype=torch.bool)
    torch.testing.assert_close(propagation_weights(shifted, mask, gamma=0.95)[:, 2:],
                               propagation_weights(BATCH[1:, :2], MASK[1:, :2], gamma=0.95), atol=1e-12, rtol=0)


def test_right_side_and_square_norm():
    carried = torch.tensor([0.3, 1.2 + 0.5 * 0.3], dtype=torch.float64) / 2
    inverse = 1 / (carried + carried.min())
    weights = propagation_weights(BATCH[1:, :2], MASK[1:, :2], gamma=0.5, side="right")[0]
    torch.testing.assert_close(weights, inverse / inverse.mean(), atol=1e-9, rtol=0)
    square = propagation_weights(ROW, FULL, gamma=0.95, norm="l2")
    assert float(square.square().mean()) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("options", [{}, {"norm": "l2"}, {"norm": "softmax"}, {"norm": "log"}, {"side": "right"}])
@pytest.mark.parametrize("detach", [True, False])
def test_vanishing_losses_give_finite_weights_and_gradients(options, detach):
    nll = torch.zeros(1, 3, requires_grad=True)
    weights = propagation_weights(nll, torch.ones(1, 3, dtype=torch.bool), gamma=0.9, detach=detach, **options)
    torch.testing.assert_close(weights, torch.ones(1, 3))
    (weights * nll).sum().backward()
    assert bool(torch.isfinite(nll.grad).all())


@pytest.mark.parametrize("options", [{"norm": "softmax"}, {"norm": "log"}, {"norm": "l2"}, {"side": "right"}, {}])
def test_gradient_through_the_weights(options):
    nll = ROW.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: (x * propagation_weights(x, FULL, gamma=0.95, detach=False, **options)).sum(), (nll,))


@pytest.mark.parametrize(("arguments", "message"), [
    ({"gamma": 1.5}, "gamma"), ({"gamma": -0.1}, "gamma"), ({"norm": "l3"}, "norm"), ({"side": "up"}, "side"),
    ({"form": "sum"}, "form"), ({"source": "logps"}, "source"), ({"form": "double_sum", "side": "right"}, "double_sum"),
])
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        propagation_weights(ROW, FULL, **arguments)


def test_refuses_rows_without_actions():
    with pytest.raises(ValueError, match="row 1 has no action"):
        propagation_weights(BATCH, torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool))
    with pytest.raises(ValueError, match="shapes"):
        propagation_weights(BATCH, FULL)
