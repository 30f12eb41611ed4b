"""The ``fol`` asset: sentences with their formulas in first-order logic, and what a careless translator might write.

Sentences follow nine schemas over people, animals, properties, activities and relations. The columns are those of MALLS (Yang et
al. 2023, arXiv 2305.15541): ``NL``, ``FOL`` and ``Pred FOL``. Errors of ``Pred FOL`` are misreadings of sentences (converse
implications, ∧ under ∀, a lost "not", the wrong noun), not the random edits that corrections are learned from.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mmalign.core.seeding import derive_seed
from mmalign.errors import DataError
from mmalign.logic.formula import Atom, Binary, Formula, Not, Quantified, Term, walk
from mmalign.logic.tasks import TASKS, TaskOptions, task_rows

TEST_SHARE = 0.2
"""Share of the sentences that belongs to the test split."""

NOUNS = ("dog", "cat", "bird", "horse", "robot", "child", "farmer", "doctor", "pirate", "wizard")
ADJECTIVES = ("big", "red", "old", "happy", "tired", "clever", "brave", "lazy", "quiet", "rich")
ACTIVITIES = ("runs", "sings", "sleeps", "swims", "dances", "works", "reads", "waits")
RELATIONS = ("likes", "sees", "helps", "knows", "follows", "fears")
PEOPLE = ("tom", "ana", "leo", "mia")

X, Y = Term("x"), Term("y")


def _is(word: str, term: Term = X) -> Formula:
    return Atom(word.capitalize(), (term,))


def _does(word: str, term: Term = X) -> Formula:
    return Atom(word.removesuffix("s").capitalize(), (term,))


def _relates(word: str, first: Term, second: Term) -> Formula:
    return Atom(word.removesuffix("s").capitalize(), (first, second))


def _and(*parts: Formula) -> Formula:
    result = parts[0]
    for part in parts[1:]:
        result = Binary("∧", result, part)
    return result


def _every(left: Formula, right: Formula, variable: str = "x") -> Formula:
    return Quantified("∀", variable, Binary("→", left, right))


@dataclass(frozen=True)
class _Words:
    """The words of one sentence."""

    noun: str
    other_noun: str
    adjective: str
    other_adjective: str
    activity: str
    relation: str
    person: str

    @staticmethod
    def draw(chance: random.Random) -> _Words:
        noun, other_noun = chance.sample(NOUNS, 2)
        adjective, other_adjective = chance.sample(ADJECTIVES, 2)
        return _Words(noun, other_noun, adjective, other_adjective, chance.choice(ACTIVITIES), chance.choice(RELATIONS),
                      chance.choice(PEOPLE))


def _schemas() -> tuple[Callable[[_Words], tuple[str, Formula]], ...]:
    return (
        lambda w: (f"every {w.noun} {w.activity}", _every(_is(w.noun), _does(w.activity))),
        lambda w: (f"every {w.adjective} {w.noun} {w.activity}", _every(_and(_is(w.adjective), _is(w.noun)), _does(w.activity))),
        lambda w: (f"no {w.noun} is {w.adjective}", _every(_is(w.noun), Not(_is(w.adjective)))),
        lambda w: (f"some {w.noun} is {w.adjective} and {w.activity}",
                   Quantified("∃", "x", _and(_is(w.noun), _is(w.adjective), _does(w.activity)))),
        lambda w: (f"if a {w.noun} is {w.adjective} then it is not {w.other_adjective} or it {w.activity}",
                   _every(_and(_is(w.noun), _is(w.adjective)), Binary("∨", Not(_is(w.other_adjective)), _does(w.activity)))),
        lambda w: (f"every {w.noun} {w.relation} some {w.other_noun}",
                   _every(_is(w.noun), Quantified("∃", "y", _and(_is(w.other_noun, Y), _relates(w.relation, X, Y))))),
        lambda w: (f"{w.person} {w.relation} every {w.adjective} {w.noun}",
                   _every(_and(_is(w.adjective), _is(w.noun)), _relates(w.relation, Term(w.person), X))),
        lambda w: (f"{w.person} is either {w.adjective} or {w.other_adjective} but not both",
                   Binary("⊕", _is(w.adjective, Term(w.person)), _is(w.other_adjective, Term(w.person)))),
        lambda w: (f"a {w.noun} {w.activity} if and only if it is {w.adjective}",
                   _every(_is(w.noun), Binary("↔", _does(w.activity), _is(w.adjective)))),
    )


SCHEMAS = _schemas()


def split_of(sentence: str) -> str:
    """"train" or "test": decided by the sentence alone, so the splits never share one."""
    digest = hashlib.blake2b(sentence.encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") < TEST_SHARE * 2**64 else "train"


def make_fol_corpus(
    n: int, *, split: str = "train", seed: int = 0, errors: float = 0.7, task: str | None = None, **options: Any,
) -> list[dict[str, Any]]:
    """``n`` rows ``id, NL, FOL, Pred FOL``, the schemas in turn, no sentence twice.

    ``errors`` is the share of ``Pred FOL`` that differs from ``FOL``. With a ``task`` (translation, correction, steps, loop) the
    rows are those of :func:`mmalign.logic.tasks.task_rows`, and ``options`` are the task's. Raises DataError for unknown splits
    and tasks, or when there are fewer sentences.
    """
    if split not in ("train", "test"):
        raise DataError(f"data.split: the fol asset has train and test, not {split!r}")
    if n < 1 or not 0 <= errors <= 1:
        raise DataError(f"fol: the number of rows must be at least 1 and errors in [0, 1], not {n} and {errors}")
    if task is not None and task not in TASKS:
        raise DataError(f"task: must be one of {', '.join(TASKS)}, not {task!r}")
    if task is None and options:
        raise DataError(f"{next(iter(options))}: belongs to a task; give one of {', '.join(TASKS)}")
    chance = random.Random(derive_seed(seed, "data", "fol", split))
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    drawn = 0
    while len(rows) < n:
        sentence, formula = SCHEMAS[drawn % len(SCHEMAS)](_Words.draw(chance))
        drawn += 1
        if drawn > 50 * n + 10_000:
            raise DataError(f"fol: there are {len(rows)} {split} sentences, not {n}; ask for fewer rows")
        if sentence in seen or split_of(sentence) != split:
            continue
        seen.add(sentence)
        predicted = misread(formula, chance) if chance.random() < errors else formula
        rows.append({"id": f"fol-{split}-{seed}-{len(rows)}", "NL": f"{sentence[0].upper()}{sentence[1:]}.", "FOL": str(formula),
                     "Pred FOL": str(predicted)})
    if task is None:
        return rows
    from mmalign.config import parse as parse_options

    return list(task_rows(rows, parse_options(TaskOptions, {"task": task, **options}, root="data.arguments"), seed=seed))


def misread(formula: Formula, chance: random.Random) -> Formula:
    """``formula`` as a translator who reads carelessly would write it; always another formula."""
    slips = list(_SLIPS)
    chance.shuffle(slips)
    for slip in slips:
        changed = slip(formula, chance)
        if changed is not None and changed != formula:
            return changed
    return Not(formula)


def _converse(node: Formula, chance: random.Random) -> Formula | None:
    """Only instead of every: the implication the wrong way round."""
    return _at_first(node, lambda part: Binary("→", part.right, part.left)
                     if isinstance(part, Binary) and part.operator == "→" else None)


def _conjunction(node: Formula, chance: random.Random) -> Formula | None:
    """∧ under ∀, or → under ∃: the beginner's mistake."""
    def change(part: Formula) -> Formula | None:
        if isinstance(part, Quantified) and isinstance(part.body, Binary):
            wrong: Any = "∧" if part.quantifier == "∀" else "→"
            return Quantified(part.quantifier, part.variable, Binary(wrong, part.body.left, part.body.right))
        return None

    return _at_first(node, change)


def _lost_not(node: Formula, chance: random.Random) -> Formula | None:
    return _at_first(node, lambda part: part.body if isinstance(part, Not) else None)


def _inclusive(node: Formula, chance: random.Random) -> Formula | None:
    """Or for either-or, if for if-and-only-if."""
    weaker: dict[str, Any] = {"⊕": "∨", "↔": "→"}
    return _at_first(node, lambda part: Binary(weaker[part.operator], part.left, part.right)
                     if isinstance(part, Binary) and part.operator in weaker else None)


def _wrong_word(node: Formula, chance: random.Random) -> Formula | None:
    """Another noun or property for one of the predicates."""
    groups = [[word.capitalize() for word in group] for group in (NOUNS, ADJECTIVES)]
    named = [part for part in walk(node) if isinstance(part, Atom) and any(part.predicate in group for group in groups)]
    if not named:
        return None
    target = chance.choice(named)
    group = next(group for group in groups if target.predicate in group)
    other = chance.choice([word for word in group if word != target.predicate])
    return _at_first(node, lambda part: Atom(other, part.terms) if isinstance(part, Atom) and part == target else None)


def _swapped_roles(node: Formula, chance: random.Random) -> Formula | None:
    """Who does it to whom."""
    return _at_first(node, lambda part: Atom(part.predicate, part.terms[::-1])
                     if isinstance(part, Atom) and len(part.terms) == 2 else None)


_SLIPS = (_converse, _conjunction, _lost_not, _inclusive, _wrong_word, _swapped_roles)


def _at_first(node: Formula, change: Callable[[Formula], Formula | None]) -> Formula | None:
    """``node`` with the first part that ``change`` takes replaced; None when it takes none."""
    changed = change(node)
    if changed is not None:
        return changed
    if isinstance(node, Binary):
        left = _at_first(node.left, change)
        if left is not None:
            return Binary(node.operator, left, node.right)
        right = _at_first(node.right, change)
        return None if right is None else Binary(node.operator, node.left, right)
    if isinstance(node, Atom):
        return None
    body = _at_first(node.body, change)
    if body is None:
        return None
    return Not(body) if isinstance(node, Not) else Quantified(node.quantifier, node.variable, body)
