"""Policy gradients on text without a value function: rows of the advantage and policy-loss tables, each with its defaults."""

from __future__ import annotations

from typing import Any

from mmalign.core.reduce import REDUCTIONS
from mmalign.data.chat import TextEncoding
from mmalign.methods.policy_gradient import PolicyGradientOptions, check_text_sampling, policy_gradient_parts
from mmalign.methods.registry import method
from mmalign.methods.training import BuildContext, TrainingParts
from mmalign.policies.base import TextSampling
from mmalign.training.advantages import AdvantageOptions
from mmalign.training.dynamic_sampling import DynamicSamplingOptions
from mmalign.training.experience import BatchOptions
from mmalign.training.policy_gradient import KLOptions, PolicyLossOptions
from mmalign.training.rollout_advantages import Placement


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
    how = options.loss.reduction
    if options.loss.norm_length is None and how in REDUCTIONS and REDUCTIONS.get(how).uses_norm_length:
        loss = options.loss.model_copy(update={"norm_length": options.sampling.max_new_tokens})
        options = options.model_copy(update={"loss": loss})
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


class DrGRPOLossOptions(PolicyLossOptions):
    """``{name: ppo_clip, norm_length: ...}``: sums over tokens divided by one constant length."""

    reduction: str = "seq_mean_token_sum_norm"
    """How ``[B, A]`` losses become one number; see the reductions table."""
    norm_length: int | None = None
    """The constant length; null takes sampling.max_new_tokens."""


class DrGRPOOptions(GRPOOptions):
    """Options of group-relative policy optimisation without its two biases on text."""

    advantage: AdvantageOptions = AdvantageOptions(name="dr_grpo")
    """How rewards become advantages: by default their difference to the mean of the group."""
    loss: DrGRPOLossOptions = DrGRPOLossOptions()
    """Policy loss, its clip range and reduction."""


@method("dr_grpo", options=DrGRPOOptions, modality="text", paper="Liu et al., 2025, arXiv 2503.20783", rollout=True)
def dr_grpo(options: DrGRPOOptions, context: BuildContext) -> TrainingParts:
    """GRPO without division by the spread of a group's rewards and by the length of a completion."""
    return grpo(options, context)


class GSPOLossOptions(PolicyLossOptions):
    """``{name: gspo, clip_low: 3e-4, clip_high: 4e-4}``: one clipped ratio per completion."""

    name: str = "gspo"
    """gspo, or another registered policy loss."""


class GSPOOptions(GRPOOptions):
    """Options of group sequence policy optimisation on text."""

    loss: GSPOLossOptions = GSPOLossOptions()
    """Policy loss, its clip range and reduction."""


@method("gspo", options=GSPOOptions, modality="text", paper="Zheng et al., 2025, arXiv 2507.18071", rollout=True)
def gspo(options: GSPOOptions, context: BuildContext) -> TrainingParts:
    """GRPO whose ratio is the geometric mean over the tokens of a completion, clipped as a whole."""
    return grpo(options, context)


class CISPOLossOptions(PolicyLossOptions):
    """``{name: cispo, clip_high: 5.0}``: weights are clipped, gradients are not."""

    name: str = "cispo"
    """cispo, or another registered policy loss."""
    reduction: str = "token_mean"
    """How ``[B, A]`` losses become one number; see the reductions table."""


class CISPOOptions(GRPOOptions):
    """Options of clipped importance-sampling policy optimisation on text."""

    loss: CISPOLossOptions = CISPOLossOptions()
    """Policy loss, its clip range and reduction."""


@method("cispo", options=CISPOOptions, modality="text", paper="MiniMax, 2025, arXiv 2506.13585", rollout=True)
def cispo(options: CISPOOptions, context: BuildContext) -> TrainingParts:
    """REINFORCE with clipped importance weights: every token keeps its gradient, also where GRPO clips it away."""
    return grpo(options, context)


class RLOOLossOptions(PolicyLossOptions):
    """``{name: ppo_clip, level: sequence_sum}``: one clipped ratio per completion, that of its whole probability."""

    def model_post_init(self, context: Any, /) -> None:
        """The level, where none is given."""
        if self.name in ("ppo_clip", "ppo") and self.model_extra is not None:
            self.model_extra.setdefault("level", "sequence_sum")


class SequenceKLOptions(KLOptions):
    """The divergence to the reference, by default subtracted from the reward of a completion."""

    coef: float = 0.05
    """Weight; 0 loads no reference."""
    placement: Placement = "sequence_reward"
    """sequence_reward: the sum over the completion is subtracted from its reward, before the baseline. Others as in grpo."""


class RLOOOptions(GRPOOptions):
    """Options of REINFORCE with a leave-one-out baseline on text."""

    advantage: AdvantageOptions = AdvantageOptions(name="rloo")
    """How rewards become advantages: by default their difference to the mean of the others of the group."""
    loss: RLOOLossOptions = RLOOLossOptions()
    """Policy loss, its clip range and reduction."""
    kl: SequenceKLOptions = SequenceKLOptions()
    """Divergence to the reference."""


@method("rloo", options=RLOOOptions, modality="text", paper="Ahmadian et al., 2024, arXiv 2402.14740", rollout=True)
def rloo(options: RLOOOptions, context: BuildContext) -> TrainingParts:
    """Compare every completion with the mean of the others of its prompt; the divergence is part of the reward."""
    return grpo(options, context)


class ReinforceLossOptions(PolicyLossOptions):
    """``{name: reinforce}``: the log-probability of a completion times its advantage."""

    name: str = "reinforce"
    """reinforce, which wants one update per rollout; ppo_clip with several."""
    reduction: str = "seq_mean_token_sum"
    """How ``[B, A]`` losses become one number; a completion's log-probability is the sum over its tokens."""


class ReinforceBatchOptions(BatchOptions):
    """Batch sizes with one completion per prompt."""

    prompts_per_rollout: int | None = 64
    """Prompts sampled together, over all ranks."""
    completions_per_prompt: int | None = 1
    """Samples of each prompt; the baseline needs no group."""


class ReinforceOptions(GRPOOptions):
    """Options of REINFORCE on text."""

    batch: ReinforceBatchOptions = ReinforceBatchOptions()
    """Batch sizes; one update uses the whole rollout."""
    advantage: AdvantageOptions = AdvantageOptions(name="running_mean")
    """How rewards become advantages: by default against a running mean of the rewards of all rollouts."""
    loss: ReinforceLossOptions = ReinforceLossOptions()
    """Policy loss and its reduction."""


@method("reinforce", options=ReinforceOptions, modality="text", paper="Williams, 1992, Machine Learning 8", rollout=True)
def reinforce(options: ReinforceOptions, context: BuildContext) -> TrainingParts:
    """Sample one completion per prompt and follow the gradient of its log-probability times its reward above a baseline."""
    return grpo(options, context)


class ReMaxOptions(ReinforceOptions):
    """Options of REINFORCE with the greedy completion as baseline on text."""

    advantage: AdvantageOptions = AdvantageOptions(name="remax")
    """How rewards become advantages: by default against the reward of the greedy completion of the prompt."""


@method("remax", options=ReMaxOptions, modality="text", paper="Li et al., 2023, arXiv 2310.10505", rollout=True)
def remax(options: ReMaxOptions, context: BuildContext) -> TrainingParts:
    """REINFORCE that compares the sampled completion of a prompt with its greedy one."""
    return grpo(options, context)
