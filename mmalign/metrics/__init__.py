"""Metrics: pure functions of numbers and tensors that say whether higher is better."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from mmalign.core.registry import Registry

F = TypeVar("F", bound=Callable[..., Any])

__all__ = ["METRICS", "higher_is_better", "metric"]


def _populate() -> None:
    import pkgutil

    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


METRICS: Registry[Callable[..., Any]] = Registry("metric", populate=_populate)
"""Every registered metric; the modules of the package are imported at the first look-up."""


def metric(name: str, *, higher_is_better: bool, aliases: tuple[str, ...] = ()) -> Callable[[F], F]:
    """Decorator that registers a metric and records in ``higher_is_better`` which direction is good."""

    def store(function: F) -> F:
        setattr(function, "higher_is_better", higher_is_better)  # noqa: B010 - mypy knows no attributes of functions
        return METRICS.register(name, aliases=aliases)(function)

    return store


def higher_is_better(name: str) -> bool:
    """The direction of the metric called ``name``; raises ValueError for an unknown one."""
    return bool(getattr(METRICS.get(name), "higher_is_better"))  # noqa: B009
