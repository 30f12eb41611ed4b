"""``Rows``: columns of equal length that travel from experience to objective, ragged until the forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

FIELDS = ("chosen", "rejected", "gold", "generated")
"""Names of the samples one row may hold beside its plain one (the order is that of blocks in a joint forward)."""


class Rows:
    """Named columns with one entry per row: a tensor ``[B, ...]`` or a list of ``B`` values.

    Columns of several samples in one row carry the sample's field as a prefix (``chosen_input_ids``,
    ``rejected_input_ids``); :meth:`field` gives the view of one of them. Rows are immutable: every operation
    returns new ones that share storage where it can.
    """

    def __init__(self, columns: Mapping[str, Tensor | Sequence[Any]]) -> None:
        self._columns: dict[str, Any] = {
            name: column if isinstance(column, Tensor) else list(column) for name, column in columns.items()
        }
        lengths = {name: len(column) for name, column in self._columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"columns differ in length: {lengths}")
        self._length = next(iter(lengths.values()), 0)

    def __getitem__(self, name: str) -> Any:
        try:
            return self._columns[name]
        except KeyError:
            raise KeyError(f"no column {name!r}; columns are {', '.join(self._columns)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        """Number of rows (not of columns)."""
        return self._length

    def __contains__(self, name: object) -> bool:
        return name in self._columns

    def __repr__(self) -> str:
        return f"Rows({self._length} x [{', '.join(self._columns)}])"

    def keys(self) -> list[str]:
        """Column names, so that ``dict(rows)`` gives the columns."""
        return list(self._columns)

    @property
    def columns(self) -> list[str]:
        """Column names in order."""
        return list(self._columns)

    def take(self, indices: Tensor | Sequence[int]) -> Rows:
        """The rows at ``indices``, in that order."""
        index = torch.as_tensor(indices, dtype=torch.long)
        positions = index.tolist()
        return Rows({
            name: column.index_select(0, index.to(column.device)) if isinstance(column, Tensor)
            else [column[i] for i in positions]
            for name, column in self._columns.items()
        })

    def with_columns(self, **columns: Tensor | Sequence[Any]) -> Rows:
        """These rows with columns added or replaced."""
        return Rows({**self._columns, **columns})

    def select(self, names: Iterable[str]) -> Rows:
        """Only the named columns."""
        return Rows({name: self[name] for name in names})

    def without(self, names: Iterable[str]) -> Rows:
        """All columns but the named ones."""
        dropped = set(names)
        return Rows({name: column for name, column in self._columns.items() if name not in dropped})

    def has_field(self, field: str) -> bool:
        """Whether any column belongs to the sample called ``field``."""
        return any(name.startswith(f"{field}_") for name in self._columns)

    def field(self, field: str) -> Rows:
        """One sample of each row: columns ``<field>_x`` as ``x``, over the columns that belong to no field."""
        if not self.has_field(field):
            raise KeyError(f"rows hold no {field!r} sample; columns are {', '.join(self._columns)}")
        prefixes = tuple(f"{name}_" for name in FIELDS)
        shared = {name: column for name, column in self._columns.items() if not name.startswith(prefixes)}
        own = {
            name.removeprefix(f"{field}_"): column
            for name, column in self._columns.items() if name.startswith(f"{field}_")
        }
        return Rows({**shared, **own})

    @staticmethod
    def concat(parts: Sequence[Rows]) -> Rows:
        """Rows of all parts in order; a column must be in every part. Tensor columns must agree in inner shape."""
        parts = [part for part in parts if len(part)] or list(parts[:1])
        if not parts:
            return Rows({})
        names = [name for name in parts[0].columns if all(name in part for part in parts)]
        merged: dict[str, Any] = {}
        for name in names:
            columns = [part[name] for part in parts]
            if all(isinstance(column, Tensor) for column in columns):
                merged[name] = torch.cat(columns)
            else:
                merged[name] = [value for column in columns for value in column]
        return Rows(merged)

    def to(self, device: torch.device | str) -> Rows:
        """Tensor columns moved to ``device``; ragged lists stay where they are until they are padded."""
        return Rows({
            name: column.to(device) if isinstance(column, Tensor) else column for name, column in self._columns.items()
        })

    def examples(self) -> list[dict[str, Any]]:
        """One dictionary per row."""
        return [{name: column[i] for name, column in self._columns.items()} for i in range(self._length)]

    @staticmethod
    def from_examples(examples: Sequence[Mapping[str, Any]]) -> Rows:
        """Columns from a list of dictionaries; keys absent from any of them are left out."""
        if not examples:
            return Rows({})
        names = [name for name in examples[0] if all(name in example for example in examples)]
        return Rows({name: [example[name] for example in examples] for name in names})
