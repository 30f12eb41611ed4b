"""Policy gradients on denoising steps: the text losses and advantages with steps as actions."""

from __future__ import annotations

from mmalign.errors import ConfigError
from mmalign.methods.policy_gradient import PolicyGradientOptions, policy_gradient_parts
from mmalign.methods.registry import method
from mmalign.methods.training import BuildContext, TrainingParts
from mmalign.policies.base import DiffusionSampling
from mmalign.training.advantages import AdvantageOptions
from mmalign.training.policy_gradient import PolicyLossOptions


class DDPOOptions(PolicyGradientOptions):
    """Options of denoising diffusion policy optimisation."""

    sampling: DiffusionSampling = DiffusionSampling()
    """How images are drawn; training scores with the same guidance and noise."""
    advantage: AdvantageOptions = AdvantageOptions.model_validate(
        {"name": "prompt_statistics", "buffer_size": 32, "min_count": 16})
    """How rewards become advantages; by default against the running statistics of every prompt."""
    loss: PolicyLossOptions = PolicyLossOptions.model_validate({"name": "ppo_clip", "clip_low": 1e-4, "clip_high": 1e-4})
    """Policy loss. The clip range is small because a step's log-prob is a mean over latent entries."""


@method("ddpo", options=DDPOOptions, modality="diffusion", paper="Black et al., 2023, arXiv 2305.13301", rollout=True)
def ddpo(options: DDPOOptions, context: BuildContext) -> TrainingParts:
    """Sample images with stochastic denoising steps, reward them, and follow the policy gradient of every step."""
    if options.sampling.eta <= 0:
        raise ConfigError(f"sampling.eta: deterministic steps have no density; a policy gradient needs eta > 0, not "
                          f"{options.sampling.eta}")
    policy = context.policy(options.model)
    return policy_gradient_parts(options, context, policy, options.sampling)
