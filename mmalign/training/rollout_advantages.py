"""From a rewarded rollout to advantages: where the divergence to the reference enters, and credit per action."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from mmalign.config import Options
from mmalign.core.advantages import discounted_cumsum, gae, shape_rewards, whiten
from mmalign.core.constraints import adaptive_coefficient
from mmalign.core.divergence import kl_estimate
from mmalign.policies.base import Rollout
from mmalign.training.controller import FixedWeights
from mmalign.training.objective import TrainState

T = TypeVar("T")

AdvantageFunction = Callable[[Rollout, Tensor], Tensor]
"""``(rollout, total reward [B]) -> advantages [B]``."""

GREEDY = "greedy_reward"
"""Column of a rollout: the total reward of the greedy sample of each row's prompt."""

Placement = Literal["loss", "token_reward", "sequence_reward", "advantage"]


class AdaptiveKLOptions(Options):
    """Proportional control of the KL coefficient (Ziegler et al., 2019, arXiv 1909.08593, section 2.2)."""

    target: float
    """KL of a whole sample, in nats, that the coefficient steers to."""
    horizon: float = 10_000.0
    """Samples after which a constant error of 20 % has changed the coefficient by 20 %."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse values without a meaning."""
        if self.target <= 0 or self.horizon <= 0:
            raise ValueError(f"target and horizon must be positive, not {self.target} and {self.horizon}")


class KLOptions(Options):
    """Where the divergence to the reference enters, and how it is estimated."""

    coef: float = 0.0
    """Weight; 0 loads no reference."""
    estimator: Literal["k1", "k2", "k3", "abs", "k1+", "k2+", "k3+", "abs+"] | None = None
    """k1 = log-ratio, k2 = its square / 2, k3 = exp(-x) - 1 + x (never negative); a trailing + keeps the value and takes the
    gradient of k2. null is k3 in the loss and k1 elsewhere."""
    placement: Placement = "loss"
    """loss: a term of the loss. token_reward: subtracted from the reward of every action, so that an action is charged for
    the divergence from it onwards. sequence_reward: the sum over the sample is subtracted from its reward, before the
    baseline. advantage: its mean over the sample gets an advantage of its own, which is subtracted."""
    normalize: bool = True
    """advantage: put the divergence through the same estimator as the reward (with statistics of its own); false
    subtracts it as it is."""
    adaptive: AdaptiveKLOptions | None = None
    """Change coef after every rollout so that the divergence approaches a target; null keeps it."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse the combinations without an expected gradient or without a meaning."""
        if self.coef < 0:
            raise ValueError(f"kl.coef must not be negative, not {self.coef}")
        if self.adaptive is not None and self.coef == 0:
            raise ValueError("kl.adaptive multiplies kl.coef, which is 0; start from a positive coefficient")
        if self.placement == "loss" and self.kind in ("k1", "abs"):
            raise ValueError(f"kl.estimator {self.kind} has zero expected gradient, or a wrong one, as a loss; use k3, k2 or "
                             f"{self.kind}+, or another kl.placement")
        if self.placement != "loss" and self.kind.endswith("+"):
            raise ValueError(f"kl.estimator {self.kind} changes a gradient, and kl.placement {self.placement} has none; use "
                             f"{self.kind.rstrip('+')}")

    @property
    def kind(self) -> str:
        """The estimator, its default filled in."""
        return self.estimator or ("k3" if self.placement == "loss" else "k1")


class AdaptiveKL(FixedWeights):
    """The KL coefficient as a participant of the run: read by the rollouts, adapted after each, saved with the run."""

    def __init__(self, options: KLOptions) -> None:
        self.options, self.value = options, options.coef

    def weights(self, state: TrainState) -> dict[str, float]:
        """The weight of the loss term, where that is the placement."""
        return {"kl": self.value} if self.options.placement == "loss" and self.options.coef else {}

    def adapt(self, kl: float, samples: int) -> None:
        """Move towards the target after ``samples`` samples with a mean KL of ``kl``."""
        adaptive = self.options.adaptive
        if adaptive is not None:
            self.value = adaptive_coefficient(self.value, kl, target=adaptive.target, horizon=adaptive.horizon, n=samples)

    def state_dict(self) -> dict[str, Any]:
        """The coefficient."""
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.value = float(state["value"])


NOISE = 1e-5
"""Advantages that differ by less are rounding errors of log-probs: a rollout without any reward must not move the policy."""


class GAE:
    """Generalised advantage estimation on the rewards of single actions (Schulman et al., 2015, arXiv 1506.02438).

    ``r_t = [t = last] R - kl_coef kl_t``, ``delta_t = r_t + gamma V_{t+1} - V_t``, ``A_t = delta_t + gamma lam A_{t+1}``;
    the returns ``A_t + V_t`` are taken before the advantages are whitened over all actions of the rollout.

    Args:
        gamma: discount.
        lam: lambda of the trace: 1 = Monte-Carlo returns, 0 = one-step differences.
        whiten: advantages get mean 0 and variance 1 over the rollout (all processes). Where their standard deviation is
            below 1e-5 there is nothing but rounding to scale up, and they become 0.
        whiten_rewards: rewards get variance 1 (their mean stays) before anything else.
    """

    def __init__(
        self, *, gamma: float = 1.0, lam: float = 0.95, whiten: bool = True, whiten_rewards: bool = False,
        clip: float | None = None,
    ) -> None:
        for name, value in (("gamma", gamma), ("lam", lam)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], not {value}")
        self.gamma, self.lam, self.whiten, self.whiten_rewards, self.clip = gamma, lam, whiten, whiten_rewards, clip

    def __call__(
        self, reward: Tensor, values: Tensor, mask: Tensor, *, kl: Tensor | None = None, kl_coef: float = 0.0,
        counted: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``(advantages, returns)``, both ``[B, A]``.

        ``reward[B]`` arrives at the last action of each row of ``mask[B, A]``; ``kl[B, A]`` is charged everywhere.
        ``counted[B, A]`` (default: the mask) are the actions that will be trained on: whitening is over them.
        """
        counted = mask if counted is None else counted
        shaped = shape_rewards(reward, torch.zeros_like(values) if kl is None else kl, mask, kl_coef=kl_coef)
        if self.whiten_rewards:
            mean, spread = moments(shaped, mask)
            shaped = torch.where(mask, ((shaped - mean) / (spread + 1e-8) + mean).to(shaped.dtype), torch.zeros_like(shaped))
        advantages, returns = gae(shaped, values, mask, gamma=self.gamma, lam=self.lam)
        if self.whiten:
            flat = moments(advantages, counted)[1] < NOISE
            advantages = torch.zeros_like(advantages) if flat else whiten_over_ranks(advantages, counted)
        if self.clip is not None:
            advantages = advantages.clamp(-self.clip, self.clip)
        return torch.where(counted, advantages, torch.zeros_like(advantages)), returns


def moments(x: Tensor, mask: Tensor) -> tuple[float, float]:
    """Mean and standard deviation (ddof 1) of the masked-in entries on all processes, in float64."""
    kept = x[mask.to(torch.bool)].double()
    first = _summed(torch.stack([kept.sum(), kept.new_tensor(float(kept.numel()))]))
    count = float(first[1])
    mean = float(first[0]) / max(count, 1.0)
    squares = _summed((kept - mean).square().sum()[None])
    return mean, (float(squares[0]) / (count - 1)) ** 0.5 if count > 1 else 0.0


def whiten_over_ranks(x: Tensor, mask: Tensor, *, eps: float = 1e-8) -> Tensor:
    """:func:`mmalign.core.advantages.whiten` with the statistics of all processes."""
    if not _distributed():
        return whiten(x, mask, eps=eps)
    mean, spread = moments(x, mask)
    return torch.where(mask.to(torch.bool), ((x.double() - mean) / (spread + eps)).to(x.dtype), torch.zeros_like(x))


def mean_over_ranks(values: Tensor) -> tuple[float, int]:
    """Mean of ``values[B]`` on all processes, and their number."""
    total = _summed(torch.stack([values.double().sum(), torch.tensor(float(values.numel()), dtype=torch.float64)]))
    return float(total[0]) / max(float(total[1]), 1.0), int(total[1])


def sum_counts_over_ranks(count: int) -> int:
    """``count`` summed over all processes."""
    return int(_summed(torch.tensor([float(count)], dtype=torch.float64))[0])


def gather_objects(value: T) -> tuple[list[T], int]:
    """``value`` of every process in order of rank, and the rank of this one; small things only."""
    if not _distributed():
        return [value], 0
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values, torch.distributed.get_rank()


def _distributed() -> bool:
    return bool(torch.distributed.is_available() and torch.distributed.is_initialized())


def _summed(values: Tensor) -> Tensor:
    if not _distributed():
        return values
    on_gpu = torch.distributed.get_backend() == "nccl"
    moved = values.to("cuda") if on_gpu else values.clone()
    torch.distributed.all_reduce(moved)
    return moved.to(values.device)


def rollout_divergence(rollout: Rollout, *, kind: str) -> Tensor:
    """``[B, A]`` estimates of the KL from the policy that acted to the reference, 0 where nothing was chosen."""
    assert rollout.ref_logp is not None
    width = rollout.old_logp.shape[1]
    estimate = kl_estimate(rollout.old_logp, rollout.ref_logp[:, :width].to(rollout.old_logp.device), kind=kind)
    return torch.where(rollout.mask, estimate, torch.zeros_like(estimate))


def mean_per_row(values: Tensor, mask: Tensor) -> Tensor:
    """``[B]`` means over the actions of each row, 0 for rows without any."""
    return (values * mask).sum(1) / mask.sum(1).clamp(min=1)


def charge_onwards(advantages: Tensor, kl: Tensor, mask: Tensor, *, coef: float) -> Tensor:
    """``A_t = A - coef sum_{s >= t} kl_s``, ``[B, A]``: an action pays for the divergence from it onwards."""
    return torch.where(mask, advantages[:, None] - coef * discounted_cumsum(kl, mask, 1.0), torch.zeros_like(kl))
