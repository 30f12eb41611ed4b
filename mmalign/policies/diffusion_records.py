"""What passes between a diffusion policy and those who score with it: draws, noisy forwards, sampler steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmalign.policies.base import Draw


@dataclass(frozen=True)
class DiffusionDraw(Draw):
    """Timestep (an index into the training schedule), noise, and whether the caption is dropped, per row."""

    drop_caption: Tensor
    """``[B]`` bool: score this row without its caption, which keeps the unconditional half of guidance trained."""

    def take(self, indices: Tensor | Sequence[int]) -> DiffusionDraw:
        """The draws of the rows at ``indices``."""
        index = torch.as_tensor(indices, dtype=torch.long, device=self.timesteps.device)
        return DiffusionDraw(self.timesteps[index], self.noise[index], self.drop_caption[index])

    def repeat(self, blocks: int) -> DiffusionDraw:
        """The same draws for ``blocks`` stacked blocks of rows: both captions of a pair are dropped, or neither."""
        both = super().repeat(blocks)
        return DiffusionDraw(both.timesteps, both.noise, self.drop_caption.repeat(blocks))


@dataclass(frozen=True)
class Denoising:
    """One noisy forward of data rows: what the network said and what it should have said, ``[B, ...]`` float32."""

    pred: Tensor
    target: Tensor
    noisy: Tensor
    timesteps: Tensor


@dataclass(frozen=True)
class Transition:
    """The Gaussian of one sampler step under the current network, and the latents that were drawn, float32."""

    mean: Tensor
    """``[N, ...]``, with a graph."""
    std: Tensor
    """``[N]``."""
    next_latents: Tensor
    """``[N, ...]``."""


def stacked(column: Tensor | Sequence[Tensor]) -> Tensor:
    """A column of tensors as one: rollout rows hold lists of views."""
    return column if isinstance(column, Tensor) else torch.stack(list(column))
