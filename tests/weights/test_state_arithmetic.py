"""State-dict arithmetic: identities, one cast, tied and integer entries, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.weights.arithmetic import add_scaled, difference, ema_update, lerp, weighted_average


def state(seed=0, dtype=torch.float32, tied=False):
    g = torch.Generator().manual_seed(seed)
    embedding = torch.randn(6, 4, generator=g).to(dtype)
    head = embedding if tied else torch.randn(6, 4, generator=g).to(dtype)
    return {
        "head.weight": head, "embed.weight": embedding, "norm.bias": torch.randn(4, generator=g).to(dtype),
        "steps": torch.tensor(3 + seed), "empty": torch.zeros(0, 4, dtype=dtype),
    }


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) and one[n].dtype == other[n].dtype for n in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tied", [False, True])
def test_end_points_are_exact(dtype, tied):
    first, second = state(0, dtype, tied), state(1, dtype, tied)
    floats = {name: second[name] for name in second if name != "steps"}
    assert same(lerp(first, second, 0.0), first)
    assert same(lerp(first, second, 1.0), floats | {"steps": first["steps"]})
    assert same(weighted_average([first, second], [1.0, 0.0]), first)


def test_task_vector_round_trip():
    base, tuned = state(0), state(1)
    delta = difference(tuned, base)
    assert "steps" not in delta
    restored = add_scaled(base, delta)
    for name in delta:
        torch.testing.assert_close(restored[name], tuned[name])
    assert torch.equal(restored["steps"], base["steps"])
    half = add_scaled(base, delta, 0.5)
    for name in delta:
        torch.testing.assert_close(half[name], lerp(base, tuned, 0.5)[name])


@settings(max_examples=25, deadline=None)
@given(weights=st.lists(st.floats(0.01, 5), min_size=1, max_size=4), seed=st.integers(0, 50))
def test_weighted_average_is_a_convex_combination(weights, seed):
    states = [state(seed + i) for i in range(len(weights))]
    average = weighted_average(states, weights)
    for name in ("head.weight", "norm.bias"):
        stacked = torch.stack([s[name].double() for s in states])
        shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
        expected = torch.tensordot(shares, stacked, 1).float()
        torch.testing.assert_close(average[name], expected)
    swapped = weighted_average(states[::-1], weights[::-1])
    torch.testing.assert_close(swapped["head.weight"], average["head.weight"])


def test_unnormalised_sum():
    states = [state(0), state(1)]
    total = weighted_average(states, [1.0, 1.0], normalize=False)
    torch.testing.assert_close(total["norm.bias"], states[0]["norm.bias"] + states[1]["norm.bias"])


def test_half_precision_is_rounded_once():
    """Summing 100 times 1/100 of a bfloat16 number in bfloat16 would drift by percent."""
    value = {"w": torch.tensor([1.2345, -3.3], dtype=torch.bfloat16)}
    assert torch.equal(weighted_average([value] * 100)["w"], value["w"])
    base, tuned = ({"w": torch.tensor([v], dtype=torch.bfloat16)} for v in (256.0, 257.0))
    assert difference({"w": torch.tensor([256.0 + 2]).bfloat16()}, base)["w"].dtype == torch.float32
    assert difference(tuned, base, dtype=None)["w"].dtype == torch.bfloat16


def test_float64_on_request():
    big, small = {"w": torch.tensor([1e8])}, {"w": torch.tensor([1.0])}
    average = weighted_average([big, small, {"w": torch.tensor([-1e8])}], normalize=False, precision=torch.float64)
    assert average["w"].item() == 1.0


def test_tied_entries_are_computed_once_and_stay_tied():
    first, second = state(0, tied=True), state(1, tied=True)
    for result in (lerp(first, second, 0.3), weighted_average([first, second]), add_scaled(first, difference(second, first))):
        assert result["head.weight"].data_ptr() == result["embed.weight"].data_ptr()
    one_name = add_scaled(first, {"embed.weight": torch.ones(6, 4)})
    assert torch.equal(one_name["head.weight"], first["head.weight"] + 1)
    average = {name: value.clone() for name, value in first.items()}
    average["head.weight"] = average["embed.weight"]
    ema_update(average, second, 0.5)
    torch.testing.assert_close(average["embed.weight"], lerp(first, second, 0.5)["embed.weight"])


def test_entries_tied_in_one_state_only_are_not_confused():
    tied, apart = state(0, tied=True), state(1)
    middle = lerp(tied, apart, 0.5)
    torch.testing.assert_close(middle["head.weight"], (tied["head.weight"] + apart["head.weight"]) / 2)
    torch.testing.assert_close(middle["embed.weight"], (tied["embed.weight"] + apart["embed.weight"]) / 2)


def test_results_never_share_storage_with_inputs():
    first, second = state(0), state(1)
    for result in (lerp(first, second, 0.0), weighted_average([first]), add_scaled(first, {})):
        for name, value in result.items():
            if value.numel():
                assert value.data_ptr() != first[name].data_ptr(), name


class TestEma:
    def test_closed_form(self):
        average, start = state(0), state(0)
        for _ in range(3):
            ema_update(average, state(1), 0.9)
        for name in ("head.weight", "norm.bias"):
            torch.testing.assert_close(average[name], 0.9**3 * start[name] + (1 - 0.9**3) * state(1)[name])
        assert average["steps"].item() == 4

    def test_is_in_place_and_handles_other_dtypes(self):
        average, current = state(0), state(1, torch.bfloat16)
        before = average["norm.bias"].data_ptr()
        assert ema_update(average, current, 0.0) is None
        assert average["norm.bias"].data_ptr() == before
        assert torch.equal(average["norm.bias"], current["norm.bias"].float())
        half = state(0, torch.bfloat16)
        ema_update(half, state(1), 0.5)
        expected = ((state(0, torch.bfloat16)["norm.bias"].float() + state(1)["norm.bias"]) / 2).bfloat16()
        assert torch.equal(half["norm.bias"], expected)

    def test_parameters_that_require_grad(self):
        layer = torch.nn.Linear(2, 2)
        ema_update(dict(layer.named_parameters()), {n: torch.zeros_like(p) for n, p in layer.named_parameters()}, 0.0)
        assert layer.weight.eq(0).all()

    @pytest.mark.parametrize("decay", [-0.1, 1.1])
    def test_decay_outside_the_unit_interval_is_refused(self, decay):
        with pytest.raises(ValueError, match="decay"):
            ema_update(state(0), state(1), decay)


def without(name):
    return {key: value for key, value in state(1).items() if key != name}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lerp(state(0), without("norm.bias"), 0.5), "missing 'norm.bias'"),
        (lambda: lerp(without("norm.bias"), state(0), 0.5), "unexpected 'norm.bias'"),
        (lambda: difference(state(0), state(1) | {"norm.bias": torch.zeros(5)}), "norm.bias"),
        (lambda: difference(state(0), state(1) | {"steps": torch.tensor(1.0)}), "steps"),
        (lambda: weighted_average([]), "no states"), (lambda: weighted_average([state(0)], [1.0, 2.0]), "2 weights for 1"),
        (lambda: weighted_average([state(0)] * 2, [1.0, -1.0]), "sum other than 0"),
        (lambda: weighted_average([state(0)], [float("nan")]), "finite"),
        (lambda: add_scaled(state(0), {"new": torch.ones(1)}), "base lacks: 'new'"),
        (lambda: add_scaled(state(0), {"steps": torch.tensor(1)}), "floating point"),
        (lambda: add_scaled(state(0, tied=True), {"embed.weight": torch.ones(6, 4), "head.weight": torch.zeros(6, 4)}), "tied"),
        (lambda: lerp(state(0), state(1), 0.5, precision=torch.float16), "precision"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
