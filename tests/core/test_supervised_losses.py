"""Supervised losses on scores, and NEFTune noise."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from mmalign.core.logprobs import ActionScores, OutputHead, token_log_probs
from mmalign.core.reduce import reduce
from mmalign.core.supervised import SUPERVISED_LOSSES, neftune_noise


def scored(want=(), seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, 5, 3, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 3, generator=g, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1, 2, -100, 4, 5], [0, 6, 3, -100, -100]])
    return hidden, weight, labels, token_log_probs(hidden, OutputHead(weight), labels, want=want)


def cross_entropy(hidden, weight, labels, **options):
    logits = (hidden @ weight.T)[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), **options)


@pytest.mark.parametrize("name", SUPERVISED_LOSSES.names())
def test_gradients_through_the_head(name):
    function = SUPERVISED_LOSSES.get(name)
    hidden, weight, labels, _ = scored()
    options = {"detach": False} if name == "propagated_nll" else {}  # detached weights are no part of the gradient

    def loss(hidden, weight):
        scores = token_log_probs(hidden, OutputHead(weight), labels, want=function.want)
        return reduce(function(scores, **options), scores.mask, how="token_mean")

    if name == "dft":  # -sg(p) log p has the gradient of -p
        ours = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
        scores = token_log_probs(hidden, OutputHead(weight), labels)
        theirs = torch.autograd.grad(reduce(-scores.logp.exp(), scores.mask, how="token_mean"), (hidden, weight))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other)
    else:
        assert gradcheck(loss, (hidden, weight))


def test_nll_is_cross_entropy():
    hidden, weight, labels, scores = scored()
    ours = reduce(SUPERVISED_LOSSES.get("nll")(scores), scores.mask, how="token_mean")
    torch.testing.assert_close(ours, cross_entropy(hidden, weight, labels))


def test_dft_of_a_constant_probability_is_that_multiple_of_nll():
    scores = ActionScores(torch.full((1, 3), 0.2).log(), torch.ones(1, 3))
    torch.testing.assert_close(SUPERVISED_LOSSES.get("dft")(scores), 0.2 * SUPERVISED_LOSSES.get("nll")(scores))


def test_uniform_label_smoothing_is_torchs():
    hidden, weight, labels, scores = scored(want=("mean_logp",))
    ours = reduce(SUPERVISED_LOSSES.get("label_smoothed_nll")(scores, label_smoothing=0.2), scores.mask, how="token_mean")
    torch.testing.assert_close(ours, cross_entropy(hidden, weight, labels, label_smoothing=0.2))


def test_others_label_smoothing_leaves_one_minus_e_on_the_label():
    hidden, weight, labels, scores = scored(want=("mean_logp",))
    value = SUPERVISED_LOSSES.get("label_smoothed_nll")(scores, label_smoothing=0.2, smoothing_form="others", vocabulary=7)
    logp = (hidden @ weight.T)[0, 0].log_softmax(-1)
    target = torch.full_like(logp, 0.2 / 6)
    target[labels[0, 1]] = 0.8
    torch.testing.assert_close(value[0, 0], -(target * logp).sum())


def test_z_loss():
    hidden, weight, _, scores = scored(want=("lse",))
    value = SUPERVISED_LOSSES.get("z_loss")(scores)
    torch.testing.assert_close(value[1, 0], (hidden @ weight.T)[1, 0].logsumexp(-1).square())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("z_loss", {}, "want=.'lse'"), ("label_smoothed_nll", {}, "mean_logp"),
        ("label_smoothed_nll", {"label_smoothing": 1.0}, "label_smoothing"),
        ("label_smoothed_nll", {"smoothing_form": "half"}, "smoothing_form"),
    ],
)
def test_refusals(name, options, message):
    with pytest.raises(ValueError, match=message):
        SUPERVISED_LOSSES.get(name)(scored()[3], **options)


def test_others_needs_the_vocabulary():
    with pytest.raises(ValueError, match="vocabulary"):
        SUPERVISED_LOSSES.get("label_smoothed_nll")(scored(want=("mean_logp",))[3], smoothing_form="others")


class TestNeftune:
    def noise(self, **options):
        embeddings = torch.zeros(3, 50, 16)
        return neftune_noise(embeddings, generator=torch.Generator().manual_seed(0), **options)

    def test_is_bounded_centred_and_repeatable(self):
        noise, bound = self.noise(alpha=5.0), 5 / (50 * 16) ** 0.5
        assert noise.abs().max() <= bound
        assert noise.abs().max() > 0.9 * bound
        assert noise.mean().abs() < 0.05 * bound
        assert noise.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert torch.equal(noise, self.noise(alpha=5.0))

    def test_own_lengths(self):
        noise = self.noise(alpha=5.0, lengths=torch.tensor([1, 50, 25]))
        bounds = 5 / (torch.tensor([1.0, 50.0, 25.0]) * 16).sqrt()
        torch.testing.assert_close(noise.abs().amax((1, 2)), bounds, rtol=0.1, atol=0)

    def test_alpha_zero_changes_nothing_and_negative_is_refused(self):
        assert self.noise(alpha=0.0).eq(0).all()
        with pytest.raises(ValueError, match="alpha"):
            self.noise(alpha=-1.0)

    def test_global_random_state_is_left_alone(self):
        torch.manual_seed(3)
        expected = torch.rand(1)
        torch.manual_seed(3)
        self.noise(alpha=5.0)
        assert torch.equal(torch.rand(1), expected)
