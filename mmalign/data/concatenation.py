"""Tokenised documents end to end, cut into chunks of one length: the rows of continued pre-training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mmalign.core.seeding import generator
from mmalign.data.balance import group_rows
from mmalign.data.packing import pack_pieces


class ConcatenatedRows(Sequence[Mapping[str, Any]]):
    """Chunks of ``capacity`` tokens over shuffled documents, each made when it is read.

    The order of the documents depends on the seed alone; every token is in exactly one chunk, and only a last chunk is
    shorter. ``by`` keeps the groups of a column apart, so that a chunk is of one group and carries its name. A document
    keeps the end token it was encoded with; attention crosses document borders, labels do not (a document's first token
    is never predicted).
    """

    def __init__(self, examples: Sequence[Mapping[str, Any]], capacity: int, *, seed: int, by: str | None = None) -> None:
        self.examples, self.by = examples, by
        lengths = [len(ids) for ids in column(examples, "input_ids")]
        names = column(examples, by) if by is not None else [""] * len(lengths)
        self._chunks: list[tuple[str, list[tuple[int, int, int]]]] = []
        for name, rows in group_rows(names, by=by or "").items() if by is not None else [("", list(range(len(lengths))))]:
            order = torch.randperm(len(rows), generator=generator(seed, "data", "concatenation", name)).tolist()
            documents = [rows[i] for i in order]
            bins = pack_pieces([lengths[row] for row in documents], capacity, "wrapped")
            self._chunks += [(name, [(documents[p.sequence], p.start, p.stop) for p in pieces]) for pieces in bins]

    def __len__(self) -> int:
        return len(self._chunks)

    def lengths(self) -> list[int]:
        """Tokens of every chunk."""
        return [sum(stop - start for _, start, stop in pieces) for _, pieces in self._chunks]

    def groups(self) -> list[str]:
        """The group of every chunk."""
        return [name for name, _ in self._chunks]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        name, pieces = self._chunks[index]
        ids: list[int] = []
        labels: list[int] = []
        for row, start, stop in pieces:
            example = self.examples[row]
            ids += example["input_ids"][start:stop]
            labels += example["labels"][start:stop]
        row_id = {"id": str(index), "input_ids": ids, "labels": [-100, *labels[1:]]}
        return row_id | ({self.by: name} if self.by is not None else {})


def column(examples: Any, name: str) -> list[Any]:
    """All values of a column, without reading the others; None where a row lacks it."""
    if hasattr(examples, "select_columns"):
        if name not in examples.column_names:
            return [None] * len(examples)
        return [value for batch in examples.select_columns([name]).iter(batch_size=1000) for value in batch[name]]
    return [example.get(name) for example in examples]
