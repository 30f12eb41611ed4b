"""Proximal policy optimisation with a value function: the policy-gradient composition with per-token rewards."""

from __future__ import annotations

import math
from typing import Any

from mmalign.data.chat import TextEncoding
from mmalign.methods.policy_gradient import PolicyGradientOptions, check_text_sampling, policy_gradient_parts
from mmalign.methods.registry import method
from mmalign.methods.training import BuildContext, TrainingParts
from mmalign.policies.base import TextSampling
from mmalign.policies.value import ValueOptions, make_value
from mmalign.training.advantages import AdvantageOptions
from mmalign.training.experience import BatchOptions
from mmalign.training.policy_gradient import KLOptions, PolicyLossOptions
from mmalign.training.rollout_advantages import Placement


class PPOAdvantageOptions(AdvantageOptions):
    """``{gamma: 1.0, lam: 0.95, whiten: true, whiten_rewards: false}`` of generalised advantage estimation."""

    name: str = "gae"
    """Always gae; estimators without a value function belong to method grpo."""


class PPOLossOptions(PolicyLossOptions):
    """``{name: ppo_clip, clip_low: 0.2, clip_high: 0.2}``: the clipped policy loss."""

    name: str = "ppo_clip"
    """ppo_clip, cispo or reinforce."""
    reduction: str = "token_mean"
    """How ``[B, A]`` losses become one number."""


class PPOKLOptions(KLOptions):
    """The divergence to the reference, by default charged to every token."""

    coef: float = 0.05
    """Weight; 0 loads no reference."""
    placement: Placement = "token_reward"
    """token_reward: every token is charged its own log-ratio. sequence_reward: the last token is charged the sum. loss: a
    term of the loss."""


class PPOBatchOptions(BatchOptions):
    """Batch sizes with one completion per prompt and four passes."""

    prompts_per_rollout: int | None = 64
    """Prompts sampled together, over all ranks."""
    completions_per_prompt: int | None = 1
    """Samples of each prompt; a value function needs no group."""
    passes_per_rollout: int = 4
    """Times every rollout is trained on (PPO's epochs)."""


class PPOOptions(PolicyGradientOptions):
    """Options of proximal policy optimisation on text."""

    sampling: TextSampling = TextSampling()
    """How completions are drawn; scoring uses the same temperature."""
    encoding: TextEncoding = TextEncoding()
    """Tokenisation of prompts."""
    batch: PPOBatchOptions = PPOBatchOptions()
    """Batch sizes; a rollout of prompts_per_rollout x completions_per_prompt rows makes mini-batches of
    examples_per_update."""
    advantage: PPOAdvantageOptions = PPOAdvantageOptions()
    """Discount and trace of generalised advantage estimation, and whitening."""
    loss: PPOLossOptions = PPOLossOptions()
    """Policy loss, its clip range and reduction."""
    kl: PPOKLOptions = PPOKLOptions()
    """Divergence to the reference."""
    value: ValueOptions = ValueOptions()
    """The value function and its loss."""
    missing_eos_penalty: float = 0.0
    """Subtracted from the reward of completions that were cut off."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse values without a meaning."""
        super().model_post_init(context)
        if self.missing_eos_penalty < 0:
            raise ValueError(f"missing_eos_penalty must not be negative, not {self.missing_eos_penalty}")


@method("ppo", options=PPOOptions, modality="text", paper="Schulman et al., 2017, arXiv 1707.06347", rollout=True)
def ppo(options: PPOOptions, context: BuildContext) -> TrainingParts:
    """Sample completions, estimate every token's advantage with a learned value function, and follow the clipped gradient."""
    check_text_sampling(options.sampling)
    policy = context.policy(options.model, encoding=options.encoding)
    value = make_value(options.value, policy, options.model)
    clip = math.inf if options.value.clip is None else options.value.clip
    return policy_gradient_parts(
        options, context, policy, options.sampling, temperature=options.sampling.temperature, value=value,
        value_coef=options.value.coef, value_clip=clip, missing_eos_penalty=options.missing_eos_penalty)
