"""Where a model folder comes from: ``mmalign.json``, written beside the weights of every trained model.

A diffusers LoRA file does not name its base model, and an adapter's base may have moved: this file does, with a hash
that tells whether a base is the one trained on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmalign.errors import CheckpointError

PROVENANCE_FILE = "mmalign.json"
_PACKAGES = ("mmalign", "torch", "transformers", "diffusers", "peft", "safetensors")
_WEIGHTS = (".safetensors", ".gguf", ".bin")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")


def write_provenance(
    folder: Path, *, base_model: str | None, base_path: str | Path | None = None, base_hash: str | None = None,
    modality: str, method: str | None = None, **details: Any,
) -> Path:
    """Write ``<folder>/mmalign.json``; returns its path.

    Args:
        folder: the model folder.
        base_model: what the base is known by: a hub id, ``asset:NAME`` or a path; None for a model trained from nothing.
        base_path: local folder of the base, when it has one.
        base_hash: hash of the base's weights as the policy computed it (``Policy.identity``).
        modality: "text", "diffusion", ...
        method: registered name of the method.
        details: further JSON values (rewards, reference hash, ...).

    The hash of the base's weight files is added as ``base_weights`` when ``base_path`` is a folder; applying an adapter
    to another base is refused by comparing it.
    """
    record = {
        "base_model": base_model, "base_path": str(base_path) if base_path is not None else None,
        "base_hash": base_hash, "base_weights": hash_weights(base_path) if base_path is not None else None,
        "modality": modality, "method": method, "versions": package_versions(), **details,
    }
    path = Path(folder) / PROVENANCE_FILE
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def read_provenance(folder: str | Path) -> dict[str, Any] | None:
    """What :func:`write_provenance` wrote, or None for a folder without it; CheckpointError for a damaged file."""
    path = Path(folder) / PROVENANCE_FILE
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete it, and name the base model explicitly") from None
    if not isinstance(record, Mapping):
        raise CheckpointError(f"{path} must hold an object, not {type(record).__name__}")
    return dict(record)


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that a model folder depends on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hash_weights(folder: str | Path) -> str | None:
    """sha256 of every weight file under ``folder`` (relative names and contents); None when there is none."""
    root = Path(folder)
    files = sorted(p for p in root.rglob("*") if p.suffix in _WEIGHTS and p.is_file()) if root.is_dir() else []
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(root).as_posix().encode() + b"\0")
        with file.open("rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def hub_id(name: str | None) -> str | None:
    """``name`` when it has the form of a Hugging Face hub id and is no local folder; None otherwise."""
    if not name or name.startswith(("asset:", ".", "/", "~")) or not _HUB_ID.fullmatch(name) or Path(name).exists():
        return None
    return name
