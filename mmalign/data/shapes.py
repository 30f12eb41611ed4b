"""The procedural ``shapes`` asset: captioned pictures of coloured shapes whose truth is known exactly.

A :class:`Scene` is rendered by an own anti-aliased rasteriser at any size; its caption comes from a closed grammar of
168 captions (six colours, four shapes, one object at five positions or two or three objects anywhere)::

    a red circle on the left          two blue squares          three green stars

Every attribute can be read back from the pixels by :mod:`mmalign.rewards.shapes_check`, so the asset serves as data
for text-to-image, captioning and contrastive models and as the base of rewards that need no learned scorer.
The multi-view sibling is :mod:`mmalign.data.shapes_3d`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmalign.core.seeding import generator as seeded_generator
from mmalign.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

Rgb = tuple[int, int, int]

PALETTE: dict[str, Rgb] = {
    "red": (220, 40, 40),
    "green": (40, 165, 60),
    "blue": (40, 70, 225),
    "yellow": (240, 205, 30),
    "purple": (165, 45, 195),
    "cyan": (30, 190, 215),
}
"""Colour name -> 8-bit RGB. The hues are far enough apart to be told from each other after a lossy decoder."""

COLORS: tuple[str, ...] = tuple(PALETTE)
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star")
COUNTS: tuple[int, ...] = (1, 2, 3)
POSITIONS: dict[str, tuple[float, float]] = {
    "left": (0.28, 0.5),
    "right": (0.72, 0.5),
    "top": (0.5, 0.28),
    "bottom": (0.5, 0.72),
    "center": (0.5, 0.5),
}
"""Position name -> centre in unit coordinates (x to the right, y down)."""

WHITE: Rgb = (255, 255, 255)
MIN_SIZE = 16
"""Below this many pixels three objects cannot be told apart."""

_CENTER_HALF_WIDTH = 0.13
_COUNT_WORDS = {1: "a", 2: "two", 3: "three"}
_COUNT_VALUES = {"a": 1, "an": 1, "one": 1, "1": 1, "two": 2, "2": 2, "three": 3, "3": 3}
_PREPOSITIONS = {"left": "on", "right": "on", "top": "at", "bottom": "at", "center": "in"}
_GRAMMAR = re.compile(
    rf"(?P<count>{'|'.join(sorted(_COUNT_VALUES, key=len, reverse=True))})\s+(?P<color>{'|'.join(COLORS)})\s+"
    rf"(?P<shape>{'|'.join(SHAPES)})s?(?:\s+(?:on|at|in)\s+the\s+(?P<position>{'|'.join(POSITIONS)}|centre|middle))?\.?"
)

# Half extents in units of the radius, chosen so that the four shapes look equally large.
_SQUARE_HALF_SIDE = 0.88
_POLYGON_RADIUS = 1.3
_STAR_INNER_RADIUS = 0.45 * _POLYGON_RADIUS
EXTENT = _POLYGON_RADIUS
"""Largest distance, in radii, of a point of any shape from its centre."""


@dataclass(frozen=True)
class ShapeAttributes:
    """What a caption says: ``count`` objects of one ``color`` and ``shape``; ``position`` only for a single object."""

    shape: str
    color: str
    count: int = 1
    position: str | None = None

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("shape", self.shape, SHAPES),
            ("color", self.color, COLORS),
            ("count", self.count, COUNTS),
            ("position", self.position, (None, *POSITIONS)),
        ):
            if value not in allowed:
                raise DataError(f"{name}={value!r} is not a shapes attribute; allowed: {', '.join(map(str, allowed))}")
        if self.count > 1 and self.position is not None:
            raise DataError(f"position={self.position!r} needs count=1, not {self.count}; drop one of the two")

    @property
    def caption(self) -> str:
        """The caption of these attributes, e.g. ``"a red circle on the left"`` or ``"two blue squares"``."""
        text = f"{_COUNT_WORDS[self.count]} {self.color} {self.shape}{'s' if self.count > 1 else ''}"
        if self.position is not None:
            text += f" {_PREPOSITIONS[self.position]} the {self.position}"
        return text


@dataclass(frozen=True)
class SceneObject:
    """One object: shape and colour names, centre ``(x, y)`` and ``radius`` in units of the image side."""

    shape: str
    color: str
    x: float
    y: float
    radius: float

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise DataError(f"shape={self.shape!r} is unknown; allowed: {', '.join(SHAPES)}")
        if self.color not in PALETTE:
            raise DataError(f"color={self.color!r} is unknown; allowed: {', '.join(COLORS)}")
        if not self.radius > 0:
            raise DataError(f"radius={self.radius} must be positive (a fraction of the image side)")


@dataclass(frozen=True)
class Scene:
    """Objects, painted in order, on a plain ``background`` (8-bit RGB)."""

    objects: tuple[SceneObject, ...]
    background: Rgb = WHITE


def region_of(x: float, y: float) -> str:
    """The position name of a centre in unit coordinates: ``center`` near the middle, else the side it leans to."""
    dx, dy = x - 0.5, y - 0.5
    if max(abs(dx), abs(dy)) < _CENTER_HALF_WIDTH:
        return "center"
    if abs(dx) >= abs(dy):
        return "left" if dx < 0 else "right"
    return "top" if dy < 0 else "bottom"


def _inside_spikes(x: NDArray[Any], y: NDArray[Any], corners: int, outer: float, inner: float) -> NDArray[Any]:
    """Points inside the polygon whose radius goes linearly from ``outer`` at each corner to ``inner`` between two.

    Every such polygon is one edge repeated by symmetry, so the angle is folded into half a sector and one cross
    product decides: three corners with ``inner = outer / 2`` are a triangle, five with a smaller ``inner`` a star.
    """
    half_sector = np.pi / corners
    angle = np.abs((np.arctan2(x, -y) + half_sector) % (2 * half_sector) - half_sector)
    along, across = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
    edge_x, edge_y = inner * np.cos(half_sector) - outer, inner * np.sin(half_sector)
    return np.asarray(edge_x * across - edge_y * (along - outer) >= 0)


def _inside(shape: str, x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
    """Which points, in radii from the centre with y down, belong to the shape of radius 1 (its area centroid is 0)."""
    if shape == "circle":
        return np.asarray(x * x + y * y <= 1.0)
    if shape == "square":
        return np.asarray(np.maximum(np.abs(x), np.abs(y)) <= _SQUARE_HALF_SIDE)
    if shape == "triangle":
        return _inside_spikes(x, y, 3, _POLYGON_RADIUS, _POLYGON_RADIUS / 2)
    if shape == "star":
        return _inside_spikes(x, y, 5, _POLYGON_RADIUS, _STAR_INNER_RADIUS)
    raise DataError(f"shape={shape!r} is unknown; allowed: {', '.join(SHAPES)}")


@cache
def unit_area(shape: str) -> float:
    """Area of ``shape`` at radius 1, so that a radius follows from a measured area: ``sqrt(area / unit_area)``."""
    samples = (np.arange(2048) + 0.5) / 2048 * 2 * EXTENT - EXTENT
    return float(_inside(shape, samples[None, :], samples[:, None]).mean() * (2 * EXTENT) ** 2)


def coverage(
    shape: str, x: float, y: float, radius: float, height: int, width: int | None = None, *, oversample: int = 4
) -> NDArray[np.float64]:
    """Fraction of each pixel covered by a shape: ``[height, width]`` in [0, 1], anti-aliased.

    ``x``, ``y`` and ``radius`` are in pixels, pixel centres lie at ``+0.5``; ``oversample**2`` points are tested per
    pixel.
    """
    width = height if width is None else width
    rows = ((np.arange(height * oversample) + 0.5) / oversample - y) / radius
    columns = ((np.arange(width * oversample) + 0.5) / oversample - x) / radius
    inside = _inside(shape, columns[None, :], rows[:, None])
    return inside.reshape(height, oversample, width, oversample).mean(axis=(1, 3), dtype=np.float64)


def render(scene: Scene, size: int = 32) -> Image.Image:
    """The scene as an RGB picture of ``size`` x ``size`` pixels.

    Raises:
        DataError: ``size`` is below :data:`MIN_SIZE`.
    """
    from PIL import Image

    if size < MIN_SIZE:
        raise DataError(f"size={size} is too small to show the shapes; use at least {MIN_SIZE}")
    pixels = np.empty((size, size, 3))
    pixels[:] = scene.background
    for thing in scene.objects:
        alpha = coverage(thing.shape, thing.x * size, thing.y * size, thing.radius * size, size)[..., None]
        pixels = pixels * (1 - alpha) + alpha * np.asarray(PALETTE[thing.color], dtype=np.float64)
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def attributes_of(scene: Scene) -> ShapeAttributes:
    """The attributes that :func:`caption` puts in words, the position included for a single object.

    Raises:
        DataError: the scene has no object, more than three, or objects that differ in shape or colour.
    """
    kinds = {(thing.shape, thing.color) for thing in scene.objects}
    if len(kinds) != 1 or len(scene.objects) not in COUNTS:
        raise DataError(
            f"the scene has {len(scene.objects)} object(s) of {len(kinds)} kinds; a caption exists for 1 to 3 objects "
            "of one shape and colour"
        )
    shape, color = next(iter(kinds))
    first = scene.objects[0]
    return ShapeAttributes(shape, color, len(scene.objects), region_of(first.x, first.y) if len(scene.objects) == 1 else None)


def caption(scene: Scene) -> str:
    """The caption of a scene; raises :class:`DataError` for a scene outside the grammar (see :func:`attributes_of`)."""
    return attributes_of(scene).caption


def parse_caption(text: str) -> ShapeAttributes | None:
    """The attributes a caption asks for, or None when it is not in the grammar.

    Case, surrounding space, a final period, digits for number words and a single object without a position
    ("a red circle") are accepted.
    """
    found = _GRAMMAR.fullmatch(" ".join(text.split()).lower())
    if found is None:
        return None
    count, position = _COUNT_VALUES[found["count"]], found["position"]
    if count > 1 and position is not None:
        return None
    position = "center" if position in ("centre", "middle") else position
    return ShapeAttributes(found["shape"], found["color"], count, position)


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))


def sample_scene(
    generator: torch.Generator, attributes: ShapeAttributes | str | None = None, *, background: Rgb = WHITE
) -> Scene:
    """A random scene, or a random scene that fits ``attributes`` (or a caption); sizes and places vary within bounds.

    A single object has radius 0.15 to 0.20 of the side and lies near its position (any, when none is asked for); two
    or three have radius 0.13 to 0.165 and lie in different quadrants, at least 0.06 of the side apart.

    Raises:
        DataError: a caption that :func:`parse_caption` does not know.
    """
    if attributes is None:
        grid = caption_grid()
        attributes = grid[int(torch.randint(len(grid), (), generator=generator))]
    if isinstance(attributes, str):
        parsed = parse_caption(attributes)
        if parsed is None:
            raise DataError(f"caption={attributes!r} is not in the shapes grammar, e.g. {caption_grid()[0]!r}")
        attributes = parsed
    shape, color = attributes.shape, attributes.color
    if attributes.count == 1:
        places = tuple(POSITIONS)
        position = attributes.position or places[int(torch.randint(len(places), (), generator=generator))]
        x, y = POSITIONS[position]
        # Along the axis that names the side the jitter is small, so that the object stays inside the picture.
        spread_x, spread_y = (0.02, 0.05) if position in ("left", "right") else (0.05, 0.02)
        if position == "center":
            spread_x = spread_y = 0.04
        radius = _uniform(0.15, 0.20, generator)
        x, y = x + _uniform(-spread_x, spread_x, generator), y + _uniform(-spread_y, spread_y, generator)
        return Scene((SceneObject(shape, color, x, y, radius),), background)
    objects = []
    for quadrant in torch.randperm(4, generator=generator)[: attributes.count].tolist():
        radius = _uniform(0.13, 0.165, generator)
        spread = 0.25 - 0.03 - EXTENT * radius
        x = 0.25 + 0.5 * (quadrant % 2) + _uniform(-spread, spread, generator)
        y = 0.25 + 0.5 * (quadrant // 2) + _uniform(-spread, spread, generator)
        objects.append(SceneObject(shape, color, x, y, radius))
    return Scene(tuple(objects), background)


def _attribute_grid() -> list[tuple[int, ShapeAttributes]]:
    """All attributes with their fold in 0..6: each of the 24 colour-shape pairs has its 7 layouts in 7 folds."""
    layouts: list[tuple[int, str | None]] = [*((1, position) for position in POSITIONS), (2, None), (3, None)]
    return [
        ((c + 2 * s + k) % len(layouts), ShapeAttributes(shape, color, count, position))
        for c, color in enumerate(COLORS)
        for s, shape in enumerate(SHAPES)
        for k, (count, position) in enumerate(layouts)
    ]


def caption_grid(split: str = "all") -> list[str]:
    """All 168 captions, or the ``train`` (144) or ``test`` (24) ones.

    The split is compositional and fixed: ``test`` holds, for each of the 24 colour-shape pairs, one of its seven
    layouts (five positions, two objects, three objects), so each word is well represented in ``train``.

    Raises:
        DataError: an unknown split.
    """
    keep = {"all": range(7), "train": range(1, 7), "test": range(1)}.get(split)
    if keep is None:
        raise DataError(f"split={split!r} is unknown; allowed: all, train, test")
    return [attributes.caption for fold, attributes in _attribute_grid() if fold in keep]


def make_shapes(
    n: int,
    size: int = 32,
    seed: int = 0,
    *,
    split: str = "all",
    captions: Sequence[str] | None = None,
    background: Rgb = WHITE,
) -> list[dict[str, Any]]:
    """``n`` captioned pictures: columns ``prompt``, ``image`` (PIL, RGB), ``shape``, ``color``, ``count``,
    ``position`` (None for several objects) and ``id``.

    Each pass over the captions (those of ``split``, or ``captions``) is in a fresh random order, so they are equally
    frequent; row ``i`` depends on ``seed``, ``i`` and the captions only, so a longer data set begins with a shorter
    one.

    Raises:
        DataError: ``n`` is negative, a caption is unknown, or ``captions`` is empty.
    """
    chosen = list(caption_grid(split) if captions is None else captions)
    if n < 0 or not chosen:
        raise DataError(f"n={n} with {len(chosen)} captions; need n >= 0 and at least one caption")
    rows: list[dict[str, Any]] = []
    order: list[int] = []
    for index in range(n):
        if index % len(chosen) == 0:
            shuffle = seeded_generator(seed, "shapes", "order", index // len(chosen))
            order = torch.randperm(len(chosen), generator=shuffle).tolist()
        text = chosen[order[index % len(chosen)]]
        scene = sample_scene(seeded_generator(seed, "shapes", "scene", index), text, background=background)
        truth = attributes_of(scene)
        rows.append(
            {
                "prompt": text,
                "image": render(scene, size),
                "shape": truth.shape,
                "color": truth.color,
                "count": truth.count,
                "position": truth.position,
                "id": f"shapes-{seed}-{index}",
            }
        )
    return rows


def shapes_base_path() -> Path:
    """Folder of the packaged text-to-image base model: a diffusers ``StableDiffusionPipeline`` at 32 x 32 pixels.

    It is trained from scratch on :func:`make_shapes` by ``scripts/train_shapes_base.py``; ``training.json`` in it
    holds the recipe and the scores. Colour, shape and number are right nearly always; of a position the axis is right
    and the side is not (left or right, top or bottom are at chance), which is where most of the room for alignment is.
    """
    return Path(__file__).parent / "files" / "shapes_base"
