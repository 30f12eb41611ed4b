"""Inner products of gradients over parameters, and the derivative of a utility with respect to a mixing weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

MetaScale = Literal["raw", "cosine"]


def gradient_dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """``sum_p <left_p, right_p>``, accumulated in float64 whatever the precision of the tensors.

    Raises ValueError when the lists differ in length or a pair differs in shape.
    """
    if len(left) != len(right):
        raise ValueError(f"left has {len(left)} tensors and right {len(right)}; they must be gradients of the same parameters")
    total = 0.0
    for position, (a, b) in enumerate(zip(left, right, strict=True)):
        if a.shape != b.shape:
            raise ValueError(f"tensor {position}: left has shape {tuple(a.shape)}, right {tuple(b.shape)}")
        total += float(torch.dot(a.flatten().double(), b.flatten().double()))
    return total


def gradient_norm(gradients: Sequence[Tensor]) -> float:
    """Euclidean norm over all tensors, in float64."""
    return math.sqrt(gradient_dot(gradients, gradients))


def mixing_gradient(
    loss: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor], *, step_size: float, scale: MetaScale = "raw",
) -> float:
    """``dU(theta') / d mu`` for ``U = -L``, ``theta' = theta - step_size (mu g_first + (1 - mu) g_second)``.

    By the chain rule it is ``-step_size <grad U, g_first - g_second> = +step_size <grad L, g_first - g_second>``: where the
    first gradient descends the validation loss more than the second, more of the first is better. With ``loss`` = grad L at
    theta rather than at theta' it is right up to O(step_size). He et al. 2025, arXiv 2508.06944, equation 5.

    Args:
        loss: gradients of the validation loss L = -U.
        first, second: gradients of the two losses, of the same parameters.
        step_size: learning rate of the look-ahead step; ``cosine`` does not use it.
        scale: ``raw`` is the derivative itself. ``cosine`` is ``cos(grad L, g_first - g_second)``, in [-1, 1] and 0 when
            either vector is 0.
    """
    if scale not in ("raw", "cosine"):
        raise ValueError(f"scale is {scale!r}; allowed are raw and cosine")
    if len(first) != len(second):
        raise ValueError(f"first has {len(first)} tensors and second {len(second)}; they must be of the same parameters")
    # Tensor by tensor: the difference of two large models is never held as a whole.
    product = squares = 0.0
    for grad, a, b in zip(loss, first, second, strict=True):
        difference = a.double() - b.double()
        product += gradient_dot([grad], [difference])
        squares += gradient_dot([difference], [difference])
    if scale == "raw":
        return step_size * product
    norm = gradient_norm(loss) * math.sqrt(squares)
    return product / norm if norm > 0 else 0.0
