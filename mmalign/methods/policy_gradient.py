"""The composition shared by policy-gradient methods of every modality."""

from __future__ import annotations

from typing import Any, Literal

from mmalign.config import Component, bind
from mmalign.core.policy_gradient import POLICY_LOSSES
from mmalign.errors import ConfigError, DataError
from mmalign.methods.training import BuildContext, TrainingParts, advantage_function
from mmalign.policies.base import Policy
from mmalign.policies.reference import ReferenceOptions, make_reference
from mmalign.rewards.base import RewardOptions
from mmalign.training.experience import RolloutExperience, RolloutSettings
from mmalign.training.options import TrainOptions
from mmalign.training.policy_gradient import KLOptions, PolicyGradient, PolicyLoss, PolicyLossOptions


class AdvantageOptions(Component):
    """``{name: grpo, ddof: 1, eps: 1e-4}``: an advantage estimator and its arguments."""

    name: str = "grpo"
    """grpo, dr_grpo, rloo, reinforce, ..., or prompt_statistics (running mean and spread of every prompt)."""
    clip: float | None = None
    """Advantages are clipped to +- this; null does not clip."""


class PolicyGradientOptions(TrainOptions):
    """Options of methods that learn from rewarded samples of the policy itself."""

    rewards: list[RewardOptions]
    """Reward functions with weights: registered names, package.module:function, or file.py:function."""
    on_reward_error: Literal["stop", "drop", "lowest"] = "stop"
    """A reward that raises or returns NaN: stop, drop the sample, or give it the lowest reward of the batch."""
    advantage: AdvantageOptions = AdvantageOptions()
    """How rewards become advantages."""
    loss: PolicyLossOptions = PolicyLossOptions()
    """Policy loss, its clip range and reduction."""
    kl: KLOptions = KLOptions()
    """Divergence to the reference."""
    reference: ReferenceOptions = ReferenceOptions()
    """The frozen model of the divergence; not loaded when kl.coef is 0."""
    drop_flat_groups: bool = False
    """Leave groups whose rewards are all equal out of the update (their gradient is zero)."""
    mask_truncated: bool = False
    """Give completions that hit the length limit no loss; their reward still enters the baseline."""


def policy_gradient_parts(
    options: PolicyGradientOptions, context: BuildContext, policy: Policy, sampling: Any, *, temperature: float = 1.0,
) -> TrainingParts:
    """Policy, objective and rollout experience of a policy-gradient method."""
    name = options.loss.name
    try:
        name = POLICY_LOSSES.canonical(name)
    except ValueError as error:
        raise ConfigError(f"loss.name: {error}") from None
    arguments = bind(options.loss, POLICY_LOSSES.get(name), key="loss", ignore=("mask",))
    advantage, statistics = advantage_function(options.advantage)
    if context.shape.completions_per_prompt < 2 and statistics is None and options.advantage.name != "reinforce":
        raise ConfigError(f"batch.completions_per_prompt: advantage {options.advantage.name!r} compares the samples of a prompt "
                          "and needs at least 2; use more, or advantage: prompt_statistics")
    examples = context.rows(options.data)
    if "prompt" not in examples[0]:
        raise DataError(f"data: column 'prompt' is missing; columns are {', '.join(examples[0])}. Map yours with data.columns")
    policy.check_prompts([example["prompt"] for example in examples])
    reference = make_reference(policy, options.reference) if options.kl.coef else None
    rewards = context.rewards(options.rewards, on_error=options.on_reward_error)
    settings = RolloutSettings(
        sampling, advantage, passes=options.batch.passes_per_rollout, action_fraction=options.batch.action_fraction,
        kl_in_reward=options.kl.coef if options.kl.placement == "sequence_reward" else 0.0,
        mask_truncated=options.mask_truncated, drop_flat_groups=options.drop_flat_groups,
    )
    objective = PolicyGradient(
        policy, PolicyLoss(name, arguments, options.loss.reduction, options.loss.norm_length), temperature=temperature,
        on_policy=context.shape.updates_per_rollout == 1, kl=options.kl, entropy_coef=options.loss.entropy_coef,
    )
    experience = RolloutExperience(policy, examples, rewards, context.shape, settings, context.state, timer=context.timer,
                                   reference=reference, statistics=statistics)
    evaluation = None
    if options.evaluation is not None:
        held_out = context.rewards(options.evaluation.rewards or options.rewards)
        evaluation = (options.evaluation, held_out, sampling)
    return TrainingParts(policy, objective, experience, rows=len(examples), reference=reference, evaluation=evaluation,
                         provenance={"rewards": [reward.name for reward in options.rewards]})
