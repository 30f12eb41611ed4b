"""Metrics of classifiers: accuracy in its usual forms, and calibration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmalign.errors import DataError
from mmalign.metrics import metric


def _check(scores: Tensor, labels: Tensor) -> None:
    if scores.dim() != 2 or labels.dim() != 1 or len(scores) != len(labels):
        raise DataError(
            f"scores must be [N, K] and labels [N], not {tuple(scores.shape)} and {tuple(labels.shape)}"
        )
    if not len(labels):
        raise DataError("no examples: a metric needs at least one")
    if torch.isnan(scores).any():
        raise DataError("scores hold NaN; find the example that produced it before measuring")
    if int(labels.min()) < 0 or int(labels.max()) >= scores.shape[1]:
        raise DataError(f"labels reach from {int(labels.min())} to {int(labels.max())} but there are {scores.shape[1]} classes")


@metric("top_k_accuracy", higher_is_better=True)
def top_k_accuracy(scores: Tensor, labels: Tensor, *, k: int = 1) -> float:
    """Share of examples whose class is among the ``k`` best scores ``[N, K]``; ties go to the lower class index."""
    _check(scores, labels)
    if not 1 <= k <= scores.shape[1]:
        raise DataError(f"k={k} must be between 1 and the number of classes, {scores.shape[1]}")
    own = scores.gather(1, labels[:, None])
    index = torch.arange(scores.shape[1], device=scores.device)
    better = (scores > own) | ((scores == own) & (index < labels[:, None]))
    return float((better.sum(1) < k).double().mean())


@metric("accuracy", higher_is_better=True)
def accuracy(predictions: Sequence[object], labels: Sequence[object]) -> float:
    """Share of predictions (class ids or strings) that equal their label."""
    if len(predictions) != len(labels):
        raise DataError(f"{len(predictions)} predictions for {len(labels)} labels")
    if not len(labels):
        raise DataError("no examples: a metric needs at least one")
    pairs = zip(_plain(predictions), _plain(labels), strict=True)
    return sum(a == b for a, b in pairs) / len(labels)


def _plain(values: Sequence[object]) -> list[object]:
    return values.tolist() if isinstance(values, Tensor) else list(values)


@metric("mean_class_accuracy", higher_is_better=True)
def mean_class_accuracy(scores: Tensor, labels: Tensor) -> float:
    """Mean over the classes that occur of the accuracy within the class: every class counts alike."""
    _check(scores, labels)
    right = (scores.argmax(1) == labels).double()
    return float(torch.stack([right[labels == c].mean() for c in sorted(set(labels.tolist()))]).mean())


@metric("harmonic_mean", higher_is_better=True)
def harmonic_mean(base: float, new: float) -> float:
    """``2 b n / (b + n)``: accuracy on seen and unseen classes in one number (CoCoOp, Zhou et al. 2022); 0 if both are."""
    if min(base, new) < 0:
        raise DataError(f"base={base} and new={new} cannot be negative")
    return 2 * base * new / (base + new) if base + new else 0.0


@metric("expected_calibration_error", higher_is_better=False, aliases=("ece",))
def expected_calibration_error(probabilities: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """Mean |accuracy - confidence| over equal-width confidence bins, weighted by their size (Guo et al. 2017, eq. 3)."""
    _check(probabilities, labels)
    if bins < 1:
        raise DataError(f"bins={bins} must be at least 1")
    if float(probabilities.min()) < 0 or float((probabilities.sum(1) - 1).abs().max()) > 1e-3:
        raise DataError("probabilities must be non-negative rows that sum to 1; apply a softmax first")
    confidence, predicted = probabilities.double().max(1)
    right = (predicted == labels).double()
    bin_of = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)  # bins (a, b], as in the paper
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_of.cpu(), (right - confidence).cpu())
    return float(gap.abs().sum() / len(labels))
