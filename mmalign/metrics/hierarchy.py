"""Paths through a hierarchy of codes: how close a predicted path is, and how sure an answer is over repeated runs.

After Zhang, Kaniselvan and Mireshghallah 2025, arXiv 2511.05933.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from mmalign.errors import DataError
from mmalign.metrics import metric

Agreement = Literal["all_correct", "majority_correct", "majority_incorrect", "all_incorrect"]
AGREEMENTS: tuple[Agreement, ...] = ("all_correct", "majority_correct", "majority_incorrect", "all_incorrect")


@metric("ancestor_f1", higher_is_better=True)
def ancestor_f1(predicted: Sequence[str], gold: Sequence[str]) -> float:
    """F1 of the *sets* of nodes of two paths; 0 when either is empty. The order of nodes plays no part."""
    first, second = set(predicted), set(gold)
    if not first or not second:
        return 0.0
    return 2 * len(first & second) / (len(first) + len(second))


@metric("common_subsequence_score", higher_is_better=True)
def common_subsequence_score(
    predicted: Sequence[str], gold: Sequence[str], *, denominator: Literal["longest", "gold"] = "longest",
) -> float:
    """Longest common subsequence over ``max(|p|, |g|)`` (or over ``|g|``); 0 when either path is empty.

    The paper does not print its formula; this one is ours.
    """
    if denominator not in ("longest", "gold"):
        raise DataError(f"denominator is {denominator!r}; allowed are longest and gold")
    if not predicted or not gold:
        return 0.0
    before = [0] * (len(gold) + 1)
    for node in predicted:
        row = [0]
        for j, other in enumerate(gold):
            row.append(before[j] + 1 if node == other else max(before[j + 1], row[j]))
        before = row
    return before[-1] / (len(gold) if denominator == "gold" else max(len(predicted), len(gold)))


@metric("path_matching_score", higher_is_better=True)
def path_matching_score(
    predicted: Sequence[str], gold: Sequence[str], *, denominator: Literal["longest", "gold"] = "longest",
) -> float:
    """Harmonic mean of :func:`ancestor_f1` and :func:`common_subsequence_score`: near misses and their order."""
    overlap = ancestor_f1(predicted, gold)
    order = common_subsequence_score(predicted, gold, denominator=denominator)
    return 2 * overlap * order / (overlap + order) if overlap + order else 0.0


def stratum(hops: int) -> str:
    """``light`` below 3 hops between top and node, ``heavy`` from 5 on, ``middle`` between."""
    return "light" if hops < 3 else "heavy" if hops >= 5 else "middle"


def agreement(correct: Sequence[bool]) -> Agreement:
    """Which bin the runs of one question fall into; a tie is ``majority_incorrect``. Raises DataError without runs."""
    if not correct:
        raise DataError("agreement of no runs: a question needs at least one answer")
    right = sum(bool(c) for c in correct)
    if right == len(correct):
        return "all_correct"
    if right == 0:
        return "all_incorrect"
    return "majority_correct" if 2 * right > len(correct) else "majority_incorrect"


@metric("gap_reduction", higher_is_better=True)
def gap_reduction(after_plain: float, before_plain: float, after_structured: float, before_structured: float) -> float:
    """Share of the accuracy gap between two models that a structured prompt closes; NaN when there is no gap.

    ``1 - (after_structured - before_structured) / (after_plain - before_plain)``.
    """
    gap = after_plain - before_plain
    return 1 - (after_structured - before_structured) / gap if gap else math.nan
