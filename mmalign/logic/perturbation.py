"""Random edits of formulas, each with its inverse and a sentence that says how to undo it.

The noise that LogicLLaMA's corrections are learned from (Yang et al. 2023, arXiv 2305.15541, section 4.1): predicates, terms,
operators and quantifiers are changed; terms, quantifiers, negations and formulas are inserted and deleted. The released code has
no such module; edits act on the syntax tree here, so that the result is always a formula.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from mmalign.logic.formula import (
    EQUALS,
    OPERATORS,
    Atom,
    Binary,
    Formula,
    Not,
    Operator,
    Quantified,
    Term,
    children,
    depth,
    is_keyword,
    to_text,
    walk,
)
from mmalign.logic.parser import MAX_DEPTH, MAX_LENGTH

NO_CHANGES = "No changes needed."
"""The correction of a formula that is right."""

KINDS = (
    "change_predicate", "change_term", "change_operator", "change_quantifier", "insert_term", "insert_quantifier",
    "insert_negation", "insert_formula", "delete_term", "delete_quantifier", "delete_negation", "delete_side",
)
"""What an edit may do."""

MAX_TERMS = 5
"""Terms are not inserted into predicates that have this many."""

Path = tuple[int, ...]
"""Way to a node: 0 for the body or the left side, 1 for the right side, and in an atom the index of a term."""


@dataclass(frozen=True)
class Edit:
    """``before`` at ``path`` becomes ``after``."""

    kind: str
    path: Path
    before: Formula
    after: Formula
    undo: str
    """What takes it back, as a sentence."""

    def apply(self, formula: Formula) -> Formula:
        """``formula`` with the edit made; raises ValueError where it does not fit."""
        return replace_at(formula, self.path, self.before, self.after)

    def inverse(self) -> Edit:
        """The edit that takes this one back."""
        return Edit(f"undo_{self.kind}", self.path, self.after, self.before, "")


@dataclass(frozen=True)
class Perturbed:
    """A formula after some edits."""

    original: Formula
    formula: Formula
    edits: tuple[Edit, ...]

    def corrections(self) -> list[str]:
        """Sentences that lead back, last edit first."""
        return [edit.undo for edit in reversed(self.edits)]

    def restored(self) -> Formula:
        """The inverse edits in reverse order, applied."""
        formula = self.formula
        for edit in reversed(self.edits):
            formula = edit.inverse().apply(formula)
        return formula


def replace_at(formula: Formula, path: Path, before: Formula, after: Formula) -> Formula:
    """``formula`` with the part at ``path``, which must be ``before``, replaced by ``after``; raises ValueError if it is not."""
    if not path:
        if formula != before:
            raise ValueError(f"the edit was made for {before}, not for {formula}")
        return after
    place = path[0]
    if place >= len(children(formula)):
        raise ValueError(f"{formula} has no part number {place}")
    if isinstance(formula, Binary):
        sides = [formula.left, formula.right]
        sides[place] = replace_at(sides[place], path[1:], before, after)
        return Binary(formula.operator, sides[0], sides[1])
    assert not isinstance(formula, Atom)
    body = replace_at(formula.body, path[1:], before, after)
    return Not(body) if isinstance(formula, Not) else Quantified(formula.quantifier, formula.variable, body)


@dataclass
class Vocabulary:
    """Names that edits may bring in."""

    predicates: Sequence[str] = ("Animal", "Big", "Red", "Knows")
    terms: Sequence[str] = ("x", "y", "z")

    def __post_init__(self) -> None:
        for name in (*self.predicates, *self.terms):
            if is_keyword(name):
                raise ValueError(f"{name!r} stands for a symbol and cannot be a name")

    @staticmethod
    def of(formulas: Sequence[Formula]) -> Vocabulary:
        """The names in some formulas, for edits that look like the rest of a corpus."""
        predicates: dict[str, None] = {}
        terms: dict[str, None] = {}
        for formula in formulas:
            for node in walk(formula):
                if isinstance(node, Atom) and node.predicate != EQUALS:
                    predicates[node.predicate] = None
                    terms.update((term.name, None) for term in node.terms if not term.arguments)
        own = Vocabulary()
        return Vocabulary(tuple(predicates) or own.predicates, tuple(terms) or own.terms)


def perturb(
    formula: Formula, count: int, random: random.Random, *, vocabulary: Vocabulary | None = None,
    weights: Mapping[str, float] | None = None,
) -> Perturbed:
    """``formula`` after ``count`` random edits, fewer when no part is left that has not been touched.

    A part that an edit touched is not touched again, so every edit can be seen in the result. Kinds are drawn by ``weights``
    (equal by default; 0 leaves a kind out) among those that are possible, then a place for it. Raises ValueError for unknown
    kinds and negative counts.
    """
    if count < 0:
        raise ValueError(f"the number of edits must not be negative, not {count}")
    chances = dict.fromkeys(KINDS, 1.0) if weights is None else dict(weights)
    unknown = [kind for kind in chances if kind not in KINDS]
    if unknown:
        raise ValueError(f"unknown kind of edit {unknown[0]!r}; kinds are {', '.join(KINDS)}")
    editor = _Editor(formula, random, vocabulary or Vocabulary())
    edits: list[Edit] = []
    while len(edits) < count:
        edit = editor.step(chances)
        if edit is None:
            break
        edits.append(edit)
    return Perturbed(formula, editor.formula, tuple(edits))


@dataclass
class _Editor:
    """A formula on its way, and which parts of it have been touched."""

    formula: Formula
    random: random.Random
    vocabulary: Vocabulary
    touched: set[Path] = field(default_factory=set)

    def step(self, chances: Mapping[str, float]) -> Edit | None:
        """One edit, made; None when nothing is possible."""
        places: dict[str, list[tuple[Path, Formula]]] = {}
        for path, node, negated in _places(self.formula, ()):
            for kind in _possible(node, path, self.touched):
                if kind == "insert_negation" and negated:
                    continue
                if chances.get(kind, 0.0) > 0:
                    places.setdefault(kind, []).append((path, node))
        while places:
            kinds = list(places)
            kind = self.random.choices(kinds, [chances[name] for name in kinds])[0]
            path, node = self.random.choice(places[kind])
            before = set(self.touched)
            edit = _MAKERS[kind](self, path, node)
            if edit is not None:
                changed = edit.apply(self.formula)
                if depth(changed) <= MAX_DEPTH // 2 and len(to_text(changed)) <= MAX_LENGTH:  # brackets count as levels too
                    self.formula = changed
                    return edit
            self.touched = before
            del places[kind]
        return None

    def name(self, names: Sequence[str], other_than: Sequence[str]) -> str | None:
        left = [name for name in names if name not in other_than]
        return self.random.choice(left) if left else None

    def move(self, path: Path, change: Callable[[Path], Path | None]) -> None:
        """Rewrite the rest of every touched path at or below ``path``; None drops it."""
        moved: set[Path] = set()
        for other in self.touched:
            if other[: len(path)] != path:
                moved.add(other)
                continue
            rest = change(other[len(path):])
            if rest is not None:
                moved.add(path + rest)
        self.touched = moved

    def free_terms(self, path: Path, node: Atom) -> list[int]:
        return [i for i in range(len(node.terms)) if (*path, i) not in self.touched]


def _places(node: Formula, path: Path, negated: bool = False) -> list[tuple[Path, Formula, bool]]:
    """Every formula in the tree with its path, and whether it stands right under a negation."""
    found = [(path, node, negated)]
    for place, child in enumerate(children(node)):
        found += _places(child, (*path, place), isinstance(node, Not))
    return found


def _possible(node: Formula, path: Path, touched: set[Path]) -> list[str]:
    """Kinds of edit that ``node`` itself allows."""
    free = path not in touched
    kinds: list[str] = []
    if isinstance(node, Atom) and node.predicate != EQUALS:
        terms = [i for i in range(len(node.terms)) if (*path, i) not in touched]
        kinds += ["change_predicate"] * free + ["change_term"] * bool(terms)
        kinds += ["insert_term"] * (free and len(node.terms) < MAX_TERMS)
        kinds += ["delete_term"] * (len(node.terms) > 1 and bool(terms))
    elif isinstance(node, Binary) and free:
        kinds += ["change_operator", "delete_side"]
    elif isinstance(node, Quantified) and free:
        kinds += ["change_quantifier", "delete_quantifier"]
    elif isinstance(node, Not) and free:
        kinds += ["delete_negation"]
    if free:
        kinds += ["insert_formula", *(["insert_quantifier"] if not isinstance(node, (Atom, Not)) or not path else []),
                  *(["insert_negation"] if not isinstance(node, Not) else [])]
    return kinds


# -- the edits: each marks what it touched and returns the edit, or None when there is nothing to change to --------------------


def _change_predicate(editor: _Editor, path: Path, node: Formula) -> Edit | None:
    assert isinstance(node, Atom)
    name = editor.name(editor.vocabulary.predicates, [node.predicate])
    if name is None:
        return None
    editor.touched.add(path)
    return Edit("change_predicate", path, node, Atom(name, node.terms), f"Change the predicate {name} to {node.predicate}.")


def _change_term(editor: _Editor, path: Path, node: Formula) -> Edit | None:
    assert isinstance(node, Atom)
    place = editor.random.choice(editor.free_terms(path, node))
    old = node.terms[place]
    name = editor.name(editor.vocabulary.terms, [str(old)])
    if name is None:
        return None
    editor.touched.add((*path, place))
    terms = (*node.terms[:place], Term(name), *node.terms[place + 1 :])
    return Edit("change_term", path, node, Atom(node.predicate, terms), f"Change the term {name} of {node.predicate} to {old}.")


def _insert_term(editor: _Editor, path: Path, node: Formula) -> Edit | None:
    assert isinstance(node, Atom)
    name = editor.name(editor.vocabulary.terms, [])
    if name is None:
        return None
    place = editor.random.randint(0, len(node.terms))
    editor.move(path, lambda rest: (rest[0] + 1,) if rest and rest[0] >= place else rest)
    editor.touched.add((*path, place))
    terms = (*node.terms[:place], Term(name), *node.terms[place:])
    return Edit("insert_term", path, node, Atom(node.predicate, terms), f"Delete the term {name} from {node.predicate}.")


def _delete_term(editor: _Editor, path: Path, node: Formula) -> Edit | None:
    assert isinstance(node, Atom)
    place = editor.random.choice(editor.free_terms(path, node))
    editor.move(path, lambda rest: rest if not rest or rest[0] < place else None if rest[0] == place else (rest[0] - 1,))
    editor.touched.add(path)
    terms = node.terms[:place] + node.terms[place + 1 :]
    where = "first" if place == 0 else f"after {node.terms[place - 1]}"
    return Edit("delete_term", path, node, Atom(node.predicate, terms),
                f"Insert the term {node.terms[place]} into {node.predicate}, {where}.")


def _change_operator(editor: _Editor, path: Path, node: Formula) -> Edit | None:
    assert isinstance(node, Binary)
    operator: Operator = editor.random.choice([name for name in OPERATORS if name != node.operator])
    editor.touched.add(path)
    after = Binary(operator, node.left, node.right)
    return Edit("change_operator", path, node, after,
                f"Change the {operator} between {_short(node.left)} and {_short(node.right)} to {node.operator}.")


def _change_quantifier(editor: _Editor, path: Path, node: Formula) -> Edit | None:
    assert isinstance(node, Quantified)
    other = Quantified("∃" if node.quantifier == "∀" else "∀", node.variable, node.body)
    editor.touched.add(path)
    return Edit("change_quantifier", path, node, other,
                f"Change the quantifier {other.quantifier}{node.variable} to {node.quantifier}{node.variable}.")


def _insert_quantifier(editor: _Editor, path: Path, node: Formula) -> Edit | None:
    names = [name for name in editor.vocabulary.terms if not name[0].isdigit()]
    bound = [inner.variable for inner in walk(node) if isinstance(inner, Quantified)]
    variable = editor.name(names, bound)
    if variable is None:
        return None
    after = Quantified(editor.random.choice(("∀", "∃")), variable, node)
    editor.move(path, lambda rest: (0, *rest))
    editor.touched.add(path)
    return Edit("insert_quantifier", path, node, after, f"Delete the quantifier {after.quantifier}{variable}.")


def _delete_quantifier(editor: _Editor, path: Path, node: Formula) -> Edit | None:
    assert isinstance(node, Quantified)
    _drop_level(editor, path, 0)
    return Edit("delete_quantifier", path, node, node.body,
                f"Insert the quantifier {node.quantifier}{node.variable} before {_short(node.body)}.")


def _insert_negation(editor: _Editor, path: Path, node: Formula) -> Edit | None:
    editor.move(path, lambda rest: (0, *rest))
    editor.touched |= {path, (*path, 0)}
    return Edit("insert_negation", path, node, Not(node), f"Delete the negation of {_short(node)}.")


def _delete_negation(editor: _Editor, path: Path, node: Formula) -> Edit | None:
    assert isinstance(node, Not)
    _drop_level(editor, path, 0)
    return Edit("delete_negation", path, node, node.body, f"Negate {_short(node.body)}.")


def _insert_formula(editor: _Editor, path: Path, node: Formula) -> Edit | None:
    predicate = editor.name(editor.vocabulary.predicates, [])
    term = editor.name(editor.vocabulary.terms, [])
    if predicate is None or term is None:
        return None
    new: Formula = Atom(predicate, (Term(term),))
    operator: Operator = editor.random.choice(OPERATORS)
    right = editor.random.random() < 0.5
    editor.move(path, lambda rest: (0 if right else 1, *rest))
    editor.touched |= {path, (*path, int(right)), (*path, int(right), 0)}
    after = Binary(operator, node, new) if right else Binary(operator, new, node)
    return Edit("insert_formula", path, node, after, f"Delete {new} and the {operator} {'before' if right else 'after'} it.")


def _delete_side(editor: _Editor, path: Path, node: Formula) -> Edit | None:
    assert isinstance(node, Binary)
    kept = editor.random.randrange(2)
    _drop_level(editor, path, kept)
    left, right = node.left, node.right
    text = f"Insert {_short(right)} with {node.operator} after {_short(left)}." if kept == 0 else \
        f"Insert {_short(left)} with {node.operator} before {_short(right)}."
    return Edit("delete_side", path, node, right if kept else left, text)


def _drop_level(editor: _Editor, path: Path, kept: int) -> None:
    """The part number ``kept`` below ``path`` takes the place of what stood there, and counts as touched."""
    editor.move(path, lambda rest: rest[1:] if rest and rest[0] == kept else None)
    editor.touched.add(path)


def _short(formula: Formula) -> str:
    text = to_text(formula)
    return text if isinstance(formula, (Atom, Not)) else f"({text})"


_MAKERS: dict[str, Callable[[_Editor, Path, Formula], Edit | None]] = {
    "change_predicate": _change_predicate, "change_term": _change_term, "change_operator": _change_operator,
    "change_quantifier": _change_quantifier, "insert_term": _insert_term, "insert_quantifier": _insert_quantifier,
    "insert_negation": _insert_negation, "insert_formula": _insert_formula, "delete_term": _delete_term,
    "delete_quantifier": _delete_quantifier, "delete_negation": _delete_negation, "delete_side": _delete_side,
}


def draw_edit_count(random: random.Random, *, most: int = 10, unchanged: float = 0.2) -> int:
    """Number of edits: 0 with probability ``unchanged``, else uniform in 1 .. ``most``."""
    return 0 if random.random() < unchanged else random.randint(1, most)
