"""Figures of a sequence of tasks in closed form."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmalign.errors import DataError
from mmalign.metrics.continual import (
    average_accuracy,
    backward_transfer,
    first_crossing,
    forgetting,
    forward_transfer,
    learning_accuracy,
)

MATRIX = [[0.60, 0.1, 0.2], [0.50, 0.70, 0.3], [0.45, 0.66, 0.80]]


def test_closed_form() -> None:
    assert average_accuracy(MATRIX) == pytest.approx(0.636667, abs=1e-6)
    assert backward_transfer(MATRIX) == pytest.approx(-0.095)
    assert backward_transfer(MATRIX, include_last=True) == pytest.approx(-0.063333, abs=1e-6)
    assert forgetting(MATRIX) == pytest.approx((0.15 + 0.04) / 2)
    assert learning_accuracy(MATRIX) == pytest.approx(0.7)
    assert forward_transfer(MATRIX, [0.0, 0.05, 0.1]) == pytest.approx((0.05 + 0.2) / 2)


def test_what_was_best_in_between_counts_for_forgetting_only() -> None:
    scores = [[0.5, 0.0, 0.0], [0.9, 0.6, 0.0], [0.6, 0.6, 0.7]]
    assert backward_transfer(scores) == pytest.approx(0.05)
    assert forgetting(scores) == pytest.approx(0.15)


def test_one_task_forgets_nothing() -> None:
    assert backward_transfer([[0.4]]) == forgetting([[0.4]]) == forward_transfer([[0.4]], [0.1]) == 0.0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_identical_rows_forget_nothing(row: list[float]) -> None:
    scores = [row] * len(row)
    assert backward_transfer(scores) == backward_transfer(scores, include_last=True) == 0
    assert forgetting(scores) == 0
    assert average_accuracy(scores) == pytest.approx(learning_accuracy(scores))


@given(st.integers(2, 6).flatmap(lambda k: st.lists(st.lists(st.floats(0, 1), min_size=k, max_size=k), min_size=k, max_size=k)))
def test_relations(scores: list[list[float]]) -> None:
    tasks = len(scores)
    assert backward_transfer(scores, include_last=True) * tasks == pytest.approx(backward_transfer(scores) * (tasks - 1))
    assert average_accuracy(scores) == pytest.approx(learning_accuracy(scores) + backward_transfer(scores, include_last=True))
    assert forgetting(scores) >= -backward_transfer(scores) - 1e-12  # the best so far is at least the score right after learning


@pytest.mark.parametrize(("scores", "message"), [
    ([[0.5, math.nan], [0.5, 0.5]], r"scores\[0\]\[1\] is nan; evaluate every task after every stage"),
    ([[0.5, 0.4], [0.5]], r"scores\[1\] has 1 tasks"), ([], "no stage"), ([[]], "no task"),
    ([[0.5, 0.4]], "1 stages and 2 tasks"),
])
def test_missing_cells_are_refused(scores: list[list[float]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        backward_transfer(scores)


def test_first_crossing() -> None:
    curve = [(20, {"a": 0.3, "b": 0.95}), (10, {"a": 0.7, "b": 0.9}), (0, {"a": 0.9, "b": 0.2})]
    found = first_crossing(curve, "b", 0.9)
    assert found is not None
    assert (found.step, found.scores["a"]) == (10, 0.7)
    assert first_crossing(curve, "b", 0.99) is None
    with pytest.raises(DataError, match="no score of 'c'"):
        first_crossing(curve, "c", 0.5)
