"""SIGKILL in a rollout, in an update, and while saving: a run started again ends with the same weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

RUNNER = """
import os, signal, sys
from pathlib import Path
import mmalign.training.checkpoint as checkpoint, mmalign.training.loop as loop
from mmalign.training.experience import RolloutExperience
from mmalign.stages import load_plan, run_plan

config, run_dir, where, count = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])

def kill_at(owner, name, after=False):
    original, seen = getattr(owner, name), [0]
    def wrapped(*args, **kwargs):
        seen[0] += 1
        if seen[0] != count:
            return original(*args, **kwargs)
        if after:
            original(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(owner, name, wrapped)

if where == "rollout":
    kill_at(RolloutExperience, "_updates")
elif where == "update":
    kill_at(loop.Loop, "_step", after=True)
elif where == "saving":
    kill_at(loop, "save_state", after=True)
elif where == "model":
    kill_at(loop, "prune", after=True)
run_plan(load_plan(config, sys.argv[5:], run_dir=run_dir), quiet=True)
"""


def start(config: Path, run_dir: Path, where: str, count: int, *overrides: str) -> int:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", RUNNER, str(config), str(run_dir), where, str(count), *overrides],
                          env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-2000:]
    return done.returncode


@pytest.mark.slow
@pytest.mark.parametrize(("where", "count"), [("rollout", 2), ("update", 3), ("saving", 4), ("model", 2)])
def test_killed_process_resumes_to_the_same_weights(where: str, count: int, root: Path, tmp_path: Path) -> None:
    config = root / "configs" / "text" / "grpo.yaml"
    overrides = ["steps=4", "checkpoint.every=1", "batch.passes_per_rollout=2"]
    assert start(config, tmp_path / "whole", "never", 0, *overrides) == 0
    assert start(config, tmp_path / "killed", where, count, *overrides) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model").exists()
    assert start(config, tmp_path / "killed", "never", 0, *overrides) == 0
    files = {file.name for file in (tmp_path / "killed" / "model").iterdir()}
    assert not any(name.startswith(".") or "partial" in name for name in files)
    expected, found = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "killed"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
