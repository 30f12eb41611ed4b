"""Tracing programs that a model has written by running them, each in a confined process of its own.

:mod:`mmalign.data.straight_line` interprets assignments of arithmetic and nothing else; this runs any statements (loops,
functions, strings) under :mod:`mmalign.rewards.sandbox` and reads the numbers that the variables hold after each.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence

from mmalign.data.straight_line import MAX_BITS, Number, ProgramError, Trace, parse_bounded
from mmalign.rewards.sandbox import Sandbox

MODULES = frozenset({"math", "fractions", "decimal", "statistics", "itertools", "functools", "collections", "datetime", "re"})
"""Modules that a program may import."""

_NAMES = frozenset({
    "eval", "exec", "compile", "open", "globals", "locals", "vars", "getattr", "setattr", "delattr", "breakpoint", "input",
    "help", "memoryview", "classmethod", "staticmethod", "super", "object", "type",
})
_ATTRIBUTES = ("_", "f_", "tb_", "gi_", "cr_", "ag_", "func_", "format_map")

TRACER = '''
import ast as _ast
_source = {source!r}
states = []
_space = {{"__name__": "__main__", "__builtins__": __builtins__}}
for _node in _ast.parse(_source).body:
    exec(compile(_ast.Module([_node], []), "program.py", "exec"), _space)
    states.append({{_name: _value + 0 for _name, _value in _space.items()
                   if type(_value) in (int, float, bool) and not _name.startswith("_")}})
'''
"""Runs the statements one by one in a namespace of their own. ``bool + 0`` is an int."""


def statements_of(text: str) -> tuple[str, ...]:
    """The top-level statements of a program, each as its source text.

    Raises ProgramError for syntax errors, more than 256 statements or 8000 characters, imports beyond a list, and names and
    attributes that lead out of the program (``eval``, ``__class__``, frames): not for safety, which the sandbox gives, but so
    that a program cannot write its own trace.
    """
    source, tree = parse_bounded(text)
    for node in ast.walk(tree):
        _check(node)
    return tuple((ast.get_source_segment(source, node) or "").strip() for node in tree.body)


def _check(node: ast.AST) -> None:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        foreign = [name for name in modules if name not in MODULES]
        if foreign or (isinstance(node, ast.ImportFrom) and node.level):
            raise ProgramError(f"import of {foreign[0] if foreign else '.'!r}: allowed are {', '.join(sorted(MODULES))}")
    elif isinstance(node, ast.Name) and (node.id in _NAMES or node.id.startswith("_")):
        raise ProgramError(f"{node.id!r} is not allowed in a traced program")
    elif isinstance(node, ast.Attribute) and node.attr.startswith(_ATTRIBUTES):
        raise ProgramError(f"the attribute {node.attr!r} is not allowed in a traced program")
    elif isinstance(node, (ast.AsyncFunctionDef, ast.Await, ast.ClassDef)):
        raise ProgramError(f"{type(node).__name__} is not allowed in a traced program")


def trace_in_sandbox(texts: Sequence[str], sandbox: Sandbox) -> list[Trace | ProgramError]:
    """The trace of every program, or what is wrong with it; each runs in a process of its own, several at a time.

    States hold the variables that are numbers (truth values count as 0 and 1). A program that fails, is stopped by a limit,
    or reaches a number that is not finite or has more than 512 bits has no trace.
    """
    found: list[Trace | ProgramError] = []
    wanted: list[tuple[int, tuple[str, ...]]] = []
    for place, text in enumerate(texts):
        try:
            program = statements_of(text)
            wanted.append((place, program))
            found.append(Trace(program, ()))
        except ProgramError as error:
            found.append(error)
    results = sandbox.run([TRACER.format(source="\n".join(program)) for _, program in wanted], variable="states")
    for (place, program), result in zip(wanted, results, strict=True):
        if result.status != "ok" or not result.has_value:
            found[place] = ProgramError(f"ended with {result.status}" + (f" ({result.error})" if result.error else ""))
            continue
        try:
            found[place] = Trace(program, tuple(_state(state) for state in result.value))
        except ProgramError as error:
            found[place] = error
    return found


def _state(state: dict[str, Number]) -> dict[str, Number]:
    for name, value in state.items():
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise ProgramError(f"{name} is a number of more than {MAX_BITS} bits")
        if isinstance(value, float) and not math.isfinite(value):
            raise ProgramError(f"{name} is not a finite number")
    return dict(state)
