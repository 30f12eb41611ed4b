"""Log-probabilities of actions: the only place where labels are shifted.

Text policies hand over the last hidden states, the output head and unshifted labels; :func:`token_log_probs` drops the
ignored positions before the head and never materialises ``[B, T, V]`` logits (see :mod:`mmalign.core.output_head`).
Everything is float32 or better whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor, nn

from mmalign.core.output_head import WANTED, OutputHead, score_positions

__all__ = [
    "IGNORED",
    "WANTED",
    "ActionScores",
    "OutputHead",
    "dense_log_probs",
    "importance_weights",
    "as_output_head",
    "masked_log_mean_exp",
    "paired_head_length",
    "score_positions",
    "sequence_log_prob",
    "token_log_probs",
]

IGNORED = -100
"""The label of a position that is not scored."""


@dataclass
class ActionScores:
    """What a policy says about the actions of some rows; ``A`` is tokens, image codes or denoising steps.

    Attributes:
        logp: ``[B, A]`` log-probability of each action, 0 outside the mask.
        mask: ``[B, A]`` bool, the actions that count.
        entropy: ``[B, A]`` entropy of the distribution the action was drawn from.
        lse: ``[B, A]`` logsumexp of the (tempered) logits.
        mean_logp: ``[B, A]`` mean of ``log p`` over the vocabulary.
        sum_p2: ``[B, A]`` ``sum_v p_v^2``.
        correct: ``[B, A]`` 1.0 where the action has the largest logit.
        values: ``[B, A]`` value of the state before the action.
    """

    logp: Tensor
    mask: Tensor
    entropy: Tensor | None = None
    lse: Tensor | None = None
    mean_logp: Tensor | None = None
    sum_p2: Tensor | None = None
    correct: Tensor | None = None
    values: Tensor | None = None

    def __post_init__(self) -> None:
        if self.logp.dim() != 2:
            raise ValueError(f"logp has shape {tuple(self.logp.shape)}; [B, A] is needed")
        self.mask = self.mask.to(torch.bool)
        for name, tensor in self._tensors().items():
            if tensor.shape != self.logp.shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but logp {tuple(self.logp.shape)}")

    def _tensors(self) -> dict[str, Tensor]:
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def _map(self, function: Callable[[Tensor], Tensor]) -> ActionScores:
        return ActionScores(**{name: function(tensor) for name, tensor in self._tensors().items()})

    def compact(self) -> ActionScores:
        """The scored actions moved to the left: column ``a`` is the ``a``-th scored action of its row.

        The width becomes the largest number of scored actions of a row, at least 1.
        """
        counts = self.mask.sum(1)
        width = max(int(counts.max()) if counts.numel() else 0, 1)
        if self.mask.shape[1] < width:
            return self._map(lambda tensor: torch.nn.functional.pad(tensor, (0, width - tensor.shape[1])))
        columns = torch.argsort((~self.mask).to(torch.uint8), dim=1, stable=True)[:, :width]
        kept = torch.arange(width, device=counts.device) < counts.unsqueeze(1)

        def move(tensor: Tensor) -> Tensor:
            moved = tensor.gather(1, columns)
            return torch.where(kept, moved, torch.zeros_like(moved))

        return self._map(move)

    def take(self, rows: Tensor | slice | list[int]) -> ActionScores:
        """The given rows, in the given order (indices, a bool mask or a slice)."""
        return self._map(lambda tensor: tensor[rows])

    def detach(self) -> ActionScores:
        """The same scores without a graph."""
        return self._map(torch.Tensor.detach)

    def sequence(self, reduce: Literal["sum", "mean"] = "sum") -> tuple[Tensor, Tensor]:
        """:func:`sequence_log_prob` of these scores."""
        return sequence_log_prob(self.logp, self.mask, reduce=reduce)


def as_output_head(head: OutputHead | Tensor | nn.Linear) -> OutputHead:
    """An :class:`OutputHead` from a weight ``[V, H]`` or a linear module."""
    if isinstance(head, OutputHead):
        return head
    if isinstance(head, nn.Linear):
        return OutputHead(head.weight, head.bias)
    return OutputHead(head)


def token_log_probs(
    hidden: Tensor,
    head: OutputHead | Tensor | nn.Linear,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    chunk: int = 256,
    want: Iterable[str] = (),
) -> ActionScores:
    """Log-probabilities of the labels, from hidden states.

    ``hidden[:, t]`` predicts ``labels[:, t + 1]``: column ``a`` of the result scores token ``a + 1``, and token 0 is never
    predicted. Positions labelled -100 are dropped before the head, so they cost nothing.

    Args:
        hidden: ``[B, T, H]`` last hidden states (after the final norm).
        head: the output head, its weight ``[V, H]``, or a linear module.
        labels: ``[B, T]`` int64, unshifted, -100 = ignored.
        temperature: divides the logits; the sampling temperature when scoring a rollout.
        chunk: at most ``chunk * V`` float32 logits exist at a time.
        want: further scores, see :func:`mmalign.core.output_head.score_positions`.

    Returns:
        Scores of shape ``[B, T - 1]``, float32 (float64 for float64 hidden states), 0 outside the mask. With nothing
        to score they are zeros that still depend on hidden states and head.

    Raises:
        ValueError: shapes that do not fit, fewer than two positions, labels outside the vocabulary.
    """
    if hidden.dim() != 3 or labels.shape != hidden.shape[:2]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)} and labels {tuple(labels.shape)}; [B, T, H] and [B, T] are needed"
        )
    rows, length, size = hidden.shape
    if length < 2:
        raise ValueError(f"T is {length}; at least 2 positions are needed to predict one")
    mask = labels[:, 1:] != IGNORED
    index = mask.flatten().nonzero().squeeze(1)
    # Positions of [B, T-1] as positions of [B, T]: each row before adds one that predicts nothing.
    source = index + torch.div(index, length - 1, rounding_mode="floor")
    scores = score_positions(
        hidden.reshape(rows * length, size).index_select(0, source),
        as_output_head(head),
        labels[:, 1:].flatten().index_select(0, index),
        temperature=temperature,
        chunk=chunk,
        want=want,
    )
    spread = {
        name: value.new_zeros(mask.numel()).index_copy(0, index, value).view(mask.shape)
        for name, value in scores.items()
    }
    return ActionScores(mask=mask, **spread)


def dense_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities ``[B, T - 1]`` of unshifted ``labels[B, T]`` from full ``logits[B, T, V]``; 0 where ignored.

    The oracle of the tests, and the way for models whose output head cannot be reached.
    """
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}; [B, T, V] and [B, T] are needed"
        )
    precise = logits[:, :-1] if logits.dtype == torch.float64 else logits[:, :-1].float()
    targets = labels[:, 1:]
    mask = targets != IGNORED
    safe = targets.masked_fill(~mask, 0)
    logp = torch.log_softmax(precise, dim=-1).gather(2, safe.unsqueeze(2)).squeeze(2)
    return torch.where(mask, logp, torch.zeros_like(logp))


def sequence_log_prob(
    logp: Tensor,
    mask: Tensor,
    *,
    reduce: Literal["sum", "mean"] = "sum",
    tail_weight: float = 1.0,
    head_length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each row, and the length it was divided by.

    Args:
        logp: ``[B, A]``.
        mask: ``[B, A]``, the actions that count.
        reduce: ``sum``, or ``mean`` over the actions that count.
        tail_weight: weight of the actions after the first ``head_length`` of a row. LD-DPO (Liu et al. 2024, arXiv
            2409.06411): ``head_length`` = the shorter length of the pair, ``tail_weight`` = its alpha; 1 changes
            nothing, 0 drops the tail.
        head_length: ``[B]``, how many first actions of each row keep their full weight. Needed when ``tail_weight`` is
            not 1; :func:`paired_head_length` computes LD-DPO's.

    Returns:
        ``(value[B], length[B])``: the weighted sum of ``logp`` (divided by the length for ``mean``), and the length,
        which is the number of actions, each counted with its weight.

    Raises:
        ValueError: a row without actions, shapes that do not fit, ``tail_weight`` outside [0, 1] or without
            ``head_length``.
    """
    if reduce not in ("sum", "mean"):
        raise ValueError(f"reduce is {reduce!r}; allowed are sum and mean")
    if logp.dim() != 2 or mask.shape != logp.shape:
        raise ValueError(f"logp has shape {tuple(logp.shape)} and mask {tuple(mask.shape)}; both must be [B, A]")
    if not 0.0 <= tail_weight <= 1.0:
        raise ValueError(f"tail_weight is {tail_weight}; it must lie in [0, 1]")
    mask = mask.to(torch.bool)
    precise = logp if logp.dtype == torch.float64 else logp.float()
    weights = mask.to(precise.dtype)
    if tail_weight != 1.0:
        if head_length is None or head_length.shape != logp.shape[:1]:
            raise ValueError("tail_weight other than 1 needs head_length [B], the actions of each row at full weight")
        in_tail = mask.cumsum(1) > head_length.unsqueeze(1)
        weights = torch.where(in_tail, weights * tail_weight, weights)
    length = weights.sum(1)
    if bool((length <= 0).any()):
        empty = (length <= 0).nonzero().flatten().tolist()
        raise ValueError(f"rows {empty[:8]} have no action to score; drop them when the data are prepared")
    value = torch.where(mask, precise * weights, torch.zeros_like(precise)).sum(1)
    return (value / length if reduce == "mean" else value), length


def paired_head_length(chosen_mask: Tensor, rejected_mask: Tensor) -> Tensor:
    """``head_length[B]`` of LD-DPO: the number of actions of the shorter sample of each pair."""
    return torch.minimum(chosen_mask.sum(1), rejected_mask.sum(1))


def masked_log_mean_exp(x: Tensor, group: Tensor, keep: Tensor, *, tau: float = 1.0) -> Tensor:
    """``tau * log(mean(exp(x / tau)))`` over the kept members of each group.

    Args:
        x: ``[N]``.
        group: ``[N]`` int64 in ``[0, Q)``.
        keep: ``[N]`` bool, the members that count.
        tau: temperature; ``inf`` gives the plain mean.

    Returns:
        ``[Q]`` with ``Q = group.max() + 1``; 0 for a group with no kept member, with no gradient. The largest member is
        subtracted before the exponential, so that no ``x / tau`` overflows.

    Raises:
        ValueError: ``tau`` not positive, shapes that differ.
    """
    if not tau > 0:
        raise ValueError(f"tau is {tau}; it must be positive (inf for the mean)")
    if x.dim() != 1 or group.shape != x.shape or keep.shape != x.shape:
        raise ValueError(
            f"x, group and keep have shapes {tuple(x.shape)}, {tuple(group.shape)}, {tuple(keep.shape)}; all are [N]"
        )
    groups = int(group.max()) + 1 if group.numel() else 0
    keep = keep.to(torch.bool)
    counts = torch.zeros(groups, dtype=x.dtype, device=x.device).index_add(0, group, keep.to(x.dtype))
    kept = torch.where(keep, x, torch.zeros_like(x))
    if tau == float("inf"):
        return torch.zeros_like(counts).index_add(0, group, kept) / counts.clamp(min=1)
    bottom = torch.full_like(counts, -torch.inf)
    masked = torch.where(keep, x.detach(), torch.full_like(x, -torch.inf))
    largest = bottom.scatter_reduce(0, group, masked, "amax")
    largest = torch.where(counts > 0, largest, torch.zeros_like(largest))
    powers = torch.where(keep, torch.exp((kept - largest[group]) / tau), torch.zeros_like(x))
    total = torch.zeros_like(counts).index_add(0, group, powers)
    present = counts > 0
    mean = torch.where(present, total, torch.ones_like(total)) / counts.clamp(min=1)
    return torch.where(present, largest + tau * mean.log(), torch.zeros_like(total))


def importance_weights(
    logp: Tensor,
    behaviour_logp: Tensor,
    mask: Tensor,
    *,
    level: Literal["token", "sequence", "sequence_mean"] = "token",
    mode: Literal["truncate", "mask", "raw", "self_normalized"] = "truncate",
    limit: float | None = 2.0,
) -> tuple[Tensor, Tensor]:
    """Weights that correct for samples drawn by another distribution (an inference engine, an older policy).

    ``w = p(action) / q(action)``, detached. Truncated importance sampling of rollouts: Yao et al. 2025, "Your efficient
    RL framework secretly brings you off-policy RL training"; effective sample size: Kong 1992.

    Args:
        logp: ``[B, A]`` under the distribution wanted.
        behaviour_logp: ``[B, A]`` under the distribution sampled from (after its temperature and truncation).
        mask: ``[B, A]``.
        level: ``token``; ``sequence`` (product over the row); ``sequence_mean`` (its geometric mean).
        mode: ``truncate`` caps at ``limit``; ``mask`` sets weights above ``limit`` to 0; ``raw``; ``self_normalized``
            divides by the mean weight of the actions (or rows) that count.
        limit: the cap, for ``truncate`` and ``mask``.

    Returns:
        ``(weights, effective_sample_size)``: ``[B, A]`` at token level (0 outside the mask), ``[B]`` at sequence level;
        the size is ``(sum w)^2 / sum w^2 / n`` in (0, 1] of the weights before capping, a scalar.

    Raises:
        ValueError: shapes that differ, unknown names, a missing or non-positive ``limit``.
    """
    if logp.shape != mask.shape or behaviour_logp.shape != mask.shape or logp.dim() != 2:
        raise ValueError(
            f"logp, behaviour_logp and mask have shapes {tuple(logp.shape)}, {tuple(behaviour_logp.shape)}, "
            f"{tuple(mask.shape)}; all are [B, A]"
        )
    if level not in ("token", "sequence", "sequence_mean"):
        raise ValueError(f"level is {level!r}; allowed are token, sequence, sequence_mean")
    if mode not in ("truncate", "mask", "raw", "self_normalized"):
        raise ValueError(f"mode is {mode!r}; allowed are truncate, mask, raw, self_normalized")
    if mode in ("truncate", "mask") and (limit is None or limit <= 0):
        raise ValueError(f"limit is {limit}; mode {mode} needs a positive one")
    kept = mask.to(torch.bool)
    gap = torch.where(kept, logp.detach().float() - behaviour_logp.detach().float(), logp.new_zeros((), dtype=torch.float32))
    if level != "token":
        gap, kept = gap.sum(1), kept.any(1)
        if level == "sequence_mean":
            gap = gap / mask.to(torch.bool).sum(1).clamp(min=1)
    weights = torch.where(kept, gap.clamp(-20.0, 20.0).exp(), torch.zeros_like(gap))
    number = kept.sum().clamp(min=1)
    size = weights.sum().square() / weights.square().sum().clamp(min=1e-38) / number
    if mode == "truncate" and limit is not None:
        weights = weights.clamp(max=limit)
    elif mode == "mask" and limit is not None:
        weights = torch.where(weights > limit, torch.zeros_like(weights), weights)
    elif mode == "self_normalized":
        weights = weights * number / weights.sum().clamp(min=1e-38)
    return weights, size
