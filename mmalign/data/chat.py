"""Text data for language models: the whole data set encoded before training, and the names everyone imports.

Rows that cannot be used are dropped and counted, and the data set is refused when none is left. One row at a time is
:mod:`mmalign.data.encoding`; where an assistant's words lie in a rendered template is :mod:`mmalign.data.turns`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from mmalign.data.columns import PreparationReport, check_ids, check_rows, label_source, require_columns
from mmalign.data.encoding import (
    IGNORED,
    Dropped,
    TextEncoder,
    TextEncoding,
    build_labels,
    decode_completion,
    encode_example,
    encode_prompt,
    encode_rendered,
    mark_trained,
)
from mmalign.data.progress import track
from mmalign.data.turns import pre_query_prefix, render_chat
from mmalign.errors import DataError, NoRowsLeftError

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "IGNORED", "Dropped", "PreparationReport", "TextEncoder", "TextEncoding", "build_labels", "decode_completion",
    "encode_dataset", "encode_example", "encode_prompt", "encode_rendered", "mark_trained", "pre_query_prefix",
    "render_chat",
]

Example = Mapping[str, Any]

_ENCODING_VERSION = "1"
"""Changes whenever encoded rows would, so that cached ones are not taken for them."""

_REASON = "__dropped"


def encode_dataset(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, options: TextEncoding | None = None, *,
    fields: Sequence[str] = (),
) -> tuple[Sequence[dict[str, Any]], PreparationReport]:
    """Every row encoded (:func:`mmalign.data.encoding.encode_example`), and what became of the data set.

    Encoded rows keep the columns that encoding does not consume (``id``, ``weight``, ``prompt``, ``answer``, ...). A
    ``datasets.Dataset`` stays one: it is mapped on disk and read row by row. Raises DataError when columns are
    missing, a row is malformed, ids repeat, or no row is left; the message then shows a row with its trained part
    marked.
    """
    encoder = TextEncoder(tokenizer, options)
    check_rows(len(examples), source="data")
    names = _column_names(examples)
    consumed = _check_columns(names, fields)
    if "id" in names:
        check_ids(_column(examples, "id"), source="data")
    if _is_dataset(examples):
        encoded, dropped = _map_dataset(examples, encoder, fields, consumed)
    else:
        encoded, dropped = _encode_list(examples, encoder, fields, consumed)
    if not len(encoded):
        raise NoRowsLeftError(_nothing_left(examples, encoder, fields, dropped))
    report = PreparationReport(
        rows=len(examples), kept=len(encoded), dropped=dict(dropped),
        truncated=sum(bool(flag) for flag in _column(encoded, "truncated")),
        example=_show(encoded[0], fields, tokenizer),
    )
    return encoded, report


def _is_dataset(examples: Any) -> bool:
    # Without importing datasets: a list of rows must not pay for it.
    return type(examples).__module__.split(".")[0] == "datasets" and hasattr(examples, "map")


def _column_names(examples: Any) -> list[str]:
    return list(examples.column_names) if _is_dataset(examples) else list(examples[0])


def _column(examples: Any, name: str) -> Iterator[Any]:
    if _is_dataset(examples):
        for batch in examples.select_columns([name]).iter(batch_size=1000):
            yield from batch[name]
    else:
        for example in examples:
            yield example.get(name)


def _check_columns(names: Sequence[str], fields: Sequence[str]) -> set[str]:
    """The columns that encoding replaces; raises DataError when those needed are not there."""
    if fields:
        tokenised = [f"{name}_input_ids" for name in fields]
        if not all(column in names for column in tokenised):
            require_columns(names, fields, purpose=f"a data set with {' and '.join(fields)} samples")
        extra = [f"{name}_{part}" for name in fields for part in ("input_ids", "labels", "completion_mask")]
        return {*fields, *extra, "messages", "text", "completion", "truncated"} & set(names)
    label_source(names)
    return {"text", "messages", "completion", "input_ids", "labels", "completion_mask", "assistant_masks",
            "attention_mask", "truncated"} & set(names)


def _encode_row(
    encoder: TextEncoder, example: Example, fields: Sequence[str], position: int,
) -> dict[str, Any] | Dropped:
    try:
        return encoder.encode(example, fields)
    except DataError as error:
        name = f" (id {example['id']!r})" if "id" in example else ""
        raise DataError(f"row {position}{name}: {error}") from None


def _encode_list(
    examples: Sequence[Example], encoder: TextEncoder, fields: Sequence[str], consumed: set[str],
) -> tuple[list[dict[str, Any]], Counter[str]]:
    rows: list[dict[str, Any]] = []
    dropped: Counter[str] = Counter()
    for position, example in enumerate(track(examples, total=len(examples), description="encoding rows")):
        result = _encode_row(encoder, example, fields, position)
        if isinstance(result, Dropped):
            dropped[result.reason] += 1
        else:
            rows.append({**{key: value for key, value in example.items() if key not in consumed}, **result})
    return rows, dropped


def _map_dataset(
    dataset: datasets.Dataset, encoder: TextEncoder, fields: Sequence[str], consumed: set[str],
) -> tuple[datasets.Dataset, Counter[str]]:
    from datasets import Features, Value
    from datasets import Sequence as ListOf

    prefixes = [f"{name}_" for name in fields] or [""]
    columns = [f"{prefix}{part}" for prefix in prefixes for part in ("input_ids", "labels")]
    # Every row is kept, with its reason, so that the counts are right when the mapping comes from the cache.
    blank: dict[str, Any] = {**{column: [] for column in columns}, "truncated": False}

    def encode(example: Example, position: int) -> dict[str, Any]:
        result = _encode_row(encoder, example, fields, position)
        return {**blank, _REASON: result.reason} if isinstance(result, Dropped) else {**result, _REASON: ""}

    kept = {name: feature for name, feature in dataset.features.items() if name not in consumed}
    features = Features({
        **kept, **{column: ListOf(Value("int32")) for column in columns}, "truncated": Value("bool"),
        _REASON: Value("string"),
    })
    encoded = dataset.map(
        encode, with_indices=True, remove_columns=sorted(consumed), features=features, desc="encoding rows",
        new_fingerprint=_fingerprint(dataset, encoder, fields),
    )
    reasons = list(_column(encoded, _REASON))
    keep = [position for position, reason in enumerate(reasons) if not reason]
    result = encoded.remove_columns([_REASON])
    return (result if len(keep) == len(reasons) else result.select(keep)), Counter(filter(None, reasons))


def _fingerprint(dataset: datasets.Dataset, encoder: TextEncoder, fields: Sequence[str]) -> str:
    """Name of the encoded data in the datasets cache: the rows, the tokenizer, the template and the options."""
    tokenizer = encoder.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    parts = [_ENCODING_VERSION, dataset._fingerprint, encoder.options.model_dump_json(), str(encoder.max_length),
             repr(tuple(fields)), str(tokenizer.chat_template), content, repr(tokenizer.special_tokens_map)]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def _show(row: Example, fields: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> str:
    if not fields:
        return mark_trained(row["input_ids"], row["labels"], tokenizer)
    return "\n".join(
        f"{name}: {mark_trained(row[f'{name}_input_ids'], row[f'{name}_labels'], tokenizer)}" for name in fields
    )


def _nothing_left(
    examples: Sequence[Example], encoder: TextEncoder, fields: Sequence[str], dropped: Counter[str],
) -> str:
    reasons = "; ".join(f"{count}: {reason}" for reason, count in dropped.most_common())
    lines = [f"none of the {len(examples)} rows can be trained on ({reasons})."]
    samples = encoder.samples(next(islice(iter(examples), 1)), fields)
    if not isinstance(samples, Dropped):
        lines.append("The first row, with the trained part between ⟦ and ⟧ before any cut:")
        for name, sample in samples.items():
            text = mark_trained(sample.ids, sample.labels, encoder.tokenizer)
            size = f"{len(sample.ids)} tokens, {sum(label != IGNORED for label in sample.labels)} to learn"
            lines.append(f"{name + ': ' if name else ''}{text if len(text) <= 2000 else text[:2000] + '...'} ({size})")
    if encoder.max_length is not None:
        lines.append(f"max_length is {encoder.max_length}.")
    return "\n".join(lines)
