"""Rewards that run the program in a completion: its output or answer, or its tests. Never in this process.

Programs are untrusted; see :mod:`mmalign.rewards.sandbox` for what confines them. The truth (``answer``) is never shown to
the program, and tests run in another process than it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from mmalign.config import parse
from mmalign.data.straight_line import ProgramError, canonical_number, trace_program
from mmalign.errors import ConfigError
from mmalign.rewards.maths import last_number, parse_number
from mmalign.rewards.registry import reward
from mmalign.rewards.sandbox import ProgramResult, Sandbox, SandboxOptions
from mmalign.rewards.text import completion_text

Where = Literal["auto", "fence", "whole"]
Read = Literal["stdout", "variable"]

_FENCE = re.compile(r"```[ \t]*(?:python|py|python3)?[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


def extract_program(text: str, where: Where = "auto") -> str:
    """The program in a completion: the last fenced block (``fence``; empty when there is none), or the whole text.

    ``auto`` takes a fenced block if there is one.
    """
    if where not in ("auto", "fence", "whole"):
        raise ConfigError(f"rewards.extract: {where!r} is unknown; allowed: auto, fence, whole")
    blocks = _FENCE.findall(text) if where != "whole" else []
    return blocks[-1] if blocks else "" if where == "fence" else text


def same_answer(found: Any, expected: Any, *, tolerance: float) -> bool:
    """Whether a program's value is the expected one: numbers within an absolute ``tolerance``, anything else as text."""
    if isinstance(found, bool) or found is None:
        return str(found) == str(expected).strip()
    number = parse_number(str(expected))
    if number is None:
        return str(found).strip() == str(expected).strip()
    given = parse_number(str(found))
    return given is not None and abs(given.value - number.value) <= tolerance


class _Runner:
    """What the rewards of this module share: a sandbox, made when the reward is, so that a machine without one is refused
    before any training."""

    def __init__(self, extract: Where, bounds: dict[str, Any]) -> None:
        extract_program("", extract)
        self.extract = extract
        self.sandbox = Sandbox(parse(SandboxOptions, bounds, root="rewards"))
        self.sandbox.isolation  # noqa: B018 - raises where a required guarantee cannot be kept

    def programs(self, completions: Sequence[Any]) -> list[str]:
        return [extract_program(completion_text(completion), self.extract) for completion in completions]

    @staticmethod
    def log(results: Sequence[ProgramResult], log_extra: Any, log_metric: Any) -> None:
        if log_extra is not None:
            log_extra("program_status", [result.status for result in results])
        if log_metric is not None and results:
            for status in ("ok", "error", "timeout", "memory", "output_limit", "killed"):
                log_metric(f"programs/{status}", sum(result.status == status for result in results) / len(results))


@reward("execution_match", aliases=("program_output",), range=(0, 1), needs=("answer",))
class ExecutionMatch(_Runner):
    """1 where the program in the completion gives ``answer``: on standard output, or in a variable; else 0.

    Args:
        read: ``stdout``: all that it prints, outer white space ignored (for a number: the last one it prints).
            ``variable``: the global ``variable`` at its end.
        variable: name of that variable.
        extract: where the program stands in the completion, see :func:`extract_program`.
        prefix: code that runs before every program (imports).
        tolerance: absolute, for numbers.
        bounds: fields of :class:`~mmalign.rewards.sandbox.SandboxOptions` (``seconds``, ``memory_bytes``, ...).

    A program that raises, is stopped or exceeds a bound gives 0, whatever it printed before. A row whose ``answer`` is None
    gives None. Raises ConfigError when the machine cannot confine programs as required.
    """

    def __init__(
        self, *, read: Read = "stdout", variable: str = "answer", extract: Where = "auto", prefix: str = "",
        tolerance: float = 1e-4, **bounds: Any,
    ) -> None:
        if read not in ("stdout", "variable"):
            raise ConfigError(f"rewards.read: {read!r} is unknown; allowed: stdout, variable")
        if tolerance < 0:
            raise ConfigError(f"rewards.tolerance: {tolerance} cannot be negative")
        super().__init__(extract, bounds)
        self.read, self.variable, self.prefix, self.tolerance = read, variable, prefix, tolerance

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], *, log_extra: Any = None,
        log_metric: Any = None, **columns: Any,
    ) -> list[float | None]:
        """Run the programs, several at a time, and compare."""
        sources = [f"{self.prefix}\n{program}" if self.prefix else program for program in self.programs(completions)]
        results = self.sandbox.run(sources, variable=self.variable if self.read == "variable" else None)
        self.log(results, log_extra, log_metric)
        if log_extra is not None:
            log_extra("program_answer", [None if (value := self._value(result)) is None else str(value) for result in results])
        return [None if truth is None else float(self._right(result, truth))
                for result, truth in zip(results, answer, strict=True)]

    def _value(self, result: ProgramResult) -> Any:
        if result.status != "ok":
            return None
        return result.stdout.strip() if self.read == "stdout" else result.value

    def _right(self, result: ProgramResult, truth: Any) -> bool:
        value = self._value(result)
        if value is None:
            return False
        if self.read == "stdout" and parse_number(str(truth)) is not None:
            number = last_number(str(value).rpartition("\n")[2])
            return number is not None and same_answer(number.value, truth, tolerance=self.tolerance)
        return same_answer(value, truth, tolerance=self.tolerance)


@reward("unit_tests", range=(0, 1), needs=("tests",))
class UnitTests(_Runner):
    """Share of a row's tests that the program in the completion passes (``partial: false``: 1 for all of them, else 0).

    ``tests`` is Python source or a list of sources: assertions, or functions called ``test...``, which call the program's
    functions by name (or import them from ``program`` or ``solution``). They run in a process of their own, which exchanges
    plain values (numbers, text, containers) with the program's process: a program cannot read the tests, end them early, or
    return an object that equals everything.
    """

    def __init__(self, *, extract: Where = "auto", partial: bool = True, prefix: str = "", **bounds: Any) -> None:
        super().__init__(extract, bounds)
        self.partial, self.prefix = partial, prefix

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], tests: Sequence[Any], *, log_extra: Any = None,
        log_metric: Any = None, **columns: Any,
    ) -> list[float | None]:
        """Run every program's tests, several programs at a time; None for rows without tests."""
        lists = [[checks] if isinstance(checks, str) else list(checks or ()) for checks in tests]
        sources = [f"{self.prefix}\n{program}" if self.prefix else program for program in self.programs(completions)]
        judged = [i for i, checks in enumerate(lists) if checks]
        results = self.sandbox.run([sources[i] for i in judged], tests=[lists[i] for i in judged])
        values: list[float | None] = [None] * len(lists)
        for i, result in zip(judged, results, strict=True):
            share = sum(result.passed) / len(result.passed)
            values[i] = share if self.partial else float(share == 1)
        if len(judged) == len(lists):
            self.log(results, log_extra, log_metric)
        return values


@reward("straight_line_match", range=(0, 1), needs=("answer",))
def straight_line_match(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], *, variable: str = "answer",
    extract: Where = "auto", tolerance: float = 1e-4, log_extra: Any = None, **columns: Any,
) -> list[float | None]:
    """1 where a straight-line program (assignments of arithmetic) assigns ``answer`` to ``variable`` first, else 0.

    Programs are interpreted, never executed (:mod:`mmalign.data.straight_line`), which takes no process; anything else than
    a straight-line program gives 0. None where ``answer`` is None. The value is logged as ``program_answer``.
    """
    values: list[str | None] = []
    for completion in completions:
        try:
            states = trace_program(extract_program(completion_text(completion), extract)).states
        except ProgramError:
            states = ()
        values.append(next((canonical_number(state[variable]) for state in states if variable in state), None))
    if log_extra is not None:
        log_extra("program_answer", values)
    return [None if truth is None else float(value is not None and same_answer(value, truth, tolerance=tolerance))
            for value, truth in zip(values, answer, strict=True)]
