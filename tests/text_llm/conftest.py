"""Base models of the digit tasks, trained once for all tests that start from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import digit_tasks
import pytest

from mmalign.stages import make_plan, run_plan


@pytest.fixture(scope="session")
def digit_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """seed -> folder of a model that knows task a, and b and c a little."""
    known: dict[int, Path] = {}

    def model(seed: int) -> Path:
        if seed not in known:
            folder = tmp_path_factory.mktemp(f"digits{seed}")
            data = digit_tasks.write(folder / "base.jsonl", *[
                digit_tasks.rows(task, 800, seed, noise=0.0 if task == "a" else 0.5) for task in "abc"])
            tree = {"run_dir": str(folder / "run"), "seed": seed, "stages": [digit_tasks.base_stage(data)]}
            known[seed] = Path(run_plan(make_plan(tree, config_folder=folder), quiet=True)["base"]["outputs"]["model"])
        return known[seed]

    return model
