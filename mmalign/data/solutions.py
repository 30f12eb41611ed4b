"""What is known of a task: its fully correct programs, partially correct ones, and the states they pass through.

After Ni et al. 2022, arXiv 2205.14318: a sampled program is compared, state by state, with the programs known so far. What it
has right up to its furthest known state is kept as a partial solution from which later samples start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from mmalign.config import Options
from mmalign.data.straight_line import Program, StateKey, Trace, state_key, trace_program
from mmalign.errors import DataError

Outcome = Literal["full", "partial", "known", "wrong", "crowded"]
"""Kept as fully or partially correct; nothing new in it; no state of it known; no room left."""

Table = dict[tuple[str, ...], int]


class SolutionOptions(Options):
    """Which samples count as solutions, and how many are kept."""

    partial: bool = True
    """Keep partially correct programs and sample on from them; false keeps whole right programs only."""
    state_key: StateKey = "values"
    """values: states agree when their numbers do, whatever the variables are called. names: names as well."""
    length_tolerance: int = 0
    """Statements that a program may have beyond the shortest one known to reach the same state; the published code calls it
    length_diff_tolerance."""
    variable: str = "answer"
    """The variable that holds the answer; a program ends where it is first assigned."""
    tolerance: float = 1e-4
    """Largest distance of a right answer from the true one."""
    max_buffer_size: int = 100
    """Fully correct, and partially correct, programs kept of a task; later ones are not kept."""
    marg_set_size: int = 100
    """Programs of a task in one update; with more, some are drawn at random."""
    prioritize_fcp: bool = True
    """When some must be left out, leave partially correct ones out first."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse values without a meaning."""
        for name in ("max_buffer_size", "marg_set_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.length_tolerance < 0 or self.tolerance < 0:
            raise ValueError("length_tolerance and tolerance cannot be negative")
        if not self.variable.isidentifier():
            raise ValueError(f"variable must be a Python name, not {self.variable!r}")


class Judgement(NamedTuple):
    """How far a program is right: its outcome, and the statements that are kept."""

    outcome: Outcome
    program: Program


def is_prefix(first: Program, second: Program) -> bool:
    """Whether ``second`` begins with the statements of ``first`` (or is it)."""
    return second[: len(first)] == first


class Solutions:
    """The buffers F (``full``) and P (``partial``) of one task, and the table S of states (``table``).

    ``full[0]`` is the reference; ``partial[0]`` is always the empty program, from which whole programs are sampled. ``table``
    maps a state to the fewest statements known to reach it. Raises DataError for a reference that does not arrive at its
    answer.
    """

    def __init__(self, gold: str | Program | Trace, answer: float, options: SolutionOptions) -> None:
        self.answer, self.options = answer, options
        trace = gold if isinstance(gold, Trace) else trace_program(gold)
        end = self._answered(trace)
        if end is None or not self._right(trace, end):
            found = "never assigns it" if end is None else f"gives {trace.states[end - 1][options.variable]}"
            raise DataError(f"the reference program does not arrive at {options.variable} = {answer:.10g}: it {found}")
        self.full: list[Program] = [trace.program[:end]]
        self.partial: list[Program] = [()]
        self.table: Table = {}
        self._register(trace, end - 1)

    def add(self, trace: Trace) -> Judgement:
        """Keep what is right and new in a sampled program."""
        length, right = self._furthest(trace)
        program = trace.program[:length]
        if not length:
            return Judgement("wrong", program)
        buffer = self.full if right else self.partial
        if program in self.full if right else any(is_prefix(program, other) for other in (*self.full, *self.partial)):
            return Judgement("known", program)
        if len(buffer) - (not right) >= self.options.max_buffer_size:  # the empty program takes no room
            return Judgement("crowded", program)
        self.partial[1:] = [other for other in self.partial[1:] if not is_prefix(other, program)]
        buffer.append(program)
        self._register(trace, length - right)
        return Judgement("full" if right else "partial", program)

    def _furthest(self, trace: Trace) -> tuple[int, bool]:
        """Statements up to the furthest state that is right or known, and whether it is the answer."""
        options = self.options
        end = self._answered(trace)
        if end is not None and self._right(trace, end) and self._short_enough(end):
            return end, True
        if not options.partial:
            return 0, False
        furthest = 0
        for length, state in enumerate(trace.states[: len(trace.states) if end is None else end - 1], 1):
            shortest = self.table.get(state_key(state, options.state_key))
            if shortest is not None and length - shortest <= options.length_tolerance:
                furthest = length
        return furthest, False

    def _short_enough(self, length: int) -> bool:
        return not self.options.partial or length - min(map(len, self.full)) <= self.options.length_tolerance

    def _answered(self, trace: Trace) -> int | None:
        """Statements up to the first assignment of the answer."""
        return next((i for i, state in enumerate(trace.states, 1) if self.options.variable in state), None)

    def _right(self, trace: Trace, end: int) -> bool:
        return abs(trace.states[end - 1][self.options.variable] - self.answer) <= self.options.tolerance

    def _register(self, trace: Trace, length: int) -> None:
        if self.options.partial:
            for i, state in enumerate(trace.states[:length], 1):
                key = state_key(state, self.options.state_key)
                self.table[key] = min(i, self.table.get(key, i))

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Both buffers and the table, as JSON."""
        return {"full": [list(program) for program in self.full], "partial": [list(program) for program in self.partial],
                "table": [[list(key), length] for key, length in self.table.items()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.full = [tuple(program) for program in state["full"]]
        self.partial = [tuple(program) for program in state["partial"]]
        self.table = {tuple(key): int(length) for key, length in state["table"]}


@dataclass(frozen=True)
class Task:
    """A problem with a reference program: what a row of the data holds."""

    prompt: Any
    """Text, or messages."""
    gold: str
    answer: float
