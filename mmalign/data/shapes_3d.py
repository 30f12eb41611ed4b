"""The 3D ``shapes`` asset: coloured spheres and boxes seen from any camera, by a small exact ray caster.

Surfaces are Lambertian under a light fixed to the world and nothing depends on the viewing direction, so renderings
of one :class:`Scene3D` from several cameras are consistent with a single 3D object: data, and a ground truth, for
multi-view models and for the reconstruction-consistency reward of Carve3D (Xie et al., 2023, arXiv:2312.13980).

Conventions: right-handed world, z up; a camera looks along its own -z with x right and y up (OpenGL); pixel centres
at +0.5; angles in degrees; the camera at azimuth ``a`` and elevation ``e`` sits at
``distance * (cos e cos a, cos e sin a, sin e)`` and looks at the origin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmalign.data.shapes import COLORS, MIN_SIZE, PALETTE, WHITE, Rgb
from mmalign.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

KINDS: tuple[str, ...] = ("sphere", "box")
_LIGHT = np.array([0.4, -0.3, 0.87]) / np.linalg.norm([0.4, -0.3, 0.87])
_AMBIENT = 0.55


@dataclass(frozen=True)
class Solid:
    """A ``sphere`` of radius ``size`` or an upright ``box`` of half side ``size`` turned by ``yaw`` degrees about z."""

    kind: str
    color: str
    center: tuple[float, float, float]
    size: float
    yaw: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DataError(f"kind={self.kind!r} is unknown; allowed: {', '.join(KINDS)}")
        if self.color not in PALETTE:
            raise DataError(f"color={self.color!r} is unknown; allowed: {', '.join(COLORS)}")
        if not self.size > 0:
            raise DataError(f"size={self.size} must be positive (world units; the scene fills about [-1, 1])")


@dataclass(frozen=True)
class Scene3D:
    """Opaque solids around the origin on a plain ``background`` (8-bit RGB)."""

    solids: tuple[Solid, ...]
    background: Rgb = WHITE


def caption_3d(scene: Scene3D) -> str:
    """The solids in words, e.g. ``"a red sphere and a blue box"``."""
    return " and ".join(f"a {solid.color} {solid.kind}" for solid in scene.solids)


def sample_scene_3d(generator: torch.Generator, count: int = 1, *, background: Rgb = WHITE) -> Scene3D:
    """A random scene of ``count`` (1 to 3) solids that neither overlap nor leave the ball of radius 1.

    Raises:
        DataError: ``count`` is not 1, 2 or 3.
    """
    if count not in (1, 2, 3):
        raise DataError(f"count={count} solids; allowed: 1, 2, 3")
    uniform = torch.rand(count + 1, 6, generator=generator, dtype=torch.float64).tolist()
    turn = uniform[count][0] * 2 * np.pi
    solids = []
    for index, (kind, color, size, yaw, ring, height) in enumerate(uniform[:count]):
        # Several solids stand on a ring, so that they are apart whatever their sizes: radius 0.52, reach <= 0.42.
        angle = turn + 2 * np.pi * index / count + (ring - 0.5) * 0.1
        distance = 0.52 if count > 1 else 0.1 * ring
        kind_name = KINDS[int(kind * len(KINDS))]
        reach = 0.32 + 0.1 * size if count > 1 else 0.5 + 0.2 * size
        solids.append(
            Solid(
                kind_name,
                COLORS[int(color * len(COLORS))],
                (distance * float(np.cos(angle)), distance * float(np.sin(angle)), 0.2 * (height - 0.5)),
                # A box reaches sqrt(3) half sides into its corners.
                reach if kind_name == "sphere" else reach / 3**0.5,
                360 * yaw,
            )
        )
    return Scene3D(tuple(solids), background)


def camera_to_world(azimuth: float, elevation: float, distance: float = 2.7) -> NDArray[np.float64]:
    """The ``[3, 4]`` camera-to-world matrix ``[right, up, backward, position]`` of an orbit camera (angles in degrees).

    Raises:
        DataError: the camera looks straight up or down (its "right" is then undefined), or ``distance`` <= 0.
    """
    if not distance > 0 or not abs(elevation) < 90:
        raise DataError(f"elevation={elevation}, distance={distance}: need |elevation| < 90 and distance > 0")
    a, e = np.deg2rad(azimuth), np.deg2rad(elevation)
    backward = np.array([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)])
    right = np.array([-np.sin(a), np.cos(a), 0.0])
    up = np.cross(backward, right)
    return np.stack([right, up, backward, distance * backward], axis=1)


def _hit_sphere(origin: NDArray[Any], rays: NDArray[Any], solid: Solid) -> tuple[NDArray[Any], NDArray[Any]]:
    """Distance to the first hit ``[R]`` (inf for a miss) and outward normal ``[R, 3]`` for unit ``rays``."""
    offset = origin - np.asarray(solid.center)
    half_b = rays @ offset
    discriminant = half_b**2 - (offset @ offset - solid.size**2)
    distance = -half_b - np.sqrt(np.maximum(discriminant, 0.0))
    distance = np.where((discriminant > 0) & (distance > 0), distance, np.inf)
    reached = np.where(np.isfinite(distance), distance, 0.0)
    return distance, (offset + reached[:, None] * rays) / solid.size


def _hit_box(origin: NDArray[Any], rays: NDArray[Any], solid: Solid) -> tuple[NDArray[Any], NDArray[Any]]:
    """As :func:`_hit_sphere`, by the slab method in the box's own frame."""
    yaw = np.deg2rad(solid.yaw)
    turn = np.array([[np.cos(yaw), -np.sin(yaw), 0.0], [np.sin(yaw), np.cos(yaw), 0.0], [0.0, 0.0, 1.0]])
    start, way = (origin - np.asarray(solid.center)) @ turn, rays @ turn
    way = np.where(np.abs(way) < 1e-12, 1e-12, way)
    near_plane, far_plane = (-np.sign(way) * solid.size - start) / way, (np.sign(way) * solid.size - start) / way
    axis = near_plane.argmax(axis=1)
    entry, leave = near_plane.max(axis=1), far_plane.min(axis=1)
    index = np.arange(len(rays))
    normal = np.zeros_like(rays)
    normal[index, axis] = -np.sign(way[index, axis])
    return np.where((entry < leave) & (entry > 0), entry, np.inf), normal @ turn.T


def render_3d(
    scene: Scene3D,
    azimuth: float,
    elevation: float,
    size: int = 32,
    *,
    distance: float = 2.7,
    field_of_view: float = 50.0,
    oversample: int = 3,
) -> Image.Image:
    """The scene from an orbit camera as a ``size`` x ``size`` RGB picture, ``oversample**2`` rays per pixel.

    ``azimuth``, ``elevation`` and ``field_of_view`` are in degrees; the focal length in pixels is
    ``size / (2 tan(field_of_view / 2))``.

    Raises:
        DataError: ``size`` below 16, or an impossible camera (see :func:`camera_to_world`).
    """
    from PIL import Image

    if size < MIN_SIZE:
        raise DataError(f"size={size} is too small; use at least {MIN_SIZE}")
    pose = camera_to_world(azimuth, elevation, distance)
    samples = (np.arange(size * oversample) + 0.5) / oversample - size / 2
    focal = size / (2 * np.tan(np.deg2rad(field_of_view) / 2))
    column, row = np.meshgrid(samples / focal, -samples / focal)
    rays = np.stack([column.ravel(), row.ravel(), -np.ones(column.size)], axis=1) @ pose[:, :3].T
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)

    nearest = np.full(len(rays), np.inf)
    pixels = np.empty((len(rays), 3))
    pixels[:] = scene.background
    for solid in scene.solids:
        reached, normal = (_hit_sphere if solid.kind == "sphere" else _hit_box)(pose[:, 3], rays, solid)
        front = reached < nearest
        shade = _AMBIENT + (1 - _AMBIENT) * np.maximum(normal[front] @ _LIGHT, 0.0)
        pixels[front] = shade[:, None] * np.asarray(PALETTE[solid.color], dtype=np.float64)
        nearest[front] = reached[front]
    image = pixels.reshape(size, oversample, size, oversample, 3).mean(axis=(1, 3))
    return Image.fromarray(np.rint(image).astype(np.uint8))


def render_views(
    scene: Scene3D, azimuths: Sequence[float], elevation: float = 20.0, size: int = 32, **options: Any
) -> list[Image.Image]:
    """One :func:`render_3d` per azimuth at a common elevation: a consistent multi-view sample."""
    return [render_3d(scene, azimuth, elevation, size, **options) for azimuth in azimuths]
