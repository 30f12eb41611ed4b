"""The mix stage: one data set from several, with counts, balance over a column, and constant columns."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmalign.config import Options
from mmalign.core.seeding import derive_seed
from mmalign.data.balance import GroupSampler, group_rows
from mmalign.data.columns import LABEL_SOURCES
from mmalign.data.concatenation import column
from mmalign.data.loading import DataOptions, load_rows
from mmalign.data.mixture import mixture_weights
from mmalign.errors import ConfigError, DataError
from mmalign.stage_kinds.records import as_they_are, write_in_chunks
from mmalign.stages import StageContext, StageResult, stage

Row = Mapping[str, Any]


class MixSource(Options):
    """One data set of a mixture."""

    data: DataOptions
    """Its rows."""
    rows: int | None = None
    """Rows taken of it; null takes as many as there are (or what ``share`` asks for), each once unless ``by`` balances them."""
    share: float | None = None
    """Share of the rows of the result that come from this source, the sources without a share being given; 0 leaves it out."""
    by: str | None = None
    """Column whose groups are balanced among the rows taken; null draws rows alike."""
    exponent: float = 0.5
    """With ``by``: a group of n rows gets a part in proportion to n^exponent. 0.5 weighs a row by 1/sqrt(n), 1 changes
    nothing, 0 gives all groups alike."""
    add: dict[str, Any] = {}
    """Columns added to every row with one value, such as ``{task: sorting}``."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse values without a meaning."""
        if self.rows is not None and self.share is not None:
            raise ValueError("rows and share exclude each other; give one")
        if self.rows is not None and self.rows < 0:
            raise ValueError(f"rows must be 0 (leave it out) or positive, not {self.rows}")
        if self.share is not None and not 0 <= self.share < 1:
            raise ValueError(f"share must be in [0, 1), not {self.share}")
        if not 0 <= self.exponent < math.inf:
            raise ValueError(f"exponent must be 0 or positive, not {self.exponent}")


class MixOptions(Options):
    """Options of the mix stage."""

    sources: list[MixSource]
    """Data sets to join."""
    shuffle: bool = True
    """Shuffle the rows of the result; false keeps them source by source."""
    columns: list[str] | None = None
    """Columns of the result; null takes those of any source. A row without one has null there."""

    def model_post_init(self, context: Any, /) -> None:
        """Shares are of a total that the other sources make."""
        if not self.sources:
            raise ValueError("sources is empty; there is nothing to mix")
        shares = [source.share for source in self.sources if source.share is not None]
        if shares and (len(shares) == len(self.sources) or sum(shares) >= 1):
            raise ValueError(f"sources: shares {shares} leave nothing to be a share of; give them for some sources, below 1")


class MixedRows(Sequence[dict[str, Any]]):
    """Rows of several data sets in one order, read when asked for; every row has every column."""

    def __init__(self, sources: Sequence[tuple[Any, Mapping[str, Any]]], order: Sequence[tuple[int, int]],
                 columns: Sequence[str]) -> None:
        self.sources, self.order, self.columns = sources, order, columns

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        source, row = self.order[index]
        rows, added = self.sources[source]
        found = {**rows[row], **added}
        return {name: found.get(name) for name in self.columns} | {"id": f"{source}-{found['id']}-{index}"}


@stage("mix", options=MixOptions, outputs=("data", "folder"))
def mix(options: MixOptions, context: StageContext) -> StageResult:
    """Join data sets in given amounts, balanced over a column where asked; nothing is held in memory but row numbers."""
    loaded: list[tuple[Any, Mapping[str, Any]]] = []
    wanted = _loaded_counts(options)
    for index, (source, count) in enumerate(zip(options.sources, wanted, strict=True)):
        if count == 0:
            loaded.append(([], source.add))
            continue
        loaded.append((load_rows(source.data, seed=context.seed, key=f"sources.{index}.data"), source.add))
    counts = _counts(options, [len(rows) for rows, _ in loaded])
    order: list[tuple[int, int]] = []
    metrics: dict[str, float] = {}
    for index, (source, (rows, _), count) in enumerate(zip(options.sources, loaded, counts, strict=True)):
        chosen = draw_rows(rows, count, source, seed=derive_seed(context.seed, "data", "mix", index), key=f"sources.{index}")
        order += [(index, row) for row in chosen]
        metrics[f"rows/{index}"] = float(len(chosen))
    if not order:
        raise DataError("sources: every source is left out, so there are no rows")
    if options.shuffle:
        random.Random(derive_seed(context.seed, "data", "mix", "order")).shuffle(order)
    columns = _columns(options, loaded, counts)
    data, numbers = write_in_chunks(context, MixedRows(loaded, order, columns), as_they_are)
    return StageResult({"data": str(data), "folder": str(context.folder)}, {"rows": numbers["rows"], **metrics})


def _loaded_counts(options: MixOptions) -> list[int | None]:
    """0 for sources that need not be read."""
    return [0 if source.rows == 0 or source.share == 0 else source.rows for source in options.sources]


def _counts(options: MixOptions, sizes: Sequence[int]) -> list[int]:
    """Rows of every source; those with a share s of the result come to ``s / (1 - sum of shares)`` of the others."""
    fixed = [size if source.rows is None else source.rows for source, size in zip(options.sources, sizes, strict=True)]
    shared = math.fsum(source.share or 0.0 for source in options.sources)
    base = sum(count for source, count in zip(options.sources, fixed, strict=True) if source.share is None)
    return [count if source.share is None else round(base * source.share / (1 - shared))
            for source, count in zip(options.sources, fixed, strict=True)]


def draw_rows(rows: Any, count: int, source: MixSource, *, seed: int, key: str) -> list[int]:
    """``count`` row numbers; none is taken again before all of its group (or of all rows) were."""
    if count == 0:
        return []
    if source.by is None and count == len(rows):
        return list(range(count))
    if source.by is None:
        groups = {"": list(range(len(rows)))}
    else:
        try:
            groups = group_rows(column(rows, source.by), by=source.by)
        except DataError as error:
            raise DataError(f"{key}.by: {str(error).removeprefix('mixture.by: ')}") from None
    weights = mixture_weights([len(members) for members in groups.values()], exponent=source.exponent)
    return GroupSampler(groups, weights, seed=seed).take(count)


def _columns(options: MixOptions, loaded: Sequence[tuple[Any, Mapping[str, Any]]], counts: Sequence[int]) -> list[str]:
    found: dict[str, None] = {}
    used = [(rows, added) for (rows, added), count in zip(loaded, counts, strict=True) if count]
    for rows, added in used:
        found |= dict.fromkeys([*rows[0], *added])
    names = [name for name in found if name != "id"]
    if options.columns is not None:
        unknown = [name for name in options.columns if name not in names]
        if unknown:
            raise ConfigError(f"columns: no source has {unknown[0]!r}; they have {', '.join(names)}")
        return [name for name in options.columns if name != "id"]
    forms = [name for name in LABEL_SOURCES if name in names]
    if len(forms) > 1 and not any(all(name in rows[0] for name in forms) for rows, _ in used):
        raise DataError(f"sources: some have {forms[0]!r} and others {forms[1]!r}; rows of one data set are of one form, so map "
                        "or convert one of them (data.columns), or name the columns to keep with columns:")
    return names
