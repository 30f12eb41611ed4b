"""From a configuration node to a policy: which adapter serves a folder or hub id."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, Literal

from mmalign.config import Options
from mmalign.data.assets import asset_path
from mmalign.data.chat import TextEncoding
from mmalign.errors import CheckpointError, ConfigError
from mmalign.policies.base import Policy
from mmalign.policies.provenance import read_provenance

Dtype = Literal["float32", "bfloat16", "float16"]


class ModelOptions(Options):
    """Which model, and in what precision."""

    path: str
    """``asset:NAME``, a folder (transformers, diffusers, PEFT adapter, a run's ``model/``, or one with a .gguf), or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Dtype = "float32"
    """Precision of the loaded weights. Adapters are always trained in float32."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; null takes the accelerator's."""
    adapter: str | None = None
    """Adapter folder put on top of ``path`` (PEFT for text, diffusers LoRA for images)."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model; off unless you read it."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers models."""
    gguf_file: str | None = None
    """File inside ``path`` when the weights are a GGUF."""
    layout: Literal["auto", "padded", "packed", "shared_prefix"] = "auto"
    """How text rows are laid out for a forward pass; auto takes the cheapest that is exact for the model."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward: less memory, about a third more time."""


def resolve_model_path(path: str, *, key: str = "model.path") -> str:
    """``asset:NAME`` to its folder, an existing local folder to its absolute path, anything else unchanged."""
    if path.startswith("asset:"):
        return str(asset_path(path.removeprefix("asset:")))
    local = Path(path).expanduser()
    if local.exists():
        return str(local.resolve())
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ConfigError(f"{key}: folder {path!r} does not exist")
    return path


def model_kind(path: str) -> str:
    """"text", "text_adapter", "diffusion" or "diffusion_adapter", read off the folder's files."""
    folder = Path(path)
    if not folder.is_dir():
        return _hub_kind(path)
    if (folder / "model_index.json").is_file():
        return "diffusion"
    if (folder / "pytorch_lora_weights.safetensors").is_file():
        return "diffusion_adapter"
    if (folder / "adapter_config.json").is_file():
        return "text_adapter"
    if (folder / "config.json").is_file() or any(folder.glob("*.gguf")):
        return "text"
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    raise CheckpointError(f"model.path: {path} is not a model folder: it has no config.json, model_index.json or "
                          f"adapter_config.json (it holds {found})")


def _hub_kind(path: str) -> str:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    for name, kind in (("model_index.json", "diffusion"), ("adapter_config.json", "text_adapter"),
                       ("pytorch_lora_weights.safetensors", "diffusion_adapter"), ("config.json", "text")):
        try:
            hf_hub_download(path, name)
            return kind
        except LocalEntryNotFoundError:
            continue
        except EntryNotFoundError:
            continue
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise ConfigError(f"model.path: {path!r} is neither a local folder nor reachable on the hub "
                              f"({type(error).__name__})") from None
    offline = " (offline mode is on)" if constants.HF_HUB_OFFLINE else ""
    raise ConfigError(f"model.path: {path!r} is neither a local folder, an asset (asset:NAME) nor a hub model that can be "
                      f"reached{offline}")


def load_policy(options: ModelOptions, *, encoding: TextEncoding | None = None, **settings: Any) -> Policy:
    """Load the policy that ``options.path`` holds; ``settings`` go to the adapter (for example ``caption_dropout``)."""
    path = resolve_model_path(options.path)
    adapter = resolve_model_path(options.adapter, key="model.adapter") if options.adapter else None
    kind = model_kind(path)
    if kind == "diffusion_adapter":
        path, adapter = base_of_adapter(Path(path)), path
        kind = "diffusion"
    _silence_bars("transformers", *(["diffusers"] if kind == "diffusion" else []))
    if kind == "diffusion":
        from mmalign.policies.diffusion import DiffusionPolicy

        policy: Policy = DiffusionPolicy.from_pretrained(
            path, dtype=options.dtype, device=options.device, revision=options.revision, adapter=adapter, **settings)
    else:
        from mmalign.policies.causal_lm import CausalLMPolicy

        policy = CausalLMPolicy.from_pretrained(
            path, dtype=options.dtype, device=options.device, revision=options.revision, adapter=adapter,
            trust_remote_code=options.trust_remote_code, attention=options.attention, gguf_file=options.gguf_file,
            layout=options.layout, encoding=encoding, **settings,
        )
    if options.gradient_checkpointing:
        policy.gradient_checkpointing(True)  # type: ignore[attr-defined]
    return policy


def _silence_bars(*libraries: str) -> None:
    """Turn off the loading bars of transformers or diffusers: they scroll away what a run has to say."""
    for name in libraries:
        importlib.import_module(f"{name}.utils.logging").disable_progress_bar()


def base_of_adapter(folder: Path) -> str:
    """The base model an adapter folder was trained on: its recorded local path when that exists, else its hub id."""
    provenance = read_provenance(folder) or {}
    for key in ("base_path", "base_model"):
        value = provenance.get(key)
        if value and (key == "base_model" or Path(value).exists()):
            return str(value)
    config = folder / "adapter_config.json"
    if config.is_file():
        return str(json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"])
    raise CheckpointError(f"model.path: {folder} holds an adapter but not the name of its base model; give the base as "
                          "model.path and this folder as model.adapter")
