"""Figures of learning a sequence of tasks: what was learned, what was forgotten, and forgetting at equal task accuracy.

``scores[k][j]`` is the score on task j after stage k (stages and tasks in the same order, from 0). Higher is better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mmalign.errors import DataError

Matrix = Sequence[Sequence[float]]


def check_matrix(scores: Matrix, *, square: bool = True) -> None:
    """Raise DataError for a matrix with missing or infinite cells, or (``square``) another number of stages than tasks."""
    if not scores or not scores[0]:
        raise DataError("scores: there is no stage, or no task; give one row per stage and one column per task")
    width = len(scores[0])
    for k, row in enumerate(scores):
        if len(row) != width:
            raise DataError(f"scores[{k}] has {len(row)} tasks and scores[0] has {width}; evaluate every task after every stage")
        for j, value in enumerate(row):
            if not math.isfinite(value):
                raise DataError(f"scores[{k}][{j}] is {value}; evaluate every task after every stage")
    if square and len(scores) != width:
        raise DataError(f"scores has {len(scores)} stages and {width} tasks; forgetting is defined for one stage per task")


def average_accuracy(scores: Matrix) -> float:
    """``(1/K) sum_j P[K][j]``: the mean over all tasks after the last stage."""
    check_matrix(scores, square=False)
    return math.fsum(scores[-1]) / len(scores[-1])


def learning_accuracy(scores: Matrix) -> float:
    """``(1/K) sum_j P[j][j]``: the mean score of every task right after it was learned."""
    check_matrix(scores)
    return math.fsum(row[j] for j, row in enumerate(scores)) / len(scores)


def backward_transfer(scores: Matrix, *, include_last: bool = False) -> float:
    """``mean_j (P[K][j] - P[j][j])``; negative is forgetting, and a single task has none.

    The mean is over the tasks before the last; ``include_last`` divides by K instead of K - 1 (the last term is 0).
    Both are in use. Lopez-Paz and Ranzato 2017, arXiv 1706.08840; called FM in Lai et al. 2025, arXiv 2507.05386.
    """
    check_matrix(scores)
    tasks = len(scores)
    if tasks == 1:
        return 0.0
    changes = [scores[-1][j] - scores[j][j] for j in range(tasks - 1)]
    return math.fsum(changes) / (tasks if include_last else tasks - 1)


def forgetting(scores: Matrix) -> float:
    """``mean_{j<K} (max_{k<K} P[k][j] - P[K][j])``: the fall from the best score so far; positive is forgetting.

    Chaudhry et al. 2018, arXiv 1801.10112, section 4. A single task has none (0).
    """
    check_matrix(scores)
    tasks = len(scores)
    if tasks == 1:
        return 0.0
    falls = [max(row[j] for row in scores[:-1]) - scores[-1][j] for j in range(tasks - 1)]
    return math.fsum(falls) / (tasks - 1)


def forward_transfer(scores: Matrix, start: Sequence[float]) -> float:
    """``mean_{j>0} (P[j-1][j] - start[j])``: what earlier tasks did to a task before it was learned; 0 for one task.

    ``start[j]`` is the score of the model before any stage. Lopez-Paz and Ranzato 2017, arXiv 1706.08840.
    """
    check_matrix(scores)
    if len(start) != len(scores):
        raise DataError(f"start has {len(start)} tasks and scores {len(scores)}; evaluate every task before the first stage too")
    if len(scores) == 1:
        return 0.0
    return math.fsum(scores[j - 1][j] - start[j] for j in range(1, len(scores))) / (len(scores) - 1)


@dataclass(frozen=True)
class Crossing:
    """Where a curve first reaches a level."""

    step: int
    """Step of the first point at or above the level."""
    scores: dict[str, float]
    """Score of every task at that point."""


def first_crossing(curve: Sequence[tuple[int, dict[str, float]]], task: str, level: float) -> Crossing | None:
    """The first point of ``curve`` (step, score per task) whose ``task`` is at least ``level``; None when none is.

    Comparing learners there, and not after equal steps, keeps a learner from looking forgetful because it learns faster.
    Raises DataError for a point without the task.
    """
    for step, scores in sorted(curve, key=lambda point: point[0]):
        if task not in scores:
            raise DataError(f"step {step} has no score of {task!r}; it has {', '.join(scores) or 'none'}")
        if scores[task] >= level - 1e-9:
            return Crossing(step, dict(scores))
    return None
