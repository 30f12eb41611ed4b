"""Trained adapters and runs, as ``mmalign`` leaves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mmalign.policies.provenance import write_provenance


def train_adapter(base: Path, folder: Path, **config: Any) -> Any:
    """A PEFT adapter with random, non-zero updates; returns the live model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**options))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(noise * (0.2 if "lora_" in name else 0.02))
    model.save_pretrained(folder)
    write_provenance(folder, base_model=str(base), base_path=base, base_hash="x", modality="text", method="sft")
    return model.eval()


def train_lora(base: Path, folder: Path, *, rank: int = 4, alpha: float = 16, provenance: bool = True) -> Any:
    """A diffusers LoRA as ``mmalign`` saves it; returns the live pipeline."""
    from diffusers import DiffusionPipeline
    from tiny_diffusion import add_lora

    from mmalign.policies.diffusion_export import save_lora

    pipe = DiffusionPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    add_lora(pipe.unet, rank=rank, alpha=alpha, scale=0.1)
    add_config(pipe.unet, rank, alpha)
    save_lora(pipe, folder, names=("unet",))
    if provenance:
        write_provenance(folder, base_model=str(base), base_path=base, modality="diffusion", method="ddpo")
    return pipe


def add_config(network: Any, rank: int, alpha: float) -> None:
    """What ``network.add_adapter`` would have recorded beside injecting the layers."""
    from peft import LoraConfig

    if not hasattr(network, "peft_config"):
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        network.peft_config = {"default": LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)}


def make_run(model: Path, **manifest: Any) -> Path:
    """Give the model folder ``<run>/model`` the manifest and metrics of a run."""
    run = model.parent
    (run / "manifest.json").write_text(json.dumps({
        "name": "run", "kind": "sft", "status": "done", "seed": 3, "versions": {"torch": "2"}, "git": "abc",
        "inputs": {"d": "1f"},
        "metrics": {}, "config": {
            "data": {"path": "org/some-data"}, "loss": {"name": "nll"}, "tracking": {"wandb_api_key": "hush"},
            "rewards": [{"name": "answer_match", "weight": 2.0, "label": None, "extract": "tag"}],
        },
        **manifest,
    }))
    (run / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in (
        {"step": 0, "eval/answer_match": 0.25, "eval/answer_match/error": 0.05}, {"step": 1, "loss": 2.0},
        {"step": 2, "eval/answer_match": 0.75, "eval/answer_match/error": 0.04},
    )) + "\n")
    return run
