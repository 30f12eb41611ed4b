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
        overrides: ``key=value`` assignments: of a configuration's keys, or of a reward's options.
    """
    findings = Findings()
    with findings.guard(target):
        kind = target_kind(target)
        if kind == "unknown":
            findings.fail(_unknown(target))
            return findings.checks
        if overrides and kind not in ("config", "reward"):
            findings.warn(f"{target} is neither a configuration nor a reward: {', '.join(overrides)} has no effect")
        if model is not None and kind != "data":
            findings.warn(f"{target} is no data set: --model has no effect")
        if kind == "config":
            from mmalign.checks.configs import check_config

            check_config(Path(target), overrides, findings)
        elif kind == "reward":
            from mmalign.checks.rewards import check_reward_spec, reward_options

            check_reward_spec(reward_options(target, overrides), findings)
        elif kind == "model":
            from mmalign.checks.models import check_model

            check_model(target, findings)
        else:
            from mmalign.checks.rows import check_data

            check_data(target, model, findings)
    return findings.checks


def target_kind(target: str) -> str:
    """"config", "reward", "model", "data" or "unknown": what ``target`` names, by its form and by what is on disk."""
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
    if "/" in target:
        return "data"  # a data set of the hub
    return "reward" if _is_reward_name(target) else "unknown"


def _asset_kind(target: str) -> str:
    from mmalign.data.assets import list_assets

    return next((entry.kind for entry in list_assets() if entry.name == target.removeprefix("asset:")), "data")


def _unknown(target: str) -> str:
    from mmalign.core.registry import nearest
    from mmalign.data.assets import list_assets
    from mmalign.rewards.registry import REWARDS

    close = nearest(target, [*REWARDS, *(entry.name for entry in list_assets())])
    shown = close if close is None or close in REWARDS else f"asset:{close}"
    return (f"{target!r} is no file, folder or registered reward{f'; did you mean {shown!r}?' if shown else ''} A target is a "
            "configuration (.yaml), a data set (file, folder, asset:NAME, hub id), a reward (name, file.py:function, "
            "package.module:function) or a model folder")


def _is_reward_name(target: str) -> bool:
    if not re.fullmatch(r"[\w-]+", target):
        return False
    from mmalign.rewards.registry import REWARDS

    return target in REWARDS
