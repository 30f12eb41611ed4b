"""Small finite models: interpretations of two formulas over one or a few things, many at once, to tell formulas apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmalign.logic.equivalence import combine
from mmalign.logic.formula import EQUALS, Atom, Binary, Formula, Not, Quantified, Term, children

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

MAX_WORK = 2_000_000
"""Values of single atoms in single interpretations that are looked at per domain size, at most."""

_MAX_FUNCTION_TABLE = 256


@dataclass
class Signature:
    """The symbols that need an interpretation, each with its number of arguments."""

    predicates: dict[tuple[str, int], None] = field(default_factory=dict)
    functions: dict[tuple[str, int], None] = field(default_factory=dict)
    """Functions, constants and free variables (0 arguments)."""

    @staticmethod
    def of(formulas: Sequence[Formula]) -> Signature:
        """The symbols of ``formulas`` in order of occurrence; free variables count as constants."""
        signature = Signature()
        for formula in formulas:
            signature._visit(formula, frozenset())
        return signature

    def _visit(self, node: Formula, bound: frozenset[str]) -> None:
        if isinstance(node, Atom):
            if node.predicate != EQUALS:
                self.predicates[node.predicate, len(node.terms)] = None
            for term in node.terms:
                self._visit_term(term, bound)
        inner = bound | {node.variable} if isinstance(node, Quantified) else bound
        for child in children(node):
            self._visit(child, inner)

    def _visit_term(self, term: Term, bound: frozenset[str]) -> None:
        if term.arguments or term.name not in bound:
            self.functions[term.name, len(term.arguments)] = None
        for argument in term.arguments:
            self._visit_term(argument, bound)


def separating_size(first: Formula, second: Formula, *, max_size: int = 3, max_work: int = MAX_WORK, seed: int = 0) -> int | None:
    """Size of the smallest domain, up to ``max_size``, on which an interpretation makes one formula true and not the other.

    All interpretations are tried where the work allows, else a fixed random choice of them. None proves nothing. The work is
    at most ``max_size * max_work`` values of atoms: a size where a single interpretation would cost more is left out.
    """
    signature = Signature.of([first, second])
    for size in range(1, max_size + 1):
        cells = sum(size**arity for _, arity in chain(signature.predicates, signature.functions))
        cost = work_per_interpretation(first, size) + work_per_interpretation(second, size) + cells
        count = max_work // cost
        if count < 1 or any(size**arity > _MAX_FUNCTION_TABLE for _, arity in chain(signature.predicates, signature.functions)):
            break
        model = Interpretations.make(signature, size, count, seed=seed)
        if bool((model.value(first, {}) != model.value(second, {})).any()):
            return size
    return None


def work_per_interpretation(formula: Formula, size: int) -> int:
    """Nodes of the formula, each as often as its quantifiers evaluate it."""
    own = 1 + (sum(1 for _ in formula.terms) if isinstance(formula, Atom) else 0)
    factor = size if isinstance(formula, Quantified) else 1
    return own + factor * sum(work_per_interpretation(child, size) for child in children(formula))


@dataclass(frozen=True)
class Interpretations:
    """``W`` interpretations of a signature over the domain ``0 .. size - 1``."""

    size: int
    count: int
    predicates: Mapping[tuple[str, int], Bools]
    """``[W, size ** arity]``."""
    functions: Mapping[tuple[str, int], Ints]
    """``[W, size ** arity]``."""

    @staticmethod
    def make(signature: Signature, size: int, limit: int, *, seed: int = 0) -> Interpretations:
        """All interpretations when there are at most ``limit`` of them, else ``limit`` random ones."""
        radixes = [2] * sum(size**arity for _, arity in signature.predicates)
        radixes += [size] * sum(size**arity for _, arity in signature.functions)
        total = prod(radixes)
        if total <= limit:
            cells, numbers = np.zeros((total, len(radixes)), dtype=np.int64), np.arange(total)
            for column, radix in enumerate(radixes):
                numbers, cells[:, column] = np.divmod(numbers, radix)
        else:
            total = limit
            cells = np.random.default_rng(seed).integers(0, np.array(radixes), size=(total, len(radixes)))
        at, tables = 0, []
        for _, arity in chain(signature.predicates, signature.functions):
            tables.append(cells[:, at : at + size**arity])
            at += size**arity
        split = len(signature.predicates)
        return Interpretations(
            size, total, {key: table.astype(bool) for key, table in zip(signature.predicates, tables[:split], strict=True)},
            dict(zip(signature.functions, tables[split:], strict=True)))

    def value(self, formula: Formula, bound: Mapping[str, int]) -> Bools:
        """``[W]`` truth values with the bound variables standing for elements of the domain."""
        if isinstance(formula, Not):
            return ~self.value(formula.body, bound)
        if isinstance(formula, Binary):
            return combine(formula.operator, self.value(formula.left, bound), self.value(formula.right, bound))
        if isinstance(formula, Quantified):
            values = [self.value(formula.body, {**bound, formula.variable: element}) for element in range(self.size)]
            return np.logical_and.reduce(values) if formula.quantifier == "∀" else np.logical_or.reduce(values)
        terms = [self._element(term, bound) for term in formula.terms]
        if formula.predicate == EQUALS:
            return np.asarray(terms[0] == terms[1])
        return self._look_up(self.predicates[formula.predicate, len(terms)], terms)

    def _element(self, term: Term, bound: Mapping[str, int]) -> Ints:
        """``[W]`` elements that a term stands for."""
        if not term.arguments and term.name in bound:
            return np.full(self.count, bound[term.name], dtype=np.int64)
        arguments = [self._element(argument, bound) for argument in term.arguments]
        return self._look_up(self.functions[term.name, len(arguments)], arguments)

    def _look_up(self, table: NDArray[Any], arguments: Sequence[Ints]) -> NDArray[Any]:
        index = np.zeros(self.count, dtype=np.int64)
        for argument in arguments:
            index = index * self.size + argument
        return table[np.arange(self.count), index]
