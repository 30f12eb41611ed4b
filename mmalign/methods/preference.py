"""The composition shared by preference methods of every modality."""

from __future__ import annotations

from mmalign.core.preference import PREFERENCE_LOSSES
from mmalign.core.supervised import SUPERVISED_LOSSES
from mmalign.methods.training import BuildContext, LossOptions, TrainingParts, loss_terms
from mmalign.policies.base import Policy
from mmalign.policies.reference import ReferenceOptions, make_reference
from mmalign.training.experience import DatasetExperience
from mmalign.training.options import TrainOptions
from mmalign.training.preference import Preference


class PreferenceOptions(TrainOptions):
    """Options of methods that learn from pairs."""

    losses: list[LossOptions] = [LossOptions.model_validate({"name": "sigmoid", "beta": 0.1})]
    """Pair losses (sigmoid, ipo, hinge, simpo, ...) and supervised terms, each with its arguments and weight."""
    reference: ReferenceOptions = ReferenceOptions()
    """The frozen model that log-ratios compare with."""


def preference_parts(options: PreferenceOptions, context: BuildContext, policy: Policy) -> TrainingParts:
    """Policy, pair objective and data experience of a preference method."""
    terms = loss_terms(options.losses, [PREFERENCE_LOSSES, SUPERVISED_LOSSES])
    needed = any(PREFERENCE_LOSSES.get(term.name).reference for term in terms if term.name in PREFERENCE_LOSSES)
    reference = make_reference(policy, options.reference) if needed else None
    objective = Preference(policy, terms, reference=reference)
    examples = context.prepared(policy, options.data, fields=objective.fields)
    experience = DatasetExperience(policy, examples, context.shape, seed=context.seed, rank=context.state.rank)
    provenance = {"reference": reference.identity} if reference is not None else {}
    return TrainingParts(policy, objective, experience, rows=len(examples), reference=reference, provenance=provenance)
