"""Supervised losses on scores: one value per action, reduced elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmalign.core.logprobs import ActionScores
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
