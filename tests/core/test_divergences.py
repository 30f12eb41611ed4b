"""KL estimators, f-divergences, the exact Gaussian KL, and the constraints built on them."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from mmalign.core.constraints import adaptive_coefficient, hinge_penalty
from mmalign.core.denoising import gaussian_log_prob
from mmalign.core.divergence import f_divergence_score, gaussian_kl, kl_estimate

LOGITS = torch.tensor([0.3, -1.0, 0.8, 0.0], dtype=torch.float64, requires_grad=True)
REFERENCE = torch.tensor([-0.5, 0.4, 0.1, 0.9], dtype=torch.float64).log_softmax(0)


def expectation(kind):
    """Exact expectation under the policy with the sample weights held fixed, as sampling does."""
    logp = LOGITS.log_softmax(0)
    return (logp.detach().exp() * kl_estimate(logp, REFERENCE, kind=kind)).sum()


def exact(forward):
    logp = LOGITS.log_softmax(0)
    return (logp.exp() * (logp - REFERENCE)).sum() if forward else (REFERENCE.exp() * (REFERENCE - logp)).sum()


def gradient(value):
    return torch.autograd.grad(value, LOGITS)[0]


def test_expected_values_are_the_divergence():
    for kind in ("k1", "k3", "k1+", "k3+", "kl", "low_var_kl"):
        torch.testing.assert_close(expectation(kind), exact(forward=True), msg=kind)


def test_expected_gradients():
    """k1 has none, k2 (and every +) that of KL(policy || ref), k3 that of KL(ref || policy)."""
    torch.testing.assert_close(gradient(expectation("k1")), torch.zeros_like(LOGITS))
    for kind in ("k2", "mse", "k1+", "k3+"):
        torch.testing.assert_close(gradient(expectation(kind)), gradient(exact(forward=True)), msg=kind)
    torch.testing.assert_close(gradient(expectation("k3")), gradient(exact(forward=False)))


def test_closed_forms_and_gradcheck():
    x = torch.tensor([[0.0, 0.5, -2.0]], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros_like(x)
    assert kl_estimate(x, zero, kind="abs").tolist() == [[0.0, 0.5, 2.0]]
    torch.testing.assert_close(kl_estimate(x, zero, kind="k3"), torch.exp(-x) - 1 + x)
    assert kl_estimate(x, zero, kind="k3").min() >= 0
    for kind in ("k1", "k2", "k3"):
        assert gradcheck(lambda x, kind=kind: kl_estimate(x, zero, kind=kind), (x,))
    assert kl_estimate(torch.tensor([-200.0]), torch.zeros(1)).isfinite().all()


def test_kl_refusals():
    with pytest.raises(ValueError, match="kind"):
        kl_estimate(torch.zeros(1), torch.zeros(1), kind="k4")
    with pytest.raises(ValueError, match="shapes"):
        kl_estimate(torch.zeros(1), torch.zeros(2))


def test_gaussian_kl_is_the_mean_log_ratio():
    g = torch.Generator().manual_seed(0)
    mean, ref = torch.randn(2, 3, generator=g), torch.randn(2, 3, generator=g)
    std = torch.tensor([0.5, 2.0])
    closed = gaussian_kl(mean, ref, std, dims="sum")
    torch.testing.assert_close(closed, ((mean - ref).square() / (2 * std[:, None] ** 2)).sum(1))
    samples = mean + std[:, None] * torch.randn(20000, 2, 3, generator=g)
    ratio = torch.stack([
        gaussian_log_prob(samples[:, i], mean[i].expand(20000, 3), std[i], dims="sum")
        - gaussian_log_prob(samples[:, i], ref[i].expand(20000, 3), std[i], dims="sum") for i in range(2)
    ])
    torch.testing.assert_close(ratio.mean(1), closed, rtol=0.05, atol=0.01)
    torch.testing.assert_close(gaussian_kl(mean, ref, std), closed / 3)
    with pytest.raises(ValueError, match="std"):
        gaussian_kl(mean, ref, torch.zeros(2))


@pytest.mark.parametrize(
    ("kind", "slope"), [("reverse_kl", 1.0), ("forward_kl", 1.0), ("js", 0.5), ("alpha", 1.0)]
)
def test_f_divergence_scores_are_zero_with_the_right_slope_at_equality(kind, slope):
    u = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    value = f_divergence_score(u, kind=kind)
    assert value.item() == pytest.approx(0)
    assert torch.autograd.grad(value.sum(), u)[0].item() == pytest.approx(slope)
    far = torch.tensor([1.3, -0.7], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda u: f_divergence_score(u, kind=kind), (far,))


def test_f_divergence_limits():
    u = torch.tensor([0.7, -0.4], dtype=torch.float64)
    torch.testing.assert_close(f_divergence_score(u, kind="alpha", alpha=1.0), u)
    torch.testing.assert_close(f_divergence_score(u, kind="alpha", alpha=1 + 1e-7), u, rtol=1e-5, atol=0)
    torch.testing.assert_close(f_divergence_score(u, kind="alpha", alpha=0.0), f_divergence_score(u, kind="forward_kl"))
    with pytest.raises(ValueError, match="kind"):
        f_divergence_score(u, kind="chi2")


@pytest.mark.parametrize(("form", "factor"), [("linear", 1.0), ("squared", 2.0)])
def test_hinge_penalty_gradients(form, factor):
    kl = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    penalty = hinge_penalty(kl, radius=0.2, coef=10.0, form=form)
    assert torch.autograd.grad(penalty, kl)[0].item() == pytest.approx(factor * 10.0 * 0.3)
    inside = torch.tensor(0.1, requires_grad=True)
    penalty = hinge_penalty(inside, radius=0.2, coef=10.0, form=form)
    assert (penalty.item(), torch.autograd.grad(penalty, inside)[0].item()) == (0.0, 0.0)


def test_hinge_penalty_refusals():
    for change in ({"radius": -1.0}, {"coef": -1.0}, {"form": "cubic"}):
        with pytest.raises(ValueError, match=next(iter(change))):
            hinge_penalty(torch.zeros(()), **({"radius": 0.1, "coef": 1.0} | change))


def test_adaptive_coefficient():
    assert adaptive_coefficient(0.1, 6.0, target=6.0, horizon=1000, n=100) == pytest.approx(0.1)
    assert adaptive_coefficient(0.1, 6.6, target=6.0, horizon=1000, n=100) == pytest.approx(0.1 * 1.01)
    assert adaptive_coefficient(0.1, 600.0, target=6.0, horizon=1000, n=100) == pytest.approx(0.1 * 1.02)
    assert adaptive_coefficient(0.1, 0.0, target=6.0, horizon=1000, n=100) == pytest.approx(0.1 * 0.98)
    with pytest.raises(ValueError, match="target"):
        adaptive_coefficient(0.1, 1.0, target=0.0, horizon=1000, n=1)
