"""Dynamic sampling: draw prompts until enough groups have something to learn from (DAPO)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Literal

import torch
from torch import Tensor

from mmalign.config import Options
from mmalign.core.advantages import group_filter
from mmalign.data.rows import Rows
from mmalign.errors import ConfigError, RewardError
from mmalign.policies.base import Rollout
from mmalign.rewards.base import RewardSet
from mmalign.training.rollout_advantages import sum_counts_over_ranks


class DynamicSamplingOptions(Options):
    """Which groups are kept, and how long to look for them (Yu et al., 2025, arXiv 2503.14476, section 3.2)."""

    filter_on: str | None = None
    """Name of the reward that decides, usually the accuracy; null is the weighted total, shaping included."""
    mode: Literal["spread", "mixed", "any"] = "spread"
    """spread: rewards that are not all equal. mixed: some above the threshold and some not. any: one above the threshold."""
    threshold: float = 0.0
    """For mixed and any."""
    max_rounds: int = 10
    """Rounds of prompts_per_rollout prompts, at most; training then goes on with the groups found so far."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse values without a meaning."""
        if self.max_rounds < 1:
            raise ValueError(f"dynamic_sampling.max_rounds must be at least 1, not {self.max_rounds}")


class DynamicSampling:
    """Collects ``groups`` groups that pass the filter; those beyond are kept, with their log-probs, for the next rollout.

    All processes make the same number of rounds, so that they walk through the prompts in step.
    """

    def __init__(self, options: DynamicSamplingOptions, rewards: RewardSet, groups: int) -> None:
        if options.filter_on is not None and options.filter_on not in rewards.names:
            raise ConfigError(f"dynamic_sampling.filter_on: there is no reward {options.filter_on!r}; allowed: "
                              f"{', '.join(rewards.names)}, or null for the total")
        self.options, self.rewards, self.groups = options, rewards, groups
        self.surplus: Rollout | None = None

    def values(self, rollout: Rollout) -> Tensor:
        """``[B]``: what the filter reads."""
        if self.options.filter_on is None:
            return self.rewards.total(rollout)
        assert rollout.rewards is not None
        return rollout.rewards[:, self.rewards.names.index(self.options.filter_on)]

    def collect(self, draw: Callable[[], Rollout]) -> tuple[Rollout, Rollout, dict[str, float]]:
        """The groups to train on, everything that was sampled for them, and figures about it.

        ``draw`` samples and rewards one round of prompts. Raises RewardError when no process found a single group.
        """
        options = self.options
        kept = [] if self.surplus is None else [self.surplus]
        old = found = 0 if self.surplus is None else _groups(self.surplus)
        sampled: list[Rollout] = []
        while not sampled or (len(sampled) < options.max_rounds and sum_counts_over_ranks(int(found < self.groups))):
            rollout = draw()
            sampled.append(rollout)
            keep = group_filter(self.values(rollout), rollout.group, mode=options.mode, threshold=options.threshold)
            index = torch.isin(rollout.group, rollout.group.unique()[keep]).nonzero().flatten()
            if len(index):
                kept.append(rollout.take(index))
                found += int(keep.sum())
        everything = Rollout.concat(sampled)
        if not sum_counts_over_ranks(found):
            raise RewardError(
                f"dynamic_sampling.max_rounds: none of {_groups(everything)} groups in {len(sampled)} rounds passed the filter "
                f"({options.mode} of {options.filter_on or 'the total reward'}), so there is nothing to learn from. Use prompts "
                "that the model answers right sometimes, more completions_per_prompt, or more rounds")
        if not kept:  # the other processes have groups: stay in step with one that has no gradient
            first = sampled[-1]
            kept = [first.take((first.group == first.group[0]).nonzero().flatten())]
        rollout = Rollout.concat(kept)
        ids = rollout.group.unique()
        mine, rest = ids[: self.groups], ids[self.groups :][-self.groups :]
        self.surplus = rollout.take(torch.isin(rollout.group, rest).nonzero().flatten()) if len(rest) else None
        metrics = {
            "dynamic_sampling/rounds": float(len(sampled)), "dynamic_sampling/surplus": float(len(rest)),
            "dynamic_sampling/rejected": 1 - (found - old) / _groups(everything),
            "dynamic_sampling/filled": min(1.0, found / self.groups),
        }
        return rollout.take(torch.isin(rollout.group, mine).nonzero().flatten()), everything, metrics

    def state_dict(self) -> dict[str, Any]:
        """The groups kept for the next rollout."""
        return {"surplus": None if self.surplus is None else rollout_state(self.surplus)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.surplus = None if state["surplus"] is None else rollout_from_state(state["surplus"])


def _groups(rollout: Rollout) -> int:
    return len(rollout.group.unique())


def rollout_state(rollout: Rollout) -> dict[str, Any]:
    """A rewarded rollout as tensors and JSON values; samples that are not text are left out, their rewards are known."""
    state = {field.name: getattr(rollout, field.name) for field in fields(rollout)}
    text = all(isinstance(sample, (str, list, dict)) for sample in rollout.samples)
    return {**state, "rows": dict(rollout.rows), "reward_names": list(rollout.reward_names),
            "samples": rollout.samples if text else [None] * len(rollout)}


def rollout_from_state(state: Mapping[str, Any]) -> Rollout:
    """The rollout of :func:`rollout_state`."""
    return Rollout(**{**state, "rows": Rows(state["rows"]), "reward_names": tuple(state["reward_names"])})
