"""The composition shared by policy-gradient methods of every modality."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

from mmalign.config import bind
from mmalign.core.advantages import ADVANTAGES
from mmalign.core.policy_gradient import POLICY_LOSSES, clip_bounds
from mmalign.core.reduce import REDUCTIONS
from mmalign.errors import ConfigError, DataError
from mmalign.methods.training import BuildContext, TrainingParts
from mmalign.policies.base import Policy, TextSampling
from mmalign.policies.reference import ReferenceOptions, make_reference
from mmalign.policies.value import ValueFunction
from mmalign.rewards.base import Combination, RewardOptions
from mmalign.training.advantages import STATISTICS, AdvantageOptions, advantage_function
from mmalign.training.dynamic_sampling import DynamicSamplingOptions
from mmalign.training.experience import RolloutExperience, RolloutSettings
from mmalign.training.options import TrainOptions
from mmalign.training.policy_gradient import KLOptions, PolicyGradient, PolicyLoss, PolicyLossOptions
from mmalign.training.rollout_advantages import AdaptiveKL


class PolicyGradientOptions(TrainOptions):
    """Options of methods that learn from rewarded samples of the policy itself."""

    rewards: list[RewardOptions]
    """Reward functions with weights: registered names, package.module:function, or file.py:function."""
    on_reward_error: Literal["stop", "drop", "lowest"] = "stop"
    """A reward that raises or returns NaN: stop, drop the sample, or give it the lowest reward of the batch."""
    reward_combination: Combination = "sum_then_normalize"
    """How several rewards become one: sum_then_normalize weighs them as they are; normalize_then_sum standardises each within
    its group first, so that none drowns in the spread of another (with advantage reinforce_pp_baseline this is GDPO)."""
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
    dynamic_sampling: DynamicSamplingOptions | None = None
    """Sample until enough groups have rewards that differ, instead of training on those that come; null does not."""
    mask_truncated: bool = False
    """Give completions that hit the length limit no loss; their reward still enters the baseline."""


def check_text_sampling(sampling: TextSampling) -> None:
    """Refuse sampling whose distribution is not the one that is scored; raises ConfigError naming the key."""
    if sampling.temperature <= 0:
        raise ConfigError(f"sampling.temperature: a policy gradient needs random samples, not {sampling.temperature}")
    if sampling.truncated:
        raise ConfigError("sampling.top_k and sampling.top_p: truncated sampling draws from another distribution than the one "
                          "that is scored, which biases the gradient; use top_k 0 and top_p 1")
    if sampling.min_new_tokens:
        raise ConfigError("sampling.min_new_tokens: forbidding the end token draws from another distribution than the one that "
                          "is scored, which biases the gradient; use 0, and a reward that asks for length")


SCALED = ("grpo", "grpo_batch_std", "reinforce_pp_baseline", "prompt_statistics")
"""Estimators that divide rewards by their spread."""


def policy_gradient_parts(
    options: PolicyGradientOptions, context: BuildContext, policy: Policy, sampling: Any, *, temperature: float = 1.0,
    value: ValueFunction | None = None, value_coef: float = 0.1, value_clip: float = math.inf, missing_eos_penalty: float = 0.0,
    make_experience: Callable[..., RolloutExperience] = RolloutExperience,
) -> TrainingParts:
    """Policy, objective and rollout experience (``make_experience`` builds it) of a policy-gradient method."""
    name = options.loss.name
    try:
        name = POLICY_LOSSES.canonical(name)
    except ValueError as error:
        raise ConfigError(f"loss.name: {error}") from None
    arguments = bind(options.loss, POLICY_LOSSES.get(name), key="loss", ignore=("mask",))
    advantage, statistics, kl_advantage, kl_statistics = _advantages(options)
    check_combination(
        options, name, arguments, completions=context.shape.completions_per_prompt, has_value=value is not None,
        updates_per_rollout=context.shape.updates_per_rollout, can_be_greedy=hasattr(sampling, "top_k"))
    examples = context.rows(options.data)
    if "prompt" not in examples[0]:
        raise DataError(f"data: column 'prompt' is missing; columns are {', '.join(examples[0])}. Map yours with data.columns")
    policy.check_prompts([example["prompt"] for example in examples])
    reference = make_reference(policy, options.reference) if options.kl.coef else None
    rewards = context.rewards(options.rewards, on_error=options.on_reward_error)
    rewards.check_rows(examples)
    coefficient = AdaptiveKL(options.kl)
    settings = RolloutSettings(
        sampling, advantage, passes=options.batch.passes_per_rollout, action_fraction=options.batch.action_fraction,
        kl=options.kl, kl_advantage=kl_advantage, advantage_clip=options.advantage.clip,
        missing_eos_penalty=missing_eos_penalty, mask_truncated=options.mask_truncated,
        drop_flat_groups=options.drop_flat_groups, dynamic_sampling=options.dynamic_sampling,
        reward_combination=options.reward_combination, greedy_baseline=options.advantage.name == "remax",
    )
    objective = PolicyGradient(
        policy, PolicyLoss(name, arguments, options.loss.reduction, options.loss.norm_length), temperature=temperature,
        # Groups left over by dynamic sampling come from the policy before: their ratio is not 1.
        on_policy=context.shape.updates_per_rollout == 1 and options.dynamic_sampling is None,
        kl=options.kl, entropy_coef=options.loss.entropy_coef,
        value=value, value_coef=value_coef, value_clip=value_clip,
    )
    experience = make_experience(
        policy, examples, rewards, context.shape, settings, context.state, timer=context.timer, reference=reference,
        value=value, kl=coefficient, statistics=statistics, kl_statistics=kl_statistics,
    )
    evaluation = None
    if options.evaluation is not None:
        held_out = context.rewards(options.evaluation.rewards or options.rewards)
        evaluation = (options.evaluation, held_out, sampling)
    provenance: dict[str, Any] = {"rewards": [reward.name for reward in options.rewards]}
    if reference is not None:
        provenance["reference"] = reference.identity
    return TrainingParts(policy, objective, experience, rows=len(examples), reference=reference, evaluation=evaluation,
                         controller=coefficient if options.kl.adaptive else None, provenance=provenance)


def check_combination(
    options: PolicyGradientOptions, loss: str, arguments: dict[str, Any], *, completions: int, has_value: bool,
    updates_per_rollout: int = 1, can_be_greedy: bool = True,
) -> None:
    """Refuse combinations of estimator, loss and divergence that mean nothing; raises ConfigError with the reason."""
    placement = options.kl.placement if options.kl.coef else None
    estimator = options.advantage.name
    estimator = ADVANTAGES.canonical(estimator) if estimator in ADVANTAGES else estimator
    if completions < 2 and estimator not in (*STATISTICS, "reinforce", "remax", "gae"):
        raise ConfigError(f"batch.completions_per_prompt: advantage {estimator!r} compares the samples of a prompt "
                          f"and needs at least 2; use more, or an advantage without groups: {', '.join(STATISTICS)}, reinforce, "
                          "remax")
    if estimator == "remax" and not can_be_greedy:
        raise ConfigError("advantage.name: remax compares with the greedy sample of a prompt, and this policy has no most likely "
                          "sample; use rloo, grpo or prompt_statistics")
    if options.reward_combination == "normalize_then_sum":
        _check_normalised(options, estimator, placement)
    if (estimator == "gae") != has_value:
        raise ConfigError(
            f"advantage.name: {estimator!r} makes no use of the value function that method ppo trains; use gae, or method grpo "
            "without a value function" if has_value else
            "advantage.name: gae needs a value function, which this method does not train; use method ppo, or a group "
            "estimator such as grpo or rloo")
    per_action = estimator == "gae" or placement == "token_reward"
    level, _ = clip_bounds(loss, arguments)
    if per_action and level != "token":
        cause = "advantage gae" if estimator == "gae" else "kl.placement token_reward"
        raise ConfigError(f"loss.name: {loss} has one ratio per sequence, and {cause} gives one advantage per action; use "
                          "ppo_clip at level token, or kl.placement sequence_reward with a group estimator")
    _check_loss(options, loss, level, updates_per_rollout)
    if placement == "token_reward" and estimator in SCALED:
        raise ConfigError(f"kl.placement: token_reward charges nats to single actions, but advantage {estimator!r} is in units "
                          "of the spread of rewards; use sequence_reward or advantage, or an estimator that does not scale "
                          "(rloo, dr_grpo, reinforce, gae)")
    if placement == "advantage" and estimator == "gae":
        raise ConfigError("kl.placement: advantage subtracts one number per sample, and advantage gae gives one per action from "
                          "rewards per action; use token_reward")
    if options.drop_flat_groups and estimator == "gae":
        raise ConfigError("drop_flat_groups: a value function learns from groups without spread too, and gae compares nothing "
                          "within groups; set it to false")
    if options.dynamic_sampling is not None and estimator == "gae":
        raise ConfigError("dynamic_sampling: a value function learns from groups without spread too, and gae compares nothing "
                          "within groups; leave it out")
    if options.dynamic_sampling is not None and options.dynamic_sampling.mode != "any" and completions < 2:
        raise ConfigError(f"dynamic_sampling.mode: {options.dynamic_sampling.mode} compares the samples of a prompt and needs "
                          "batch.completions_per_prompt of at least 2")
    if placement is not None and options.reference.kind == "none":
        raise ConfigError("reference.kind: none leaves nothing for kl.coef to compare with; set kl.coef: 0")
    if placement is not None and options.reference.kind == "precomputed":
        raise ConfigError("reference.kind: precomputed holds scores of known rows, and rollouts do not exist before training; "
                          "use frozen_copy, adapter_off or another kind that keeps weights")


def _check_loss(options: PolicyGradientOptions, loss: str, level: str, updates_per_rollout: int) -> None:
    """Refuse a loss that is not defined for the updates or the reduction it would meet."""
    if loss == "reinforce" and updates_per_rollout > 1:
        raise ConfigError(
            f"loss.name: reinforce is exact for samples of the current policy, and {updates_per_rollout} updates are made of "
            "every rollout; use ppo_clip, gspo or cispo, or set batch.examples_per_update to the whole rollout and "
            "batch.passes_per_rollout to 1")
    if loss == "reinforce" and options.dynamic_sampling is not None:
        raise ConfigError("dynamic_sampling: groups left over are from the policy before, which loss reinforce takes for the "
                          "current one; use ppo_clip, gspo or cispo")
    how = REDUCTIONS.canonical(options.loss.reduction) if options.loss.reduction in REDUCTIONS else options.loss.reduction
    if level != "token" and how not in ("seq_mean_token_mean", "seq_mean_token_sum"):
        raise ConfigError(f"loss.reduction: {options.loss.reduction} divides by a number of tokens, and {loss} at level {level} "
                          "has one value per sequence; use seq_mean_token_mean")


def _check_normalised(options: PolicyGradientOptions, estimator: str, placement: str | None) -> None:
    """Refuse what would undo, repeat or outweigh the standardisation of single rewards."""
    if len([reward for reward in options.rewards if reward.weight]) < 2:
        raise ConfigError("reward_combination: normalize_then_sum standardises several rewards against each other, and only one "
                          "has a weight; use sum_then_normalize")
    if estimator not in ("dr_grpo", "reinforce", "reinforce_pp_baseline", "grpo_batch_std"):
        raise ConfigError(f"advantage.name: {estimator} standardises or shifts rewards that normalize_then_sum has standardised "
                          "already; use reinforce_pp_baseline (GDPO), dr_grpo, reinforce or grpo_batch_std")
    if placement in ("sequence_reward", "token_reward"):
        raise ConfigError(f"kl.placement: {placement} subtracts nats from rewards that normalize_then_sum measures in standard "
                          "deviations; use loss or advantage")


def _advantages(options: PolicyGradientOptions) -> tuple[Any, Any, Any, Any]:
    """Estimator and statistics of the reward, and of the divergence where it has an advantage of its own."""
    if not options.kl.coef or options.kl.placement != "advantage":
        return *advantage_function(options.advantage), None, None
    unclipped = options.advantage.model_copy(update={"clip": None})  # the difference is clipped, not its parts
    own = advantage_function(unclipped) if options.kl.normalize else (None, None)
    return *advantage_function(unclipped), *own
