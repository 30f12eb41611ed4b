"""Reward models that give a response a number, trained on pairs with the Bradley-Terry likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import AliasChoices, Field

from mmalign.data.chat import TextEncoding
from mmalign.errors import ConfigError
from mmalign.methods.registry import method
from mmalign.methods.training import BuildContext, TrainingParts
from mmalign.policies.reward_lm import RewardPolicy
from mmalign.training.experience import DatasetExperience
from mmalign.training.objective import LossTerm
from mmalign.training.options import TrainOptions
from mmalign.training.preference import Preference


class RewardEncoding(TextEncoding):
    """Tokenisation for reward models, which must see how a response ends: rows that are too long are dropped."""

    truncation: Literal["keep_start", "balanced", "drop"] = "drop"
    """A row that is too long: drop it; or keep its start, or share the room between prompt and response."""


class RewardModelOptions(TrainOptions):
    """Options of Bradley-Terry reward models."""

    pair_fields: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
    """Samples that every data row holds, for checks before a run."""
    margin: bool | None = None
    """Subtract the data column ``margin`` from the difference of the scores; null: when the data have that column."""
    center_coef: float = Field(
        default=0.0, validation_alias=AliasChoices("center_coef", "center_rewards_coefficient"))
    """Weight of ``(r_w + r_l)^2``, which keeps scores around 0; 0.01 is customary, 0 is off."""
    encoding: RewardEncoding = RewardEncoding()
    """Tokenisation, masks and truncation."""

    def model_post_init(self, context: object, /) -> None:
        """Refuse values without a meaning."""
        super().model_post_init(context)
        if self.center_coef < 0:
            raise ValueError(f"center_coef must be 0 or positive, not {self.center_coef}")
        if self.evaluation is not None:
            raise ValueError("evaluation samples from the model, which a reward model cannot do; remove it")


@method("reward_model", options=RewardModelOptions, modality="text", paper="Ouyang et al., 2022, arXiv 2203.02155",
        aliases=("bradley_terry",))
def reward_model(options: RewardModelOptions, context: BuildContext) -> TrainingParts:
    """A score per response, fitted to pairs with the Bradley-Terry likelihood."""
    policy = context.policy(options.model, encoding=options.encoding, load=RewardPolicy.from_options, seed=context.seed)
    examples = context.prepared(policy, options.data, fields=("chosen", "rejected"))
    present = "margin" in column_names(examples)
    if options.margin and not present:
        raise ConfigError(f"margin: the data have no column 'margin' (columns are {', '.join(column_names(examples))}); map it "
                          "with data.columns, or set margin: false")
    name = "bt_reward" if options.margin is False or not present else "bt_reward_margin"
    objective = Preference(policy, [LossTerm(name, {"center_coef": options.center_coef})])
    experience = DatasetExperience(policy, examples, context.shape, seed=context.seed, rank=context.state.rank)
    return TrainingParts(policy, objective, experience, rows=len(examples), provenance={"scores": "sequence_classification"})


def column_names(examples: Sequence[Any]) -> list[str]:
    """Columns of a data set on disk or of a list of rows."""
    return list(getattr(examples, "column_names", None) or examples[0])
