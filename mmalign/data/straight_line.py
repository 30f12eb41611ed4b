"""Straight-line programs (assignments of arithmetic to names), read and traced without ever being executed.

A program is a tuple of statements, each the source text of one assignment. What may occur is a list: numbers, names assigned
before, ``+ - * / // % **``, signs, parentheses, a few functions; anything else is an error. Sizes are bounded, so tracing a
program takes a bounded time. Used for programs that a model has written, after Ni et al. 2022, arXiv 2205.14318.
"""

from __future__ import annotations

import ast
import math
import operator
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Number = int | float
StateKey = Literal["values", "names"]
Program = tuple[str, ...]
"""Statements without comments, one assignment each."""

MAX_CHARACTERS = 8000
MAX_STATEMENTS = 256
MAX_DEPTH = 40
MAX_BITS = 512
MAX_EXPONENT = 256

_BINARY: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}
_FUNCTIONS: dict[str, tuple[Callable[..., Number], int, int]] = {
    "abs": (abs, 1, 1), "min": (min, 2, 16), "max": (max, 2, 16), "round": (round, 1, 2), "int": (int, 1, 1),
    "float": (float, 1, 1), "math.sqrt": (math.sqrt, 1, 1), "math.floor": (math.floor, 1, 1), "math.ceil": (math.ceil, 1, 1),
    "math.log": (math.log, 1, 2), "math.exp": (math.exp, 1, 1), "math.gcd": (math.gcd, 2, 2), "math.pow": (math.pow, 2, 2),
}
"""Function -> implementation, fewest and most arguments."""
_CONSTANTS = {"math.pi": math.pi, "math.e": math.e}


class ProgramError(ValueError):
    """A text is no straight-line program, or its trace breaks a rule of arithmetic or a bound."""


@dataclass(frozen=True)
class Trace:
    """The variables after every statement: ``states[i]`` follows ``program[i]``."""

    program: Program
    states: tuple[dict[str, Number], ...]

    def keys(self, how: StateKey = "values") -> list[tuple[str, ...]]:
        """:func:`state_key` of every state."""
        return [state_key(state, how) for state in self.states]


def read_program(text: str) -> Program:
    """The statements of a program; comments, blank lines and surrounding space do not belong to it.

    Raises ProgramError for syntax errors and for anything but assignments of permitted arithmetic to a single name.
    """
    return tuple(source for source, _, _ in _parse(text))


def write_program(program: Sequence[str]) -> str:
    """One statement per line, without a newline at the end."""
    return "\n".join(program)


def trace_program(text: str | Sequence[str]) -> Trace:
    """Run a program statement by statement on exact integers and floats, as Python would.

    Raises ProgramError naming the statement: syntax, a name without a value, division by zero, a result that is not a
    finite real number, or one of more than 512 bits.
    """
    statements = _parse(text if isinstance(text, str) else write_program(text))
    values: dict[str, Number] = {}
    states = []
    for number, (source, name, expression) in enumerate(statements, 1):
        try:
            values[name] = _evaluate(expression, values)
        except (ArithmeticError, ValueError, TypeError) as error:
            raise ProgramError(f"statement {number}, {source!r}: {error}") from None
        states.append(dict(values))
    return Trace(tuple(source for source, _, _ in statements), tuple(states))


def trace_programs(texts: Sequence[str]) -> list[Trace | ProgramError]:
    """:func:`trace_program` of several programs, what is wrong with one standing in its place."""
    found: list[Trace | ProgramError] = []
    for text in texts:
        try:
            found.append(trace_program(text))
        except ProgramError as error:
            found.append(error)
    return found


def canonical_number(value: Number) -> str:
    """Text of a number that is the same for 24 and 24.0: whole numbers as such, others with 10 significant digits."""
    if isinstance(value, int):
        return str(value)
    short = f"{value:.10g}"
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else short


def state_key(state: dict[str, Number], how: StateKey = "values") -> tuple[str, ...]:
    """What two states must share to count as the same.

    ``values``: the values alone, sorted, as published. Programs that name their variables otherwise agree, and so do programs
    that reached the same numbers with another meaning. ``names``: names and values.
    """
    if how == "names":
        return tuple(f"{name}={canonical_number(value)}" for name, value in sorted(state.items()))
    if how != "values":
        raise ValueError(f"state_key is {how!r}; allowed are values and names")
    return tuple(sorted(canonical_number(value) for value in state.values()))


def parse_bounded(text: str) -> tuple[str, ast.Module]:
    """The source without surrounding space, and its tree; raises ProgramError for bad syntax, or more text or statements than
    the bounds."""
    if len(text) > MAX_CHARACTERS:
        raise ProgramError(f"{len(text)} characters; a program has at most {MAX_CHARACTERS}")
    source = text.strip()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a model writes may be odd: 3t, "is" with a number
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ProgramError(f"not a program: {error}") from None
    if len(tree.body) > MAX_STATEMENTS:
        raise ProgramError(f"{len(tree.body)} statements; a program has at most {MAX_STATEMENTS}")
    return source, tree


def _parse(text: str) -> list[tuple[str, str, ast.expr]]:
    whole, tree = parse_bounded(text)
    found = []
    for node in tree.body:
        source = (ast.get_source_segment(whole, node) or "").strip()
        if not isinstance(node, ast.Assign) or len(node.targets) != 1 or not isinstance(node.targets[0], ast.Name):
            raise ProgramError(f"{source.partition(chr(10))[0]!r}: only assignments to one name are allowed")
        _check(node.value, source, 0)
        found.append((re.sub(r"\s*\n\s*", " ", _without_comments(source)), node.targets[0].id, node.value))
    return found


def _without_comments(source: str) -> str:
    # No string can occur in a permitted expression, so that every # starts a comment.
    return re.sub(r"#[^\n]*", "", source).strip()


def _check(node: ast.expr, source: str, depth: int) -> None:
    """Refuse whatever is not on the list, before anything is computed."""
    if depth > MAX_DEPTH:
        raise ProgramError(f"{source!r:.80}: nested more than {MAX_DEPTH} deep")
    children: list[ast.expr]
    if isinstance(node, ast.Name) or (isinstance(node, ast.Constant) and type(node.value) in (int, float)):
        children = []
    elif isinstance(node, ast.BinOp) and (type(node.op) in _BINARY or isinstance(node.op, ast.Pow)):
        children = [node.left, node.right]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        children = [node.operand]
    elif isinstance(node, ast.Attribute) and ast.unparse(node) in _CONSTANTS:
        children = []
    elif isinstance(node, ast.Call) and not node.keywords and _function_name(node) in _FUNCTIONS:
        _, fewest, most = _FUNCTIONS[_function_name(node)]
        if not fewest <= len(node.args) <= most:
            raise ProgramError(f"{source!r:.80}: {_function_name(node)} takes {fewest} to {most} numbers, not {len(node.args)}")
        children = list(node.args)
    else:
        raise ProgramError(f"{source!r:.80}: {type(node).__name__} is not allowed in a straight-line program")
    for child in children:
        _check(child, source, depth + 1)


def _function_name(node: ast.Call) -> str:
    if isinstance(node.func, ast.Name):
        return node.func.id
    if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
        return f"{node.func.value.id}.{node.func.attr}"
    return ""


def _evaluate(node: ast.expr, values: dict[str, Number]) -> Number:
    result: Number
    if isinstance(node, ast.Constant):
        assert isinstance(node.value, (int, float))
        result = node.value
    elif isinstance(node, ast.Name):
        if node.id not in values:
            raise ValueError(f"{node.id} has no value yet")
        result = values[node.id]
    elif isinstance(node, ast.Attribute):
        result = _CONSTANTS[ast.unparse(node)]
    elif isinstance(node, ast.UnaryOp):
        inner = _evaluate(node.operand, values)
        result = -inner if isinstance(node.op, ast.USub) else inner
    elif isinstance(node, ast.Call):
        result = _FUNCTIONS[_function_name(node)][0](*(_evaluate(argument, values) for argument in node.args))
    else:
        assert isinstance(node, ast.BinOp)
        left, right = _evaluate(node.left, values), _evaluate(node.right, values)
        result = _power(left, right) if isinstance(node.op, ast.Pow) else _BINARY[type(node.op)](left, right)
    if isinstance(result, int) and result.bit_length() > MAX_BITS:
        raise ValueError(f"a number of more than {MAX_BITS} bits")
    if not isinstance(result, (int, float)) or not math.isfinite(result):
        raise ValueError("the result is not a finite real number")
    return result


def _power(base: Number, exponent: Number) -> Number:
    if abs(exponent) > MAX_EXPONENT:
        raise ValueError(f"an exponent beyond {MAX_EXPONENT}")
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * max(exponent, 0) > 2 * MAX_BITS:
        raise ValueError(f"a number of more than {MAX_BITS} bits")
    result: Number = base ** exponent
    return result
