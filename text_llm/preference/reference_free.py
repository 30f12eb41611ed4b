"""Pair losses that need no reference model."""

from __future__ import annotations

from mmalign.methods.preference import preference_parts
from mmalign.methods.registry import method
from mmalign.methods.training import BuildContext, LossOptions, TrainingParts
from text_llm.preference.dpo import DPOOptions


class SimPOOptions(DPOOptions):
    """Options of SimPO."""

    losses: list[LossOptions] = [LossOptions.model_validate({"name": "simpo", "beta": 2.5, "gamma": 1.375})]
    """Pair losses, supervised terms and composites, each with its arguments and weight."""


class ORPOOptions(DPOOptions):
    """Options of ORPO."""

    losses: list[LossOptions] = [LossOptions.model_validate({"name": "orpo", "beta": 0.1})]
    """Pair losses, supervised terms and composites; ``beta`` of orpo is the paper's lambda."""


class CPOOptions(DPOOptions):
    """Options of CPO."""

    losses: list[LossOptions] = [LossOptions.model_validate({"name": "cpo_nll", "beta": 0.1, "alpha": 1.0})]
    """Pair losses, supervised terms and composites, each with its arguments and weight."""


@method("simpo", options=SimPOOptions, modality="text", paper="Meng et al., 2024, arXiv 2405.14734")
def simpo(options: SimPOOptions, context: BuildContext) -> TrainingParts:
    """Preference optimisation on mean log-probs with a target margin and no reference."""
    return preference_parts(options, context, context.policy(options.model, encoding=options.encoding))


@method("orpo", options=ORPOOptions, modality="text", paper="Hong et al., 2024, arXiv 2403.07691")
def orpo(options: ORPOOptions, context: BuildContext) -> TrainingParts:
    """Fine-tuning on the chosen sample with an odds-ratio penalty on the rejected one, in one stage."""
    return preference_parts(options, context, context.policy(options.model, encoding=options.encoding))


@method("cpo", options=CPOOptions, modality="text", paper="Xu et al., 2024, arXiv 2401.08417")
def cpo(options: CPOOptions, context: BuildContext) -> TrainingParts:
    """Contrastive preference optimisation: DPO without a reference, with a likelihood term on the chosen sample."""
    return preference_parts(options, context, context.policy(options.model, encoding=options.encoding))
