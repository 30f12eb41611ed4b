"""Which row comes next: shuffled epochs of one data set, weighted mixtures of several, and the split of a budget.

Samplers are pure functions of ``(seed, position)``: their state is a few integers, whatever the size of the data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from mmalign.core.seeding import generator
from mmalign.errors import CheckpointError, ConfigError, DataError

_BLOCK = 1024
"""Sources drawn at once; a block can be drawn again from its number alone."""


class IndexSampler(Protocol):
    """An endless, resumable stream of row numbers."""

    @property
    def epochs_done(self) -> float:
        """Rows drawn over rows there are."""
        ...

    def take(self, count: int) -> list[int]:
        """The next ``count`` row numbers."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Position."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position."""
        ...


def mixture_weights(
    sizes: Sequence[int], *, temperature: float | None = None, exponent: float | None = None,
    ratios: Sequence[float] | None = None, cap: int | None = None,
) -> list[float]:
    """Probability of each source, summing to 1, from its number of rows.

    ``temperature`` T gives ``p ~ n^(1/T)`` (1 = in proportion, large = uniform; mBART-50, Tang et al. 2020, arXiv
    2008.00401), ``exponent`` a gives ``p ~ n^a`` (0 = uniform), ``ratios`` gives ``p ~ ratio`` whatever the sizes;
    exactly one of the three. ``cap`` counts at most that many rows of a source (xP3, Muennighoff et al. 2022, arXiv
    2211.01786). Raises ConfigError for values without a meaning, DataError for an empty source that would be drawn.
    """
    given = [name for name, value in (("temperature", temperature), ("exponent", exponent), ("ratios", ratios))
             if value is not None]
    if len(given) != 1:
        raise ConfigError(f"mixture: give exactly one of temperature, exponent and ratios, not "
                          f"{' and '.join(given) or 'none'}")
    if not sizes:
        raise DataError("mixture: there are no sources")
    if any(size < 0 for size in sizes):
        raise DataError(f"mixture: sizes cannot be negative: {list(sizes)}")
    if cap is not None and cap < 1:
        raise ConfigError(f"mixture.cap: must be at least 1 row, not {cap}")
    if ratios is not None:
        if len(ratios) != len(sizes):
            raise ConfigError(f"mixture.ratios: {len(ratios)} ratios for {len(sizes)} sources")
        if any(not math.isfinite(ratio) or ratio < 0 for ratio in ratios) or sum(ratios) <= 0:
            raise ConfigError(f"mixture.ratios: must be non-negative with a positive sum, not {list(ratios)}")
        weights = [float(ratio) for ratio in ratios]
    else:
        if temperature is not None and temperature <= 0:
            raise ConfigError(f"mixture.temperature: must be positive, not {temperature}")
        power = 1 / temperature if temperature is not None else exponent
        assert power is not None
        if power < 0 or not math.isfinite(power):
            raise ConfigError(f"mixture.exponent: must be finite and at least 0, not {power}")
        counted = [min(size, cap) if cap is not None else size for size in sizes]
        largest = max(counted) or 1  # dividing first keeps n^a finite for any a
        weights = [(size / largest) ** power if size else 0.0 for size in counted]
    empty = [index for index, (size, weight) in enumerate(zip(sizes, weights, strict=True)) if weight > 0 and size == 0]
    if empty or sum(weights) <= 0:
        raise DataError(f"mixture: source {empty[0] if empty else 0} has no rows to draw from")
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def virtual_epoch_size(sizes: Sequence[int], weights: Sequence[float]) -> int:
    """Rows after which a mixture counts as one epoch (fairseq's rule, used by mBART-50).

    The source with the largest weight is seen as often as the largest source has rows, the others in proportion; at
    most 1.5 times all rows.
    """
    largest, top = max(sizes), max(weights)
    return int(min(math.fsum(weight / top * largest for weight in weights), 1.5 * sum(sizes)))


def split_budget(
    budget: float, share: float, *, row_price: float = 1.0, pair_price: float = 1.0,
) -> tuple[int, int]:
    """``(supervised rows, preference pairs)`` that a budget buys when ``share`` of it goes to pairs.

    ``pairs = floor(B share / c_p)``, ``rows = floor((B - pairs c_p) / c_s)``: what pairs leave over goes to rows and
    the budget is never exceeded (Raghavendra et al. 2025, arXiv 2502.11284; the rounding is ours). Either may be 0.
    """
    if budget <= 0 or row_price <= 0 or pair_price <= 0:
        raise ConfigError(f"budget and prices must be positive, not {budget}, {row_price} and {pair_price}")
    if not 0 <= share <= 1:
        raise ConfigError(f"share of preference pairs must be in [0, 1], not {share}")
    pairs = math.floor(budget * share / pair_price + 1e-9)
    rows = math.floor((budget - pairs * pair_price) / row_price + 1e-9)
    return rows, pairs


class EpochSampler:
    """An endless stream of indices below ``size``: every epoch holds each index once, in its own order.

    The order of epoch e is a function of ``(seed, e)``, so the state is the epoch and the position in it.
    """

    def __init__(self, size: int, *, seed: int, shuffle: bool = True, names: Sequence[str] = ("data",)) -> None:
        if size < 1:
            raise DataError("the data set has no rows to draw from")
        self.size, self.seed, self.shuffle, self.names = size, seed, shuffle, tuple(names)
        self.epoch = 0
        self.position = 0
        self._order: tuple[int, list[int]] | None = None

    def __len__(self) -> int:
        """Indices in one epoch."""
        return self.size

    def __iter__(self) -> Iterator[int]:
        """The stream from the present position; it never ends."""
        while True:
            yield next(self)

    def __next__(self) -> int:
        index = self._epoch_order()[self.position]
        self.position += 1
        if self.position == self.size:
            self.epoch, self.position = self.epoch + 1, 0
        return index

    def take(self, count: int) -> list[int]:
        """The next ``count`` indices, across the end of an epoch where need be."""
        return [next(self) for _ in range(count)]

    @property
    def epochs_done(self) -> float:
        """Epochs drawn so far, as a fraction."""
        return self.epoch + self.position / self.size

    def _epoch_order(self) -> Sequence[int]:
        if not self.shuffle:
            return range(self.size)
        if self._order is None or self._order[0] != self.epoch:
            order = torch.randperm(self.size, generator=generator(self.seed, *self.names, self.epoch)).tolist()
            self._order = (self.epoch, order)
        return self._order[1]

    def state_dict(self) -> dict[str, Any]:
        """Epoch, position, and the size they belong to."""
        return {"epoch": self.epoch, "position": self.position, "size": self.size, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the state was taken; raises CheckpointError when the data set has another size or seed."""
        for name in ("size", "seed"):
            if state[name] != getattr(self, name):
                raise CheckpointError(f"the checkpoint's data had {name} {state[name]}, this run's has "
                                      f"{getattr(self, name)}; resume with the data and seed of the interrupted run")
        self.epoch, self.position = int(state["epoch"]), int(state["position"])


class MixtureSampler:
    """An endless stream of indices into several data sets laid end to end.

    Each draw picks a source by ``weights`` and takes that source's next row; a source is gone through in shuffled
    epochs of its own, so no row repeats before all its rows were seen. With ``run > 1`` that many draws in a row
    come from one source (one update of one type). Index ``i`` belongs to source ``s`` when
    ``offsets[s] <= i < offsets[s + 1]``.
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float], *, seed: int, run: int = 1, shuffle: bool = True,
    ) -> None:
        if len(sizes) != len(weights):
            raise ConfigError(f"mixture: {len(weights)} weights for {len(sizes)} sources")
        if run < 1:
            raise ConfigError(f"mixture: run must be at least 1, not {run}")
        if any(not math.isfinite(weight) or weight < 0 for weight in weights) or not sum(weights) > 0:
            raise ConfigError(f"mixture: weights must be non-negative with a positive sum, not {list(weights)}")
        if any(weight > 0 and size < 1 for size, weight in zip(sizes, weights, strict=True)):
            raise DataError(f"mixture: a source with a positive weight has no rows (sizes {list(sizes)})")
        self.sizes, self.seed, self.run = list(sizes), seed, run
        self.weights = torch.tensor(list(weights), dtype=torch.float64)
        self.offsets = [sum(self.sizes[:index]) for index in range(len(self.sizes) + 1)]
        self.drawn = 0
        self.samplers = [
            EpochSampler(size, seed=seed, shuffle=shuffle, names=("data", "mixture", "source", str(index)))
            if size else None
            for index, size in enumerate(self.sizes)
        ]
        self._sources: tuple[int, list[int]] | None = None

    def __len__(self) -> int:
        """Rows of all sources."""
        return self.offsets[-1]

    def __iter__(self) -> Iterator[int]:
        """The stream from the present position; it never ends."""
        while True:
            yield next(self)

    def __next__(self) -> int:
        source = self._source(self.drawn // self.run)
        sampler = self.samplers[source]
        assert sampler is not None  # sources without rows have no weight
        self.drawn += 1
        return self.offsets[source] + next(sampler)

    def take(self, count: int) -> list[int]:
        """The next ``count`` indices."""
        return [next(self) for _ in range(count)]

    def source_of(self, index: int) -> int:
        """The source that a drawn index belongs to."""
        return next(source for source in range(len(self.sizes)) if index < self.offsets[source + 1])

    @property
    def epochs_done(self) -> float:
        """Rows drawn over rows in all sources."""
        return self.drawn / len(self)

    def _source(self, pick: int) -> int:
        block = pick // _BLOCK
        if self._sources is None or self._sources[0] != block:
            random = generator(self.seed, "data", "mixture", "choice", block)
            drawn = torch.multinomial(self.weights, _BLOCK, replacement=True, generator=random)
            self._sources = (block, drawn.tolist())
        return self._sources[1][pick % _BLOCK]

    def state_dict(self) -> dict[str, Any]:
        """Draws so far, and each source's own position."""
        return {
            "drawn": self.drawn, "sizes": self.sizes, "weights": self.weights.tolist(), "run": self.run,
            "sources": [None if sampler is None else sampler.state_dict() for sampler in self.samplers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the state was taken; raises CheckpointError when sources, weights or seed differ."""
        for name, mine in (("sizes", self.sizes), ("weights", self.weights.tolist()), ("run", self.run)):
            if state[name] != mine:
                raise CheckpointError(f"the checkpoint's mixture had {name} {state[name]}, this run's has {mine}; "
                                      f"resume with the data of the interrupted run")
        self.drawn = int(state["drawn"])
        for sampler, saved in zip(self.samplers, state["sources"], strict=True):
            if sampler is not None:
                sampler.load_state_dict(saved)
