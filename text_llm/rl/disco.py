"""Discriminative constrained optimisation: right completions score above wrong ones, under a trust region."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from mmalign.config import Options
from mmalign.data.chat import TextEncoding
from mmalign.errors import ConfigError, DataError
from mmalign.methods.policy_gradient import check_text_sampling
from mmalign.methods.registry import method
from mmalign.methods.training import BuildContext, TrainingParts
from mmalign.policies.base import TextSampling
from mmalign.rewards.base import RewardOptions
from mmalign.training.discriminative import ConstraintOptions, Discriminative, Score, correctness
from mmalign.training.experience import RolloutExperience, RolloutSettings
from mmalign.training.options import TrainOptions

SPELLINGS = {"logL": "log_likelihood", "Lratio": "likelihood_ratio"}
"""Names of the scores in the published code."""


class DiscoLossOptions(Options):
    """The objective and the score that it compares."""

    name: Literal["disco", "disco_b"] = "disco"
    """disco: wrong completions count by how high they score (soft-max weights of temperature tau). disco_b: all alike."""
    score: Annotated[Score, BeforeValidator(lambda value: SPELLINGS.get(value, value))] = "log_likelihood"
    """Mean over the tokens of a completion of its log-probs, or of the ratio to the policy that sampled."""
    tau: float | None = None
    """Temperature of disco; null is 10 for log_likelihood and 1 for likelihood_ratio. Smaller looks at the worst one only."""
    normalise_by: Literal["groups", "valid"] = "groups"
    """groups: mean over all groups, those without a contrast being 0. valid: mean over groups with a contrast."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse values without a meaning."""
        if self.tau is not None and not self.tau > 0:
            raise ValueError(f"loss.tau must be positive, not {self.tau}; .inf is disco_b")
        if self.name == "disco_b" and self.tau is not None:
            raise ValueError("loss.tau has no meaning for disco_b, which weighs wrong completions equally; use name disco")

    @property
    def temperature(self) -> float:
        """The temperature of the wrong completions' weights, its default filled in."""
        if self.name == "disco_b":
            return math.inf
        return self.tau if self.tau is not None else 10.0 if self.score == "log_likelihood" else 1.0


class DiscoOptions(TrainOptions):
    """Options of discriminative constrained optimisation on text."""

    rewards: list[RewardOptions]
    """Reward functions; their weighted sum is 1 for right completions and 0 for wrong ones (or see positive_threshold)."""
    on_reward_error: Literal["stop", "drop", "lowest"] = "stop"
    """A reward that raises or returns NaN: stop, leave the sample out, or give it the lowest reward of the batch."""
    positive_threshold: float | None = None
    """For rewards that are not 0 or 1: completions with more than this are right, the others wrong."""
    sampling: TextSampling = TextSampling()
    """How completions are drawn; scoring uses the same temperature."""
    encoding: TextEncoding = TextEncoding()
    """Tokenisation of prompts."""
    loss: DiscoLossOptions = DiscoLossOptions()
    """Objective, score and worst-case temperature."""
    kl: ConstraintOptions = ConstraintOptions()
    """The trust region around the policy that sampled."""
    mask_truncated: bool = False
    """Leave completions that hit the length limit out; otherwise they are right or wrong like others."""


@method("disco", options=DiscoOptions, modality="text", paper="Li et al., 2025, arXiv 2505.12366", rollout=True)
def disco(options: DiscoOptions, context: BuildContext) -> TrainingParts:
    """Sample G completions per prompt and raise the scores of right ones over wrong ones, with a bound on the step's KL."""
    check_text_sampling(options.sampling)
    shape = context.shape
    if shape.completions_per_prompt < 2:
        raise ConfigError("batch.completions_per_prompt: disco compares right and wrong completions of a prompt and needs at "
                          f"least 2, not {shape.completions_per_prompt}")
    if shape.examples_per_forward % shape.completions_per_prompt:
        raise ConfigError(
            f"batch.examples_per_forward: {shape.examples_per_forward} rows would split the {shape.completions_per_prompt} "
            "completions of a prompt, which disco compares; use a multiple of batch.completions_per_prompt")
    policy = context.policy(options.model, encoding=options.encoding)
    examples = context.rows(options.data)
    if "prompt" not in examples[0]:
        raise DataError(f"data: column 'prompt' is missing; columns are {', '.join(examples[0])}. Map yours with data.columns")
    policy.check_prompts([example["prompt"] for example in examples])
    rewards = context.rewards(options.rewards, on_error=options.on_reward_error)
    temperature = options.sampling.temperature
    objective = Discriminative(
        policy, score=options.loss.score, tau=options.loss.temperature,
        groups="all" if options.loss.normalise_by == "groups" else "valid", kl=options.kl, temperature=temperature,
        on_policy=shape.updates_per_rollout == 1, rows_per_forward=shape.examples_per_forward, world_size=shape.world_size,
    )
    settings = RolloutSettings(
        options.sampling, correctness(options.positive_threshold), passes=options.batch.passes_per_rollout,
        mask_truncated=options.mask_truncated,
    )
    experience = RolloutExperience(policy, examples, rewards, shape, settings, context.state, timer=context.timer)
    evaluation = None
    if options.evaluation is not None:
        held_out = context.rewards(options.evaluation.rewards or options.rewards)
        evaluation = (options.evaluation, held_out, options.sampling)
    return TrainingParts(policy, objective, experience, rows=len(examples), evaluation=evaluation,
                         provenance={"rewards": [reward.name for reward in options.rewards]})
