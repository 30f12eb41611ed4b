"""Checks of rewards: the signature, and three samples."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmalign.checks.findings import Findings
from mmalign.config import apply_overrides, parse
from mmalign.core.registry import nearest
from mmalign.rewards.probe import check_reward
from mmalign.rewards.registry import RewardOptions, load_object, traits

_FORMS = {
    "text": "three text samples", "messages": "three message samples", "images": "three images",
    "given": "a row's own sample, another row's, and an empty or a third one",
}


def reward_options(name: str, overrides: Sequence[str] = ()) -> RewardOptions:
    """A reward as a configuration names it, with ``key=value`` options."""
    return parse(RewardOptions, apply_overrides({"name": name}, overrides), root="reward")


def check_reward_spec(
    spec: RewardOptions, findings: Findings, *, samples: Sequence[Mapping[str, Any]] | None = None,
    config_folder: Path | None = None, key: str = "",
) -> None:
    """Look a reward up, describe what it asks for, and call it on three samples (stand-ins when none are given).

    ``key`` is its configuration key, for the messages.
    """
    where = f"{key}: " if key else ""
    with findings.guard(f"{where}reward {spec.name}"):
        function = load_object(spec.name, config_folder=config_folder, key=key or "reward")
        declared = traits(function)
        found = check_reward(spec, samples, config_folder=config_folder)
        parts = _signature(function, found.asks)
        parts += [f"range {declared.range[0]:g} to {declared.range[1]:g}"] if declared.range else []
        parts += [f"needs the columns {', '.join(declared.needs)}"] if declared.needs else []
        parts += ["differentiable"] if declared.differentiable else []
        findings.ok(f"{where}reward {found.name}: {'; '.join(parts)}")
        named = list(inspect.signature(function).parameters)
        for option in spec.arguments:
            if option not in named:
                close = nearest(option, named)
                findings.warn(f"{where}reward {found.name}: option {option!r} is no parameter of it"
                              f"{f'; did you mean {close!r}?' if close else '; it arrives among its **keywords'}")
        for problem in found.problems:
            findings.fail(f"{where}reward {found.name}: {problem}")
        for warning in found.warnings:
            findings.warn(f"{where}reward {found.name}: {warning}")
        if found.values:
            shown = ", ".join("None" if value is None else f"{value:.4g}" for value in found.values)
            findings.ok(f"{where}reward {found.name} on {_FORMS.get(found.form, found.form)}: {shown} ({found.seconds:.3f} s)")


def _signature(function: Any, asks: Sequence[str]) -> list[str]:
    """What a reward is given: columns and other keywords, and options of the configuration."""
    parameters = dict(inspect.signature(function).parameters)
    if inspect.isclass(function):
        options = [name for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD]
    else:
        options = [name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
    columns = [name for name in asks if name not in ("prompts", "completions", *options)]
    parts = [f"asks for {', '.join(columns)}"] if columns else []
    return [*parts, f"options {', '.join(options)}"] if options else parts or ["asks for prompts and completions only"]


def missing_columns(spec: RewardOptions, columns: Sequence[str], *, config_folder: Path | None, key: str) -> list[str]:
    """Columns that a reward says it needs and the data set does not have under that or a mapped name."""
    needs = traits(load_object(spec.name, config_folder=config_folder, key=key)).needs
    return [name for name in needs if name != "completion_ids" and spec.columns.get(name, name) not in columns]
