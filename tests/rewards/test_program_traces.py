"""Programs traced in a confined process: the interpreter's traces, more statements, and programs that misbehave."""

from __future__ import annotations

import pytest

from mmalign.data.straight_line import ProgramError, Trace, trace_program
from mmalign.data.word_programs import make_word_programs
from mmalign.rewards.program_traces import statements_of, trace_in_sandbox
from mmalign.rewards.sandbox import Sandbox, SandboxOptions


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return Sandbox(SandboxOptions(seconds=2, cpu_seconds=30, workers=2))


def test_straight_line_programs_have_the_trace_of_the_interpreter(sandbox: Sandbox) -> None:
    texts = [program for row in make_word_programs(3, split="train", seed=0) for program in row["programs"][:2]]
    texts.append("a = 7 / 2\n# a comment\nb = -a ** 2\nanswer = round(b, 1)")
    assert len(texts) > 3
    for text, trace in zip(texts, trace_in_sandbox(texts, sandbox), strict=True):
        assert isinstance(trace, Trace)
        assert trace.states == trace_program(text).states
        assert len(trace.program) == len(trace.states)


def test_loops_functions_and_imports_are_statements_like_others(sandbox: Sandbox) -> None:
    text = "import math\ntotal = 0\nfor i in range(4):\n    total += i\ndef f(x):\n    return x + 1\nok = True\nanswer = f(total)"
    (trace,) = trace_in_sandbox([text], sandbox)
    assert isinstance(trace, Trace)
    assert trace.program[2] == "for i in range(4):\n    total += i"
    assert trace.states[0] == {}
    assert trace.states[-1] == {"total": 6, "i": 3, "ok": 1, "answer": 7}
    assert type(trace.states[-1]["ok"]) is int


@pytest.mark.parametrize(("text", "part"), [
    ("while True:\n    a = 1", "timeout"),
    ("a = 1\nb = a / 0", "ZeroDivisionError"),
    ("a = 10.0 ** 300\nb = a * a", "finite"),
    ("a = 1 << 600", "512 bits"),
    ("a = [0] * 10 ** 9", "memory"),
    ("print('x' * 10 ** 6)\na = 1", "output_limit"),
    ("import os", "import of 'os'"),
    ("from . import x", "import of"),
    ("states = (lambda: 0).__globals__", "__globals__"),
    ("a = exec('1')", "exec"),
    ("g = (i for i in [1])\nh = g.gi_frame", "gi_frame"),
    ("a = (", "not a program"),
])
def test_what_has_no_trace_says_why_and_disturbs_nobody(text: str, part: str, sandbox: Sandbox) -> None:
    bad, good = trace_in_sandbox([text, "answer = 1"], sandbox)
    assert isinstance(bad, ProgramError)
    assert part in str(bad)
    assert isinstance(good, Trace)
    assert good.states == ({"answer": 1},)


def test_bounds_of_the_text() -> None:
    with pytest.raises(ProgramError, match="at most 256"):
        statements_of("a = 1\n" * 300)
    with pytest.raises(ProgramError, match="at most 8000"):
        statements_of("a = 1 " + " " * 9000)
