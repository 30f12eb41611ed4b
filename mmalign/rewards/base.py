"""Scoring rollouts with one or several reward functions, their errors caught sample by sample.

A reward is any callable ``(prompts, completions, **columns) -> list[float | None] | Tensor[B]``, called by keyword as
TRL's GRPOTrainer does, so that functions written for it run unchanged (:class:`~mmalign.rewards.registry.Reward`).
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmalign.core.advantages import combine_rewards
from mmalign.errors import ConfigError, RewardError
from mmalign.policies.base import Rollout
from mmalign.rewards.adapters import cache, from_image_reward, takes_images_first
from mmalign.rewards.failures import describe_sample, write_failure
from mmalign.rewards.inputs import (
    Asked,
    EventLoop,
    RewardInputs,
    TrainerState,
    collect_keywords,
    present,
    run_inline,
    slice_keywords,
)
from mmalign.rewards.registry import REWARDS, Reward, RewardOptions, Traits, build, is_async, load_object, reward, traits

__all__ = [
    "ON_ERROR", "REWARDS", "BoundReward", "Combination", "Reward", "RewardInputs", "RewardOptions", "RewardSet", "TrainerState",
    "Traits", "build_rewards", "cache", "from_image_reward", "load_object", "reward", "traits",
]

ON_ERROR = ("stop", "drop", "lowest")
"""What becomes of a sample whose reward failed: an error, no value (NaN), or the lowest value of the range."""

Combination = Literal["sum_then_normalize", "normalize_then_sum"]
"""How several rewards become one: weighted as they are, or each standardised within its group first."""

_RANGE_SLACK = 1e-5


@dataclass
class Outcome:
    """Values of one reward on one batch, NaN where it did not apply or failed."""

    values: Tensor
    """``[B]`` float32."""
    failures: dict[int, Exception] = field(default_factory=dict)
    """Sample -> what went wrong."""
    extras: dict[str, list[Any]] = field(default_factory=dict)
    """Columns logged through ``log_extra``."""
    metrics: dict[str, list[float]] = field(default_factory=dict)
    """Numbers logged through ``log_metric``."""
    seconds: float = 0.0
    """Time spent in the function."""


class BoundReward:
    """One reward ready to be called: its function, constant options, column names, weight and declared traits."""

    def __init__(
        self, function: Any, *, constants: Mapping[str, Any] | None = None, columns: Mapping[str, str] | None = None,
        weight: float = 1.0, label: str | None = None,
    ) -> None:
        if takes_images_first(function):
            function = from_image_reward(function)
        if not callable(function):
            raise ConfigError(f"rewards: {function!r} is a {type(function).__name__}, not a callable")
        if not math.isfinite(weight):
            raise ConfigError(f"rewards: weight {weight!r} must be finite")
        self.function = function
        self.constants = dict(constants or {})
        self.columns = dict(columns or {})
        self.weight = float(weight)
        self.traits = traits(function)
        self.label = label or self.traits.name
        self.asked = Asked.of(function, self.label)
        self.is_async = is_async(function)

    @staticmethod
    def from_options(options: RewardOptions, *, config_folder: Path | None = None, key: str = "rewards") -> BoundReward:
        """The reward of one configuration item; raises ConfigError naming ``key``."""
        function, constants = build(options, config_folder=config_folder, key=key)
        if options.cache:
            function = cache(from_image_reward(function) if takes_images_first(function) else function)
        return BoundReward(
            function, constants=constants, columns=options.columns, weight=options.weight, label=options.label,
        )

    async def evaluate(self, inputs: RewardInputs, *, stop: bool) -> Outcome:
        """Values of every sample; a call that raises is halved until the samples that cause it are known.

        ``stop``: look for the first failing sample only. Raises RewardError when the contract itself is broken
        (missing column, wrong number of values), whatever the samples.
        """
        keywords = collect_keywords(self.asked, self.traits, inputs, constants=self.constants, columns=self.columns)
        keywords["completions"] = present(inputs.completions, self.traits)
        if "completions" not in (*self.asked.required, *self.asked.optional) and not self.asked.open_ended:
            del keywords["completions"]
        outcome = Outcome(torch.full((len(inputs),), math.nan))
        started = time.perf_counter()
        await self._evaluate(keywords, list(range(len(inputs))), outcome, stop)
        outcome.seconds = time.perf_counter() - started
        return outcome

    async def _evaluate(self, keywords: dict[str, Any], indices: list[int], outcome: Outcome, stop: bool) -> None:
        if not indices or (stop and outcome.failures):
            return
        arguments = slice_keywords(keywords, self.constants, indices)
        logged = self._add_loggers(arguments, indices, len(outcome.values))
        try:
            with torch.no_grad():
                result = self.function(**arguments)
                if inspect.isawaitable(result):
                    result = await result
        except Exception as error:
            if len(indices) == 1:
                outcome.failures[indices[0]] = error
                return
            middle = len(indices) // 2
            await self._evaluate(keywords, indices[:middle], outcome, stop)
            await self._evaluate(keywords, indices[middle:], outcome, stop)
            return
        for i, value in zip(indices, self._listed(result, len(indices)), strict=True):
            number = self._number(value)
            if isinstance(number, Exception):
                outcome.failures[i] = number
            else:
                outcome.values[i] = number
        for column, values in logged.extras.items():
            stored = outcome.extras.setdefault(column, [None] * len(outcome.values))
            for i in indices:
                stored[i] = values[i]
        for name, numbers in logged.metrics.items():
            outcome.metrics.setdefault(name, []).extend(numbers)

    def _add_loggers(self, arguments: dict[str, Any], indices: list[int], count: int) -> Outcome:
        """Put ``log_extra`` and ``log_metric`` into ``arguments`` if asked for; what they log lands in the result."""
        logged = Outcome(torch.empty(0))

        def log_extra(column: str, values: Sequence[Any]) -> None:
            if len(values) != len(indices):
                raise RewardError(f"log_extra({column!r}) got {len(values)} values for {len(indices)} samples")
            stored = logged.extras.setdefault(column, [None] * count)
            for i, value in zip(indices, values, strict=True):
                stored[i] = value

        def log_metric(name: str, value: float) -> None:
            logged.metrics.setdefault(name, []).append(float(value))

        named = {*self.asked.required, *self.asked.optional}
        for name, logger in (("log_extra", log_extra), ("log_metric", log_metric)):
            if name in named or self.asked.open_ended:
                arguments[name] = logger
        return logged

    def _listed(self, result: Any, count: int) -> list[Any]:
        if isinstance(result, Tensor):
            if result.dim() != 1:
                raise RewardError(f"reward {self.label!r} returned a tensor of shape {tuple(result.shape)}, not [{count}]")
            result = result.detach().to("cpu", torch.float32).tolist()
        elif hasattr(result, "tolist"):
            result = result.tolist()
        if not isinstance(result, (list, tuple)):
            raise RewardError(
                f"reward {self.label!r} returned {type(result).__name__}, not a list or tensor with one number per sample"
            )
        if len(result) != count:
            raise RewardError(
                f"reward {self.label!r} returned {len(result)} values for {count} samples; return exactly one per "
                "completion (None where it does not apply)"
            )
        return list(result)

    def _number(self, value: Any) -> float | RewardError:
        if value is None:
            return math.nan
        try:
            number = float(value)
        except (TypeError, ValueError):
            return RewardError(f"returned {value!r} ({type(value).__name__}), not a number or None")
        if not math.isfinite(number):
            return RewardError(f"returned {number}; return None for a sample that the reward does not apply to")
        limits = self.traits.range
        if limits and not limits[0] - _RANGE_SLACK <= number <= limits[1] + _RANGE_SLACK:
            return RewardError(f"returned {number}, outside its declared range {limits}")
        return number


class RewardSet:
    """Several rewards with weights, scored together.

    Args:
        rewards: options, names, callables or :class:`BoundReward` objects.
        weights: one per reward; default: those of the options, 1 for plain callables.
        on_error: what becomes of a sample whose reward raised or gave NaN, infinity or a value out of range.
        dump_dir: folder for the samples that caused an error; None writes none (the message still shows it).
        config_folder: folder of the configuration, where ``file.py:function`` is looked up first.
        key: configuration key, for messages.
    """

    def __init__(
        self, rewards: Sequence[Any], weights: Sequence[float] | None = None, *, on_error: str = "stop",
        dump_dir: Path | str | None = None, config_folder: Path | None = None, key: str = "rewards",
    ) -> None:
        if on_error not in ON_ERROR:
            raise ConfigError(f"on_error={on_error!r} is unknown; allowed: stop, drop, lowest")
        if not rewards:
            raise ConfigError(f"{key}: at least one reward is needed, for example [{{name: answer_match}}]")
        self.rewards = [_bound(item, config_folder, f"{key}.{i}") for i, item in enumerate(rewards)]
        if weights is not None:
            if len(weights) != len(self.rewards):
                raise ConfigError(f"{len(weights)} weights for {len(self.rewards)} rewards; give one per reward")
            for bound, weight in zip(self.rewards, weights, strict=True):
                bound.weight = float(weight)
        if not any(bound.weight for bound in self.rewards):
            raise ConfigError(f"{key}: every weight is 0, so the total is always 0; give one reward a weight")
        self.names = _distinct([bound.label for bound in self.rewards])
        self.on_error = on_error
        self.dump_dir = Path(dump_dir) if dump_dir is not None else None
        self._last: dict[str, float] = {}
        self._loop = EventLoop()

    def check_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Let rewards that look at the data before training (those with ``check_rows(rows)``) refuse what they cannot judge."""
        for bound in self.rewards:
            check = getattr(bound.function, "check_rows", None)
            if check is not None:
                check(rows)

    @property
    def weights(self) -> Tensor:
        """``[R]`` float32."""
        return torch.tensor([bound.weight for bound in self.rewards], dtype=torch.float32)

    def score(self, rollout: Rollout, *, step: int | None = None, trainer_state: Any = None) -> Rollout:
        """``rollout`` with ``rewards[B, R]`` (float32, NaN = not applicable), ``reward_names`` and logged columns.

        Rewards that ask for ``trainer_state`` get it, or one with ``global_step = step``. Raises RewardError, after
        writing the sample to ``dump_dir``, for a failure under ``on_error="stop"``.
        """
        if trainer_state is None and step is not None:
            trainer_state = TrainerState(global_step=step)
        values, extras = self._score(RewardInputs.from_rollout(rollout, trainer_state))
        return replace(
            rollout, rewards=values, reward_names=tuple(self.names), columns={**rollout.columns, **extras},
        )

    def score_samples(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]) -> Tensor:
        """``[B, R]`` rewards of samples that belong to no rollout (``score`` stages, best-of-n, ``mmalign check``)."""
        ids = columns.pop("completion_ids", None)
        inputs = RewardInputs(
            list(prompts), list(completions), {n: list(v) for n, v in columns.items()},
            None if ids is None else [list(row) for row in ids],
        )
        return self._score(inputs)[0]

    def total(self, rewards: Rollout | Tensor, *, mode: Combination = "sum_then_normalize") -> Tensor:
        """``[B]`` weighted sum over the rewards that apply to a sample; NaN where none does.

        A reward of weight 0 is only watched: it does not make a sample count as scored. ``normalize_then_sum``
        standardises every reward within its group of a rollout before it is weighted.
        """
        group = rewards.group if isinstance(rewards, Rollout) else None
        values = rewards.rewards if isinstance(rewards, Rollout) else rewards
        if values is None:
            raise RewardError("the rollout has no rewards yet; call score() first")
        used = self.weights != 0
        return combine_rewards(values[:, used.to(values.device)], self.weights[used].to(values.device), mode=mode, group=group)

    def metrics(self, rollout: Rollout) -> dict[str, float]:
        """``rewards/<name>/{mean,std,none_fraction}`` and ``reward``, ``reward_std`` of a scored rollout.

        Means and sample standard deviations leave out the samples that a reward does not apply to. Figures of the last
        :meth:`score` are added: ``rewards/<name>/seconds``, ``rewards/<name>/failed`` (unless ``on_error="stop"``) and
        whatever functions logged with ``log_metric``.
        """
        if rollout.rewards is None:
            raise RewardError("the rollout has no rewards yet; call score() first")
        figures: dict[str, float] = {}
        for name, values in zip(rollout.reward_names, rollout.rewards.T, strict=True):
            known = values[~values.isnan()].double()
            figures[f"rewards/{name}/mean"] = float(known.mean()) if len(known) else math.nan
            figures[f"rewards/{name}/std"] = _std(known)
            figures[f"rewards/{name}/none_fraction"] = 1.0 - len(known) / max(len(values), 1)
        total = self.total(rollout)
        known = total[~total.isnan()].double()
        figures["reward"] = float(known.mean()) if len(known) else math.nan
        figures["reward_std"] = _std(known)
        return {**figures, **self._last}

    def score_with_gradient(self, prompts: Sequence[Any], images: Tensor, **columns: Sequence[Any]) -> Tensor:
        """``[B]`` weighted total whose gradient reaches ``images[B, 3, H, W]``; every weighted reward must allow it.

        For methods that back-propagate a reward (ReFL, DRaFT, AlignProp). Raises RewardError naming the reward that
        is not differentiable or not finite.
        """
        total = images.new_zeros(len(images))
        for bound, name in zip(self.rewards, self.names, strict=True):
            if not bound.weight:
                continue
            if not bound.traits.differentiable or bound.is_async:
                raise RewardError(f"reward {name!r} is not differentiable; use rewards that declare it, or weight 0")
            inputs = RewardInputs(list(prompts), list(images), {n: list(v) for n, v in columns.items()})
            keywords = collect_keywords(
                bound.asked, bound.traits, inputs, constants=bound.constants, columns=bound.columns,
            )
            value = bound.function(**{**keywords, "completions": images})
            if not isinstance(value, Tensor) or value.shape != total.shape or not torch.isfinite(value).all():
                raise RewardError(f"reward {name!r} must return a finite tensor [{len(images)}], not {value!r}")
            total = total + bound.weight * value.float()
        return total

    def state_dict(self) -> dict[str, Any]:
        """State of the rewards that have one (those with ``state_dict``)."""
        holders = zip(self.names, self.rewards, strict=True)
        return {n: r.function.state_dict() for n, r in holders if hasattr(r.function, "state_dict")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        for name, bound in zip(self.names, self.rewards, strict=True):
            if name in state:
                bound.function.load_state_dict(state[name])

    def close(self) -> None:
        """Stop the thread that async rewards run in."""
        self._loop.close()

    def _score(self, inputs: RewardInputs) -> tuple[Tensor, dict[str, list[Any]]]:
        stop = self.on_error == "stop"
        # Async rewards start first and wait for their servers while the others compute in this thread.
        pending = {
            i: self._loop.submit(r.evaluate(inputs, stop=stop)) for i, r in enumerate(self.rewards) if r.is_async
        }
        try:
            outcomes = {
                i: run_inline(r.evaluate(inputs, stop=stop)) for i, r in enumerate(self.rewards) if not r.is_async
            }
        except BaseException:
            for future in pending.values():
                future.cancel()
            raise
        outcomes |= {i: future.result() for i, future in pending.items()}
        columns: list[Tensor] = []
        extras: dict[str, list[Any]] = {}
        self._last = {}
        for i, (bound, name) in enumerate(zip(self.rewards, self.names, strict=True)):
            outcome = outcomes[i]
            if outcome.failures:
                self._handle(bound, name, inputs, outcome)
            columns.append(outcome.values)
            extras.update(outcome.extras)
            self._last[f"rewards/{name}/seconds"] = outcome.seconds
            if not stop:
                self._last[f"rewards/{name}/failed"] = float(len(outcome.failures))
            self._last |= {metric: sum(logged) / len(logged) for metric, logged in outcome.metrics.items()}
        return torch.stack(columns, dim=1), extras

    def _handle(self, bound: BoundReward, name: str, inputs: RewardInputs, outcome: Outcome) -> None:
        if self.on_error == "drop":
            return
        if self.on_error == "lowest":
            known = outcome.values[~outcome.values.isnan()]
            if bound.traits.range is None and not len(known):
                raise RewardError(
                    f"reward {name!r} failed on every sample and declares no range, so there is no lowest value: "
                    f"{next(iter(outcome.failures.values()))}"
                )
            lowest = bound.traits.range[0] if bound.traits.range else float(known.min())
            outcome.values[list(outcome.failures)] = lowest
            return
        index, cause = next(iter(sorted(outcome.failures.items())))
        where = "" if self.dump_dir is None else f"; sample written to {write_failure(self.dump_dir, name, inputs, index, cause)}"
        raised = "" if isinstance(cause, RewardError) else f"raised {type(cause).__name__}: "
        raise RewardError(
            f"reward {name!r} {raised}{cause} (sample {index} of {len(inputs)}: {describe_sample(inputs, index)}){where}. "
            "on_error: drop or lowest would go on"
        ) from cause


def _bound(item: Any, config_folder: Path | None, key: str) -> BoundReward:
    if isinstance(item, BoundReward):
        return item
    if isinstance(item, str):
        item = RewardOptions(name=item)
    elif isinstance(item, Mapping):
        item = RewardOptions.model_validate(dict(item))
    if isinstance(item, RewardOptions):
        return BoundReward.from_options(item, config_folder=config_folder, key=key)
    return BoundReward(item)


def _distinct(labels: list[str]) -> list[str]:
    """``labels`` with ``_2``, ``_3`` ... after repeated ones."""
    seen: dict[str, int] = {}
    names = []
    for label in labels:
        seen[label] = seen.get(label, 0) + 1
        names.append(label if seen[label] == 1 else f"{label}_{seen[label]}")
    return names


def _std(values: Tensor) -> float:
    return float(values.double().std()) if len(values) > 1 else 0.0



def build_rewards(
    options: Sequence[RewardOptions], *, config_folder: Path | None = None, on_error: str = "stop",
    dump_dir: Path | str | None = None, key: str = "rewards",
) -> RewardSet:
    """The rewards of a configuration list; see :class:`RewardSet`."""
    return RewardSet(options, on_error=on_error, dump_dir=dump_dir, config_folder=config_folder, key=key)
