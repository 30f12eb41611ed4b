"""Checks of data sets: what their rows can serve, what is wrong with them, and what a tokenizer makes of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmalign.checks.findings import Findings
from mmalign.data.chat import TextEncoder, TextEncoding, encode_dataset
from mmalign.data.columns import is_messages
from mmalign.data.loading import DataOptions, load_rows
from mmalign.errors import ConfigError, DataError

LOOKED_AT = 1000
"""Rows that are looked at one by one."""
ENCODED = 200
"""Rows that are tokenised."""
PICTURES = 64
"""Rows whose pictures are read."""

Examples = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Use:
    """One way to use a data set: the methods it serves and the samples of a row that are encoded."""

    kind: Literal["pairs", "samples", "prompts"]
    methods: str
    images: bool = False

    @property
    def fields(self) -> tuple[str, ...]:
        """Samples of a row that are encoded; () = its only one."""
        return ("chosen", "rejected") if self.kind == "pairs" else ()


def check_data(path: str, model: str | None, findings: Findings) -> None:
    """Check a data set as ``mmalign check DATASET`` does."""
    rows = load_rows(DataOptions(path=path), seed=0)
    examples = first_rows(rows, LOOKED_AT)
    findings.ok(f"{len(rows)} rows; columns: {', '.join(f'{name} ({form(examples, name)})' for name in examples[0])}")
    uses = possible_uses(examples)
    if not uses:
        findings.fail(f"columns {', '.join(examples[0])} serve no method: supervised training needs text, messages, or prompt "
                      "and completion; pairs need chosen and rejected; sampling needs prompt; captioned images need prompt and "
                      "images. Map names with data.columns: {theirs: ours}")
    for use in uses:
        findings.ok(f"usable for {use.methods}")
    check_values(examples, findings)
    if model is not None:
        with findings.guard(f"--model {model}"):
            tokenizer = local_tokenizer(model, key="--model")
            for use in uses:
                if use.kind == "prompts":
                    check_prompts(examples, tokenizer, findings)
                elif not use.images:
                    check_encoding(examples, tokenizer, TextEncoding(), use.fields, findings, what=use.methods)


def first_rows(rows: Any, count: int) -> list[dict[str, Any]]:
    """The first rows as dictionaries."""
    return [dict(rows[i]) for i in range(min(count, len(rows)))]


def form(examples: Examples, name: str) -> str:
    """What a column holds, in a word."""
    value = next((row[name] for row in examples if row.get(name) is not None), None)
    if is_messages(value):
        return "messages"
    if isinstance(value, list):
        return f"list of {form([{name: item} for item in value], name)}" if value else "list"
    names = {str: "text", bool: "true or false", int: "whole numbers", float: "numbers", dict: "records", type(None): "empty"}
    return "image" if _is_image(value) else names.get(type(value), type(value).__name__)


def _is_image(value: Any) -> bool:
    return hasattr(value, "convert") and hasattr(value, "size")


def possible_uses(examples: Examples) -> list[Use]:
    """Everything the columns allow."""
    names = set(examples[0])
    pictures = {name for name in names if "image" in form(examples, name)}
    uses = []
    if {"chosen", "rejected"} <= names:
        if {"chosen", "rejected"} <= pictures:
            uses.append(Use("pairs", "preference on image pairs (diffusion_dpo)", images=True))
        else:
            uses.append(Use("pairs", "preference on text pairs (dpo)"))
    if "prompt" in names and "images" in pictures:
        uses.append(Use("samples", "supervised training on captioned images (diffusion_sft)", images=True))
    if "text" in names or "messages" in names or {"prompt", "completion"} <= names:
        uses.append(Use("samples", "supervised training (sft)"))
    if "prompt" in names:
        uses.append(Use("prompts", "sampling (grpo, ddpo, generate, evaluate)"))
    return uses


def check_values(examples: Examples, findings: Findings) -> None:
    """Empty values, repeated rows, pairs without a difference."""
    looked = f"of the first {len(examples)} rows" if len(examples) == LOOKED_AT else f"of {len(examples)} rows"
    for name in ("prompt", "completion", "messages", "text", "chosen", "rejected", "answer"):
        if name in examples[0]:
            empty = [i for i, row in enumerate(examples) if _empty(row.get(name))]
            if empty:
                findings.warn(f"column {name}: {len(empty)} {looked} are empty, the first is row {empty[0]}")
    same = [i for i, row in enumerate(examples) if "chosen" in row and _key(row["chosen"]) == _key(row.get("rejected"))]
    if same:
        findings.warn(f"{len(same)} {looked} have equal chosen and rejected samples and would be dropped, the first is row "
                      f"{same[0]}")
    seen = Counter(_key({k: v for k, v in row.items() if k != "id"}) for row in examples)
    repeated = sum(count - 1 for count in seen.values())
    if repeated:
        findings.warn(f"{repeated} {looked} repeat an earlier row")
    else:
        findings.ok("no row is repeated")


def _empty(value: Any) -> bool:
    if value is None or (isinstance(value, str) and not value.strip()):
        return True
    return isinstance(value, list) and (not value or (is_messages(value) and not any(m.get("content") for m in value)))


def _key(value: Any) -> str:
    def plain(item: Any) -> str:
        return f"{item.size}{hash(item.tobytes())}" if _is_image(item) else repr(item)

    return json.dumps(value, sort_keys=True, default=plain)


def local_tokenizer(model: str, *, key: str) -> Any:
    """The tokenizer of a local model folder, a text-adapter folder or an asset; raises ConfigError for anything else."""
    from transformers import AutoTokenizer

    from mmalign.policies.loading import base_of_adapter, model_kind, resolve_model_path

    path = Path(resolve_model_path(model, key=key))
    if not path.is_dir():
        raise ConfigError(f"{key}: {model!r} is not on this machine, so its tokenizer cannot be tried; give a folder or "
                          "asset:NAME")
    kind = model_kind(str(path))
    if kind.startswith("diffusion"):
        raise ConfigError(f"{key}: {model} is a diffusion model; text rows need a language model")
    if kind == "text_adapter" and not (path / "tokenizer_config.json").is_file():
        path = Path(resolve_model_path(base_of_adapter(path), key=key))
    try:
        return AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{key}: the tokenizer of {model} cannot be loaded: {error}") from None


def check_encoding(
    examples: Examples, tokenizer: Any, encoding: TextEncoding, fields: tuple[str, ...], findings: Findings, *, what: str,
) -> None:
    """Tokenise the first rows as training would: how many are dropped, how many cut, and what is learned of the first."""
    try:
        encoded, report = encode_dataset(list(examples[:ENCODED]), tokenizer, encoding, fields=fields)
    except DataError as error:
        findings.fail(f"{what}: {error}")
        return
    lengths = sorted(len(row[f"{name}_input_ids" if name else "input_ids"]) for row in encoded for name in (fields or ("",)))
    learned = [sum(label != -100 for label in row[f"{name}_labels" if name else "labels"])
               for row in encoded for name in (fields or ("",))]
    findings.ok(f"{what}: {report.kept} of {report.rows} rows kept; tokens per sample {lengths[0]} to {lengths[-1]}, median "
                f"{lengths[len(lengths) // 2]}, of which {sum(learned) / max(1, len(learned)):.1f} are learned on average")
    for reason, count in report.dropped.items():
        findings.warn(f"{what}: {count} of {report.rows} rows would be dropped: {reason}")
    if report.truncated:
        share = 100 * report.truncated / report.rows
        findings.warn(f"{what}: {report.truncated} of {report.rows} rows ({share:.1f}%) are longer than encoding.max_length = "
                      f"{encoding.max_length} and would be cut")
    findings.ok(f"{what}: first row, the learned part between ⟦ and ⟧:\n{_shorten(report.example)}")


def check_prompts(examples: Examples, tokenizer: Any, findings: Findings, encoding: TextEncoding | None = None) -> None:
    """Tokenise the first prompts as sampling would."""
    encoding = encoding or TextEncoding()
    encoder = TextEncoder(tokenizer, encoding.model_copy(update={"append_eos": False}))
    ids = [encoder.prompt(row["prompt"]) for row in examples[:ENCODED]]
    lengths = sorted(len(row) for row in ids)
    findings.ok(f"prompts: {lengths[0]} to {lengths[-1]} tokens, median {lengths[len(lengths) // 2]}; the first as the model "
                f"sees it:\n{_shorten(tokenizer.decode(ids[0]))}")
    over = sum(length >= encoding.max_length for length in lengths) if encoding.max_length else 0
    if over:
        findings.fail(f"prompts: {over} of {len(ids)} have encoding.max_length = {encoding.max_length} tokens or more")


def check_pictures(
    examples: Examples, fields: tuple[str, ...], model: Path, findings: Findings, *, what: str,
) -> None:
    """Read the first pictures as training would, and count captions longer than the model's text encoder takes."""
    from mmalign.policies.image_examples import prepare_images

    limit, tokenizer = 0, None
    if (model / "tokenizer").is_dir():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(model / "tokenizer"))
        limit = tokenizer.model_max_length

    def cut(captions: Sequence[str]) -> list[bool]:
        return [tokenizer is not None and len(tokenizer(caption)["input_ids"]) > limit for caption in captions]

    _, report = prepare_images(examples[:PICTURES], fields, smallest=8, truncated=cut)
    findings.ok(f"{what}: {report.kept} of {report.rows} rows with pictures kept; the first: {report.example}")
    for reason, count in report.dropped.items():
        findings.warn(f"{what}: {count} of {report.rows} rows would be dropped: {reason}")
    if report.truncated:
        findings.warn(f"{what}: {report.truncated} of {report.rows} captions are longer than the text encoder's {limit} tokens")


def _shorten(text: str, limit: int = 1200) -> str:
    return text if len(text) <= limit else f"{text[:limit]} ... ({len(text) - limit} more characters)"
