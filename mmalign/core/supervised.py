"""Supervised losses on scores: one value per action, reduced elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from mmalign.core.advantages import discounted_cumsum
from mmalign.core.logprobs import ActionScores, masked_log_mean_exp
from mmalign.core.registry import Registry

SupervisedLoss = Callable[..., Tensor]
LossT = TypeVar("LossT", bound=SupervisedLoss)

SUPERVISED_LOSSES: Registry[SupervisedLoss] = Registry("supervised loss")
"""``(scores: ActionScores, *, options) -> [B, A]`` by name; ``function.want`` names the extra scores it reads."""


def supervised_loss(name: str, *, want: tuple[str, ...] = (), aliases: tuple[str, ...] = ()) -> Callable[[LossT], LossT]:
    """Register a supervised loss; ``want`` are the :class:`ActionScores` fields beside ``logp`` that it reads."""

    def register(function: LossT) -> LossT:
        function.want = want  # type: ignore[attr-defined]
        SUPERVISED_LOSSES.register(name, aliases=aliases)(function)
        return function

    return register


def _needed(scores: ActionScores, name: str) -> Tensor:
    value: Any = getattr(scores, name)
    if value is None:
        raise ValueError(f"scores.{name} is missing; compute the scores with want=({name!r},)")
    tensor: Tensor = value
    return tensor


@supervised_loss("nll", aliases=("cross_entropy", "sft"))
def nll(scores: ActionScores) -> Tensor:
    """Negative log-likelihood ``-log p`` of every action, ``[B, A]``."""
    return -scores.logp


@supervised_loss("dft")
def dft(scores: ActionScores) -> Tensor:
    """Dynamic fine-tuning ``-sg(p) log p``, whose gradient is that of ``-p``, ``[B, A]``.

    Source: Wu et al. 2025, arXiv 2508.05629.
    """
    return -scores.logp.detach().exp() * scores.logp


@supervised_loss("label_smoothed_nll", want=("mean_logp",))
def label_smoothed_nll(
    scores: ActionScores, *, label_smoothing: float = 0.1, smoothing_form: str = "uniform", vocabulary: int | None = None,
) -> Tensor:
    """Cross-entropy against a smoothed label, ``[B, A]``.

    ``uniform`` (torch): ``(1 - e) nll + e mean_v(-log p_v)``. ``others`` (fairseq): the label keeps ``1 - e`` and the
    other ``vocabulary - 1`` entries share ``e``; it needs the size of the vocabulary. Szegedy et al. 2016, arXiv
    1512.00567. Raises ValueError for ``label_smoothing`` outside [0, 1), an unknown form, or a missing ``vocabulary``.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must lie in [0, 1)")
    if smoothing_form not in ("uniform", "others"):
        raise ValueError(f"smoothing_form is {smoothing_form!r}; allowed are uniform and others")
    mean_logp = _needed(scores, "mean_logp")
    if smoothing_form == "others":
        if vocabulary is None or vocabulary < 2:
            raise ValueError(f"vocabulary is {vocabulary}; smoothing_form others needs the number of entries, at least 2")
        # Mass m spread evenly over all entries gives the label m / V too: choose m so that each other entry gets e / (V - 1).
        label_smoothing = label_smoothing * vocabulary / (vocabulary - 1)
    return -(1 - label_smoothing) * scores.logp - label_smoothing * mean_logp


@supervised_loss("z_loss", want=("lse",))
def z_loss(scores: ActionScores) -> Tensor:
    """``logsumexp(logits)^2``, which keeps the partition function near 1, ``[B, A]``.

    Source: Chowdhery et al. 2022 (PaLM), arXiv 2204.02311, section 5.
    """
    return _needed(scores, "lse").square()


PropagationNorm = Literal["l1", "l2", "softmax", "log"]
PropagationSide = Literal["left", "right"]
PropagationForm = Literal["product", "double_sum"]
PropagationSource = Literal["loss", "mask"]


def propagation_weights(
    nll: Tensor, mask: Tensor, *, gamma: float = 0.95, norm: PropagationNorm = "l1", side: PropagationSide = "left",
    form: PropagationForm = "product", source: PropagationSource = "loss", detach: bool = True,
) -> Tensor:
    """Weights ``[B, A]`` that let every token answer for the ones its choice leads to; mean 1 per row, 0 outside the mask.

    With ``N`` actions in a row, ``l_t`` their losses and ``i`` counting actions from 0::

        product     c_t = sum_{i >= t} gamma^(i - t) l_i / N,     w_t = N c_t / sum_t c_t
        double_sum  c_i = (1 - gamma^(i + 1)) / (1 - gamma),      w_i = N c_i / sum_i c_i

    ``product`` is the algorithm and the released code of intuitive fine-tuning (early tokens weigh more); ``double_sum``
    is equation 21, ``sum_n sum_{i >= n} gamma^(i - n) l_i = sum_i c_i l_i``, scaled to mean 1 (late tokens weigh more).
    Hua et al. 2024, arXiv 2405.11870. ``gamma`` 0 turns propagation off: all weights are 1, as in the code.

    Args:
        nll: ``[B, A]`` losses of the actions.
        mask: ``[B, A]`` bool.
        gamma: decay in [0, 1].
        norm: what c is divided by: ``l1`` its mean, ``l2`` its root mean square (the mean is then at most 1), ``softmax``
            ``N softmax(c)``, ``log`` the mean of ``log(1 + c)``, which replaces c.
        side: ``left`` as above; ``right`` sums over ``i <= t`` and weighs by ``1 / (c_t + min c)``.
        source: sum losses, or ones (``mask``).
        detach: no gradient through the weights. Without it the sum of weight times loss may push a likely token down.

    Raises ValueError for values outside these, shapes that differ, a row without actions, and a ``norm``, ``side`` or
    ``source`` that ``double_sum`` cannot use.
    """
    _check_propagation(nll, mask, gamma, norm, side, form, source)
    keep = mask.to(torch.bool)
    size = keep.sum(1, keepdim=True).to(nll.dtype)
    if bool((size == 0).any()):
        raise ValueError(f"row {int((size[:, 0] == 0).nonzero()[0])} has no action to weigh; drop rows without learned tokens")
    if gamma == 0:
        return keep.to(nll.dtype)
    values = torch.where(keep, nll.detach() if detach else nll, 0.0)
    if form == "double_sum":
        ones = keep.to(nll.dtype)
        return _mean_one(discounted_cumsum(ones.flip(1), keep.flip(1), gamma).flip(1), keep, size)
    values = keep.to(nll.dtype) if source == "mask" else values
    if side == "left":
        carried = discounted_cumsum(values, keep, gamma) / size
    else:
        carried = discounted_cumsum(values.flip(1), keep.flip(1), gamma).flip(1) / size
        smallest = carried.masked_fill(~keep, torch.inf).amin(1, keepdim=True)
        total = carried + smallest
        flat = total <= torch.finfo(nll.dtype).tiny
        carried = torch.where(keep, torch.where(flat, 1.0, 1.0 / torch.where(flat, 1.0, total)), 0.0)
    if norm == "softmax":
        return torch.softmax(carried.masked_fill(~keep, -torch.inf), 1) * size
    if norm == "l2":
        square = carried.square().sum(1, keepdim=True) / size
        zero = square <= torch.finfo(nll.dtype).tiny
        return torch.where(keep, torch.where(zero, 1.0, carried / torch.where(zero, 1.0, square).sqrt()), 0.0)
    return _mean_one(carried.log1p() if norm == "log" else carried, keep, size)


def _mean_one(values: Tensor, keep: Tensor, size: Tensor) -> Tensor:
    total = values.sum(1, keepdim=True)
    zero = total <= torch.finfo(values.dtype).tiny  # a row whose losses all vanish has nothing to propagate
    return torch.where(keep, torch.where(zero, 1.0, values * size / torch.where(zero, 1.0, total)), 0.0)


def _check_propagation(nll: Tensor, mask: Tensor, gamma: float, *choices: str) -> None:
    if nll.dim() != 2 or nll.shape != mask.shape:
        raise ValueError(f"nll and mask have shapes {tuple(nll.shape)} and {tuple(mask.shape)}; both are [B, A]")
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma is {gamma}; it must lie in [0, 1]")
    names = (("norm", PropagationNorm), ("side", PropagationSide), ("form", PropagationForm), ("source", PropagationSource))
    for (name, kind), value in zip(names, choices, strict=True):
        if value not in get_args(kind):
            raise ValueError(f"{name} is {value!r}; allowed are {', '.join(get_args(kind))}")
    if choices[2] == "double_sum" and (choices[0], choices[1], choices[3]) != ("l1", "left", "loss"):
        raise ValueError("form double_sum is a fixed coefficient of every action: norm l1, side left and source loss only")


@supervised_loss("propagated_nll", aliases=("ift",))
def propagated_nll(
    scores: ActionScores, *, gamma: float = 0.95, norm: PropagationNorm = "l1", side: PropagationSide = "left",
    form: PropagationForm = "product", source: PropagationSource = "loss", detach: bool = True,
) -> Tensor:
    """``w_t (-log p_t)`` with the weights of :func:`propagation_weights`, ``[B, A]``; meant for seq_mean_token_mean.

    Source: Hua et al. 2024, arXiv 2405.11870, algorithm 1 (``product``) and equation 21 (``double_sum``).
    """
    weights = propagation_weights(-scores.logp, scores.mask, gamma=gamma, norm=norm, side=side, form=form, source=source,
                                  detach=detach)
    return weights * -scores.logp


def length_normalised(seq_logp: Tensor, length: Tensor, group: Tensor) -> Tensor:
    """``log p_j / length_j x (longest of the group)``, ``[N]``: long members of a group no longer lose by their length alone.

    Source: the option ``norm_marg_by_len`` of Ni et al. 2022, arXiv 2205.14318. Raises ValueError for a length below 1.
    """
    _check_groups(seq_logp, group)
    if length.shape != seq_logp.shape or bool((length < 1).any()):
        raise ValueError(f"length must be [N] with at least 1 action each, like seq_logp of shape {tuple(seq_logp.shape)}")
    size = length.to(seq_logp.dtype)
    longest = size.new_zeros(int(group.max()) + 1 if group.numel() else 0).scatter_reduce(0, group, size, "amax")
    return seq_logp / size * longest[group]


def mle_aug(seq_logp: Tensor, group: Tensor, *, normalize: bool = False) -> Tensor:
    """``-sum_j log p_j`` over the members of each group, ``[Q]``: every known solution of a task is a target of its own.

    ``seq_logp[N]`` are log-probs of whole solutions, ``group[N]`` ids counted from 0 without a gap. ``normalize`` divides by the
    size of the group. A group of one is maximum likelihood. Source: Ni et al. 2022, arXiv 2205.14318 (MLE-Aug). Raises
    ValueError for an empty group.
    """
    size = _check_groups(seq_logp, group)
    total = -torch.zeros(len(size), dtype=seq_logp.dtype, device=seq_logp.device).index_add(0, group, seq_logp)
    return total / size.to(total.dtype) if normalize else total


def mml(seq_logp: Tensor, group: Tensor, *, beta: float = 1.0) -> Tensor:
    """``-(1 / beta) log sum_j p_j^beta`` over the members of each group, ``[Q]``: the solutions of a task share one target.

    The gradient weighs member j by ``softmax(beta log p)_j``: with ``beta`` 1 (maximum marginal likelihood) mostly the
    solution that is likely already, towards 0 all alike. Arguments as in :func:`mle_aug`. Source: Ni et al. 2022, arXiv
    2205.14318. Raises ValueError for ``beta`` outside (0, 1] and for an empty group.
    """
    if not 0 < beta <= 1:
        raise ValueError(f"beta is {beta}; it must lie in (0, 1]")
    size = _check_groups(seq_logp, group)
    every = torch.ones_like(group, dtype=torch.bool)
    mean = masked_log_mean_exp(seq_logp, group, every, tau=1.0 / beta)
    return -(mean + size.to(seq_logp.dtype).log() / beta)


def _check_groups(seq_logp: Tensor, group: Tensor) -> Tensor:
    """Members of every group, ``[Q]``."""
    if seq_logp.dim() != 1 or group.shape != seq_logp.shape:
        raise ValueError(f"seq_logp and group have shapes {tuple(seq_logp.shape)} and {tuple(group.shape)}; both are [N]")
    size = torch.bincount(group) if group.numel() else group.new_zeros(0)
    if bool((size == 0).any()):
        raise ValueError(f"group {int((size == 0).nonzero()[0])} has no member; a task always holds its reference solution")
    return size


def neftune_noise(
    embeddings: Tensor, *, alpha: float, lengths: Tensor | None = None, generator: torch.Generator | None = None,
) -> Tensor:
    """Input embeddings ``[B, L, D]`` with uniform noise in ``+- alpha / sqrt(L D)`` added.

    ``lengths[B]`` uses each row's own token count for L instead of the padded length. Source: Jain et al. 2023,
    arXiv 2310.05914. Raises ValueError for a negative ``alpha``.
    """
    if alpha < 0:
        raise ValueError(f"alpha is {alpha}; it must not be negative")
    if embeddings.dim() != 3:
        raise ValueError(f"embeddings have shape {tuple(embeddings.shape)}; [B, L, D] is needed")
    rows, length, size = embeddings.shape
    device = generator.device if generator is not None else embeddings.device
    noise = torch.rand(embeddings.shape, generator=generator, device=device, dtype=torch.float32).to(embeddings.device)
    if lengths is None:
        lengths = torch.full((rows,), length)
    count = lengths.to(embeddings.device, torch.float32)
    magnitude = alpha / (count.clamp(min=1) * size).sqrt()
    return embeddings + ((2 * noise - 1) * magnitude[:, None, None]).to(embeddings.dtype)
