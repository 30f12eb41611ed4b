"""Shifting, masks, sequence scores and the importance helpers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck

from mmalign.core.logprobs import (
    ActionScores,
    OutputHead,
    dense_log_probs,
    importance_weights,
    masked_log_mean_exp,
    paired_head_length,
    sequence_log_prob,
    token_log_probs,
)


def random_batch(rows=3, length=6, vocabulary=13, size=5, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, length, size, generator=g, dtype=dtype, requires_grad=True)
    head = nn.Linear(size, vocabulary, dtype=dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g, dtype=dtype))
    labels = torch.randint(vocabulary, (rows, length), generator=g)
    return hidden, head, labels.masked_fill(torch.rand(labels.shape, generator=g) < 0.4, -100)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 4), length=st.integers(2, 7), seed=st.integers(0, 999))
def test_agrees_with_dense_logits_in_value_and_gradient(rows, length, seed):
    hidden, head, labels = random_batch(rows, length, seed=seed)
    scores = token_log_probs(hidden, head, labels)
    dense = dense_log_probs(head(hidden), labels)
    assert torch.equal(scores.mask, labels[:, 1:] != -100)
    torch.testing.assert_close(scores.logp, dense)
    weights = torch.randn(dense.shape, dtype=dense.dtype, generator=torch.Generator().manual_seed(seed))
    wrt = (hidden, head.weight, head.bias)
    one = torch.autograd.grad((scores.logp * weights).sum(), wrt)
    other = torch.autograd.grad((dense * weights).sum(), wrt, materialize_grads=True)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)


def test_first_token_is_never_predicted_and_column_a_is_token_a_plus_1():
    hidden, head, _ = random_batch(1, 4)
    labels = torch.tensor([[7, -100, 2, -100]])
    scores = token_log_probs(hidden, head, labels)
    assert scores.mask.tolist() == [[False, True, False]]
    expected = head(hidden[0, 1]).log_softmax(-1)[2]
    torch.testing.assert_close(scores.logp, torch.tensor([[0.0, expected.item(), 0.0]], dtype=torch.float64))


def test_tied_head_gets_its_gradient_once():
    embedding = nn.Embedding(9, 4, dtype=torch.float64)
    labels = torch.tensor([[1, 2, 3, 8]])
    token_log_probs(embedding(labels), embedding.weight, labels).logp.sum().backward()
    once = embedding.weight.grad.clone()
    embedding.weight.grad = None
    dense_log_probs(embedding(labels) @ embedding.weight.T, labels).sum().backward()
    torch.testing.assert_close(once, embedding.weight.grad)


def test_all_masked_batch_gives_zeros_connected_to_hidden_and_head():
    hidden, head, labels = random_batch()
    scores = token_log_probs(hidden, head, torch.full_like(labels, -100), want=("entropy",))
    assert scores.logp.abs().sum() == 0
    scores.logp.sum().backward()
    for tensor in (hidden, head.weight, head.bias):
        assert tensor.grad is not None
        assert tensor.grad.eq(0).all()


def test_prompt_tokens_that_are_not_scored_do_not_matter():
    hidden, head, labels = random_batch()
    changed = hidden.detach().clone()
    unused = torch.cat([labels[:, 1:] == -100, torch.ones(labels.shape[0], 1, dtype=torch.bool)], 1)
    changed[unused] = float("nan")
    torch.testing.assert_close(token_log_probs(changed, head, labels).logp, token_log_probs(hidden, head, labels).logp)


def test_temperature_and_wanted_scores():
    hidden, head, labels = random_batch()
    scores = token_log_probs(hidden, head, labels, temperature=0.5, want=("entropy", "lse"))
    torch.testing.assert_close(scores.logp, dense_log_probs(head(hidden) / 0.5, labels))
    logp = (head(hidden[:, :-1]) / 0.5).log_softmax(-1)
    entropy = torch.where(scores.mask, -(logp.exp() * logp).sum(-1), 0.0)
    torch.testing.assert_close(scores.entropy, entropy)
    assert scores.lse is not None
    assert scores.correct is None


def test_soft_capped_head():
    hidden, head, labels = random_batch()
    capped = OutputHead(head.weight, head.bias, soft_cap=3.0)
    logits = 3 * torch.tanh(head(hidden) / 3)
    torch.testing.assert_close(token_log_probs(hidden, capped, labels).logp, dense_log_probs(logits, labels))


@settings(max_examples=40, deadline=None)
@given(mask=st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
def test_compact_keeps_order_and_sums(mask):
    kept = torch.tensor(mask)
    values = torch.where(kept, torch.arange(1.0, kept.numel() + 1).view(kept.shape), 0.0)
    scores = ActionScores(values, kept, entropy=2 * values).compact()
    assert scores.logp.shape[1] == max(int(kept.sum(1).max()), 1)
    for row in range(len(mask)):
        expected = values[row][kept[row]].tolist()
        assert scores.logp[row].tolist() == expected + [0.0] * (scores.logp.shape[1] - len(expected))
        assert scores.mask[row].sum() == len(expected)
    assert torch.equal(scores.entropy, 2 * scores.logp)


def test_take_and_detach():
    values = torch.arange(6.0).view(3, 2).requires_grad_()
    scores = ActionScores(values, torch.ones(3, 2))
    assert scores.take([2, 0]).logp.tolist() == [[4.0, 5.0], [0.0, 1.0]]
    assert scores.take(slice(1, None)).logp.shape == (2, 2)
    assert not scores.detach().logp.requires_grad


def test_fields_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="entropy has shape"):
        ActionScores(torch.zeros(2, 3), torch.ones(2, 3), entropy=torch.zeros(2, 2))


class TestSequenceLogProb:
    logp = torch.tensor([[-1.0, -2.0, -4.0, -8.0], [-0.5, -0.25, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)

    def test_sum_and_mean(self):
        total, length = sequence_log_prob(self.logp, self.mask)
        assert total.tolist() == [-15.0, -0.75]
        assert length.tolist() == [4.0, 2.0]
        assert sequence_log_prob(self.logp, self.mask, reduce="mean")[0].tolist() == [-3.75, -0.375]

    def test_masked_entries_may_be_anything(self):
        dirty = torch.where(self.mask, self.logp, float("nan"))
        assert torch.equal(sequence_log_prob(dirty, self.mask)[0], sequence_log_prob(self.logp, self.mask)[0])

    def test_tail_weight(self):
        head = paired_head_length(self.mask[:1], self.mask[1:]).expand(2)
        assert head.tolist() == [2, 2]
        half, length = sequence_log_prob(self.logp, self.mask, tail_weight=0.5, head_length=head)
        assert half.tolist() == [-3.0 - 6.0, -0.75]
        assert length.tolist() == [3.0, 2.0]
        assert sequence_log_prob(self.logp, self.mask, tail_weight=0.0, head_length=head)[0].tolist() == [-3.0, -0.75]
        one = sequence_log_prob(self.logp, self.mask, tail_weight=1.0, head_length=head)
        assert torch.equal(one[0], sequence_log_prob(self.logp, self.mask)[0])

    def test_head_counts_scored_actions_not_columns(self):
        mask = torch.tensor([[0, 1, 0, 1]], dtype=torch.bool)
        value, _ = sequence_log_prob(self.logp[:1], mask, tail_weight=0.0, head_length=torch.tensor([1]))
        assert value.tolist() == [-2.0]

    @pytest.mark.parametrize("change", [{"tail_weight": 0.5}, {"tail_weight": 1.5}, {"reduce": "max"}])
    def test_bad_arguments(self, change):
        with pytest.raises(ValueError, match=r"tail_weight|reduce"):
            sequence_log_prob(self.logp, self.mask, **change)

    def test_empty_rows_are_refused(self):
        with pytest.raises(ValueError, match=r"rows \[1\]"):
            sequence_log_prob(self.logp, torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0]]))


class TestMaskedLogMeanExp:
    def test_value_and_gradient(self):
        x = torch.tensor([1.0, 2.0, -3.0, 0.5, 7.0], dtype=torch.float64, requires_grad=True)
        group = torch.tensor([0, 0, 0, 2, 2])
        keep = torch.tensor([True, True, False, True, False])
        value = masked_log_mean_exp(x, group, keep, tau=0.5)
        expected = 0.5 * math.log((math.exp(2) + math.exp(4)) / 2)
        torch.testing.assert_close(value, torch.tensor([expected, 0.0, 0.5], dtype=torch.float64))
        assert gradcheck(lambda x: masked_log_mean_exp(x, group, keep, tau=0.5), (x,))
        gradient = torch.autograd.grad(value[0], x)[0]
        torch.testing.assert_close(gradient[:2], (x.detach()[:2] / 0.5).softmax(0))

    def test_infinite_tau_is_the_mean_and_large_tau_tends_to_it(self):
        x, group, keep = torch.tensor([1.0, 3.0], dtype=torch.float64), torch.zeros(2, dtype=torch.long), torch.ones(2)
        assert masked_log_mean_exp(x, group, keep, tau=math.inf).item() == 2.0
        assert masked_log_mean_exp(x, group, keep, tau=1e6).item() == pytest.approx(2.0, abs=1e-5)

    def test_no_overflow(self):
        x = torch.tensor([1e4, 1e4 - 1.0])
        value = masked_log_mean_exp(x, torch.zeros(2, dtype=torch.long), torch.ones(2), tau=0.01)
        assert value.item() == pytest.approx(1e4 - 0.01 * math.log(2), abs=1e-2)


class TestImportanceWeights:
    logp = torch.log(torch.tensor([[0.5, 0.2], [0.9, 0.3]]))
    behaviour = torch.log(torch.tensor([[0.25, 0.4], [0.1, 0.3]]))
    mask = torch.tensor([[1, 1], [1, 0]])

    def test_token_level(self):
        raw, _ = importance_weights(self.logp, self.behaviour, self.mask, mode="raw")
        torch.testing.assert_close(raw, torch.tensor([[2.0, 0.5], [9.0, 0.0]]))
        assert importance_weights(self.logp, self.behaviour, self.mask, limit=3.0)[0][1, 0] == 3.0
        assert importance_weights(self.logp, self.behaviour, self.mask, mode="mask", limit=3.0)[0][1, 0] == 0.0
        normalised, _ = importance_weights(self.logp, self.behaviour, self.mask, mode="self_normalized")
        assert normalised.sum().item() == pytest.approx(3.0)

    def test_sequence_levels_and_sample_size(self):
        product, _ = importance_weights(self.logp, self.behaviour, self.mask, level="sequence", mode="raw")
        torch.testing.assert_close(product, torch.tensor([1.0, 9.0]))
        _, size = importance_weights(self.logp, self.logp, self.mask)
        assert size.item() == pytest.approx(1.0)
        _, size = importance_weights(self.logp, self.behaviour, self.mask, level="sequence")
        assert size.item() == pytest.approx(100 / 82 / 2)
        mean, _ = importance_weights(self.logp, self.behaviour, self.mask, level="sequence_mean", mode="raw")
        torch.testing.assert_close(mean, torch.tensor([1.0, 9.0]))

    @pytest.mark.parametrize("change", [{"level": "row"}, {"mode": "drop"}, {"limit": None}, {"limit": 0.0}])
    def test_refusals(self, change):
        with pytest.raises(ValueError, match=r"level|mode|limit"):
            importance_weights(self.logp, self.behaviour, self.mask, **change)
