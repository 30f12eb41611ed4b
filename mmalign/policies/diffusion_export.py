"""Loading and saving diffusers pipelines and their LoRA folders."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mmalign.errors import CheckpointError, ConfigError, ExportError
from mmalign.policies.modules import adapter_layers
from mmalign.policies.pretrained import DTYPES

logger = logging.getLogger(__name__)

LORA_FILE = "pytorch_lora_weights.safetensors"
ADAPTER_NAME = "default"
"""Name of the adapter that is trained, loaded and saved."""


def load_pipeline(
    path: str | Path, *, dtype: str = "float32", revision: str | None = None, variant: str | None = None,
    components: Mapping[str, Any] | None = None,
) -> Any:
    """Load a diffusers pipeline from a folder or hub id: safetensors only, no code from the repository.

    ``components`` replaces or leaves out parts (``{"text_encoder_3": None}`` loads SD3 without T5).

    Raises:
        CheckpointError: no pipeline there, damaged or incomplete files, or pickled weights only.
        ConfigError: an unknown ``dtype``.
    """
    from diffusers import DiffusionPipeline

    if dtype not in DTYPES:
        raise ConfigError(f"model.dtype: {dtype!r} is not a precision; allowed: {', '.join(DTYPES)}")
    local = Path(path).is_dir()
    if local and not (Path(path) / "model_index.json").is_file():
        raise CheckpointError(f"model.path: {path} has no model_index.json, so it is not a diffusers pipeline folder")
    try:
        return DiffusionPipeline.from_pretrained(
            str(path), torch_dtype=DTYPES[dtype], use_safetensors=True, revision=revision, variant=variant,
            local_files_only=local or os.environ.get("HF_HUB_OFFLINE", "") in ("1", "ON", "YES", "TRUE"),
            trust_remote_code=False, **(components or {}),
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:400]
        raise CheckpointError(f"model.path: {path} cannot be loaded as a diffusers pipeline with safetensors weights "
                              f"({type(error).__name__}: {reason})") from error


def load_lora(pipe: Any, folder: str | Path, *, merge: bool = False) -> None:
    """Put the LoRA of ``folder`` (or a .safetensors file) on ``pipe`` at the strength it was trained with.

    ``merge`` adds it to the weights and removes the adapter, so that further training and references start from the
    merged model. A file that records neither adapter metadata nor alphas is loaded with alpha = rank, and says so.
    """
    path = Path(folder)
    if path.exists():
        file = path if path.is_file() else path / LORA_FILE
        if not file.is_file():
            raise CheckpointError(f"model.adapter: {folder} holds no {LORA_FILE}; give a diffusers LoRA folder or file")
        _check_strength(file)
        source, options = str(file.parent), {"weight_name": file.name, "local_files_only": True}
    else:
        source, options = str(folder), {"use_safetensors": True}
    if not hasattr(pipe, "load_lora_weights"):
        raise CheckpointError(f"model.adapter: {type(pipe).__name__} cannot load LoRA weights")
    try:
        pipe.load_lora_weights(source, adapter_name=ADAPTER_NAME, **options)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:400]
        raise CheckpointError(f"model.adapter: {folder} does not fit this pipeline ({type(error).__name__}: {reason})") from error
    if merge:
        pipe.fuse_lora(adapter_names=[ADAPTER_NAME])
        pipe.unload_lora_weights()


def _check_strength(file: Path) -> None:
    try:
        with safe_open(file, framework="pt") as reader:
            names, metadata = list(reader.keys()), reader.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"model.adapter: {file} cannot be read ({error})") from None
    if "lora_adapter_metadata" not in metadata and not any(name.endswith(".alpha") for name in names):
        logger.warning("%s records neither adapter metadata nor alphas: it is loaded with alpha = rank, which is the wrong "
                       "strength if it was trained with another alpha", file)


def save_pipeline(pipe: Any, folder: Path) -> None:
    """Write the whole pipeline so that ``DiffusionPipeline.from_pretrained(folder)`` gives it back.

    Components that were left out (SD3 without T5) are recorded as absent; diffusers would otherwise ask for them.
    """
    pipe.save_pretrained(folder, safe_serialization=True)
    index = folder / "model_index.json"
    entries = json.loads(index.read_text(encoding="utf-8"))
    absent = {name: [None, None] for name, part in pipe.components.items() if part is None and name not in entries}
    if absent:
        partial = index.with_name(f".{index.name}.partial")
        partial.write_text(json.dumps(entries | absent, indent=2) + "\n", encoding="utf-8")
        partial.replace(index)


def save_lora(pipe: Any, folder: Path, *, names: tuple[str, ...]) -> None:
    """Write the LoRA adapters of the named components as one diffusers LoRA file with their configurations.

    Without the configuration in the header a file whose alpha differs from its rank loads at the wrong strength.
    """
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import PeftType, get_peft_model_state_dict

    arguments: dict[str, Any] = {}
    for name in names:
        component = getattr(pipe, name, None)
        config = getattr(component, "peft_config", {}).get(ADAPTER_NAME) if component is not None else None
        if config is None:
            continue
        if config.peft_type != PeftType.LORA:
            raise ExportError(f"diffusers has no file format for {config.peft_type.value} adapters; set tuning.merge: true to "
                              "export the merged pipeline")
        state = get_peft_model_state_dict(component, adapter_name=ADAPTER_NAME)
        arguments[f"{name}_lora_layers"] = convert_state_dict_to_diffusers(state)
        arguments[f"{name}_lora_adapter_metadata"] = config.to_dict()
    pipe.save_lora_weights(folder, safe_serialization=True, **arguments)


def is_lora_adapted(network: torch.nn.Module) -> bool:
    """Whether ``network`` carries adapters that are saved apart from it."""
    return bool(adapter_layers(network))
