"""What is saved loads with plain diffusers and gives the same pictures; what cannot be loaded says why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import IA3Config, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_diffusion import add_lora, caption, noise_image, save_tiny_sd, save_tiny_sd3, save_tiny_sdxl
from torch import Tensor

from mmalign.core.seeding import generator
from mmalign.errors import CheckpointError, ConfigError, ExportError
from mmalign.policies.diffusion import DiffusionPolicy
from mmalign.policies.diffusion_export import LORA_FILE
from mmalign.policies.modules import adapter_layers

PROMPT = caption(0, 1, 4)
BUILDERS = {"sd": save_tiny_sd, "sdxl": save_tiny_sdxl, "sd3": save_tiny_sd3}
ABSENT = {"sd3": {"text_encoder_3": None, "tokenizer_3": None}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {name: build(root / name) for name, build in BUILDERS.items()}


def load(folder: Path, **options: Any) -> DiffusionPolicy:
    return DiffusionPolicy.from_pretrained(folder, device="cpu", **options)


def picture(pipe: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(PROMPT, num_inference_steps=3, guidance_scale=3.0, height=16, width=16, output_type="pt",
                generator=torch.Generator().manual_seed(0)).images


def nudge(policy: DiffusionPolicy) -> None:
    source = generator(0, "nudge")
    with torch.no_grad():
        for parameter in policy.module.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=source)


@pytest.mark.parametrize("family", list(BUILDERS))
def test_a_trained_pipeline_reloads_with_plain_diffusers(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    policy = load(folders[family])
    untrained = picture(policy.pipe.to("cpu"))
    nudge(policy)
    policy.module.eval()
    expected = picture(policy.pipe)
    policy.save_pretrained(tmp_path / "trained")
    reloaded = DiffusionPipeline.from_pretrained(tmp_path / "trained", **ABSENT.get(family, {}))
    assert torch.equal(picture(reloaded), expected)
    assert not torch.equal(untrained, expected)
    assert type(reloaded.scheduler) is type(policy.pipe.scheduler)
    assert dict(reloaded.scheduler.config).get("prediction_type") == policy.pipe.scheduler.config.get("prediction_type")
    assert not list((tmp_path / "trained").rglob("*.bin"))
    assert load(tmp_path / "trained").identity() == policy.identity()


@pytest.mark.parametrize("family", list(BUILDERS))
def test_a_lora_reloads_at_its_strength_when_alpha_differs_from_the_rank(
    folders: dict[str, Path], tmp_path: Path, family: str,
) -> None:
    policy = load(folders[family])
    add_lora(policy.module, rank=4, alpha=16, scale=0.1)
    policy.module.eval()
    expected = picture(policy.pipe)
    policy.save_pretrained(tmp_path / "lora")
    assert [file.name for file in (tmp_path / "lora").iterdir()] == [LORA_FILE]
    with safe_open(tmp_path / "lora" / LORA_FILE, framework="pt") as reader:
        record = json.loads(reader.metadata()["lora_adapter_metadata"])
    assert record[f"{policy.denoiser.network_name}.lora_alpha"] == 16
    base = DiffusionPipeline.from_pretrained(folders[family], **ABSENT.get(family, {}))
    plain = picture(base)
    base.load_lora_weights(tmp_path / "lora")
    assert torch.equal(picture(base), expected)
    assert float((plain - expected).abs().max()) > 1e-3


def test_an_adapter_is_loaded_trainable_or_merged(folders: dict[str, Path], tmp_path: Path) -> None:
    policy = load(folders["sd"])
    add_lora(policy.module, rank=2, alpha=6, scale=0.1)
    policy.save_pretrained(tmp_path / "lora")
    rows = policy.encode_rows([{"prompt": PROMPT, "image": noise_image(0)}])
    draw = policy.draw(rows, generator(0))
    expected = policy.log_probs(rows, draw=draw).logp

    live = load(folders["sd"], adapter=tmp_path / "lora")
    assert torch.equal(live.log_probs(rows, draw=draw).logp, expected)
    assert {name for name, p in live.module.named_parameters() if p.requires_grad} == {
        name for name, _ in live.module.named_parameters() if "lora_" in name}
    assert live.identity() == policy.identity()
    live.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / name / LORA_FILE) for name in ("lora", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)

    merged = load(folders["sd"], adapter=tmp_path / "lora", merge_adapter=True)
    assert not adapter_layers(merged.module)
    assert all(p.requires_grad for p in merged.module.parameters())
    torch.testing.assert_close(merged.log_probs(rows, draw=draw).logp, expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged" / "model_index.json").is_file()


def test_a_lora_without_a_recorded_strength_is_loaded_with_a_warning(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture,
) -> None:
    policy = load(folders["sd"])
    add_lora(policy.module)
    policy.save_pretrained(tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / LORA_FILE)
    save_file(tensors, tmp_path / "lora" / LORA_FILE)
    load(folders["sd"], adapter=tmp_path / "lora")
    assert "alpha = rank" in caplog.text


def test_adapters_that_diffusers_cannot_read_are_not_exported(folders: dict[str, Path], tmp_path: Path) -> None:
    policy = load(folders["sd"])
    inject_adapter_in_model(IA3Config(target_modules=["to_k"], feedforward_modules=[]), policy.module)
    with pytest.raises(ExportError, match="IA3"):
        policy.save_pretrained(tmp_path / "ia3")


def test_weights_trained_beside_the_adapter_are_not_lost_in_silence(folders: dict[str, Path], tmp_path: Path) -> None:
    policy = load(folders["sd"])
    add_lora(policy.module)
    policy.module.conv_out.requires_grad_(True)  # type: ignore[union-attr]
    with pytest.raises(ExportError, match=r"conv_out"):
        policy.save_pretrained(tmp_path / "both")


# -- loading -----------------------------------------------------------------------------------------------------------


def test_folders_that_are_no_pipeline_say_what_is_wrong(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model_index\.json"):
        load(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.dtype"):
        load(folders["sd"], dtype="int8")
    shutil.copytree(folders["sd"], tmp_path / "copy")
    index = tmp_path / "copy" / "model_index.json"
    entries = json.loads(index.read_text())
    index.write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        load(tmp_path / "copy")
    index.write_text(json.dumps({**entries, "_class_name": "StableDiffusionImg2ImgPipeline"}))
    with pytest.raises(CheckpointError, match=r"StableDiffusionImg2ImgPipeline; supported pipelines: .*StableDiffusionPipeline"):
        load(tmp_path / "copy")


def test_pickled_weights_are_not_loaded(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["sd"], tmp_path / "pickled")
    unet = tmp_path / "pickled" / "unet"
    torch.save(load_file(unet / "diffusion_pytorch_model.safetensors"), unet / "diffusion_pytorch_model.bin")
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="safetensors"):
        load(tmp_path / "pickled")


@pytest.mark.parametrize("file", [
    "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors",
])
def test_missing_and_cut_weights_are_refused(folders: dict[str, Path], tmp_path: Path, file: str) -> None:
    shutil.copytree(folders["sd"], tmp_path / "broken")
    path = tmp_path / "broken" / file
    tensors = load_file(path)
    dropped = sorted(tensors)[0]
    save_file({name: value for name, value in tensors.items() if name != dropped}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{file.partition('/')[0]} lacks 1 weights"):
        load(tmp_path / "broken")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"model\.path"):
        load(tmp_path / "broken")


def test_adapters_that_do_not_fit_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=LORA_FILE):
        load(folders["sd"], adapter=tmp_path)
    policy = load(folders["sdxl"])
    add_lora(policy.module)
    policy.save_pretrained(tmp_path / "lora")
    with pytest.raises(CheckpointError, match=r"model\.adapter"):
        load(folders["sd"], adapter=tmp_path / "lora")
    (tmp_path / "lora" / LORA_FILE).write_bytes(b"0" * 100)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(folders["sd"], adapter=tmp_path / "lora")
