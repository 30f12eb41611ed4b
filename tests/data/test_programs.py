"""Straight-line programs: what is read, traced and refused; what counts as a solution; worked answers and word problems."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.data.calculator import CalculatorError, calculator_program
from mmalign.data.solutions import SolutionOptions, Solutions
from mmalign.data.straight_line import ProgramError, canonical_number, read_program, state_key, trace_program, write_program
from mmalign.data.word_programs import make_word_programs
from mmalign.errors import DataError

GOLD = "n0=4;n1=6;t0=n0*n1;answer=t0+n0"


# -- programs ----------------------------------------------------------------------------------------------------------


def test_reading_leaves_comments_and_blank_lines_out() -> None:
    program = read_program("\n# a comment\n  \nn0 = 4  # four\n\nn1=(n0 +  # two lines\n   1)\nanswer=n1; b=2\n")
    assert program == ("n0 = 4", "n1=(n0 + 1)", "answer=n1", "b=2")
    assert read_program(write_program(program)) == program
    assert read_program("") == ()


@pytest.mark.parametrize(("expression", "value"), [
    ("2 + 3 * 4", 14), ("(2 + 3) * 4", 20), ("7 / 2", 3.5), ("7 // 2", 3), ("-7 % 3", 2), ("2 ** 10", 1024), ("-2 ** 2", -4),
    ("+3", 3), ("1e3", 1000.0), ("max(1, 2, 3) - min(4, 5)", -1), ("abs(-3)", 3), ("round(2.567, 2)", 2.57), ("int(7.9)", 7),
    ("math.sqrt(16)", 4.0), ("math.ceil(2.1) + math.floor(2.9)", 5), ("math.gcd(12, 18)", 6), ("2 ** -1", 0.5), ("1_000", 1000),
])
def test_arithmetic_is_python_s(expression: str, value: float) -> None:
    assert trace_program(f"answer = {expression}").states[-1]["answer"] == value


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("+-*"), st.integers(-99, 99)), min_size=1, max_size=12))
def test_traces_agree_with_python(steps: list[tuple[str, int]]) -> None:
    lines, expected = ["x0=7"], 7
    for i, (sign, number) in enumerate(steps):
        lines.append(f"x{i + 1}=x{i}{sign}({number})")
        expected = {"+": expected + number, "-": expected - number, "*": expected * number}[sign]
    trace = trace_program("\n".join(lines))
    assert len(trace.states) == len(lines)
    assert trace.states[-1][f"x{len(steps)}"] == expected
    assert trace.states[0] == {"x0": 7}


REFUSED = [
    "for i in range(3): x = i", "while True: x = 1", "import os", "from os import system", "x = __import__('os')",
    "def f(): pass",
    "x = open('/etc/passwd')", "x = 'text'", "x = [1, 2]", "x = (1, 2)", "x, y = 1, 2", "x = y = 1", "x += 1", "x: int = 1",
    "1 + 1",
    "print(1)", "x = 1 if 1 else 2", "x = 1 < 2", "x = True", "x = 1j", "x = (lambda: 1)()", "x = (y := 1)", "x.y = 1",
    "x[0] = 1",
    "x = math.__class__", "x = (1).real", "x = eval('1')", "x = max(*[1, 2])", "x = round(1, ndigits=2)", "x = abs(1, 2)",
    "x = math.factorial(10)", "x = 1 @ 2", "x = 1 << 9", "x = not 1", "x = ~1", "x =", "x = 'a' * 10**9", "del x", "x = f'{1}'",
    "exec('x = 1')", "if 1: x = 1", "x = 1 and 2",
]


@pytest.mark.parametrize("text", REFUSED)
def test_everything_else_is_refused_before_anything_runs(text: str) -> None:
    with pytest.raises(ProgramError):
        trace_program(f"a = 1\n{text}")


@pytest.mark.parametrize("text", [
    "x = 1 / 0", "x = 1 % 0", "x = y", "x = 10 ** 10 ** 10", "x = 9 ** 300", "x = 2 ** 200\ny = x ** 3", "x = 1e308 * 10",
    "x = (-8) ** 0.5", "x = math.sqrt(-1)", "x = math.log(0)", "x = int(1e999)", "x = " + "9" * 5000,
    "x = " + "(" * 300 + "1" + ")" * 300,
    "x = " + "-" * 3000 + "1", "x = 1" + "+1" * 3000, "\n".join(["x = 1"] * 300), "x = 1\n" * 5000, "x = 1\0", "x = 0 ** -1",
    "x = 3\n" + "x = x * x\n" * 60, "x = math.exp(1e6)", "x = 1.5 ** 1000000", "x = round(1.5, 10 ** 400)",
], ids=range(23))
def test_bounds_hold_and_every_failure_is_the_same_error(text: str) -> None:
    with pytest.raises(ProgramError):
        trace_program(text)


def test_numbers_have_one_spelling() -> None:
    assert [canonical_number(x) for x in (24, 24.0, -0.0, 0.1 + 0.2, 1 / 3, 1e20, 10**20, 2.5)] == [
        "24", "24", "0", "0.3", "0.3333333333", "1e+20", "1" + "0" * 20, "2.5"]
    assert state_key({"a": 24}) == state_key({"b": 24.0}) == ("24",)
    assert state_key({"a": 24}, "names") != state_key({"b": 24.0}, "names")
    with pytest.raises(ValueError, match="state_key"):
        state_key({}, "other")  # type: ignore[arg-type]


# -- solutions ---------------------------------------------------------------------------------------------------------


def solutions(**options: Any) -> Solutions:
    return Solutions(GOLD, 28, SolutionOptions(**options))


def add(known: Solutions, text: str) -> tuple[str, int]:
    judgement = known.add(trace_program(text))
    return judgement.outcome, len(judgement.program)


def test_states_decide_what_is_kept() -> None:
    known = solutions()
    assert add(known, "n0=4;n1=6;t0=n1*n0;t1=t0+n1;answer=t1") == ("partial", 3)
    assert known.partial == [(), ("n0=4", "n1=6", "t0=n1*n0")]
    assert add(known, "n0=6;n1=4;t0=n0*n1;answer=n1+t0") == ("full", 4)
    assert add(known, "n0=4;n1=6;x=n0+n1;answer=x") == ("known", 2)
    assert known.full == [read_program(GOLD), ("n0=6", "n1=4", "t0=n0*n1", "answer=n1+t0")]
    assert known.table[("24", "4", "6")] == 3
    assert ("24", "28", "4", "6") not in known.table  # the correct final state does not guide partial programs


def test_a_longer_partial_program_replaces_its_beginnings_and_the_empty_one_stays() -> None:
    known = solutions(length_tolerance=5)
    assert add(known, "b=4;a=5")[0] == "partial"
    assert known.partial == [(), ("b=4",)]
    assert add(known, "b=4;n1=6;a=5") == ("partial", 2)
    assert known.partial == [(), ("b=4", "n1=6")]
    assert add(known, "b=4;n1=6;t0=b*n1;answer=t0+b") == ("full", 4)
    assert known.partial == [()]


def test_the_first_answer_counts_even_when_it_is_overwritten() -> None:
    known = solutions()
    assert add(known, "n0=4;n1=6;answer=n0;answer=28") == ("known", 2)
    longer = add(solutions(length_tolerance=9), "c=4;answer=28;answer=0")
    assert longer == ("full", 2)  # what follows the right answer is cut off
    assert add(solutions(), "x=1;answer=27.99995") == ("full", 2)
    assert add(solutions(), "x=1;answer=27.9998") == ("wrong", 0)


def test_programs_longer_than_the_shortest_known_need_a_tolerance() -> None:
    longer = "n0=4;n1=6;t0=n0*n1;t1=n0;answer=t0+t1"
    assert add(solutions(), longer) == ("known", 3)
    assert add(solutions(length_tolerance=1), longer) == ("full", 5)
    assert add(solutions(partial=False), longer) == ("full", 5)  # without states there is no length rule


def test_fully_correct_only_keeps_no_states_and_no_parts() -> None:
    known = solutions(partial=False)
    assert add(known, "n0=4;n1=6;t0=n1*n0;answer=0") == ("wrong", 0)
    assert add(known, "answer=28") == ("full", 1)
    assert add(known, "answer = 28 # again") == ("full", 1)  # the text decides; spaces inside a statement differ
    assert add(known, "answer=28 # again") == ("known", 1)
    assert (known.partial, known.table) == ([()], {})


def test_value_states_confuse_meanings_and_names_do_not() -> None:
    program = "boys=6;girls=4;t0=boys*girls;answer=0"
    assert add(solutions(), program) == ("partial", 3)
    assert add(solutions(state_key="names"), program) == ("wrong", 0)
    assert add(solutions(state_key="names"), "n0=4;n1=3+3;answer=0") == ("partial", 2)


def test_a_full_buffer_takes_no_more() -> None:
    known = solutions(max_buffer_size=2)
    assert add(known, "answer=28")[0] == "full"
    assert add(known, "answer=7*4")[0] == "crowded"
    assert add(known, "a=2*2;answer=0")[0] == "partial"
    assert add(known, "a=8/2;answer=0")[0] == "partial"
    assert add(known, "a=9-5;answer=0")[0] == "crowded"


def test_numbers_that_look_different_are_one_state() -> None:
    known = Solutions("a=48;b=a/2;answer=b+1", 25, SolutionOptions())
    assert add(known, "a=48;c=24;answer=0") == ("partial", 2)


def test_buffers_survive_a_checkpoint() -> None:
    import json

    known = solutions()
    add(known, "n0=4;n1=6;t0=n1*n0;answer=0")
    again = solutions()
    again.load_state_dict(json.loads(json.dumps(known.state_dict())))
    assert (again.full, again.partial, again.table) == (known.full, known.partial, known.table)


@pytest.mark.parametrize(("gold", "answer"), [("answer=3", 4), ("x=4", 4), ("", 0)])
def test_a_reference_that_does_not_give_its_answer_is_refused(gold: str, answer: float) -> None:
    with pytest.raises(DataError, match="does not arrive"):
        Solutions(gold, answer, SolutionOptions())


@pytest.mark.parametrize("options", [{"marg_set_size": 0}, {"max_buffer_size": 0}, {"length_tolerance": -1}, {"variable": "a b"}])
def test_senseless_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        SolutionOptions(**options)


# -- data --------------------------------------------------------------------------------------------------------------


def test_calculator_annotations_become_a_program() -> None:
    worked = ("Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia sold 48+24 = <<48+24=72>>72 clips altogether.\n#### 72")
    assert calculator_program(worked).split("\n") == ["n0=48", "n1=2", "t0=n0/n1", "answer=n0+t0"]
    percent = "20% of $1,200 is <<.2*1,200=240>>240, left <<1200-240=960>>960 #### 960"
    assert calculator_program(percent).split("\n") == ["n0=0.2", "n1=1200", "t0=n0*n1", "answer=n1-t0"]
    assert trace_program(calculator_program("<<(3+4)*2=14>>")).states[-1]["answer"] == 14


@pytest.mark.parametrize(("worked", "part"), [
    ("no annotation #### 3", "no calculator"), ("<<1+1=3>>3 #### 3", "annotation 1"), ("<<1+1=2>>2 #### 5", "the answer is 5"),
    ("<<a+1=2>> #### 2", "no program"), ("<<1+1=two>> #### 2", "number"), ("<<1+1=2>> #### two", "no number"),
    ("<<__import__('os')=2>> #### 2", "no program"),
])
def test_annotations_that_lead_nowhere_are_refused(worked: str, part: str) -> None:
    with pytest.raises(CalculatorError, match=part):
        calculator_program(worked)


def test_every_program_of_a_word_problem_gives_its_answer() -> None:
    rows = make_word_programs(80, seed=3)
    test = make_word_programs(80, split="test", seed=4)
    assert not {row["prompt"] for row in rows} & {row["prompt"] for row in test}
    assert {row["story"] for row in rows} == {0, 1, 2, 3}
    for row in [*rows, *test]:
        assert row["completion"] == row["programs"][0]
        assert len({read_program(program) for program in row["programs"]}) == len(row["programs"]) >= 3
        for program in row["programs"]:
            assert trace_program(program).states[-1]["answer"] == float(row["answer"])
            assert program.split("\n")[-1].startswith("answer=")
    assert make_word_programs(5, seed=3) == rows[:5]
    varied = make_word_programs(80, seed=3, varied=True)
    assert [row["prompt"] for row in varied] == [row["prompt"] for row in rows]
    assert all(sorted(a["programs"]) == sorted(b["programs"]) for a, b in zip(rows, varied, strict=True))
    assert 20 < sum(a["completion"] != b["completion"] for a, b in zip(rows, varied, strict=True)) < 80
    assert make_word_programs(2, form="messages")[0]["completion"][0]["role"] == "assistant"


@pytest.mark.parametrize(("arguments", "part"), [
    ({"n": 0}, "rows"), ({"n": 1, "split": "dev"}, "split"), ({"n": 1, "form": "chat"}, "form"),
    ({"n": 1, "stories": 9}, "stories"),
    ({"n": 1, "largest": 2}, "largest"), ({"n": 10**4, "largest": 4, "short": True}, "fewer"),
])
def test_word_problems_that_do_not_exist(arguments: dict[str, Any], part: str) -> None:
    with pytest.raises(DataError, match=part):
        make_word_programs(**arguments)


def test_nothing_was_imported_by_refused_programs() -> None:
    before = set(sys.modules)
    with pytest.raises(ProgramError):
        trace_program("import antigravity\nanswer = 1")
    assert "antigravity" not in set(sys.modules) - before
