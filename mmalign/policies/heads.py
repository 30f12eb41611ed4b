"""Small heads on hidden states: the value function of PPO, a reward, a class, a value per token."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Head(nn.Module):
    """Linear map ``[..., H] -> [..., outputs]`` computed in float32; ``[...]`` when ``outputs`` is 1.

    Args:
        hidden_size: ``H``.
        outputs: 1 for a scalar (value, reward), K for classes, V for one value per token.
        initial: standard deviation of the initial weights; 0 predicts 0 everywhere, None is ``1 / sqrt(H + 1)``, as
            reward heads are initialised by Stiennon et al. (2020, arXiv 2009.01325).
        dropout: on the hidden states, in training.
        generator: source of the initial weights.
    """

    def __init__(
        self, hidden_size: int, outputs: int = 1, *, initial: float | None = 0.0, dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.outputs = outputs
        self.dropout = nn.Dropout(dropout)
        deviation = (hidden_size + 1) ** -0.5 if initial is None else initial
        self.weight = nn.Parameter(torch.randn(outputs, hidden_size, generator=generator) * deviation)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, hidden: Tensor) -> Tensor:
        """Values of ``hidden[..., H]``."""
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = self.dropout(hidden.to(self.weight.dtype))
            values = nn.functional.linear(hidden, self.weight, self.bias)
        return values.squeeze(-1) if self.outputs == 1 else values
