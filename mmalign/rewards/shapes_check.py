"""Reads colour, shape, count and position off the pixels of a ``shapes`` picture and compares them with its caption.

The rule is the one of object-focused benchmarks (GenEval: Ghosh, Hajishirzi and Schmidt, 2023, arXiv:2310.11513):
detect objects, then test each attribute the prompt names, and call the picture right when all of them hold. Here the
detector is exact arithmetic on a closed world, so it needs no weights, is deterministic, and its verdict on a
rendered scene is the truth. Beside the strict verdict it returns graded scores, so that a picture which is nearly
right earns more than noise: that is what makes it usable as a reward.

Steps: background = median of the border; each pixel is split into background and nearest palette colour, which gives
a soft mask; connected components of the thresholded mask are the objects; each object's shape is the template of the
same area and centroid with the largest soft intersection over union (a blur moves neither, hence the robustness).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmalign.data.shapes import COLORS, PALETTE, POSITIONS, SHAPES, ShapeAttributes, coverage, parse_caption, region_of, unit_area
from mmalign.errors import RewardError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

WORKING_SIZE = 64
"""Larger pictures are averaged down to this side first; the attributes survive and the cost is bounded."""

_PALETTE = np.array([PALETTE[name] for name in COLORS], dtype=np.float64) / 255
_MASK_THRESHOLD = 0.5
_FAINTEST = 0.25  # below this share of a palette colour nothing counts as an object
_SMALLEST_AREA = 0.012  # of the picture; the smallest rendered object (a star of radius 0.13) covers 0.038
_COLOR_TEMPERATURE = 0.12  # in RGB distance; the two nearest palette colours are 0.5 apart
_SHAPE_TEMPERATURE = 0.04  # in intersection over union
_BLURS = 3  # templates: sharp and blurred by 0.71 and 1 pixel
_POSITION_TEMPERATURE = 0.03  # in units of the picture's side


@dataclass(frozen=True)
class Detection:
    """One object found in a picture.

    ``area`` is a fraction of the picture, ``center`` is (x, y) in unit coordinates; ``colors`` and ``shapes`` are
    scores per name that sum to one.
    """

    area: float
    center: tuple[float, float]
    colors: dict[str, float]
    shapes: dict[str, float]

    @property
    def color(self) -> str:
        """The most likely colour name."""
        return max(self.colors, key=self.colors.__getitem__)

    @property
    def shape(self) -> str:
        """The most likely shape name."""
        return max(self.shapes, key=self.shapes.__getitem__)


def _pixels(image: Any) -> NDArray[np.float64]:
    """A picture as ``[H, W, 3]`` float64 in [0, 1], at most :data:`WORKING_SIZE` on its longer side."""
    from PIL import Image

    if isinstance(image, Image.Image):
        pixels = np.asarray(image.convert("RGB"), dtype=np.float64) / 255
    elif isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
            raise RewardError(
                f"image has shape {tuple(image.shape)} and dtype {image.dtype}; shapes_check takes a PIL image or a "
                "float tensor [3, H, W] with values in [0, 1]"
            )
        pixels = image.detach().to("cpu", torch.float64).permute(1, 2, 0).numpy()
    else:
        raise RewardError(f"image is a {type(image).__name__}; shapes_check takes a PIL image or a float tensor")
    if not np.isfinite(pixels).all():
        raise RewardError("image has NaN or infinite pixels; check the decoder that produced it")
    longest = max(pixels.shape[:2])
    if longest > WORKING_SIZE:
        scale = WORKING_SIZE / longest
        shrunk = [max(1, round(side * scale)) for side in pixels.shape[:2]]
        batch = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
        pixels = F.interpolate(batch, size=shrunk, mode="area")[0].permute(1, 2, 0).numpy()
    return np.clip(pixels, 0.0, 1.0)


def _soft_mask(pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    """How much of each pixel is object rather than background: ``[H, W]`` in [0, 1].

    A pixel ``p`` is modelled as ``b + a (c - b)`` with background ``b`` and the palette colour ``c`` that fits best;
    ``a`` is returned.
    """
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = np.median(border, axis=0)
    direction = _PALETTE - background
    length = np.maximum((direction**2).sum(axis=1), 1e-6)
    offset = pixels - background
    share = np.clip(offset @ direction.T / length, 0.0, 1.0)
    residual = ((offset[..., None, :] - share[..., None] * direction) ** 2).sum(axis=-1)
    best = residual.argmin(axis=-1)
    return np.asarray(np.take_along_axis(share, best[..., None], axis=-1)[..., 0])


def _components(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Labels ``[H, W]`` of the 8-connected components of ``mask``: 0 outside, a distinct positive number in each.

    Each pixel starts with its own number and takes the largest of its neighbourhood until nothing changes.
    """
    height, width = mask.shape
    inside = torch.from_numpy(mask).to(torch.float32)[None, None]
    labels = torch.arange(1, height * width + 1, dtype=torch.float32).view(1, 1, height, width) * inside
    while True:
        grown = F.max_pool2d(labels, 3, stride=1, padding=1) * inside
        if torch.equal(grown, labels):
            return np.asarray(labels[0, 0].numpy().astype(np.int64))
        labels = grown


def _softmax(scores: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    weights = np.exp((scores - scores.max()) / temperature)
    return np.asarray(weights / weights.sum())


def _blur(image: NDArray[np.float64]) -> NDArray[np.float64]:
    """Binomial 3 x 3 blur (standard deviation 0.71 pixels), zero outside."""
    padded = np.pad(image, 1)
    rows = 0.25 * padded[:-2] + 0.5 * padded[1:-1] + 0.25 * padded[2:]
    return np.asarray(0.25 * rows[:, :-2] + 0.5 * rows[:, 1:-1] + 0.25 * rows[:, 2:])


def _shape_scores(alpha: NDArray[np.float64], x: float, y: float) -> NDArray[np.float64]:
    """Soft intersection over union of ``alpha`` with each shape of the same area and centroid ``(x, y)`` in pixels.

    Templates are tried sharp and blurred, because a decoder's blur rounds a square's corners towards a circle.
    """
    height, width = alpha.shape
    area = float(alpha.sum())
    overlaps = []
    for shape in SHAPES:
        template = coverage(shape, x, y, (area / unit_area(shape)) ** 0.5, height, width, oversample=3)
        best = 0.0
        for _ in range(_BLURS):
            best = max(best, float(np.minimum(alpha, template).sum() / np.maximum(alpha, template).sum()))
            template = _blur(template)
        overlaps.append(best)
    return np.array(overlaps)


def _describe(alpha: NDArray[np.float64], pixels: NDArray[np.float64]) -> Detection:
    """The detection of one object from its soft mask ``alpha[H, W]``, zero elsewhere."""
    height, width = alpha.shape
    area = float(alpha.sum())
    y = float((alpha.sum(axis=1) * (np.arange(height) + 0.5)).sum()) / area
    x = float((alpha.sum(axis=0) * (np.arange(width) + 0.5)).sum()) / area
    # The interior carries the colour; the edge is mixed with the background.
    color = pixels[alpha >= 0.9 * alpha.max()].mean(axis=0)
    distances = ((_PALETTE - color) ** 2).sum(axis=1) ** 0.5
    rows, columns = (np.flatnonzero(alpha.any(axis=axis)) for axis in (1, 0))
    # Templates are only drawn in a window around the object, two pixels of margin for their blur.
    top, left = max(0, int(rows[0]) - 2), max(0, int(columns[0]) - 2)
    overlaps = _shape_scores(alpha[top : rows[-1] + 3, left : columns[-1] + 3], x - left, y - top)
    return Detection(
        area / (height * width),
        (x / width, y / height),
        dict(zip(COLORS, _softmax(-distances, _COLOR_TEMPERATURE).tolist(), strict=True)),
        dict(zip(SHAPES, _softmax(overlaps, _SHAPE_TEMPERATURE).tolist(), strict=True)),
    )


def _territories(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """``labels`` grown into the unlabelled pixels by a sixteenth of the side: the blurred rim below the threshold
    belongs to its object, and what lies between two objects to the nearer one."""
    grown = torch.from_numpy(labels).to(torch.float32)[None, None]
    for _ in range(max(1, round(max(labels.shape) / 16))):
        grown = torch.where(grown > 0, grown, F.max_pool2d(grown, 3, stride=1, padding=1))
    return np.asarray(grown[0, 0].numpy().astype(np.int64))


def detect_objects(image: Image.Image | Tensor) -> list[Detection]:
    """The objects of a picture (PIL, or float ``[3, H, W]`` in [0, 1]), largest first; empty for a plain picture.

    Raises:
        RewardError: another type or shape, or pixels that are not finite.
    """
    pixels = _pixels(image)
    alpha = _soft_mask(pixels)
    strongest = float(alpha.max())
    if strongest < _FAINTEST:
        return []
    territories = _territories(_components(alpha >= _MASK_THRESHOLD * strongest))
    masks = (np.where(territories == label, alpha, 0.0) for label in np.unique(territories[territories > 0]))
    found = [_describe(mask, pixels) for mask in masks if mask.sum() >= _SMALLEST_AREA * mask.size]
    return sorted(found, key=lambda detection: -detection.area)


def _position_score(center: tuple[float, float], expected: str) -> float:
    """Softmax over the negative distances to the five places, read at the expected one; in (0, 1)."""
    distances = np.array([np.hypot(center[0] - x, center[1] - y) for x, y in POSITIONS.values()])
    return float(_softmax(-distances, _POSITION_TEMPERATURE)[list(POSITIONS).index(expected)])


def _as_attributes(caption: str | ShapeAttributes) -> ShapeAttributes:
    attributes = parse_caption(caption) if isinstance(caption, str) else caption
    if attributes is None:
        raise RewardError(f"caption={caption!r} is not in the shapes grammar; see mmalign.data.shapes.caption_grid()")
    return attributes


def check_image(image: Image.Image | Tensor, caption: str | ShapeAttributes) -> dict[str, float | None]:
    """Scores in [0, 1] of a picture against a caption.

    Returns:
        ``color``, ``shape``: the detections' score for the named colour or shape, weighted by area;
        ``count``: 1 for the right number of objects, 1/2 for one too many or too few, else 0;
        ``position``: closeness of the object to the named place, None when the caption names none;
        ``score``: mean of those that apply, the graded reward;
        ``all``: 1.0 when every attribute is exactly right (each object's most likely colour and shape, the number,
        the region), else 0.0. A picture without any object scores 0 everywhere.

    Raises:
        RewardError: the caption is outside the grammar, or the picture is not one (see :func:`detect_objects`).
    """
    wanted = _as_attributes(caption)
    found = detect_objects(image)
    if not found:
        position = None if wanted.position is None else 0.0
        return {"color": 0.0, "shape": 0.0, "count": 0.0, "position": position, "score": 0.0, "all": 0.0}
    area = sum(item.area for item in found)
    center = (
        sum(item.area * item.center[0] for item in found) / area,
        sum(item.area * item.center[1] for item in found) / area,
    )
    scores: dict[str, float | None] = {
        "color": sum(item.area * item.colors[wanted.color] for item in found) / area,
        "shape": sum(item.area * item.shapes[wanted.shape] for item in found) / area,
        "count": max(0.0, 1.0 - abs(len(found) - wanted.count) / 2),
        "position": None if wanted.position is None else _position_score(center, wanted.position),
    }
    applicable = [value for value in scores.values() if value is not None]
    scores["score"] = sum(applicable) / len(applicable)
    right = (
        len(found) == wanted.count
        and all(item.color == wanted.color and item.shape == wanted.shape for item in found)
        and (wanted.position is None or region_of(*center) == wanted.position)
    )
    scores["all"] = float(right)
    return scores


def shapes_match(
    prompts: Sequence[str],
    completions: Sequence[Image.Image] | Sequence[Tensor] | Tensor,
    *,
    key: str = "score",
    **columns: Any,
) -> list[float | None]:
    """Reward: how well each picture fits its ``shapes`` caption, in [0, 1]; None for a prompt outside the grammar.

    Args:
        prompts: captions, one per picture.
        completions: PIL images, or a float tensor ``[B, 3, H, W]`` (or a list of ``[3, H, W]``) in [0, 1].
        key: which entry of :func:`check_image` to return: ``score`` (graded), ``all`` (strict) or one attribute.
        columns: other columns of the batch, ignored.

    Raises:
        RewardError: as many prompts as pictures are needed; an unknown ``key``; a picture that is not one.
    """
    if key not in ("score", "all", "color", "shape", "count", "position"):
        raise RewardError(f"key={key!r} is unknown; allowed: score, all, color, shape, count, position")
    if len(prompts) != len(completions):
        raise RewardError(f"{len(prompts)} prompts but {len(completions)} completions; pass one prompt per picture")
    rewards: list[float | None] = []
    for prompt, image in zip(prompts, completions, strict=True):
        attributes = parse_caption(prompt) if isinstance(prompt, str) else None
        rewards.append(None if attributes is None else check_image(image, attributes)[key])
    return rewards
