"""Spherical interpolation: closed forms, schedules over depth, ties, refusals, and agreement with mergekit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.weights.interpolate import Schedule, SlerpCounts, layer_depths, slerp, slerp_tensor
from mmalign.weights.merge import MERGES, linear, merge_states
from mmalign.weights.merge import slerp as slerp_function

A, B = torch.tensor([3.0, 0.0, 4.0]), torch.tensor([0.0, 2.0, 1.0])


def vectors(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_worked_example_of_both_formulas():
    assert slerp_tensor(A, B, 0.5).tolist() == pytest.approx([1.820510, 1.213673, 3.034183], abs=1e-6)
    geometric = slerp_tensor(A, B, 0.5, norm="geometric")
    assert geometric.tolist() == pytest.approx([1.217448, 1.814865, 2.530697], abs=1e-6)
    assert float(geometric.norm()) == pytest.approx(math.sqrt(5 * math.sqrt(5)), abs=1e-6)


@settings(deadline=None)
@given(st.integers(0, 50), st.floats(0, 1))
def test_symmetry_and_end_points(seed, t):
    a, b = vectors(seed, 7), vectors(seed + 1000, 7)
    assert torch.equal(slerp_tensor(a, b, 0.0), a)
    assert torch.equal(slerp_tensor(a, b, 1.0), b)
    torch.testing.assert_close(slerp_tensor(a, b, t), slerp_tensor(b, a, 1 - t))
    torch.testing.assert_close(slerp_tensor(a, a, t), a)


@settings(deadline=None)
@given(st.integers(0, 50), st.floats(0.01, 0.99))
def test_equal_norms_stay_on_the_sphere_and_both_formulas_agree(seed, t):
    a, b = vectors(seed, 9), vectors(seed + 1000, 9)
    b = b * (a.norm() / b.norm())
    out = slerp_tensor(a, b, t, threshold=1.0)
    assert float(out.norm()) == pytest.approx(float(a.norm()))
    torch.testing.assert_close(out, slerp_tensor(a, b, t, norm="geometric", threshold=1.0))


def test_orthogonal_unit_vectors_meet_half_way():
    e = torch.eye(2)
    torch.testing.assert_close(slerp_tensor(e[0], e[1], 0.5), (e[0] + e[1]) / math.sqrt(2))


def test_nearly_parallel_tensors_take_the_straight_line_and_are_counted():
    counts = SlerpCounts()
    near = A + torch.tensor([0.0, 0.01, 0.0])
    state = slerp({"near": A, "far": A, "zero": torch.zeros(3)}, {"near": near, "far": B, "zero": B}, 0.25, counts=counts)
    torch.testing.assert_close(state["near"], 0.75 * A + 0.25 * near)
    torch.testing.assert_close(state["zero"], 0.25 * B)
    assert counts.metrics()["fallback_share"] == pytest.approx(2 / 3)
    assert counts.metrics()["smallest_cosine"] == pytest.approx(4 / 5 / math.sqrt(5))
    assert counts.fallback_names == ["near", "zero"]


def test_bfloat16_is_computed_in_float32_with_sums_in_float64():
    """A bfloat16 or float32 sum over millions of entries is wrong; so is a cosine above 1 in acos."""
    first = torch.full((3_000_000,), 0.1, dtype=torch.bfloat16)
    second = first.clone()
    second[: 1_000_000] = -0.1
    counts = SlerpCounts()
    out = slerp({"w": first}, {"w": second}, 0.5, counts=counts)["w"]
    assert out.dtype == torch.bfloat16
    assert counts.smallest_cosine == pytest.approx(1 / 3, abs=1e-12)
    angle = math.acos(1 / 3)
    weight = math.sin(angle / 2) / math.sin(angle)
    expected = torch.tensor(2 * weight * float(first[0])).bfloat16()
    assert out[-1] == expected
    same = slerp({"w": first}, {"w": first}, 0.5)["w"]
    assert torch.equal(same, first)


def test_depth_schedule_of_the_paper_on_six_layers():
    names = [f"model.layers.{i}.{part}.weight" for i in range(6) for part in ("self_attn.q_proj", "mlp.up_proj", "norm")]
    names += ["model.embed_tokens.weight"]
    depths = layer_depths(names)
    t = {"self_attn": [0, 0.5, 0.3, 0.7, 1], "mlp": [1, 0.5, 0.7, 0.3, 0], "default": 0.5}
    schedule = Schedule(t)
    attention = [schedule.at(f"model.layers.{i}.self_attn.q_proj.weight", depths[f"model.layers.{i}.self_attn.q_proj.weight"])
                 for i in range(6)]
    mlp = [schedule.at(f"model.layers.{i}.mlp.up_proj.weight", depths[f"model.layers.{i}.mlp.up_proj.weight"]) for i in range(6)]
    assert attention == pytest.approx([0, 0.4, 0.38, 0.46, 0.76, 1])
    assert mlp == pytest.approx([1, 0.6, 0.62, 0.54, 0.24, 0])
    assert schedule.at("model.layers.3.norm.weight", depths["model.layers.3.norm.weight"]) == 0.5
    assert schedule.at("model.embed_tokens.weight", None) == 0.5
    # mergekit's spelling, and the first rule that fits wins
    rules = [{"filter": "self_attn", "value": t["self_attn"]}, {"filter": "q_proj", "value": 0.9}, {"value": 0.5}]
    assert Schedule(rules).at("model.layers.5.self_attn.q_proj.weight", 1.0) == 1


def test_list_over_depth_outside_of_layers_and_a_single_layer():
    assert Schedule([0, 1]).at("embed.weight", None) == 0.5
    assert layer_depths(["h.0.w", "wte"]) == {"h.0.w": 1.0, "wte": None}
    assert Schedule([0, 0.2, 1]).at("h.0.w", 1.0) == 1


def test_depths_rank_the_layers_of_each_stack():
    depths = layer_depths(["encoder.0.w", "encoder.1.w", "encoder.2.w", "decoder.4.w", "decoder.6.w", "encoder.2.block.9.w"])
    assert depths["encoder.1.w"] == 0.5
    assert (depths["decoder.4.w"], depths["decoder.6.w"]) == (0.0, 1.0)
    assert depths["encoder.2.block.9.w"] == 1.0  # the first number counts


def test_tied_entries_are_one_tensor_and_integers_are_copied():
    tied_a, tied_b = vectors(0, 4, 3).float(), vectors(1, 4, 3).float()
    first = {"embed": tied_a, "head": tied_a, "steps": torch.tensor([3])}
    second = {"embed": tied_b, "head": tied_b, "steps": torch.tensor([9])}
    counts = SlerpCounts()
    merged = slerp(first, second, 0.5, counts=counts)
    assert merged["embed"].data_ptr() == merged["head"].data_ptr()
    assert counts.tensors == 1
    assert merged["steps"].tolist() == [3]
    assert torch.equal(first["embed"], vectors(0, 4, 3).float())  # the inputs are left alone


@pytest.mark.parametrize(("call", "message"), [
    (lambda: slerp({"a": A}, {"b": A}, 0.5), "missing 'a', unexpected 'b'"),
    (lambda: slerp({"w": A}, {"w": A[:2]}, 0.5), r"'w' has shape \(3,\)"),
    (lambda: slerp({"w": A}, {"w": B}, 1.5), r"t is 1.5; it must lie in \[0, 1\]"),
    (lambda: slerp({"w": A}, {"w": B}, {"mlp": [0, -0.1], "default": 0.5}), "t is -0.1 for 'mlp'"),
    (lambda: slerp({"w": A}, {"w": B}, {"mlp": 0.5}), "no rule fits the tensor 'w'"),
    (lambda: slerp({"w": A}, {"w": -A}, 0.5), "'w': the two tensors are opposite"),
    (lambda: slerp({"w": A}, {"w": A.long()}, 0.5), "'w' is torch.float32 in the first state"),
    (lambda: slerp({"w": A}, {"w": torch.full((3,), math.nan)}, 0.5), "'w' holds NaN"),
    (lambda: slerp({"w": A}, {"w": torch.full((3,), math.inf)}, 0.5), "'w' holds NaN or infinity"),
    (lambda: slerp_tensor(A, B, 0.5, norm="arithmetic"), "norm is 'arithmetic'"),
    (lambda: Schedule("half"), "neither a number"),
    (lambda: Schedule([]), "neither a number"),
    (lambda: Schedule([{"filter": "mlp", "t": 1}]), "is no rule"),
    (lambda: linear(weights=[1, -1]), "weights are"),
    (lambda: linear(weights=[1, 1], t=0.5), "exclude each other"),
    (lambda: merge_states([{"w": A}] * 3, linear(t=0.5)), "exactly 2 models, not 3"),
    (lambda: merge_states([{"w": A}] * 3, linear(weights=[1, 1])), "2 weights for 3 models"),
    (lambda: MERGES.get("slerp").check_models(3), "slerp merges exactly 2 models, not 3"),
    (lambda: slerp_function(threshold=0.0), "threshold is 0.0"),
])
def test_refusals_name_the_tensor_or_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_opposite_tensors_may_be_left_to_one_model():
    assert torch.equal(slerp({"w": A}, {"w": -A}, 1.0)["w"], -A)


def test_linear_function_is_the_weighted_average():
    states = [{"w": A}, {"w": B}, {"w": A + B}]
    torch.testing.assert_close(merge_states(states, linear(weights=[1, 1, 2]))["w"], (A + B + 2 * (A + B)) / 4)
    torch.testing.assert_close(merge_states(states[:2], linear(weights=[2, 1], normalize=False))["w"], 2 * A + B)
    torch.testing.assert_close(merge_states(states[:2], linear(t=0.25))["w"], 0.75 * A + 0.25 * B)
    torch.testing.assert_close(merge_states(states[:2], slerp_function(t=0.5))["w"], slerp_tensor(A, B, 0.5))


@pytest.mark.peer
def test_agrees_with_mergekit():
    theirs = pytest.importorskip("mergekit.merge_methods.slerp").slerp
    for seed in range(20):
        a, b = vectors(seed, 5, 8).float(), vectors(seed + 100, 5, 8).float()
        t = seed / 19
        torch.testing.assert_close(slerp_tensor(a, b, t), theirs(torch.tensor([t]), a[None], b[None])[0])
        near = a + 1e-3 * b
        torch.testing.assert_close(slerp_tensor(a, near, t), theirs(torch.tensor([t]), a[None], near[None])[0])
