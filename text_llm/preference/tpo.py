"""Triple preference optimisation: a gold response to imitate beside the pair, no reference model."""

from __future__ import annotations

from typing import ClassVar

from mmalign.methods.preference import preference_parts
from mmalign.methods.registry import method
from mmalign.methods.training import BuildContext, LossOptions, TrainingParts
from text_llm.preference.dpo import DPOOptions


class TPOOptions(DPOOptions):
    """Options of TPO: rows hold ``gold`` (also read from a column ``reference``), ``chosen`` and ``rejected``."""

    losses: list[LossOptions] = [LossOptions.model_validate({"name": "tpo", "beta": 0.01, "alpha": 1.0})]
    """tpo or tpo_l with beta, alpha (weight of the gold likelihood; 0 skips its forward pass), gamma, nll_reduction; or
    any other list of losses."""
    column_aliases: ClassVar[dict[str, str]] = {"reference": "gold"}


class TPOLOptions(TPOOptions):
    """Options of TPO-L."""

    losses: list[LossOptions] = [LossOptions.model_validate({"name": "tpo_l", "beta": 0.01, "gamma": 0.5, "alpha": 1.0})]
    """tpo_l or tpo with their arguments; or any other list of losses."""


@method("tpo", options=TPOOptions, modality="text", paper="Saeidi et al., 2024, arXiv 2405.16681")
def tpo(options: TPOOptions, context: BuildContext) -> TrainingParts:
    """Alignment in one stage from (gold, chosen, rejected) triples: a reference-free pair term plus imitation of gold."""
    return preference_parts(options, context, context.policy(options.model, encoding=options.encoding))


@method("tpo_l", options=TPOLOptions, modality="text", paper="Saeidi et al., 2025, arXiv 2405.16681v2")
def tpo_l(options: TPOLOptions, context: BuildContext) -> TrainingParts:
    """TPO on mean log-probs with a target margin."""
    return preference_parts(options, context, context.policy(options.model, encoding=options.encoding))
