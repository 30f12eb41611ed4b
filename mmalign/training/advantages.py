"""How a configured advantage estimator meets a rollout: its arguments, its memory, and the samples of other processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from mmalign.config import Component, bind
from mmalign.core.advantages import ADVANTAGES, PromptStatistics, RunningMean
from mmalign.errors import ConfigError
from mmalign.policies.base import Rollout
from mmalign.training.rollout_advantages import GAE, GREEDY, AdvantageFunction, gather_objects

OF_THE_BATCH = ("grpo_batch_std", "reinforce", "reinforce_pp_baseline")
"""Estimators with a statistic of the whole batch, which is that of all processes."""


class Statistics(Protocol):
    """Statistics of rewards that outlive a rollout."""

    def update(self, prompts: list[str], values: Tensor) -> Tensor:
        """Advantages ``[B]`` of ``values[B]``, which enter the statistics."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything it remembers."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        ...


STATISTICS: dict[str, Callable[..., Statistics]] = {"prompt_statistics": PromptStatistics, "running_mean": RunningMean}
"""Estimators with a memory, by name."""


class AdvantageOptions(Component):
    """``{name: grpo, ddof: 1, eps: 1e-4}``: an advantage estimator and its arguments."""

    name: str = "grpo"
    """grpo, dr_grpo, rloo, remax, reinforce, ..., prompt_statistics (running mean and spread of every prompt), running_mean
    (one running mean of all), or gae (method ppo)."""
    clip: float | None = None
    """Advantages are clipped to +- this; null does not clip."""


def advantage_function(
    options: AdvantageOptions, *, key: str = "advantage",
) -> tuple[AdvantageFunction | GAE, Statistics | None]:
    """``(rollout, total rewards) -> advantages`` of a configuration node, and its statistics when it keeps any.

    Raises ConfigError for an unknown name, or arguments that the estimator does not take.
    """
    if options.name == "gae":
        try:
            return GAE(**bind(options, GAE, key=key, ignore=("clip",)), clip=options.clip), None
        except ValueError as error:
            raise ConfigError(f"{key}.{error}") from None
    limit = math.inf if options.clip is None else options.clip
    if options.name in STATISTICS:
        make = STATISTICS[options.name]
        try:
            statistics = make(**bind(options, make, key=key))
        except ValueError as error:
            raise ConfigError(f"{key}.{error}") from None
        return lambda rollout, total: _with_statistics(statistics, rollout, total).clamp(-limit, limit), statistics
    try:
        name = ADVANTAGES.canonical(options.name)
    except ValueError as error:
        raise ConfigError(f"{key}.name: {error}; or {', '.join(STATISTICS)}, gae") from None
    function = ADVANTAGES.get(name)
    estimate = partial(function, **bind(options, function, key=key, ignore=("actions", "greedy")))

    def advantages(rollout: Rollout, total: Tensor) -> Tensor:
        columns = {}
        if name == "reinforce_pp_baseline":
            columns["actions"] = rollout.mask.sum(1)
        elif name == "remax":
            columns["greedy"] = torch.as_tensor(rollout.columns[GREEDY], dtype=torch.float32)
        if name in OF_THE_BATCH:
            return _over_ranks(estimate, total, rollout.group, columns).clamp(-limit, limit)
        return estimate(total, rollout.group, **columns).clamp(-limit, limit)

    return advantages, None


def _over_ranks(estimate: Callable[..., Tensor], total: Tensor, group: Tensor, columns: dict[str, Tensor]) -> Tensor:
    """``estimate`` on the rows of all processes; this process's part of the result."""
    parts, rank = gather_objects((total.cpu(), group.cpu(), {name: value.cpu() for name, value in columns.items()}))
    if len(parts) == 1:
        return estimate(total, group, **columns)
    # Groups are numbered on every process from 0.
    groups = [group + sum(int(other.max()) + 1 for _, other, _ in parts[:at]) for at, (_, group, _) in enumerate(parts)]
    together = {name: torch.cat([own[name] for _, _, own in parts]) for name in columns}
    values = estimate(torch.cat([rewards for rewards, _, _ in parts]), torch.cat(groups), **together)
    return values.split([len(rewards) for rewards, _, _ in parts])[rank].to(total.device)


def _with_statistics(statistics: Statistics, rollout: Rollout, total: Tensor) -> Tensor:
    """All processes update the same statistics with the samples of all, in order of rank."""
    parts, rank = gather_objects(([str(prompt) for prompt in rollout.prompts], total.cpu()))
    values = statistics.update([prompt for prompts, _ in parts for prompt in prompts], torch.cat([own for _, own in parts]))
    return values.split([len(own) for _, own in parts])[rank].to(total.device)
