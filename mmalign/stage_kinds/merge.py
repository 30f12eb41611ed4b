"""The merge stage: several models of one architecture become one, tensor by tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from mmalign.config import Component, Options, bind
from mmalign.errors import CheckpointError, ConfigError
from mmalign.policies.loading import resolve_model_path
from mmalign.policies.provenance import PROVENANCE_FILE, hash_weights, read_provenance, write_provenance
from mmalign.stages import StageContext, StageResult, stage
from mmalign.training.checkpoint import atomic_folder
from mmalign.training.tracking import ProgressBar
from mmalign.weights.io import ShardReader, ShardWriter, check_readers, parse_size
from mmalign.weights.merge import MERGES, TensorMerge, merge_stream

_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".partial")
_NOT_COPIED = (PROVENANCE_FILE, "README.md", "reproducibility.json", "training_args.bin", "trainer_state.json")
_SAME = ("model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "tie_word_embeddings")
"""Configuration entries that must agree: they change what weights of the same shape mean."""


class MergeOptions(Component):
    """A registered merge function with its options: ``{name: slerp, t: 0.5}``."""


class MergeStageOptions(Options):
    """Options of the merge stage."""

    models: list[str]
    """Model folders, ``asset:NAME`` or hub ids, all of one architecture. The first is the base: tokenizer, configuration and
    precision are its own. Adapter folders are merged into their base model first."""
    merge: MergeOptions = MergeOptions(name="slerp")
    """Merge function with its options: linear (weights, t, normalize), slerp (t, norm, threshold)."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of the written weights; null keeps the base's."""
    precision: Literal["float32", "float64"] = "float32"
    """Precision of the arithmetic; norms and dot products are summed in float64 in any case."""
    max_shard_size: str = "5GB"
    """Largest weight file."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse what can be refused before any model is read."""
        try:
            parse_size(self.max_shard_size)
            MERGES.get(self.merge.name).check_models(len(self.models))
            merge_of(self.merge)
        except ConfigError:
            raise
        except ValueError as error:
            raise ValueError(f"merge: {error}") from None


def merge_of(options: Component, *, key: str = "merge") -> TensorMerge:
    """The merge function of a configuration node; raises ConfigError naming the key for unknown options or values."""
    function = MERGES.get(options.name)
    arguments = bind(options, function.build, key=key)
    try:
        return function.build(**arguments)
    except ValueError as error:
        raise ConfigError(f"{key}.{error}") from None


@stage("merge", options=MergeStageOptions, outputs=("model", "folder"))
def merge(options: MergeStageOptions, context: StageContext) -> StageResult:
    """Merge the weights of several models of one architecture, reading and writing one tensor at a time."""
    folders = [model_folder(name, context.folder / "adapters" / str(index), key=f"models[{index}]")
               for index, name in enumerate(options.models)]
    check_configurations(folders)
    for folder, name in zip(folders[1:], options.models[1:], strict=True):
        if _differ(folders[0], folder, "tokenizer.json"):
            context.say(f"{name} has another tokenizer than {options.models[0]}, whose tokenizer is kept; where the meaning of "
                        "a token id differs, its embedding is a mixture of two words")
    function = merge_of(options.merge)
    readers = [ShardReader(folder) for folder in folders]
    target = context.folder / "model"
    try:
        check_readers(readers)
        with atomic_folder(target) as folder:
            _write(readers, function, folder, options, context)
            copy_companions(folders[0], folder, dtype=options.dtype)
            write_provenance(
                folder, base_model=options.models[0], base_path=folders[0], modality="text",
                method=f"merge ({options.merge.name})", merge=options.merge.model_dump(),
                parents=_parents(options.models, folders), merge_report=function.metrics(),
            )
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise CheckpointError(f"models: {error}") from error
    finally:
        for reader in readers:
            reader.close()
    shutil.rmtree(context.folder / "adapters", ignore_errors=True)
    metrics = {f"merge/{name}": value for name, value in function.metrics().items()}
    _say_fallback(metrics, context)
    return StageResult({"model": str(target), "folder": str(context.folder)}, metrics, {"parents": options.models})


def _write(
    readers: Sequence[ShardReader], function: TensorMerge, folder: Path, options: MergeStageOptions, context: StageContext,
) -> None:
    written = None if options.dtype is None else getattr(torch, options.dtype)
    merged = merge_stream(readers, function, precision=getattr(torch, options.precision), dtype=written)
    stem = "model" if (readers[0].folder / "config.json").is_file() and not _is_diffusers(readers[0].folder) \
        else "diffusion_pytorch_model"
    with ShardWriter(folder, max_shard_size=options.max_shard_size, stem=stem) as writer, \
            ProgressBar(context.name, len(readers[0]), quiet=context.quiet) as bar:
        for number, (name, tensor) in enumerate(merged, start=1):
            writer.add(name, tensor)
            bar.update(number, {})


def _is_diffusers(folder: Path) -> bool:
    return "_diffusers_version" in _read(folder / "config.json")


def model_folder(name: str, scratch: Path, *, key: str) -> Path:
    """The local folder of a model; an adapter is merged into its base under ``scratch`` (one model in memory)."""
    path = resolve_model_path(name, key=key)
    folder = Path(path) if Path(path).is_dir() else _download(path, key)
    if (folder / "model").is_dir() and not (folder / "config.json").is_file():
        folder = folder / "model"  # a run directory
    if (folder / "model_index.json").is_file() or (folder / "pytorch_lora_weights.safetensors").is_file():
        raise ConfigError(f"{key}: {name} is a diffusers pipeline or LoRA; merge one network of it, such as {name}/unet")
    if (folder / "adapter_config.json").is_file():
        if not (scratch / "config.json").is_file():
            _merge_adapter(folder, scratch)
        return scratch
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{key}: {name} is not a model folder: it has no config.json")
    return folder


def _download(name: str, key: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ConfigError(f"{key}: {name!r} is neither a local folder nor a model the hub gives "
                          f"({type(error).__name__})") from None


def _merge_adapter(adapter: Path, target: Path) -> None:
    from mmalign.policies.pretrained import load_causal_lm

    module, tokenizer = load_causal_lm(adapter, device="cpu")
    with atomic_folder(target) as folder:
        module.merge_and_unload(safe_merge=True).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def check_configurations(folders: Sequence[Path]) -> None:
    """Raise CheckpointError when configurations disagree in what gives weights of one shape their meaning."""
    first = _read(folders[0] / "config.json")
    for folder in folders[1:]:
        other = _read(folder / "config.json")
        for entry in _SAME:
            if entry in first and entry in other and first[entry] != other[entry]:
                raise CheckpointError(f"models: {entry} is {first[entry]!r} in {folders[0]} and {other[entry]!r} in {folder}; "
                                      "only models of one architecture can be merged")


def copy_companions(source: Path, target: Path, *, dtype: str | None) -> None:
    """Tokenizer, configuration, generation configuration and chat templates of ``source``: everything but the weights."""
    for item in sorted(source.iterdir()):
        if item.is_file() and not (item.name.endswith((*_WEIGHTS, ".index.json")) or item.name in _NOT_COPIED
                                   or item.name.startswith(".")):
            shutil.copyfile(item, target / item.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, target / templates.name)
    if dtype is not None:
        config = _read(target / "config.json")
        config.pop("torch_dtype", None)
        (target / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2) + "\n", encoding="utf-8")


def _parents(names: Sequence[str], folders: Sequence[Path]) -> list[dict[str, Any]]:
    return [{"model": name, "weights": hash_weights(folder), "method": (read_provenance(folder) or {}).get("method")}
            for name, folder in zip(names, folders, strict=True)]


def _say_fallback(metrics: dict[str, float], context: StageContext) -> None:
    share = metrics.get("merge/fallback_share")
    if share is None:
        return
    context.say(f"slerp: {share:.1%} of the tensors ({metrics['merge/fallback_share_entries']:.1%} of the entries) were so "
                f"nearly parallel that they were interpolated linearly; smallest cosine {metrics['merge/smallest_cosine']:.6f}")
    if share == 1:
        context.say("every tensor was: this merge is a weighted average of the two models")


def _differ(first: Path, second: Path, name: str) -> bool:
    a, b = first / name, second / name
    return a.is_file() and b.is_file() and a.read_bytes() != b.read_bytes()


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"models: {path} cannot be read ({error})") from None
    return value if isinstance(value, dict) else {}
