"""Balanced sampling over the groups of a column: how often each language (task, source, ...) comes up in training.

The weights come from :func:`mmalign.data.mixture.mixture_weights`; here they are turned into draws of documents: sizes are
counted in tokens or rows, and a group can be kept from repeating more than so many times.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mmalign.config import Options
from mmalign.data.mixture import MixtureSampler, mixture_weights
from mmalign.errors import ConfigError, DataError


class BalanceOptions(Options):
    """How rows are drawn over the groups of a column; exactly one of temperature, exponent and ratios."""

    by: str = "language"
    """Column that names a row's group."""
    temperature: float | None = None
    """``p ~ n^(1/T)``: 1 is in proportion to the sizes, large is uniform."""
    exponent: float | None = None
    """``p ~ n^a``: 1 is in proportion to the sizes, 0 is uniform."""
    ratios: dict[str, float] | None = None
    """Share of each group, whatever its size; groups that are not named are left out and counted."""
    count: Literal["tokens", "rows"] = "tokens"
    """What sizes and shares are counted in. They differ where documents of one group are longer."""
    max_epochs: float | None = None
    """Times a group's rows may come up, on average, over the whole run; what it loses goes to the others in proportion."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse values without a meaning."""
        given = [name for name in ("temperature", "exponent", "ratios") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of temperature, exponent and ratios, not {' and '.join(given) or 'none'}")
        if self.exponent is not None and not 0 <= self.exponent < math.inf:
            raise ValueError(f"exponent must be 0 (uniform) or positive, not {self.exponent}")
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"temperature must be positive, not {self.temperature}")
        ratios = [1.0] if self.ratios is None else list(self.ratios.values())
        if any(not 0 <= ratio < math.inf for ratio in ratios) or sum(ratios) <= 0:
            raise ValueError(f"ratios must be non-negative with a positive sum, not {self.ratios}")
        if self.max_epochs is not None and not self.max_epochs > 0:
            raise ValueError(f"max_epochs must be positive, not {self.max_epochs}")


@dataclass(frozen=True)
class Group:
    """One group and its part in a mixture."""

    name: str
    rows: int
    size: float
    """Tokens or rows, as the options count."""
    share: float
    """Share of the tokens (or rows) that is trained on."""
    weight: float
    """Probability that the next document is of this group."""
    epochs: float
    """Times its rows come up over the run, on average."""


class GroupSampler:
    """Draws rows of a data set by the weight of their group, each group in shuffled epochs of its own."""

    def __init__(self, groups: Mapping[str, Sequence[int]], weights: Sequence[float], *, seed: int) -> None:
        self.members = [list(rows) for rows in groups.values()]
        self._mixture = MixtureSampler([len(rows) for rows in self.members], weights, seed=seed)

    def take(self, count: int) -> list[int]:
        """The next ``count`` row numbers."""
        taken = []
        for index in self._mixture.take(count):
            source = self._mixture.source_of(index)
            taken.append(self.members[source][index - self._mixture.offsets[source]])
        return taken

    @property
    def epochs_done(self) -> float:
        """Rows drawn over rows in all groups."""
        return self._mixture.epochs_done

    def state_dict(self) -> dict[str, Any]:
        """Position in the mixture and in every group."""
        return self._mixture.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the state was taken; raises CheckpointError for other groups, weights or seed."""
        self._mixture.load_state_dict(state)


def group_rows(values: Iterable[Any], *, by: str) -> dict[str, list[int]]:
    """Row numbers by the value of a column, in order of first appearance; raises DataError for a row without one."""
    groups: dict[str, list[int]] = {}
    for row, value in enumerate(values):
        if value is None or value == "":
            raise DataError(f"mixture.by: row {row} has no {by!r}; every row needs one, or filter such rows out first")
        groups.setdefault(str(value), []).append(row)
    return groups


def cap_epochs(weights: Sequence[float], sizes: Sequence[int], draws: int, max_epochs: float) -> list[float]:
    """``weights`` with none above ``max_epochs * size / draws``; what is cut goes to the others in proportion.

    Afterwards no source is drawn more than ``max_epochs * size`` times on average. Raises ConfigError when the sources
    together cannot fill ``draws`` (the total is out of reach).
    """
    limits = [max_epochs * size / draws if weight > 0 else 0.0 for size, weight in zip(sizes, weights, strict=True)]
    reach = math.fsum(limits)
    if reach < 1 - 1e-9:
        raise ConfigError(f"mixture.max_epochs: {max_epochs} passes over {sum(s for s, w in zip(sizes, weights) if w > 0)} rows "
                          f"give at most {reach:.1%} of the {draws} draws of this run; train for fewer steps or raise it")
    result, fixed = list(weights), [False] * len(weights)
    while True:
        over = [i for i, weight in enumerate(result) if not fixed[i] and weight > limits[i] * (1 + 1e-12)]
        if not over:
            return result
        for i in over:
            result[i], fixed[i] = limits[i], True
        free = math.fsum(weight for weight, done in zip(result, fixed) if not done)
        rest = 1 - math.fsum(weight for weight, done in zip(result, fixed) if done)
        if free > 0:
            result = [weight if done else weight * rest / free for weight, done in zip(result, fixed)]


def balanced_groups(
    names: Sequence[Any], lengths: Sequence[int], options: BalanceOptions, *, draws: int,
) -> tuple[list[Group], dict[str, list[int]]]:
    """Weights of every group and its rows.

    Args:
        names: the group of every row.
        lengths: its length in tokens.
        options: how to weigh.
        draws: rows that the whole run draws (for ``max_epochs``).

    With ``count: tokens`` the weights are token shares, and a document is drawn with ``share / mean length``. Raises
    DataError for a row without a group, ConfigError for ratios of a group that the data lacks.
    """
    groups = group_rows(names, by=options.by)
    if options.ratios is not None:
        unknown = [name for name in options.ratios if name not in groups]
        if unknown:
            raise ConfigError(f"mixture.ratios.{unknown[0]}: no row has {options.by} {unknown[0]!r}; the data has "
                              f"{', '.join(sorted(groups))}")
        groups = {name: groups[name] for name in options.ratios}
    tokens = [sum(lengths[row] for row in rows) for rows in groups.values()]
    rows = [len(members) for members in groups.values()]
    sizes = tokens if options.count == "tokens" else rows
    shares = mixture_weights(
        sizes, temperature=options.temperature, exponent=options.exponent,
        ratios=None if options.ratios is None else list(options.ratios.values()),
    )
    weights = shares
    if options.count == "tokens":
        documents = [share * count / max(1, size) for share, count, size in zip(shares, rows, sizes, strict=True)]
        weights = [weight / math.fsum(documents) for weight in documents]
    if options.max_epochs is not None:
        weights = cap_epochs(weights, rows, draws, options.max_epochs)
    means = [size / count for size, count in zip(sizes, rows, strict=True)]
    total = math.fsum(weight * mean for weight, mean in zip(weights, means, strict=True))
    table = [
        Group(name, count, size, weight * mean / total, weight, weight * draws / count)
        for name, count, size, weight, mean in zip(groups, rows, sizes, weights, means, strict=True)
    ]
    return table, groups


def describe_groups(table: Sequence[Group], options: BalanceOptions, dropped: int) -> str:
    """The mixture in one line per group."""
    lines = [f"mixture by {options.by}, shares counted in {options.count}:"]
    lines += [f"  {g.name}: {g.rows} rows, {g.size:.0f} {options.count}, share {g.share:.3f}, {g.epochs:.2f} epochs"
              for g in table]
    if dropped:
        lines.append(f"  {dropped} rows of other groups are left out")
    return "\n".join(lines)
