"""Losses over the known solutions of a task: published closed forms, limits, and refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmalign.core.supervised import length_normalised, mle_aug, mml

NLL = (2.0, 3.0, 5.0)


def log_probs(*nll: float) -> Tensor:
    return -torch.tensor(nll, dtype=torch.float64)


def value_and_weights(loss: Any, *nll: float, **arguments: Any) -> tuple[float, list[float]]:
    x = log_probs(*nll).requires_grad_()
    value = loss(x, torch.zeros(len(nll), dtype=torch.long), **arguments)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    return float(value.detach()), (-gradient).tolist()


def test_closed_forms_of_three_solutions() -> None:
    assert value_and_weights(mle_aug, *NLL) == (10.0, [1.0, 1.0, 1.0])
    value, weights = value_and_weights(mle_aug, *NLL, normalize=True)
    assert value == pytest.approx(10 / 3)
    assert weights == pytest.approx([1 / 3] * 3)
    value, weights = value_and_weights(mml, *NLL)
    assert value == pytest.approx(1.650988, abs=1e-6)
    assert weights == pytest.approx([0.705385, 0.259496, 0.035119], abs=1e-6)
    value, weights = value_and_weights(mml, *NLL, beta=0.25)
    assert value == pytest.approx(-1.245796, abs=1e-6)
    assert weights == pytest.approx([0.444214, 0.345954, 0.209832], abs=1e-6)


def test_beta_towards_zero_weighs_all_alike() -> None:
    beta = 1e-6
    value, weights = value_and_weights(mml, *NLL, beta=beta)
    assert weights == pytest.approx([1 / 3] * 3, abs=1e-5)
    assert value + math.log(3) / beta == pytest.approx(10 / 3, abs=1e-4)


@pytest.mark.parametrize(("loss", "arguments"), [
    (mle_aug, {}), (mle_aug, {"normalize": True}), (mml, {}), (mml, {"beta": 0.25}),
])
def test_one_solution_is_maximum_likelihood(loss: Any, arguments: dict[str, Any]) -> None:
    value, weights = value_and_weights(loss, 4.0, **arguments)
    assert value == pytest.approx(4.0)
    assert weights == pytest.approx([1.0])
    x = length_normalised(log_probs(4.0), torch.tensor([7]), torch.tensor([0]))
    assert float(x) == -4.0


@settings(deadline=None)
@given(st.lists(st.floats(0.1, 2000), min_size=1, max_size=6), st.lists(st.floats(0.1, 2000), min_size=1, max_size=6),
       st.sampled_from([1.0, 0.5, 0.05]))
def test_groups_do_not_meet_and_long_programs_do_not_underflow(first: list[float], second: list[float], beta: float) -> None:
    x, group = log_probs(*first, *second), torch.tensor([0] * len(first) + [1] * len(second))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    for loss, arguments in ((mle_aug, {}), (mml, {"beta": beta})):
        both = loss(x[order], group[order], **arguments)  # type: ignore[operator]
        for q, own in enumerate((first, second)):
            assert float(both[q]) == pytest.approx(value_and_weights(loss, *own, **arguments)[0], rel=1e-9, abs=1e-9)


def test_length_normalisation_takes_the_longest_of_the_task() -> None:
    x = length_normalised(log_probs(2, 6, 5), torch.tensor([2, 4, 5]), torch.tensor([0, 0, 1]))
    assert x.tolist() == [-4.0, -6.0, -5.0]


def test_gradients_in_double_precision() -> None:
    group = torch.tensor([0, 1, 0, 1, 1])
    x = log_probs(3, 1, 2, 8, 0.5).requires_grad_()
    for function in (lambda v: mle_aug(v, group), lambda v: mml(v, group), lambda v: mml(v, group, beta=0.3),
                     lambda v: mml(length_normalised(v, torch.tensor([3, 1, 2, 5, 4]), group), group)):
        assert torch.autograd.gradcheck(function, x)


@pytest.mark.parametrize(("call", "part"), [
    (lambda: mml(log_probs(1), torch.tensor([0]), beta=0.0), "beta"),
    (lambda: mml(log_probs(1), torch.tensor([0]), beta=1.1), "beta"),
    (lambda: mle_aug(log_probs(1), torch.tensor([1])), "group 0 has no member"),
    (lambda: mml(log_probs(1, 2), torch.tensor([0])), "both are"),
    (lambda: length_normalised(log_probs(1), torch.tensor([0]), torch.tensor([0])), "length"),
])
def test_what_means_nothing_is_refused(call: Any, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        call()
