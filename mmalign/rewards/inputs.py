"""What one call of a reward receives, and how the call is made: keywords, slices, images, coroutines."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmalign.errors import RewardError
from mmalign.policies.base import Rollout
from mmalign.rewards.registry import COLUMN_ALIASES, Traits

T = TypeVar("T")

NOT_COLUMNS = ("prompt", "completion", "completion_ids", "prompts", "completions")
"""Columns that are never passed on: their content already arrives as ``prompts`` and ``completions``."""

EXTRAS = ("completion_ids", "trainer_state", "log_extra", "log_metric", "rollout")
"""Keywords that a reward may ask for beside data columns."""


@dataclass
class TrainerState:
    """Progress of the run, under the attribute names of ``transformers.TrainerState`` that reward functions read."""

    global_step: int = 0
    """Optimiser updates made."""
    max_steps: int = 0
    """Optimiser updates of the whole run; 0 when unknown."""
    epoch: float = 0.0
    """Passes over the data so far."""


@dataclass
class RewardInputs:
    """A batch to score: one entry per sample in every list."""

    prompts: list[Any]
    """Text, message list or caption of each sample."""
    completions: list[Any]
    """What the policy produced, in the form of the prompt: text, message list, image or list of views."""
    columns: dict[str, list[Any]] = field(default_factory=dict)
    """Data columns."""
    completion_ids: list[list[int]] | None = None
    """Token ids of each completion; None for images."""
    trainer_state: Any = None
    """Passed to rewards that ask for it."""
    rollout: Rollout | None = None
    """The rollout being scored, when there is one."""

    def __post_init__(self) -> None:
        count = len(self.completions)
        for name, values in (("prompts", self.prompts), ("completion_ids", self.completion_ids), *self.columns.items()):
            if values is not None and len(values) != count:
                raise RewardError(f"{name} holds {len(values)} values for {count} completions; one per sample is needed")

    def __len__(self) -> int:
        return len(self.completions)

    @staticmethod
    def from_rollout(rollout: Rollout, trainer_state: Any = None) -> RewardInputs:
        """Inputs of a rollout: completions take the form of their prompt (messages in, messages out)."""
        completions = [
            [{"role": "assistant", "content": sample}] if isinstance(sample, str) and is_messages(prompt) else sample
            for prompt, sample in zip(rollout.prompts, rollout.samples, strict=True)
        ]
        columns = {name: values for name, values in rollout.columns.items() if name not in NOT_COLUMNS}
        if rollout.finish_reason:
            columns.setdefault("finish_reason", list(rollout.finish_reason))
        return RewardInputs(
            list(rollout.prompts), completions, columns, completion_ids(rollout), trainer_state, rollout,
        )


def is_messages(value: Any) -> bool:
    """Whether ``value`` is a list of chat messages (dictionaries with a ``role``)."""
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(m, Mapping) and "role" in m for m in value)


def completion_ids(rollout: Rollout) -> list[list[int]] | None:
    """Token ids of every completion, from whichever column of the rollout has them; None for other modalities."""
    for source in (rollout.columns, rollout.rows):
        if "completion_ids" in source:
            return [torch.as_tensor(ids).tolist() for ids in source["completion_ids"]]
    if "input_ids" not in rollout.rows or "labels" not in rollout.rows:
        return None
    rows = zip(rollout.rows["input_ids"], rollout.rows["labels"], strict=True)
    return [
        [int(token) for token, label in zip(torch.as_tensor(ids).tolist(), torch.as_tensor(labels).tolist(), strict=True)
         if label != -100]
        for ids, labels in rows
    ]


@dataclass(frozen=True)
class Asked:
    """Which keywords a reward's signature asks for."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    open_ended: bool

    @staticmethod
    def of(function: Any, name: str) -> Asked:
        """Read the signature; raises RewardError for a parameter that cannot be passed by keyword."""
        required: list[str] = []
        optional: list[str] = []
        open_ended = False
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                open_ended = True
            elif parameter.kind is parameter.POSITIONAL_ONLY:
                raise RewardError(
                    f"reward {name!r}: parameter {parameter.name!r} is positional-only; rewards are called by keyword"
                )
            elif parameter.kind is not parameter.VAR_POSITIONAL:
                (required if parameter.default is parameter.empty else optional).append(parameter.name)
        return Asked(tuple(required), tuple(optional), open_ended)


def collect_keywords(
    asked: Asked, traits: Traits, inputs: RewardInputs, *, constants: Mapping[str, Any], columns: Mapping[str, str],
) -> dict[str, Any]:
    """The keywords for one call on the whole batch: lists to be sliced, and values that are passed as they are.

    Precedence: constants of the configuration, then renamed columns, then columns of the same name, then aliases.
    Raises RewardError that names what is missing, and the columns there are.
    """
    available: dict[str, Any] = {"prompts": inputs.prompts, "completions": inputs.completions, **inputs.columns}
    for keyword, column in columns.items():
        if column not in inputs.columns:
            raise RewardError(
                f"reward {traits.name!r}: columns.{keyword}={column!r} is not a data column; there are "
                f"{', '.join(sorted(inputs.columns)) or 'none'}"
            )
        available[keyword] = inputs.columns[column]
    if inputs.completion_ids is not None:
        available["completion_ids"] = inputs.completion_ids
    available["trainer_state"] = inputs.trainer_state if inputs.trainer_state is not None else TrainerState()
    if inputs.rollout is not None:
        available["rollout"] = inputs.rollout
    named = {*asked.required, *asked.optional}
    for keyword, column in COLUMN_ALIASES.items():
        if keyword in named and keyword not in available and column in available:
            available[keyword] = available[column]
    missing = [
        name for name in dict.fromkeys((*asked.required, *traits.needs))
        if name not in available and name not in constants and name not in ("log_extra", "log_metric")
    ]
    if missing:
        raise RewardError(
            f"reward {traits.name!r} needs {', '.join(missing)}, which the data do not have; columns are "
            f"{', '.join(sorted(inputs.columns)) or 'none'}. Add the column, or map another one: "
            f"columns: {{{missing[0]}: <column>}}"
        )
    # The rollout goes only to functions that name it: a TRL function with **kwargs must not be surprised by it.
    chosen = {n: v for n, v in available.items() if n in named or (asked.open_ended and n != "rollout")}
    return {**chosen, **constants}


def slice_keywords(keywords: Mapping[str, Any], constants: Mapping[str, Any], indices: Sequence[int]) -> dict[str, Any]:
    """``keywords`` for the samples at ``indices`` only: per-sample lists and tensors are cut, the rest is shared."""
    cut: dict[str, Any] = {}
    for name, value in keywords.items():
        if name in constants or name == "trainer_state":
            cut[name] = value
        elif isinstance(value, (Tensor, Rollout)):
            cut[name] = value.take(indices) if isinstance(value, Rollout) else value[list(indices)]
        else:
            cut[name] = [value[i] for i in indices]
    return cut


def is_image(value: Any) -> bool:
    """Whether ``value`` is a PIL image or a ``[C, H, W]`` tensor."""
    if isinstance(value, Tensor):
        return value.dim() == 3
    return type(value).__module__.partition(".")[0] == "PIL" or hasattr(value, "getpixel")


def to_tensor(image: Any) -> Tensor:
    """``[3, H, W]`` float32 in [0, 1] of a PIL image; tensors are returned as they are."""
    if isinstance(image, Tensor):
        return image
    import numpy as np

    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def to_pil(image: Any) -> Any:
    """PIL image of a ``[3, H, W]`` float tensor in [0, 1] (rounded to 8 bits); PIL images are returned as they are."""
    if not isinstance(image, Tensor):
        return image
    from PIL import Image

    pixels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels)


def present(completions: Sequence[Any] | Tensor, traits: Traits) -> Any:
    """``completions`` in the form of images that the reward accepts; anything that is not an image is untouched."""
    if traits.accepts == "any" or len(completions) == 0 or not all(is_image(item) for item in completions):
        return completions
    if traits.accepts == "pil":
        return [to_pil(item) for item in completions]
    if isinstance(completions, Tensor):
        return completions
    tensors = [to_tensor(item) for item in completions]
    sizes = {tuple(t.shape) for t in tensors}
    if len(sizes) > 1:
        raise RewardError(f"reward {traits.name!r} accepts one tensor of images, but their sizes differ: {sorted(sizes)}")
    return torch.stack(tensors)


class EventLoop:
    """An event loop in its own thread, kept so that the HTTP sessions of judges survive from call to call.

    A thread also makes async rewards work where a loop already runs (notebooks).
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Any:
        """Start ``coroutine``; the future's ``result()`` waits for it."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="mmalign-rewards", daemon=True).start()
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        """Stop the thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop = None


def run_inline(coroutine: Coroutine[Any, Any, T]) -> T:
    """Result of a coroutine that never waits, computed in the calling thread without an event loop."""
    try:
        coroutine.send(None)
    except StopIteration as finished:
        result: T = finished.value
        return result
    coroutine.close()
    raise RewardError("a reward returned an awaitable but is not declared async; write it with `async def`")

