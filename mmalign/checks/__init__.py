"""What would go wrong, said before it does: checks of configurations, data sets, rewards and model folders."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mmalign.checks.findings import Check, Findings

__all__ = ["Check", "run_checks", "target_kind"]

_MODEL_FILES = ("config.json", "model_index.json", "adapter_config.json", "pytorch_lora_weights.safetensors")


def run_checks(target: str, *, model: str | None = None, overrides: Sequence[str] = ()) -> list[Check]:
    """Check ``target`` and say what was found, one :class:`Check` per finding; never raises for bad input.

    Args:
        target: a YAML configuration; a data set (file, folder, ``asset:NAME``, hub id); a reward (registered name,
            ``file.py:function``, ``package.module:function``); or a model folder.
        model: for a data set: the model (folder or ``asset:NAME``) whose tokenizer shows masks and truncation.
        overrides: for a configuration: dotted ``key=value`` assignments.
    """
    findings = Findings()
    with findings.guard(target):
        kind = target_kind(target)
        if overrides and kind != "config":
            findings.warn(f"{target} is no configuration: overrides {', '.join(overrides)} have no effect")
        if model is not None and kind != "data":
            findings.warn(f"{target} is no data set: --model has no effect")
        if kind == "config":
            from mmalign.checks.configs import check_config

            check_config(Path(target), overrides, findings)
        elif kind == "reward":
            from mmalign.checks.rewards import check_reward_spec

            check_reward_spec(target, findings)
        elif kind == "model":
            from mmalign.checks.models import check_model

            check_model(target, findings)
        else:
            from mmalign.checks.rows import check_data

            check_data(target, model, findings)
    return findings.checks


def target_kind(target: str) -> str:
    """"config", "reward", "model" or "data": what ``target`` names, by its form and by what is on disk."""
    path = Path(target).expanduser()
    if path.suffix in (".yaml", ".yml"):
        return "config"
    if target.startswith("asset:"):
        return _asset_kind(target)
    if path.is_dir():
        return "model" if any((path / name).is_file() for name in _MODEL_FILES) or any(path.glob("*.gguf")) else "data"
    if path.is_file():
        return "data"
    if re.search(r"\.py:\w", target) or re.fullmatch(r"[\w.]+:[\w.]+", target):
        return "reward"
    return "reward" if _is_reward_name(target) else "data"


def _asset_kind(target: str) -> str:
    from mmalign.data.assets import list_assets

    return next((entry.kind for entry in list_assets() if entry.name == target.removeprefix("asset:")), "data")


def _is_reward_name(target: str) -> bool:
    if not re.fullmatch(r"[\w-]+", target):
        return False
    from mmalign.rewards.registry import REWARDS

    return target in REWARDS
