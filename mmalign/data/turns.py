"""Chat templates: rendering, and where the assistant's own words lie in a rendered conversation.

A loss mask must cover every assistant turn with its end token and nothing else, whatever the template. Three ways,
in this order:

1. ``{% generation %}`` marks, when the template has them and they give one run per assistant message;
2. incremental prefix rendering: the template is rendered up to each turn and after it, and both renderings must be
   prefixes of the full one (then their lengths are the turn's boundaries, to the character);
3. for a turn where they are not (a template that drops the reasoning of earlier turns, say), the message's text is
   searched in the full rendering, where it must stand before an end-of-turn token.

If none works the row is refused: a wrong mask trains a wrong model without any sign of it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from mmalign.data.columns import Message, check_messages
from mmalign.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("mmalign.data")

Render = Callable[[Sequence[Message], bool], str]
"""``(messages, generation prompt?) -> text``."""

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")
_THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL)


@dataclass(frozen=True)
class Turn:
    """One assistant message in a rendered conversation: ``[start, stop)`` in characters or in tokens."""

    message: int
    """Index of the message."""
    start: int
    stop: int
    complete: bool = True
    """Whether the span reaches the end of the turn (end token included) and not only the end of its text."""


def render_chat(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, generation_prompt: bool = False,
    continue_final: bool = False, tools: Sequence[Any] | None = None,
    template_arguments: Mapping[str, Any] | None = None,
) -> str:
    """The conversation as the tokenizer's chat template writes it.

    ``generation_prompt`` appends the header of an assistant turn; ``continue_final`` leaves the last message open, to
    be continued. Raises DataError when the tokenizer has no template or the template refuses the messages.
    """
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tools=list(tools) if tools else None, tokenize=False,
            add_generation_prompt=generation_prompt, continue_final_message=continue_final,
            **dict(template_arguments or {}),
        )
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        if not getattr(tokenizer, "chat_template", None):
            raise DataError("the rows hold messages, but the tokenizer has no chat template; take an instruction "
                            "model, set tokenizer.chat_template, or give prompt and completion as text") from None
        raise DataError(f"the chat template refuses these messages: {error}") from None
    assert isinstance(text, str)
    return text


def assistant_spans(
    messages: Sequence[Message], render: Render, *, end_of_turn: str = "",
) -> tuple[str, list[Turn]]:
    """The full rendering and the character span of every assistant message in it.

    ``end_of_turn`` is the text that closes an assistant turn (:func:`end_of_turn_text`); it makes the search of step 3
    safe. Raises DataError for a turn that cannot be located.
    """
    text = render(messages, False)
    turns: list[Turn] = []
    cursor = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        # The header of the turn belongs to the prompt: it is what the generation prompt adds.
        opening = render(messages[:index], True) if index else None
        start = len(opening) if opening is not None and text.startswith(opening) else None
        closing = text if index == len(messages) - 1 else render(messages[: index + 1], False)
        if start is not None and text.startswith(closing) and len(closing) > start:
            turn = Turn(index, start, len(closing))
        else:
            if start is None:
                # Other messages may hold the same words: pass the ones since the last turn first.
                for other in messages[turns[-1].message + 1 if turns else 0 : index]:
                    cursor = _find_words(text, other["content"].strip(), cursor, end_of_turn, sure=False) or cursor
            turn = _search_turn(text, message["content"], index, max(cursor, start or 0), start, end_of_turn)
        inserted = _EMPTY_THOUGHT.match(text, turn.start, turn.stop)
        if inserted and "<think>" not in message["content"]:
            # An empty thought that the template wrote is no choice of the assistant; white space that begins its words is.
            content = message["content"]
            own = inserted.end() - (len(content) - len(content.lstrip()))
            turn = replace(turn, start=own if text.startswith(content, own) else inserted.end())
        turns.append(turn)
        cursor = turn.stop
    if turns:
        _check_reasoning(text[turns[-1].start:turns[-1].stop], messages[turns[-1].message]["content"])
    return text, turns


def _find_words(text: str, words: str, cursor: int, end_of_turn: str, *, sure: bool = True) -> int | None:
    """Where ``words`` end: at an end of turn when there is one, else (if not ``sure``) at their first occurrence.

    When the template has no end-of-turn text, words that occur only once are found for sure as well.
    """
    first = found = text.find(words, cursor) if words else -1
    while found >= 0:
        stop = found + len(words)
        after = text[stop : stop + len(end_of_turn) + 16].lstrip()
        if after.startswith(end_of_turn) if end_of_turn else text.find(words, found + 1) < 0:
            return stop
        found = text.find(words, found + 1)
    return None if sure or first < 0 else first + len(words)


def _search_turn(text: str, content: str, index: int, cursor: int, opened: int | None, end_of_turn: str) -> Turn:
    for words in dict.fromkeys((content.strip(), content.rpartition("</think>")[2].strip())):
        stop = _find_words(text, words, cursor, end_of_turn)
        if stop is not None:
            # After a verified header everything up to the end token is the turn, inserted text included.
            return Turn(index, stop - len(words) if opened is None else opened, stop, complete=False)
    raise DataError(
        f"cannot tell which part of the conversation message {index} (assistant) is: the chat template does not keep "
        f"earlier text as it is, and the message is not found in the result. Use a template with "
        f"{{% generation %}} marks, or give the row as prompt and completion."
    )


@lru_cache(maxsize=1)
def _warn_once(message: str) -> None:
    logger.warning(message)


def _check_reasoning(rendered: str, content: str) -> None:
    thought = _THOUGHT.search(content)
    if thought and thought.group(1).strip() and thought.group(1).strip() not in rendered:
        _warn_once("the chat template removes the <think> part of the last assistant message: the model is trained on "
                   "the answer without its reasoning")


def end_of_turn_text(render: Render) -> str:
    """What the template writes right after an assistant's words, without surrounding white space ("" if nothing)."""
    words = "mmalign-probe"
    try:
        text = render([{"role": "user", "content": "hello"}, {"role": "assistant", "content": words}], False)
    except DataError:
        return ""
    return text.rpartition(words)[2].strip() if words in text else ""


def pre_query_prefix(
    tokenizer: PreTrainedTokenizerBase, *, system: str | None = None, history: Sequence[Message] = (),
    template_arguments: Mapping[str, Any] | None = None,
) -> str:
    """Everything the template writes before a user's words (default system message included).

    An aligned model that continues this text writes an instruction by itself (Magpie, Xu et al. 2024,
    arXiv 2406.08464). Tokenise it with :func:`mmalign.data.encoding.encode_rendered`, which adds no second BOS. Raises
    DataError when the template has no place for a user message.
    """
    words = "mmalign-probe"
    messages: list[Message] = [{"role": "system", "content": system}] if system is not None else []
    messages += [*history, {"role": "user", "content": words}]
    text = render_chat(messages, tokenizer, template_arguments=template_arguments)
    if words not in text:
        raise DataError("the chat template drops user messages, so there is no text that comes before one")
    return text[: text.rindex(words)]


class ChatTemplate:
    """A tokenizer's template, ready to give token ids and assistant turns of many conversations."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template_arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.arguments = dict(template_arguments or {})
        template = getattr(tokenizer, "chat_template", None)
        self.marked = bool(tokenizer.is_fast and isinstance(template, str) and _GENERATION_MARK.search(template))
        self.end_text = end_of_turn_text(self._renderer({})) if template else ""
        added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special_ids = frozenset(added | set(tokenizer.all_special_ids))
        tail = tokenizer(self.end_text, add_special_tokens=False)["input_ids"] if self.end_text else []
        closing = next((index for index in tail if index in self.special_ids), None)
        self.end_ids = frozenset({closing, tokenizer.eos_token_id} - {None})

    def _renderer(self, extra: Mapping[str, Any]) -> Render:
        arguments = {**self.arguments, **{key: value for key, value in extra.items() if key != "tools"}}
        tools = extra.get("tools")

        def render(messages: Sequence[Message], generation_prompt: bool) -> str:
            return render_chat(messages, self.tokenizer, generation_prompt=generation_prompt, tools=tools,
                               template_arguments=arguments)

        return render

    def encode(
        self, messages: Sequence[Message], extra: Mapping[str, Any] | None = None,
    ) -> tuple[list[int], list[Turn]]:
        """Token ids of the whole conversation and the token span of each assistant turn.

        ``extra`` may hold ``tools`` and further template variables of this row. The conversation is tokenised once,
        without adding special tokens: the template alone decides on a BOS.
        """
        extra = extra or {}
        if self.marked:
            marked = self._marked(messages, extra)
            if marked is not None:
                return marked
        text, spans = assistant_spans(messages, self._renderer(extra), end_of_turn=self.end_text)
        ids, turns = self._locate(text, spans)
        return ids, [self._closed(ids, turn) for turn in turns]

    def _locate(self, text: str, spans: Sequence[Turn]) -> tuple[list[int], list[Turn]]:
        if self.tokenizer.is_fast:
            encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
            turns = []
            for span in spans:
                # A token that straddles the start belongs to the turn: the prompt alone does not contain it.
                start = next((i for i, (_, end) in enumerate(offsets) if end > span.start), len(ids))
                stop = next((i for i in range(start, len(ids)) if offsets[i][0] >= span.stop), len(ids))
                turns.append(replace(span, start=start, stop=stop))
            return list(ids), turns
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]

        def position(characters: int) -> int:
            return common_prefix(self.tokenizer(text[:characters], add_special_tokens=False)["input_ids"], ids)

        return list(ids), [replace(span, start=position(span.start), stop=position(span.stop)) for span in spans]

    def _marked(self, messages: Sequence[Message], extra: Mapping[str, Any]) -> tuple[list[int], list[Turn]] | None:
        """Ids and turns from the template's own marks, or None when they do not give one run per assistant message."""
        arguments = {**self.arguments, **{key: value for key, value in extra.items() if key != "tools"}}
        # A template that refuses the messages gives our error here, and not its own below.
        render_chat(messages, self.tokenizer, tools=extra.get("tools"), template_arguments=arguments)
        encoding: Any = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages], tools=extra.get("tools"), tokenize=True, return_dict=True,
            return_assistant_tokens_mask=True, **arguments,
        )
        ids, mask = list(encoding["input_ids"]), encoding["assistant_masks"]
        edges = [i for i in range(len(ids) + 1) if (mask[i] if i < len(ids) else 0) != (mask[i - 1] if i else 0)]
        speakers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if len(edges) != 2 * len(speakers):
            return None
        return ids, [self._closed(ids, Turn(speaker, edges[2 * n], edges[2 * n + 1], complete=False))
                     for n, speaker in enumerate(speakers)]

    def _closed(self, ids: Sequence[int], turn: Turn) -> Turn:
        """An incomplete turn extended by the end token after its span (if it stops short of it) and its separator."""
        if turn.complete:
            return turn
        stop = turn.stop
        if turn.stop == turn.start or self._closing(ids, turn)[0] == turn.stop:
            stop = self._past_space(ids, stop)
            if stop == len(ids) or ids[stop] not in self.end_ids:
                return turn
            stop += 1
        return replace(turn, stop=self._past_space(ids, stop))

    def _past_space(self, ids: Sequence[int], position: int) -> int:
        """The first position from ``position`` on that is a special token or holds more than white space."""
        while position < len(ids) and ids[position] not in self.special_ids and self._is_space(ids[position]):
            position += 1
        return position

    def _is_space(self, token: int) -> bool:
        return not str(self.tokenizer.decode([token])).strip()

    def _closing(self, ids: Sequence[int], turn: Turn) -> tuple[int, int]:
        """``(first end token, first separator token)`` of a turn; both ``turn.stop`` when it has no end token."""
        separator = turn.stop
        while separator > turn.start and ids[separator - 1] not in self.special_ids:
            if not self._is_space(ids[separator - 1]):
                return turn.stop, turn.stop
            separator -= 1
        end = separator
        while end > turn.start and ids[end - 1] in self.special_ids:
            end -= 1
        return (end, separator) if end < separator else (turn.stop, turn.stop)

    def parts(self, ids: Sequence[int], turn: Turn) -> tuple[range, range, range]:
        """A turn's positions as (words, end tokens, separator after them)."""
        end, separator = self._closing(ids, turn)
        return range(turn.start, end), range(end, separator), range(separator, turn.stop)


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the longest common prefix of two id sequences."""
    size = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        size += 1
    return size


def trainable_messages(
    messages: Sequence[Message], *, column: str, first: int = 0, last_turn_only: bool = False,
) -> tuple[list[Message], frozenset[int]]:
    """Clean messages, and the indices of the assistant messages to learn from.

    Messages before ``first`` are the prompt. ``last_turn_only`` keeps the last assistant message alone; a
    message's own ``train: true`` or ``false`` overrides both ways.
    """
    clean = check_messages(messages, column=column)
    speakers = [index for index, message in enumerate(clean) if message["role"] == "assistant"]
    wanted = set()
    for index, message in enumerate(clean):
        flag = message.pop("train", None)
        if flag and message["role"] != "assistant":
            raise DataError(f"column {column!r}, message {index}: train: true is for assistant messages, not for "
                            f"role {message['role']!r}")
        recent = not last_turn_only or index == speakers[-1] if speakers else False
        if message["role"] == "assistant" and index >= first and (flag if flag is not None else recent):
            wanted.add(index)
    return clean, frozenset(wanted)
