"""Interpolation between two sets of weights: spherical and linear, with a share ``t`` for every tensor.

``t = 0`` is exactly the first state, ``t = 1`` exactly the second. ``t`` may be a number, a list over depth, or rules
with name filters (:class:`Schedule`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from mmalign.weights.arithmetic import State, _check_states, _walk

Norm = Literal["none", "geometric"]

FALLBACK_COSINE = 0.9995
"""Tensors with a larger absolute cosine are interpolated linearly: the arc is a chord, and ``sin`` of the angle vanishes."""

_SMALLEST_NORM = 1e-8
_OPPOSITE = 1e-12
_BLOCK = 1 << 20
"""Entries converted to float64 together: the scratch does not grow with the tensor."""


@dataclass
class SlerpCounts:
    """How many tensors and entries were interpolated on the arc, and how many fell back to a straight line."""

    tensors: int = 0
    fallback_tensors: int = 0
    entries: int = 0
    fallback_entries: int = 0
    smallest_cosine: float = 1.0
    fallback_names: list[str] = field(default_factory=list)
    """The first names that fell back."""

    def add(self, name: str, tensor: Tensor, cosine: float, *, fallback: bool) -> None:
        """Count one tensor."""
        self.tensors += 1
        self.entries += tensor.numel()
        self.smallest_cosine = min(self.smallest_cosine, cosine)
        if fallback:
            self.fallback_tensors += 1
            self.fallback_entries += tensor.numel()
            self.fallback_names = [*self.fallback_names, name][:5]

    def metrics(self) -> dict[str, float]:
        """Shares of tensors and of entries that used the straight line, and the smallest cosine met."""
        return {
            "fallback_share": self.fallback_tensors / max(1, self.tensors),
            "fallback_share_entries": self.fallback_entries / max(1, self.entries),
            "smallest_cosine": self.smallest_cosine, "tensors": float(self.tensors),
        }


@dataclass(frozen=True)
class _Rule:
    filter: str | None
    """A part of the tensor's name; None fits every name."""
    values: tuple[float, ...]


class Schedule:
    """The share ``t`` of every tensor.

    ``t`` is a number; a list of numbers spread evenly over depth and interpolated (layer ``i`` of ``n`` stands at
    ``i / (n - 1)``, a single layer at 1; tensors outside of the layers take 0.5); or rules with filters, the first that
    fits winning: a mapping ``{self_attn: [...], mlp: [...], default: 0.5}`` or, as mergekit writes it, a list of
    ``{filter: self_attn, value: [...]}`` with a last entry that has no filter. A name fits a filter that is a part of it.

    The filters over ``self_attn`` and ``mlp`` are those of Lu et al. 2024 (arXiv 2409.03444).
    """

    def __init__(self, t: Any) -> None:
        self.rules = tuple(_rules(t))
        for rule in self.rules:
            for value in rule.values:
                if not math.isfinite(value) or not 0 <= value <= 1:
                    raise ValueError(f"t is {value}{f' for {rule.filter!r}' if rule.filter else ''}; it must lie in [0, 1]: "
                                     "0 is the first model, 1 the second")

    def at(self, name: str, depth: float | None) -> float:
        """``t`` of the tensor ``name`` at relative ``depth`` in [0, 1] (None: outside of the layers)."""
        rule = next((rule for rule in self.rules if rule.filter is None or rule.filter in name), None)
        if rule is None:
            filters = ", ".join(repr(rule.filter) for rule in self.rules)
            raise ValueError(f"t: no rule fits the tensor {name!r} (filters {filters}); add default: 0.5")
        if len(rule.values) == 1:
            return rule.values[0]
        return _spread(rule.values, depth) if depth is not None else 0.5


def _rules(t: Any) -> Iterable[_Rule]:
    if isinstance(t, Mapping):
        if not t:
            raise ValueError("t is empty; give a number, a list over depth, or filters such as {self_attn: 0.3, default: 0.5}")
        return [_Rule(None if name == "default" else str(name), _values(value, str(name))) for name, value in t.items()]
    if isinstance(t, Sequence) and not isinstance(t, str) and any(isinstance(entry, Mapping) for entry in t):
        rules = []
        for entry in t:
            if not isinstance(entry, Mapping) or "value" not in entry or set(entry) - {"filter", "value"}:
                raise ValueError(f"t: {entry!r} is no rule; rules are {{filter: self_attn, value: [0, 0.5, 1]}}")
            rules.append(_Rule(entry.get("filter"), _values(entry["value"], str(entry.get("filter")))))
        return rules
    return [_Rule(None, _values(t, "t"))]


def _values(value: Any, name: str) -> tuple[float, ...]:
    numbers = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not numbers or any(isinstance(x, bool) or not isinstance(x, (int, float)) for x in numbers):
        raise ValueError(f"t: {value!r} for {name!r} is neither a number nor a list of numbers")
    return tuple(float(x) for x in numbers)


def _spread(values: Sequence[float], depth: float) -> float:
    """Piecewise linear over ``values`` at even places in [0, 1]."""
    place = min(max(depth, 0.0), 1.0) * (len(values) - 1)
    lower = min(int(place), len(values) - 2)
    share = place - lower
    return values[lower] + share * (values[lower + 1] - values[lower]) if share else values[lower]


def layer_depths(names: Iterable[str]) -> dict[str, float | None]:
    """Relative depth in [0, 1] of every tensor: that of its layer, None for tensors outside of the layers.

    The layer number is the first number among the dotted parts of a name (``model.layers.7.mlp.up_proj.weight``); names
    that agree before it belong to one stack, whose layers are ranked by number. A stack of one layer has depth 1.
    """
    stacks: dict[str, set[int]] = {}
    found: dict[str, tuple[str, int] | None] = {}
    for name in names:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        found[name] = None if at is None else (".".join(parts[:at]), int(parts[at]))
        if at is not None:
            stacks.setdefault(".".join(parts[:at]), set()).add(int(parts[at]))
    ranks = {stack: {number: rank for rank, number in enumerate(sorted(numbers))} for stack, numbers in stacks.items()}

    def depth(place: tuple[str, int] | None) -> float | None:
        if place is None:
            return None
        rank = ranks[place[0]]
        return rank[place[1]] / (len(rank) - 1) if len(rank) > 1 else 1.0

    return {name: depth(place) for name, place in found.items()}


def slerp_tensor(
    first: Tensor, second: Tensor, t: float, *, norm: Norm = "none", threshold: float = FALLBACK_COSINE, name: str = "tensor",
    counts: SlerpCounts | None = None,
) -> Tensor:
    """Spherical interpolation of two tensors taken as one vector each, in the dtype of ``first``.

    With ``w`` the angle between ``v0`` and ``v1``: ``[sin((1-t) w) v0 + sin(t w) v1] / sin w`` (``norm="none"``,
    Shoemake 1985 on tensors that are not normalised, as mergekit computes it), or on unit vectors scaled by
    ``|v0|^(1-t) |v1|^t`` (``norm="geometric"``, as printed by Lu et al. 2024, arXiv 2409.03444); both agree for equal
    norms. ``(1-t) v0 + t v1`` instead when ``|cos w| > threshold`` or a norm is below 1e-8. Norms and the dot product are
    summed in float64 whatever the dtype, and the cosine is clamped to [-1, 1].

    Raises:
        ValueError: other shapes, ``t`` outside [0, 1], entries that are not finite, opposite tensors (``cos = -1``: every
            great circle joins them, so no arc is meant).
    """
    if first.shape != second.shape:
        raise ValueError(f"{name!r} has shapes {tuple(first.shape)} and {tuple(second.shape)}; they must be equal")
    if not 0 <= t <= 1:
        raise ValueError(f"t is {t} for {name!r}; it must lie in [0, 1]: 0 is the first model, 1 the second")
    if norm not in ("none", "geometric"):
        raise ValueError(f"norm is {norm!r}; allowed are 'none' and 'geometric'")
    size, other, dot = _inner_products(first, second)
    if not math.isfinite(size + other):
        raise ValueError(f"{name!r} holds NaN or infinity; it cannot be interpolated")
    vanishing = min(size, other) < _SMALLEST_NORM
    cosine = 1.0 if vanishing else min(1.0, max(-1.0, dot / (size * other)))
    fallback = vanishing or abs(cosine) > threshold
    if counts is not None:
        counts.add(name, first, cosine, fallback=fallback)
    if t in (0.0, 1.0):
        return (second if t else first).clone()
    if not vanishing and cosine <= -1 + _OPPOSITE:
        raise ValueError(f"{name!r}: the two tensors are opposite (cosine -1), so no arc joins them; leave the tensor to one "
                         "model (t 0 or 1), or merge with linear")
    if fallback:
        return (1.0 - t) * first + t * second
    angle = math.acos(cosine)
    one, two = math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    if norm == "geometric":
        scale = size ** (1.0 - t) * other**t
        one, two = one * scale / size, two * scale / other
    return one * first + two * second


def _inner_products(first: Tensor, second: Tensor) -> tuple[float, float, float]:
    """``|v0|, |v1|, <v0, v1>`` in float64, block by block."""
    a, b = first.reshape(-1), second.reshape(-1)
    squares, others, dots = [0.0], [0.0], [0.0]
    for start in range(0, len(a), _BLOCK):
        x, y = (v[start : start + _BLOCK].double() for v in (a, b))
        squares.append(float(x.dot(x)))
        others.append(float(y.dot(y)))
        dots.append(float(x.dot(y)))
    # Python's sum, not fsum: fsum refuses infinities, which are to be reported by name.
    return math.sqrt(sum(squares)), math.sqrt(sum(others)), sum(dots)


def slerp(
    first: State, second: State, t: Any = 0.5, *, norm: Norm = "none", threshold: float = FALLBACK_COSINE,
    precision: torch.dtype = torch.float32, counts: SlerpCounts | None = None,
) -> dict[str, Tensor]:
    """Spherical interpolation of two states, tensor by tensor (:func:`slerp_tensor`), with the dtypes of ``first``.

    Args:
        first: usually the general model; ``t = 0`` keeps it.
        second: usually the domain model.
        t: a number, a list over depth or rules with filters (:class:`Schedule`).
        norm: "none" or "geometric".
        threshold: absolute cosine above which a tensor is interpolated linearly. Models fine-tuned from the same weights
            at small learning rates are above 0.9995 almost everywhere: see ``counts``.
        precision: dtype of the arithmetic, float32 or float64; one cast at the end.
        counts: counts tensors that fell back.

    Tied entries are computed once and stay tied; integer and boolean ones are those of ``first``. Raises ValueError for
    other names or shapes (named), and what :func:`slerp_tensor` and :class:`Schedule` refuse.
    """
    _check_states([first, second])
    schedule, depths = Schedule(t), layer_depths(first)

    def entry(name: str, a: Tensor, b: Tensor) -> Tensor:
        return slerp_tensor(a, b, schedule.at(name, depths[name]), norm=norm, threshold=threshold, name=name, counts=counts)

    return _walk([first, second], entry, precision=precision, named=True)
