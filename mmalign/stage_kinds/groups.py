"""Samples of one prompt worked on together: a data set as a sequence of groups, written in chunks of whole ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmalign.stage_kinds.records import ROWS_PER_CHUNK, Chunk, write_in_chunks

if TYPE_CHECKING:
    from mmalign.stages import StageContext


class Groups:
    """A data set seen as a sequence of prompts: item i is ``{"rows": [...]}``, read from disk when asked for."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows
        column = rows.with_format("numpy")["group"][:] if hasattr(rows, "with_format") else [row["group"] for row in rows]
        _, first, inverse = np.unique(np.asarray(column), return_index=True, return_inverse=True)
        place = np.empty(len(first), dtype=np.int64)
        place[np.argsort(first)] = np.arange(len(first))  # groups in the order of their first rows
        groups = place[inverse.reshape(-1)]
        self.order = np.argsort(groups, kind="stable")
        self.ends = np.cumsum(np.bincount(groups, minlength=len(first)))

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        start = self.ends[index - 1] if index else 0
        return {"rows": [dict(self.rows[int(i)]) for i in self.order[start : self.ends[index]]]}


def write_by_group(
    context: StageContext, groups: Groups, make: Callable[[list[dict[str, Any]], range], Chunk],
) -> tuple[Path, dict[str, float]]:
    """:func:`~mmalign.stage_kinds.records.write_in_chunks` over whole groups, about as many rows at a time."""
    size = max(1, ROWS_PER_CHUNK * len(groups) // len(groups.rows))
    return write_in_chunks(context, groups, make, size=size)  # type: ignore[arg-type]
