"""Reading and writing formulas: precedence, spellings, round trips, limits, and errors that say where."""

from __future__ import annotations

import pytest
from formulas import formulas
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.logic.formula import Atom, Binary, Not, Quantified, Term, to_text
from mmalign.logic.parser import MAX_DEPTH, MAX_LENGTH, FormulaError, formula_tokens, parse, try_parse

P, Q, R = Atom("P"), Atom("Q"), Atom("R")


@pytest.mark.parametrize(("text", "tree"), [
    ("¬P ∧ Q", Binary("∧", Not(P), Q)),
    ("P ∧ Q ∨ R", Binary("∨", Binary("∧", P, Q), R)),
    ("P ∨ Q ⊕ R", Binary("⊕", Binary("∨", P, Q), R)),
    ("P ⊕ Q → R", Binary("→", Binary("⊕", P, Q), R)),
    ("P → Q ↔ R", Binary("↔", Binary("→", P, Q), R)),
    ("P → Q → R", Binary("→", P, Binary("→", Q, R))),
    ("P ∧ Q ∧ R", Binary("∧", Binary("∧", P, Q), R)),
    ("P ↔ Q ↔ R", Binary("↔", Binary("↔", P, Q), R)),
    ("¬¬P", Not(Not(P))),
    ("∀x P ∧ Q", Quantified("∀", "x", Binary("∧", P, Q))),
    ("(∀x P) ∧ Q", Binary("∧", Quantified("∀", "x", P), Q)),
    ("P → ∃y Q ∨ R", Binary("→", P, Quantified("∃", "y", Binary("∨", Q, R)))),
    ("¬∃x P", Not(Quantified("∃", "x", P))),
    ("∀x,long ∃z P", Quantified("∀", "x", Quantified("∀", "long", Quantified("∃", "z", P)))),
    ("P(f(x), tom, 3)", Atom("P", (Term("f", (Term("x"),)), Term("tom"), Term("3")))),
    ("x ≠ f(y)", Not(Atom("=", (Term("x"), Term("f", (Term("y"),)))))),
])
def test_precedence_and_scope(text, tree):
    assert parse(text) == tree


@pytest.mark.parametrize("text", [
    "forall x (P(x) & ~Q(x) -> R(x) | S(x))", "FORALL x (P(x) AND NOT Q(x) IMPLIES R(x) OR S(x))",
    r"\forall x (P(x) \land \neg Q(x) \rightarrow R(x) \lor S(x))", "∀x. [P(x) && !Q(x) => R(x) || S(x)]",
    "∀ x : P(x) /\\ ¬Q(x) ⇒ R(x) \\/ S(x)",
])
def test_spellings_are_one_formula(text):
    assert parse(text) == parse("∀x (P(x) ∧ ¬Q(x) → R(x) ∨ S(x))")


def test_words_that_begin_with_a_keyword_are_names():
    assert parse("nothing(x) and order(orx)") == Binary("∧", Atom("nothing", (Term("x"),)), Atom("order", (Term("orx"),)))


@given(formulas())
def test_what_is_written_is_read(formula):
    assert parse(str(formula)) == formula
    assert parse(to_text(formula, ascii=True)) == formula
    assert to_text(formula, ascii=True).replace("Réel", "").isascii()


@settings(max_examples=400)
@given(st.text(alphabet=st.one_of(st.sampled_from("∀∃¬∧∨⊕→↔()[],.:=<>-&|~!xyPQ 1\\\n"), st.characters()), max_size=60))
def test_no_text_raises_anything_else(text):
    for compat in (False, True):
        if try_parse(text, compat=compat) is None:
            with pytest.raises(FormulaError) as caught:
                parse(text, compat=compat)
            assert 0 <= caught.value.position <= len(text)
            assert caught.value.problem in str(caught.value)
        else:
            assert parse(str(parse(text))) == parse(text) if not compat else formula_tokens(text, compat=True)


@pytest.mark.parametrize(("text", "position", "part"), [
    ("", 0, "no formula"), ("   \n", 4, "no formula"), ("P(x", 3, "closing bracket"), ("P(x))", 4, "without an opening"),
    ("(P ∧ Q", 6, "closing bracket"), ("P ∧", 3, "text ends"), ("∧ P", 0, "expected a formula"), ("P Q", 2, "operator"),
    ("P(x,)", 4, "a term"), ("∀ (P)", 2, "variable"), ("3 ∧ P", 0, "number"), ("P # Q", 2, "unexpected"), ("P(and)", 2, "a term"),
    ("∀xP(x)", 3, "space between"), ("P ∧ 1x", 4, "unexpected"),
])
def test_errors_say_what_and_where(text, position, part):
    with pytest.raises(FormulaError, match="character") as caught:
        parse(text)
    assert caught.value.position == position
    assert part in str(caught.value)
    assert try_parse(text) is None


@pytest.mark.parametrize("text", [
    "(" * 5000, "(" * 1000 + "P" + ")" * 1000, "¬" * 1000 + "P", "P(" * 1000, "P→" * 1000 + "P", "P∧" * 1000 + "P",
    "∀x " * 900 + "P", "∀" + ",".join(f"x{i}" for i in range(500)) + " P",
])
def test_deep_and_long_text_is_refused(text):
    with pytest.raises(FormulaError, match=rf"nested deeper than {MAX_DEPTH}|more than the {MAX_LENGTH}"):
        parse(text)


def test_what_the_limit_allows_is_read():
    assert parse("P∧" * (MAX_DEPTH - 1) + "P")
    assert parse("¬" * (MAX_DEPTH - 1) + "P")


@pytest.mark.parametrize(("text", "expected"), [
    ("∀xdc universe(x) ∧ heroes(x)", "∀x (DcUniverse(x) ∧ Heroes(x))"),
    ("Rich(x) → ∃y Owns(x, y)", "∃y (Rich(x) → Owns(x, y))"),
    ("∀x ∃y (P(x) ∧ ¬Q(y))", "∀x ∃y (P(x) ∧ ¬Q(y))"),
    ("forall x P(x)", "ForallxP(x)"),
])
def test_compat_reads_as_the_published_parser(text, expected):
    assert str(parse(text, compat=True)) == expected


@pytest.mark.parametrize("text", ["¬∃x P(x)", "P → Q", "P(x) & Q(x)", "P(f(x))", "x = y"])
def test_compat_refuses_what_the_published_parser_does_not_read(text):
    with pytest.raises(FormulaError):
        parse(text, compat=True)


@pytest.mark.parametrize("make", [
    lambda: Atom("not"), lambda: Atom("1P"), lambda: Atom("P Q"), lambda: Atom("=", (Term("x"),)), lambda: Term("x y"),
    lambda: Binary("&", P, Q), lambda: Quantified("every", "x", P), lambda: Quantified("∀", "3", P),
])
def test_trees_that_could_not_be_written_are_refused(make):
    with pytest.raises(ValueError, match=r"name|operator|quantifier|equality"):
        make()
