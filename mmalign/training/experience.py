"""Where batches come from: a data set, rewarded rollouts of the current policy, or a selection among either."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from mmalign.config import Options
from mmalign.core.selection import top_k_indices
from mmalign.data.mixture import EpochSampler, IndexSampler
from mmalign.data.rows import Rows
from mmalign.errors import ConfigError
from mmalign.policies.base import Policy, Rollout, Scorer
from mmalign.policies.value import ValueFunction
from mmalign.rewards.base import Combination, RewardSet
from mmalign.training.dynamic_sampling import DynamicSampling, DynamicSamplingOptions
from mmalign.training.objective import TrainState, UpdateBatch
from mmalign.training.rollout_advantages import (
    GAE,
    GREEDY,
    AdaptiveKL,
    AdvantageFunction,
    KLOptions,
    charge_onwards,
    mean_over_ranks,
    mean_per_row,
    rollout_divergence,
)
from mmalign.training.tracking import PhaseTimer


class BatchOptions(Options):
    """The four words for a batch (and two multipliers); world size and accumulation steps are derived from them."""

    prompts_per_rollout: int | None = None
    """Prompts sampled together, over all ranks (rollout methods)."""
    completions_per_prompt: int | None = None
    """Samples of each prompt: the group size G (rollout methods)."""
    examples_per_update: int | None = None
    """Rows of one optimiser update, over all ranks; rollout methods default to the whole rollout."""
    examples_per_forward: int | None = None
    """Rows in one forward and backward on one device; null puts the rank's whole update in one."""
    passes_per_rollout: int = 1
    """Times every rollout is trained on."""
    candidates_per_example: int = 1
    """Rows scored for each row that is trained on (online selection)."""
    action_fraction: float = 1.0
    """Share of the denoising steps of a sample that is trained on."""


@dataclass(frozen=True)
class BatchShape:
    """Resolved batch sizes: every number is known, positive, and divides what it must."""

    examples_per_update: int
    examples_per_forward: int
    accumulation: int
    world_size: int
    prompts_per_rollout: int = 0
    completions_per_prompt: int = 0
    updates_per_rollout: int = 0

    def table(self) -> list[tuple[str, int]]:
        """Rows of the table printed at the start of a run."""
        rows = [("examples per update", self.examples_per_update), ("examples per forward", self.examples_per_forward),
                ("processes", self.world_size), ("forwards per update and process", self.accumulation)]
        if self.prompts_per_rollout:
            rows = [("prompts per rollout", self.prompts_per_rollout),
                    ("completions per prompt", self.completions_per_prompt), *rows,
                    ("updates per rollout", self.updates_per_rollout)]
        return rows


def resolve_batch(options: BatchOptions, *, world_size: int, rollout: bool) -> BatchShape:
    """Check the batch sizes and derive the rest; raises ConfigError naming the two keys that do not divide."""
    for name in type(options).model_fields:
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ConfigError(f"batch.{name}: must be positive, not {value}")
    if options.action_fraction > 1:
        raise ConfigError(f"batch.action_fraction: must be in (0, 1], not {options.action_fraction}")
    prompts = options.prompts_per_rollout or (8 if rollout else 0)
    completions = options.completions_per_prompt or (8 if rollout else 0)
    if not rollout and (options.prompts_per_rollout or options.completions_per_prompt):
        raise ConfigError("batch.prompts_per_rollout and batch.completions_per_prompt belong to methods that sample; "
                          "this one reads a data set: set batch.examples_per_update")
    whole = prompts * completions
    update = options.examples_per_update or (whole if rollout else 8)
    if rollout:
        _divides("batch.examples_per_update", update, "prompts_per_rollout x completions_per_prompt", whole)
        _divides("batch.completions_per_prompt", completions, "batch.examples_per_update", update)
        _divides("the number of processes", world_size, "batch.prompts_per_rollout", prompts)
    _divides("the number of processes", world_size, "batch.examples_per_update", update)
    rank_rows = update // world_size
    forward = options.examples_per_forward or rank_rows
    if forward < rank_rows:
        _divides("batch.examples_per_forward", forward, "examples per update and process", rank_rows)
    return BatchShape(
        update, min(forward, rank_rows), max(1, rank_rows // min(forward, rank_rows)), world_size, prompts, completions,
        whole // update * options.passes_per_rollout if rollout else 0,
    )


def _divides(name: str, part: int, whole_name: str, whole: int) -> None:
    if whole % part:
        lower, upper = whole - whole % part, whole - whole % part + part
        raise ConfigError(f"{name} = {part} does not divide {whole_name} = {whole}; "
                          f"use {lower or upper} or {upper} for the latter, or change {name}")


class Experience(Protocol):
    """An endless stream of updates for this rank, resumable at any update."""

    def __iter__(self) -> Iterator[UpdateBatch]:
        """Updates, one per optimiser step, for as long as the loop asks."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Position, generators, statistics, and rows already made but not yet trained on."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        ...


class DatasetExperience:
    """Rows of a prepared data set in shuffled epochs; each rank takes its slice of every update."""

    def __init__(
        self, policy: Policy, examples: Sequence[Mapping[str, Any]], shape: BatchShape, *, seed: int, rank: int = 0,
        shuffle: bool = True, part: str = "train", sampler: IndexSampler | None = None,
    ) -> None:
        self.policy, self.examples, self.shape, self.rank, self.part = policy, examples, shape, rank, part
        self.sampler: IndexSampler = sampler or EpochSampler(len(examples), seed=seed, shuffle=shuffle)

    def __iter__(self) -> Iterator[UpdateBatch]:
        """Endless updates."""
        while True:
            indices = self.sampler.take(self.shape.examples_per_update)
            mine = indices[self.rank :: self.shape.world_size]
            rows = self.policy.encode_rows([self.examples[i] for i in mine])
            yield UpdateBatch({self.part: rows}, {"epoch": self.sampler.epochs_done})

    def state_dict(self) -> dict[str, Any]:
        """Sampler position."""
        return {"sampler": self.sampler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the sampler position."""
        self.sampler.load_state_dict(state["sampler"])


@dataclass
class RolloutSettings:
    """What shapes a rollout experience beside its policy and rewards."""

    sampling: Any
    advantage: AdvantageFunction | GAE
    """From total rewards to advantages; GAE needs a value function."""
    passes: int = 1
    action_fraction: float = 1.0
    kl: KLOptions | None = None
    """The divergence to the reference; None has none."""
    kl_advantage: AdvantageFunction | None = None
    """kl.placement advantage: the estimator of the divergence's own advantage; None subtracts it as it is."""
    advantage_clip: float | None = None
    """kl.placement advantage: bound of the difference of the two advantages."""
    missing_eos_penalty: float = 0.0
    """Subtracted from the reward of samples that were cut off."""
    mask_truncated: bool = False
    drop_flat_groups: bool = False
    dynamic_sampling: DynamicSamplingOptions | None = None
    """Sample until enough groups pass a filter; None takes the groups as they come."""
    reward_combination: Combination = "sum_then_normalize"
    """How several rewards become one."""
    greedy_baseline: bool = False
    """Reward one greedy sample of every prompt too, as the column ``greedy_reward``."""


class RolloutExperience:
    """Sample, reward, compare within groups, and train: every rollout of the current policy gives some updates.

    Order of one rollout: draw prompts, sample G completions each, score every reward (again with other prompts while
    dynamic sampling lacks groups), score the reference and the value
    function where they are needed, compute advantages, then yield ``passes`` shuffled passes over it. Rows made but not
    yet trained on are part of the state, so a resumed run never samples again.
    """

    def __init__(
        self, policy: Policy, examples: Sequence[Mapping[str, Any]], rewards: RewardSet, shape: BatchShape,
        settings: RolloutSettings, state: TrainState, *, timer: PhaseTimer | None = None,
        reference: Scorer | None = None, value: ValueFunction | None = None, kl: AdaptiveKL | None = None,
        observers: Sequence[Callable[[Rollout, int], None]] = (), statistics: Any = None, kl_statistics: Any = None,
    ) -> None:
        self.policy, self.examples, self.rewards, self.shape, self.settings = policy, examples, rewards, shape, settings
        self.state, self.timer, self.reference, self.value = state, timer or PhaseTimer(), reference, value
        self.kl = kl or AdaptiveKL(settings.kl or KLOptions())
        self.observers, self.statistics, self.kl_statistics = list(observers), statistics, kl_statistics
        self.sampler = EpochSampler(len(examples), seed=state.seed, shuffle=True)
        self.pending: list[Rows] = []
        self.metrics: dict[str, float] = {}
        self.dynamic: DynamicSampling | None = None
        if settings.dynamic_sampling is not None:
            self.dynamic = DynamicSampling(settings.dynamic_sampling, rewards, shape.prompts_per_rollout // shape.world_size)
        if isinstance(settings.advantage, GAE) and value is None:
            raise ConfigError("advantage: gae estimates advantages with a value function, and this method has none; use method "
                              "ppo, or a group estimator such as grpo or rloo")

    def __iter__(self) -> Iterator[UpdateBatch]:
        """Endless updates."""
        while True:
            if not self.pending:
                self.pending, self.metrics = self._rollout()
            rows = self.pending.pop(0)
            yield UpdateBatch({"train": rows}, dict(self.metrics))

    @property
    def placement(self) -> str | None:
        """Where the divergence enters; None without one."""
        return self.settings.kl.placement if self.reference is not None and self.settings.kl is not None else None

    def _sample(self) -> Rollout:
        """Completions of the next prompts, with their rewards."""
        state, shape = self.state, self.shape
        chosen = self.sampler.take(shape.prompts_per_rollout)[state.rank :: shape.world_size]
        examples = [self.examples[i] for i in chosen]
        greedy: Rollout | None = None
        if self.settings.greedy_baseline:  # before the others: figures of rewards are those of the last samples scored
            greedy = self._scored(examples, 1, greedy_sampling(self.settings.sampling), "greedy")
        rollout = self._scored(examples, shape.completions_per_prompt, self.settings.sampling, "sampling")
        if greedy is not None:
            rollout.columns[GREEDY] = self.rewards.total(greedy)[rollout.group].tolist()
        return rollout

    def _scored(self, examples: Sequence[Mapping[str, Any]], samples: int, sampling: Any, stream: str) -> Rollout:
        """``samples`` of every prompt, with their rewards."""
        state = self.state
        with self.timer.phase("rollout"):
            rollout = self.policy.sample([example["prompt"] for example in examples], samples, sampling, state.generator(stream))
        rollout.weight_version = state.step
        at = rollout.group.tolist()
        rollout.columns |= {
            name: [examples[i][name] for i in at] for name in examples[0] if name != "prompt"
        }
        with self.timer.phase("reward"):
            return self.rewards.score(rollout, step=state.step)

    def _rollout(self) -> tuple[list[Rows], dict[str, float]]:
        state = self.state
        if self.dynamic is None:
            rollout = sampled = self._sample()
            figures: dict[str, float] = {}
        else:
            rollout, sampled, figures = self.dynamic.collect(self._sample)
        # Figures are of all samples: those of the groups that a filter kept say nothing about the policy.
        metrics = self.rewards.metrics(sampled) | rollout_metrics(sampled, self.rewards.total(sampled)) | figures
        total = self.rewards.total(rollout, mode=self.settings.reward_combination)
        if self.settings.greedy_baseline:
            metrics["reward/greedy"] = float(torch.as_tensor(sampled.columns[GREEDY]).nanmean())
        if self.settings.missing_eos_penalty and rollout.finish_reason:
            cut = torch.tensor([reason == "length" for reason in rollout.finish_reason])
            total = total - self.settings.missing_eos_penalty * cut
        counted = self._counted(rollout, total)
        divergence = self._divergence(rollout, metrics)
        if isinstance(self.settings.advantage, GAE):
            self._estimate(self.settings.advantage, rollout, total, counted, divergence, metrics)
        else:
            advantages = self._advantages(self.settings.advantage, rollout, total, divergence)
            rollout.columns["advantages"] = list(advantages) if advantages.dim() == 2 else advantages.tolist()
        rollout.mask = counted
        self._adapt(divergence, metrics)
        for observer in self.observers:
            observer(rollout, state.step)
        return self._updates(rollout), metrics

    def _counted(self, rollout: Rollout, total: Tensor) -> Tensor:
        """``[B, A]``: the actions that are trained on."""
        counted = rollout.mask
        if self.settings.mask_truncated and rollout.finish_reason:
            keep = torch.tensor([reason != "length" for reason in rollout.finish_reason])
            counted = counted & keep[:, None]
        if isinstance(self.settings.advantage, GAE):  # a sample without a reward teaches a value function nothing
            counted = counted & ~total.isnan()[:, None]
        return counted

    def _divergence(self, rollout: Rollout, metrics: dict[str, float]) -> Tensor | None:
        """Score the reference on the whole rollout where its divergence is needed before the updates; ``[B, A]`` or None."""
        settings = self.settings
        if self.reference is None or settings.kl is None:
            return None
        again = settings.passes > 1 and settings.action_fraction == 1  # cheaper once than in every pass
        if self.placement == "loss" and settings.kl.adaptive is None and not again:
            return None
        with self.timer.phase("reference"):
            rollout.ref_logp = score_in_chunks(self.reference, rollout.rows, shape=self.shape, temperature=rollout.temperature)
        log_ratio = rollout_divergence(rollout, kind="k1")
        metrics["kl/sample"] = float(log_ratio.sum(1).double().mean())
        metrics["kl/action"] = float(mean_per_row(log_ratio, rollout.mask).double().mean())
        metrics["kl/coef"] = self.kl.value
        return rollout_divergence(rollout, kind=settings.kl.kind)

    def _advantages(
        self, function: AdvantageFunction, rollout: Rollout, total: Tensor, divergence: Tensor | None,
    ) -> Tensor:
        """``[B]``, or ``[B, A]`` when the divergence is charged to single actions."""
        if divergence is None or self.placement == "loss":
            return function(rollout, total)
        coef = self.kl.value
        if self.placement == "sequence_reward":
            return function(rollout, total - coef * divergence.sum(1))
        advantages = function(rollout, total)
        if self.placement == "token_reward":
            return charge_onwards(advantages, divergence, rollout.mask, coef=coef)
        own = mean_per_row(divergence, rollout.mask)
        if self.settings.kl_advantage is not None:
            own = self.settings.kl_advantage(rollout, own)
        limit = math.inf if self.settings.advantage_clip is None else self.settings.advantage_clip
        return (advantages - coef * own).clamp(-limit, limit)

    def _estimate(
        self, estimator: GAE, rollout: Rollout, total: Tensor, counted: Tensor, divergence: Tensor | None,
        metrics: dict[str, float],
    ) -> None:
        """Values, advantages and returns of every action."""
        assert self.value is not None
        with self.timer.phase("value"):
            values = value_in_chunks(self.value, rollout.rows, shape=self.shape)
        rollout.values = torch.where(rollout.mask, values[:, : rollout.mask.shape[1]], torch.zeros_like(rollout.old_logp))
        reward, per_token = total.nan_to_num(0.0), None
        if divergence is not None and self.placement == "sequence_reward":
            reward = reward - self.kl.value * divergence.sum(1)
        elif divergence is not None and self.placement == "token_reward":
            per_token = divergence
        advantages, returns = estimator(reward, rollout.values, rollout.mask, kl=per_token, kl_coef=self.kl.value,
                                        counted=counted)
        rollout.columns |= {"advantages": list(advantages), "returns": list(returns)}
        metrics["value"] = float(rollout.values[counted].double().mean()) if bool(counted.any()) else 0.0
        metrics["value/explained"] = explained_variance(rollout.values[counted], returns[counted])

    def _adapt(self, divergence: Tensor | None, metrics: dict[str, float]) -> None:
        if divergence is not None and self.kl.options.adaptive is not None:
            kl, samples = mean_over_ranks(torch.full((len(divergence),), metrics["kl/sample"], dtype=torch.float64))
            self.kl.adapt(kl, samples)

    def _updates(self, rollout: Rollout) -> list[Rows]:
        """Rows of every update of this rollout; whole groups stay together."""
        groups = rollout.group.unique().tolist()
        members = {g: (rollout.group == g).nonzero().flatten() for g in groups}
        if self.settings.drop_flat_groups:
            useful = [bool(torch.as_tensor(value).any()) for value in rollout.columns["advantages"]]
            groups = [g for g in groups if any(useful[i] for i in members[g].tolist())] or groups[:1]
        # The number of updates is fixed by the batch sizes, so that ranks that dropped groups stay in step.
        count = max(1, self.shape.updates_per_rollout // self.settings.passes)
        updates = []
        for _ in range(self.settings.passes):
            order = torch.randperm(len(groups), generator=self.state.generator("order"))
            for part in order.tensor_split(count):
                index = torch.cat([members[groups[i]] for i in (part if len(part) else order[:1]).tolist()])
                rows = self.policy.unfold(
                    rollout.take(index), fraction=self.settings.action_fraction,
                    generator=self.state.generator("actions"),
                )
                if self.placement == "loss" and "ref_logp" not in rows:
                    assert self.reference is not None
                    with self.timer.phase("reference"):
                        scores = score_in_chunks(self.reference, rows, shape=self.shape, temperature=rollout.temperature)
                    rows = rows.with_columns(ref_logp=scores)
                updates.append(rows)
        return updates

    def state_dict(self) -> dict[str, Any]:
        """Sampler, rows not trained on yet, reward metrics and running statistics."""
        return {
            "sampler": self.sampler.state_dict(), "pending": [dict(rows) for rows in self.pending],
            "metrics": self.metrics, "statistics": self.statistics.state_dict() if self.statistics else {},
            "kl_statistics": self.kl_statistics.state_dict() if self.kl_statistics else {},
            "rewards": self.rewards.state_dict(),
            "dynamic_sampling": self.dynamic.state_dict() if self.dynamic else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.sampler.load_state_dict(state["sampler"])
        self.pending = [Rows(columns) for columns in state["pending"]]
        self.metrics = dict(state["metrics"])
        self.rewards.load_state_dict(state["rewards"])
        if self.dynamic:
            self.dynamic.load_state_dict(state["dynamic_sampling"])
        if self.statistics:
            self.statistics.load_state_dict(state["statistics"])
        if self.kl_statistics:
            self.kl_statistics.load_state_dict(state["kl_statistics"])


def greedy_sampling(sampling: Any) -> Any:
    """The same limits, but always the most likely action."""
    return sampling.model_copy(update={"temperature": 0.0, "top_k": 0, "top_p": 1.0})


def score_in_chunks(scorer: Scorer, rows: Rows, *, shape: BatchShape, temperature: float = 1.0) -> Tensor:
    """``[B, A]`` log-probs without gradient, at most ``examples_per_forward`` rows at a time."""
    width = scorer.action_mask(rows).shape[1]
    parts = []
    for start in range(0, len(rows), shape.examples_per_forward):
        chunk = rows.take(range(start, min(len(rows), start + shape.examples_per_forward)))
        with torch.no_grad():
            logp = scorer.log_probs(chunk, temperature=temperature).logp
        parts.append(torch.nn.functional.pad(logp, (0, width - logp.shape[1])).cpu())
    return torch.cat(parts)


def value_in_chunks(value: ValueFunction, rows: Rows, *, shape: BatchShape) -> Tensor:
    """``[B, A]`` values without gradient, at most ``examples_per_forward`` rows at a time."""
    parts = []
    for start in range(0, len(rows), shape.examples_per_forward):
        with torch.no_grad():
            parts.append(value.values(rows.take(range(start, min(len(rows), start + shape.examples_per_forward)))).float().cpu())
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """``1 - Var(returns - values) / Var(returns)``: 1 is a perfect value function, 0 no better than a constant."""
    spread = float(returns.double().var()) if returns.numel() > 1 else 0.0
    return 1 - float((returns - values).double().var()) / spread if spread > 0 else 0.0


def rollout_metrics(rollout: Rollout, total: Tensor) -> dict[str, float]:
    """Reward mean and spread, flat groups, lengths and cut-off completions of a rollout."""
    spread = torch.stack([
        total[rollout.group == g].double().amax() - total[rollout.group == g].double().amin() for g in rollout.group.unique()
    ])
    metrics = {
        "reward": float(total.nanmean()), "reward_std": float(total[~total.isnan()].std()) if len(total) > 1 else 0.0,
        "groups/zero_spread": float((spread <= 1e-8).double().mean()),
        "actions/mean": float(rollout.mask.sum(1).double().mean()),
    }
    if rollout.finish_reason:
        metrics["completions/cut_off"] = rollout.finish_reason.count("length") / len(rollout)
    return metrics


class SelectingExperience:
    """Keep the best-scoring share of the rows of another experience's updates (online batch selection).

    ``score(rows) -> [B]`` is evaluated with the current policy, higher is kept first; counts are taken after the
    selection, while the inner experience's position counts every candidate.
    """

    def __init__(
        self, inner: Experience, score: Callable[[Rows], Tensor], k: int, *,
        buffer: Any = None, part: str = "train", mode: Literal["top", "random"] = "top",
        generator: torch.Generator | None = None,
    ) -> None:
        self.inner, self.score, self.k, self.buffer, self.part, self.mode = inner, score, k, buffer, part, mode
        self.generator = generator

    def __iter__(self) -> Iterator[UpdateBatch]:
        """Selected updates."""
        for update in self.inner:
            rows = update.parts[self.part]
            if self.mode == "random":
                index = torch.randperm(len(rows), generator=self.generator)[: self.k]
                scores = torch.zeros(len(rows))
            else:
                with torch.no_grad():
                    scores = self.score(rows).detach().cpu()
                index = top_k_indices(scores, min(self.k, len(rows)))
            if self.buffer is not None:
                self.buffer.add(rows.take(index))
            metrics = update.metrics | {"selection/score": float(scores.mean()), "selection/kept": float(scores[index].mean())}
            yield UpdateBatch({**update.parts, self.part: rows.take(index)}, metrics)

    def state_dict(self) -> dict[str, Any]:
        """The inner experience and the buffer."""
        return {"inner": self.inner.state_dict(), "buffer": self.buffer.state_dict() if self.buffer is not None else {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.inner.load_state_dict(state["inner"])
        if self.buffer is not None:
            self.buffer.load_state_dict(state["buffer"])
