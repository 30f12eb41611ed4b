"""The arithmetic asset: right answers, disjoint splits, the same rows for the same seed."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.data.arithmetic import _TABLE, LEVELS, make_arithmetic, split_of
from mmalign.errors import DataError


def texts(rows):
    return {row["prompt"][0]["content"] for row in rows}


@settings(max_examples=200)
@given(st.sampled_from([1, 2, 3, 4]), st.integers(0, 10**9))
def test_answers_of_expressions_are_right(level, number):
    problem = _TABLE[level].make(number % _TABLE[level].size)
    assert re.fullmatch(r"[\d+*() -]+", problem.text)
    assert eval(problem.text) == problem.answer
    for step in problem.steps:
        left, right = step.split(" = ")
        assert eval(left) == int(right)


@settings(max_examples=100)
@given(st.integers(0, 10**9))
def test_word_problems_are_solved_by_their_steps(number):
    problem = _TABLE[5].make(number % _TABLE[5].size)
    assert len(problem.steps) == 2
    for step in problem.steps:
        left, right = step.split(" = ")
        assert eval(left) == int(right)
    first, second = problem.steps
    assert int(second.split(" = ")[1]) == problem.answer >= 0
    assert first.split(" = ")[1] in re.findall(r"\d+", second.split(" = ")[0])
    for quantity in re.findall(r"\d+", problem.text):
        assert quantity in " ".join(problem.steps)


def test_splits_share_no_problem_whatever_the_seeds():
    train = texts(make_arithmetic(600, split="train", seed=0, form="messages"))
    test = texts(make_arithmetic(300, split="test", seed=7))
    assert not train & test
    assert len(train) == 600
    assert len(test) == 300


def test_rows_follow_the_seed_and_longer_sets_begin_with_shorter_ones():
    assert make_arithmetic(50, seed=1) == make_arithmetic(80, seed=1)[:50]
    assert texts(make_arithmetic(50, seed=1)) != texts(make_arithmetic(50, seed=2))
    rows = make_arithmetic(500, seed=0)
    assert len({row["id"] for row in rows}) == 500
    assert [row["level"] for row in rows[:10]] == [*LEVELS, *LEVELS]


def test_forms():
    row = make_arithmetic(1, levels=[2])[0]
    assert row["prompt"][0]["role"] == "user"
    assert row["prompt"][0]["content"].endswith("Answer with the number only.")
    assert row["completion"] == [{"role": "assistant", "content": row["answer"]}]
    plain = make_arithmetic(1, levels=[2], form="text")[0]
    assert plain["prompt"].endswith("=")
    assert plain["completion"] == f" {plain['answer']}"
    worked = make_arithmetic(1, levels=[5], worked=True)[0]
    assert worked["completion"][0]["content"].splitlines()[-1] == worked["answer"]
    assert len(worked["completion"][0]["content"].splitlines()) == 3


def test_pairs_prefer_the_right_answer():
    for row in make_arithmetic(60, pairs=True, worked=True):
        assert row["chosen"][0]["content"].splitlines()[-1] == row["answer"]
        assert row["rejected"][0]["content"].splitlines()[-1] != row["answer"]
        assert "completion" not in row


def test_used_up_levels_and_refusals():
    small = [split_of(_TABLE[1].make(number).text) for number in range(_TABLE[1].size)]
    assert {"train", "test"} == set(small)
    with pytest.raises(DataError, match=r"levels \[1\] have \d+ train problems, not 5000"):
        make_arithmetic(5000, levels=[1])
    rows = make_arithmetic(1000, levels=[1, 2])
    assert len(rows) == len(texts(rows)) == 1000
    for arguments, message in (({"split": "validation"}, "train and test"), ({"levels": [6]}, "levels: must be some of"),
                               ({"form": "latex"}, "form: must be"), ({"levels": []}, "levels")):
        with pytest.raises(DataError, match=message):
            make_arithmetic(3, **arguments)
    with pytest.raises(DataError, match=r"at least 1"):
        make_arithmetic(0)
