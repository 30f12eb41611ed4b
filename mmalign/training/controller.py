"""Weights of loss terms that change during training, learned or scheduled."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mmalign.training.objective import TrainState


class Controller(Protocol):
    """Decides the weight of every term before the weighted backward of an update."""

    match: Sequence[str]
    """Shell patterns of the "module.parameter" names whose gradients :meth:`probe` asks for."""

    def weights(self, state: TrainState) -> dict[str, float]:
        """Term name -> weight; terms left out keep their own."""
        ...

    def probe(self, state: TrainState) -> tuple[str, ...]:
        """Terms whose gradients it wants before this update; () normally."""
        ...

    def update(self, metrics: Mapping[str, float], gradients: Mapping[str, list[Tensor]], state: TrainState) -> None:
        """Adjust from the last update's metrics and the probed gradients."""
        ...

    def metrics(self, state: TrainState) -> dict[str, float]:
        """What to log of this update, the same on every rank."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything it learned."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        ...


class FixedWeights:
    """Leave every term at its configured weight."""

    match: Sequence[str] = ()

    def weights(self, state: TrainState) -> dict[str, float]:
        """No overrides."""
        return {}

    def probe(self, state: TrainState) -> tuple[str, ...]:
        """No gradients wanted."""
        return ()

    def update(self, metrics: Mapping[str, float], gradients: Mapping[str, list[Tensor]], state: TrainState) -> None:
        """Nothing to learn."""

    def metrics(self, state: TrainState) -> dict[str, float]:
        """Nothing to log."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


class ScheduledWeights(FixedWeights):
    """Term weights as functions of progress, e.g. ``{"nll": lambda p: 1 - p}``."""

    def __init__(self, schedules: Mapping[str, Callable[[float], float]]) -> None:
        self.schedules = dict(schedules)

    def weights(self, state: TrainState) -> dict[str, float]:
        """Each schedule at the current progress."""
        return {name: schedule(state.progress) for name, schedule in self.schedules.items()}


def probed_parameters(modules: Mapping[str, nn.Module], patterns: Sequence[str]) -> list[nn.Parameter]:
    """Trainable parameters whose "module.parameter" name fits a pattern, in name order of the modules."""
    return [
        p for module, net in modules.items() for name, p in net.named_parameters()
        if p.requires_grad and any(fnmatch.fnmatchcase(f"{module}.{name}", pattern) for pattern in patterns)
    ]


def accumulate_gradients(loss: Tensor, parameters: Sequence[nn.Parameter], into: list[Tensor] | None) -> list[Tensor]:
    """Add d loss / d parameters to ``into`` through ``torch.autograd.grad``, so that ``.grad`` is never touched."""
    if not loss.requires_grad:  # a term that depends on nothing trainable here, such as one without any rows
        return into if into is not None else [torch.zeros_like(p) for p in parameters]
    gradients = torch.autograd.grad(loss, list(parameters), retain_graph=True, allow_unused=True)
    dense = [torch.zeros_like(p) if g is None else g.detach() for p, g in zip(parameters, gradients, strict=True)]
    if into is None:
        # What is added to in place may not be an expanded tensor, nor one that two parameters share (as of a sum of both).
        homes = [g.untyped_storage().data_ptr() for g in dense]
        used = Counter(homes)
        return [g if g.is_contiguous() and used[home] == 1 else g.clone(memory_format=torch.contiguous_format)
                for g, home in zip(dense, homes, strict=True)]
    for total, part in zip(into, dense, strict=True):  # in place: two lists at a time, never three
        total += part
    return into


def fork_generators(device: torch.device) -> AbstractContextManager[None]:
    """A block that leaves the global generators of the CPU and of ``device`` as they were."""
    index = [device.index or 0] if device.type == "cuda" else []
    forked: AbstractContextManager[None] = torch.random.fork_rng(devices=index)
    return forked
