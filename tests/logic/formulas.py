"""Random formulas for property tests."""

from __future__ import annotations

from hypothesis import strategies as st

from mmalign.logic.formula import OPERATORS, QUANTIFIERS, Atom, Binary, Not, Quantified, Term

NAMES = ("P", "Q", "Likes", "big_cat", "Réel")
TERMS = ("x", "y", "tom", "x1", "3.5", "42")


def terms():
    plain = st.sampled_from(TERMS).map(Term)
    return st.one_of(plain, st.builds(lambda name, parts: Term(name, tuple(parts)), st.sampled_from(("f", "father")),
                                      st.lists(plain, min_size=1, max_size=2)))


def atoms():
    return st.one_of(
        st.builds(lambda name, parts: Atom(name, tuple(parts)), st.sampled_from(NAMES), st.lists(terms(), max_size=3)),
        st.builds(lambda a, b: Atom("=", (a, b)), terms(), terms()))


def formulas(leaves=None, *, max_leaves: int = 8):
    return st.recursive(atoms() if leaves is None else leaves, lambda inner: st.one_of(
        inner.map(Not), st.builds(Binary, st.sampled_from(OPERATORS), inner, inner),
        st.builds(Quantified, st.sampled_from(QUANTIFIERS), st.sampled_from(("x", "y", "other")), inner)), max_leaves=max_leaves)


def propositions(letters: str = "PQR", *, max_leaves: int = 6):
    return st.recursive(st.sampled_from(letters).map(Atom), lambda inner: st.one_of(
        inner.map(Not), st.builds(Binary, st.sampled_from(OPERATORS), inner, inner)), max_leaves=max_leaves)
