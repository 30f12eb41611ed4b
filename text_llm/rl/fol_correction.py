"""Reinforcement of a model that corrects first-order logic over several turns: the last step of LogicLLaMA."""

from __future__ import annotations

from functools import partial
from typing import Any

from mmalign.data.columns import require_columns
from mmalign.errors import ConfigError
from mmalign.logic.tasks import following_row
from mmalign.methods.policy_gradient import check_text_sampling, policy_gradient_parts
from mmalign.methods.registry import method
from mmalign.methods.training import BuildContext, TrainingParts
from mmalign.policies.value import ValueOptions, make_value
from mmalign.rewards.base import RewardOptions
from mmalign.rewards.logic import check_gold
from mmalign.stage_kinds.fol_generations import LOOP_COLUMNS
from mmalign.training.multi_turn import MultiTurnExperience
from text_llm.rl.ppo import PPOOptions


class FolCorrectionOptions(PPOOptions):
    """Options of reinforcement over several corrections: those of PPO, and how many generations there may be."""

    rewards: list[RewardOptions] = [RewardOptions(name="fol_mixture")]
    """Reward of every generation on its own; they read the column ``gold``."""
    value: ValueOptions | None = ValueOptions()  # type: ignore[assignment]
    """The value function and its loss; null with an advantage of groups (rloo, grpo), which need completions_per_prompt of 2 or
    more."""
    max_generations: int = 10
    """Generations of a row, at most. A row ends earlier when a completion says that no changes are needed, writes no correction
    or no formula, or leaves no room in the model's window for another."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse values without a meaning; estimators without a value function get none."""
        super().model_post_init(context)
        if self.max_generations < 1:
            raise ValueError(f"max_generations must be at least 1, not {self.max_generations}")
        if self.advantage.name != "gae":
            if "value" in self.model_fields_set and self.value is not None:
                raise ValueError(f"value: advantage {self.advantage.name} makes no use of a value function; set it to null")
            self.value = None
        elif self.value is None:
            raise ValueError("value: advantage gae needs a value function; leave value out, or use advantage: {name: rloo}")
        if self.dynamic_sampling is not None:
            raise ValueError("dynamic_sampling: a rollout of several generations keeps all of them; leave it out")


@method("fol_correction", options=FolCorrectionOptions, modality="text", rollout=True,
        paper="Yang et al., 2023, arXiv 2305.15541")
def fol_correction(options: FolCorrectionOptions, context: BuildContext) -> TrainingParts:
    """Correct formulas again and again, reward every generation by logical equivalence and BLEU, and follow PPO or RLOO."""
    check_text_sampling(options.sampling)
    rows = context.rows(options.data)
    require_columns(list(rows[0]), LOOP_COLUMNS, purpose="fol_correction (rows of the stage fol_tasks with task: loop)")
    check_gold(rows)  # before the model is loaded
    policy: Any = context.policy(options.model, encoding=options.encoding)
    if policy.modality != "text":
        raise ConfigError(f"model.path: {options.model.path} is no language model")
    arguments: dict[str, Any] = {}
    if options.value is not None:
        arguments = {"value": make_value(options.value, policy, options.model), "value_coef": options.value.coef}
        if options.value.clip is not None:
            arguments["value_clip"] = options.value.clip
    return policy_gradient_parts(
        options, context, policy, options.sampling, temperature=options.sampling.temperature,
        missing_eos_penalty=options.missing_eos_penalty,
        make_experience=partial(MultiTurnExperience, follow=following_row, max_turns=options.max_generations), **arguments)
