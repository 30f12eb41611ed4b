"""Exports of diffusion models: same picture in a process that knows only diffusers; LoRA strength."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from hub_models import add_config, train_lora
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmalign.errors import ExportError
from mmalign.hub.check import check_export, load_in_fresh_process
from mmalign.hub.diffusion import load, lora_metadata, probe_latents
from mmalign.hub.export import ExportOptions, export
from mmalign.policies.diffusion_export import LORA_FILE
from mmalign.policies.provenance import read_provenance


def picture_hash(pipe) -> str:
    image = pipe("a red circle", num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np").images[0]
    return hashlib.sha256((image * 255).round().astype("uint8").tobytes()).hexdigest()


def failures(folder) -> list[str]:
    return [check.text for check in check_export(folder) if check.status == "fail"]


@pytest.mark.slow
def test_lora_gives_the_same_picture_with_diffusers_alone(sd, tmp_path):
    live = train_lora(sd, tmp_path / "lora", rank=4, alpha=16)
    report = export(ExportOptions(model=str(tmp_path / "lora"), output=str(tmp_path / "out")))
    assert report.kind == "diffusers_lora"
    assert report.gap.absolute == 0
    assert failures(report.folder) == []
    fresh = load_in_fresh_process(report.folder, base=sd)
    assert fresh.image_hash == picture_hash(live)
    assert "mmalign" not in fresh.modules
    assert read_provenance(report.folder)["base_path"] == str(sd)


def test_strength_survives_and_its_absence_is_found(sd, tmp_path):
    live = probe_latents(train_lora(sd, tmp_path / "lora", rank=4, alpha=16))
    base = probe_latents(load(sd))
    out = export(ExportOptions(model=str(tmp_path / "lora"), output=str(tmp_path / "out"))).folder

    def reloaded(folder):
        pipe = load(sd)
        pipe.load_lora_weights(folder, weight_name=LORA_FILE)
        return probe_latents(pipe)

    scale = float((live - base).abs().max())
    assert float((reloaded(out) - live).abs().max()) < 1e-6 * scale
    metadata = lora_metadata(out)
    assert (metadata["unet.r"], metadata["unet.lora_alpha"]) == (4, 16)

    bare = tmp_path / "bare"
    bare.mkdir()
    save_file(load_file(out / LORA_FILE), bare / LORA_FILE, metadata={"format": "pt"})
    assert float((reloaded(bare) - live).abs().max()) > 0.1 * scale  # diffusers takes alpha = rank without a word
    assert any("alpha = rank" in text for text in failures(bare))
    report = export(ExportOptions(model=str(bare), output=str(tmp_path / "assumed"), base=str(sd)))
    assert any("did not say which alpha" in text for text in report.warnings)
    assert torch.equal(reloaded(report.folder), reloaded(bare))
    assert failures(report.folder) == []


@pytest.mark.slow
def test_fused_pipeline_gives_the_same_picture(sd, tmp_path):
    live = train_lora(sd, tmp_path / "lora")
    report = export(ExportOptions(model=str(tmp_path / "lora"), output=str(tmp_path / "out"), kind="pipeline"))
    assert report.gap.relative < 1e-4
    assert failures(report.folder) == []
    assert load_in_fresh_process(report.folder).image_hash == picture_hash(live)
    assert json.loads((report.folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"] == "PNDMScheduler"


@pytest.mark.slow
def test_unet_alone_in_the_base_pipeline(sd, tmp_path):
    live = train_lora(sd, tmp_path / "lora")
    fused = export(ExportOptions(model=str(tmp_path / "lora"), output=str(tmp_path / "fused"), kind="pipeline")).folder
    for source, name in ((tmp_path / "lora", "from_lora"), (fused, "from_pipeline")):
        out = export(ExportOptions(model=str(source), output=str(tmp_path / name), kind="unet")).folder
        names = {"config.json", "diffusion_pytorch_model.safetensors", "README.md", "mmalign.json"}
        assert {p.name for p in out.iterdir()} >= names
        assert failures(out) == []
    assert load_in_fresh_process(out, base=sd).image_hash == picture_hash(live)
    whole = export(ExportOptions(model=str(out), output=str(tmp_path / "whole"), kind="pipeline", base=str(sd)))
    assert torch.equal(probe_latents(load(whole.folder)), probe_latents(load(fused)))
    assert "UNet2DConditionModel.from_pretrained" in (out / "README.md").read_text()
    with pytest.raises(ExportError, match="only within its base pipeline"):
        load_in_fresh_process(out)


def test_precision_of_a_pipeline(sd, tmp_path):
    report = export(ExportOptions(model=str(sd), output=str(tmp_path / "out"), dtype="float16"))
    assert report.dtype == "float16"
    assert 0 < report.gap.relative < 1e-2
    with safe_open(report.folder / "unet" / "diffusion_pytorch_model.safetensors", "pt") as reader:
        assert {reader.get_tensor(name).dtype for name in reader.keys()} == {torch.float16}  # noqa: SIM118
    again = export(ExportOptions(model=str(report.folder), output=str(tmp_path / "again")))
    assert again.dtype == "float16"  # kept, not widened
    assert again.gap.absolute == 0


def test_sdxl_and_sd3_loras(tmp_path):
    from tiny_diffusion import add_lora, save_tiny_sd3, save_tiny_sdxl

    from mmalign.policies.diffusion_export import save_lora, save_pipeline

    for build, component in ((save_tiny_sdxl, "unet"), (save_tiny_sd3, "transformer")):
        folder = tmp_path / component
        base = folder / "whole"
        absent = {} if component == "unet" else {"text_encoder_3": None, "tokenizer_3": None}
        pipe = load(build(folder / "base"), absent)
        save_pipeline(pipe, base)
        network = getattr(pipe, component)
        add_lora(network, rank=2, alpha=8, scale=0.1)
        add_config(network, 2, 8)
        save_lora(pipe, folder / "lora", names=(component,))
        report = export(ExportOptions(model=str(folder / "lora"), output=str(folder / "out"), base=str(base)))
        assert report.gap.absolute == 0
        assert not any("does not change" in text for text in report.warnings)
        assert f"{component}: rank 2, alpha 8" in " ".join(check.text for check in report.checks)
        fused = export(ExportOptions(model=str(folder / "lora"), output=str(folder / "fused"), kind="pipeline", base=str(base)))
        assert fused.gap.relative < 1e-4


def test_lora_without_its_base(sd, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(sd, base)
    train_lora(base, tmp_path / "lora")
    shutil.rmtree(base)
    report = export(ExportOptions(model=str(tmp_path / "lora"), output=str(tmp_path / "out")))
    assert report.gap is None
    assert any("not tried" in text for text in report.warnings)
    with pytest.raises(ExportError, match=r"a whole pipeline needs|does not exist \(any more\)"):
        export(ExportOptions(model=str(tmp_path / "lora"), output=str(tmp_path / "whole"), kind="pipeline"))


def test_other_formats_are_refused(sd, tmp_path):
    train_lora(sd, tmp_path / "lora", provenance=False)
    tensors = load_file(tmp_path / "lora" / LORA_FILE)
    first = next(iter(tensors))
    save_file({**tensors, first.rsplit(".", 2)[0] + ".alpha": torch.tensor(4.0)}, tmp_path / "lora" / LORA_FILE)
    with pytest.raises(ExportError, match="another trainer's format"):
        export(ExportOptions(model=str(tmp_path / "lora"), output=str(tmp_path / "out"), base=str(sd)))
    with pytest.raises(ExportError, match="which is not recorded; give base"):
        export(ExportOptions(model=str(tmp_path / "lora"), output=str(tmp_path / "out"), kind="pipeline"))
