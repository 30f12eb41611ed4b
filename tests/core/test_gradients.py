"""Inner products of gradients and the derivative with respect to a mixing weight, against closed forms and differences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.core.gradients import gradient_dot, gradient_norm, mixing_gradient

SFT = [torch.tensor([0.5, -1.0]), torch.tensor([[0.25]])]
RL = [torch.tensor([-0.3, 0.4]), torch.tensor([[0.8]])]
LOSS = [torch.tensor([0.2, -0.6]), torch.tensor([[1.0]])]


def test_sign_and_scale_on_numbers() -> None:
    """The three gradients over two parameters: dU/dmu = +0.045, and the cosine 0.223235."""
    assert mixing_gradient(LOSS, SFT, RL, step_size=0.1) == pytest.approx(0.045, rel=1e-6)
    assert mixing_gradient(LOSS, SFT, RL, step_size=0.1, scale="cosine") == pytest.approx(0.223235, abs=1e-6)
    assert mixing_gradient(LOSS, SFT, RL, step_size=7.0, scale="cosine") == pytest.approx(0.223235, abs=1e-6)


def test_equal_losses_and_vanishing_gradients_say_nothing() -> None:
    zero = [torch.zeros_like(t) for t in LOSS]
    for scale in ("raw", "cosine"):
        assert mixing_gradient(LOSS, SFT, SFT, step_size=0.1, scale=scale) == 0  # type: ignore[arg-type]
        assert mixing_gradient(zero, SFT, RL, step_size=0.1, scale=scale) == 0  # type: ignore[arg-type]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), mu=st.floats(0.05, 0.95), alpha=st.floats(0.01, 0.3))
def test_it_is_the_derivative_of_the_utility_after_one_step(seed: int, mu: float, alpha: float) -> None:
    """U = -(theta - v)' A (theta - v) / 2 after theta' = theta - alpha (mu g_sft + (1 - mu) g_rl), differences in double."""
    source = torch.Generator().manual_seed(seed)
    theta, first, second, optimum = (torch.randn(5, dtype=torch.float64, generator=source) for _ in range(4))
    root = torch.randn(5, 5, dtype=torch.float64, generator=source)
    curvature = root @ root.T / 5

    def after(share: float) -> torch.Tensor:
        return theta - alpha * (share * first + (1 - share) * second)

    def utility(at: torch.Tensor) -> float:
        return -0.5 * float((at - optimum) @ curvature @ (at - optimum))

    h = 1e-5
    difference = (utility(after(mu + h)) - utility(after(mu - h))) / (2 * h)
    exact = mixing_gradient([curvature @ (after(mu) - optimum)], [first], [second], step_size=alpha)
    assert exact == pytest.approx(difference, rel=1e-6, abs=1e-8)
    # With grad U at theta the error is alpha^2 <mixed gradient, A (g_sft - g_rl)>: first order in alpha beside the value itself.
    here = mixing_gradient([curvature @ (theta - optimum)], [first], [second], step_size=alpha)
    mixed = mu * first + (1 - mu) * second
    assert here - exact == pytest.approx(alpha**2 * float(mixed @ curvature @ (first - second)), rel=1e-6, abs=1e-9)


def test_norms_are_over_all_tensors_in_double() -> None:
    assert gradient_norm(SFT) == pytest.approx(math.sqrt(0.25 + 1 + 0.0625))
    half = [torch.full((100_000,), 1e-3, dtype=torch.float16)]
    assert gradient_dot(half, half) == pytest.approx(100_000 * float(half[0][0].double()) ** 2, rel=1e-9)


@pytest.mark.parametrize(("left", "right", "message"), [
    (SFT, SFT[:1], "2 tensors and right 1"), (SFT, [SFT[1], SFT[0]], "tensor 0"),
])
def test_lists_must_be_of_the_same_parameters(left: list[torch.Tensor], right: list[torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gradient_dot(left, right)


def test_unknown_scales_are_refused() -> None:
    with pytest.raises(ValueError, match="scale is 'log'"):
        mixing_gradient(LOSS, SFT, RL, step_size=0.1, scale="log")  # type: ignore[arg-type]
