"""Writing transformers folders, PEFT adapters, and adapters merged into their base."""

from __future__ import annotations

import copy
import gc
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mmalign.data.turns import end_of_turn_text, render_chat
from mmalign.errors import ExportError
from mmalign.hub.gap import Gap, compare
from mmalign.hub.precision import cast_weights
from mmalign.hub.source import Source, read_json, stored_dtype, tensor_entries
from mmalign.policies.pretrained import DTYPES

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model", "chat_template.jinja",
    "chat_template.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
)
"""Copied byte for byte, because converters (GGUF) recognise a tokenizer by its files."""

_GENERATION_TAG = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")


def load_model(folder: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a transformers folder (or hub id) as the class its configuration names, in evaluation mode.

    Raises ExportError when it cannot be loaded, when weights are missing, or when its class is not in transformers.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        names = config.architectures or []
        cls = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
        if cls is None:
            raise ExportError(f"{folder}: architecture {names or 'unknown'} is not in transformers {transformers.__version__}; "
                              "models with their own code are exported by copying their folder")
        model, info = cls.from_pretrained(folder, config=config, dtype=dtype, output_loading_info=True)
    except ExportError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ExportError(f"{folder} cannot be loaded by transformers ({type(error).__name__}: {reason})") from error
    if info["missing_keys"]:
        raise ExportError(f"{folder} lacks weights that its config asks for: {', '.join(sorted(info['missing_keys'])[:4])}")
    return model.eval()


def probe_ids(model: nn.Module) -> Tensor:
    """``[2, 16]`` token ids, always the same for a vocabulary, without the tokens that stand for images or padding."""
    config: Any = model.config
    size = config.get_text_config().vocab_size
    reserved = {
        value for part in (config, config.get_text_config()) for name, value in part.to_dict().items()
        if name.endswith("_token_id") or name.endswith("_token_index") if isinstance(value, int)
    }
    allowed = torch.tensor([i for i in range(min(size, 4096)) if i not in reserved])
    return allowed[torch.randint(len(allowed), (2, 16), generator=torch.Generator().manual_seed(0))]


@torch.no_grad()
def probe_logits(model: Any) -> Tensor:
    """Float32 logits of :func:`probe_ids`: what two copies of one model must agree on."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    ids = probe_ids(base)
    arguments = {"decoder_input_ids": ids} if base.config.is_encoder_decoder else {}
    device = next(model.parameters()).device
    output = model(input_ids=ids.to(device), **{k: v.to(device) for k, v in arguments.items()})
    logits = getattr(output, "logits", None)
    return (output[0] if logits is None else logits).float().cpu()


def write_transformers(source: Source, target: Path, *, dtype: str | None, max_shard_size: str, tolerance: float | None) -> Gap:
    """Re-write a transformers folder: shards, configuration, generation configuration, tokenizer.

    The written folder is loaded again and its logits compared with the source's.
    """
    config = read_json(source.folder / "config.json")
    if "quantization_config" in config:
        raise ExportError(f"{source.folder} is quantised ({config['quantization_config'].get('quant_method')}); it is already in "
                          "its final form, so copy the folder as it is")
    model = load_model(source.folder)
    expected = probe_logits(model)
    name = dtype or stored_dtype(source.folder) or "float32"
    save_model(model, target, name, max_shard_size, [source.folder])
    del model
    return check_reload(expected, target, name, tolerance)


def save_model(model: Any, target: Path, dtype: str, max_shard_size: str, tokenizers: Sequence[Path]) -> None:
    """Write ``model`` in ``dtype`` with a valid generation configuration and the first tokenizer found."""
    settle_tied_embeddings(model)
    copy_tokenizer(tokenizers, target)
    tokenizer = load_tokenizer(target)
    if tokenizer is not None and getattr(model, "generation_config", None) is not None:
        model.generation_config = finished_generation_config(model.generation_config, tokenizer)
    cast_weights(model, DTYPES[dtype])
    model.config.dtype = DTYPES[dtype]
    model.save_pretrained(target, max_shard_size=max_shard_size)


def check_reload(expected: Tensor, target: Path, dtype: str, tolerance: float | None) -> Gap:
    """Load ``target`` in float32 and compare its logits with ``expected``; ExportError above the tolerance."""
    gc.collect()
    model = load_model(target)
    return compare({"logits": expected}, {"logits": probe_logits(model)}, dtype=dtype, tolerance=tolerance, what="logits")


def settle_tied_embeddings(model: Any) -> bool:
    """Make the configuration say whether input and output embeddings are one matrix; True when they had to be untied.

    A merge may have changed only one of them while the flag still says tied: loading would then silently replace the
    head by the embedding.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    text = model.config.get_text_config()
    if head is None or embedding is None or not getattr(text, "tie_word_embeddings", False):
        return False
    if head.weight.shape == embedding.weight.shape and torch.equal(head.weight, embedding.weight):
        head.weight = embedding.weight  # equal copies are stored once
        return False
    if head.weight is embedding.weight:  # NaN is unequal to itself
        raise ExportError("the embeddings hold NaN; the model cannot be exported")
    set_tied_flag(model, False)
    # transformers 5 keeps the resolved list of tied names, from which it decides what to leave out of the files.
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = {}
    return True


def tied_flag(folder: str | Path) -> bool:
    """Whether the configuration in ``folder`` says that input and output embeddings are one matrix."""
    from transformers import AutoConfig

    return bool(getattr(AutoConfig.from_pretrained(folder).get_text_config(), "tie_word_embeddings", False))


def set_tied_flag(model: Any, tied: bool) -> None:
    """Write the flag into the model's configuration and that of its text part."""
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = tied


def copy_tokenizer(folders: Sequence[Path], target: Path) -> None:
    """Copy the tokenizer (and processor) files of the first folder that has some; training marks leave the template."""
    folder = next((f for f in folders if (f / "tokenizer_config.json").is_file()), None)
    if folder is None:
        return
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    template = target / "chat_template.jinja"
    if template.is_file():
        template.write_text(inference_template(template.read_text(encoding="utf-8")), encoding="utf-8")
    extra = folder / "additional_chat_templates"
    if extra.is_dir():
        shutil.copytree(extra, target / extra.name)
    config = read_json(target / "tokenizer_config.json")
    if isinstance(config.get("chat_template"), str) and _GENERATION_TAG.search(config["chat_template"]):
        config["chat_template"] = inference_template(config["chat_template"])
        (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def inference_template(template: str) -> str:
    """``template`` without ``{% generation %}`` marks, which only training needs and few engines know.

    Each becomes a comment with the same white-space control, so the rendering stays the same to the character.
    """
    return _GENERATION_TAG.sub(lambda m: f"{{#{m[1]} {m[2]}#}}", template)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, or None when it holds none."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer_config.json").is_file():
        return None
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def stop_tokens(tokenizer: Any) -> list[int]:
    """Ids that end a completion: the tokenizer's end token and the token its chat template closes a turn with."""
    ids = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if getattr(tokenizer, "chat_template", None):
        text = end_of_turn_text(lambda messages, prompt: render_chat(messages, tokenizer, generation_prompt=prompt))
        closing = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        if closing and closing[0] in special:
            ids.append(int(closing[0]))
    return list(dict.fromkeys(ids))


def finished_generation_config(config: Any, tokenizer: Any) -> Any:
    """A copy of ``config`` that stops where the tokenizer's chat ends, has a pad token, and is valid.

    Sampling settings without ``do_sample`` are contradictory (transformers refuses to save them): sampling is turned
    on, which is what their author meant.
    """
    config = copy.deepcopy(config)
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    stops = list(dict.fromkeys([*(i for i in known if i is not None), *stop_tokens(tokenizer)]))
    if stops:
        config.eos_token_id = stops if len(stops) > 1 else stops[0]
    if config.pad_token_id is None:
        pad = tokenizer.pad_token_id
        config.pad_token_id = pad if pad is not None else (stops[0] if stops else None)
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True
        config.validate(strict=True)
    return config


def write_adapter(source: Source, target: Path, *, dtype: str | None, tolerance: float | None) -> Gap | None:
    """Re-write a PEFT adapter with a configuration that works elsewhere; None when its base is not on this machine.

    The base is named by its hub id when that is known, targets are spelled out, ``inference_mode`` is on. With the base
    at hand, both adapters are loaded and their logits compared.
    """
    from safetensors.torch import load_file, save_file

    weights = source.folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise ExportError(f"{source.folder} has no adapter_model.safetensors (pickled adapters are not read); save it again "
                          "with peft >= 0.7")
    config = read_json(source.folder / "adapter_config.json")
    tensors = load_file(weights)
    config["base_model_name_or_path"] = source.base_id or source.base or config.get("base_model_name_or_path")
    config["inference_mode"] = True
    if isinstance(config.get("target_modules"), str):
        config["target_modules"] = adapted_modules(tensors) or config["target_modules"]
    if dtype is not None:
        tensors = {name: t.to(DTYPES[dtype]) if t.is_floating_point() else t for name, t in tensors.items()}
    save_file(tensors, target / weights.name, metadata={"format": "pt"})
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    copy_tokenizer([source.folder], target)
    if is_scorer(source.folder) and (source.folder / "config.json").is_file():
        shutil.copyfile(source.folder / "config.json", target / "config.json")
    if source.base_folder is None:
        source.warnings.append("the base model is not on this machine, so the adapter was not tried on it")
        return None
    expected = probe_logits(load_with_adapter(source.base_folder, source.folder))
    gc.collect()
    found = probe_logits(load_with_adapter(source.base_folder, target))
    return compare({"logits": expected}, {"logits": found}, dtype=dtype or "float32", tolerance=tolerance, what="logits")


def adapted_modules(tensors: dict[str, Tensor]) -> list[str]:
    """Full names of the modules that adapter tensors belong to, for a configuration that gave a pattern."""
    matches = [re.match(r"(?:base_model\.model\.)?(.+?)\.(?:lora|ia3|vera|oft|boft|hada|lokr)_", name) for name in tensors]
    return sorted({match[1] for match in matches if match})


def is_scorer(adapter: Path) -> bool:
    """Whether an adapter belongs to a sequence classifier (a reward model), whose head it brings along."""
    return read_json(adapter / "adapter_config.json").get("task_type") == "SEQ_CLS"


def load_scorer(base: str | Path, adapter: Path) -> Any:
    """The base as a sequence classifier with the labels and padding token that the adapter's folder names.

    Its head is new (and replaced by the adapter's) when the base is a language model.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(adapter if (adapter / "config.json").is_file() else base)
    config.num_labels = config.num_labels if (adapter / "config.json").is_file() else 1
    return AutoModelForSequenceClassification.from_pretrained(base, config=config, dtype=torch.float32).eval()


def load_with_adapter(base: str | Path, adapter: Path) -> Any:
    """The base in float32 with the adapter on it; rows are added to its vocabulary when the adapter brings more."""
    from peft import PeftModel

    model = load_scorer(base, adapter) if is_scorer(adapter) else load_model(base)
    embedding = model.get_input_embeddings()
    rows = [entry["shape"][0] for name, entry in tensor_entries(adapter)
            if embedding is not None and name.endswith(("embed_tokens.weight", "lm_head.weight", "wte.weight"))]
    if rows and rows[0] != embedding.weight.shape[0]:
        model.resize_token_embeddings(rows[0])
    try:
        return PeftModel.from_pretrained(model, str(adapter)).eval()
    except (ValueError, KeyError, RuntimeError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ExportError(f"{adapter} does not fit the base {base} ({type(error).__name__}: {reason})") from error


def write_merged(
    source: Source, target: Path, *, dtype: str | None, max_shard_size: str, tolerance: float | None,
) -> Gap:
    """Merge an adapter into its base in float32, cast once, write a transformers folder, compare the logits.

    Merging in half precision rounds the sum of base and update where training rounded neither; here only the result is
    rounded. A tied head that the adapter changed apart from the embedding is untied, in weights and configuration.
    Raises ExportError for adapters that have no merged form, and when the logits of the reloaded folder differ from the
    live adapter model by more than the tolerance.
    """
    base = source.need_base("merging")
    model = load_with_adapter(base, source.folder)
    expected = probe_logits(model)
    tied = tied_flag(base)
    separate_head(model)
    if not hasattr(model.base_model, "merge_and_unload"):
        kind = read_json(source.folder / "adapter_config.json").get("peft_type")
        raise ExportError(f"kind: {kind} adapters have no merged form; export kind=adapter")
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError, AttributeError) as error:
        raise ExportError(f"kind: this adapter cannot be merged ({error}); export kind=adapter") from error
    # peft may have switched the flag off; whether the merged matrices are equal decides, not the adapter's form.
    set_tied_flag(merged, tied)
    name = dtype or (stored_dtype(source.base_folder) if source.base_folder else None) or "float32"
    folders = [source.folder, *([source.base_folder] if source.base_folder else [])]
    save_model(merged, target, name, max_shard_size, folders)
    del model, merged
    return check_reload(expected, target, name, tolerance)


def separate_head(model: Any) -> None:
    """Give the output head its own copy of a matrix it shares with the embedding, if an adapter touches either.

    Merging adds the update into the matrix in place; shared, it would change the other side, which the live model does
    not do.
    """
    inner = model.get_base_model()
    head, embedding = inner.get_output_embeddings(), inner.get_input_embeddings()
    if head is None or embedding is None:
        return
    plain_head, plain_embedding = getattr(head, "base_layer", head), getattr(embedding, "base_layer", embedding)
    adapted = plain_head is not head or plain_embedding is not embedding
    if adapted and plain_head.weight is plain_embedding.weight:
        plain_head.weight = nn.Parameter(plain_head.weight.detach().clone(), requires_grad=False)
