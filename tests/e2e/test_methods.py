"""Every method's own configuration, run as it stands: it trains, resumes bit for bit, and exports what others can load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from interrupted_runs import kill_at, records
from mmalign.data.assets import asset_path
from mmalign.hub.fresh import load_in_fresh_process
from mmalign.methods.registry import METHODS
from mmalign.methods.training import prepare_training
from mmalign.stages import load_plan, run_plan
from mmalign.training.tracking import read_metrics

CONFIG_FOLDERS = {"text": "text", "diffusion": "diffusion"}
METHOD_CONFIGS = {name: f"{CONFIG_FOLDERS[METHODS.get(name).modality]}/{name}.yaml"
                  for name in METHODS if METHODS.get(name).kind == "train"}
PIPELINE_CONFIGS = {name: f"{CONFIG_FOLDERS[METHODS.get(name).modality]}/{name}.yaml"
                    for name in METHODS if METHODS.get(name).kind == "pipeline"}
SMALL = {
    "grpo": ["batch.passes_per_rollout=2", "batch.examples_per_update=8", "batch.examples_per_forward=4", "kl.coef=0.05"],
    "ppo": ["kl.adaptive={target: 0.5, horizon: 100}", "reference={kind: bema, every: 1}"],
    # One update per rollout: their loss knows the current policy only.
    "reinforce": ["batch.examples_per_forward=8"], "remax": ["batch.examples_per_forward=8"],
    "diffusion_sft": ["batch.examples_per_update=8", "batch.examples_per_forward=4", "ema={decay: 0.9}"],
    "ddpo": ["batch.prompts_per_rollout=4", "batch.completions_per_prompt=2", "batch.examples_per_update=4", "sampling.steps=4",
             "batch.examples_per_forward=4"],
}


ROWS = ["batch.examples_per_update=8", "batch.examples_per_forward=4"]
"""What methods without an entry of their own get: two forwards per update."""


def plan(root: Path, name: str, run_dir: Path, *overrides: str) -> Any:
    config = root / "configs" / METHOD_CONFIGS[name]
    return load_plan(config, ["checkpoint.every=1", *SMALL.get(name, ROWS), *overrides], run_dir=str(run_dir))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted((folder / "model").rglob("*.safetensors")):
        tensors.update({f"{file.relative_to(folder)}:{name}": t for name, t in load_file(file).items()})
    return tensors


@pytest.mark.parametrize("name", METHOD_CONFIGS)
def test_interrupted_and_resumed_run_equals_an_uninterrupted_one(name: str, root: Path, tmp_path: Path, monkeypatch: Any) -> None:
    whole = run_plan(plan(root, name, tmp_path / "whole", "steps=4"), quiet=True)
    kill_at(3, lambda: run_plan(plan(root, name, tmp_path / "parts", "steps=4"), quiet=True), monkeypatch)
    assert not (tmp_path / "parts" / "model").exists()
    resumed = run_plan(plan(root, name, tmp_path / "parts", "steps=4"), quiet=True)
    manifest = next(iter(resumed.values()))
    assert manifest["details"]["resumed_from"] == 2
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert torch.equal(tensor, found[key]), key
    logs = [records(tmp_path / part) for part in ("whole", "parts")]
    assert logs[0] == logs[1]
    norms = [[value for key, value in record.items() if key.startswith("grad_norm")] for record in logs[0]]
    assert all(norms)
    assert max(max(values) for values in norms) > 0
    assert next(iter(whole.values()))["status"] == "done"


@pytest.mark.slow
@pytest.mark.parametrize("name", METHOD_CONFIGS)
def test_configuration_runs_as_it_stands_and_its_model_loads_without_mmalign(name: str, root: Path, tmp_path: Path) -> None:
    manifests = run_plan(load_plan(root / "configs" / METHOD_CONFIGS[name], run_dir=str(tmp_path / "run")), quiet=True)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["status"] == "done"
    assert {"config", "versions", "seed", "inputs"} <= manifest.keys()
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert max(value for record in records for key, value in record.items() if key.startswith("grad_norm")) > 0
    model = Path(next(iter(manifests.values()))["outputs"]["model"])
    base = asset_path("shapes_base") if (model / "pytorch_lora_weights.safetensors").is_file() else None
    assert load_in_fresh_process(model, base=base)
    again = run_plan(load_plan(root / "configs" / METHOD_CONFIGS[name], run_dir=str(tmp_path / "run")), quiet=True)
    assert next(iter(again.values()))["finished"] == manifest["finished"]  # unchanged: skipped


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINE_CONFIGS)
def test_pipeline_runs_as_it_stands_and_is_skipped_when_unchanged(name: str, root: Path, tmp_path: Path) -> None:
    manifests = run_plan(load_plan(root / "configs" / PIPELINE_CONFIGS[name], run_dir=str(tmp_path)), quiet=True)
    assert all(manifest["status"] == "done" for manifest in manifests.values())
    again = run_plan(load_plan(root / "configs" / PIPELINE_CONFIGS[name], run_dir=str(tmp_path)), quiet=True)
    assert {n: m["finished"] for n, m in again.items()} == {n: m["finished"] for n, m in manifests.items()}


def build(root: Path, name: str, folder: Path) -> Any:
    planned = plan(root, name, folder).stages[0]
    method = METHODS.get(name)
    from mmalign.config import parse

    return prepare_training(method, parse(method.options, planned.tree), folder=folder, seed=0, fingerprint="",
                            config_folder=root / "configs" / METHOD_CONFIGS[name].split("/")[0], quiet=True).parts.objective


def test_text_and_diffusion_share_loss_functions(root: Path, tmp_path: Path) -> None:
    text, images = build(root, "dpo", tmp_path / "a"), build(root, "diffusion_dpo", tmp_path / "b")
    assert text.pairs[0][1].function is images.pairs[0][1].function
    assert type(text) is type(images)
    tokens, steps = build(root, "grpo", tmp_path / "c"), build(root, "ddpo", tmp_path / "d")
    assert tokens.function is steps.function
    assert type(tokens) is type(steps)
    sentences, pictures = build(root, "sft", tmp_path / "e"), build(root, "diffusion_sft", tmp_path / "f")
    assert type(sentences) is type(pictures)
