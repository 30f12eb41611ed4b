"""Rows of text, prompt and completion, or messages -> token ids and labels, and prompts -> token ids.

``labels`` are not shifted: ``labels[t]`` is ``input_ids[t]`` where the loss counts the prediction of that token and
-100 elsewhere; position 0 is never predicted, so its label is always -100.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from pydantic import AliasChoices, Field

from mmalign.config import Options
from mmalign.data.columns import Message, check_messages, is_messages, label_source, split_implicit_prompt
from mmalign.data.turns import ChatTemplate, Turn, common_prefix, render_chat, trainable_messages
from mmalign.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("mmalign.data")

IGNORED = -100
"""Label of a token that no loss counts."""

NO_TRAINABLE_TOKEN = "no token to train on"
PROMPT_TOO_LONG = "the prompt alone reaches max_length"
TOO_LONG = "longer than max_length"
IDENTICAL = "chosen and rejected are identical"
GOLD_IS_REJECTED = "gold and rejected are identical"


class TextEncoding(Options):
    """How rows become token ids and which tokens are learned."""

    max_length: int | None = Field(
        default=1024, validation_alias=AliasChoices("max_length", "cutoff_len", "sequence_len"),
    )
    """Longest row in tokens; null takes the tokenizer's own limit."""
    truncation: Literal["keep_start", "balanced", "drop"] = "keep_start"
    """A row that is too long: keep its start; share the room between prompt and completion in proportion; drop it."""
    completion_only_loss: bool | None = None
    """Learn the completion (assistant turns of messages) only; null: except for text rows. False: the prompt as well."""
    last_turn_only: bool = False
    """Of a conversation, learn the last assistant turn only."""
    train_on_eos: Literal["turn", "all", "last", "none"] = "turn"
    """End tokens to learn: those of the learned turns, of every turn, of the last learned turn, none."""
    train_on_separator: bool = False
    """Learn the white space a template writes after an end token (it is never generated)."""
    append_eos: bool = True
    """End text and plain completions with the end-of-sequence token where they lack it."""
    template_arguments: dict[str, Any] = {}
    """Further variables of the chat template, such as ``enable_thinking: false``."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse values without a meaning."""
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length must be at least 2 tokens (or null), not {self.max_length}")


@dataclass(frozen=True)
class Dropped:
    """A row that cannot be trained on, and why."""

    reason: str


@dataclass(frozen=True)
class _Encoded:
    """One sample before truncation: ``target`` is where the part to be learned begins."""

    ids: list[int]
    labels: list[int]
    target: int
    header: int = 0
    """Tokens right before ``target`` that open the assistant's turn and must survive a cut of the prompt."""


def build_labels(
    ids: Sequence[int], turns: Sequence[Turn], trained: frozenset[int], template: ChatTemplate, options: TextEncoding,
) -> list[int]:
    """Labels ``[T]`` of a conversation: the words of the ``trained`` turns and the end tokens the options ask for."""
    labels = [IGNORED] * len(ids)
    learned = [turn for turn in turns if turn.message in trained]
    for turn in learned:
        words, end, separator = template.parts(ids, turn)
        last = turn is learned[-1]
        keep = list(words)
        if options.train_on_eos in ("turn", "all") or (options.train_on_eos == "last" and last):
            keep += end
        if options.train_on_separator:
            keep += separator
        for position in keep:
            labels[position] = ids[position]
    if options.train_on_eos == "all":
        for position, token in enumerate(ids):
            if token in template.end_ids:
                labels[position] = token
    return labels


class TextEncoder:
    """Encodes rows with one tokenizer and one set of options; what is the same for all rows is found out once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: TextEncoding | None = None) -> None:
        self.tokenizer = tokenizer
        self.options = options or TextEncoding()
        self.template = ChatTemplate(tokenizer, self.options.template_arguments)
        window = self.options.max_length or tokenizer.model_max_length
        self.max_length = window if window < 10**9 else None  # transformers writes 1e30 for "unknown"
        self.prefix = special_prefix(tokenizer)
        if self.options.append_eos and tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end-of-sequence token to end completions with; set "
                            "tokenizer.eos_token, or append_eos: false")

    def encode(self, example: Mapping[str, Any], fields: Sequence[str] = ()) -> dict[str, Any] | Dropped:
        """Ids and labels of one row (see :func:`encode_example`)."""
        samples = self.samples(example, fields)
        if isinstance(samples, Dropped):
            return samples
        cut, truncated = self._cut(list(samples.values()))
        result: dict[str, Any] = {}
        for name, sample in zip(samples, cut, strict=True):
            if not any(label != IGNORED for label in sample.labels):
                whole = samples[name].labels
                lost = any(label != IGNORED for label in whole)
                return Dropped(PROMPT_TOO_LONG if lost else NO_TRAINABLE_TOKEN)
            prefix = f"{name}_" if name else ""
            result[f"{prefix}input_ids"], result[f"{prefix}labels"] = sample.ids, sample.labels
        if truncated and self.options.truncation == "drop":
            return Dropped(TOO_LONG)
        if {"chosen", "rejected"} <= set(samples) and result["chosen_input_ids"] == result["rejected_input_ids"]:
            return Dropped(IDENTICAL)
        if {"gold", "rejected"} <= set(samples) and result["gold_input_ids"] == result["rejected_input_ids"]:
            return Dropped(GOLD_IS_REJECTED)
        return {**result, "truncated": truncated}

    def samples(self, example: Mapping[str, Any], fields: Sequence[str] = ()) -> dict[str, _Encoded] | Dropped:
        """Every sample of a row at full length, by field (``""`` for the only sample of a row)."""
        if not fields:
            return {"": self._single(example)}
        if all(example.get(f"{name}_input_ids") is not None for name in fields):
            return {name: self._tokenised(example, f"{name}_") for name in fields}
        row = split_implicit_prompt(example, fields)
        if {"chosen", "rejected"} <= set(fields) and row["chosen"] == row["rejected"]:
            return Dropped(IDENTICAL)
        return {name: self._pair(row["prompt"], row[name], name, example) for name in fields}

    def _single(self, example: Mapping[str, Any]) -> _Encoded:
        source = label_source([name for name, value in example.items() if value is not None])
        if source == "input_ids":
            return self._tokenised(example, "")
        if source == "text":
            return self._text(example["text"])
        if source == "messages":
            return self._conversation(example["messages"], 0, "messages", example)
        row = split_implicit_prompt(example, ("completion",))
        return self._pair(row["prompt"], row["completion"], "completion", example)

    def _pair(self, prompt: Any, sample: Any, column: str, example: Mapping[str, Any]) -> _Encoded:
        if is_messages(sample):
            return self._conversation([*prompt, *sample], len(prompt), column, example)
        if not isinstance(prompt, str) or not isinstance(sample, str):
            raise DataError(f"columns 'prompt' and {column!r} must be text or messages, not "
                            f"{type(prompt).__name__} and {type(sample).__name__}")
        return self._completion(prompt, sample)

    def _text(self, text: Any) -> _Encoded:
        if not isinstance(text, str):
            raise DataError(f"column 'text' must be text, not {type(text).__name__}")
        if self.options.completion_only_loss:
            raise DataError("completion_only_loss: true needs rows with prompt and completion, or messages; these "
                            "have only 'text'")
        ids = self.with_specials(text)
        return _Encoded(ids, self._learn_from(ids, 0), 0)

    def _completion(self, prompt: str, completion: str) -> _Encoded:
        prompt_ids = self.with_specials(prompt, end=False)
        ids = self.with_specials(prompt + completion)
        # Tokens may merge across the boundary: what differs from the prompt alone belongs to the completion.
        target = common_prefix(prompt_ids, ids)
        if target < len(prompt_ids):
            _note_once("some tokens span prompt and completion; they count as completion. Start completions with the "
                       "white space that separates them from the prompt to avoid it")
        start = 0 if self.options.completion_only_loss is False else target
        return _Encoded(ids, self._learn_from(ids, start), target)

    def _learn_from(self, ids: list[int], start: int) -> list[int]:
        labels = [IGNORED] * start + ids[start:]
        if self.options.append_eos and self.options.train_on_eos == "none" and len(ids) > start:
            labels[-1] = IGNORED
        return _without_first(labels)

    def _conversation(
        self, messages: Sequence[Message], first: int, column: str, example: Mapping[str, Any],
    ) -> _Encoded:
        clean, trained = trainable_messages(messages, column=column, first=first,
                                            last_turn_only=self.options.last_turn_only)
        ids, turns = self.template.encode(clean, template_variables(example))
        if self.options.completion_only_loss is False:
            labels = list(ids)
        else:
            labels = build_labels(ids, turns, trained, self.template, self.options)
        starts = [turn.start for turn in turns if turn.message in trained]
        # One target: the completion's first turn when there is a prompt, else the conversation's last turn.
        target = (starts[0] if first else starts[-1]) if starts else len(ids)
        return _Encoded(ids, _without_first(labels), target, self._header(ids, target))

    def _header(self, ids: Sequence[int], target: int) -> int:
        """Tokens before ``target`` back to the end token of the message before it, that token included."""
        at = target - 1
        while at >= 0 and ids[at] not in self.template.end_ids:
            at -= 1
        size = target - at
        return size if at >= 0 and size <= 16 else 0  # a longer gap holds words, not a header

    def _tokenised(self, example: Mapping[str, Any], prefix: str) -> _Encoded:
        ids = list(example[f"{prefix}input_ids"])
        given = [name for name in ("labels", "completion_mask", "assistant_masks")
                 if example.get(f"{prefix}{name}") is not None]
        if "labels" in given and len(given) > 1:
            raise DataError(f"columns {' and '.join(repr(prefix + name) for name in given)} both say which tokens to "
                            f"learn; keep one of them")
        labels = list(ids)
        for name in given:
            column = list(example[f"{prefix}{name}"])
            if len(column) != len(ids):
                raise DataError(f"column {prefix + name!r} has {len(column)} entries, but {prefix + 'input_ids'!r} has "
                                f"{len(ids)}")
            if name == "labels":
                labels = column
            else:
                labels = [label if keep else IGNORED for label, keep in zip(labels, column, strict=True)]
        if not ids:
            raise DataError(f"column {prefix + 'input_ids'!r} is empty")
        labels = _without_first(labels)
        return _Encoded(ids, labels, next((i for i, label in enumerate(labels) if label != IGNORED), len(ids)))

    def _cut(self, samples: list[_Encoded]) -> tuple[list[_Encoded], bool]:
        """Samples of one row cut to the maximum length; all keep the same prompt."""
        limit = self.max_length
        if limit is None or all(len(sample.ids) <= limit for sample in samples):
            return samples, False
        if self.options.truncation == "balanced":
            source, target = samples[0].target, max(len(sample.ids) - sample.target for sample in samples)
            room, budget = balanced_lengths(source, target, limit)
            samples = [_shorten(sample, room, budget) for sample in samples]
        return [replace(sample, ids=sample.ids[:limit], labels=sample.labels[:limit]) for sample in samples], True

    def with_specials(self, text: str, *, end: bool = True) -> list[int]:
        """Plain text as ids: exactly one BOS where the tokenizer writes one, and one EOS if ``end`` and asked for."""
        ids = encode_rendered(text, self.tokenizer)
        if ids[: len(self.prefix)] != self.prefix:
            ids = [*self.prefix, *ids]
        if end and self.options.append_eos and (not ids or ids[-1] != self.tokenizer.eos_token_id):
            ids.append(self.tokenizer.eos_token_id)
        return ids

    def prompt(self, prompt: str | Sequence[Message], example: Mapping[str, Any] | None = None) -> list[int]:
        """Ids of a prompt to be continued (see :func:`encode_prompt`)."""
        if isinstance(prompt, str):
            return self.with_specials(prompt, end=False)
        messages = check_messages(prompt, column="prompt")
        extra = template_variables(example or {})
        tools = extra.pop("tools", None)
        prefill = messages[-1]["role"] == "assistant"
        text = render_chat(messages, self.tokenizer, generation_prompt=not prefill, continue_final=prefill, tools=tools,
                           template_arguments={**self.options.template_arguments, **extra})
        return encode_rendered(text, self.tokenizer)


def balanced_lengths(source: int, target: int, capacity: int) -> tuple[int, int]:
    """Tokens of a prompt and of a completion to keep in ``capacity``: the short one whole, else in proportion."""
    if source + target <= capacity:
        return source, target
    if 2 * target < capacity:
        kept = target
    elif 2 * source < capacity:
        kept = capacity - source
    else:
        kept = int(capacity * target / (source + target))
    return capacity - kept, kept


def _shorten(sample: _Encoded, room: int, budget: int) -> _Encoded:
    header = sample.header if sample.header < room else 0
    cut = room - header
    keep = [*range(min(cut, sample.target - header)), *range(sample.target - header, sample.target)] \
        if sample.target > room else list(range(sample.target))
    keep += range(sample.target, min(len(sample.ids), sample.target + budget))
    return replace(sample, ids=[sample.ids[i] for i in keep],
                   labels=_without_first([sample.labels[i] for i in keep]))


def _without_first(labels: list[int]) -> list[int]:
    return [IGNORED, *labels[1:]] if labels else labels


def template_variables(example: Mapping[str, Any]) -> dict[str, Any]:
    """What a row hands to its chat template: ``tools`` (a list, or JSON text) and ``chat_template_kwargs``."""
    import json

    variables = dict(example.get("chat_template_kwargs") or {})
    tools = example.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise DataError(f"column 'tools' is not valid JSON: {error}") from None
    if tools:
        variables["tools"] = list(tools)
    return variables


@lru_cache(maxsize=8)
def _note_once(message: str) -> None:
    logger.warning(message)


def special_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids the tokenizer writes before plain text (a BOS), or an empty list."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    framed = list(tokenizer("a")["input_ids"])
    for start in range(len(framed) - len(bare) + 1):
        if framed[start : start + len(bare)] == bare:
            return framed[:start]
    return []


def encode_rendered(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of text that already holds its special tokens (a rendered conversation): none are added."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_example(
    example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, options: TextEncoding | None = None, *,
    fields: Sequence[str] = (),
) -> dict[str, Any] | Dropped:
    """One row as ``input_ids`` and ``labels`` (lists of int, equal length), or why it cannot be trained on.

    ``fields=()`` takes ``text``; ``messages``; ``prompt`` and ``completion`` (both text or messages); or ``input_ids``
    with at most one of ``labels`` and the masks ``completion_mask``, ``assistant_masks``. With
    ``fields=("chosen", "rejected", ...)`` each field gives ``<field>_input_ids`` and ``<field>_labels`` from the
    ``prompt`` (or the samples' common start) followed by that field. ``truncated`` tells whether anything was cut.
    Raises DataError for a malformed row. For many rows build one :class:`TextEncoder` instead.
    """
    return TextEncoder(tokenizer, options).encode(example, fields)


def encode_prompt(
    prompt: str | Sequence[Message], tokenizer: PreTrainedTokenizerBase, *,
    template_arguments: Mapping[str, Any] | None = None,
) -> list[int]:
    """Ids of a prompt for sampling: text as plain text, messages through the chat template with generation prompt.

    Exactly the ids that precede the completion when the same prompt is trained on. A last message of the assistant is
    left open to be continued. An end token that the tokenizer adds to plain text is left out.
    """
    options = TextEncoding(append_eos=False, template_arguments=dict(template_arguments or {}))
    return TextEncoder(tokenizer, options).prompt(prompt)


def decode_completion(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of sampled ids, without special tokens."""
    text = tokenizer.decode(list(ids), skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def mark_trained(ids: Sequence[int], labels: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The row's text with every stretch of trained tokens between ⟦ and ⟧."""
    pieces: list[str] = []
    start = 0
    while start < len(ids):
        learned = labels[start] != IGNORED
        stop = start
        while stop < len(ids) and (labels[stop] != IGNORED) == learned:
            stop += 1
        text = tokenizer.decode(list(ids[start:stop]), skip_special_tokens=False)
        pieces.append(f"⟦{text}⟧" if learned else str(text))
        start = stop
    return "".join(pieces)
