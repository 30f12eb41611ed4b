"""Every configuration in ``configs/`` parses; every paper-scale one builds all its parts on stand-ins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmalign.config import apply_overrides, parse, read_yaml
from mmalign.methods.registry import METHODS
from mmalign.methods.training import prepare_training
from mmalign.stages import load_plan, make_plan

CONFIGS = sorted((Path(__file__).resolve().parent.parent / "configs").rglob("*.yaml"))
PAPERS = [path for path in CONFIGS if path.stem.endswith("_paper")]
STAND_INS = {
    "sft": ["data={path: asset:arithmetic, limit: 8}"],
    "dpo": ["data={path: asset:arithmetic, limit: 8, arguments: {pairs: true}}"],
    "grpo": ["data={path: asset:arithmetic, limit: 8}"],
    "diffusion_sft": ["data={path: asset:shapes, limit: 8}"],
    "diffusion_dpo": ["data={path: asset:shapes, limit: 8, arguments: {pairs: true}}"],
    "ddpo": ["data={path: asset:shapes, limit: 8}"],
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configuration_parses(path: Path, tmp_path: Path) -> None:
    plan = load_plan(path, run_dir=str(tmp_path))
    assert plan.stages


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_paper_configuration_builds_its_parts(path: Path, tmp_path: Path) -> None:
    tree = read_yaml(path)
    name = str(tree["method"])
    model = "asset:tiny_llama" if METHODS.get(name).modality == "text" else "asset:shapes_base"
    tree = apply_overrides(tree, [f"model={{path: {model}}}", "precision=float32", *STAND_INS[name]])
    planned = make_plan({**tree, "run_dir": str(tmp_path)}, config_folder=path.parent).stages[0]
    prepared = prepare_training(METHODS.get(name), parse(METHODS.get(name).options, planned.tree), folder=tmp_path, seed=0,
                                config_folder=path.parent, fingerprint="", quiet=True)
    assert prepared.loop.state.total_steps >= 1
    assert sum(len(group.parameters) for group in prepared.loop.groups) > 0
    assert prepared.loop.options.checkpoint.every > 0


def test_every_method_has_a_small_and_a_paper_configuration(root: Path) -> None:
    stems: dict[str, Any] = {path.stem: path for path in CONFIGS}
    for name in METHODS:
        assert name in stems, f"configs/*/{name}.yaml is missing"
        assert f"{name}_paper" in stems, f"configs/*/{name}_paper.yaml is missing"
