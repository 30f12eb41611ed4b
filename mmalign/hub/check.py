"""Checks of an exported folder: what its users would stumble over, found by reading files rather than by trying."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmalign.errors import ExportError, MmalignError
from mmalign.hub.fresh import FreshLoad, load_in_fresh_process
from mmalign.hub.source import folder_kind, read_json, safetensors_headers, stored_dtype, tensor_entries
from mmalign.policies.diffusion_export import LORA_FILE
from mmalign.policies.provenance import PROVENANCE_FILE, hub_id

__all__ = ["Check", "FreshLoad", "check_export", "load_in_fresh_process"]

EMBEDDINGS = (
    "embed_tokens.weight", "wte.weight", "word_embeddings.weight", "shared.weight", "embed_in.weight", "tok_embeddings.weight",
)
VLLM_DEFAULT_RANK = 16
_WRAPPERS = (".lora_", ".base_layer.", ".modules_to_save.", "_orig_mod.", "_fsdp_wrapped_module.")
"""Parts of tensor names that wrappers leave behind."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")


@dataclass(frozen=True)
class Check:
    """One line of a check."""

    status: Literal["ok", "warn", "fail"]
    item: str
    """What was looked at, for example "weights"."""
    detail: str

    @property
    def text(self) -> str:
        """``item: detail``."""
        return f"{self.item}: {self.detail}"

    def __str__(self) -> str:
        return f"{self.status:4} {self.text}"


Checks = Iterator[Check]


def check_export(folder: str | Path) -> list[Check]:
    """Every check for the kind of model in ``folder``; never raises for a bad folder, it says so in a ``fail`` line."""
    folder = Path(folder)
    try:
        kind = folder_kind(folder)
    except ExportError as error:
        return [Check("fail", "kind", str(error))]
    checks = [Check("ok", "kind", kind)]
    for group in (*_BY_KIND[kind], _files, _card):
        try:
            checks.extend(group(folder))
        except (MmalignError, OSError, ValueError, KeyError, TypeError) as error:
            checks.append(Check("fail", group.__name__.strip("_"), str(error) or type(error).__name__))
    return checks


def _files(folder: Path) -> Checks:
    names = sorted(p.name for p in folder.rglob("*") if p.is_file() and p.suffix in _PICKLES)
    if names:
        yield Check("fail", "files", f"pickled files that no one should load: {', '.join(names[:5])}; delete them")
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    yield Check("ok", "files", f"{size / 1e6:,.1f} MB, safetensors only" if not names else f"{size / 1e6:,.1f} MB")


def _card(folder: Path) -> Checks:
    card = folder / "README.md"
    if not card.is_file():
        yield Check("warn", "card", "no README.md, so the hub shows neither base model nor licence")
    else:
        from huggingface_hub import ModelCard

        data = ModelCard.load(card).data.to_dict()
        missing = [key for key in ("library_name", "pipeline_tag", "license") if not data.get(key)]
        if missing:
            yield Check("warn", "card", f"metadata lack {', '.join(missing)}")
        else:
            yield Check("ok", "card", "metadata complete")
    if not (folder / PROVENANCE_FILE).is_file():
        yield Check("warn", "provenance", f"no {PROVENANCE_FILE}; the base model is known by name at most")


def _weights(folder: Path) -> Checks:
    index = next(iter(folder.glob("*.safetensors.index.json")), None)
    headers = safetensors_headers(folder)
    if not headers:
        yield Check("fail", "weights", "no safetensors file")
        return
    present = {name: file for file, header in headers.items() for name in header if name != "__metadata__"}
    if index is not None:
        listed = read_json(index)["weight_map"]
        lost = [name for name, file in listed.items() if present.get(name) != file]
        if lost or set(listed) != set(present):
            first = (lost or sorted(set(present) - set(listed)))[0]
            yield Check("fail", "weights", f"{index.name} does not match the shards, for example in {first}")
            return
    foreign = [name for name in present if any(part in name for part in _WRAPPERS)]
    if foreign:
        yield Check("fail", "weights", f"names that the plain library does not know, such as {foreign[0]}; merge the adapter")
        return
    files = f"{len(headers)} file{'s' if len(headers) > 1 else ''}"
    yield Check("ok", "weights", f"{len(present)} tensors in {files}, {stored_dtype(folder)}")


def _config(folder: Path) -> Checks:
    import transformers

    config = read_json(folder / "config.json")
    names = config.get("architectures") or []
    known = [name for name in names if hasattr(transformers, name)]
    yield Check("ok", "architecture", known[0]) if known else Check(
        "fail", "architecture", f"{names or 'none given'} is not in transformers {transformers.__version__}"
    )
    declared, stored = str(config.get("dtype") or config.get("torch_dtype")), stored_dtype(folder)
    if declared != stored:
        yield Check("warn", "dtype", f"config.json says {declared}, the weights are {stored}")
    text = {**config, **(config.get("text_config") or {})}
    shapes = {name: entry["shape"] for name, entry in tensor_entries(folder)}
    rows = next((shape[0] for name, shape in shapes.items() if name.endswith(EMBEDDINGS)), None)
    size = text.get("vocab_size")
    if rows is None or size is None:
        yield Check("warn", "vocabulary", "the input embedding has an unusual name; its rows were not compared with vocab_size")
    elif rows != size:
        yield Check("fail", "vocabulary", f"config.json says vocab_size {size}, the embedding has {rows} rows")
    else:
        yield Check("ok", "vocabulary", f"{rows} rows")
    if any(name.endswith(("ForCausalLM", "ForConditionalGeneration")) for name in names):
        yield _tied(folder, text, shapes)


def _tied(folder: Path, config: dict[str, Any], shapes: dict[str, list[int]]) -> Check:
    head = next((n for n in shapes if n.endswith(("lm_head.weight", "embed_out.weight"))), None)
    tied = config.get("tie_word_embeddings")
    if tied is None:  # left out where it has the class's default
        from transformers import AutoConfig

        tied = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config().tie_word_embeddings
    if not tied:
        return Check("ok", "tied embeddings", "no, and the head is stored") if head else Check(
            "fail", "tied embeddings", "config.json says untied but no head is stored: it would be initialised at random"
        )
    embedding = next((n for n in shapes if n.endswith(EMBEDDINGS)), None)
    if head is None or embedding is None:
        return Check("ok", "tied embeddings", "yes")
    import torch

    same = shapes[head] == shapes[embedding] and torch.equal(_tensor(folder, head), _tensor(folder, embedding))
    return Check("ok", "tied embeddings", "yes, and equal") if same else Check(
        "fail", "tied embeddings", f"config.json says tied but {head} differs from {embedding}: it would be dropped on loading"
    )


def _tensor(folder: Path, name: str) -> Any:
    from safetensors import safe_open

    file = next(f for f, header in safetensors_headers(folder).items() if name in header)
    with safe_open(folder / file, framework="pt") as reader:
        return reader.get_tensor(name)


def _tokenizer(folder: Path) -> Checks:
    from mmalign.hub.language import load_tokenizer, stop_tokens

    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        yield Check("warn", "tokenizer", "none in the folder")
        return
    rows = next((e["shape"][0] for n, e in tensor_entries(folder) if n.endswith(EMBEDDINGS)), None)
    if rows is not None and len(tokenizer) > rows:
        yield Check("fail", "tokenizer", f"{len(tokenizer)} tokens for {rows} embedding rows")
    else:
        yield Check("ok", "tokenizer", f"{len(tokenizer)} tokens")
    if not tokenizer.chat_template:
        yield Check("warn", "chat template", "none; fine for a base model, wrong for a chat model")
    else:
        yield from _template(folder, tokenizer)
    path = folder / "generation_config.json"
    if not path.is_file():
        yield Check("warn", "generation_config", "none; generation stops at config.json's end token only")
        return
    from transformers import GenerationConfig

    config = GenerationConfig.from_pretrained(folder)
    try:
        config.validate(strict=True)
    except ValueError as error:
        yield Check("fail", "generation_config", f"contradicts itself: {' '.join(str(error).split())[:160]}")
        return
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    lacking = [token for token in stop_tokens(tokenizer) if token not in ends]
    if lacking:
        names = ", ".join(tokenizer.convert_ids_to_tokens(lacking))
        yield Check("fail", "generation_config", f"eos_token_id lacks {names}: chats would not stop at the end of a turn")
    elif config.pad_token_id is None:
        yield Check("warn", "generation_config", "no pad_token_id; batched generation warns")
    else:
        names = ", ".join(tokenizer.convert_ids_to_tokens([token for token in ends if token is not None]))
        yield Check("ok", "generation_config", f"stops at {names}")


def _template(folder: Path, tokenizer: Any) -> Checks:
    from mmalign.hub.language import inference_template

    templates = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {"default": tokenizer.chat_template}
    marked = [name for name, text in templates.items() if inference_template(text) != text]
    if marked:
        yield Check("warn", "chat template", "has {% generation %} marks of training, which few inference engines know")
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise anything
        yield Check("fail", "chat template", f"does not render a user message ({error})")
    else:
        if not marked:
            yield Check("ok", "chat template", "renders")


def _adapter(folder: Path) -> Checks:
    config = read_json(folder / "adapter_config.json")
    if not (folder / "adapter_model.safetensors").is_file():
        yield Check("fail", "weights", "no adapter_model.safetensors")
        return
    base = config.get("base_model_name_or_path")
    if hub_id(base):
        yield Check("ok", "base model", str(base))
    elif base and Path(base).is_dir():
        yield Check("warn", "base model", f"{base} is a folder of this machine; give base=<hub id> before sharing")
    else:
        yield Check("fail", "base model", f"{base!r} does not exist; give base=<hub id or folder>")
    yield Check("ok", "inference_mode", "true") if config.get("inference_mode") else Check(
        "warn", "inference_mode", "false: loading it again makes the adapter trainable"
    )
    if not config.get("task_type"):
        yield Check("warn", "task_type", "not set, so AutoPeftModel cannot choose a class")
    targets = config.get("target_modules")
    if isinstance(targets, str):
        yield Check("warn", "target_modules", f"a pattern ({targets!r}), which vLLM does not resolve")
    yield from _ranks(folder, config)
    if str(config.get("init_lora_weights")).partition("_niter")[0] in ("pissa", "olora", "corda", "loftq", "eva"):
        yield Check("warn", "init_lora_weights", f"{config['init_lora_weights']} changed the base weights at the start of "
                                                 "training; kind=merged is the safe form to share")
    yield from _vllm(config)


def _ranks(folder: Path, config: dict[str, Any]) -> Checks:
    if config.get("peft_type") != "LORA" or config.get("rank_pattern"):
        return
    shapes = [entry["shape"] for name, entry in tensor_entries(folder) if name.endswith("lora_A.weight")]
    ranks = {shape[0] for shape in shapes if len(shape) == 2}
    if ranks and ranks != {config.get("r")}:
        yield Check("fail", "rank", f"adapter_config.json says r = {config.get('r')}, the weights have {sorted(ranks)}")
    elif ranks:
        yield Check("ok", "rank", f"r = {config['r']}, alpha = {config.get('lora_alpha')}")


def _vllm(config: dict[str, Any]) -> Checks:
    """What ``vllm serve --enable-lora`` refuses or ignores; merged weights avoid all of it."""
    reasons = []
    if config.get("peft_type") != "LORA":
        reasons.append(f"it serves LoRA only, not {config.get('peft_type')}")
    if config.get("modules_to_save"):
        reasons.append(f"modules_to_save ({', '.join(config['modules_to_save'])})")
    if config.get("use_dora"):
        reasons.append("DoRA")
    if config.get("bias", "none") != "none":
        reasons.append(f"bias = {config['bias']}")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        reasons.append("ranks or alphas that differ between layers")
    if config.get("target_parameters") or config.get("trainable_token_indices"):
        reasons.append("target_parameters or trained token rows")
    targets = config.get("target_modules") or []
    if isinstance(targets, str):
        targets = [targets]
    odd = sorted({t for t in targets if t.rpartition(".")[2] in ("embed_tokens", "lm_head", "wte")})
    if odd:
        reasons.append(f"adapted embeddings ({', '.join(odd)})")
    if any("visi" in t for t in targets):
        reasons.append("adapters in the vision tower")
    if reasons:
        yield Check("warn", "vLLM", f"refuses or ignores {'; '.join(reasons)}. Export kind=merged to serve this model there")
    elif int(config.get("r") or 0) > VLLM_DEFAULT_RANK:
        yield Check("warn", "vLLM", f"start it with --max-lora-rank {config['r']} (its default is {VLLM_DEFAULT_RANK})")
    else:
        yield Check("ok", "vLLM", "nothing in the configuration that --enable-lora refuses")


def _pipeline(folder: Path) -> Checks:
    index = read_json(folder / "model_index.json")
    components = {name: value for name, value in index.items() if isinstance(value, list)}
    missing = [name for name, (library, _) in components.items() if library is not None and not (folder / name).is_dir()]
    if missing:
        yield Check("fail", "components", f"model_index.json lists {', '.join(missing)}, which are not there")
        return
    yield Check("ok", "components", ", ".join(name for name, (library, _) in components.items() if library is not None))
    for name in components:
        part = folder / name
        if (part / "config.json").is_file() and not any(part.glob("*.safetensors")):
            yield Check("fail", name, "no safetensors weights")
        elif part.is_dir() and any(part.glob("*.safetensors")):
            for check in _weights(part):
                yield Check(check.status, name, check.detail)
    if (folder / "scheduler" / "scheduler_config.json").is_file():
        scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
        kept = {k: scheduler[k] for k in ("prediction_type", "clip_sample", "timestep_spacing", "shift") if k in scheduler}
        yield Check("ok", "scheduler", f"{scheduler.get('_class_name')} {json.dumps(kept)}")
    else:
        yield Check("fail", "scheduler", "no scheduler_config.json, so images are sampled with other settings than in training")
    absent = absent_parts(folder)
    if absent:
        yield Check("warn", "left out", f"{', '.join(absent)}: diffusers loads this folder only with {absent[0]}=None given")
    if "safety_checker" in components:
        given = components["safety_checker"][0] is not None
        yield Check("ok", "safety checker", "included" if given else "left out, as in the base model's folder")


def absent_parts(folder: Path) -> list[str]:
    """Components that a pipeline folder lacks although its class asks for them (SD3 without its T5 encoder)."""
    import diffusers

    index = read_json(folder / "model_index.json")
    optional = getattr(getattr(diffusers, str(index.get("_class_name")), None), "_optional_components", [])
    return [name for name, value in index.items() if isinstance(value, list) and value[0] is None and name not in optional]


def _denoiser(folder: Path) -> Checks:
    import diffusers

    name = read_json(folder / "config.json").get("_class_name")
    yield Check("ok", "class", str(name)) if hasattr(diffusers, str(name)) else Check(
        "fail", "class", f"{name!r} is not in diffusers {diffusers.__version__}"
    )


def _lora(folder: Path) -> Checks:
    from mmalign.hub.diffusion import lora_metadata

    shapes = {name: entry["shape"] for name, entry in tensor_entries(folder) if name in safetensors_headers(folder)[LORA_FILE]}
    parts = sorted({name.partition(".")[0] for name in shapes})
    strange = [part for part in parts if part not in ("unet", "transformer") and not part.startswith("text_encoder")]
    if strange or not parts:
        yield Check("fail", "weights", f"entries start with {', '.join(strange) or 'nothing'}; unet, transformer or "
                                       "text_encoder is expected")
        return
    yield Check("ok", "weights", f"{len(shapes)} matrices for {', '.join(parts)}")
    metadata = lora_metadata(folder)
    if metadata is None:
        yield Check("fail", "strength", "no adapter metadata in the header: diffusers assumes alpha = rank, the wrong strength "
                                        "for any other alpha, without a word; export it again with mmalign")
        return
    for part in parts:
        rank, alpha = metadata.get(f"{part}.r"), metadata.get(f"{part}.lora_alpha")
        if rank is None or alpha is None:
            yield Check("fail", "strength", f"the metadata say nothing about {part}")
            continue
        found = {s[0] for n, s in shapes.items() if n.startswith(f"{part}.") and (".lora_A." in n or ".lora.down." in n)}
        if found != {rank} and not metadata.get(f"{part}.rank_pattern"):
            yield Check("fail", "strength", f"{part}: the metadata say rank {rank}, the weights have {sorted(found)}")
        else:
            yield Check("ok", "strength", f"{part}: rank {rank}, alpha {alpha}")


_BY_KIND: dict[str, tuple[Callable[[Path], Checks], ...]] = {
    "transformers": (_weights, _config, _tokenizer), "adapter": (_adapter,), "pipeline": (_pipeline,),
    "unet": (_denoiser, _weights), "diffusers_lora": (_lora,),
}
