"""Group-relative policy optimisation and its relatives: rows of the advantage and policy-loss tables."""

from __future__ import annotations

from typing import Any

from mmalign.data.chat import TextEncoding
from mmalign.methods.policy_gradient import PolicyGradientOptions, check_text_sampling, policy_gradient_parts
from mmalign.methods.registry import method
from mmalign.methods.training import BuildContext, TrainingParts
from mmalign.policies.base import TextSampling
from mmalign.training.dynamic_sampling import DynamicSamplingOptions
from mmalign.training.policy_gradient import PolicyLossOptions


class GRPOOptions(PolicyGradientOptions):
    """Options of group-relative policy optimisation on text."""

    sampling: TextSampling = TextSampling()
    """How completions are drawn; scoring uses the same temperature."""
    encoding: TextEncoding = TextEncoding()
    """Tokenisation of prompts."""


@method("grpo", options=GRPOOptions, modality="text", paper="Shao et al., 2024, arXiv 2402.03300", rollout=True)
def grpo(options: GRPOOptions, context: BuildContext) -> TrainingParts:
    """Sample G completions per prompt, compare their rewards within the group, and follow the policy gradient."""
    check_text_sampling(options.sampling)
    policy = context.policy(options.model, encoding=options.encoding)
    return policy_gradient_parts(options, context, policy, options.sampling, temperature=options.sampling.temperature)


class DAPOLossOptions(PolicyLossOptions):
    """``{name: ppo_clip, clip_low: 0.2, clip_high: 0.28}``: a wider clip upwards, and every token counts alike."""

    reduction: str = "token_mean"
    """How ``[B, A]`` losses become one number; see the reductions table."""

    def model_post_init(self, context: Any, /) -> None:
        """The asymmetric range, where none is given."""
        if self.name in ("ppo_clip", "ppo") and self.model_extra is not None:
            self.model_extra.setdefault("clip_low", 0.2)
            self.model_extra.setdefault("clip_high", 0.28)


class DAPOOptions(GRPOOptions):
    """Options of decoupled clipping with dynamic sampling on text."""

    loss: DAPOLossOptions = DAPOLossOptions()
    """Policy loss, its clip range and reduction."""
    dynamic_sampling: DynamicSamplingOptions | None = DynamicSamplingOptions()
    """Sample until enough groups have rewards that differ; name the accuracy reward in filter_on when others shape it."""


@method("dapo", options=DAPOOptions, modality="text", paper="Yu et al., 2025, arXiv 2503.14476", rollout=True)
def dapo(options: DAPOOptions, context: BuildContext) -> TrainingParts:
    """GRPO with a wider clip upwards, a mean over tokens, sampling until groups have a contrast, and no KL."""
    return grpo(options, context)
