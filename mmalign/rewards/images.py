"""Rewards on pictures: agreement with the caption by CLIP, file size, and the attributes of the shapes asset."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from mmalign.errors import RewardError
from mmalign.rewards.clip_score import ClipScore
from mmalign.rewards.registry import reward

__all__ = ["ClipScore", "jpeg_compressibility", "jpeg_incompressibility", "jpeg_size", "shapes_match"]


def jpeg_size(image: Any, *, quality: int = 95) -> float:
    """Size in kilobytes (1000 bytes) of a PIL image as a JPEG file of the given ``quality``."""
    if not 1 <= quality <= 100:
        raise RewardError(f"quality={quality} must be between 1 and 100")
    if not hasattr(image, "convert"):
        raise RewardError(f"a {type(image).__name__} is not a PIL image")
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=quality)
    return buffer.tell() / 1000


@reward("jpeg_incompressibility", accepts="pil")
def jpeg_incompressibility(
    prompts: Sequence[Any], completions: Sequence[Any], *, quality: int = 95, scale: float = 1.0, **columns: Any,
) -> list[float]:
    """``scale`` times the JPEG size in kilobytes: rewards detail (Black et al. 2023, arXiv 2305.13301, section 5)."""
    return [scale * jpeg_size(image, quality=quality) for image in completions]


@reward("jpeg_compressibility", aliases=("jpeg_size",), accepts="pil")
def jpeg_compressibility(
    prompts: Sequence[Any], completions: Sequence[Any], *, quality: int = 95, scale: float = 1.0, **columns: Any,
) -> list[float]:
    """``-scale`` times the JPEG size in kilobytes: rewards plain pictures (Black et al. 2023, arXiv 2305.13301)."""
    return [-scale * jpeg_size(image, quality=quality) for image in completions]


@reward("shapes_match", aliases=("shapes",), range=(0, 1), accepts="any")
def shapes_match(
    prompts: Sequence[Any], completions: Sequence[Any] | Tensor, *, key: str = "score", **columns: Any,
) -> list[float | None]:
    """How well pictures fit captions of the ``shapes`` asset; see :func:`mmalign.rewards.shapes_check.shapes_match`."""
    from mmalign.rewards.shapes_check import shapes_match as check

    return check(prompts, completions, key=key)


def _shapes_part(key: str) -> Callable[..., list[float | None]]:
    def part(prompts: Sequence[Any], completions: Sequence[Any] | Tensor, **columns: Any) -> list[float | None]:
        """One attribute of ``shapes_match``."""
        from mmalign.rewards.shapes_check import shapes_match as check

        return check(prompts, completions, key=key)

    part.__doc__ = f"How well the {key} of a picture fits its caption of the ``shapes`` asset, in [0, 1] or None."
    return reward(f"shapes_{key}", range=(0, 1), accepts="any")(part)


shapes_color, shapes_shape, shapes_count, shapes_position = map(_shapes_part, ("color", "shape", "count", "position"))
