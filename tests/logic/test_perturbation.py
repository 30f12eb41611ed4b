"""Random edits: every result is a formula, the inverse restores it, nothing is touched twice, and the counts are as asked."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from formulas import formulas
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.logic.formula import Atom, Quantified, Term, to_text
from mmalign.logic.parser import parse
from mmalign.logic.perturbation import KINDS, Edit, Vocabulary, draw_edit_count, perturb, replace_at


@settings(max_examples=300, deadline=None)
@given(formulas(), st.integers(0, 10), st.integers(0, 2**32))
def test_results_parse_and_inverses_restore(formula, count, seed):
    made = perturb(formula, count, random.Random(seed))
    assert len(made.edits) <= count
    assert parse(str(made.formula)) == made.formula
    assert parse(to_text(made.formula, ascii=True)) == made.formula
    assert made.restored() == formula
    forward = formula
    for edit in made.edits:
        assert edit.before != edit.after
        forward = edit.apply(forward)
        assert parse(str(forward)) == forward
    assert forward == made.formula
    assert made == perturb(formula, count, random.Random(seed))
    assert len(made.corrections()) == len(made.edits)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_made_and_says_how_to_undo_it(kind):
    formula = parse("∀x (Dog(x, tom) ∧ ¬Big(x) → ∃y Likes(x, y))")
    made = perturb(formula, 1, random.Random(3), weights={kind: 1.0})
    assert [edit.kind for edit in made.edits] == [kind]
    assert made.formula != formula
    verbs = {"change": "Change", "insert": "Delete", "delete": ("Insert", "Negate")}
    assert made.edits[0].undo.startswith(verbs[kind.split("_")[0]])
    assert made.edits[0].undo.endswith(".")


def test_corrections_come_in_reverse_order():
    made = perturb(parse("∀x (Dog(x) → Barks(x))"), 3, random.Random(1))
    assert made.corrections() == [edit.undo for edit in made.edits][::-1]


def test_a_part_is_not_touched_twice():
    for seed in range(200):
        made = perturb(parse("Dog(x)"), 10, random.Random(seed), weights={"change_predicate": 1, "change_term": 1})
        assert sorted(edit.kind for edit in made.edits) == ["change_predicate", "change_term"]
        negated = perturb(parse("¬P"), 10, random.Random(seed), weights={"insert_negation": 1, "delete_negation": 1})
        assert len(negated.edits) == 1 or str(negated.formula) != "¬P"
        assert "¬¬" not in str(negated.formula)


def test_terms_that_move_keep_their_marks():
    for seed in range(200):
        weights = {"change_term": 1, "insert_term": 1, "delete_term": 1}
        made = perturb(parse("R(a, b, c)"), 10, random.Random(seed), weights=weights)
        assert made.restored() == parse("R(a, b, c)")


def test_impossible_edits_are_left_out():
    assert perturb(parse("P"), 5, random.Random(0), weights={"change_term": 1.0}).edits == ()
    assert perturb(parse("a = b"), 5, random.Random(0), weights={"change_predicate": 1.0}).edits == ()


@pytest.mark.parametrize(("arguments", "message"), [
    ({"count": -1}, "must not be negative"), ({"count": 1, "weights": {"change_everything": 1.0}}, "change_everything"),
])
def test_senseless_requests_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        perturb(parse("P"), arguments.pop("count"), random.Random(0), **arguments)


def test_an_edit_that_does_not_fit_is_refused():
    edit = Edit("change_predicate", (0,), Atom("P"), Atom("Q"), "")
    with pytest.raises(ValueError, match="made for P"):
        edit.apply(parse("¬R"))
    with pytest.raises(ValueError, match="no part number 0"):
        edit.apply(parse("P"))
    assert replace_at(parse("¬P"), (0,), Atom("P"), Atom("Q")) == parse("¬Q")


def test_names_come_from_the_corpus():
    vocabulary = Vocabulary.of([parse("∀x (Cat(x) → Likes(x, tom))")])
    assert set(vocabulary.predicates) == {"Cat", "Likes"}
    assert set(vocabulary.terms) == {"x", "tom"}
    made = perturb(parse("Dog(x)"), 1, random.Random(0), vocabulary=vocabulary, weights={"change_predicate": 1.0})
    assert made.formula in (Atom("Cat", (Term("x"),)), Atom("Likes", (Term("x"),)))
    with pytest.raises(ValueError, match="symbol"):
        Vocabulary(predicates=["and"])


def test_numbers_are_not_quantified_over():
    for seed in range(50):
        made = perturb(parse("P ∧ Q"), 1, random.Random(seed), vocabulary=Vocabulary(terms=("3", "x")),
                       weights={"insert_quantifier": 1})
        assert all(isinstance(edit.after, Quantified) and edit.after.variable == "x" for edit in made.edits)


def test_number_of_edits():
    """P(0) = 0.2 and 1 .. 10 alike: shares of 20,000 draws within five standard errors."""
    chance = random.Random(5)
    counts = Counter(draw_edit_count(chance) for _ in range(20_000))
    assert sorted(counts) == list(range(11))
    assert counts[0] / 20_000 == pytest.approx(0.2, abs=5 * (0.2 * 0.8 / 20_000) ** 0.5)
    for number in range(1, 11):
        assert counts[number] / 20_000 == pytest.approx(0.08, abs=5 * (0.08 * 0.92 / 20_000) ** 0.5)
