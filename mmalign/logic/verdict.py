"""Are two formulas equivalent, quantifiers included? A truth table, small finite models, then z3; "unknown" is an answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mmalign.logic.equivalence import MAX_LITERALS, edit_distance, truth_table
from mmalign.logic.formula import EQUALS, Atom, Binary, Formula, Not, Quantified, Term, canonical_variables, children, map_terms
from mmalign.logic.models import Signature, separating_size

Answer = Literal["equivalent", "different", "unknown"]


@dataclass(frozen=True)
class Verdict:
    """An answer and where it comes from."""

    answer: Answer
    by: Literal["truth_table", "finite_model", "z3", "limit"]
    """``limit``: no way to decide came to an end within its bounds."""
    reason: str = ""


def decide(
    gold: Formula, predicted: Formula, *, max_literals: int = MAX_LITERALS, max_size: int = 3, solver: bool | None = None,
    timeout_ms: int = 2000, rlimit: int = 1_000_000,
) -> Verdict:
    """Whether two formulas are true in the same (non-empty) models, with the same symbols meaning the same.

    Free variables count as constants. Bounded in three ways: truth tables of at most ``2 ** max_literals`` rows, finite models
    with at most ``max_size`` things (a fixed amount of work each), and z3 limited to ``rlimit`` of its own steps as well as to
    ``timeout_ms`` milliseconds. ``solver``: ask z3 (the extra ``logic``); None asks it where it is installed.
    Raises ValueError for limits without a meaning, and ImportError with ``solver=True`` and no z3.
    """
    if max_size < 0 or timeout_ms < 1 or rlimit < 1:
        raise ValueError("max_size must not be negative, timeout_ms and rlimit must be at least 1, not "
                         f"{max_size}, {timeout_ms}, {rlimit}")
    if same_by_truth_table(gold, predicted, max_literals=max_literals):
        return Verdict("equivalent", "truth_table")
    size = separating_size(gold, predicted, max_size=max_size)
    if size is not None:
        return Verdict("different", "finite_model", f"a model with {size} thing{'s' if size > 1 else ''}")
    if solver is False:
        return Verdict("unknown", "limit", "no small model tells them apart, and z3 was not asked")
    try:
        import z3
    except ImportError:
        if solver:
            raise ImportError("solver=True needs z3; install it with `pip install mmalign[logic]`") from None
        return Verdict("unknown", "limit", "no small model tells them apart; z3 (pip install mmalign[logic]) is not installed")
    return _ask_z3(z3, gold, predicted, timeout_ms=timeout_ms, rlimit=rlimit)


def same_by_truth_table(gold: Formula, predicted: Formula, *, max_literals: int = MAX_LITERALS) -> bool:
    """Whether truth tables prove equivalence, quantified parts being taken as wholes; False proves nothing.

    Names of bound variables do not matter, and quantifiers that both begin with are passed through.
    """
    joined = canonical_variables(Binary("∧", gold, predicted))  # together, so that their variables get the same names
    assert isinstance(joined, Binary)
    first, second = _universal(joined.left), _universal(joined.right)
    while (isinstance(first, Not) and isinstance(second, Not)) or (
            isinstance(first, Quantified) and isinstance(second, Quantified) and first.variable == second.variable):
        first, second = first.body, second.body
    units = tuple(dict.fromkeys([*_units(first), *_units(second)]))
    if len(units) > max_literals:
        return first == second
    places: dict[Formula, int] = {unit: place for place, unit in enumerate(units)}
    return bool((truth_table(first, places, len(units)) == truth_table(second, places, len(units))).all())


def _universal(formula: Formula) -> Formula:
    """``∃x F`` written as ``¬∀x ¬F``, without double negations."""
    if isinstance(formula, Atom):
        return formula
    if isinstance(formula, Binary):
        return Binary(formula.operator, _universal(formula.left), _universal(formula.right))
    body = _universal(formula.body)
    if isinstance(formula, Quantified) and formula.quantifier == "∀":
        return Quantified("∀", formula.variable, body)
    negated = body.body if isinstance(body, Not) else Not(body)
    return negated if isinstance(formula, Not) else Not(Quantified("∀", formula.variable, negated))


def _units(formula: Formula) -> list[Formula]:
    """Atoms and whole quantified formulas below connectives."""
    if isinstance(formula, (Atom, Quantified)):
        return [formula]
    return [unit for child in children(formula) for unit in _units(child)]


def _ask_z3(z3: Any, gold: Formula, predicted: Formula, *, timeout_ms: int, rlimit: int) -> Verdict:
    """Whether ``gold xor predicted`` has a model, in a solver and context of its own."""
    context = z3.Context()
    sort = z3.DeclareSort("Thing", context)
    truth = z3.BoolSort(context)
    declared: dict[tuple[str, str, int], Any] = {}

    def symbol(kind: str, name: str, arity: int, result: Any) -> Any:
        key = (kind, name, arity)
        if key not in declared:
            declared[key] = z3.Function(f"{kind} {name}/{arity}", *[sort] * arity, result)
        return declared[key]

    def term(node: Term, bound: dict[str, Any]) -> Any:
        if not node.arguments and node.name in bound:
            return bound[node.name]
        return symbol("function", node.name, len(node.arguments), sort)(*(term(argument, bound) for argument in node.arguments))

    def translate(node: Formula, bound: dict[str, Any]) -> Any:
        if isinstance(node, Atom):
            terms = [term(part, bound) for part in node.terms]
            if node.predicate == EQUALS:
                return terms[0] == terms[1]
            return symbol("predicate", node.predicate, len(terms), truth)(*terms)
        if isinstance(node, Not):
            return z3.Not(translate(node.body, bound))
        if isinstance(node, Quantified):
            variable = z3.Const(f"variable {node.variable} {len(bound)}", sort)
            body = translate(node.body, {**bound, node.variable: variable})
            return (z3.ForAll if node.quantifier == "∀" else z3.Exists)([variable], body)
        left, right = translate(node.left, bound), translate(node.right, bound)
        joined = {"∧": z3.And, "∨": z3.Or, "⊕": z3.Xor, "→": z3.Implies}
        return joined[node.operator](left, right) if node.operator in joined else left == right

    solver = z3.Solver(ctx=context)
    solver.set("timeout", timeout_ms)
    solver.set("rlimit", rlimit)
    solver.set("random_seed", 0)
    solver.add(z3.Xor(translate(gold, {}), translate(predicted, {})))
    found = solver.check()
    if found == z3.unsat:
        return Verdict("equivalent", "z3")
    if found == z3.sat:
        return Verdict("different", "z3", "a model found by z3")
    return Verdict("unknown", "limit", f"z3: {solver.reason_unknown()}")


def with_symbols_of(gold: Formula, predicted: Formula) -> Formula:
    """``predicted`` with the predicates, constants and functions that ``gold`` lacks renamed to those that it has beside.

    Each goes to the nearest unused symbol (edit distance) with as many arguments; those without one keep their name.
    """
    wanted, found = Signature.of([gold]), Signature.of([predicted])
    predicates = _nearest(list(wanted.predicates), list(found.predicates))
    functions = _nearest(list(wanted.functions), list(found.functions))

    def rename_term(node: Term, bound: frozenset[str]) -> Term:
        def change(part: Term) -> Term:
            if not part.arguments and part.name in bound:
                return part
            return Term(functions.get((part.name, len(part.arguments)), part.name), part.arguments)

        return map_terms(node, change)

    def rename(node: Formula, bound: frozenset[str]) -> Formula:
        if isinstance(node, Atom):
            name = predicates.get((node.predicate, len(node.terms)), node.predicate)
            return Atom(name, tuple(rename_term(part, bound) for part in node.terms))
        if isinstance(node, Not):
            return Not(rename(node.body, bound))
        if isinstance(node, Quantified):
            return Quantified(node.quantifier, node.variable, rename(node.body, bound | {node.variable}))
        return Binary(node.operator, rename(node.left, bound), rename(node.right, bound))

    # Bound variables move out of the way first, so that no symbol of gold is caught by a quantifier.
    joined = canonical_variables(Binary("∧", gold, predicted))
    assert isinstance(joined, Binary)
    return rename(joined.right, frozenset())


def _nearest(wanted: list[tuple[str, int]], found: list[tuple[str, int]]) -> dict[tuple[str, int], str]:
    """Symbol of ``found`` -> name in ``wanted``, closest pairs first; each name is used once."""
    free = [symbol for symbol in wanted if symbol not in found]
    open_ = [symbol for symbol in found if symbol not in wanted]
    pairs = sorted((edit_distance(a[0], b[0]), i, j) for i, a in enumerate(open_) for j, b in enumerate(free) if a[1] == b[1])
    result: dict[tuple[str, int], str] = {}
    used: set[int] = set()
    for _, i, j in pairs:
        if open_[i] not in result and j not in used:
            result[open_[i]] = free[j][0]
            used.add(j)
    return result
