"""Supervised fine-tuning and continued pre-training of language models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmalign.core.supervised import SUPERVISED_LOSSES
from mmalign.data.balance import BalanceOptions, GroupSampler, balanced_groups, describe_groups
from mmalign.data.chat import TextEncoding
from mmalign.data.concatenation import ConcatenatedRows, column
from mmalign.errors import ConfigError
from mmalign.methods.registry import method
from mmalign.methods.training import BuildContext, LossOptions, TrainingParts, loss_terms, total_steps
from mmalign.policies.base import Policy, TextSampling
from mmalign.training.experience import DatasetExperience
from mmalign.training.objective import Supervised
from mmalign.training.options import TrainOptions

UNCUT = 10**9
"""``max_length`` that cuts nothing."""


class SFTOptions(TrainOptions):
    """Options of supervised fine-tuning."""

    losses: list[LossOptions] = [LossOptions(name="nll")]
    """Supervised losses: nll, dft, label_smoothed_nll, z_loss, with weights."""
    encoding: TextEncoding = TextEncoding()
    """Tokenisation, masks and truncation."""
    neftune_noise_alpha: float | None = None
    """Uniform noise on the input embeddings while training (NEFTune); null is off."""
    mixture: BalanceOptions | None = None
    """Draw rows by the group of a column (language, task, ...) rather than each once per epoch."""
    sampling: TextSampling = TextSampling()
    """How ``evaluation`` draws completions; training does not sample."""

    def model_post_init(self, context: Any, /) -> None:
        """An evaluation needs something to measure."""
        super().model_post_init(context)
        if self.evaluation is not None and not self.evaluation.rewards:
            raise ValueError("evaluation.rewards: required, since fine-tuning has no rewards of its own to measure")


class ContinuedPretrainingOptions(SFTOptions):
    """Options of continued pre-training."""

    packing: bool = True
    """Shuffle the documents, join them, and cut them into rows of ``encoding.max_length`` tokens; false: one row per
    document, cut at ``encoding.max_length``."""


@method("sft", options=SFTOptions, modality="text", paper="Ouyang et al., 2022, arXiv 2203.02155")
def sft(options: SFTOptions, context: BuildContext) -> TrainingParts:
    """Next-token training on completions, conversations or raw text."""
    policy = context.policy(options.model, encoding=options.encoding)
    return _parts(options, context, policy, context.prepared(policy, options.data))


@method("continued_pretraining", options=ContinuedPretrainingOptions, modality="text", aliases=("cpt",),
        paper="Gururangan et al., 2020, arXiv 2004.10964")
def continued_pretraining(options: ContinuedPretrainingOptions, context: BuildContext) -> TrainingParts:
    """Next-token training on all tokens of raw documents, joined and cut into rows of one length."""
    if options.encoding.completion_only_loss:
        raise ConfigError("encoding.completion_only_loss: continued pre-training learns every token; use method: sft to learn "
                          "completions only")
    capacity = options.encoding.max_length
    if options.packing and capacity is None:
        raise ConfigError("encoding.max_length: packing needs the length of a row in tokens; give one, or packing: false")
    encoding = options.encoding.model_copy(update={"completion_only_loss": False,
                                                   **({"max_length": UNCUT} if options.packing else {})})
    policy = context.policy(options.model, encoding=encoding)
    examples = context.prepared(policy, options.data)
    if options.packing:
        assert capacity is not None
        rows = ConcatenatedRows(examples, capacity, seed=context.seed, by=options.mixture.by if options.mixture else None)
        context.say(f"{len(examples)} documents joined into {len(rows)} rows of {capacity} tokens")
        examples = rows
    return _parts(options, context, policy, examples)


def _parts(
    options: SFTOptions, context: BuildContext, policy: Policy, examples: Sequence[Mapping[str, Any]],
) -> TrainingParts:
    objective = Supervised(policy, loss_terms(options.losses, [SUPERVISED_LOSSES]),
                           neftune_noise_alpha=options.neftune_noise_alpha)
    sampler = None if options.mixture is None else _balanced(options, options.mixture, context, examples)
    experience = DatasetExperience(policy, examples, context.shape, seed=context.seed, rank=context.state.rank, sampler=sampler)
    evaluation = None
    if options.evaluation is not None:
        evaluation = (options.evaluation, context.rewards(options.evaluation.rewards or []), options.sampling)
    return TrainingParts(policy, objective, experience, rows=len(examples), evaluation=evaluation)


def _balanced(
    options: SFTOptions, mixture: BalanceOptions, context: BuildContext, examples: Sequence[Mapping[str, Any]],
) -> GroupSampler:
    draws = total_steps(options, len(examples), context.shape, rollout=False) * context.shape.examples_per_update
    if isinstance(examples, ConcatenatedRows):
        names, lengths = examples.groups(), examples.lengths()
    else:
        names, lengths = column(examples, mixture.by), [len(ids) for ids in column(examples, "input_ids")]
    table, groups = balanced_groups(names, lengths, mixture, draws=draws)
    context.say(describe_groups(table, mixture, len(examples) - sum(group.rows for group in table)))
    return GroupSampler(groups, [group.weight for group in table], seed=context.seed)
