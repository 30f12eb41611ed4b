"""Loading and saving diffusers pipelines and their LoRA folders."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from mmalign.errors import CheckpointError, ConfigError, ExportError
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
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if dtype not in DTYPES:
        raise ConfigError(f"model.dtype: {dtype!r} is not a precision; allowed: {', '.join(DTYPES)}")
    local = Path(path).is_dir()
    if local and not (Path(path) / "model_index.json").is_file():
        raise CheckpointError(f"model.path: {path} has no model_index.json, so it is not a diffusers pipeline folder")
    given = {**(_left_out(Path(path)) if local else {}), **(components or {})}
    try:
        with warnings.catch_warnings():
            # Renamed to ``dtype`` in 0.40, which older versions ignore without a word.
            warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
            pipe = DiffusionPipeline.from_pretrained(
                str(path), torch_dtype=DTYPES[dtype], use_safetensors=True, revision=revision, variant=variant,
                local_files_only=local or HF_HUB_OFFLINE, trust_remote_code=False, **given,
            )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:400]
        raise CheckpointError(f"model.path: {path} cannot be loaded as a diffusers pipeline with safetensors weights "
                              f"({type(error).__name__}: {reason})") from error
    _check_complete(pipe, Path(path) if local else None)
    return pipe


def _left_out(folder: Path) -> dict[str, None]:
    """Components that were None when the folder was saved: diffusers asks for some of them (SD3's T5) to be given again."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"model.path: {folder}/model_index.json is damaged ({error})") from None
    return {name: None for name, entry in index.items() if entry == [None, None]}


def _check_complete(pipe: Any, folder: Path | None) -> None:
    """Refuse missing weights: diffusers leaves such tensors without data, transformers fills them at random.

    The files of diffusers models are not compared by name: old ones are renamed while they load.
    """
    from transformers import PreTrainedModel

    for name, part in pipe.components.items():
        if not isinstance(part, nn.Module):
            continue
        tensors = part.state_dict(keep_vars=True)
        missing = [key for key, tensor in tensors.items() if tensor.is_meta]
        files = sorted((folder / name).glob("*.safetensors")) if folder is not None else []
        if files and isinstance(part, PreTrainedModel):
            stored: set[str] = set()
            for file in files:
                with safe_open(file, framework="pt") as reader:
                    stored.update(reader.keys())
            held = {tensors[key].data_ptr() for key in tensors if _is_stored(key, stored)}
            missing = [key for key, tensor in tensors.items() if tensor.numel() and tensor.data_ptr() not in held]
        if missing:
            raise CheckpointError(f"model.path: {name} lacks {len(missing)} weights ({', '.join(missing[:3])}); the folder is "
                                  "incomplete or belongs to another model")


def _is_stored(key: str, stored: set[str]) -> bool:
    """Whether a file holds ``key``, under it or with a prefix more or less (transformers adds and strips them)."""
    parts = key.split(".")
    return key in stored or any(".".join(parts[i:]) in stored for i in range(1, len(parts) - 1)) or any(
        name.endswith(f".{key}") for name in stored)


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

    Only an SD3 pipeline without T5 needs ``text_encoder_3=None, tokenizer_3=None`` there, as diffusers does for its own.
    """
    pipe.save_pretrained(folder, safe_serialization=True)


def save_lora(pipe: Any, folder: Path, *, names: tuple[str, ...]) -> None:
    """Write the LoRA adapters of the named components as one diffusers LoRA file with their configurations.

    Without the configuration in the header a file whose alpha differs from its rank loads at the wrong strength.
    """
    from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
    from peft import PeftType, get_peft_model_state_dict

    arguments: dict[str, Any] = {}
    for name in names:
        component: Any = getattr(pipe, name, None)
        configs = getattr(component, "peft_config", None) or {}
        if not configs:
            continue
        if len(configs) > 1 and ADAPTER_NAME not in configs:
            raise ExportError(f"{name} carries the adapters {', '.join(sorted(configs))}; a LoRA file holds one: call it "
                              f"{ADAPTER_NAME!r}")
        adapter = ADAPTER_NAME if ADAPTER_NAME in configs else next(iter(configs))
        config = configs[adapter]
        if config.peft_type != PeftType.LORA or config.modules_to_save:
            kind = "modules_to_save" if config.modules_to_save else f"{config.peft_type.value} adapters"
            raise ExportError(f"diffusers has no file format for {kind}; merge the adapter into the weights and export the "
                              "pipeline")
        state = get_peft_model_state_dict(component, adapter_name=adapter)
        arguments[f"{name}_lora_layers"] = convert_state_dict_to_diffusers(state)
        arguments[f"{name}_lora_adapter_metadata"] = config.to_dict()
    if not arguments:
        raise ExportError(f"no adapter with a configuration (peft_config) in {', '.join(names)}; inject it with peft")
    pipe.save_lora_weights(folder, safe_serialization=True, **arguments)
