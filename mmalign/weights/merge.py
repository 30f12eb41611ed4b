"""Merge functions by name, applied tensor by tensor to states in memory or to folders on disk.

A merge function is a factory ``(*, options) -> TensorMerge``: its keyword arguments are the options of a configuration, and
what it returns computes one tensor of the result from that tensor of every model, in working precision. Whatever needs
several tensors at once (a global threshold) does its first pass in :meth:`TensorMerge.prepare`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from mmalign.core.registry import Registry
from mmalign.weights.arithmetic import State, _check_states, _walk
from mmalign.weights.interpolate import FALLBACK_COSINE, Schedule, SlerpCounts, layer_depths, slerp_tensor

Read = Callable[[str], Sequence[Tensor]]
"""``name -> that tensor of every model``."""


class TensorMerge(Protocol):
    """A merge function with its options bound."""

    def prepare(self, names: Sequence[str], read: Read) -> None:
        """Look at the models before anything is merged (names sorted); most functions need only the names."""
        ...

    def merge(self, name: str, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor of the result; ``tensors`` are in working precision, the base model's first."""
        ...

    def metrics(self) -> dict[str, float]:
        """What the merge has to report once it is done."""
        ...


@dataclass(frozen=True)
class MergeFunction:
    """A registered merge function."""

    name: str
    build: Callable[..., TensorMerge]
    models: tuple[int, int | None]
    """Smallest and largest number of models (None: any)."""
    paper: str
    summary: str

    def check_models(self, count: int) -> None:
        """Raise ValueError for a number of models that the function does not take."""
        low, high = self.models
        if count < low or (high is not None and count > high):
            wanted = f"exactly {low}" if low == high else f"at least {low}" if high is None else f"{low} to {high}"
            raise ValueError(f"{self.name} merges {wanted} models, not {count}")


MERGES: Registry[MergeFunction] = Registry("merge function")
BuildT = TypeVar("BuildT", bound=Callable[..., TensorMerge])


def merge_function(
    name: str, *, models: tuple[int, int | None], paper: str, aliases: tuple[str, ...] = (),
) -> Callable[[BuildT], BuildT]:
    """Register a factory of merge functions; the first line of its docstring is its summary."""

    def register(build: BuildT) -> BuildT:
        summary = (build.__doc__ or "").strip().split("\n")[0]
        MERGES.register(name, aliases=aliases)(MergeFunction(name, build, models, paper, summary))
        return build

    return register


class _Linear:
    def __init__(self, weights: Sequence[float] | None, t: Any, normalize: bool) -> None:
        if weights is not None and t is not None:
            raise ValueError("weights and t exclude each other: t is short for weights [1 - t, t]")
        self.weights = None if weights is None else [float(w) for w in weights]
        if self.weights is not None and (not all(map(math.isfinite, self.weights)) or (normalize and sum(self.weights) == 0)):
            raise ValueError(f"weights are {list(self.weights)}; they must be finite" + (" with a sum other than 0" * normalize))
        self.schedule = None if t is None else Schedule(t)
        self.normalize = normalize
        self.depths: dict[str, float | None] = {}

    def prepare(self, names: Sequence[str], read: Read) -> None:
        self.depths = layer_depths(names)

    def merge(self, name: str, tensors: Sequence[Tensor]) -> Tensor:
        shares = self._shares(name, len(tensors))
        result = tensors[0] * shares[0]
        for tensor, share in zip(tensors[1:], shares[1:], strict=True):
            result.add_(tensor, alpha=share)
        return result

    def _shares(self, name: str, count: int) -> list[float]:
        if self.schedule is not None:
            if count != 2:
                raise ValueError(f"t interpolates exactly 2 models, not {count}; give weights, one per model")
            t = self.schedule.at(name, self.depths.get(name))
            return [1.0 - t, t]
        weights = [1.0] * count if self.weights is None else self.weights
        if len(weights) != count:
            raise ValueError(f"{len(weights)} weights for {count} models; one each is needed")
        total = sum(weights)
        return [w / total for w in weights] if self.normalize else list(weights)

    def metrics(self) -> dict[str, float]:
        return {}


@merge_function("linear", models=(1, None), paper="Wortsman et al., 2022, arXiv 2203.05482", aliases=("lerp", "average"))
def linear(*, weights: Sequence[float] | None = None, t: Any = None, normalize: bool = True) -> TensorMerge:
    """Weighted average of any number of models; with ``t``, the straight line between two.

    ``weights`` has one number per model (equal by default) and is divided by its sum unless ``normalize`` is false.
    """
    return _Linear(weights, t, normalize)


class _Slerp:
    def __init__(self, t: Any, norm: Any, threshold: float) -> None:
        if norm not in ("none", "geometric"):
            raise ValueError(f"norm is {norm!r}; allowed are 'none' and 'geometric'")
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold is {threshold}; it must lie in (0, 1]")
        self.schedule, self.norm, self.threshold = Schedule(0.5 if t is None else t), norm, threshold
        self.depths: dict[str, float | None] = {}
        self.counts = SlerpCounts()

    def prepare(self, names: Sequence[str], read: Read) -> None:
        self.depths, self.counts = layer_depths(names), SlerpCounts()

    def merge(self, name: str, tensors: Sequence[Tensor]) -> Tensor:
        first, second = tensors
        return slerp_tensor(first, second, self.schedule.at(name, self.depths.get(name)), norm=self.norm,
                            threshold=self.threshold, name=name, counts=self.counts)

    def metrics(self) -> dict[str, float]:
        return self.counts.metrics()


@merge_function("slerp", models=(2, 2), paper="Lu et al., 2024, arXiv 2409.03444")
def slerp(*, t: Any = None, norm: str = "none", threshold: float = FALLBACK_COSINE) -> TensorMerge:
    """Spherical interpolation of two models, tensor by tensor; ``t`` (default 0.5) may be a schedule over depth."""
    return _Slerp(t, norm, threshold)


def merge_states(
    states: Sequence[State], merge: TensorMerge, *, precision: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Merge states in memory; dtypes, and entries that are not floating point, are those of the first."""
    _check_states(states)
    merge.prepare(sorted(states[0]), lambda name: [state[name] for state in states])
    return _walk(states, lambda name, *tensors: merge.merge(name, tensors), precision=precision, named=True)


def merge_stream(
    readers: Sequence[Mapping[str, Tensor]], merge: TensorMerge, *, precision: torch.dtype = torch.float32,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """``(name, merged tensor)`` in the order of the first reader, holding one tensor of every model at a time.

    ``readers`` are mappings that load an entry when it is asked for (:class:`mmalign.weights.io.ShardReader`). Names and
    shapes were compared before (:func:`mmalign.weights.io.check_readers`). ``dtype`` is that of the written floating-point
    tensors; None keeps the first model's.
    """
    merge.prepare(sorted(readers[0]), lambda name: [reader[name] for reader in readers])
    for name in readers[0]:
        # One name at a time through the walker of states: same precision, same single cast, same checks.
        entries = [{name: reader[name]} for reader in readers]
        _check_states(entries)
        merged = _walk(entries, lambda own, *tensors: merge.merge(own, tensors), precision=precision, named=True)[name]
        yield name, merged.to(dtype) if dtype is not None and merged.is_floating_point() else merged
