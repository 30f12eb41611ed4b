"""Samplers that can be stopped anywhere, mixtures in the proportions asked for, budgets never exceeded."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.data.mixture import EpochSampler, MixtureSampler, mixture_weights, split_budget, virtual_epoch_size
from mmalign.errors import CheckpointError, ConfigError, DataError

SIZES = [1_000_000, 100_000, 10_000, 1_000]


def test_published_mixture_weights():
    assert mixture_weights(SIZES, temperature=1.5) == pytest.approx([0.786251, 0.169393, 0.036494, 0.007863], abs=1e-6)
    assert mixture_weights(SIZES, temperature=5) == pytest.approx([0.438548, 0.276705, 0.174589, 0.110158], abs=1e-6)
    assert mixture_weights(SIZES, temperature=1) == pytest.approx([size / sum(SIZES) for size in SIZES])
    assert mixture_weights(SIZES, temperature=1e9) == pytest.approx([0.25] * 4, abs=1e-6)
    assert mixture_weights(SIZES, exponent=0) == pytest.approx([0.25] * 4)
    assert mixture_weights(SIZES, exponent=1 / 1.5) == pytest.approx(mixture_weights(SIZES, temperature=1.5))
    assert mixture_weights([5, 1], ratios=[1, 3]) == [0.25, 0.75]
    assert mixture_weights([500, 50], temperature=1, cap=50) == [0.5, 0.5]
    assert virtual_epoch_size(SIZES, mixture_weights(SIZES, temperature=1.5)) == 1_271_859


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=6), st.floats(0.2, 50), st.integers(1, 1000))
def test_weights_sum_to_one_ignore_scale_and_keep_the_order(sizes, temperature, factor):
    weights = mixture_weights(sizes, temperature=temperature)
    assert sum(weights) == pytest.approx(1)
    assert mixture_weights([size * factor for size in sizes], temperature=temperature) == pytest.approx(weights, rel=1e-9)
    assert all(a >= b * (1 - 1e-12) for a, m in zip(weights, sizes) for b, n in zip(weights, sizes) if m >= n)


@pytest.mark.parametrize(("arguments", "message"), [
    ({}, "exactly one of temperature, exponent and ratios"), ({"temperature": 1.0, "exponent": 1.0}, "exactly one"),
    ({"temperature": 0.0}, "mixture.temperature: must be positive"), ({"exponent": -1.0}, "mixture.exponent"),
    ({"ratios": [1.0]}, "1 ratios for 4"), ({"ratios": [0.0] * 4}, "positive sum"),
    ({"temperature": 1.0, "cap": 0}, "mixture.cap"),
])
def test_weights_refuse(arguments, message):
    with pytest.raises(ConfigError, match=message):
        mixture_weights(SIZES, **arguments)


def test_empty_sources_are_refused_only_when_they_would_be_drawn():
    assert mixture_weights([10, 0], temperature=1) == [1.0, 0.0]
    with pytest.raises(DataError, match=r"source 1 has no rows"):
        mixture_weights([10, 0], ratios=[1, 1])
    with pytest.raises(DataError, match=r"no rows"):
        mixture_weights([0, 0], temperature=1)


@given(st.integers(1, 40), st.integers(0, 5), st.integers(1, 4))
def test_every_epoch_holds_every_index_once(size, seed, epochs):
    sampler = EpochSampler(size, seed=seed)
    for epoch in range(epochs):
        assert sampler.epochs_done == epoch
        assert sorted(sampler.take(size)) == list(range(size))


def test_epochs_differ_and_follow_the_seed():
    first, second = EpochSampler(50, seed=1).take(100), EpochSampler(50, seed=1).take(100)
    assert first == second
    assert first[:50] != first[50:]
    assert EpochSampler(50, seed=2).take(50) != first[:50]
    assert EpochSampler(4, seed=0, shuffle=False).take(6) == [0, 1, 2, 3, 0, 1]


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(0, 100), st.integers(0, 60))
def test_a_resumed_sampler_goes_on_as_if_nothing_had_happened(size, before, after):
    whole = EpochSampler(size, seed=3)
    whole.take(before)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = EpochSampler(size, seed=3)
    resumed.load_state_dict(state)
    assert resumed.take(after) == whole.take(after)
    with pytest.raises(CheckpointError, match=r"size"):
        EpochSampler(size + 1, seed=3).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"seed"):
        EpochSampler(size, seed=4).load_state_dict(state)


def test_mixture_draws_in_proportion_and_repeats_no_row_early():
    sizes, weights = [100, 30, 5], [0.6, 0.3, 0.1]
    sampler = MixtureSampler(sizes, weights, seed=0)
    drawn = sampler.take(6000)
    share = Counter(sampler.source_of(index) for index in drawn)
    assert [share[source] / 6000 for source in range(3)] == pytest.approx(weights, abs=0.02)
    for source in range(3):
        low, high = sampler.offsets[source], sampler.offsets[source + 1]
        own = [index for index in drawn if low <= index < high]
        assert sorted(own[: sizes[source]]) == list(range(low, high))


def test_mixture_runs_stay_in_one_source():
    sampler = MixtureSampler([40, 40], [0.5, 0.5], seed=1, run=8)
    for _ in range(30):
        assert len({sampler.source_of(index) for index in sampler.take(8)}) == 1


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2500), st.integers(1, 3))
def test_a_resumed_mixture_goes_on_as_if_nothing_had_happened(before, run):
    def make():
        return MixtureSampler([7, 0, 20], [0.3, 0.0, 0.7], seed=5, run=run)

    whole, resumed = make(), make()
    whole.take(before)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert list(islice(resumed, 50)) == list(islice(whole, 50))
    with pytest.raises(CheckpointError, match=r"weights"):
        MixtureSampler([7, 0, 20], [0.4, 0.0, 0.6], seed=5, run=run).load_state_dict(whole.state_dict())


def test_samplers_refuse_what_cannot_be_drawn():
    with pytest.raises(DataError, match=r"no rows"):
        EpochSampler(0, seed=0)
    with pytest.raises(DataError, match=r"positive weight has no rows"):
        MixtureSampler([3, 0], [0.5, 0.5], seed=0)
    with pytest.raises(ConfigError, match=r"2 weights for 1"):
        MixtureSampler([3], [0.5, 0.5], seed=0)


@given(st.floats(1, 1e5), st.floats(0, 1), st.floats(0.1, 10), st.floats(0.1, 10))
def test_a_budget_is_spent_but_never_exceeded(budget, share, row_price, pair_price):
    rows, pairs = split_budget(budget, share, row_price=row_price, pair_price=pair_price)
    spent = rows * row_price + pairs * pair_price
    assert spent <= budget * (1 + 1e-9) + 1e-8
    assert budget - spent < row_price * (1 + 1e-6) + 1e-8
    assert pairs * pair_price <= budget * share + 1e-6 * pair_price + 1e-8


def test_budget_examples():
    assert split_budget(200, 0.9) == (20, 180)
    assert split_budget(200, 0) == (200, 0)
    assert split_budget(200, 1) == (0, 200)
    assert split_budget(100, 0.5, pair_price=4) == (52, 12)
    with pytest.raises(ConfigError, match=r"share"):
        split_budget(100, 1.5)
    with pytest.raises(ConfigError, match=r"positive"):
        split_budget(0, 0.5)
