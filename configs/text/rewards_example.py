"""Rewards of the configurations beside this file: plain functions, as TRL users write them."""

from __future__ import annotations

from typing import Any


def digit_share(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """Share of the completion's characters that are digits."""
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [sum(character.isdigit() for character in text) / max(1, len(text)) for text in texts]


def large_digits(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """Mean digit of the completion over 9; 0 for completions without any digit."""
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    digits = [[int(character) for character in text if character in "0123456789"] for text in texts]
    return [sum(found) / (9 * len(found)) if found else 0.0 for found in digits]
