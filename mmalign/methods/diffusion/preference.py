"""Supervised and preference training of diffusion models: the text losses on denoising errors."""

from __future__ import annotations

from mmalign.core.supervised import SUPERVISED_LOSSES
from mmalign.methods.preference import PreferenceOptions, preference_parts
from mmalign.methods.registry import method
from mmalign.methods.training import BuildContext, LossOptions, TrainingParts, loss_terms
from mmalign.training.experience import DatasetExperience
from mmalign.training.objective import Supervised
from mmalign.training.options import TrainOptions


class DiffusionSFTOptions(TrainOptions):
    """Options of supervised diffusion training."""

    caption_dropout: float = 0.1
    """Share of captions replaced by the empty one, which keeps classifier-free guidance trained."""


class DiffusionDPOOptions(PreferenceOptions):
    """Options of preference optimisation on image pairs."""

    losses: list[LossOptions] = [LossOptions.model_validate({"name": "sigmoid", "beta": 5000.0})]
    """Pair losses on log-ratios ``-(error - reference error) / 2``; beta is the paper's."""
    caption_dropout: float = 0.2
    """Share of captions replaced by the empty one."""


@method("diffusion_sft", options=DiffusionSFTOptions, modality="diffusion", paper="Ho et al., 2020, arXiv 2006.11239")
def diffusion_sft(options: DiffusionSFTOptions, context: BuildContext) -> TrainingParts:
    """Denoising training on captioned images, in the model's own prediction target."""
    policy = context.policy(options.model, caption_dropout=options.caption_dropout, error_scale=1.0)
    examples = context.prepared(policy, options.data)
    objective = Supervised(policy, loss_terms([LossOptions(name="nll")], [SUPERVISED_LOSSES]))
    experience = DatasetExperience(policy, examples, context.shape, seed=context.seed, rank=context.state.rank)
    return TrainingParts(policy, objective, experience, rows=len(examples))


@method("diffusion_dpo", options=DiffusionDPOOptions, modality="diffusion", paper="Wallace et al., 2023, arXiv 2311.12908")
def diffusion_dpo(options: DiffusionDPOOptions, context: BuildContext) -> TrainingParts:
    """Preference optimisation on (caption, chosen image, rejected image) rows with any pair loss."""
    policy = context.policy(options.model, caption_dropout=options.caption_dropout, error_scale=0.5)
    return preference_parts(options, context, policy)
