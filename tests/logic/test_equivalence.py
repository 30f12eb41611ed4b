"""The LE score and BLEU in closed form, invariances, and the bound on the work of a verdict."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from formulas import propositions
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.logic.equivalence import (
    MAX_BINDINGS,
    MAX_LITERALS,
    TooManyLiterals,
    edit_distance,
    logical_equivalence,
    quantifier_agreement,
    truth_table,
)
from mmalign.logic.formula import Atom, Binary, Not, atoms
from mmalign.logic.parser import formula_tokens, parse
from mmalign.rewards.text_metrics import token_bleu


def le(gold, predicted, **options):
    return logical_equivalence(parse(gold), parse(predicted), **options)


@pytest.mark.parametrize(("gold", "predicted", "score"), [
    ("∀x (Country(x) ∧ InEU(x) → EUCountry(x))", "∀y (LocatedInEU(y) → EUCountry(y))", 0.875),
    ("¬(P ∧ Q)", "¬P ∨ ¬Q", 1.0), ("P → Q", "P ∧ Q", 0.5), ("∀x P(x)", "∀x ∀y (P(x) ∧ Q(y))", 0.75), ("P ⊕ Q", "¬(P ↔ Q)", 1.0),
    ("∀x P(x)", "∃x P(x)", 1.0), ("P → Q", "Q → P", 1.0), ("P(x) ∧ P(y)", "P(x) ∨ P(y)", 0.5), ("P", "Q ∨ ¬Q", 0.5),
])
def test_scores_in_closed_form(gold, predicted, score):
    assert le(gold, predicted).score == score
    assert le(predicted, gold).score == score


def test_the_same_predicate_of_other_terms_is_another_literal():
    assert [str(atom) for atom in atoms(parse("P(x) ∧ ¬P(y) → P(x)"))] == ["P(x)", "P(y)"]


@given(propositions())
def test_a_formula_is_equivalent_to_itself_and_its_rewritings(formula):
    renamed = parse(str(formula).replace("P", "Dog(y)").replace("Q", "Cat(z, tom)").replace("R", "Bird"))
    commuted = parse(str(swap(formula)))
    for other in (formula, renamed, commuted, Not(Not(formula))):
        assert logical_equivalence(formula, other).score == 1.0


def swap(node):
    if isinstance(node, Binary):
        left, right = swap(node.left), swap(node.right)
        return Binary(node.operator, right, left) if node.operator in "∧∨⊕↔" else Binary(node.operator, left, right)
    return Not(swap(node.body)) if isinstance(node, Not) else node


def test_currying_changes_nothing():
    assert le("P ∧ Q → R", "P → Q → R").score == 1.0


@settings(max_examples=50)
@given(propositions("PQR"), propositions("ABCD"))
def test_small_searches_find_the_best_of_all_bindings(gold, predicted):
    first, second = atoms(gold), atoms(predicted)
    count = max(len(first), len(second))
    left = truth_table(gold, {a: i for i, a in enumerate(first)}, count)
    right = truth_table(predicted, {a: i for i, a in enumerate(second)}, count)
    best = max(np.mean(left == right.transpose(order)) for order in itertools.permutations(range(count)))
    found = logical_equivalence(gold, predicted)
    assert found.score == best
    assert found.exact
    assert 0 <= found.score <= 1


def test_tables_hold_every_assignment():
    places = {Atom("P"): 0, Atom("Q"): 1}
    assert truth_table(parse("P → Q"), places, 2).tolist() == [[True, True], [False, True]]
    assert truth_table(parse("P"), places, 2).tolist() == [[False, False], [True, True]]


@pytest.mark.parametrize("operator", ["∧", "⊕", "→", "↔"])
def test_twelve_literals_cost_a_bounded_number_of_table_rows(operator):
    gold = f" {operator} ".join(f"P{i}(x)" for i in range(12))
    predicted = " ∨ ".join(f"¬Q{i}(x)" for i in range(12))
    found = le(gold, predicted)
    assert found.bindings <= MAX_BINDINGS
    assert found.rows == 2**12
    assert found.work <= MAX_BINDINGS * 2**MAX_LITERALS
    assert not found.exact or found.score == 1
    assert found == le(gold, predicted)


def test_a_search_that_is_cut_off_starts_with_the_nearest_names():
    gold = "(A1 → B1) ∧ (C1 → D1) ∧ (E1 → F1) ∧ (G1 → H1)"
    shuffled = "(G12 → H12) ∧ (E12 → F12) ∧ (C12 → D12) ∧ (A12 → B12)"
    found = le(gold, shuffled, max_bindings=1)
    assert (found.score, found.bindings, found.exact) == (1.0, 1, True)
    assert dict(found.binding)["A1"] == "A12"


def test_literals_without_a_partner_are_not_tried_twice():
    found = le(" ∧ ".join(f"P{i}" for i in range(8)), "¬Q")
    assert (found.bindings, found.exact) == (8, True)  # and not 8! orders of seven places without a literal


def test_more_literals_than_the_limit_are_refused():
    wide = " ∧ ".join(f"P{i}" for i in range(13))
    for pair in ((wide, "P"), ("P", wide)):
        with pytest.raises(TooManyLiterals, match="max_literals = 12"):
            le(*pair)
    assert le("P ∧ Q", "Q ∧ P", max_literals=2).score == 1
    with pytest.raises(TooManyLiterals):
        le("P ∧ Q", "P", max_literals=1)


@pytest.mark.parametrize(("gold", "predicted", "share"), [
    ("∀x P(x)", "∃x P(x)", 0.0), ("∀x ∃y P(x, y)", "∀x ∀y P(x, y)", 0.5), ("∀x P(x)", "P(x)", 0.0), ("P", "Q", 1.0),
    ("∀x ∃y R(x, y)", "∀u ∃v R(u, v)", 1.0),
])
def test_quantifier_penalty(gold, predicted, share):
    assert quantifier_agreement(parse(gold), parse(predicted)) == share
    assert le(gold, predicted, quantifier_penalty=True).score == le(gold, predicted).score * share


def test_edit_distance():
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == edit_distance("abc", "") == 3


# -- BLEU ----------------------------------------------------------------------------------------------------------------------


def bleu(gold, predicted):
    return token_bleu(formula_tokens(gold), formula_tokens(predicted))


def test_bleu_in_closed_form():
    assert bleu("∀x P(x)", "∃x P(x)") == pytest.approx((5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)
    assert bleu("∀x P(x)", "∃x P(x)") == pytest.approx(0.7598, abs=1e-4)
    assert bleu("P", "P") == 1
    assert bleu("P", "Q") == 0
    assert bleu("P(x)", "forall x P(x)") == pytest.approx((4 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert bleu("∀x P(x)", "P(x)") == pytest.approx(math.exp(1 - 6 / 4))
    assert token_bleu([], ["P"]) == token_bleu(["P"], []) == 0


def test_spelling_and_spacing_are_no_difference():
    assert bleu("∀x (P(x)→¬Q(x))", "forall x ( P(x) -> ~ Q( x ) )") == 1


@given(st.lists(st.sampled_from("abc"), max_size=12), st.lists(st.sampled_from("abc"), max_size=12))
def test_bleu_is_a_share(gold, predicted):
    assert 0 <= token_bleu(gold, predicted) <= 1
    assert token_bleu(gold, gold) == pytest.approx(float(bool(gold)))


def test_bleu_agrees_with_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu")
    scorer = sacrebleu.metrics.BLEU(tokenize="none", smooth_method="none", effective_order=True)
    pairs = [("∀x P(x)", "∃x P(x)"), ("∀x (P(x) ∧ Q(x))", "∀x (P(x) → Q(x) ∨ R(x))"), ("P(x) ∧ Q(y)", "P(x) ∧ Q(x)")]
    for gold, predicted in pairs:
        expected = scorer.sentence_score(" ".join(formula_tokens(predicted)), [" ".join(formula_tokens(gold))]).score / 100
        assert bleu(gold, predicted) == pytest.approx(expected, abs=1e-6)
