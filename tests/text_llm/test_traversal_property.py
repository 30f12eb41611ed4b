"""Navigation against knowledge: a model that learned every hop answers better when the prompt makes it walk."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from mmalign.api import run
from mmalign.data.code_trees import load_tree

TREE = {"branching": 4, "depth": 3}
HELD_OUT = 24


def write_rows(folder: Path, seed: int) -> tuple[Path, list[str]]:
    """Single hops of the whole tree; ways to the top and direct answers of inner codes and of the leaves not held out."""
    tree = load_tree("synthetic", seed=seed, **TREE)
    leaves = list(tree.leaves)
    random.Random(seed).shuffle(leaves)
    held = leaves[:HELD_OUT]
    rows = []
    for code, parent in tree.parents.items():
        if parent is None:
            continue
        rows.append({"prompt": f"Up: {code}", "completion": f" > {parent}"})
        if code not in held:
            way = list(tree.path(code))[::-1]
            rows.append({"prompt": f"Path: {code}", "completion": "".join(f" > {c}" for c in way[1:])})
            rows.append({"prompt": f"Top: {code}", "completion": f" {way[-1]}"})
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file, held


def study(folder: Path, seed: int) -> dict[str, float]:
    folder.mkdir()
    rows, held = write_rows(folder, seed)
    stages: list[dict[str, Any]] = [
        {"name": "sft", "method": "sft", "model": {"path": "asset:tiny_llama"}, "data": {"path": str(rows)},
         "encoding": {"max_length": 64}, "batch": {"examples_per_update": 64}, "steps": 400,
         "optimizers": [{"kind": "adamw", "lr": 4e-3, "schedule": {"name": "cosine", "warmup": 0.1}}]},
        {"name": "traversal", "method": "hierarchical_traversal", "model": {"path": "${stages.sft.model}"},
         "tree": {"name": "synthetic", "arguments": {**TREE, "seed": seed}}, "ask": "top", "codes": held, "items": None,
         "prompts": ["qa", "structured", "shuffled"], "chat": False, "order": "up", "runs": 1, "probes": 0,
         "templates": {"qa": "Top: {code}", "structured": "Path: {code}", "shuffled": "Path: {decoy}"},
         "sampling": {"max_new_tokens": 16, "temperature": 0}},
    ]
    return run({"run_dir": str(folder / "run"), "seed": seed, "stages": stages}, quiet=True)["traversal"]["metrics"]


@pytest.mark.slow
def test_walking_beats_jumping_and_the_control_does_not(tmp_path):
    """Every hop was trained, the composition was not. As long a walk from another code does not help."""
    differences = []
    for seed in range(3):
        metrics = study(tmp_path / str(seed), seed)
        differences.append(metrics["accuracy/model/structured"] - metrics["accuracy/model/qa"])
        assert metrics["accuracy/model/shuffled"] < metrics["accuracy/model/qa"], metrics
    assert min(differences) > 0.05, differences
    assert sum(differences) / 3 > 0.15, differences
