"""Formulas of first-order logic as immutable trees, and their text.

``str(formula)`` writes the usual symbols and as few brackets as :func:`mmalign.logic.parser.parse` needs to read the same tree.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

Operator = Literal["∧", "∨", "⊕", "→", "↔"]
Quantifier = Literal["∀", "∃"]

OPERATORS: tuple[Operator, ...] = ("∧", "∨", "⊕", "→", "↔")
QUANTIFIERS: tuple[Quantifier, ...] = ("∀", "∃")

PRECEDENCE: dict[str, int] = {"↔": 1, "→": 2, "⊕": 3, "∨": 4, "∧": 5, "¬": 6}
"""Binding strength: negation binds tightest. ``→`` groups to the right, the others to the left."""

RIGHT_ASSOCIATIVE = frozenset({"→"})

KEYWORDS: dict[str, str] = {
    "forall": "∀", "exists": "∃", "not": "¬", "and": "∧", "or": "∨", "xor": "⊕", "implies": "→", "iff": "↔",
}
"""Words that stand for symbols, in lower or upper case; no predicate, variable or constant may be called so."""

ASCII: dict[str, str] = {"∀": "forall ", "∃": "exists ", "¬": "~", "∧": "&", "∨": "|", "⊕": "^", "→": "->", "↔": "<->", "≠": "!="}
"""Spelling of the symbols in plain text, which the parser reads too."""

EQUALS = "="
"""Name of the predicate that is written between its two terms."""

_NAME = re.compile(r"[^\W\d]\w*")
_CONSTANT = re.compile(r"[^\W\d]\w*|\d+(?:\.\d+)?")


def is_keyword(name: str) -> bool:
    """Whether ``name`` stands for a symbol."""
    return name in KEYWORDS or (name.isupper() and name.lower() in KEYWORDS)


def _check(name: str, pattern: re.Pattern[str], what: str) -> None:
    if not pattern.fullmatch(name) or is_keyword(name):
        raise ValueError(f"{what} {name!r} is not a name: letters, digits and _, no digit first, none of "
                         f"{', '.join(KEYWORDS)}")


@dataclass(frozen=True, slots=True)
class Term:
    """A variable or constant, or a function of terms."""

    name: str
    arguments: tuple[Term, ...] = ()

    def __post_init__(self) -> None:
        _check(self.name, _NAME if self.arguments else _CONSTANT, "term")

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(str, self.arguments))})" if self.arguments else self.name


@dataclass(frozen=True, slots=True)
class Atom:
    """A predicate of terms, ``Likes(x, tom)``; without terms a proposition; ``=`` of two terms is equality."""

    predicate: str
    terms: tuple[Term, ...] = ()

    def __post_init__(self) -> None:
        if self.predicate == EQUALS:
            if len(self.terms) != 2:
                raise ValueError(f"equality has two terms, not {len(self.terms)}")
        else:
            _check(self.predicate, _NAME, "predicate")

    def __str__(self) -> str:
        return to_text(self)


@dataclass(frozen=True, slots=True)
class Not:
    """``¬ body``."""

    body: Formula

    def __str__(self) -> str:
        return to_text(self)


@dataclass(frozen=True, slots=True)
class Binary:
    """``left operator right``."""

    operator: Operator
    left: Formula
    right: Formula

    def __post_init__(self) -> None:
        if self.operator not in OPERATORS:
            raise ValueError(f"operator must be one of {' '.join(OPERATORS)}, not {self.operator!r}")

    def __str__(self) -> str:
        return to_text(self)


@dataclass(frozen=True, slots=True)
class Quantified:
    """``∀ variable body`` or ``∃ variable body``."""

    quantifier: Quantifier
    variable: str
    body: Formula

    def __post_init__(self) -> None:
        if self.quantifier not in QUANTIFIERS:
            raise ValueError(f"quantifier must be ∀ or ∃, not {self.quantifier!r}")
        _check(self.variable, _NAME, "variable")

    def __str__(self) -> str:
        return to_text(self)


Formula: TypeAlias = Atom | Not | Binary | Quantified


def to_text(formula: Formula, *, ascii: bool = False) -> str:
    """The formula as text; ``ascii`` writes ``forall x (P(x) -> ~Q(x))``.

    A quantifier reaches as far to the right as it can, so a quantified formula that something follows stands in brackets.
    """
    text = _render(formula, 0, last=True)
    if ascii:
        text = "".join(ASCII.get(symbol, symbol) for symbol in text)
    return text


def _render(node: Formula, minimum: int, *, last: bool) -> str:
    """Text of ``node`` where operators weaker than ``minimum`` need brackets; ``last``: nothing follows it."""
    if isinstance(node, Atom):
        if node.predicate == EQUALS:
            return f"{node.terms[0]} = {node.terms[1]}"
        return f"{node.predicate}({', '.join(map(str, node.terms))})" if node.terms else node.predicate
    if isinstance(node, Not):
        if isinstance(node.body, Atom) and node.body.predicate == EQUALS:
            return f"{node.body.terms[0]} ≠ {node.body.terms[1]}"
        return f"¬{_render(node.body, PRECEDENCE['¬'], last=last)}"
    if isinstance(node, Quantified):
        body = _render(node.body, 0, last=True)
        if isinstance(node.body, Binary):
            body = f"({body})"
        text = f"{node.quantifier}{node.variable} {body}"
        return text if last else f"({text})"
    strength = PRECEDENCE[node.operator]
    bracketed = strength < minimum
    right_first = node.operator in RIGHT_ASSOCIATIVE
    left = _render(node.left, strength + right_first, last=False)
    right = _render(node.right, strength + (not right_first), last=last or bracketed)
    text = f"{left} {node.operator} {right}"
    return f"({text})" if bracketed else text


def children(formula: Formula) -> tuple[Formula, ...]:
    """The formulas directly below."""
    if isinstance(formula, Binary):
        return formula.left, formula.right
    return () if isinstance(formula, Atom) else (formula.body,)


def walk(formula: Formula) -> Iterator[Formula]:
    """The formula and all formulas below it, from left to right, parents first."""
    yield formula
    for child in children(formula):
        yield from walk(child)


def atoms(formula: Formula) -> tuple[Atom, ...]:
    """The different atoms in order of first occurrence; the same predicate of other terms is another atom."""
    return tuple(dict.fromkeys(node for node in walk(formula) if isinstance(node, Atom)))


def quantifiers(formula: Formula) -> tuple[Quantifier, ...]:
    """All quantifiers from left to right."""
    return tuple(node.quantifier for node in walk(formula) if isinstance(node, Quantified))


def depth(formula: Formula) -> int:
    """Formulas on the longest way down; an atom has 1."""
    return 1 + max((depth(child) for child in children(formula)), default=0)


def term_names(term: Term) -> Iterator[str]:
    """Names in a term, from left to right."""
    yield term.name
    for argument in term.arguments:
        yield from term_names(argument)


def names(formula: Formula) -> set[str]:
    """All names in it: predicates, functions, constants and variables, bound ones included."""
    found: set[str] = set()
    for node in walk(formula):
        if isinstance(node, Atom):
            found |= {node.predicate, *(name for term in node.terms for name in term_names(term))}
        elif isinstance(node, Quantified):
            found.add(node.variable)
    return found


def map_terms(term: Term, change: Callable[[Term], Term]) -> Term:
    """``term`` with ``change`` applied to every term in it, innermost first."""
    return change(Term(term.name, tuple(map_terms(argument, change) for argument in term.arguments)))


def canonical_variables(formula: Formula) -> Formula:
    """Bound variables renamed by how many quantifiers stand around theirs, so that only meaningful differences remain."""
    prefix = "v"
    taken = names(formula)
    while any(name.startswith(prefix) for name in taken):
        prefix += "v"

    def rename(node: Formula, bound: dict[str, str], level: int) -> Formula:
        if isinstance(node, Atom):
            def change(term: Term) -> Term:
                return Term(bound[term.name]) if term.name in bound and not term.arguments else term

            return Atom(node.predicate, tuple(map_terms(term, change) for term in node.terms))
        if isinstance(node, Not):
            return Not(rename(node.body, bound, level))
        if isinstance(node, Binary):
            return Binary(node.operator, rename(node.left, bound, level), rename(node.right, bound, level))
        inner = f"{prefix}{level}"
        return Quantified(node.quantifier, inner, rename(node.body, {**bound, node.variable: inner}, level + 1))

    return rename(formula, {}, 0)
