"""Exponential moving average of the trained weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mmalign.config import Options
from mmalign.training.objective import TrainState
from mmalign.weights.arithmetic import ema_update


class EmaOptions(Options):
    """``ema <- decay * ema + (1 - decay) * weights`` after every ``every`` updates."""

    decay: float = 0.999
    """Share of the old average that is kept."""
    every: int = 1
    """Updates between two averaging steps."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse decays outside [0, 1)."""
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay must be in [0, 1), not {self.decay}")


class ExponentialAverage:
    """Shadow copy of a module's trainable parameters, kept in float32."""

    def __init__(self, module: nn.Module, options: EmaOptions) -> None:
        self.module, self.options = module, options
        self.shadow = {name: p.detach().float().clone() for name, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def after_update(self, state: TrainState) -> None:
        """Average in the current weights when due."""
        if state.step % self.options.every:
            return
        current = {name: p.detach().float() for name, p in self.module.named_parameters() if name in self.shadow}
        ema_update(self.shadow, current, decay=self.options.decay)

    @torch.no_grad()
    def copy_to_module(self) -> None:
        """Overwrite the module's weights by the average (before the final save)."""
        for name, parameter in self.module.named_parameters():
            if name in self.shadow:
                parameter.copy_(self.shadow[name])

    def state_dict(self) -> dict[str, Any]:
        """The shadow weights."""
        return dict(self.shadow)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        for name, value in state.items():
            self.shadow[name].copy_(value)
