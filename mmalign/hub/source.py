"""What is being exported: the kind of a model folder, its base model and the run that made it."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmalign.errors import CheckpointError, ConfigError, ExportError
from mmalign.policies.diffusion_export import LORA_FILE
from mmalign.policies.loading import resolve_model_path
from mmalign.policies.provenance import hash_weights, hub_id, read_provenance

CONVERSIONS: dict[str, tuple[str, ...]] = {
    "transformers": ("transformers",),
    "adapter": ("adapter", "merged"),
    "pipeline": ("pipeline", "unet"),
    "unet": ("unet", "pipeline"),
    "diffusers_lora": ("diffusers_lora", "pipeline", "unet"),
}
"""Kind of the source folder -> kinds it can be exported as, the first being ``auto``."""


@dataclass
class Source:
    """A model folder to export."""

    folder: Path
    kind: str
    """transformers, adapter, pipeline, unet or diffusers_lora."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Contents of ``mmalign.json``; empty for folders that mmalign did not write."""
    run: Path | None = None
    """The run directory the folder belongs to."""
    base: str | None = None
    """Where the base model is loaded from: a folder or a hub id; None when it has none or none is known."""
    base_id: str | None = None
    """Hub id of the base model, when known."""
    warnings: list[str] = field(default_factory=list)

    @property
    def base_folder(self) -> Path | None:
        """Local folder of the base model, when it is on this machine."""
        return Path(self.base) if self.base is not None and Path(self.base).is_dir() else None

    def need_base(self, purpose: str) -> str:
        """The base model's location; raises ExportError that says how to give it."""
        if self.base is None:
            raise ExportError(f"base: {purpose} needs the base model of {self.folder}, which is not recorded; give "
                              "base=<folder or hub id>")
        if hub_id(self.base) is None and not Path(self.base).exists():
            raise ExportError(f"base: the base model of {self.folder} was {self.base}, which does not exist (any more); "
                              "give base=<folder or hub id>")
        return self.base


def folder_kind(folder: Path) -> str:
    """Kind of a model folder by its files; raises ExportError for a folder that holds no model."""
    if (folder / "model_index.json").is_file():
        return "pipeline"
    if (folder / LORA_FILE).is_file():
        return "diffusers_lora"
    if (folder / "adapter_config.json").is_file():
        return "adapter"
    if (folder / "config.json").is_file():
        return "unet" if "_diffusers_version" in read_json(folder / "config.json") else "transformers"
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
    raise ExportError(f"model: {folder} is not a model folder: it has no config.json, model_index.json, adapter_config.json "
                      f"or {LORA_FILE} ({found or 'it is empty'})")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from disk; ExportError names the file when it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise ExportError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def locate(model: str, base: str | None = None) -> Source:
    """The model folder named by ``model`` (a model folder, or a run directory with a ``model/``) with its base.

    Raises ExportError for a folder without a model, and when the base on this machine is not the one trained on.
    """
    try:
        folder = Path(resolve_model_path(model, key="model"))
    except ConfigError as error:
        raise ExportError(str(error)) from None
    if (folder / "model").is_dir() and not (folder / "config.json").is_file():
        folder = folder / "model"
    kind = folder_kind(folder)
    try:
        provenance = read_provenance(folder) or {}
    except CheckpointError as error:
        raise ExportError(str(error)) from None
    run = next((p for p in (folder.parent, folder.parent.parent) if (p / "manifest.json").is_file()), None)
    source = Source(folder, kind, provenance, run)
    names = [provenance.get("base_path"), provenance.get("base_model")]
    if kind == "adapter":
        names.append(read_json(folder / "adapter_config.json").get("base_model_name_or_path"))
    source.base_id = next((hub_id(name) for name in names if hub_id(name)), None) or hub_id(base)
    source.base = _resolve_base(base, names)
    _check_base(source, explicit=base is not None)
    return source


def _resolve_base(given: str | None, names: list[str | None]) -> str | None:
    if given is not None:
        try:
            return resolve_model_path(given, key="base")
        except ConfigError as error:
            raise ExportError(str(error)) from None
    known = [name for name in names if name]
    for name in known:
        if name.startswith("asset:"):
            return resolve_model_path(name, key="base")
        if Path(name).is_dir():
            return str(Path(name).resolve())
    return next((name for name in known if hub_id(name)), known[0] if known else None)


def _check_base(source: Source, *, explicit: bool) -> None:
    expected, folder = source.provenance.get("base_weights"), source.base_folder
    if not expected or folder is None:
        return
    found = hash_weights(folder)
    if found == expected:
        return
    text = (f"the weights in {folder} (sha256 {str(found)[:12]}) are not those that {source.folder} was trained on "
            f"({expected[:12]})")
    if not explicit:
        raise ExportError(f"base: {text}; restore them, or give base=<folder> to use other weights on purpose")
    source.warnings.append(f"{text}; base= was given, so they are used all the same")


def safetensors_headers(folder: Path) -> dict[str, dict[str, Any]]:
    """File name -> safetensors header (tensor name -> dtype, shape) of every weight file directly in ``folder``."""
    return {path.name: _header(path) for path in sorted(folder.glob("*.safetensors"))}


def tensor_entries(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """``(tensor name, {dtype, shape, ...})`` of every safetensors file directly in ``folder``."""
    for header in safetensors_headers(folder).values():
        for name, entry in header.items():
            if name != "__metadata__":
                yield name, entry


def _header(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > 100_000_000:
                raise ValueError(f"header of {length} bytes")
            header: dict[str, Any] = json.loads(file.read(length))
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        if path.stat().st_size < 8 + length + end:
            raise ValueError("it is cut short")
    except (OSError, ValueError, struct.error) as error:
        raise ExportError(f"{path} is not a whole safetensors file ({error})") from None
    return header


def stored_dtype(folder: Path) -> str | None:
    """Name of the precision most weights of ``folder`` are stored in ("float32", ...); None without weights."""
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
    sizes: dict[str, int] = {}
    for _, entry in tensor_entries(folder):
        if entry["dtype"] in names:
            begin, end = entry["data_offsets"]
            sizes[names[entry["dtype"]]] = sizes.get(names[entry["dtype"]], 0) + end - begin
    return max(sizes, key=lambda name: sizes[name]) if sizes else None
