"""pass@k and the vote of several samples."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.errors import DataError
from mmalign.metrics import METRICS
from mmalign.metrics.sampling import majority_accuracy, pass_at_k


def test_closed_forms() -> None:
    assert [round(pass_at_k(20, 3, k), 6) for k in (1, 5, 10, 18)] == [0.15, 0.600877, 0.894737, 1.0]
    assert pass_at_k(10, 0, 10) == 0.0
    assert pass_at_k(10**6, 1, 10**5) == pytest.approx(0.1)
    assert METRICS.get("pass@k") is pass_at_k


@settings(deadline=None)
@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_it_is_the_share_of_subsets_with_a_right_sample(case: tuple[int, int, int]) -> None:
    n, c, k = case
    subsets = list(itertools.combinations(range(n), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(min(subset) < c for subset in subsets) / len(subsets))


@settings(deadline=None)
@given(st.floats(0.01, 0.99), st.integers(1, 8))
def test_it_is_unbiased(p: float, k: int) -> None:
    from math import comb

    n = 10
    mean = sum(comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-9)


@pytest.mark.parametrize(("case", "part"), [
    ((5, 6, 1), "correct"), ((5, -1, 1), "correct"), ((5, 1, 6), "k=6"), ((5, 1, 0), "k=0"),
])
def test_impossible_counts(case: tuple[int, int, int], part: str) -> None:
    with pytest.raises(DataError, match=part):
        pass_at_k(*case)


def test_votes() -> None:
    assert majority_accuracy(["7", "8", "7"], [1.0, 0.0, 1.0]) == 1.0
    assert majority_accuracy(["7", "8", "8"], [1.0, 0.0, 0.0]) == 0.0
    assert majority_accuracy(["7", "8"], [1.0, 0.0]) == 0.5  # a tie
    assert majority_accuracy([None, None, "7"], [0.0, 0.0, 1.0]) == 1.0  # no answer does not vote
    assert majority_accuracy([None], [0.0]) == 0.0
    with pytest.raises(DataError, match="one of each"):
        majority_accuracy(["7"], [])
