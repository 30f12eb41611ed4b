"""One reward for data of several kinds: a column of the row says which of the registered rewards judges it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmalign.errors import ConfigError, DataError, RewardError
from mmalign.rewards.base import BoundReward, Outcome
from mmalign.rewards.inputs import RewardInputs, run_inline
from mmalign.rewards.registry import RewardOptions, reward

_SLACK = 1e-6

EXTRAS = ("completion_ids", "trainer_state", "log_extra", "log_metric")


@reward("route", aliases=("by_type",), range=(0, 1), accepts="any")
class Route:
    """The reward that the row's ``by`` column names, from 0 to 1 whatever its kind.

    ``routes`` maps every value of the column to a reward, or to a list of rewards with weights whose weighted mean counts:
    ``{exact: exact_match, pattern: {name: regex_match, pattern: "^- "}}``. Rows with another value, and rewards outside of
    [0, 1], are refused by name; ``scale: true`` maps a declared range onto [0, 1]. The mean of every route is logged.
    """

    def __init__(
        self, routes: Mapping[str, Any], by: str = "reward_type", scale: bool = False, config_folder: Path | None = None,
    ) -> None:
        if not isinstance(routes, Mapping) or not routes:
            raise ConfigError("routes: map every value of the column to a reward, for example {exact: {name: exact_match}}")
        self.by, self.scale = by, scale
        self.needs = (by,)
        self.routes = {str(kind): _bound(str(kind), node, scale=scale, config_folder=config_folder)
                       for kind, node in routes.items()}

    def check_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Refuse data that has rows without a route, before anything is sampled; raises DataError naming the value."""
        first = rows[0]
        if self.by not in first:
            raise DataError(f"reward 'route': by: the rows have no column {self.by!r}; columns are {', '.join(first)}")
        values = rows.unique(self.by) if hasattr(rows, "unique") else {row.get(self.by) for row in rows}
        unknown = sorted({str(value) for value in values if str(value) not in self.routes})
        if unknown:
            raise DataError(f"reward 'route': {self.by} is {unknown[0]!r} in some rows, and routes has {', '.join(self.routes)}; "
                            "add a route for it, or correct the rows")

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """One value per sample, None where its reward does not apply."""
        kinds = [str(kind) for kind in columns[self.by]]
        unknown = next((kind for kind in kinds if kind not in self.routes), None)
        if unknown is not None:
            raise RewardError(f"{self.by} is {unknown!r}, and routes has {', '.join(self.routes)}")
        values: list[float | None] = [None] * len(completions)
        log_metric = columns.get("log_metric")
        for kind, members in self.routes.items():
            index = [i for i, own in enumerate(kinds) if own == kind]
            if not index:
                continue
            inputs = _inputs(prompts, completions, columns, index)
            found = _weighted_mean(kind, members, inputs, scale=self.scale)
            for i, value in zip(index, found, strict=True):
                values[i] = value
            known = [value for value in found if value is not None]
            if log_metric is not None and known:
                log_metric(f"rewards/route/{kind}", sum(known) / len(known))
        return values


def _bound(kind: str, node: Any, *, scale: bool, config_folder: Path | None) -> list[BoundReward]:
    key = f"routes.{kind}"
    items = node if isinstance(node, list) else [node]
    if not items:
        raise ConfigError(f"{key}: at least one reward is needed")
    members = []
    for item in items:
        try:
            options = item if isinstance(item, RewardOptions) else RewardOptions.model_validate(item)
        except ValueError as error:
            raise ConfigError(f"{key}: {item!r} is no reward; write a name, or {{name: ..., options}} ({error})") from None
        bound = BoundReward.from_options(options, config_folder=config_folder, key=key)
        if bound.is_async:
            raise ConfigError(f"{key}: {options.name!r} is asynchronous, which a route cannot wait for; list it under rewards")
        if bound.weight <= 0:
            raise ConfigError(f"{key}: weight {bound.weight} of {options.name!r} must be positive; routes are weighted means")
        limits = bound.traits.range
        if limits is not None and not scale and not (limits[0] >= 0 and limits[1] <= 1):
            raise ConfigError(f"{key}: {options.name!r} ranges from {limits[0]:g} to {limits[1]:g}, and routes give values in "
                              "[0, 1]; set scale: true, or use another reward")
        members.append(bound)
    return members


def _inputs(prompts: Sequence[Any], completions: Any, columns: Mapping[str, Any], index: Sequence[int]) -> RewardInputs:
    ids = columns.get("completion_ids")
    own = {name: [values[i] for i in index] for name, values in columns.items() if name not in EXTRAS}
    return RewardInputs([prompts[i] for i in index], [completions[i] for i in index], own,
                        None if ids is None else [ids[i] for i in index], columns.get("trainer_state"))


def _weighted_mean(kind: str, members: Sequence[BoundReward], inputs: RewardInputs, *, scale: bool) -> list[float | None]:
    """Mean over the rewards that apply to a sample; a failure stops here and is found again by the caller, sample by sample."""
    totals, weights = [0.0] * len(inputs), [0.0] * len(inputs)
    for bound in members:
        outcome: Outcome = run_inline(bound.evaluate(inputs, stop=True))
        if outcome.failures:
            cause = next(iter(outcome.failures.values()))
            raise RewardError(f"routes.{kind}: {bound.label}: {cause}") from cause
        limits = bound.traits.range
        for i, value in enumerate(outcome.values.tolist()):
            if math.isnan(value):
                continue
            if scale and limits is not None:
                value = (value - limits[0]) / (limits[1] - limits[0])
            if not -_SLACK <= value <= 1 + _SLACK:
                raise RewardError(f"routes.{kind}: {bound.label} gave {value:g}, outside of [0, 1]; divide it by its largest "
                                  "value, or declare its range and set scale: true")
            totals[i] += bound.weight * value
            weights[i] += bound.weight
    return [total / weight if weight else None for total, weight in zip(totals, weights, strict=True)]
