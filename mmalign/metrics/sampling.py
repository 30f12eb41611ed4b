"""What several samples of a problem say: the chance that one of k is right, and the answer that most of them give."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

from mmalign.core.selection import majority_vote
from mmalign.errors import DataError
from mmalign.metrics import metric


@metric("pass_at_k", higher_is_better=True, aliases=("pass@k",))
def pass_at_k(samples: int, correct: int, k: int) -> float:
    """``1 - C(n - c, k) / C(n, k)``: the chance that ``k`` of ``n`` samples, drawn without replacement, hold a right one.

    Unbiased for ``1 - (1 - p)^k``, unlike that formula with p = c / n (Chen et al. 2021, arXiv 2107.03374, equation 1).
    Computed as a product, so that no binomial overflows. Raises DataError for ``k`` outside 1..n or c outside 0..n.
    """
    if not 0 <= correct <= samples:
        raise DataError(f"correct={correct} must lie in 0..{samples}, the number of samples")
    if not 1 <= k <= samples:
        raise DataError(f"k={k} must lie in 1..{samples}, the number of samples of a problem; draw more samples")
    if samples - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - correct + 1, samples + 1))


@metric("majority_accuracy", higher_is_better=True, aliases=("maj@n", "self_consistency"))
def majority_accuracy(answers: Sequence[Hashable | None], values: Sequence[float]) -> float:
    """Value of the answer that most samples give: the mean of ``values[i]`` over the samples i that gave it.

    The most frequent answers of a tie count by the mean of theirs, ``None`` is no answer, and without any answer the value is
    0 (Wang et al. 2022, arXiv 2203.11171). Raises DataError for lengths that differ or no sample.
    """
    if len(answers) != len(values) or not answers:
        raise DataError(f"{len(answers)} answers and {len(values)} values; one of each per sample, and at least one")
    winner, members = majority_vote(answers)
    if winner is None:
        counts = Counter(answer for answer in answers if answer is not None)
        most = max(counts.values(), default=0)
        members = [i for i, answer in enumerate(answers) if answer is not None and counts[answer] == most]
    return sum(values[i] for i in members) / len(members) if members else 0.0
