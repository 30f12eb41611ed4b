"""From rewards to advantages: group estimators, running statistics, and the value-based ones. Nothing here has a graph."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from mmalign.core.registry import Registry

Estimator = Callable[..., Tensor]
EstimatorT = TypeVar("EstimatorT", bound=Estimator)

FLAT = 1e-8
"""Groups whose rewards differ by no more than this (in float64) carry no signal: decided by equality, never by a std."""

ADVANTAGES: Registry[Estimator] = Registry("advantage")
"""``(rewards[B], group[B], *, options) -> [B]`` by name. NaN rewards (not applicable) get 0 and stay out of baselines."""


def advantage(name: str, *, aliases: tuple[str, ...] = ()) -> Callable[[EstimatorT], EstimatorT]:
    """Register an advantage estimator."""
    return ADVANTAGES.register(name, aliases=aliases)


def _checked(rewards: Tensor, group: Tensor) -> tuple[Tensor, Tensor, int, Tensor]:
    """Rewards in float64, dense group ids, the number of groups, and which rewards apply."""
    if rewards.dim() != 1 or rewards.shape != group.shape:
        raise ValueError(f"rewards and group have shapes {tuple(rewards.shape)} and {tuple(group.shape)}; both are [B]")
    values = rewards.detach().double()
    if bool(torch.isinf(values).any()):
        raise ValueError("rewards hold an infinite value; a reward is finite, or NaN where it does not apply")
    _, dense = group.unique(return_inverse=True)
    return values, dense, int(dense.max()) + 1 if dense.numel() else 0, ~values.isnan()


def _group_sum(values: Tensor, group: Tensor, count: int) -> Tensor:
    return values.new_zeros(count).index_add(0, group, values)


def flat_groups(rewards: Tensor, group: Tensor) -> Tensor:
    """``[B]`` bool: rows of groups whose applicable rewards are all equal (to 1e-8)."""
    values, dense, count, valid = _checked(rewards, group)
    top = values.new_full((count,), -torch.inf).scatter_reduce(0, dense, values.nan_to_num(-torch.inf), "amax")
    low = values.new_full((count,), torch.inf).scatter_reduce(0, dense, values.nan_to_num(torch.inf), "amin")
    return ~((top - low) > FLAT)[dense] | ~valid


def group_advantages(
    rewards: Tensor, group: Tensor, *, baseline: Literal["mean", "leave_one_out", "none"] = "mean",
    scale: Literal["group_std", "batch_std", "none"] = "group_std", ddof: int = 1, eps: float = 1e-4,
) -> Tensor:
    """``(r - baseline) / (scale + eps)`` within groups, ``[B]`` float32; 0 for flat groups and rewards that are NaN.

    Raises ValueError for groups of one row (there is nothing to compare with), or infinite rewards.
    """
    values, dense, count, valid = _checked(rewards, group)
    sizes = _group_sum(torch.ones_like(values), dense, count)
    if baseline != "none" and bool((sizes < 2).any()):
        raise ValueError("a group has a single row; group baselines need completions_per_prompt of at least 2")
    filled = values.nan_to_num(0.0)
    n = _group_sum(valid.double(), dense, count)
    mean = _group_sum(filled, dense, count) / n.clamp(min=1)
    centred = torch.where(valid, filled - mean[dense], 0.0)
    if baseline == "none":
        result = torch.where(valid, filled, 0.0)
    elif baseline == "leave_one_out":
        result = centred * (n / (n - 1).clamp(min=1))[dense]
    else:
        result = centred
    if scale == "group_std":
        variance = _group_sum(centred.square(), dense, count) / (n - ddof).clamp(min=1)
        result = result / (variance.sqrt()[dense] + eps)
    elif scale == "batch_std":
        kept = filled[valid]
        spread = kept.std(correction=ddof) if kept.numel() > ddof else kept.new_zeros(())
        result = result / (spread + eps)
    if baseline != "none":
        result = torch.where(flat_groups(rewards, group), 0.0, result)
    return result.float()


@advantage("grpo")
def grpo(rewards: Tensor, group: Tensor, *, ddof: int = 1, eps: float = 1e-4) -> Tensor:
    """``(r - mean) / (std + eps)`` of the group. Shao et al. 2024, arXiv 2402.03300, section 4.1.2."""
    return group_advantages(rewards, group, ddof=ddof, eps=eps)


@advantage("dr_grpo")
def dr_grpo(rewards: Tensor, group: Tensor) -> Tensor:
    """``r - mean`` of the group. Liu et al. 2025, arXiv 2503.20783."""
    return group_advantages(rewards, group, scale="none")


@advantage("rloo")
def rloo(rewards: Tensor, group: Tensor) -> Tensor:
    """``r - mean of the others`` of the group. Ahmadian et al. 2024, arXiv 2402.14740, equation 8."""
    return group_advantages(rewards, group, baseline="leave_one_out", scale="none")


@advantage("grpo_batch_std")
def grpo_batch_std(rewards: Tensor, group: Tensor, *, ddof: int = 1, eps: float = 1e-4) -> Tensor:
    """``(r - group mean) / (std of the whole batch + eps)`` (Flow-GRPO's global std, with ``ddof`` 0 there)."""
    return group_advantages(rewards, group, scale="batch_std", ddof=ddof, eps=eps)


@advantage("reinforce")
def reinforce(rewards: Tensor, group: Tensor, *, baseline: Literal["batch_mean", "none"] = "batch_mean") -> Tensor:
    """``r - mean of the batch``, or the reward itself. Williams 1992."""
    values, _, _, valid = _checked(rewards, group)
    if baseline not in ("batch_mean", "none"):
        raise ValueError(f"baseline is {baseline!r}; allowed are batch_mean and none; advantage running_mean keeps one")
    shift = values[valid].mean() if baseline == "batch_mean" and bool(valid.any()) else 0.0
    return torch.where(valid, values - shift, 0.0).float()


@advantage("reinforce_pp_baseline")
def reinforce_pp_baseline(
    rewards: Tensor, group: Tensor, *, over: Literal["actions", "rows"] = "actions", ddof: int = 1, eps: float = 1e-8,
    actions: Tensor | None = None,
) -> Tensor:
    """``whiten(r - group mean)`` over the actions of the batch, or over its rows.

    REINFORCE++ with baseline: Hu et al. 2025, arXiv 2501.03262. ``actions[B]`` (default: all alike) are the numbers of
    actions, by which the rows count in mean and variance under ``over="actions"``. Rows without a reward get 0.
    """
    if over not in ("actions", "rows"):
        raise ValueError(f"over is {over!r}; allowed are actions and rows")
    centred = group_advantages(rewards, group, scale="none").double()
    valid = ~rewards.isnan()
    weight = torch.ones_like(centred) if actions is None or over == "rows" else actions.to(centred)
    weight = torch.where(valid, weight, 0.0)
    total = weight.sum()
    mean = (weight * centred).sum() / total.clamp(min=1)
    variance = (weight * (centred - mean).square()).sum() / (total - ddof).clamp(min=1)
    return torch.where(valid, (centred - mean) / (variance.sqrt() + eps), 0.0).float()


@advantage("remax")
def remax(rewards: Tensor, group: Tensor, *, greedy: Tensor) -> Tensor:
    """``r - r(greedy sample of the prompt)``, ``greedy[B]`` being its reward. Li et al. 2023, arXiv 2310.10505."""
    values, _, _, valid = _checked(rewards, group)
    if greedy.shape != rewards.shape:
        raise ValueError(f"greedy has shape {tuple(greedy.shape)}, rewards {tuple(rewards.shape)}; both are [B]")
    return torch.where(valid, values - greedy.detach().double(), 0.0).nan_to_num(0.0).float()


class RunningMean:
    """``r - b`` with ``b <- decay b + (1 - decay) mean(r of the batch)``, which starts at the first batch's mean.

    The moving-average baseline of Williams 1992 ("reinforcement comparison"): ``b`` is that of the batches before, so that
    it does not depend on the samples it is subtracted from. Only the first batch is compared with its own mean.
    """

    def __init__(self, *, decay: float = 0.9) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), not {decay}")
        self.decay = decay
        self.value: float | None = None

    def update(self, prompts: Sequence[str], values: Tensor) -> Tensor:
        """Advantages ``[B]`` float32 of ``values[B]``; NaN values get 0 and leave no trace. ``prompts`` are not read."""
        rewards = values.detach().double()
        if bool(torch.isinf(rewards).any()):
            raise ValueError("values hold an infinite reward")
        valid = ~rewards.isnan()
        if not bool(valid.any()):
            return torch.zeros(len(values))
        mean = float(rewards[valid].mean())
        before = mean if self.value is None else self.value
        self.value = self.decay * before + (1 - self.decay) * mean
        return torch.where(valid, rewards - before, 0.0).float()

    def state_dict(self) -> dict[str, Any]:
        """The baseline."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.value = state["value"]


class PromptStatistics:
    """Running mean and spread of each prompt's rewards: ``A = (r - mean) / (std + eps)``.

    New rewards enter the prompt's buffer of the last ``buffer_size`` values first; prompts with fewer than ``min_count``
    values use the mean and spread of the current batch. Source: Black et al. 2023 (DDPO), arXiv 2305.13301, section 6.
    """

    def __init__(self, *, buffer_size: int = 32, min_count: int = 16, ddof: int = 0, eps: float = 1e-6) -> None:
        if buffer_size < 1 or min_count < 1:
            raise ValueError(f"buffer_size is {buffer_size} and min_count {min_count}; both must be at least 1")
        self.buffer_size, self.min_count, self.ddof, self.eps = buffer_size, min_count, ddof, eps
        self.buffers: dict[str, deque[float]] = {}

    def update(self, prompts: Sequence[str], values: Tensor) -> Tensor:
        """Advantages ``[B]`` float32 of ``values[B]``; NaN values get 0 and leave no trace."""
        if len(prompts) != len(values):
            raise ValueError(f"{len(prompts)} prompts but {len(values)} values")
        rewards = values.detach().double()
        if bool(torch.isinf(rewards).any()):
            raise ValueError("values hold an infinite reward")
        valid = ~rewards.isnan()
        whole = rewards[valid]
        members: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            if bool(valid[i]):
                members.setdefault(prompt, []).append(i)
        result = torch.zeros(len(values), dtype=torch.float64)
        for prompt, index in members.items():
            buffer = self.buffers.setdefault(prompt, deque(maxlen=self.buffer_size))
            buffer.extend(rewards[index].tolist())
            history = whole if len(buffer) < self.min_count else torch.tensor(list(buffer), dtype=torch.float64)
            spread = history.std(correction=self.ddof) if len(history) > self.ddof else history.new_zeros(())
            flat = float(history.max() - history.min()) <= FLAT
            result[index] = 0.0 if flat else (rewards[index] - history.mean()) / (spread + self.eps)
        return result.float()

    def state_dict(self) -> dict[str, Any]:
        """The buffers."""
        return {"buffers": {prompt: list(buffer) for prompt, buffer in self.buffers.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.buffers = {p: deque(values, maxlen=self.buffer_size) for p, values in state["buffers"].items()}


def discounted_cumsum(x: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """``y_t = x_t + gamma y_{t'}`` backwards over masked-in actions (t' = the next one), ``[B, A]``; 0 elsewhere."""
    if x.shape != mask.shape or x.dim() != 2:
        raise ValueError(f"x and mask have shapes {tuple(x.shape)} and {tuple(mask.shape)}; both are [B, A]")
    keep = mask.to(torch.bool)
    carry, result = x.new_zeros(x.shape[0]), torch.zeros_like(x)
    for t in reversed(range(x.shape[1])):
        carry = torch.where(keep[:, t], x[:, t] + gamma * carry, carry)
        result[:, t] = torch.where(keep[:, t], carry, 0.0)
    return result


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Generalised advantages and returns ``[B, A]``; masked actions are skipped over, the value after the last is 0.

    ``delta_t = r_t + gamma V_{t'} - V_t``; ``A_t = delta_t + gamma lam A_{t'}``; ``R_t = A_t + V_t``.
    Schulman et al. 2015, arXiv 1506.02438, equation 16.
    """
    keep = mask.to(torch.bool)
    following, after = values.new_zeros(values.shape[0]), torch.zeros_like(values)
    for t in reversed(range(values.shape[1])):
        after[:, t] = following
        following = torch.where(keep[:, t], values[:, t], following)
    delta = torch.where(keep, rewards + gamma * after - values, 0.0)
    advantages = discounted_cumsum(delta, keep, gamma * lam)
    return advantages, torch.where(keep, advantages + values, 0.0)


def whiten(x: Tensor, mask: Tensor, *, ddof: int = 1, eps: float = 1e-8) -> Tensor:
    """``(x - mean) / (std + eps)`` over masked-in entries, 0 elsewhere."""
    keep = mask.to(torch.bool)
    kept = x[keep].double()
    spread = kept.std(correction=ddof) if kept.numel() > ddof else kept.new_zeros(())
    mean = kept.mean() if kept.numel() else kept.new_zeros(())
    return torch.where(keep, ((x.double() - mean) / (spread + eps)).to(x.dtype), torch.zeros_like(x))


def shape_rewards(reward: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """Per-action rewards ``[B, A]``: ``-kl_coef * kl`` everywhere, plus ``reward[B]`` on the last action of each row."""
    keep = mask.to(torch.bool)
    shaped = torch.where(keep, -kl_coef * kl, torch.zeros_like(kl))
    positions = torch.arange(kl.shape[1], device=kl.device).expand_as(kl)
    last = torch.where(keep, positions, -torch.ones_like(positions)).amax(1)
    rows = (last >= 0).nonzero().flatten()
    return shaped.index_put((rows, last[rows]), reward[rows].to(shaped.dtype), accumulate=True)


def overlong_penalty(length: Tensor, *, max_length: int, cache: int) -> Tensor:
    """0 up to ``max_length - cache``, then linear down to -1 at ``max_length``, -1 beyond, ``[B]``.

    Yu et al. 2025 (DAPO), arXiv 2503.14476, equation 13. Raises ValueError unless ``0 < cache <= max_length``.
    """
    if not 0 < cache <= max_length:
        raise ValueError(f"cache is {cache} and max_length {max_length}; 0 < cache <= max_length is needed")
    return ((max_length - cache - length.float()) / cache).clamp(-1.0, 0.0)


def group_filter(
    rewards: Tensor, group: Tensor, *, mode: Literal["any", "mixed", "spread"] = "spread", threshold: float = 0.0,
) -> Tensor:
    """``keep[Q]`` in order of group id: any reward above ``threshold``; some above and some not; or not all equal."""
    values, dense, count, _ = _checked(rewards, group)
    above = (values.nan_to_num(-torch.inf) > threshold).double()
    hits, sizes = _group_sum(above, dense, count), _group_sum(torch.ones_like(above), dense, count)
    if mode == "any":
        return hits > 0
    if mode == "mixed":
        return (hits > 0) & (hits < sizes)
    if mode == "spread":
        flat = flat_groups(rewards, group)
        return _group_sum((~flat).double(), dense, count) > 0
    raise ValueError(f"mode is {mode!r}; allowed are any, mixed, spread")


def combine_rewards(
    rewards: Tensor, weights: Tensor, *, mode: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize",
    group: Tensor | None = None,
) -> Tensor:
    """One reward ``[B]`` from ``rewards[B, R]`` (NaN = not applicable) and ``weights[R]``; NaN where none applied.

    ``sum_then_normalize`` is the weighted sum of those that apply. ``normalize_then_sum`` standardises each reward within
    its group first and needs ``group[B]``; followed by ``reinforce_pp_baseline`` (whose group means are then 0) it is GDPO.
    """
    if rewards.dim() != 2 or weights.shape != rewards.shape[1:]:
        raise ValueError(f"rewards and weights have shapes {tuple(rewards.shape)} and {tuple(weights.shape)}; [B, R] and [R]")
    none = rewards.isnan().all(1)
    if mode == "normalize_then_sum":
        if group is None:
            raise ValueError("normalize_then_sum standardises within groups; give group [B]")
        rewards = torch.stack([group_advantages(rewards[:, k], group) for k in range(rewards.shape[1])], 1)
    elif mode != "sum_then_normalize":
        raise ValueError(f"mode is {mode!r}; allowed are sum_then_normalize and normalize_then_sum")
    total = (rewards.nan_to_num(0.0) * weights).sum(1)
    return torch.where(none, torch.full_like(total, torch.nan), total)
