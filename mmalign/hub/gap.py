"""How far an exported model is from the trained one, and how far it may be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmalign.errors import ExportError

TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2, "float64": 1e-6}
"""Default relative gaps by stored precision. Rounding weights to bfloat16 (8 bits) moves logits by about 1%."""


@dataclass(frozen=True)
class Gap:
    """Largest difference between the outputs of the trained and of the exported model on the same inputs."""

    what: str
    """What was compared: "logits" or "latents"."""
    absolute: float
    scale: float
    """Largest absolute output of the trained model."""
    tolerance: float

    @property
    def relative(self) -> float:
        """``absolute / scale``."""
        return self.absolute / self.scale if self.scale else self.absolute

    def __str__(self) -> str:
        return f"largest gap in {self.what} {self.absolute:.2e} ({self.relative:.1e} of the largest value, allowed {self.tolerance:.0e})"


def compare(expected: Tensor, found: Tensor, *, dtype: str, tolerance: float | None, what: str, folder: Path) -> Gap:
    """The gap between two outputs; ExportError when it is above ``tolerance`` (None: by precision) or not finite."""
    allowed = TOLERANCES[dtype] if tolerance is None else tolerance
    if expected.shape != found.shape:
        raise ExportError(f"the exported model gives {what} of shape {tuple(found.shape)}, the trained one {tuple(expected.shape)}")
    difference = (expected.double() - found.double()).abs().max() if expected.numel() else torch.zeros(())
    gap = Gap(what, float(difference), float(expected.abs().max()), allowed)
    if not gap.relative <= allowed:
        raise ExportError(
            f"the exported model does not reproduce the trained one: {gap}. Nothing was written. A higher precision "
            "(dtype=float32) or a larger tolerance would let it pass"
        )
    return gap
