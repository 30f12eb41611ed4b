"""Group-relative policy optimisation and its relatives: rows of the advantage and policy-loss tables."""

from __future__ import annotations

from mmalign.data.chat import TextEncoding
from mmalign.methods.policy_gradient import PolicyGradientOptions, check_text_sampling, policy_gradient_parts
from mmalign.methods.registry import method
from mmalign.methods.training import BuildContext, TrainingParts
from mmalign.policies.base import TextSampling


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
