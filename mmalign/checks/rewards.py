"""Checks of rewards: the signature, and three samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmalign.checks.findings import Findings
from mmalign.rewards.probe import check_reward
from mmalign.rewards.registry import load_object, traits


def check_reward_spec(
    spec: Any, findings: Findings, *, samples: Sequence[Mapping[str, Any]] | None = None, config_folder: Path | None = None,
    key: str = "",
) -> None:
    """Look a reward up, describe what it asks for, and call it on three samples (stand-ins when none are given).

    ``spec`` is a name or reward options; ``key`` is its configuration key, for the messages.
    """
    name = spec if isinstance(spec, str) else str(getattr(spec, "name", spec))
    where = f"{key}: " if key else ""
    with findings.guard(f"{where}reward {name}"):
        declared = traits(load_object(name, config_folder=config_folder, key=key or "reward"))
        found = check_reward(spec, samples, config_folder=config_folder)
        parts = [f"asks for {', '.join(found.asks)}" if found.asks else "asks for nothing by name"]
        parts += [f"range {declared.range[0]:g} to {declared.range[1]:g}"] if declared.range else []
        parts += [f"needs the columns {', '.join(declared.needs)}"] if declared.needs else []
        parts += ["differentiable"] if declared.differentiable else []
        findings.ok(f"{where}reward {found.name}: {'; '.join(parts)}")
        for problem in found.problems:
            findings.fail(f"{where}reward {found.name}: {problem}")
        for warning in found.warnings:
            findings.warn(f"{where}reward {found.name}: {warning}")
        if found.values:
            shown = ", ".join("None" if value is None else f"{value:.4g}" for value in found.values)
            findings.ok(f"{where}reward {found.name} on three {found.form} samples: {shown} ({found.seconds:.3f} s)")


def missing_columns(spec: Any, columns: Sequence[str], *, config_folder: Path | None, key: str) -> list[str]:
    """Columns that a reward says it needs and the data set does not have under that or a mapped name."""
    needs = traits(load_object(spec.name, config_folder=config_folder, key=key)).needs
    renamed = dict(getattr(spec, "columns", {}) or {})
    return [name for name in needs if name != "completion_ids" and renamed.get(name, name) not in columns]
