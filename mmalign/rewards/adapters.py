"""Rewards made from other functions: image scorers with another signature, and a cache keyed by content."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.errors import RewardError
from mmalign.rewards.inputs import EXTRAS, Asked
from mmalign.rewards.registry import Accepts, is_async, traits, unwrap


def from_image_reward(
    function: Callable[..., Any], *, accepts: Accepts | None = None, name: str | None = None,
) -> Callable[..., Any]:
    """A reward from ``fn(images, prompts, metadata)``, the signature of DDPO and Flow-GRPO reward functions.

    ``metadata`` is one dictionary of data columns per image. A ``(scores, info)`` tuple is accepted; ``info`` is
    dropped. ``accepts`` overrides the function's own attribute ("pil" when it has none). The name and the other
    declared traits are kept. Source of the convention: Black et al. 2023 (arXiv 2305.13301), official code.
    """
    declared = traits(function)
    takes_metadata = len(inspect.signature(function).parameters) > 2

    def image_reward(prompts: Sequence[Any], completions: Any, **columns: Any) -> Any:
        """Score ``completions`` as images."""
        data = {key: values for key, values in columns.items() if key not in EXTRAS}
        metadata = [{key: values[i] for key, values in data.items()} for i in range(len(prompts))]
        scores = function(completions, prompts, metadata) if takes_metadata else function(completions, prompts)
        return scores[0] if isinstance(scores, tuple) else scores

    for key, value in (
        ("reward_name", name or declared.name), ("range", declared.range), ("needs", declared.needs),
        ("differentiable", declared.differentiable), ("accepts", accepts or declared.accepts),
    ):
        setattr(image_reward, key, value)
    return image_reward


def takes_images_first(function: Any) -> bool:
    """Whether ``function`` has the ``(images, prompts, ...)`` signature of :func:`from_image_reward`."""
    if not inspect.isroutine(unwrap(function)):
        return False
    names = list(inspect.signature(function).parameters)
    return names[:2] == ["images", "prompts"] and "completions" not in names


def fingerprint(value: Any) -> Any:
    """A JSON value that is equal for equal content: images and tensors by their bytes, the rest as it is."""
    if isinstance(value, Tensor):
        array = value.detach().cpu().contiguous()
        digest = hashlib.sha256(array.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        return ["tensor", str(array.dtype), list(array.shape), digest]
    if hasattr(value, "tobytes") and hasattr(value, "mode"):  # PIL
        return ["image", value.mode, list(value.size), hashlib.sha256(value.tobytes()).hexdigest()]
    if hasattr(value, "tobytes") and hasattr(value, "dtype"):  # numpy
        return ["array", str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, dict):
        return {str(key): fingerprint(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [fingerprint(item) for item in value]
    return value


def cache(function: Any = None, *, path: str | Path | None = None) -> Any:
    """Decorator: remember each sample's value by the content of its prompt, completion and columns.

    Only samples not seen before are passed on (equal ones in a batch once). With ``path``, values are appended to a
    JSON-lines file and read back in the next run. For functions (sync or async) whose value for a sample depends on
    nothing else; one that asks for ``trainer_state``, ``rollout`` or a logger is refused with ValueError. Keyword-only
    parameters are options and part of every key.
    """
    if function is None:
        return functools.partial(cache, path=path)
    own = traits(function)
    asked = Asked.of(function, own.name)
    for name in ("trainer_state", "rollout", "log_extra", "log_metric"):
        if name in (*asked.required, *asked.optional):
            raise ValueError(f"reward {own.name!r} cannot be cached: it asks for {name}, so equal samples may differ")
    memory = _Memory(Path(path) if path is not None else None)
    options = {n for n, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}

    def split(keywords: dict[str, Any]) -> tuple[list[str], dict[str, int], dict[str, Any]]:
        """Keys of all samples, position of each key not yet known, and the keywords of those positions."""
        for name in EXTRAS[1:]:
            keywords.pop(name, None)
        if "completion_ids" not in (*asked.required, *asked.optional):
            keywords.pop("completion_ids", None)
        count = len(keywords["completions"])
        columns = {n for n, v in keywords.items() if n not in options and hasattr(v, "__len__") and len(v) == count}
        constants = {n: fingerprint(v) for n, v in keywords.items() if n not in columns}
        keys = [
            _digest({"constants": constants, **{n: fingerprint(keywords[n][i]) for n in sorted(columns)}})
            for i in range(count)
        ]
        new = {key: i for i, key in reversed(list(enumerate(keys))) if key not in memory.values}
        cut = {
            n: v if n not in columns else v[list(new.values())] if isinstance(v, Tensor) else [v[i] for i in new.values()]
            for n, v in keywords.items()
        }
        return keys, new, cut

    def merge(keys: list[str], new: dict[str, int], fresh: Any) -> list[float | None]:
        values = fresh.tolist() if isinstance(fresh, Tensor) else list(fresh)
        if len(values) != len(new):
            raise RewardError(f"reward {own.name!r} returned {len(values)} values for {len(new)} samples")
        known = {key: None if v is None else float(v) for key, v in zip(new, values, strict=True)}
        # A NaN is reported by the caller and must not come back from the cache after the cause is gone.
        memory.add({key: v for key, v in known.items() if v is None or math.isfinite(v)})
        return [known[key] if key in known else memory.values[key] for key in keys]

    if is_async(function):
        @functools.wraps(function)
        async def cached_async(**keywords: Any) -> list[float | None]:
            keys, new, cut = split(keywords)
            return merge(keys, new, await function(**cut) if new else [])

        wrapper: Any = cached_async
    else:
        @functools.wraps(function)
        def cached(**keywords: Any) -> list[float | None]:
            keys, new, cut = split(keywords)
            return merge(keys, new, function(**cut) if new else [])

        wrapper = cached
    for key in ("range", "needs", "differentiable", "accepts"):
        setattr(wrapper, key, getattr(own, key))
    wrapper.reward_name, wrapper.differentiable = own.name, False
    return wrapper


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=repr).encode()).hexdigest()


class _Memory:
    """Key -> value, with an optional append-only file behind it."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.values: dict[str, float | None] = {}
        if path is not None and path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    self.values.update(json.loads(line))
                except ValueError:
                    continue  # a line cut short by a killed run; its values are computed again

    def add(self, values: dict[str, float | None]) -> None:
        self.values.update(values)
        if self.path is not None and values:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
