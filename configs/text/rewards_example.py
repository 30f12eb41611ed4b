"""Rewards of configs/text/grpo.yaml: plain functions, as TRL users write them."""

from __future__ import annotations

from typing import Any


def digit_share(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """Share of the completion's characters that are digits."""
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [sum(character.isdigit() for character in text) / max(1, len(text)) for text in texts]
