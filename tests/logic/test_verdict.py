"""Equivalence with quantifiers: truth tables, finite models and z3 agree, and no question takes more than its bound."""

from __future__ import annotations

import builtins
from typing import Any

import pytest
from formulas import formulas, propositions
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.logic import models
from mmalign.logic.equivalence import logical_equivalence
from mmalign.logic.formula import Atom, Quantified, Term, canonical_variables
from mmalign.logic.models import Interpretations, Signature, separating_size, work_per_interpretation
from mmalign.logic.parser import parse
from mmalign.logic.verdict import decide, same_by_truth_table, with_symbols_of


def verdict(gold: str, predicted: str, **options: Any) -> Any:
    return decide(parse(gold), parse(predicted), **options)


EQUIVALENT = [
    ("∀x P(x)", "∀y P(y)"), ("¬∀x P(x)", "∃x ¬P(x)"), ("¬∃x (P(x) ∧ Q(x))", "∀x (P(x) → ¬Q(x))"),
    ("∀x (P(x) ∧ Q(x) → R(x))", "∀x (Q(x) → P(x) → R(x))"), ("P ⊕ Q", "¬(P ↔ Q)"), ("∀x ∀y R(x, y)", "∀y ∀x R(x, y)"),
    ("∀x (P(x) ∧ Q(x))", "(∀x P(x)) ∧ ∀x Q(x)"), ("∃x (P(x) ∨ Q(x))", "(∃x P(x)) ∨ ∃x Q(x)"), ("P(a) ∧ a = b", "P(b) ∧ b = a"),
    ("∀x (P(x) → Q)", "(∃x P(x)) → Q"),
]
DIFFERENT = [
    ("∀x P(x)", "∃x P(x)"), ("∃x ∀y R(x, y)", "∀y ∃x R(x, y)"), ("∃x (P(x) ∧ Q(x))", "(∃x P(x)) ∧ ∃x Q(x)"), ("P → Q", "Q → P"),
    ("∀x P(x)", "∀x Q(x)"), ("R(a, b)", "R(b, a)"), ("∀x ∃y R(x, y)", "∀x R(x, x)"), ("P(f(a))", "P(a)"), ("∀x P(x)", "P(a)"),
]


@pytest.mark.parametrize(("gold", "predicted"), EQUIVALENT)
def test_equivalent_formulas(gold: str, predicted: str) -> None:
    pytest.importorskip("z3")
    assert verdict(gold, predicted).answer == "equivalent"
    assert verdict(predicted, gold).answer == "equivalent"
    assert verdict(gold, predicted, solver=False).answer != "different"


@pytest.mark.parametrize(("gold", "predicted"), DIFFERENT)
def test_different_formulas_are_told_apart_without_z3(gold: str, predicted: str) -> None:
    found = verdict(gold, predicted, solver=False)
    assert (found.answer, found.by) == ("different", "finite_model")


def test_quantifier_errors_that_the_published_score_does_not_see() -> None:
    gold, predicted = parse("∀x P(x)"), parse("∃x P(x)")
    assert logical_equivalence(gold, predicted).score == 1
    assert decide(gold, predicted).answer == "different"


@settings(max_examples=60, deadline=None)
@given(propositions("PQR"), propositions("PQR"))
def test_truth_tables_and_models_decide_propositions_alike(first: Any, second: Any) -> None:
    same = same_by_truth_table(first, second)
    assert (separating_size(first, second, max_size=1) is None) == same
    assert decide(first, second, solver=False).answer == ("equivalent" if same else "different")


SMALL = formulas(st.sampled_from([Atom("P", (Term("x"),)), Atom("R", (Term("x"), Term("y"))), Atom("P", (Term("a"),)),
                                  Atom("=", (Term("x"), Term("y")))]), max_leaves=4)


@settings(max_examples=40, deadline=None)
@given(SMALL, SMALL)
def test_models_and_z3_never_contradict_each_other(first: Any, second: Any) -> None:
    pytest.importorskip("z3")
    assert decide(first, first).answer == "equivalent"
    size = separating_size(first, second, max_size=2)
    asked = decide(first, second, max_size=0, rlimit=200_000)
    if size is not None:
        assert asked.answer != "equivalent"
    if same_by_truth_table(first, second):
        assert size is None


def test_renaming_bound_variables_avoids_names_that_are_there() -> None:
    renamed = canonical_variables(parse("∀x (P(x, v0) ∧ ∃x P(x, x))"))
    assert str(renamed) == "∀vv0 (P(vv0, v0) ∧ ∃vv1 P(vv1, vv1))"


@settings(max_examples=60, deadline=None)
@given(formulas(max_leaves=5))
def test_renaming_bound_variables_keeps_the_meaning(formula: Any) -> None:
    assert separating_size(formula, canonical_variables(formula), max_size=2, max_work=20_000) is None


def test_all_interpretations_are_enumerated_once() -> None:
    signature = Signature.of([parse("P(a) ∧ R(a, f(x))")])
    made = Interpretations.make(signature, 2, 10**6)
    assert made.count == 2**2 * 2**4 * 2 * 2**2 * 2  # P, R, the constants a and x, the function f
    rows = {tuple(int(v) for table in (*made.predicates.values(), *made.functions.values()) for v in table[i])
            for i in range(made.count)}
    assert len(rows) == made.count


# -- bounds ------------------------------------------------------------------------------------------------------------------


WIDE = " ∧ ".join(f"(P{i}(x, y) → P{(i + 1) % 12}(y, x))" for i in range(12))
HARD = [
    (f"∀x ∃y ({WIDE})", f"∃y ∀x ({WIDE})"),
    ("∀x ∀y ∀z (R(x, y) ∧ R(y, z) → R(x, z)) ∧ (∀u ∃v R(u, v)) ∧ ∀w ¬R(w, w)", "Q ∧ ¬Q"),
    ("∀x ∀y ∀z (F(g(x, y), h(y, z)) → F(h(z, x), g(y, x)))", "∀x ∀y ∀z (F(h(x, y), g(y, z)) → F(g(z, x), h(y, x)))"),
]


@pytest.mark.parametrize(("gold", "predicted"), HARD)
def test_work_of_a_verdict_is_bounded(gold: str, predicted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finite models by the values they look at, z3 by its own count of steps."""
    spent = []
    original = Interpretations.make

    def counted(signature: Signature, size: int, limit: int, *, seed: int = 0) -> Interpretations:
        made = original(signature, size, limit, seed=seed)
        spent.append(made.count * (work_per_interpretation(parse(gold), size) + work_per_interpretation(parse(predicted), size)))
        return made

    monkeypatch.setattr(models.Interpretations, "make", staticmethod(counted))
    found = verdict(gold, predicted, max_size=3, rlimit=100_000, timeout_ms=5000)
    assert found.answer in ("equivalent", "different", "unknown")
    assert len(spent) <= 3
    assert max(spent, default=0) <= models.MAX_WORK


def test_z3_stops_at_its_step_limit_and_says_unknown() -> None:
    pytest.importorskip("z3")
    found = verdict(*HARD[1], rlimit=5_000, timeout_ms=60_000)
    assert (found.answer, found.by) == ("unknown", "limit")
    assert "z3" in found.reason


def test_twelve_quantifiers_cost_no_exponential_search() -> None:
    prefix = "".join(f"∀x{i} " for i in range(12))
    atom = f"P({', '.join(f'x{i}' for i in range(12))})"
    found = verdict(prefix + atom, prefix.replace("∀x3", "∃x3") + atom, solver=False)
    assert found.answer in ("different", "unknown")


def test_without_z3_the_answer_may_be_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def blocked(name: str, *arguments: Any, **named: Any) -> Any:
        if name == "z3":
            raise ImportError(name)
        return original(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", blocked)
    pair = ("∀x (P(x) ∧ Q(x))", "(∀x P(x)) ∧ ∀x Q(x)")
    found = verdict(*pair)
    assert (found.answer, found.by) == ("unknown", "limit")
    assert "mmalign[logic]" in found.reason
    with pytest.raises(ImportError, match=r"mmalign\[logic\]"):
        verdict(*pair, solver=True)


@pytest.mark.parametrize("options", [{"timeout_ms": 0}, {"rlimit": 0}, {"max_size": -1}])
def test_limits_without_a_meaning_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        verdict("P", "P", **options)


# -- symbols -----------------------------------------------------------------------------------------------------------------


def test_nearest_symbols_take_the_names_of_gold() -> None:
    gold = parse("∀x (Cat(x) → Likes(x, tom))")
    predicted = with_symbols_of(gold, parse("∀y (Cats(y) → Like(y, thomas))"))
    assert decide(gold, predicted, solver=False).answer == "equivalent"
    assert with_symbols_of(gold, parse("Cat(tom)")) == parse("Cat(tom)")
    kept = with_symbols_of(parse("P(a)"), parse("Q(a, b)"))  # no symbol with as many arguments
    assert kept == parse("Q(a, b)")


def test_a_bound_variable_never_catches_a_constant_of_gold() -> None:
    gold, predicted = parse("∀x Likes(x, tom)"), parse("∀tom Likes(tom, thomas)")
    renamed = with_symbols_of(gold, predicted)
    assert isinstance(renamed, Quantified)
    assert renamed.variable != "tom"
    assert decide(gold, renamed, solver=False).answer == "equivalent"


def test_symbols_stay_apart() -> None:
    """A predicate that gold has is not renamed, however near another one is."""
    gold = parse("P(a) ∧ Pq(a)")
    assert with_symbols_of(gold, parse("P(a) ∧ Pr(a)")) == parse("P(a) ∧ Pq(a)")
