"""The rewards of the quickstart: plain functions of (prompts, completions, **columns), for text and for images.

``completions`` mirror the prompts: a list with one assistant message for chat prompts, a PIL image for captions. Further
columns of the data set (``answer``) arrive as keyword arguments. Functions written for TRL's GRPOTrainer have the same
form and run unchanged.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

NUMBER = re.compile(r"-?\d+")


def correct(prompts: list[Any], completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """1 when the last number of the completion is the right answer."""
    scores = []
    for completion, truth in zip(completions, answer, strict=True):
        numbers = NUMBER.findall(completion[-1]["content"])
        scores.append(float(bool(numbers) and numbers[-1] == truth))
    return scores


def bare_number(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """1 when the completion is a number and nothing else, as the prompt asks; part of it for being short."""
    scores = []
    for completion in completions:
        text = completion[-1]["content"].strip()
        scores.append(1.0 if NUMBER.fullmatch(text.rstrip(".")) else 0.5 * max(0.0, 1 - len(text) / 40))
    return scores


def large(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """Share of a picture that is not background: people who like large shapes. ``completions`` are PIL images."""
    return [float((np.asarray(image.convert("RGB")).min(axis=2) < 200).mean()) for image in completions]
