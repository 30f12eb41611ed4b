"""Worked answers with calculator annotations (``<<48/2=24>>``, as GSM8K writes them) -> straight-line programs."""

from __future__ import annotations

import re

from mmalign.data.straight_line import ProgramError, canonical_number, trace_program

_ANNOTATION = re.compile(r"<<([^<>=]+)=([^<>=]+)>>")
_NUMBER = re.compile(r"(?<![\w.])(?:\d+(?:\.\d*)?|\.\d+)")


class CalculatorError(ValueError):
    """A worked answer has no annotations, or they do not lead to its answer."""


def calculator_program(worked: str, *, tolerance: float = 1e-4) -> str:
    """The annotated calculations of a worked answer as a program.

    Constants come first (``n0=48``), a line for each calculation follows (``t0=n0/n1``), the last one assigns ``answer``. A
    number that an earlier calculation gave stands for its result, any other is a constant. Numbers with separators
    (``1,200``), currency and percent signs are read; after ``####`` stands the answer that must come out.

    The form is that of Ni et al. 2022, arXiv 2205.14318, for GSM8K (Cobbe et al. 2021, arXiv 2110.14168).

    >>> print(calculator_program("He sold 48/2=<<48/2=24>>24, so 48+24=<<48+24=72>>72 #### 72"))
    n0=48
    n1=2
    t0=n0/n1
    answer=n0+t0

    Raises CalculatorError.
    """
    found = [(_plain(left), _plain(right)) for left, right in _ANNOTATION.findall(worked)]
    if not found:
        raise CalculatorError("no calculator annotation <<...=...>> in the worked answer")
    constants: dict[str, str] = {}
    results: dict[str, str] = {}
    lines = []
    for number, (expression, result) in enumerate(found):
        def name(match: re.Match[str]) -> str:
            key = canonical_number(float(match[0]))
            return results.get(key) or constants.setdefault(key, f"n{len(constants)}")

        target = "answer" if number == len(found) - 1 else f"t{number}"
        lines.append(f"{target}={_NUMBER.sub(name, expression)}")
        try:
            results[canonical_number(float(result))] = target
        except ValueError:
            raise CalculatorError(f"the annotation {expression}={result} does not give a number") from None
    program = "\n".join([*(f"{name}={value}" for value, name in constants.items()), *lines])
    _verify(program, [float(result) for _, result in found], len(constants), worked, tolerance)
    return program


def _plain(text: str) -> str:
    return re.sub(r"[\s,$]", "", text).rstrip("%")


def _verify(program: str, results: list[float], constants: int, worked: str, tolerance: float) -> None:
    try:
        states = trace_program(program).states[constants:]
    except ProgramError as error:
        raise CalculatorError(f"the annotations make no program: {error}") from None
    for i, (state, expected) in enumerate(zip(states, results, strict=True)):
        value = state["answer" if i == len(results) - 1 else f"t{i}"]
        if abs(value - expected) > max(tolerance, 5e-3):  # annotations are written with two decimals
            raise CalculatorError(f"annotation {i + 1} says {expected:g}, the calculation gives {value:g}")
    _, marker, truth = worked.rpartition("####")
    if marker:
        try:
            answer = float(_plain(truth))
        except ValueError:
            raise CalculatorError(f"the answer after #### is no number: {truth.strip()!r}") from None
        if abs(states[-1]["answer"] - answer) > tolerance:
            raise CalculatorError(f"the last calculation gives {states[-1]['answer']:g}, the answer is {answer:g}")
