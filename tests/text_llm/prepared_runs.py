"""Methods built from a configuration, nothing trained yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmalign.config import parse
from mmalign.methods.registry import METHODS
from mmalign.methods.training import prepare_training
from mmalign.stages import make_plan


def rollout_tree(temperature: float, **changes: Any) -> dict[str, Any]:
    """A policy-gradient run of the tiny model that is rewarded for short answers; ``changes`` give method and batch."""
    return {
        "model": {"path": "asset:tiny_llama"}, "data": {"path": "asset:arithmetic", "limit": 16},
        "rewards": [{"name": "within_length", "max_length": 4}], "sampling": {"max_new_tokens": 6, "temperature": temperature},
        "steps": 2, "optimizers": [{"lr": 1e-3}], **changes,
    }


def prepared(tree: dict[str, Any], folder: Path, *, seed: int = 0) -> Any:
    """Its loop, parts and context."""
    planned = make_plan({**tree, "run_dir": str(folder)}, config_folder=folder).stages[0]
    method = METHODS.get(tree["method"])
    return prepare_training(method, parse(method.options, planned.tree), folder=folder, seed=seed, config_folder=folder,
                            fingerprint="", quiet=True)
