"""What a rollout engine is: token ids in, token ids and their log-probs out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from mmalign.core.registry import Registry
from mmalign.policies.base import TextSampling
from mmalign.policies.token_scores import TokenScores

FinishReason = Literal["stop", "length"]
LogprobMode = Literal["processed", "raw"]


@dataclass(frozen=True)
class RolloutResult:
    """One completion. Pads are never in it; text is never tokenised again."""

    prompt_ids: list[int]
    completion_ids: list[int]
    """Sampled tokens up to and including the first end token."""
    logprobs: list[float]
    """Log-prob of every completion token under the distribution named by ``logprob_mode``."""
    finish_reason: FinishReason
    """"stop" after an end token or stop string, "length" at the limit."""
    weight_version: int = 0
    """Optimiser updates the weights had seen."""
    logprob_mode: LogprobMode = "processed"
    """"processed": of the distribution sampled from; "raw": of the model at temperature 1 (greedy decoding)."""


class EngineHost(Protocol):
    """What an engine needs to know of the policy that it samples from."""

    weight_version: int

    @property
    def scores(self) -> TokenScores:
        """The module and what it can do."""
        ...

    @property
    def tokenizer(self) -> Any:
        """Turns ids into text, for stop strings."""
        ...

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a completion."""
        ...

    @property
    def window(self) -> int | None:
        """Most tokens a row may have, or None."""
        ...


class RolloutEngine(Protocol):
    """Draws completions from the current weights of a policy."""

    name: str

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: TextSampling, generator: torch.Generator,
    ) -> list[RolloutResult]:
        """``n`` completions of every prompt, prompt-major, one result each and none dropped.

        One number is drawn from ``generator``, so its later state does not depend on the completions' lengths.
        """
        ...


ENGINES: Registry[Callable[[EngineHost], RolloutEngine]] = Registry("rollout engine")
"""Engines by name, built from the policy they serve."""
