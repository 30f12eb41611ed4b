"""The column vocabulary: one name per meaning, common other spellings mapped, and what makes a row unusable.

======================================  ==============================================================================
``prompt``                              text or messages (also written ``problem``, ``question``, ``instruction``)
``completion`` / ``messages`` / ``text``  what is learned: a response (``response``, ``output``), a whole conversation
                                        (``conversations``: ShareGPT, converted), or raw text
``chosen``, ``rejected``                preferred and other sample: text, messages, image, list of views
``gold`` / ``generated``                a full target response / the policy's own response kept in the row
``answer``                              short verifiable truth (``ground_truth``, ``solution``)
``label``, ``class_id``, ``labels``     unpaired preference (bool) / class index / token labels
``images``                              always a list (``image`` becomes a list of one)
``margin``, ``weight``, ``*_logp``      numbers per row
``id``                                  unique
======================================  ==============================================================================
"""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmalign.errors import DataError

Message = dict[str, Any]

ALIASES: dict[str, str] = {
    "problem": "prompt", "question": "prompt", "instruction": "prompt",
    "response": "completion", "output": "completion",
    "conversations": "messages", "conversation": "messages",
    "demonstration": "gold", "reference_response": "generated",
    "ground_truth": "answer", "solution": "answer",
    "image": "images",
    "ref_chosen_logps": "ref_chosen_logp", "ref_rejected_logps": "ref_rejected_logp",
    "assistant_mask": "assistant_masks",
}
"""Other spellings -> the column they mean. They are mapped only where the data set lacks the column itself."""

LABEL_SOURCES = ("text", "messages", "completion", "input_ids")
"""Columns that each say, alone, what a single-sample row teaches: exactly one of them may be present."""

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
"""Roles a message may have."""

_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "model": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool",
}


@dataclass
class PreparationReport:
    """What became of a data set before training."""

    rows: int
    """Rows given."""
    kept: int
    """Rows left."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> number of rows dropped."""
    truncated: int = 0
    """Rows cut to the maximum length."""
    example: str = ""
    """One row as the model sees it, trained part marked."""

    def summary(self) -> str:
        """One line: rows kept, share truncated, what was dropped and why."""
        share = 100 * self.truncated / self.kept if self.kept else 0.0
        parts = [f"{self.kept} of {self.rows} rows kept", f"{share:.1f}% truncated"]
        parts += [f"{count} dropped: {reason}" for reason, count in sorted(self.dropped.items())]
        return "; ".join(parts)


def rename_plan(names: Sequence[str], mapping: Mapping[str, str | None] | None = None) -> dict[str, str | None]:
    """Which columns to rename (theirs -> ours) or to remove (theirs -> None).

    ``mapping`` is the user's ``data.columns`` and comes first; then :data:`ALIASES` apply wherever the column they
    mean is absent. Raises DataError for a mapped column that does not exist, for two columns mapped onto one name,
    and when two aliases of one column are present, since picking one would be a guess.
    """
    plan: dict[str, str | None] = {}
    for theirs, ours in (mapping or {}).items():
        if theirs not in names:
            raise DataError(f"data.columns.{theirs}: the data has no column {theirs!r}{_offer(theirs, names)}")
        plan[theirs] = ours
    targets = [plan.get(name, name) for name in names]
    doubled = sorted({target for target in targets if target is not None and targets.count(target) > 1})
    if doubled:
        sources = [name for name, target in zip(names, targets, strict=True) if target == doubled[0]]
        raise DataError(f"data.columns: columns {' and '.join(map(repr, sources))} would both be {doubled[0]!r}; "
                        f"map one of them to null to leave it out")
    claimed: dict[str, str] = {}
    for name in names:
        meaning = ALIASES.get(name)
        if name in plan or meaning is None or meaning in targets:
            continue
        if meaning in claimed:
            raise DataError(f"columns {claimed[meaning]!r} and {name!r} both mean {meaning!r}; say which with "
                            f"data.columns: {{{name}: {meaning}}} (or map one to null)")
        claimed[meaning] = name
    plan.update({theirs: ours for ours, theirs in claimed.items()})
    return {theirs: ours for theirs, ours in plan.items() if theirs != ours}


def canonical_row(row: Mapping[str, Any], plan: Mapping[str, str | None]) -> dict[str, Any]:
    """One row under our names and in our forms.

    Beside the renaming of ``plan``: ShareGPT turns become messages, an ``image`` becomes a list of one, and Alpaca's
    ``input`` is joined to the ``instruction`` it belongs to (a blank line between).
    """
    result: dict[str, Any] = {}
    for name, value in row.items():
        ours = plan.get(name, name)
        if ours is not None:
            result[ours] = value
    if plan.get("instruction") == "prompt" and isinstance(result.get("input"), str):
        extra = result.pop("input").strip()
        if extra and isinstance(result["prompt"], str):
            result["prompt"] = f"{result['prompt']}\n\n{extra}"
    if is_sharegpt(result.get("messages")):
        result["messages"] = from_sharegpt(result["messages"])
    if "images" in result and not isinstance(result["images"], (list, tuple)):
        result["images"] = [] if result["images"] is None else [result["images"]]
    return result


def is_sharegpt(value: Any) -> bool:
    """Whether ``value`` is a list of ``{"from": ..., "value": ...}`` turns."""
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], Mapping) and "from" in value[0]


def from_sharegpt(turns: Sequence[Mapping[str, Any]]) -> list[Message]:
    """ShareGPT turns as messages; raises DataError for an unknown speaker."""
    messages = []
    for turn in turns:
        speaker = str(turn.get("from"))
        if speaker not in _SHAREGPT_ROLES:
            raise DataError(f"conversations: unknown speaker {speaker!r}; known: {', '.join(sorted(_SHAREGPT_ROLES))}")
        messages.append({"role": _SHAREGPT_ROLES[speaker], "content": turn.get("value") or ""})
    return messages


def is_messages(value: Any) -> bool:
    """Whether ``value`` is a list of ``{"role": ..., "content": ...}`` messages (an empty list is not)."""
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], Mapping) and "role" in value[0]


def prompt_text(prompt: Any) -> str:
    """What a prompt says, the same for text and for a single user message, outer whitespace left out."""
    if is_messages(prompt):
        turns = [(str(message.get("role")), str(message.get("content")).strip()) for message in prompt]
        return turns[0][1] if len(turns) == 1 and turns[0][0] == "user" else "\n".join(f"{role}: {text}" for role, text in turns)
    return str(prompt).strip()


def check_messages(value: Any, *, column: str) -> list[Message]:
    """``value`` as clean messages; raises DataError for an empty list, a missing or unknown role.

    Keys whose value is None are left out (Arrow fills absent keys with None, and a template that asks
    ``message.tool_calls is defined`` would take them for given), and text-only content parts become one string.
    """
    if not isinstance(value, (list, tuple)) or not value:
        raise DataError(f"column {column!r}: expected a non-empty list of messages, not {_short(value)}")
    messages = []
    for position, message in enumerate(value):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ROLES:
            raise DataError(f"column {column!r}, message {position}: role must be one of {', '.join(sorted(ROLES))}, "
                            f"not {role!r}")
        clean = {key: item for key, item in message.items() if item is not None}
        clean["content"] = _plain_content(message.get("content"), f"column {column!r}, message {position}")
        messages.append(clean)
    return messages


def _plain_content(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, (list, tuple)):
        kinds = [part.get("type") if isinstance(part, Mapping) else type(part).__name__ for part in content]
        if all(kind == "text" for kind in kinds):
            return "".join(part.get("text") or "" for part in content)
        raise DataError(f"{where}: content parts {kinds} cannot be encoded as text; rows with images need a vision "
                        f"language model policy")
    raise DataError(f"{where}: content must be text, not {_short(content)}")


def split_implicit_prompt(example: Mapping[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """``example`` with an explicit ``prompt``: given, or the common start of the samples named in ``fields``.

    Messages: the prompt is the longest run of leading messages common to all samples that leaves each at least its
    last message. Strings: the common prefix, cut back to the last space so that no word is split. A given prompt
    that the samples repeat at their start is removed from them (as in data sets that store whole conversations).
    A text prompt beside samples that are messages becomes one user message.
    """
    result = dict(example)
    samples = [result[name] for name in fields]
    as_messages = [is_messages(sample) for sample in samples]
    if any(as_messages) and not all(as_messages):
        raise DataError(f"columns {', '.join(map(repr, fields))}: some samples are messages and others text; "
                        f"a row must use one form")
    if result.get("prompt") is None:
        if len(fields) < 2:
            raise DataError(f"no column 'prompt' beside {fields[0]!r}{_offer('prompt', list(example))}")
        shared = _common_messages(samples) if all(as_messages) else _common_text(samples)
        result["prompt"] = samples[0][:shared]
        result.update({name: sample[shared:] for name, sample in zip(fields, samples, strict=True)})
        return result
    if all(as_messages):
        prompt = result["prompt"]
        if isinstance(prompt, str):
            shared = _common_messages(samples)
            asked = [message.get("content") for message in samples[0][:shared] if message.get("role") == "user"]
            if any(isinstance(text, str) and text.strip() == prompt.strip() for text in asked):
                # Whole conversations: what they share (a system message, earlier turns) is the real prompt.
                result["prompt"] = list(samples[0][:shared])
                result.update({name: sample[shared:] for name, sample in zip(fields, samples, strict=True)})
                return result
            prompt = result["prompt"] = [{"role": "user", "content": prompt}]
        size = len(prompt)
        if all(len(sample) > size and _same_messages(sample[:size], prompt) for sample in samples):
            result.update({name: sample[size:] for name, sample in zip(fields, samples, strict=True)})
    elif is_messages(result["prompt"]):
        result.update({name: [{"role": "assistant", "content": sample}]
                       for name, sample in zip(fields, samples, strict=True)})
    return result


def _common_messages(samples: Sequence[Any]) -> int:
    limit = min(len(sample) for sample in samples) - 1
    shared = 0
    while shared < limit and all(_same_messages([sample[shared]], [samples[0][shared]]) for sample in samples):
        shared += 1
    return shared


def _same_messages(left: Sequence[Message], right: Sequence[Message]) -> bool:
    return all(a.get("role") == b.get("role") and a.get("content") == b.get("content")
               for a, b in zip(left, right, strict=True))


def _common_text(samples: Sequence[str]) -> int:
    shared = next((position for position, letters in enumerate(zip(*samples, strict=False)) if len(set(letters)) > 1),
                  min(map(len, samples)))
    if all(len(sample) == shared for sample in samples):
        return 0  # identical samples: no boundary to be found, and the row will be dropped
    while shared and not samples[0][shared - 1].isspace():
        shared -= 1
    return len(samples[0][:shared].rstrip())


def require_columns(names: Sequence[str], required: Iterable[str], *, purpose: str) -> None:
    """Raise DataError naming the first missing column, what there is, and the nearest, unless all are present."""
    for column in required:
        if column not in names:
            raise DataError(f"{purpose} needs a column {column!r}, which the data lacks{_offer(column, names)}")


def label_source(names: Iterable[str]) -> str:
    """The one column that says what a single-sample row teaches; raises DataError for none or for several."""
    names = list(names)
    present = [name for name in LABEL_SOURCES if name in names]
    if not present:
        hint = (" To learn the answers, map them: data.columns: {answer: completion}."
                if "prompt" in names and "answer" in names else "")
        raise DataError(f"rows need one of the columns 'text', 'messages', 'prompt' and 'completion', or 'input_ids'"
                        f"{_offer('completion', names)}{hint}")
    if len(present) > 1:
        raise DataError(f"columns {' and '.join(map(repr, present))} each say what to learn; leave one out with "
                        f"data.columns: {{{present[-1]}: null}}")
    if present[0] == "completion" and "prompt" not in names:
        raise DataError(f"column 'completion' needs a column 'prompt' beside it{_offer('prompt', names)}")
    return present[0]


def check_rows(count: int, *, source: str) -> None:
    """Raise DataError when a data set has no rows."""
    if count == 0:
        raise DataError(f"{source}: the data set has no rows")


def check_ids(ids: Iterable[Any], *, source: str) -> None:
    """Raise DataError when two rows share an ``id``: results are stored and compared under it."""
    seen: set[Hashable] = set()
    for position, value in enumerate(ids):
        if value is None or not isinstance(value, Hashable):
            raise DataError(f"{source}: row {position} has the id {_short(value)}; ids are text or numbers")
        if value in seen:
            raise DataError(f"{source}: id {value!r} occurs more than once; make ids unique, or leave the column out "
                            f"with data.columns: {{id: null}} to number the rows")
        seen.add(value)


def _offer(wanted: str, names: Sequence[str]) -> str:
    """`` (columns are ...); did you mean ...?``, looking at names and at aliases of the wanted column."""
    there = f" (columns are {', '.join(map(str, names)) or 'none'})"
    meant = [name for name in names if ALIASES.get(name) == wanted]
    close = meant or difflib.get_close_matches(wanted, list(map(str, names)), n=1, cutoff=0.6)
    return f"{there}; did you mean {close[0]!r}? Map it with data.columns: {{{close[0]}: {wanted}}}" if close else there


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
