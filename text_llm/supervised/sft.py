"""Supervised fine-tuning of language models."""

from __future__ import annotations

from mmalign.core.supervised import SUPERVISED_LOSSES
from mmalign.data.chat import TextEncoding
from mmalign.methods.registry import method
from mmalign.methods.training import BuildContext, LossOptions, TrainingParts, loss_terms
from mmalign.training.experience import DatasetExperience
from mmalign.training.objective import Supervised
from mmalign.training.options import TrainOptions


class SFTOptions(TrainOptions):
    """Options of supervised fine-tuning."""

    losses: list[LossOptions] = [LossOptions(name="nll")]
    """Supervised losses: nll, dft, label_smoothed_nll, z_loss, with weights."""
    encoding: TextEncoding = TextEncoding()
    """Tokenisation, masks and truncation."""
    neftune_noise_alpha: float | None = None
    """Uniform noise on the input embeddings while training (NEFTune); null is off."""


@method("sft", options=SFTOptions, modality="text", paper="Ouyang et al., 2022, arXiv 2203.02155")
def sft(options: SFTOptions, context: BuildContext) -> TrainingParts:
    """Next-token training on completions, conversations or raw text."""
    policy = context.policy(options.model, encoding=options.encoding)
    examples = context.prepared(policy, options.data)
    objective = Supervised(policy, loss_terms(options.losses, [SUPERVISED_LOSSES]),
                           neftune_noise_alpha=options.neftune_noise_alpha)
    experience = DatasetExperience(policy, examples, context.shape, seed=context.seed, rank=context.state.rank)
    return TrainingParts(policy, objective, experience, rows=len(examples))
