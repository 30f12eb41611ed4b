"""``mmalign export``: a trained model as a folder that transformers, peft or diffusers load without mmalign."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmalign.config import Options
from mmalign.errors import ExportError
from mmalign.hub.card import REPRODUCIBILITY_FILE, card_text, gather_facts, reproducibility
from mmalign.hub.check import Check, absent_parts, check_export
from mmalign.hub.gap import Gap
from mmalign.hub.precision import quiet
from mmalign.hub.source import CONVERSIONS, Source, locate, read_json, stored_dtype
from mmalign.policies.provenance import hash_weights, write_provenance
from mmalign.training.checkpoint import atomic_folder

Kind = Literal["auto", "transformers", "adapter", "merged", "pipeline", "unet", "diffusers_lora"]


class ExportOptions(Options):
    """What to export, as what, and where to."""

    model: str
    """A run directory, its model folder, or any model or adapter folder in Hugging Face format."""
    output: str | None = None
    """Folder to write; null writes ``export`` beside the model folder."""
    kind: Kind = "auto"
    """auto keeps the kind of the source. adapter -> merged; diffusers_lora -> pipeline (fused) or unet; pipeline -> unet."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of the written weights; null keeps that of the source (merged: of the base)."""
    base: str | None = None
    """Base model of an adapter, LoRA or single unet: folder or hub id; null takes the recorded one."""
    push_to_hub: str | None = None
    """Hub repository (``user/name``) to upload to."""
    private: bool = True
    """Whether a repository that is created is private."""
    max_shard_size: str = "5GB"
    """Largest weight file; bigger models are split."""
    tolerance: float | None = None
    """Largest allowed gap between trained and exported outputs, relative to the largest output; null: 1e-4 for float32,
    1e-2 for float16, 5e-2 for bfloat16."""
    overwrite: bool = False
    """Replace an output folder that is not empty."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse values without a meaning."""
        if self.tolerance is not None and self.tolerance < 0:
            raise ValueError(f"tolerance must be 0 or positive, not {self.tolerance}")
        if self.push_to_hub is not None and self.push_to_hub.count("/") != 1:
            raise ValueError(f"push_to_hub must have the form user/name, not {self.push_to_hub!r}")


@dataclass
class ExportReport:
    """What :func:`export` wrote."""

    folder: Path
    kind: str
    dtype: str | None
    base: str | None
    gap: Gap | None
    checks: list[Check] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    url: str | None = None
    """Where it was uploaded to."""

    def summary(self) -> str:
        """Several lines for the terminal."""
        size = sum(p.stat().st_size for p in self.folder.rglob("*") if p.is_file())
        lines = [f"{self.kind} model ({self.dtype or 'unknown precision'}, {size / 1e6:,.1f} MB) in {self.folder}"]
        lines.append(f"compared with the trained model: {self.gap}" if self.gap else "not compared with the trained model")
        lines += [str(check) for check in self.checks if check.status != "ok"]
        lines += [f"warn {text}" for text in self.warnings]
        lines.append(f"{sum(c.status == 'ok' for c in self.checks)} checks passed")
        if self.url:
            lines.append(f"uploaded to {self.url}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()


def export(options: ExportOptions) -> ExportReport:
    """Write the model as ``options.kind``, check that it reproduces the trained one, and say what users would notice.

    Everything that can be refused is refused before work starts: a folder without a model, a conversion that does not
    exist, a missing base, an output that cannot be written, an upload without a token. The folder is written under a
    temporary name and renamed when every check has passed, so there is never half a folder.

    Raises:
        ExportError: any of these, or an export that does not reproduce the trained model.
    """
    source = locate(options.model, options.base)
    kind = _target_kind(source, options.kind)
    output = Path(options.output).expanduser() if options.output else source.folder.parent / "export"
    _check_output(output, source, overwrite=options.overwrite)
    api = hub_client(options.push_to_hub) if options.push_to_hub else None
    facts = gather_facts(source, kind, repo_id=options.push_to_hub)
    with quiet(), atomic_folder(output) as folder:
        gap = _write(source, kind, folder, options)
        facts.gap, facts.dtype = None if gap is None else str(gap), stored_dtype(_weights_folder(folder, kind))
        facts.warnings = list(source.warnings)
        facts.network_class, facts.component = _network(folder, kind)
        facts.absent = absent_parts(folder) if kind == "pipeline" else []
        _write_provenance(source, kind, folder)
        (folder / REPRODUCIBILITY_FILE).write_text(
            json.dumps(reproducibility(facts, source), indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8",
        )
        (folder / "README.md").write_text(card_text(facts), encoding="utf-8")
        checks = check_export(folder)
        failed = [check for check in checks if check.status == "fail"]
        if failed:
            raise ExportError(f"the exported folder would not work, so nothing was written: {'; '.join(c.text for c in failed)}")
    report = ExportReport(output, kind, facts.dtype, source.base, gap, checks, source.warnings)
    if api is not None and options.push_to_hub:
        report.url = upload(api, output, options.push_to_hub, private=options.private)
    return report


def _target_kind(source: Source, kind: str) -> str:
    allowed = CONVERSIONS[source.kind]
    if kind == "auto":
        return allowed[0]
    if kind not in allowed:
        raise ExportError(f"kind: {source.folder} is a {source.kind} folder, which cannot become {kind!r}; allowed: auto, "
                          f"{', '.join(allowed)}")
    return kind


def _check_output(output: Path, source: Source, *, overwrite: bool) -> None:
    """Refuse, before any work, an output that is in use, is (part of) the source, or cannot be written."""
    resolved = output.resolve()
    for taken in (source.folder.resolve(), *([source.base_folder.resolve()] if source.base_folder else [])):
        if resolved == taken or taken.is_relative_to(resolved) or resolved.is_relative_to(taken):
            raise ExportError(f"output: {output} and the model read from, {taken}, lie in one another; choose another folder")
    if output.exists() and not output.is_dir():
        raise ExportError(f"output: {output} is a file; choose a folder")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ExportError(f"output: {output} is not empty; choose another folder, or set overwrite=true to replace it")
    probe = output.parent / f".{output.name}.write-test-{os.getpid()}"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ExportError(f"output: cannot write to {output.parent} ({error.strerror or error}); choose another folder") from None
    needed = sum(p.stat().st_size for p in source.folder.rglob("*") if p.is_file())
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        raise ExportError(f"output: {output.parent} has {free / 1e9:.1f} GB free, at least {needed / 1e9:.1f} GB are needed")


def _write(source: Source, kind: str, folder: Path, options: ExportOptions) -> Gap | None:
    from mmalign.hub import diffusion, language

    dtype, tolerance, shard = options.dtype, options.tolerance, options.max_shard_size
    if kind == "transformers":
        return language.write_transformers(source, folder, dtype=dtype, max_shard_size=shard, tolerance=tolerance)
    if kind == "adapter":
        return language.write_adapter(source, folder, dtype=dtype, tolerance=tolerance)
    if kind == "merged":
        return language.write_merged(source, folder, dtype=dtype, max_shard_size=shard, tolerance=tolerance)
    if kind == "pipeline":
        return diffusion.write_pipeline(source, folder, dtype=dtype, tolerance=tolerance)
    if kind == "unet":
        return diffusion.write_denoiser(source, folder, dtype=dtype, max_shard_size=shard, tolerance=tolerance)
    return diffusion.write_lora(source, folder, dtype=dtype, tolerance=tolerance)


def _weights_folder(folder: Path, kind: str) -> Path:
    if kind != "pipeline":
        return folder
    return next((folder / name for name in ("unet", "transformer") if (folder / name).is_dir()), folder)


def _network(folder: Path, kind: str) -> tuple[str | None, str]:
    """Class that loads the folder, and the denoiser's name in its pipeline."""
    if kind in ("transformers", "merged"):
        names = read_json(folder / "config.json").get("architectures") or [None]
        return ("AutoModelForCausalLM" if str(names[0]).endswith("ForCausalLM") else names[0]), "unet"
    if kind == "adapter" and read_json(folder / "adapter_config.json").get("task_type") == "SEQ_CLS":
        return "AutoModelForSequenceClassification", "unet"
    if kind == "unet":
        name = str(read_json(folder / "config.json").get("_class_name"))
        return name, "transformer" if "Transformer" in name else "unet"
    return None, "unet"


def _write_provenance(source: Source, kind: str, folder: Path) -> None:
    record = {k: v for k, v in source.provenance.items() if k not in ("versions", "exported_as")}
    modality = record.pop("modality", None) or ("text" if kind in ("transformers", "adapter", "merged") else "diffusion")
    given = {
        "base_model": record.pop("base_model", None) or source.base_id or source.base,
        "base_path": record.pop("base_path", None), "base_hash": record.pop("base_hash", None),
        "method": record.pop("method", None),
    }
    needs_base = kind in ("adapter", "diffusers_lora", "unet") and source.base_folder is not None
    # A path of this machine is kept only where nothing else leads to the base.
    given["base_path"] = str(source.base_folder) if needs_base and source.base_id is None else None
    record["base_weights"] = hash_weights(str(source.base)) if needs_base else record.get("base_weights")
    write_provenance(folder, modality=modality, exported_as=kind, **given, **record)


def hub_client(repo_id: str) -> Any:
    """A Hub client with a token; ExportError, before any work, when there is no token or the process is offline."""
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ExportError(f"push_to_hub: HF_HUB_OFFLINE is set, so nothing can be uploaded to {repo_id}; unset it")
    token = huggingface_hub.get_token()
    if not token:
        raise ExportError(f"push_to_hub: uploading to {repo_id} needs a token; run `hf auth login` or set HF_TOKEN, or export "
                          "without push_to_hub and upload the folder yourself")
    return huggingface_hub.HfApi(token=token)


def upload(api: Any, folder: Path, repo_id: str, *, private: bool) -> str:
    """Create the repository if needed and upload the folder; its address. ExportError keeps the exported folder."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=str(folder), commit_message="Export by mmalign")
    except (HfHubHTTPError, OSError) as error:
        raise ExportError(f"push_to_hub: the export is complete in {folder}, but uploading it to {repo_id} failed: {error}. "
                          f"Upload it later with `hf upload {repo_id} {folder}`") from error
    return str(url)
