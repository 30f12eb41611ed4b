"""Penalties and coefficients that hold a divergence near a target."""

from __future__ import annotations

from typing import Literal

from torch import Tensor


def hinge_penalty(kl: Tensor, *, radius: float, coef: float, form: Literal["linear", "squared"] = "linear") -> Tensor:
    """Penalty of a scalar divergence that exceeds its trust radius; 0 inside, with no gradient.

    ``linear``: ``sg(coef max(0, kl - radius)) kl``, gradient ``coef max(0, kl - radius) grad kl`` (what the DisCO authors
    run). ``squared``: ``coef max(0, kl - radius)^2``, gradient twice that (as printed). Source: Li et al. 2025 (DisCO),
    arXiv 2505.12366. Raises ValueError for negative ``radius`` or ``coef``, or an unknown form.
    """
    if radius < 0 or coef < 0:
        raise ValueError(f"radius is {radius} and coef {coef}; neither may be negative")
    excess = (kl - radius).clamp(min=0)
    if form == "linear":
        return coef * excess.detach() * kl
    if form == "squared":
        return coef * excess.square()
    raise ValueError(f"form is {form!r}; allowed are linear and squared")


def adaptive_coefficient(coef: float, kl: float, *, target: float, horizon: float, n: int) -> float:
    """``coef (1 + clip(kl / target - 1, -0.2, 0.2) n / horizon)``: proportional control of a KL coefficient.

    Source: Ziegler et al. 2019, arXiv 1909.08593, section 2.2. ``n`` is the number of samples since the last call.
    """
    if target <= 0 or horizon <= 0:
        raise ValueError(f"target is {target} and horizon {horizon}; both must be positive")
    error = max(-0.2, min(0.2, kl / target - 1))
    return coef * (1 + error * n / horizon)
