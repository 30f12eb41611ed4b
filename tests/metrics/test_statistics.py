"""Standard errors, intervals and win rates against closed forms and SciPy."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mmalign.errors import DataError
from mmalign.metrics.statistics import bootstrap_interval, mean_and_error, paired_difference, wilson_interval, win_rate

numbers = st.floats(-100, 100)


@given(st.lists(numbers, min_size=2, max_size=30))
def test_mean_and_error_is_scipys(values):
    estimate = mean_and_error(values)
    assert estimate.mean == pytest.approx(sum(values) / len(values), abs=1e-9)
    assert estimate.error == pytest.approx(stats.sem(values), abs=1e-9)


def test_small_samples():
    assert mean_and_error([3.0])[0] == 3.0
    assert math.isnan(mean_and_error([3.0]).error)
    assert all(map(math.isnan, mean_and_error([])))
    assert mean_and_error([True, False]).mean == 0.5


@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=30))
def test_paired_difference_is_the_paired_t_test(pairs):
    before, after = zip(*pairs, strict=True)
    difference, error = paired_difference(before, after)
    assert difference == pytest.approx(mean_and_error(after).mean - mean_and_error(before).mean, abs=1e-9)
    if error > 1e-6:
        assert difference / error == pytest.approx(stats.ttest_rel(after, before).statistic, rel=1e-6, abs=1e-9)


def test_pairing_removes_the_spread_of_the_examples():
    before = torch.linspace(0, 100, 50)
    assert paired_difference(before, before + 1).error == pytest.approx(0, abs=1e-6)
    assert mean_and_error(before).error > 4


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys(case):
    successes, count = case
    expected = stats.binomtest(successes, count).proportion_ci(0.9, method="wilson")
    assert wilson_interval(successes, count, confidence=0.9) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_bootstrap_covers_and_repeats():
    values = torch.randn(400, generator=torch.Generator().manual_seed(1)) + 2
    low, high = bootstrap_interval(values)
    mean, error = mean_and_error(values)
    assert low == pytest.approx(mean - 1.96 * error, abs=0.02)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.02)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval(values, generator=torch.Generator().manual_seed(5)) != (low, high)
    assert bootstrap_interval([3.0, 3.0]) == (3.0, 3.0)
    median = bootstrap_interval(values, statistic=lambda rows: rows.median(1).values)
    assert median[0] < float(values.median()) < median[1]


def test_win_rate_counts_ties_as_half():
    result = win_rate([1, 2, 3, 4], [0, 2, 5, 3.5])
    assert (result.wins, result.losses, result.ties, result.rate, result.count) == (2, 1, 1, 0.625, 4)
    assert (result.low, result.high) == wilson_interval(2.5, 4)
    assert win_rate([1, 2, 3, 4], [0, 2, 5, 3.5], margin=0.5).ties == 2
    assert str(result).startswith("0.625 [")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_and_error([1, math.nan]), r"values\[1\] is nan"), (lambda: mean_and_error([[1.0]]), "one-dimensional"),
        (lambda: paired_difference([1], [1, 2]), "differ in number: 1 and 2"), (lambda: bootstrap_interval([]), "at least one"),
        (lambda: bootstrap_interval([1.0], confidence=95), "confidence=95"), (lambda: wilson_interval(3, 2), "successes=3"),
        (lambda: win_rate([], []), "at least one"), (lambda: bootstrap_interval([1.0], resamples=0), "resamples=0"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(DataError, match=message):
        call()
