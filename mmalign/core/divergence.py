"""Divergences between a policy and a reference, per action."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

_KINDS = {"k1": "k1", "kl": "k1", "k2": "k2", "mse": "k2", "k3": "k3", "low_var_kl": "k3", "abs": "abs"}


def kl_estimate(logp: Tensor, ref_logp: Tensor, *, kind: str = "k3") -> Tensor:
    """Estimate of ``KL(p || ref)`` from actions sampled from ``p`` (the first argument), shape of ``logp``.

    With ``x = logp - ref_logp``: ``k1 = x``; ``k2 = x^2 / 2``; ``k3 = exp(-x) - 1 + x >= 0``; ``abs = |x|``. E[k1] = E[k3]
    = KL, but as a loss E[grad k1] = 0 and E[grad k3] = grad KL(ref || p). A trailing ``+`` keeps the value and takes
    the gradient of k2, whose expectation is grad KL(p || ref). Names ``kl, mse, low_var_kl`` are accepted.

    Source: Schulman 2020, "Approximating KL divergence". Exponents are clamped to +-20. Raises ValueError for an
    unknown kind or shapes that differ.
    """
    straight_through = kind.endswith("+")
    name = _KINDS.get(kind.rstrip("+"))
    if name is None:
        raise ValueError(f"kind is {kind!r}; allowed are k1, k2, k3, abs, each also with a trailing +")
    if logp.shape != ref_logp.shape:
        raise ValueError(f"logp and ref_logp have shapes {tuple(logp.shape)} and {tuple(ref_logp.shape)}; they must be equal")
    gap = logp.float() - ref_logp.float() if logp.dtype != torch.float64 else logp - ref_logp
    if name == "k1":
        value = gap
    elif name == "k2":
        value = gap.square() / 2
    elif name == "abs":
        value = gap.abs()
    else:
        value = torch.exp((-gap).clamp(-20, 20)) - 1 + gap
    if straight_through:
        quadratic = gap.square() / 2
        value = quadratic + (value - quadratic).detach()
    return value


def gaussian_kl(mean: Tensor, ref_mean: Tensor, std: Tensor, *, dims: Literal["mean", "sum"] = "mean") -> Tensor:
    """``KL(N(mean, std^2) || N(ref_mean, std^2)) = (mean - ref_mean)^2 / (2 std^2)`` over all but the first dim, ``[B]``.

    ``dims`` reduces the entries of a row by mean (as the published diffusion code does) or sum (the true divergence).
    Raises ValueError for a standard deviation that is not positive.
    """
    if dims not in ("mean", "sum"):
        raise ValueError(f"dims is {dims!r}; allowed are mean and sum")
    std = std.float().reshape(-1, *[1] * (mean.dim() - 1)) if std.dim() <= 1 else std.float()
    if bool((std <= 0).any()):
        raise ValueError("std must be positive; a deterministic step has no density")
    per_entry = (mean.float() - ref_mean.float()).square() / (2 * std.square())
    flat = per_entry.flatten(1)
    return flat.mean(1) if dims == "mean" else flat.sum(1)


def f_divergence_score(u: Tensor, *, kind: str = "reverse_kl", alpha: float = 0.5) -> Tensor:
    """``f'(exp(u))`` of a log-ratio ``u[B]``, up to a constant, so that it is 0 at ``u = 0``.

    reverse_kl: u; forward_kl: 1 - exp(-u); js: log 2 + log sigmoid(u); alpha: (exp((alpha - 1) u) - 1) / (alpha - 1).
    Replaces the log-ratio in losses of the difference only. Source: Wang et al. 2023, arXiv 2309.16240, table 1.
    """
    if kind == "reverse_kl":
        return u
    if kind == "forward_kl":
        return 1 - torch.exp((-u).clamp(max=20))
    if kind == "js":
        return math.log(2) + torch.nn.functional.logsigmoid(u)
    if kind == "alpha":
        if alpha == 1:
            return u
        return torch.expm1(((alpha - 1) * u).clamp(max=20)) / (alpha - 1)
    raise ValueError(f"kind is {kind!r}; allowed are reverse_kl, forward_kl, js, alpha")
