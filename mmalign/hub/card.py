"""The model card of an exported folder, and the file from which its training can be repeated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmalign import __version__
from mmalign.hub.source import Source
from mmalign.policies.provenance import hub_id, package_versions

REPRODUCIBILITY_FILE = "reproducibility.json"
_SECRETS = ("token", "api_key", "password", "secret")
_RELATIONS = {"transformers": "finetune", "merged": "finetune", "adapter": "adapter", "pipeline": "finetune", "unet": "finetune",
              "diffusers_lora": "adapter"}
_TASKS = {"ForSequenceClassification": "text-classification", "ForConditionalGeneration": "image-text-to-text"}
_KEY_OPTIONS = ("loss", "losses", "advantage", "kl", "tuning", "optimizers", "batch", "steps", "epochs", "sampling",
                "passes_per_rollout", "precision")


@dataclass
class Measure:
    """One measured number before and after training, with standard errors where they are known."""

    name: str
    after: float
    after_error: float | None = None
    before: float | None = None
    before_error: float | None = None
    difference_error: float | None = None
    """Standard error of the paired difference."""


@dataclass
class CardFacts:
    """Everything a card says that is not read off the weights."""

    name: str
    """Title, and ``model_name`` of the results."""
    kind: str
    """Kind of the exported folder: transformers, adapter, merged, pipeline, unet or diffusers_lora."""
    base_id: str | None = None
    base_folder: Path | None = None
    base_label: str | None = None
    """What the base is called when it has no hub id."""
    method: str | None = None
    paper: str | None = None
    modality: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    datasets: list[str] = field(default_factory=list)
    rewards: list[str] = field(default_factory=list)
    measures: list[Measure] = field(default_factory=list)
    manifest: dict[str, Any] = field(default_factory=dict)
    gap: str | None = None
    """How closely the export reproduces the trained model."""
    dtype: str | None = None
    network_class: str | None = None
    """Class that loads a transformers model or a denoiser."""
    component: str = "unet"
    """Name of the denoiser in its pipeline."""
    repo_id: str | None = None
    absent: list[str] = field(default_factory=list)
    """Parts a pipeline was exported without, which its class asks for."""
    warnings: list[str] = field(default_factory=list)
    parents: list[str] = field(default_factory=list)
    """Models that a merged model was made from, the base first."""


def gather_facts(source: Source, kind: str, *, repo_id: str | None = None) -> CardFacts:
    """What is known about a model from its provenance file and the run it came from."""
    record = source.provenance
    manifest = _read(source.run / "manifest.json") if source.run else {}
    config = manifest.get("config") or {}
    name = (repo_id or "").rpartition("/")[2] or (source.run.name if source.run else source.folder.name)
    facts = CardFacts(
        name, kind, source.base_id, source.base_folder, record.get("base_model") or source.base,
        record.get("method") or manifest.get("kind"), record.get("paper"), record.get("modality"), config, manifest=manifest,
        repo_id=repo_id, warnings=list(source.warnings),
    )
    facts.parents = [str(parent["model"]) for parent in record.get("parents") or []]
    facts.paper = facts.paper or _paper(facts.method)
    facts.datasets = _datasets(config)
    facts.rewards = [_reward_line(item) for item in config.get("rewards") or record.get("rewards") or []]
    facts.measures = measures(manifest, source.run)
    return facts


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _paper(method: str | None) -> str | None:
    if method is None:
        return None
    from mmalign.methods.registry import METHODS

    return METHODS.get(method).paper if method in METHODS else None


def _datasets(config: Mapping[str, Any]) -> list[str]:
    found: list[str] = []

    def walk(node: Any, key: str) -> None:
        if isinstance(node, Mapping):
            if key in ("data", "train", "mixture") and isinstance(node.get("path"), str):
                found.append(node["path"])
            for name, value in node.items():
                walk(value, name)
        elif isinstance(node, list):
            for value in node:
                walk(value, key)

    walk(config, "")
    return list(dict.fromkeys(found))


def _reward_line(item: Any) -> str:
    if not isinstance(item, Mapping):
        return str(item)
    options = {k: v for k, v in item.items() if k not in ("name", "weight", "label", "columns", "cache") and v is not None}
    text = f"`{item.get('name')}`"
    if item.get("weight", 1.0) != 1.0:
        text += f", weight {item['weight']}"
    return text + (f", {', '.join(f'{k} = {v}' for k, v in options.items())}" if options else "")


def measures(manifest: Mapping[str, Any], run: Path | None) -> list[Measure]:
    """Measured numbers of a run: those of an evaluation that compared two models, else the first and last ``eval/``."""
    numbers = manifest.get("metrics") or {}
    compared = [name.removeprefix("after/") for name in numbers if name.startswith("after/")]
    if compared:
        return [Measure(n, numbers[f"after/{n}"], None, numbers.get(f"before/{n}"), None, numbers.get(f"difference/{n}/error"))
                for n in compared]
    records = []
    if run is not None and (run / "metrics.jsonl").is_file():
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if any(name.startswith("eval/") for name in record):
                records.append(record)
    if not records:
        return [Measure(n.removeprefix("eval/"), v, numbers.get(f"{n}/error")) for n, v in numbers.items() if _is_mean(n, v)]
    first, last = records[0], records[-1]
    return [
        Measure(name.removeprefix("eval/"), value, last.get(f"{name}/error"), *((first.get(name), first.get(f"{name}/error"))
                if len(records) > 1 else (None, None)))
        for name, value in last.items() if _is_mean(name, value)
    ]


def _is_mean(name: str, value: Any) -> bool:
    return name.startswith("eval/") and not name.endswith("/error") and isinstance(value, (int, float)) and value == value


def base_license(folder: Path | None) -> dict[str, Any]:
    """``license``, ``license_name`` and ``license_link`` of the base model's own card; empty when it has none."""
    if folder is None or not (folder / "README.md").is_file():
        return {}
    from huggingface_hub import ModelCard

    try:
        data = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.to_dict()
    except (ValueError, OSError):
        return {}
    return {key: data[key] for key in ("license", "license_name", "license_link") if data.get(key)}


def card_data(facts: CardFacts) -> Any:
    """The metadata block (:class:`huggingface_hub.ModelCardData`); results are measured ones only."""
    from huggingface_hub import EvalResult, ModelCardData

    library = {"adapter": "peft", "transformers": "transformers", "merged": "transformers"}.get(facts.kind, "diffusers")
    pipeline = "text-to-image" if library == "diffusers" else "text-generation"
    if library == "transformers":
        pipeline = next((task for suffix, task in _TASKS.items() if (facts.network_class or "").endswith(suffix)), pipeline)
    tags = ["mmalign", "alignment", *([facts.method] if facts.method else []), *([facts.modality] if facts.modality else [])]
    if library == "diffusers":
        tags += ["text-to-image", "diffusers", *(["lora"] if facts.kind == "diffusers_lora" else [])]
    elif facts.kind == "adapter":
        tags.append("lora")
    data = facts.datasets[0] if facts.datasets else "held-out prompts"
    results = [
        EvalResult(task_type=pipeline, dataset_type="custom", dataset_name=data, metric_type=m.name, metric_value=m.after)
        for m in facts.measures
    ]
    base: str | list[str] | None = [name for name in facts.parents if hub_id(name)] or facts.base_id
    relation = "merge" if facts.parents else _RELATIONS[facts.kind]
    return ModelCardData(
        base_model=base, base_model_relation=relation if base else None,
        datasets=[d for d in facts.datasets if hub_id(d) and "/" in d] or None, library_name=library, pipeline_tag=pipeline,
        tags=tags, eval_results=results or None, model_name=facts.name if results else None, **base_license(facts.base_folder),
    )


def card_text(facts: CardFacts) -> str:
    """The whole README.md: metadata, what it is, how to load it, training, data, rewards, evaluation, limits."""
    base = f"`{facts.base_label}`" if facts.base_id is None else f"[{facts.base_id}](https://huggingface.co/{facts.base_id})"
    article = {
        "transformers": "A language model", "merged": "A language model (adapter merged into its base)",
        "adapter": "A PEFT adapter",
        "pipeline": "A diffusion pipeline", "unet": "The denoiser of a diffusion pipeline", "diffusers_lora": "A diffusion LoRA",
    }[facts.kind]
    trained = f", trained from {base}" if facts.base_label or facts.base_id else ""
    method = f" with `{facts.method}`" if facts.method else ""
    if facts.parents:
        trained, method = f", merged from {', '.join(f'`{name}`' for name in facts.parents)}", method.replace(" with", ":", 1)
    sections = [
        f"# {facts.name}", f"{article}{trained}{method} by mmalign {__version__}.",
        "## Use", f"No mmalign is needed.\n\n```python\n{snippet(facts)}\n```", "## Training", _training(facts),
    ]
    if facts.datasets:
        sections += ["## Data", "\n".join(f"- `{name}`" for name in facts.datasets)]
    if facts.rewards:
        sections += ["## Rewards", "\n".join(f"- {line}" for line in facts.rewards)]
    sections += ["## Evaluation", _evaluation(facts.measures), "## Limits", _limits(facts)]
    return f"---\n{card_data(facts).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def snippet(facts: CardFacts) -> str:
    """Python that loads the model with the library it is made for."""
    here = facts.repo_id or "path/to/this/folder"
    base = facts.base_id or "path/to/the/base"
    if facts.kind in ("transformers", "merged"):
        cls = facts.network_class or "AutoModelForCausalLM"
        names = ", ".join(sorted(("AutoTokenizer", cls)))
        return (f"from transformers import {names}\n\ntokenizer = AutoTokenizer.from_pretrained(\"{here}\")\n"
                f"model = {cls}.from_pretrained(\"{here}\", dtype=\"auto\")")
    if facts.kind == "adapter":
        cls = facts.network_class or "AutoModelForCausalLM"
        labels = ", num_labels=1" if cls.endswith("ForSequenceClassification") else ""
        return (f"from peft import PeftModel\nfrom transformers import {cls}\n\n"
                f"base = {cls}.from_pretrained(\"{base}\"{labels})\nmodel = PeftModel.from_pretrained(base, \"{here}\")")
    start = "import torch\nfrom diffusers import DiffusionPipeline"
    if facts.kind == "pipeline":
        parts = "".join(f", {name}=None" for name in facts.absent)
        load = f"pipe = DiffusionPipeline.from_pretrained(\"{here}\"{parts})"
    elif facts.kind == "diffusers_lora":
        load = f"pipe = DiffusionPipeline.from_pretrained(\"{base}\")\npipe.load_lora_weights(\"{here}\")"
    else:
        cls = facts.network_class or "UNet2DConditionModel"
        start = f"import torch\nfrom diffusers import DiffusionPipeline, {cls}"
        load = (f"{facts.component} = {cls}.from_pretrained(\"{here}\")\n"
                f"pipe = DiffusionPipeline.from_pretrained(\"{base}\", {facts.component}={facts.component})")
    return f"{start}\n\n{load}\nimage = pipe(\"a prompt\", generator=torch.Generator().manual_seed(0)).images[0]"


def _training(facts: CardFacts) -> str:
    rows = [("method", f"`{facts.method}`" if facts.method else None), ("paper", facts.paper),
            ("precision of the files", facts.dtype)]
    set_options = {key: facts.config[key] for key in _KEY_OPTIONS if facts.config.get(key) not in (None, [], {})}
    rows += [(f"`{key}`", f"`{_short(value)}`") for key, value in set_options.items()]
    rows.append(("seed", facts.manifest.get("seed")))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows if value is not None)
    note = f"The resolved configuration, package versions and data fingerprints are in `{REPRODUCIBILITY_FILE}`."
    return f"| | |\n|---|---|\n{table}\n\n{note}" if table else "Nothing is recorded about the training of these weights."


def _given(value: Any) -> Any:
    """``value`` without entries that are null or empty, which say nothing to a reader."""
    if isinstance(value, Mapping):
        return {key: _given(item) for key, item in value.items() if item not in (None, [], {}, "")}
    return [_given(item) for item in value] if isinstance(value, list) else value


def _short(value: Any) -> str:
    text = json.dumps(_given(value), default=str, ensure_ascii=False).replace("|", "\\|").replace("`", "'")
    return text if len(text) <= 240 else f"{text[:237]}..."


def _evaluation(found: list[Measure]) -> str:
    if not found:
        return "Not evaluated."
    lines = ["| measure | before | after | difference |", "|---|---|---|---|"]
    for m in found:
        difference = "" if m.before is None else f"{m.after - m.before:+.4g}{_error(m.difference_error)}"
        before = "" if m.before is None else f"{m.before:.4g}{_error(m.before_error)}"
        lines.append(f"| {m.name} | {before} | {m.after:.4g}{_error(m.after_error)} | {difference} |")
    return "\n".join(lines) + "\n\n± is one standard error over the held-out samples."


def _error(value: float | None) -> str:
    return "" if value is None or value != value else f" ± {value:.2g}"


def _limits(facts: CardFacts) -> str:
    lines = ["The model keeps the limits and biases of its base model and of the data it was trained on."]
    if facts.rewards:
        lines.append("It was optimised for the rewards above; behaviour that they do not measure may have become worse, and high "
                     "rewards may be reached in unintended ways.")
    if not facts.measures:
        lines.append("No measurement backs a claim about its quality.")
    lines += [f"{text[0].upper()}{text[1:]}." for text in facts.warnings]
    if facts.gap:
        lines.append(f"Export check: {facts.gap}.")
    return "\n".join(f"- {line}" for line in lines)


def reproducibility(facts: CardFacts, source: Source) -> dict[str, Any]:
    """Resolved configuration, versions, commit, data fingerprints, seed and base hash of the training; secrets left out."""
    record, manifest = source.provenance, facts.manifest
    return {
        "method": facts.method, "paper": facts.paper, "config": _without_secrets(facts.config), "seed": manifest.get("seed"),
        "versions": {"training": manifest.get("versions") or record.get("versions"), "export": package_versions()},
        "git": manifest.get("git"), "inputs": manifest.get("inputs"), "base_model": record.get("base_model") or source.base_id,
        "base_hash": record.get("base_hash"), "base_weights": record.get("base_weights"), "reference": record.get("reference"),
        "metrics": manifest.get("metrics"), "export": {"kind": facts.kind, "dtype": facts.dtype, "gap": facts.gap},
    }


def _without_secrets(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {
            key: "***" if isinstance(value, str) and str(key).lower().endswith(_SECRETS) else _without_secrets(value)
            for key, value in node.items()
        }
    return [_without_secrets(v) for v in node] if isinstance(node, list) else node
