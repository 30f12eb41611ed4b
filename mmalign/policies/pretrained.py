"""Loading a causal language model with its tokenizer: plain, GGUF and PEFT adapter folders.

Nothing is silent: the precision is the caller's, weights that the folder lacks are refused (transformers would
initialise them at random), and every failure names the folder.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mmalign.errors import CheckpointError, ConfigError, MmalignError

logger = logging.getLogger(__name__)

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64,
}
"""Precisions by the names used in configurations."""


def default_device() -> torch.device:
    """This process's GPU when there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def load_causal_lm(
    path: str | Path, *, dtype: str = "float32", device: str | torch.device | None = None, revision: str | None = None,
    trust_remote_code: bool = False, attention: str = "sdpa", gguf_file: str | None = None,
    adapter: str | Path | None = None, adapter_trainable: bool = True,
) -> tuple[Any, Any]:
    """Load ``(module, tokenizer)``.

    ``path`` is a transformers folder, a folder with one ``.gguf`` file, a PEFT adapter folder (its base is loaded
    first), or a hub id that is in the local cache or reachable. ``adapter`` is put on top. The module is in training
    mode with every parameter of the base trainable, or, with an adapter, only the adapter (if ``adapter_trainable``).

    Raises:
        CheckpointError: the folder is missing, damaged, incomplete, or holds something else.
        ConfigError: an unknown ``dtype``.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"model.dtype: {dtype!r} is not a precision; allowed: {', '.join(DTYPES)}")
    path = str(path)
    tokenizer_path = path
    if (Path(path) / "adapter_config.json").is_file():
        if adapter is not None:
            raise ConfigError(f"model.adapter: {path} is an adapter folder itself; give its base as model.path to stack "
                              f"{adapter} on it")
        path, adapter = _base_path(Path(path)), path
    if gguf_file is None:
        gguf_file = _only_gguf(Path(path))
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    with _naming(path):
        model = _load_model(path, DTYPES[dtype], attention, {**options, "gguf_file": gguf_file})
    if adapter is not None:
        model = _load_adapter(model, str(adapter), adapter_trainable)
        if (Path(adapter) / "tokenizer_config.json").is_file():
            tokenizer_path = str(adapter)
    with_tokenizer = (Path(tokenizer_path) / "tokenizer_config.json").is_file()
    source = tokenizer_path if with_tokenizer or tokenizer_path == path else path
    with _naming(source):
        tokenizer = _load_tokenizer(source, {**options, "gguf_file": gguf_file if source == path else None})
    model.to(default_device() if device is None else torch.device(device))
    return model.train(), tokenizer


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Turn whatever a reader raises about the files of ``path`` into a CheckpointError that names it."""
    try:
        yield
    except (MmalignError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # readers raise all sorts; tokenizers a bare Exception
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        folder = Path(path)
        if not folder.exists():
            hint = "there is no such folder, and it is not a model in the local hub cache"
        else:
            hint = "the files are damaged or incomplete"
        raise CheckpointError(f"model.path: cannot load {path}: {hint} ({type(error).__name__}: {reason})") from error


def _base_path(folder: Path) -> str:
    from mmalign.policies.loading import base_of_adapter, resolve_model_path

    return resolve_model_path(base_of_adapter(folder))


def _only_gguf(folder: Path) -> str | None:
    """The name of the folder's single ``.gguf`` file when it is no transformers folder."""
    if not folder.is_dir() or (folder / "config.json").is_file():
        return None
    files = sorted(file.name for file in folder.glob("*.gguf"))
    if len(files) > 1:
        raise CheckpointError(f"model.path: {folder} holds {len(files)} .gguf files ({', '.join(files)}); "
                              "choose one with model.gguf_file")
    return files[0] if files else None


def _load_model(path: str, dtype: torch.dtype, attention: str, options: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    options = {name: value for name, value in options.items() if value is not None}
    if "gguf_file" in options:
        options |= _unpacked()
    model, info = load(path, dtype=dtype, attn_implementation=attention, output_loading_info=True, **options)
    missing = sorted(info["missing_keys"])
    mismatched = [str(entry[0] if isinstance(entry, tuple) else entry) for entry in info["mismatched_keys"]]
    if missing or mismatched:
        shown = ", ".join([*missing, *mismatched][:4])
        raise CheckpointError(f"model.path: {path} lacks {len(missing)} weights and has {len(mismatched)} of another shape "
                              f"than its config says ({shown}); the folder is incomplete or belongs to another model")
    if "gguf_file" in options and getattr(model, "hf_quantizer", None) is not None:
        # The weights are plain tensors now; the mark would forbid training and saving.
        model.hf_quantizer.remove_quantization_config(model)
    if attention == "sdpa" and getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        logger.warning("%s caps its attention logits, which sdpa cannot do; using attention: eager", path)
        model.set_attn_implementation("eager")
    return model


def _unpacked() -> dict[str, Any]:
    """Ask for plain weights: newer transformers may otherwise keep the blocks of the file, which cannot be trained."""
    try:
        from transformers.utils.quantization_config import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _load_adapter(model: Any, adapter: str, trainable: bool) -> Any:
    from peft import PeftModel

    if Path(adapter).exists() and not (Path(adapter) / "adapter_config.json").is_file():
        raise CheckpointError(f"model.adapter: {adapter} has no adapter_config.json, so it is no PEFT adapter folder")
    try:
        with _naming(adapter):
            return PeftModel.from_pretrained(model, adapter, is_trainable=trainable)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace("model.path", "model.adapter", 1)) from error.__cause__


def _load_tokenizer(path: str, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, **{name: value for name, value in options.items() if value is not None})
