"""Name -> object tables. Every family (losses, advantages, methods, rewards, stages) is one of these."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
F = TypeVar("F")


def fold(name: str) -> str:
    """Canonical spelling of a registered name: lower case, ``-`` folded to ``_``."""
    return name.strip().lower().replace("-", "_")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most similar to ``name``, or None when nothing is close."""
    matches = difflib.get_close_matches(fold(name), list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


class Registry(Generic[T]):
    """A table of named objects of one ``kind``. Lookups fold ``-`` to ``_`` and accept aliases.

    >>> losses = Registry[object]("loss")
    >>> _ = losses.register("sigmoid", aliases=("dpo",))(object())
    >>> losses.canonical("DPO")
    'sigmoid'
    """

    def __init__(self, kind: str, *, populate: Callable[[], object] | None = None) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}
        self._aliases: dict[str, str] = {}
        self._populate = populate

    def register(self, name: str, *, aliases: Iterable[str] = ()) -> Callable[[F], F]:
        """Decorator that stores its argument under ``name``; raises ValueError when the name is taken."""
        key = fold(name)

        def store(entry: F) -> F:
            for spelling in (key, *map(fold, aliases)):
                if spelling in self._entries or spelling in self._aliases:
                    raise ValueError(f"{self.kind} {spelling!r} is already registered")
            self._entries[key] = entry  # type: ignore[assignment]
            self._aliases.update({fold(alias): key for alias in aliases})
            return entry

        return store

    def _load(self) -> None:
        if self._populate is not None:
            populate, self._populate = self._populate, None
            populate()

    def canonical(self, name: str) -> str:
        """The registered spelling of ``name``; raises ValueError naming the nearest known one."""
        self._load()
        key = fold(name)
        key = self._aliases.get(key, key)
        if key not in self._entries:
            close = nearest(key, [*self._entries, *self._aliases])
            hint = f"; did you mean {close!r}?" if close else "."
            raise ValueError(f"unknown {self.kind} {name!r}{hint} Known: {', '.join(sorted(self._entries))}")
        return key

    def get(self, name: str) -> T:
        """The object registered under ``name`` or one of its aliases."""
        return self._entries[self.canonical(name)]

    def names(self) -> list[str]:
        """Every registered name, sorted, aliases left out."""
        self._load()
        return sorted(self._entries)

    def aliases(self, name: str) -> list[str]:
        """The other spellings accepted for ``name``."""
        key = self.canonical(name)
        return sorted(alias for alias, target in self._aliases.items() if target == key)

    def __contains__(self, name: object) -> bool:
        self._load()
        return isinstance(name, str) and (fold(name) in self._entries or fold(name) in self._aliases)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        self._load()
        return len(self._entries)
