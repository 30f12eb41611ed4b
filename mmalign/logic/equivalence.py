"""How equivalent two formulas are when their literals are matched as well as possible: the LE score of LogicLLaMA.

Yang et al. 2023, arXiv 2305.15541, section 4.2. Atoms are Boolean variables and quantifiers are ignored; of all ways to bind the
atoms of one formula to those of the other, the best share of equal rows of the truth tables counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from math import perm

import numpy as np
from numpy.typing import NDArray

from mmalign.logic.formula import Atom, Binary, Formula, Not, Quantified, atoms, quantifiers

MAX_LITERALS = 12
"""Atoms of a formula, at most: its truth table has two to this power rows."""
MAX_BINDINGS = 1000
"""Bindings that are tried, at most."""

_COMPARED_CHARACTERS = 64
_DUMMY_DISTANCE = 10_000

Table = NDArray[np.bool_]


class TooManyLiterals(ValueError):
    """A formula has more atoms than a truth table is made for."""


@dataclass(frozen=True)
class Equivalence:
    """The best binding found, and what the search cost."""

    score: float
    """Share of equal truth-table rows, in [0, 1]; times ``quantifier_share`` where that was asked for."""
    binding: tuple[tuple[str | None, str | None], ...]
    """Pairs (gold atom, predicted atom); None where one formula has no atom left."""
    bindings: int
    """Bindings tried."""
    exact: bool
    """Whether no binding could be better: all were tried, or one with score 1 was found."""
    rows: int
    """Rows of each truth table."""
    quantifier_share: float = 1.0
    """Share of quantifiers that agree, place by place."""

    @property
    def work(self) -> int:
        """Truth-table rows compared."""
        return self.bindings * self.rows


def logical_equivalence(
    gold: Formula, predicted: Formula, *, max_literals: int = MAX_LITERALS, max_bindings: int = MAX_BINDINGS,
    quantifier_penalty: bool = False,
) -> Equivalence:
    """The LE score of ``predicted`` against ``gold``.

    Depth-first over the gold atoms in order of first occurrence; the candidates of each come by edit distance, a missing atom
    last, ties by order. All bindings are tried where there are at most ``max_bindings`` of them, otherwise the first
    ``max_bindings``. (The published code walks through a set, so that there a search that is cut off varies between runs.)
    The work is at most ``max_bindings * 2 ** max_literals`` table rows.

    ``quantifier_penalty`` multiplies the score by the share of quantifiers that agree, read from left to right; without it
    ``∀x P(x)`` and ``∃x P(x)`` score 1.

    Raises TooManyLiterals, a ValueError, for a formula of more than ``max_literals`` atoms.
    """
    first, second = atoms(gold), atoms(predicted)
    for name, found in (("gold", first), ("predicted", second)):
        if len(found) > max_literals:
            raise TooManyLiterals(f"the {name} formula has {len(found)} different atoms, more than max_literals = {max_literals}")
    count = max(len(first), len(second))
    left = truth_table(gold, {atom: i for i, atom in enumerate(first)}, count)
    right = truth_table(predicted, {atom: i for i, atom in enumerate(second)}, count)
    ways = perm(count, min(len(first), len(second)))
    best, best_binding, tried = -1, tuple(range(count)), 0
    for binding in islice(_bindings(first, second), max_bindings):
        tried += 1
        equal = int(np.count_nonzero(left == right.transpose(binding)))
        if equal > best:
            best, best_binding = equal, binding
            if equal == left.size:
                break
    share = quantifier_agreement(gold, predicted)
    return Equivalence(
        best / left.size * (share if quantifier_penalty else 1.0),
        tuple((str(first[i]) if i < len(first) else None, str(second[j]) if j < len(second) else None)
              for i, j in enumerate(best_binding)),
        tried, best == left.size or ways <= max_bindings, left.size, share,
    )


def _bindings(first: Sequence[Atom], second: Sequence[Atom]) -> Iterator[tuple[int, ...]]:
    """For every gold atom (then for the places without one) the index of a predicted atom, or of a place without one.

    Places without an atom are alike, so they are used in order.
    """
    count = max(len(first), len(second))
    texts = [str(atom)[:_COMPARED_CHARACTERS] for atom in second]
    orders = []
    for atom in first:
        text = str(atom)[:_COMPARED_CHARACTERS]
        distances = [edit_distance(text, other) for other in texts] + [_DUMMY_DISTANCE] * (count - len(second))
        orders.append(sorted(range(count), key=lambda j: (distances[j], j)))

    def extend(chosen: list[int], used: set[int]) -> Iterator[tuple[int, ...]]:
        if len(chosen) == len(first):
            yield (*chosen, *(j for j in range(count) if j not in used))
            return
        dummy_seen = False
        for j in orders[len(chosen)]:
            if j in used or (j >= len(second) and dummy_seen):
                continue
            dummy_seen = dummy_seen or j >= len(second)
            yield from extend([*chosen, j], used | {j})

    yield from extend([], set())


def truth_table(formula: Formula, places: Mapping[Formula, int], count: int) -> Table:
    """``[2] * count`` bool: the value for every assignment; axis ``places[unit]`` is that unit's value.

    A unit is an atom, or any other formula that ``places`` names. Quantifiers elsewhere are ignored.
    """

    def value(node: Formula) -> Table:
        place = places.get(node)
        if place is not None:
            shape = [1] * count
            shape[place] = 2
            return np.array([False, True]).reshape(shape)
        if isinstance(node, Not):
            return ~value(node.body)
        if isinstance(node, Quantified):
            return value(node.body)
        assert isinstance(node, Binary)
        return combine(node.operator, value(node.left), value(node.right))

    return np.broadcast_to(value(formula), [2] * count)


def combine(operator: str, left: Table, right: Table) -> Table:
    """Element-wise value of a connective."""
    if operator == "∧":
        return left & right
    if operator == "∨":
        return left | right
    if operator == "→":
        return ~left | right
    return left ^ right if operator == "⊕" else ~(left ^ right)


def quantifier_agreement(gold: Formula, predicted: Formula) -> float:
    """Share of quantifiers that agree place by place, over the longer sequence; 1 when there are none."""
    first, second = quantifiers(gold), quantifiers(predicted)
    longest = max(len(first), len(second))
    return sum(a == b for a, b in zip(first, second, strict=False)) / longest if longest else 1.0


@lru_cache(maxsize=65536)
def edit_distance(left: str, right: str) -> int:
    """Insertions, deletions and substitutions between two texts (Levenshtein)."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, start=1):
        previous, row[0] = row[0], i
        for j, b in enumerate(right, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]
