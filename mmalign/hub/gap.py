"""How far an exported model is from the trained one, and how far it may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
        return (f"largest gap in {self.what} {self.absolute:.2e} ({self.relative:.1e} of the largest value, allowed "
                f"{self.tolerance:.0e})")


def compare(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], *, dtype: str, tolerance: float | None, what: str,
) -> Gap:
    """The gap between tensors of the same names; ExportError when above ``tolerance`` (None: by precision) or not finite."""
    if {name: t.shape for name, t in expected.items()} != {name: t.shape for name, t in found.items()}:
        odd = next(n for n in {**expected, **found} if n not in expected or n not in found or expected[n].shape != found[n].shape)
        raise ExportError(f"the exported model gives other {what} than the trained one: {odd} is missing or has another shape")
    absolute, scale = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for name, tensor in expected.items():
        if tensor.numel():
            # maximum, unlike max() of Python, lets NaN through to the comparison below, which it fails.
            absolute = torch.maximum(absolute, (tensor.double() - found[name].double()).abs().max())
            scale = torch.maximum(scale, tensor.abs().max().double())
    gap = Gap(what, float(absolute), float(scale), TOLERANCES[dtype] if tolerance is None else tolerance)
    allowed = gap.tolerance
    if not gap.relative <= allowed:
        raise ExportError(
            f"the exported model does not reproduce the trained one: {gap}. Nothing was written. A higher precision "
            "(dtype=float32) or a larger tolerance would let it pass"
        )
    return gap
