"""The text of a comparison: one prompt and two responses, for a model that answers which of them is better."""

from __future__ import annotations

import re
from typing import Any

from mmalign.data.columns import is_messages
from mmalign.errors import ConfigError, DataError

RANKING_TEMPLATE = "[CONTEXT] {prompt} [RESPONSE A] {first} [RESPONSE B] {second}"
"""The input of the pairwise reward-ranking model of RSO (Liu et al. 2023, arXiv 2309.06657, section 3.2); for summaries
the paper writes ``[SUMMARY A]`` and ``[SUMMARY B]``."""

LABELS = (" A", " B")
"""What the model answers: the first response is better, the second is."""

_FIELD = re.compile(r"\{(prompt|first|second)\}")


def check_template(template: str, *, key: str = "template") -> str:
    """``template`` itself; raises ConfigError when it lacks one of its three places or has one twice."""
    found = _FIELD.findall(template)
    if sorted(found) != ["first", "prompt", "second"]:
        raise ConfigError(f"{key}: {template!r} must hold {{prompt}}, {{first}} and {{second}} once each")
    return template


def ranking_text(prompt: Any, first: Any, second: Any, *, template: str = RANKING_TEMPLATE) -> str:
    """The comparison as text. Messages are written as ``role: content`` lines, a response's as its content.

    Places in the texts themselves are not filled in. Raises DataError for a sample that is neither text nor messages.
    """
    values = {"prompt": _dialogue(prompt), "first": _response(first), "second": _response(second)}
    return _FIELD.sub(lambda match: values[match.group(1)], template)


def _dialogue(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    if is_messages(prompt):
        return "\n".join(f"{message.get('role')}: {_content(message)}" for message in prompt)
    raise DataError(f"column 'prompt' must be text or messages, not {type(prompt).__name__}")


def _response(sample: Any) -> str:
    if isinstance(sample, str):
        return sample
    if is_messages(sample):
        return "\n".join(_content(message) for message in sample)
    raise DataError(f"a response must be text or messages, not {type(sample).__name__}")


def _content(message: Any) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(block.get("text", "")) for block in content)
    return "" if content is None else str(content)
