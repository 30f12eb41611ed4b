"""Intuitive fine-tuning: supervised training that reads some of its own predictions and answers for what they lead to."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mmalign.config import Options
from mmalign.core.logprobs import ActionScores
from mmalign.core.supervised import PropagationForm, PropagationNorm, PropagationSide, PropagationSource, propagated_nll
from mmalign.data.chat import TextEncoding
from mmalign.methods.registry import method
from mmalign.methods.training import BuildContext, TrainingParts
from mmalign.policies.causal_lm import CausalLMPolicy
from mmalign.policies.temporal_residual import input_embeddings, predict_actions, residual_inputs
from mmalign.training.experience import DatasetExperience
from mmalign.training.objective import LossTerm, Mean, Metrics, Supervised, Term, TrainState, UpdateBatch, supervised_terms
from mmalign.training.options import TrainOptions


class IFTLossOptions(Options):
    """The two parts of intuitive fine-tuning: temporal residual (``lam``) and relation propagation (``gamma``)."""

    gamma: float = 0.95
    """Decay of relation propagation; 0 turns it off."""
    lam: float = 0.2
    """Share of the model's own prediction in the input at a learned token; 0 turns the residual off."""
    lam_end: float | None = None
    """Share at the end of training, reached linearly; null keeps ``lam``."""
    lam_noise: float = 0.0
    """Multiply the share of every token by 1 + lam_noise * N(0, 1), clamped to [0, 1]; the paper's noisy variant has 0.5."""
    form: PropagationForm = "product"
    """Weights times losses as in the algorithm and the released code, or the ``double_sum`` of equation 21."""
    norm: PropagationNorm = "l1"
    """How weights are scaled: l1, l2, softmax or log."""
    side: PropagationSide = "left"
    """Accumulate the losses that follow a token (left) or that lead to it (right)."""
    source: PropagationSource = "loss"
    """Accumulate losses, or a one per token (mask)."""
    detach_weights: bool = False
    """No gradient through the weights; the released code lets it through, which may push likely tokens down."""
    embedding_gradient: bool = False
    """Train the embeddings from the input side too, where the released code reads a frozen copy of them."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse values without a meaning."""
        for name in ("gamma", "lam", "lam_end"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], not {value}")
        if self.lam_noise < 0:
            raise ValueError(f"lam_noise must not be negative, not {self.lam_noise}")
        if self.form == "double_sum" and (self.norm, self.side, self.source) != ("l1", "left", "loss"):
            raise ValueError("form double_sum has fixed coefficients: leave norm, side and source alone")


class IFTOptions(TrainOptions):
    """Options of intuitive fine-tuning."""

    loss: IFTLossOptions = IFTLossOptions()
    """Residual and propagation."""
    encoding: TextEncoding = TextEncoding()
    """Tokenisation, masks and truncation."""


@dataclass(frozen=True)
class Residual:
    """How much of the model's own prediction an input holds over a run."""

    lam: float
    lam_end: float
    noise: float
    embedding_gradient: bool

    @property
    def used(self) -> bool:
        """Whether inputs are ever mixed."""
        return max(self.lam, self.lam_end) > 0

    def share(self, progress: float, noise: Tensor) -> Tensor:
        """``[B, A]`` shares at ``progress`` in [0, 1] for standard normal ``noise[B, A]``."""
        lam = self.lam + (self.lam_end - self.lam) * progress
        return (lam * (1 + self.noise * noise)).clamp(0, 1)


class IntuitiveFineTuning(Supervised):
    """:class:`Supervised` on propagated losses whose inputs are mixed with the model's own predictions.

    ``e_t = (1 - lam) E(x_t) + lam E(argmax p(. | x_{<t}))`` at learned tokens, then ``propagated_nll`` averaged within
    and over rows. With ``lam`` 0 and ``gamma`` 0 this is SFT with ``seq_mean_token_mean``. Source: Hua et al. 2024, arXiv
    2405.11870.
    """

    policy: CausalLMPolicy

    def __init__(self, policy: CausalLMPolicy, propagation: Mapping[str, Any], residual: Residual) -> None:
        super().__init__(policy, [LossTerm("propagated_nll", dict(propagation), reduction="seq_mean_token_mean")])
        self.propagation, self.residual = dict(propagation), residual

    def prepare(self, update: UpdateBatch, state: TrainState) -> dict[str, Any]:
        """The noise of the shares, drawn for the whole update so that splitting it changes nothing."""
        shared = super().prepare(update, state)
        if self.residual.used:
            mask = self.policy.action_mask(update.parts[self.part])
            if self.residual.noise:
                shared["noise"] = torch.randn(mask.shape, generator=state.generator("residual"))
            else:
                shared["noise"] = torch.zeros(mask.shape)
        return shared

    def loss(self, micro: UpdateBatch, shared: dict[str, Any], state: TrainState) -> tuple[list[Term], Metrics]:
        """The one term; metrics ``nll``, the mean share of predictions in the inputs, and of negative coefficients."""
        rows = micro.parts[self.part]
        metrics: Metrics = {}
        reading: AbstractContextManager[None] = nullcontext()
        if self.residual.used:
            predicted = predict_actions(self.policy, rows)
            noise = shared["noise"][micro.index[self.part]] if self.part in micro.index else shared["noise"]
            share = self.residual.share(state.progress, noise[:, : predicted.shape[1]])
            metrics["residual_share"] = Mean.of(share, self.policy.action_mask(rows))
            reading = residual_inputs(self.policy, rows, predicted, share, embedding_gradient=self.residual.embedding_gradient)
        with reading:
            scores = self.policy.log_probs(rows)
        metrics["nll"] = Mean.of(-scores.logp, scores.mask)
        if not self.propagation["detach"]:
            metrics["negative_coefficients"] = Mean.of(loss_coefficients(scores, self.propagation) < 0, scores.mask)
        return supervised_terms(self.losses, scores), metrics


def loss_coefficients(scores: ActionScores, propagation: Mapping[str, Any]) -> Tensor:
    """``d sum_t w_t l_t / d l_t``, ``[B, A]``: what multiplies the gradient of every token's loss.

    Negative where the token's probability is pushed down, which gradients through normalised weights can do.
    """
    logp = scores.logp.detach().requires_grad_()
    with torch.enable_grad():
        total = propagated_nll(ActionScores(logp, scores.mask), **propagation).sum()
        (gradient,) = torch.autograd.grad(total, logp)
    return -gradient


@method("ift", options=IFTOptions, modality="text", paper="Hua et al., 2024, arXiv 2405.11870")
def ift(options: IFTOptions, context: BuildContext) -> TrainingParts:
    """Intuitive fine-tuning: SFT on inputs mixed with the model's own predictions, tokens weighted by what follows them."""
    loss = options.loss
    policy: Any = context.policy(options.model, encoding=options.encoding)
    end = loss.lam if loss.lam_end is None else loss.lam_end
    residual = Residual(loss.lam, end, loss.lam_noise, loss.embedding_gradient)
    if residual.used:
        input_embeddings(policy)
    propagation = {"gamma": loss.gamma, "norm": loss.norm, "side": loss.side, "form": loss.form, "source": loss.source,
                   "detach": loss.detach_weights}
    examples = context.prepared(policy, options.data)
    experience = DatasetExperience(policy, examples, context.shape, seed=context.seed, rank=context.state.rank)
    return TrainingParts(policy, IntuitiveFineTuning(policy, propagation, residual), experience, rows=len(examples),
                         provenance={"residual": asdict(residual), "propagation": propagation})
