"""A policy-gradient method and supervised learning from demonstrations in one update, weighed by a controller."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from mmalign.config import Options
from mmalign.core.seeding import derive_seed
from mmalign.core.supervised import SUPERVISED_LOSSES
from mmalign.data.columns import prompt_text
from mmalign.data.loading import DataOptions
from mmalign.data.preference import column_names
from mmalign.errors import ConfigError, DataError
from mmalign.methods.policy_gradient import PolicyGradientOptions
from mmalign.methods.training import BuildContext, LossOptions, TrainingParts, loss_terms
from mmalign.rewards.base import RewardOptions
from mmalign.training.advantages import advantage_function
from mmalign.training.controller import FixedWeights, probed_parameters
from mmalign.training.experience import BatchOptions, BatchShape, DatasetExperience, Experience, RolloutExperience
from mmalign.training.mixing import MAIN, VALIDATION, MixedExperience, Mixture, SideExperience, term_name
from mmalign.training.mixing_control import SFT, MixedTerms, MixingOptions, make_controller
from mmalign.training.objective import Objective, Supervised, TrainState
from mmalign.training.policy_gradient import PolicyGradient

COMPARED = 50_000_000
"""Trainable parameters up to which gradients are compared on all of them."""


class MixedBatchOptions(BatchOptions):
    """Batch sizes of the rollouts, and of the demonstrations beside them."""

    demonstrations_per_update: int | None = None
    """Demonstrations of one optimiser update, over all ranks; null is prompts_per_rollout."""


class ValidationOptions(Options):
    """Held-out data that tell whether imitation or exploration is worth more at present."""

    data: DataOptions
    """Rows that share no prompt with the training data; with utility val_nll they need demonstrations."""
    prompts: int = 8
    """Prompts (or demonstrations) of one look, over all ranks."""
    completions_per_prompt: int | None = None
    """Samples of each prompt; null is batch.completions_per_prompt."""
    rewards: list[RewardOptions] | None = None
    """Rewards of the samples; null takes those of training."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse values without a meaning."""
        for name in ("prompts", "completions_per_prompt"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")


class MixedOptions(PolicyGradientOptions):
    """Options of methods that mix supervised learning and a policy gradient."""

    batch: MixedBatchOptions = MixedBatchOptions()
    """Batch sizes."""
    controller: MixingOptions = MixingOptions()
    """The share mu of the supervised loss."""
    demonstrations: DataOptions | None = None
    """Rows to imitate; null takes the column gold (or demonstration), else completion, of data."""
    sft_losses: list[LossOptions] = [LossOptions(name="nll")]
    """Supervised losses on demonstrations."""
    validation: ValidationOptions | None = None
    """Held-out rows of controller meta; other controllers do not read them."""


def mixed_parts(options: MixedOptions, context: BuildContext, rl: TrainingParts) -> TrainingParts:
    """The parts of a policy-gradient method with demonstrations, validation rollouts and a controller added.

    Raises ConfigError and DataError naming the key: no demonstrations, no validation rows or some with a training prompt,
    patterns that fit no parameter.
    """
    mixing, objective = options.controller, rl.objective
    assert isinstance(objective, PolicyGradient)
    rows = context.rows(options.data)
    source = rows if options.demonstrations is None else context.rows(options.demonstrations, key="demonstrations")
    members: dict[str, Objective] = {MAIN: objective}
    sources: dict[str, Experience] = {MAIN: rl.experience}
    imitates = mixing.name != "fixed" or mixing.mu > 0 or mixing.warmup > 0
    if imitates:
        members[SFT], sources[SFT] = _demonstrations(options, context, rl, source)
    if mixing.wants_validation:
        members[VALIDATION], sources[VALIDATION] = _validation(options, context, rl, [rows, source])
    controller = make_controller(mixing, _terms(options, rl, members), step_size=options.optimizers[0].lr)
    state = context.state
    mixture = Mixture(
        members, entropy_wanted=controller.wants_entropy, temperature=objective.temperature,
        rows_per_forward=context.shape.examples_per_forward,
    )
    experience = MixedExperience(sources, lambda: controller.parts(state))
    return replace(rl, objective=mixture, experience=experience, controller=controller)


def _terms(options: MixedOptions, rl: TrainingParts, members: Mapping[str, Objective]) -> MixedTerms:
    """Which terms belong to either side. A critic of its own always learns at its full rate."""
    objective = rl.objective
    assert isinstance(objective, PolicyGradient)
    side = {"policy": 1.0}
    if objective.kl is not None:
        side["kl"] = objective.kl.coef
    if objective.entropy_coef:
        side["entropy"] = objective.entropy_coef
    if objective.value is not None and objective.value.want:  # a head on the policy: its loss moves the policy
        side["value"] = objective.value_coef
    sft = members.get(SFT)
    names = {term_name(SFT, term.name): term.weight for term in sft.losses} if isinstance(sft, Supervised) else {}
    validation = None
    if VALIDATION in members:
        validation = term_name(VALIDATION, "nll" if options.controller.utility == "val_nll" else "policy")
    return MixedTerms(names, side, validation, compared_patterns(objective.modules(), options.controller.meta_params),
                      rl.controller or FixedWeights())


def _demonstrations(
    options: MixedOptions, context: BuildContext, rl: TrainingParts, rows: Sequence[Mapping[str, Any]],
) -> tuple[Supervised, DatasetExperience]:
    """Objective and experience of the supervised side."""
    if any(loss.on is not None for loss in options.sft_losses):
        raise ConfigError("sft_losses.on: demonstrations are one sample per row; leave it out")
    field = _field(rows)
    losses = loss_terms(options.sft_losses, [SUPERVISED_LOSSES], key="sft_losses")
    examples = context.prepare(rl.policy, rows, fields=(field,) if field else ())
    count = options.batch.demonstrations_per_update or context.shape.prompts_per_rollout
    objective = Supervised(rl.policy, losses, field=field)
    objective.part = SFT
    experience = DatasetExperience(rl.policy, examples, _shape(context, count, key="batch.demonstrations_per_update"),
                                   seed=context.seed, rank=context.state.rank)
    return objective, experience


def _field(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """``gold`` where the rows have it; the plain sample otherwise."""
    return "gold" if "gold" in column_names(rows) else None


def _validation(
    options: MixedOptions, context: BuildContext, rl: TrainingParts, training: Sequence[Sequence[Mapping[str, Any]]],
) -> tuple[Objective, Experience]:
    """Objective and experience of the held-out utility, with generators of its own."""
    given = options.validation
    if given is None:
        raise ConfigError("validation.data: controller meta follows the gradient of a held-out utility and needs rows for it; "
                          "give some, or use controller entropy, schedule or fixed")
    rows = context.rows(given.data, key="validation.data")
    check_held_out(rows, training)
    seed = derive_seed(context.seed, "validation")
    if options.controller.utility == "val_nll":
        field = _field(rows)
        examples = context.prepare(rl.policy, rows, fields=(field,) if field else ())
        supervised = Supervised(rl.policy, field=field)
        supervised.part = VALIDATION
        shape = _shape(context, given.prompts, key="validation.prompts")
        return supervised, DatasetExperience(rl.policy, examples, shape, seed=seed, rank=context.state.rank)
    objective, rollouts = rl.objective, rl.experience
    assert isinstance(objective, PolicyGradient)
    assert isinstance(rollouts, RolloutExperience)
    rl.policy.check_prompts([row["prompt"] for row in rows])
    rewards = context.rewards(given.rewards or options.rewards, on_error=options.on_reward_error)
    rewards.check_rows(rows)
    samples = given.completions_per_prompt or context.shape.completions_per_prompt
    if samples < 2 <= context.shape.completions_per_prompt:
        raise ConfigError(f"validation.completions_per_prompt: advantage {options.advantage.name!r} compares the samples of a "
                          f"prompt and needs at least 2, not {samples}")
    shape = replace(_shape(context, given.prompts * samples, key="validation.prompts"), prompts_per_rollout=given.prompts,
                    completions_per_prompt=samples, updates_per_rollout=1)
    if given.prompts % context.shape.world_size:
        raise ConfigError(f"validation.prompts: {given.prompts} does not divide over {context.shape.world_size} processes")
    advantage, statistics = advantage_function(options.advantage)
    settings = replace(rollouts.settings, advantage=advantage, passes=1, kl=None, kl_advantage=None, drop_flat_groups=False,
                       dynamic_sampling=None)
    utility = PolicyGradient(rl.policy, objective.policy_loss, temperature=objective.temperature, on_policy=True)
    utility.part = VALIDATION

    def build(state: TrainState) -> Experience:
        return RolloutExperience(rl.policy, rows, rewards, shape, settings, state, timer=context.timer, value=objective.value,
                                 statistics=statistics)

    return utility, SideExperience(build, context.state, seed=seed)


def _shape(context: BuildContext, rows: int, *, key: str) -> BatchShape:
    """Batch sizes of one part: its rows per update, and the run's rows per forward."""
    world = context.shape.world_size
    if rows < 1 or rows % world:
        raise ConfigError(f"{key}: {rows} must be positive and divide over {world} processes")
    forward = min(context.shape.examples_per_forward, rows // world)
    return BatchShape(rows, forward, -(-(rows // world) // forward), world)


def check_held_out(rows: Sequence[Mapping[str, Any]], training: Iterable[Sequence[Mapping[str, Any]]]) -> None:
    """Raise DataError when a held-out row has the prompt of a training row, or there are no held-out rows."""
    if not len(rows):
        raise DataError("validation.data: the data set has no rows")
    if "prompt" not in column_names(rows):
        raise DataError(f"validation.data: column 'prompt' is missing; columns are {', '.join(column_names(rows))}")
    held_out = {prompt_text(prompt): number for number, prompt in reversed(list(enumerate(_prompts(rows))))}
    for source in training:
        if "prompt" not in column_names(source):
            continue
        shared = held_out.keys() & {prompt_text(prompt) for prompt in _prompts(source)}
        if shared:
            first = min(shared, key=lambda text: held_out[text])
            raise DataError(f"validation.data: {len(shared)} of {len(held_out)} prompts are in the training data too, the first "
                            f"is {first[:80]!r}. Held-out rows must be others: use another split, or the key part of both")


def _prompts(rows: Any) -> Iterable[Any]:
    return rows["prompt"] if hasattr(rows, "column_names") else (row["prompt"] for row in rows)


def compared_patterns(modules: Mapping[str, nn.Module], patterns: Sequence[str] | None) -> tuple[str, ...]:
    """Patterns of the parameters to compare gradients on, checked against the policy.

    None: all trainable parameters of the policy, or those of its last block where there are more than 50 million.
    Raises ConfigError for patterns that fit no trainable parameter of the policy.
    """
    policy = {"policy": modules["policy"]}
    if patterns is not None:
        if not probed_parameters(policy, patterns):
            example = next(name for name, p in modules["policy"].named_parameters() if p.requires_grad)
            raise ConfigError(f"controller.meta_params: {list(patterns)} fits no trainable parameter of the policy; names look "
                              f"like 'policy.{example}'")
        return tuple(patterns)
    trainable = [name for name, p in modules["policy"].named_parameters() if p.requires_grad]
    if sum(p.numel() for p in modules["policy"].parameters() if p.requires_grad) <= COMPARED:
        return ("policy.*",)
    blocks = [match for name in trainable if (match := re.match(r"(.*?\.?(?:layers|layer|h|blocks|block)\.)(\d+)\.", name))]
    if not blocks:
        raise ConfigError("controller.meta_params: the policy has more than 50 million trainable parameters and no numbered "
                          "blocks; say which parameters to compare gradients on")
    last = max(blocks, key=lambda match: int(match[2]))
    return (f"policy.{last[1]}{last[2]}.*",)
