"""Every configuration in ``configs/`` parses; every paper-scale one builds all its parts on stand-ins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmalign.config import apply_overrides, parse
from mmalign.methods.registry import METHODS
from mmalign.methods.training import prepare_training
from mmalign.stages import PlannedStage, load_plan, make_plan

CONFIGS = sorted((Path(__file__).resolve().parent.parent / "configs").rglob("*.yaml"))
PAPERS = [path for path in CONFIGS if path.stem.endswith("_paper")]
STAND_INS = {
    "sft": ["data={path: asset:arithmetic, limit: 8}"],
    "reward_model": ["data={path: asset:arithmetic, limit: 8, arguments: {pairs: true}}"],
    "ranking_model": ["data={path: asset:arithmetic, limit: 8, arguments: {pairs: true}}"],
    "grpo": ["data={path: asset:arithmetic, limit: 8}"],
    "ppo": ["data={path: asset:arithmetic, limit: 8}", "rewards=[{name: answer_match}]", "value={kind: separate}",
            "reference={kind: soup, checkpoints: [asset:tiny_llama, asset:tiny_llama]}"],
    "self_sampling": ["data={path: asset:word_programs, limit: 8}", "programs_from=completion"],
    "amft": ["data={path: asset:arithmetic, limit: 8}", "validation.data={path: asset:arithmetic, split: test, limit: 8}"],
    "fol_correction": ["data={path: asset:fol, limit: 8, arguments: {task: loop}}"],
    "diffusion_sft": ["data={path: asset:shapes, limit: 8}"],
    "diffusion_dpo": ["data={path: asset:shapes, limit: 8, arguments: {pairs: true}}"],
    "ddpo": ["data={path: asset:shapes, limit: 8}"],
}


ROW = {
    "prompt": "What is 3 + 4?", "completion": " 7", "answer": "7", "chosen": " 7", "rejected": " 8", "gold": " It is 7.",
    "generated": " 9", "label": True, "margin": 0.5, "teacher_logp": -1.5,
    "language": "english", "task": "sums", "reward_type": "exact",
}
"""A row with every column that some text method reads."""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configuration_parses(path: Path, tmp_path: Path) -> None:
    plan = load_plan(path, run_dir=str(tmp_path))
    assert plan.stages


def stages_on_stand_ins(path: Path, run_dir: Path) -> list[PlannedStage]:
    """The training stages of a configuration, with models and data that are always there."""
    plan = load_plan(path, run_dir=str(run_dir))
    rows = run_dir / "rows.jsonl"
    rows.write_text("".join(json.dumps({**ROW, "prompt": f"{i}: {ROW['prompt']}"}) + "\n" for i in range(8)))
    stages = []
    for stage in plan.stages:
        if stage.kind not in METHODS or METHODS.get(stage.kind).kind != "train":
            continue
        model = "asset:tiny_llama" if METHODS.get(stage.kind).modality == "text" else "asset:shapes_base"
        data = STAND_INS.get(stage.kind, [f"data={{path: {rows}}}"])
        tree = apply_overrides(stage.tree, [f"model={{path: {model}}}", "precision=float32", *data])
        stages.append(make_plan({"method": stage.kind, **tree, "run_dir": str(run_dir / stage.name)},
                                config_folder=path.parent).stages[0])
    return stages


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_paper_configuration_builds_its_parts(path: Path, tmp_path: Path) -> None:
    """Every training stage of it; a pipeline has several."""
    for planned in stages_on_stand_ins(path, tmp_path):
        method = METHODS.get(planned.kind)
        prepared = prepare_training(method, parse(method.options, planned.tree), folder=tmp_path, seed=0,
                                    config_folder=path.parent, fingerprint="", quiet=True)
        assert prepared.loop.state.total_steps >= 1
        assert sum(len(group.parameters) for group in prepared.loop.groups) > 0
        assert prepared.loop.options.checkpoint.every > 0


def test_every_method_has_a_small_and_a_paper_configuration(root: Path) -> None:
    stems: dict[str, Any] = {path.stem: path for path in CONFIGS}
    for name in METHODS:
        assert name in stems, f"configs/*/{name}.yaml is missing"
        assert f"{name}_paper" in stems, f"configs/*/{name}_paper.yaml is missing"
