"""The contract of a tuning mode, full fine-tuning, and the table of modes."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

from mmalign.config import Component, bind
from mmalign.core.registry import Registry
from mmalign.errors import ConfigError
from mmalign.policies.base import Policy
from mmalign.training.objective import Term, TrainState


class TuningOptions(Component):
    """``{name: full | lora | dora | ia3 | ..., <the mode's own options>}``."""

    name: str = "full"
    """Registered tuning mode; every type of the peft package is one (lora, dora, ia3, prompt, prefix, loha, ...)."""


class Tuning(Protocol):
    """Injects, freezes or wraps before training, and may act around every optimiser step."""

    def apply(self, policy: Policy, *, seed: int) -> None:
        """Choose what is trainable in the policy's module."""
        ...

    def penalty(self, policy: Policy) -> Term | None:
        """An extra loss term (for example L1 to the start), or None."""
        ...

    def after_micro_backward(self, policy: Policy, state: TrainState) -> None:
        """Called after the backward of every micro-batch."""
        ...

    def before_step(self, policy: Policy, state: TrainState) -> None:
        """Called once per update, before gradients are clipped."""
        ...

    def after_update(self, policy: Policy, state: TrainState) -> None:
        """Called after the optimisers stepped."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Masks, ages, start values, ..."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        ...


TUNINGS: Registry[Callable[..., Tuning]] = Registry("tuning")


def tuning(name: str, *, aliases: tuple[str, ...] = ()) -> Callable[[Callable[..., Tuning]], Callable[..., Tuning]]:
    """Register a tuning mode: a callable whose keyword-only arguments are its options."""
    return TUNINGS.register(name, aliases=aliases)


def make_tuning(options: TuningOptions) -> Tuning:
    """Build the tuning mode of a configuration node; raises ConfigError for unknown names and options."""
    if options.name not in TUNINGS:
        try:
            TUNINGS.canonical(options.name)
        except ValueError as error:
            raise ConfigError(f"tuning.name: {error}") from None
    build = TUNINGS.get(options.name)
    return build(**bind(options, build, key="tuning"))


@tuning("full")
class FullTuning:
    """Train every floating-point parameter, or those whose name fits ``match`` and not ``freeze`` (shell patterns)."""

    def __init__(self, *, match: list[str] | None = None, freeze: list[str] | None = None) -> None:
        self.match, self.freeze = match or ["*"], freeze or []

    def apply(self, policy: Policy, *, seed: int) -> None:
        """Set ``requires_grad`` by name; raises ConfigError when nothing matches."""
        chosen = 0
        for name, parameter in policy.module.named_parameters():
            wanted = _fits(name, self.match) and not _fits(name, self.freeze) and parameter.is_floating_point()
            parameter.requires_grad_(wanted)
            chosen += wanted
        if not chosen:
            raise ConfigError(f"tuning.match: {self.match} fits no parameter; names look like "
                              f"{next(iter(dict(policy.module.named_parameters())), 'none')!r}")

    def penalty(self, policy: Policy) -> Term | None:
        """No extra term."""
        return None

    def after_micro_backward(self, policy: Policy, state: TrainState) -> None:
        """Nothing to do."""

    def before_step(self, policy: Policy, state: TrainState) -> None:
        """Nothing to do."""

    def after_update(self, policy: Policy, state: TrainState) -> None:
        """Nothing to do."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


def _fits(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def trainable_report(module: nn.Module) -> dict[str, int]:
    """Number of trainable and of all parameters."""
    return {
        "trainable": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "all": sum(p.numel() for p in module.parameters()),
    }
