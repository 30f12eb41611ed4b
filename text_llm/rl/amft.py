"""Imitation and reinforcement in one update, with the balance between them learned from held-out prompts."""

from __future__ import annotations

import math

from mmalign.data.chat import TextEncoding
from mmalign.errors import ConfigError
from mmalign.methods.mixing import MixedOptions, mixed_parts
from mmalign.methods.policy_gradient import check_text_sampling, policy_gradient_parts
from mmalign.methods.registry import method
from mmalign.methods.training import BuildContext, TrainingParts
from mmalign.policies.base import TextSampling
from mmalign.policies.value import ValueOptions, make_value


class AMFTOptions(MixedOptions):
    """Options of adaptive meta fine-tuning."""

    sampling: TextSampling = TextSampling()
    """How completions are drawn; scoring uses the same temperature."""
    encoding: TextEncoding = TextEncoding()
    """Tokenisation of prompts and demonstrations."""
    value: ValueOptions | None = None
    """A critic, for advantage gae (PPO as published); null compares the samples of a prompt instead."""
    missing_eos_penalty: float = 0.0
    """Subtracted from the reward of completions that were cut off."""

    def model_post_init(self, context: object, /) -> None:
        """Refuse values without a meaning."""
        super().model_post_init(context)
        if self.missing_eos_penalty < 0:
            raise ValueError(f"missing_eos_penalty must not be negative, not {self.missing_eos_penalty}")


@method("amft", options=AMFTOptions, modality="text", paper="He et al., 2025, arXiv 2508.06944 (withdrawn by its authors)",
        rollout=True)
def amft(options: AMFTOptions, context: BuildContext) -> TrainingParts:
    """Add an imitation loss and a policy gradient in shares that follow the gradient of a held-out reward and the entropy."""
    check_text_sampling(options.sampling)
    if (options.value is not None) != (options.advantage.name == "gae"):
        raise ConfigError("value: a critic and advantage gae belong together; give both (value: {kind: separate} and "
                          "advantage: gae), or neither")
    policy = context.policy(options.model, encoding=options.encoding)
    value = None if options.value is None else make_value(options.value, policy, options.model)
    clip = math.inf if options.value is None or options.value.clip is None else options.value.clip
    rl = policy_gradient_parts(
        options, context, policy, options.sampling, temperature=options.sampling.temperature, value=value,
        value_coef=0.1 if options.value is None else options.value.coef, value_clip=clip,
        missing_eos_penalty=options.missing_eos_penalty)
    return mixed_parts(options, context, rl)
