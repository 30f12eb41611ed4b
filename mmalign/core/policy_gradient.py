"""Policy-gradient losses per action; an action is a token, an image code or a denoising step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from mmalign.core.logprobs import masked_log_mean_exp
from mmalign.core.registry import Registry

PolicyLoss = Callable[..., Tensor]
LossT = TypeVar("LossT", bound=PolicyLoss)
Level = Literal["token", "sequence", "sequence_sum"]

POLICY_LOSSES: Registry[PolicyLoss] = Registry("policy loss")
"""``(logp[B, A], old_logp or None, advantages[B] or [B, A], *, mask, options) -> [B, A]`` (``[B]`` at sequence level)."""


def policy_loss(name: str, *, aliases: tuple[str, ...] = ()) -> Callable[[LossT], LossT]:
    """Register a policy loss under ``name``."""
    return POLICY_LOSSES.register(name, aliases=aliases)


def clip_bounds(name: str, arguments: Mapping[str, Any]) -> tuple[Level, dict[str, float]]:
    """Level of the ratio of a registered loss, and the ratios beyond which it is clipped (``low``, ``high``; {} for none).

    ``arguments`` are those given; the others are the defaults of the loss.
    """
    name = POLICY_LOSSES.canonical(name)
    values = {n: p.default for n, p in inspect.signature(POLICY_LOSSES.get(name)).parameters.items()} | dict(arguments)
    level: Level = "sequence" if name == "gspo" else values.get("level", "token")
    if name == "cispo":  # its bound is on the weight itself, not on the distance to 1
        return level, {"high": float(values["clip_high"])}
    sides = {"low": -1.0, "high": 1.0}
    return level, {side: 1 + sign * float(values[f"clip_{side}"]) for side, sign in sides.items() if f"clip_{side}" in values}


def policy_ratio(logp: Tensor, old_logp: Tensor | None, mask: Tensor | None = None, *, level: Level = "token") -> Tensor:
    """Probability ratio to the policy that acted, exponent clamped to +-20.

    token: ``exp(logp - old_logp)[B, A]``; sequence: exp of the mean over a row's actions ``[B]`` (GSPO, Zheng et al.
    2025, arXiv 2507.18071); sequence_sum: exp of their sum ``[B]`` (RLOO as TRL computes it). ``old_logp`` None is the
    detached current log-prob: the ratio is exactly 1 and carries the policy gradient.
    """
    if logp.dim() != 2:
        raise ValueError(f"logp has shape {tuple(logp.shape)}; [B, A] is needed")
    old = logp.detach() if old_logp is None else old_logp
    if old.shape != logp.shape:
        raise ValueError(f"old_logp has shape {tuple(old.shape)}, logp {tuple(logp.shape)}; they must be equal")
    keep = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask.to(torch.bool)
    if keep.shape != logp.shape:
        raise ValueError(f"mask has shape {tuple(keep.shape)}, logp {tuple(logp.shape)}; they must be equal")
    gap = torch.where(keep, logp - old, torch.zeros_like(logp))
    if level == "token":
        return gap.clamp(-20.0, 20.0).exp()
    total = gap.sum(1)
    if level == "sequence":
        total = total / keep.sum(1).clamp(min=1)
    elif level != "sequence_sum":
        raise ValueError(f"level is {level!r}; allowed are token, sequence, sequence_sum")
    return total.clamp(-20.0, 20.0).exp()


def _aligned(advantages: Tensor, ratio: Tensor) -> Tensor:
    if ratio.dim() == 2 and advantages.shape == ratio.shape[:1]:
        advantages = advantages[:, None].expand_as(ratio)
    if advantages.shape != ratio.shape:
        raise ValueError(
            f"advantages have shape {tuple(advantages.shape)}; [B] or the ratio's {tuple(ratio.shape)} is needed"
        )
    return advantages


@policy_loss("reinforce")
def reinforce(logp: Tensor, old_logp: Tensor | None, advantages: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """``-A exp(logp - sg(logp))``: value ``-A``, gradient ``-A grad logp`` (Williams 1992), ``[B, A]``.

    ``old_logp`` is not used: the estimator is exact only for samples of the current policy.
    """
    ratio = policy_ratio(logp, None, mask)
    return -_aligned(advantages, ratio) * ratio


@policy_loss("ppo_clip", aliases=("ppo",))
def ppo_clip(
    logp: Tensor, old_logp: Tensor | None, advantages: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2,
    level: Level = "token", dual_clip: float | None = None, ratio_clamp: bool = False, mask: Tensor | None = None,
) -> Tensor:
    """``max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high))`` per action (per row at a sequence level).

    Schulman et al. 2017, arXiv 1707.06347, equation 7; asymmetric clips: Yu et al. 2025 (DAPO), arXiv 2503.14476.
    ``dual_clip`` c > 1 bounds the loss of negative advantages by ``-A c`` (Ye et al. 2020, arXiv 1912.09729).
    ``ratio_clamp`` uses ``-A clip(rho)`` alone, whose gradient is zero outside the range (DPOK, Fan et al. 2023,
    arXiv 2305.16381). ``clip_*`` inf does not clip. With ``old_logp`` None the ratio is 1 and nothing is clipped.
    """
    if clip_low < 0 or clip_high < 0:
        raise ValueError(f"clip_low is {clip_low} and clip_high {clip_high}; neither may be negative")
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip is {dual_clip}; it must be greater than 1")
    ratio = policy_ratio(logp, old_logp, mask, level=level)
    advantages = _aligned(advantages, ratio)
    low = 1 - clip_low if math.isfinite(clip_low) else 0.0
    clipped = -advantages * ratio.clamp(low, 1 + clip_high)
    if ratio_clamp:
        return clipped
    loss = torch.maximum(-advantages * ratio, clipped)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    return loss


@policy_loss("gspo")
def gspo(
    logp: Tensor, old_logp: Tensor | None, advantages: Tensor, *, clip_low: float = 3e-4, clip_high: float = 4e-4,
    mask: Tensor | None = None,
) -> Tensor:
    """:func:`ppo_clip` at level ``sequence``: one clipped ratio per row, ``[B]``. Zheng et al. 2025, arXiv 2507.18071."""
    return ppo_clip(logp, old_logp, advantages, clip_low=clip_low, clip_high=clip_high, level="sequence", mask=mask)


@policy_loss("cispo")
def cispo(
    logp: Tensor, old_logp: Tensor | None, advantages: Tensor, *, clip_high: float = 5.0, mask: Tensor | None = None,
) -> Tensor:
    """``-sg(min(rho, clip_high)) A logp``, ``[B, A]``: every action keeps a gradient, with a bounded weight.

    Source: MiniMax 2025 (M1), arXiv 2506.13585, equation 4.
    """
    if clip_high <= 0:
        raise ValueError(f"clip_high is {clip_high}; it must be positive")
    weight = policy_ratio(logp, old_logp, mask).detach().clamp(max=clip_high)
    return -weight * _aligned(advantages, weight) * logp


def disco(score: Tensor, positive: Tensor, group: Tensor, *, tau: float = math.inf) -> Tensor:
    """``tau log mean exp(s- / tau) - mean s+`` of each group, ``[Q]``; 0 for groups all right or all wrong.

    Discriminative constrained optimisation (Li et al. 2025, arXiv 2505.12366): ``score[B]`` of a response is its mean
    log-prob or mean ratio, ``positive[B]`` whether it is right, ``group[B]`` ids from 0. ``tau`` inf is DisCO-b, the
    plain difference of means.
    """
    positive = positive.to(torch.bool)
    right = masked_log_mean_exp(score, group, positive, tau=math.inf)
    wrong = masked_log_mean_exp(score, group, ~positive, tau=tau)
    counts = torch.zeros(2, right.shape[0], dtype=torch.long, device=score.device)
    counts[0].index_add_(0, group, positive.long())
    counts[1].index_add_(0, group, (~positive).long())
    return torch.where((counts > 0).all(0), wrong - right, torch.zeros_like(right))


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float = 0.2) -> Tensor:
    """``max((v - R)^2, (clip(v, v_old +- c) - R)^2) / 2`` per action, ``[B, A]``; ``clip`` inf is the plain square."""
    if not clip > 0:
        raise ValueError(f"clip is {clip}; it must be positive")
    plain = (values - returns).square()
    if math.isinf(clip):
        return plain / 2
    near = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum(plain, (near - returns).square()) / 2
