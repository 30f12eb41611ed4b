"""Reductions: closed forms, and the property that splitting the rows changes nothing."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.core.reduce import REDUCTIONS, count, reduce

VALUES = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0], [64.0, 5.0, 6.0]])
MASK = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]])


@pytest.mark.parametrize(
    ("how", "value", "number"),
    [
        ("token_mean", 59 / 5, 5), ("seq_mean_token_mean", (1.5 + 56 / 3) / 2, 2), ("seq_mean_token_sum", 59 / 2, 2),
        ("seq_mean_token_sum_norm", 59 / 2 / 10, 20), ("sum", 59, 1), ("sum_norm", 5.9, 10),
    ],
)
def test_closed_forms(how, value, number):
    """The empty third row leaves numerator and denominator."""
    assert reduce(VALUES, MASK, how=how, norm_length=10).item() == pytest.approx(value)
    assert count(MASK, how, norm_length=10) == number


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("token-mean", "token_mean"), ("dapo", "token_mean"), ("bnpo", "token_mean"), ("grpo", "seq_mean_token_mean"),
        ("dr_grpo", "seq_mean_token_sum_norm"), ("example", "seq_mean_token_mean"), ("seq-mean-token-sum", "seq_mean_token_sum"),
    ],
)
def test_other_spellings(alias, name):
    assert REDUCTIONS.canonical(alias) == name


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=8), cuts=st.sets(st.integers(1, 7)),
    how=st.sampled_from(REDUCTIONS.names()), seed=st.integers(0, 999), by_row=st.booleans(), weighted=st.booleans(),
)
def test_any_split_gives_the_same_value_and_gradient(lengths, cuts, how, seed, by_row, weighted):
    g = torch.Generator().manual_seed(seed)
    rows, width = len(lengths), 6
    values = torch.randn(*((rows,) if by_row else (rows, width)), generator=g, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    weight = torch.rand(rows, generator=g, dtype=torch.float64) if weighted else None
    whole = reduce(values, mask, how=how, norm_length=width, weight=weight)
    expected = torch.autograd.grad(whole, values)[0]
    edges = [0, *sorted(c for c in cuts if c < rows), rows]
    parts = [slice(a, b) for a, b in itertools.pairwise(edges)]
    total = sum(count(mask[part], how, norm_length=width) for part in parts)
    split = sum(
        reduce(values[part], mask[part], how=how, norm_length=width, denominator=total,
               weight=None if weight is None else weight[part])
        for part in parts
    )
    torch.testing.assert_close(split, whole)
    torch.testing.assert_close(torch.autograd.grad(split, values)[0], expected)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6), extra=st.integers(0, 4), how=st.sampled_from(REDUCTIONS.names()),
    seed=st.integers(0, 99),
)
def test_padding_and_order_of_rows_change_nothing(lengths, extra, how, seed):
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(len(lengths), 5, generator=g, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    plain = reduce(values, mask, how=how, norm_length=9)
    padded = reduce(
        torch.nn.functional.pad(values, (0, extra), value=float("nan")), torch.nn.functional.pad(mask, (0, extra)),
        how=how, norm_length=9,
    )
    order = torch.randperm(len(lengths), generator=g)
    torch.testing.assert_close(padded, plain)
    torch.testing.assert_close(reduce(values[order], mask[order], how=how, norm_length=9), plain)


@pytest.mark.parametrize("how", REDUCTIONS.names())
def test_nothing_to_count_gives_a_connected_zero(how):
    values = torch.ones(2, 3, requires_grad=True)
    loss = reduce(values, torch.zeros(2, 3), how=how, norm_length=4)
    loss.backward()
    assert loss.item() == 0
    assert values.grad.eq(0).all()


def test_values_per_row_stand_for_every_action_of_the_row():
    values = torch.tensor([3.0, 6.0])
    mask = torch.tensor([[1, 0], [1, 1]])
    assert reduce(values, mask, how="token_mean").item() == 5.0
    assert reduce(values, mask, how="seq_mean_token_mean").item() == 4.5
    assert reduce(values, torch.tensor([1, 1]), how="token_mean").item() == 4.5


def test_row_weights_enter_the_numerator_only():
    values, mask = torch.tensor([2.0, 4.0]), torch.ones(2)
    assert reduce(values, mask, how="seq_mean_token_mean", weight=torch.tensor([0.5, 0.0])).item() == 0.5


def test_half_precision_values_are_summed_in_float32():
    values = torch.full((1, 4096), 0.1, dtype=torch.bfloat16)
    result = reduce(values, torch.ones(1, 4096), how="sum")
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(4096 * values[0, 0].item(), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"how": "tokenmean"}, "did you mean 'token_mean'"), ({"how": "seq_mean_token_sum_norm"}, "norm_length"),
        ({"how": "sum_norm", "norm_length": 0}, "norm_length"), ({"how": "token_mean", "denominator": -1.0}, "denominator"),
        ({"how": "token_mean", "weight": torch.ones(2)}, "weight"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        reduce(VALUES, MASK, **arguments)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="mask"):
        reduce(VALUES, MASK[:2], how="sum")
    with pytest.raises(ValueError, match="mask"):
        reduce(VALUES, MASK[:, :2], how="sum")
