"""Rewards on text: formats, exact answers and lengths.

Every function takes strings or message lists and runs unchanged in TRL's GRPOTrainer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import torch

from mmalign.core.advantages import overlong_penalty
from mmalign.errors import RewardError
from mmalign.metrics.hierarchy import path_matching_score
from mmalign.rewards.registry import reward

Unit = Literal["tokens", "characters", "words"]


def completion_text(completion: Any) -> str:
    """The text of a completion: the string itself, or the text of the assistant's messages joined by newlines.

    Content given as blocks contributes its text blocks. Raises RewardError for anything else.
    """
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Mapping):
        completion = [completion]
    if not isinstance(completion, Sequence) or not all(isinstance(m, Mapping) for m in completion):
        raise RewardError(f"completion {completion!r:.100} is neither text nor messages; this reward scores text")
    return "\n".join(message_text(m) for m in completion if m.get("role", "assistant") == "assistant")


def message_text(message: Mapping[str, Any]) -> str:
    """The text of one message, text blocks joined; empty for a message that only calls tools."""
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(str(block.get("text", "")) for block in content if isinstance(block, Mapping))


@lru_cache(maxsize=64)
def _compiled(pattern: str, flags: int) -> re.Pattern[str]:
    try:
        return re.compile(pattern, flags)
    except re.error as error:
        raise RewardError(f"pattern={pattern!r} is not a regular expression: {error}") from None


@reward("regex_match", aliases=("regex",), range=(0, 1))
def regex_match(
    prompts: Sequence[Any], completions: Sequence[Any], *, pattern: str,
    method: Literal["search", "match", "fullmatch"] = "search", dotall: bool = True, ignore_case: bool = False,
    **columns: Any,
) -> list[float]:
    """1 where the completion matches ``pattern``, else 0.

    ``method`` is the function of :mod:`re`: anywhere ("search"), from the start ("match") or as a whole
    ("fullmatch"). ``dotall``: ``.`` also matches newlines.
    """
    if method not in ("search", "match", "fullmatch"):
        raise RewardError(f"method={method!r} is unknown; allowed: search, match, fullmatch")
    compiled = _compiled(pattern, (re.DOTALL if dotall else 0) | (re.IGNORECASE if ignore_case else 0))
    return [float(getattr(compiled, method)(completion_text(c)) is not None) for c in completions]


@reward("format_tags", range=(0, 1))
def format_tags(
    prompts: Sequence[Any], completions: Sequence[Any], *, tags: Sequence[str] = ("think", "answer"),
    dotall: bool = True, **columns: Any,
) -> list[float]:
    """1 where the whole completion is ``<a>...</a>``, optional whitespace, ``<b>...</b>`` for the ``tags`` in order.

    Text before the first or after the last tag gives 0. With ``dotall=False`` a tag's content must be one line.
    The format reward of CLS-RL (Li et al. 2025, arXiv 2503.16188) and, before it, of DeepSeek-R1 (arXiv 2501.12948).
    """
    if not tags or not all(re.fullmatch(r"[\w-]+", tag) for tag in tags):
        raise RewardError(f"tags={list(tags)!r} must be one or more plain names such as [think, answer]")
    pattern = r"\s*".join(rf"<{tag}>.*?</{tag}>" for tag in tags)
    compiled = _compiled(pattern, re.DOTALL if dotall else 0)
    return [float(compiled.fullmatch(completion_text(c)) is not None) for c in completions]


@reward("exact_match", aliases=("exact_equality",), range=(0, 1), needs=("answer",))
def exact_match(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str | None], *,
    normalize: Literal["none", "strip", "casefold"] = "none", **columns: Any,
) -> list[float | None]:
    """1 where the completion equals ``answer`` character for character, else 0; None where the answer is None.

    ``normalize``: "strip" ignores outer whitespace, "casefold" also upper and lower case. The default is strict, as
    in No-Thinking-CLS-RL (Li et al. 2025, arXiv 2503.16188): any thought, tag, space or full stop scores 0.
    """
    fold = _NORMALIZERS.get(normalize)
    if fold is None:
        raise RewardError(f"normalize={normalize!r} is unknown; allowed: {', '.join(_NORMALIZERS)}")
    return [
        None if truth is None else float(fold(completion_text(c)) == fold(nonempty(truth)))
        for c, truth in zip(completions, answer, strict=True)
    ]


_NORMALIZERS: dict[str, Callable[[str], str]] = {
    "none": str, "strip": str.strip, "casefold": lambda text: text.strip().casefold(),
}


def nonempty(truth: Any) -> str:
    """``truth`` as text; raises RewardError when it is empty, because an empty completion would then be right."""
    text = str(truth)
    if not text.strip():
        raise RewardError("answer is empty, so an empty completion would be rewarded; drop the row or use null")
    return text


def lengths(completions: Sequence[Any], unit: Unit, completion_ids: Sequence[Sequence[int]] | None) -> list[int]:
    """Length of every completion in ``unit``; raises RewardError when tokens are asked for but not known."""
    if unit == "tokens":
        if completion_ids is None:
            raise RewardError("unit='tokens' needs completion_ids, which this rollout lacks; use characters or words")
        return [len(ids) for ids in completion_ids]
    if unit == "characters":
        return [len(completion_text(c)) for c in completions]
    if unit == "words":
        return [len(completion_text(c).split()) for c in completions]
    raise RewardError(f"unit={unit!r} is unknown; allowed: tokens, characters, words")


@reward("within_length", range=(0, 1))
def within_length(
    prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]] | None = None, *,
    max_length: int, min_length: int = 0, unit: Unit = "tokens", **columns: Any,
) -> list[float]:
    """1 where ``min_length <= length <= max_length``, else 0."""
    if not 0 <= min_length <= max_length:
        raise RewardError(f"min_length={min_length} and max_length={max_length} must satisfy 0 <= min <= max")
    return [float(min_length <= n <= max_length) for n in lengths(completions, unit, completion_ids)]


@reward("length_penalty", range=(-1, 0))
def length_penalty(
    prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]] | None = None, *,
    max_length: int, unit: Unit = "tokens", **columns: Any,
) -> list[float]:
    """``-min(length / max_length, 1)``: 0 for an empty completion, -1 from ``max_length`` on."""
    if max_length < 1:
        raise RewardError(f"max_length={max_length} must be at least 1")
    return [-min(n / max_length, 1.0) for n in lengths(completions, unit, completion_ids)]


@reward("overlong", aliases=("soft_overlong",), range=(-1, 0))
def overlong(
    prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]] | None = None, *,
    max_length: int, cache_length: int, unit: Unit = "tokens", **columns: Any,
) -> list[float]:
    """Soft overlong punishment of DAPO (Yu et al. 2025, arXiv 2503.14476, eq. 13).

    0 up to ``max_length - cache_length``, then falling linearly to -1 at ``max_length``, and -1 beyond.
    """
    length = torch.tensor(lengths(completions, unit, completion_ids))
    values: list[float] = overlong_penalty(length, max_length=max_length, cache=cache_length).tolist()
    return values


_PATH = re.compile(r"\bpath\**\s*:\**\s*(.+)", re.IGNORECASE)
_ANSWER = re.compile(r"\s*\b(?:final\s+)?answer\s*:", re.IGNORECASE)


def read_path(text: str) -> list[str]:
    """Nodes of the last ``Path: a > b > c`` in a text; without one, of the last line that has a ``>``; [] otherwise.

    Of every part the first word counts, so that ``A00 (cholera) > A00.0`` reads as A00, A00.0; an ``Answer:`` ends the path.
    """
    found = _PATH.findall(text)
    if not found:
        found = [line for line in text.splitlines() if ">" in line]
    if not found:
        return []
    parts = [part.split() for part in _ANSWER.split(found[-1])[0].split(">")]
    nodes = [words[0].strip("`*\"'.,;:()[]") for words in parts if words]
    return [node for node in nodes if node]


@reward("path_score", range=(0, 1), needs=("path",))
def path_score(
    prompts: Sequence[Any], completions: Sequence[Any], path: Sequence[Any], *,
    denominator: Literal["longest", "gold"] = "longest", order: Literal["down", "up"] = "down", **columns: Any,
) -> list[float | None]:
    """How well the path that a completion writes (``Path: a > b > c``) matches the column ``path``; 0 without one.

    Harmonic mean of the F1 of the sets of nodes and of the longest common subsequence over the longer path (Zhang et al.
    2025, arXiv 2511.05933). The column holds a list of nodes from the top down, or text with `` > `` between them;
    ``order`` "up" says that completions are to be written from the node to the top. None where the path is None.
    """
    if order not in ("down", "up"):
        raise RewardError(f"order={order!r} is unknown; allowed: down, up")
    if denominator not in ("longest", "gold"):
        raise RewardError(f"denominator={denominator!r} is unknown; allowed: longest, gold")
    values: list[float | None] = []
    for completion, gold in zip(completions, path, strict=True):
        if gold is None:
            values.append(None)
            continue
        nodes = [node.strip() for node in gold.split(">")] if isinstance(gold, str) else [str(node) for node in gold]
        if not any(nodes):
            raise RewardError("path is empty; drop the row or use null")
        written = read_path(completion_text(completion))
        values.append(path_matching_score(written if order == "down" else written[::-1], nodes, denominator=denominator))
    return values
