"""The automatic checks find each fault that users have met."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hub_models import train_adapter
from safetensors.torch import load_file, save_file

from mmalign.errors import ExportError
from mmalign.hub.check import check_export
from mmalign.hub.fresh import load_in_fresh_process
from mmalign.hub.source import folder_kind, stored_dtype


def edit(path: Path, **changes) -> None:
    value = json.loads(path.read_text())
    value.update(changes)
    path.write_text(json.dumps(value))


def problems(folder: Path, item: str, status: str = "fail") -> list[str]:
    return [check.detail for check in check_export(folder) if check.item == item and check.status == status]


@pytest.fixture
def model(llama, tmp_path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    return folder


def test_a_good_folder_has_no_failures(model):
    checks = check_export(model)
    assert [str(c) for c in checks if c.status == "fail"] == []
    assert {"kind", "architecture", "vocabulary", "tied embeddings", "tokenizer", "generation_config"} <= {c.item for c in checks}
    assert any("generation %} marks" in text for text in problems(model, "chat template", "warn"))
    assert stored_dtype(model) == "float32"


def test_vocabulary_and_dtype(model):
    edit(model / "config.json", vocab_size=999, dtype="bfloat16")
    assert "vocab_size 999, the embedding has 363 rows" in problems(model, "vocabulary")[0]
    assert "says bfloat16, the weights are float32" in problems(model, "dtype", "warn")[0]


def test_tied_flag(model):
    weights = load_file(model / "model.safetensors")
    edit(model / "config.json", tie_word_embeddings=False)
    assert "no head is stored" in problems(model, "tied embeddings")[0]
    edit(model / "config.json", tie_word_embeddings=True)
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"] + 1}, model / "model.safetensors")
    assert "would be dropped on loading" in problems(model, "tied embeddings")[0]
    edit(model / "config.json", tie_word_embeddings=False)
    assert problems(model, "tied embeddings", "ok") == ["no, and the head is stored"]


def test_weight_files(model):
    (model / "training_args.bin").write_bytes(b"x")
    assert "training_args.bin" in problems(model, "files")[0]
    weights = load_file(model / "model.safetensors")
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(1), **weights}, model / "model.safetensors")
    assert "merge the adapter" in problems(model, "weights")[0]
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"gone": "model.safetensors"}}))
    assert "does not match the shards, for example in gone" in problems(model, "weights")[0]
    (model / "model.safetensors.index.json").unlink()
    save_file(weights, model / "model.safetensors")
    assert problems(model, "weights", "ok")
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-100])
    assert "cut short" in problems(model, "weights")[0]
    (model / "model.safetensors").write_bytes(b"\x00" * 4)
    assert "not a whole safetensors file" in problems(model, "weights")[0]
    (model / "model.safetensors").unlink()
    assert problems(model, "weights") == ["no safetensors file"]


def test_generation_config(model):
    edit(model / "generation_config.json", eos_token_id=0)
    assert "lacks <|im_end|>" in problems(model, "generation_config")[0]
    edit(model / "generation_config.json", eos_token_id=[0, 2], temperature=0.5, do_sample=False)
    assert "contradicts itself" in problems(model, "generation_config")[0]


def test_template_that_does_not_render(model):
    (model / "chat_template.jinja").write_text("{{ raise_exception('no user messages') }}")
    assert "no user messages" in problems(model, "chat template")[0]


def test_adapters(llama, tmp_path):
    folder = tmp_path / "adapter"
    train_adapter(llama, folder)
    assert [str(c) for c in check_export(folder) if c.status == "fail"] == []
    assert "folder of this machine" in problems(folder, "base model", "warn")[0]
    config = folder / "adapter_config.json"
    edit(config, r=8)
    assert "says r = 8, the weights have [4]" in problems(folder, "rank")[0]
    edit(config, r=4, base_model_name_or_path="/tmp/gone/for/good", target_modules=".*q_proj", init_lora_weights="pissa")
    assert "does not exist" in problems(folder, "base model")[0]
    assert "a pattern" in problems(folder, "target_modules", "warn")[0]
    assert "changed the base weights" in problems(folder, "init_lora_weights", "warn")[0]
    edit(config, base_model_name_or_path="org/base")
    assert problems(folder, "base model", "ok") == ["org/base"]


@pytest.mark.parametrize(("change", "reason"), [
    ({"modules_to_save": ["lm_head"]}, "modules_to_save (lm_head)"), ({"use_dora": True}, "DoRA"),
    ({"bias": "all"}, "bias = all"), ({"target_modules": ["q_proj", "embed_tokens"]}, "adapted embeddings"),
    ({"peft_type": "IA3"}, "LoRA only, not IA3"), ({"target_modules": ["model.vision_tower.q_proj"]}, "vision tower"),
    ({"rank_pattern": {"q_proj": 2}}, "differ between layers"),
])
def test_what_vllm_refuses_is_said_with_the_way_out(llama, tmp_path, change, reason):
    folder = tmp_path / "adapter"
    train_adapter(llama, folder)
    assert problems(folder, "vLLM", "ok")
    edit(folder / "adapter_config.json", **change)
    (text,) = problems(folder, "vLLM", "warn")
    assert reason in text
    assert "kind=merged" in text


def test_large_ranks_need_a_flag(llama, tmp_path):
    train_adapter(llama, tmp_path / "adapter", r=32)
    assert "--max-lora-rank 32" in problems(tmp_path / "adapter", "vLLM", "warn")[0]


def test_pipelines(sd, tmp_path):
    folder = tmp_path / "pipe"
    shutil.copytree(sd, folder)
    assert [str(c) for c in check_export(folder) if c.status == "fail"] == []
    assert any('"prediction_type": "epsilon"' in text for text in problems(folder, "scheduler", "ok"))
    assert "left out" in problems(folder, "safety checker", "ok")[0]
    (folder / "scheduler" / "scheduler_config.json").unlink()
    assert "other settings than in training" in problems(folder, "scheduler")[0]
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "diffusion_pytorch_model.bin")
    assert problems(folder, "unet") == ["no safetensors weights"]
    assert "diffusion_pytorch_model.bin" in problems(folder, "files")[0]
    shutil.rmtree(folder / "vae")
    assert "vae" in problems(folder, "components")[0]
    edit(folder / "unet" / "config.json", _class_name="NoSuchNetwork")
    assert "NoSuchNetwork" in problems(folder / "unet", "class")[0]


def test_parts_left_out_of_sd3_are_announced(tmp_path):
    from tiny_diffusion import save_tiny_sd3

    from mmalign.policies.diffusion_export import load_pipeline, save_pipeline

    absent = {"text_encoder_3": None, "tokenizer_3": None}
    save_pipeline(load_pipeline(save_tiny_sd3(tmp_path / "a"), components=absent), tmp_path / "b")
    assert "text_encoder_3=None" in problems(tmp_path / "b", "left out", "warn")[0]


def test_not_a_model(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    assert "notes.txt" in problems(tmp_path, "kind")[0]
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ExportError, match="cannot be read"):
        folder_kind(tmp_path)


@pytest.mark.slow
def test_a_fresh_process_reports_why_it_failed(model):
    edit(model / "config.json", vocab_size=999)
    with pytest.raises(ExportError, match=r"does not load as transformers in a process of its own:\n.*"):
        load_in_fresh_process(model, input_ids=[1, 2])
    with pytest.raises(ExportError, match="within 0 s"):
        load_in_fresh_process(model, timeout=0.01)
