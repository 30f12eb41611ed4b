"""The chunked head: agreement with full logits, exact gradients, and what it promises about memory and work."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from mmalign.core import output_head
from mmalign.core.output_head import WANTED, OutputHead, score_positions

DIFFERENTIABLE = ("entropy", "lse", "mean_logp")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks even for a tiny vocabulary, as a small ``chunk`` gives for a large one."""
    monkeypatch.setattr(output_head, "_MIN_BLOCK", 1)


def problem(n=5, vocabulary=11, size=3, *, bias=True, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, size, generator=g, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, size, generator=g, dtype=dtype, requires_grad=True)
    offset = torch.randn(vocabulary, generator=g, dtype=dtype, requires_grad=True) if bias else None
    return hidden, weight, offset, torch.randint(vocabulary, (n,), generator=g)


def oracle(hidden, head, targets, temperature=1.0):
    logits = head.logits(hidden) / temperature
    logp = logits.log_softmax(-1)
    p = logp.exp()
    return {
        "logp": logp.gather(1, targets[:, None]).squeeze(1), "lse": logits.logsumexp(-1), "entropy": -(p * logp).sum(1),
        "mean_logp": logp.mean(1), "sum_p2": p.square().sum(1), "correct": (logits.argmax(1) == targets).to(logits.dtype),
    }


OPTIONS = list(itertools.product((None, 2.0), (True, False), ((1.0, 1.0), (0.7, 0.5)), (1, 3, 256)))


@pytest.mark.parametrize(("cap", "bias", "scales", "chunk"), OPTIONS)
def test_values_and_gradients_are_exact(small_blocks, cap, bias, scales, chunk):
    hidden, weight, offset, targets = problem(bias=bias)
    temperature, scale = scales
    options = {"temperature": temperature, "chunk": chunk}
    scores = score_positions(hidden, OutputHead(weight, offset, scale, cap), targets, want=WANTED, **options)
    expected = oracle(hidden, OutputHead(weight, offset, scale, cap), targets, temperature)
    assert scores.keys() == expected.keys()
    for name, value in scores.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-11)

    for want in ((), ("lse",), DIFFERENTIABLE):
        def outputs(hidden, weight, offset=None, want=want):
            found = score_positions(hidden, OutputHead(weight, offset, scale, cap), targets, want=want, **options)
            return tuple(found.values())

        inputs = (hidden, weight) if offset is None else (hidden, weight, offset)
        assert gradcheck(outputs, inputs)
        frozen = tuple(tensor.detach() for tensor in inputs[1:])
        assert gradcheck(lambda h, frozen=frozen, outputs=outputs: outputs(h, *frozen), (hidden,))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 9), vocabulary=st.integers(2, 40), chunk=st.integers(1, 300), seed=st.integers(0, 99))
def test_chunk_changes_nothing(n, vocabulary, chunk, seed):
    hidden, weight, offset, targets = problem(n, vocabulary, 4, seed=seed)
    upstream = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    results = []
    for size in (chunk, 10**6):
        scores = score_positions(hidden, OutputHead(weight, offset), targets, chunk=size, want=("entropy",))
        total = (scores["logp"] * upstream).sum() + scores["entropy"].square().sum()
        results.append([*scores.values(), *torch.autograd.grad(total, (hidden, weight, offset))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_float32_agrees_with_cross_entropy():
    hidden, weight, offset, targets = problem(64, 3000, 32, dtype=torch.float32)
    ours = -score_positions(hidden, OutputHead(weight, offset), targets)["logp"].mean()
    full = torch.nn.functional.cross_entropy(torch.nn.functional.linear(hidden, weight, offset), targets)
    torch.testing.assert_close(ours, full)
    for one, other in zip(
        torch.autograd.grad(ours, (hidden, weight, offset)), torch.autograd.grad(full, (hidden, weight, offset)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("trained", [True, False])
def test_gradient_of_a_confident_token_keeps_its_relative_precision(trained):
    """1 - p must not come out of a subtraction: p rounds to 1 in half precision long before the gradient vanishes."""
    hidden = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[8.0, 1.0], [0.0, -1.0], [-1.0, 2.0]], dtype=torch.bfloat16, requires_grad=trained)
    logp = score_positions(hidden, OutputHead(weight), torch.tensor([0]))["logp"]
    logp.sum().backward()
    exact = hidden.detach().double().requires_grad_()
    expected = oracle(exact, OutputHead(weight.detach().double()), torch.tensor([0]))["logp"]
    expected.sum().backward()
    torch.testing.assert_close(logp.double(), expected, rtol=1e-5, atol=1e-9)
    tolerance = 0.05 if not trained else 0.1
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=tolerance, atol=0)


def test_half_precision_hidden_states_with_a_float32_head():
    """What autocast produces: float32 results, and the weight's gradient in the weight's own dtype."""
    hidden, weight, offset, targets = problem(6, 30, 8, dtype=torch.float32)
    half = hidden.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = score_positions(half, OutputHead(weight, offset), targets, want=("entropy",))
    (scores["logp"].sum() + scores["entropy"].sum()).backward()
    assert scores["logp"].dtype == torch.float32
    assert (half.grad.dtype, weight.grad.dtype, offset.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    full = oracle(hidden, OutputHead(weight, offset), targets)
    expected = torch.autograd.grad(full["logp"].sum() + full["entropy"].sum(), (hidden, weight))
    torch.testing.assert_close(half.grad.float(), expected[0], rtol=0.05, atol=0.05)
    torch.testing.assert_close(weight.grad, expected[1], rtol=0.05, atol=0.05)


def test_backward_twice_gives_the_same_gradient():
    hidden, weight, _, targets = problem(bias=False)
    loss = score_positions(hidden, OutputHead(weight), targets)["logp"].sum()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_very_unlikely_and_very_large_logits_stay_finite():
    hidden = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    weight = torch.tensor([[1e4], [0.0], [-1e4]])
    scores = score_positions(hidden, OutputHead(weight), torch.tensor([2, 2]), want=WANTED)
    assert scores["logp"].tolist() == [-2e4, 0.0]
    assert scores["correct"].tolist() == [0.0, 1.0]
    assert scores["entropy"].tolist() == [0.0, 0.0]
    assert scores["sum_p2"].tolist() == [1.0, 1.0]
    torch.autograd.grad(scores["logp"].sum(), hidden)


class Recorder(TorchDispatchMode):
    """Counts matrix products and remembers the largest tensor made."""

    def __init__(self):
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            self.products += 1
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.largest = max(self.largest, result.untyped_storage().nbytes() // result.element_size())
        return result


@pytest.mark.parametrize(
    ("hidden_grad", "weight_grad", "grad_mode", "forward", "backward"),
    [(True, True, True, 1, 3), (True, False, True, 2, 0), (True, True, False, 1, None), (False, True, True, 1, 2)],
    ids=["trained", "frozen head", "no_grad", "head only"],
)
def test_number_of_vocabulary_wide_products(hidden_grad, weight_grad, grad_mode, forward, backward):
    hidden, weight, _, targets = problem(8, 300, 4, bias=False)
    hidden.requires_grad_(hidden_grad)
    weight.requires_grad_(weight_grad)
    with Recorder() as seen, torch.set_grad_enabled(grad_mode):
        logp = score_positions(hidden, OutputHead(weight), targets)["logp"]
    assert seen.products == forward
    assert logp.requires_grad is (backward is not None)
    if backward is not None:
        with Recorder() as seen:
            logp.sum().backward()
        assert seen.products == backward


@pytest.mark.parametrize("chunk", [2, 16])
@pytest.mark.parametrize("want", [(), WANTED])
def test_no_tensor_is_larger_than_the_chunk(small_blocks, chunk, want):
    n, vocabulary, size = 64, 2000, 4
    hidden, weight, _, targets = problem(n, vocabulary, size, bias=False)
    with Recorder() as seen:
        scores = score_positions(hidden, OutputHead(weight), targets, chunk=chunk, want=want)
        (scores["logp"].sum() + (scores["entropy"].sum() if want else 0)).backward()
    assert seen.largest <= max(chunk * vocabulary, vocabulary * size)


def test_no_positions_give_zero_gradients():
    hidden, weight, offset, _ = problem(0, 7, 3)
    scores = score_positions(hidden, OutputHead(weight, offset), torch.zeros(0, dtype=torch.long), want=("entropy",))
    (scores["logp"].sum() + scores["entropy"].sum()).backward()
    assert weight.grad.eq(0).all()
    assert offset.grad.eq(0).all()
    assert hidden.grad.shape == (0, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature"), ({"chunk": 0}, "chunk"), ({"want": ("entropi",)}, "want"),
        ({"targets": torch.tensor([0, 11])}, "vocabulary has 11"), ({"targets": torch.tensor([-100, 1])}, "vocabulary has 11"),
        ({"targets": torch.tensor([1])}, "targets"), ({"hidden": torch.zeros(2, 4)}, "hidden"),
    ],
)
def test_refusals(change, message):
    arguments = {"hidden": torch.zeros(2, 3), "targets": torch.tensor([0, 1])} | change
    hidden, targets = arguments.pop("hidden"), arguments.pop("targets")
    with pytest.raises(ValueError, match=message):
        score_positions(hidden, OutputHead(torch.zeros(11, 3)), targets, **arguments)


@pytest.mark.parametrize(
    "arguments", [{"weight": torch.zeros(3)}, {"weight": torch.zeros(3, 2), "bias": torch.zeros(2)},
                  {"weight": torch.zeros(3, 2), "soft_cap": 0.0}]
)
def test_bad_heads_are_refused(arguments):
    with pytest.raises(ValueError, match=r"head|soft_cap"):
        OutputHead(**arguments)
