"""Continual post-training of language models, and reinforcement fine-tuning on rollout-filtered instances."""

from __future__ import annotations

from typing import Any

from mmalign.methods.continual import Learner, RolloutFilterNode, TaskSequenceOptions, continual_pipeline
from mmalign.methods.registry import Pipeline, method

PAPER = "Lai et al., 2025, arXiv 2507.05386"


class ContinualOptions(TaskSequenceOptions):
    """Options of continual post-training."""

    learners: dict[str, Learner]
    """Ways of learning the tasks, by name; all start from the same model. The output of the method is the first one's."""

    def model_post_init(self, context: Any, /) -> None:
        """There must be a learner."""
        super().model_post_init(context)
        if not self.learners:
            raise ValueError("learners: at least one is needed, such as {rft: {method: grpo}}")


class RIFOptions(TaskSequenceOptions):
    """Options of reinforcement fine-tuning with rollout-based instance filtering."""

    learner: str = "grpo"
    """Method that learns from rewards: grpo, rloo, dr_grpo, dapo, ... Advantages that are not divided by a standard
    deviation (dr_grpo, rloo) keep the damping by p(1 - p) that the paper explains its results with."""
    filter: RolloutFilterNode = RolloutFilterNode()
    """How prompts are filtered before every task, always with the model of that moment."""
    train: dict[str, Any] = {}
    """Options of the training stages."""
    per_task: dict[str, dict[str, Any]] = {}
    """Options that certain tasks have instead, by task."""
    compare: bool = False
    """Train without the filter as well, as learner ``rft``, and compare."""


@method("continual", options=ContinualOptions, modality="text", kind="pipeline", paper=PAPER)
def continual(options: ContinualOptions) -> Pipeline:
    """Tasks in order without replay, by fine-tuning, reinforcement or on all at once; forgetting at equal task accuracy."""
    return continual_pipeline(options, options.learners)


@method("rif_rft", options=RIFOptions, modality="text", kind="pipeline", paper=PAPER)
def rif_rft(options: RIFOptions) -> Pipeline:
    """Continual reinforcement fine-tuning on the prompts that the current model sometimes answers right."""
    plain = Learner(method=options.learner, train=options.train, per_task=options.per_task)
    learners = {"rif_rft": plain.model_copy(update={"filter": options.filter})}
    return continual_pipeline(options, learners | ({"rft": plain} if options.compare else {}))
