"""Checking and reading the pictures of a data set for a diffusion policy.

A picture is a PIL image, a path, encoded bytes (``{"bytes": ..., "path": ...}`` as the datasets package stores them)
or a float tensor ``[3, H, W]`` in [0, 1].
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mmalign.errors import DataError
from mmalign.policies.base import PreparationReport

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB")
"""PIL modes that convert to RGB without guessing a value range (16-bit and float pictures do not)."""

CAPTION_COLUMNS = ("prompt", "chosen_caption", "rejected_caption")


class PreparedExamples(Sequence[Mapping[str, Any]]):
    """A lazy selection of a data set's rows, each passed through ``convert`` when it is read.

    Pictures stay where they are (on disk, in an Arrow table) until a batch needs them.
    """

    def __init__(
        self, examples: Sequence[Mapping[str, Any]], indices: Sequence[int],
        convert: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    ) -> None:
        self.examples, self.indices, self.convert = examples, list(indices), convert

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> PreparedExamples: ...
    def __getitem__(self, index: int | slice) -> Mapping[str, Any] | PreparedExamples:
        if isinstance(index, slice):
            return PreparedExamples(self.examples, self.indices[index], self.convert)
        return self.convert(self.examples[self.indices[index]])


def read_image(value: Any, *, where: str = "image") -> Image.Image:
    """``value`` as an RGB picture, upright, transparency over white; raises DataError that begins with ``where``."""
    if isinstance(value, Tensor):
        return _from_tensor(value, where)
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8 or value.ndim != 3 or value.shape[2] != 3:
            raise DataError(f"{where}: an array must be uint8 [H, W, 3], not {value.dtype} {list(value.shape)}; give a PIL "
                            "image, a path, or a float tensor [3, H, W] in [0, 1]")
        value = Image.fromarray(value)
    try:
        image = _open(value)
        if image is None:
            raise DataError(f"{where}: a {type(value).__name__} is not a picture; give a PIL image, a path, or a float "
                            "tensor [3, H, W] in [0, 1]")
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where}: cannot be read as a picture ({type(error).__name__}: {error}); remove the row or repair "
                        "the file") from None
    if image.mode not in MODES:
        raise DataError(f"{where}: mode {image.mode} has no fixed range of values; convert it to 8-bit RGB")
    if "A" in image.mode or "transparency" in image.info:
        # Converting straight to RGB would show whatever colour hides below full transparency.
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
    return ImageOps.exif_transpose(image).convert("RGB")


def _open(value: Any) -> Image.Image | None:
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, (str, Path)):
        return Image.open(value)
    if isinstance(value, bytes):
        return Image.open(io.BytesIO(value))
    if isinstance(value, Mapping) and (value.get("bytes") or value.get("path")):
        return Image.open(io.BytesIO(value["bytes"]) if value.get("bytes") else value["path"])
    return None


def _from_tensor(value: Tensor, where: str) -> Image.Image:
    if value.dim() != 3 or value.shape[0] != 3 or not value.is_floating_point():
        raise DataError(f"{where}: a tensor must be float [3, H, W], not {value.dtype} {list(value.shape)}")
    low, high = float(value.min()), float(value.max())
    if not (low >= 0 and high <= 1):
        raise DataError(f"{where}: pixels lie in [{low:.3g}, {high:.3g}]; they must be in [0, 1]")
    return Image.fromarray(value.mul(255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def fit_image(image: Image.Image, height: int, width: int) -> tuple[Tensor, tuple[int, int], tuple[int, int]]:
    """Resize (bicubic) until ``height x width`` is covered, crop the middle.

    Returns pixels ``[3, height, width]`` in [0, 1], the original ``(height, width)`` and the crop's corner
    ``(top, left)`` in the resized picture.
    """
    scale = max(height / image.height, width / image.width)
    resized = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    top, left = (resized[1] - height) // 2, (resized[0] - width) // 2
    original = (image.height, image.width)
    if image.size != resized:
        image = image.resize(resized, Image.Resampling.BICUBIC)
    array = np.asarray(image.crop((left, top, left + width, top + height)))
    pixels = torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 255
    return pixels, original, (top, left)


def image_key(value: Any) -> Hashable:
    """A key that changes with the picture: path, size and time of a file, otherwise a hash of the contents."""
    if isinstance(value, Mapping) and not value.get("bytes"):
        value = value.get("path")
    if isinstance(value, (str, Path)):
        try:
            status = Path(value).stat()
        except OSError:
            return str(value)  # reading it will say what is wrong
        return str(Path(value).resolve()), status.st_mtime_ns, status.st_size
    if isinstance(value, Mapping):
        value = value["bytes"]
    if isinstance(value, bytes):
        return "bytes", hashlib.sha256(value).digest()
    if isinstance(value, Tensor):
        return "tensor", tuple(value.shape), hashlib.sha256(value.contiguous().cpu().numpy().tobytes()).digest()
    if isinstance(value, np.ndarray):
        return "array", value.shape, hashlib.sha256(value.tobytes()).digest()
    if isinstance(value, Image.Image):
        return value.mode, value.size, hashlib.sha256(value.tobytes()).digest()
    return repr(value)


def plain_image(example: Mapping[str, Any]) -> Any:
    """The picture of a single-sample row: ``image``, or the only entry of ``images``."""
    if example.get("image") is not None:
        return example["image"]
    images = example.get("images")
    return images[0] if isinstance(images, (list, tuple)) and len(images) == 1 else None


def prepare_images(
    examples: Sequence[Mapping[str, Any]], fields: tuple[str, ...], *, smallest: int,
    truncated: Callable[[Sequence[str]], Sequence[bool]],
) -> tuple[PreparedExamples, PreparationReport]:
    """Check every row; see :meth:`mmalign.policies.diffusion.DiffusionPolicy.prepare_dataset`.

    ``smallest`` = fewest pixels a side may have; ``truncated`` says of captions whether an encoder would cut them.
    """
    if fields not in ((), ("chosen", "rejected")):
        raise DataError(f"fields={fields!r}: a diffusion policy takes () (prompt + image) or ('chosen', 'rejected')")
    captioned = bool(fields) and any(_has_caption(example) for example in _peek(examples, len(examples)))
    kept: list[int] = []
    dropped: dict[str, int] = {}
    cut = 0
    for row in range(len(examples)):
        example = examples[row]
        captions = _captions(example, fields, row)
        pictures = {name: _picture(example, name, row, smallest) for name in (fields or ("image",))}
        if fields and _same(pictures["chosen"], pictures["rejected"]) and len(set(captions)) == 1:
            dropped["chosen and rejected are the same"] = dropped.get("chosen and rejected are the same", 0) + 1
            continue
        kept.append(row)
        cut += any(truncated(captions))
    if not kept:
        reasons = "; ".join(f"{count} {reason}" for reason, count in dropped.items()) or "the data set is empty"
        raise DataError(f"no row is left to train on ({reasons})")
    prepared = PreparedExamples(examples, kept, _fill_captions if captioned else dict)
    report = PreparationReport(len(examples), len(kept), dropped, cut, _describe(prepared[0], fields))
    return prepared, report


def _peek(examples: Sequence[Mapping[str, Any]], count: int) -> Sequence[Mapping[str, Any]]:
    """Rows without their pictures where the data set can leave columns out."""
    names = getattr(examples, "column_names", None)
    if names is not None and hasattr(examples, "select_columns"):
        wanted = [name for name in names if name in CAPTION_COLUMNS]
        return examples.select_columns(wanted) if wanted else []  # type: ignore[no-any-return]
    return [{name: examples[i].get(name) for name in CAPTION_COLUMNS} for i in range(count)]


def _has_caption(example: Mapping[str, Any]) -> bool:
    return example.get("chosen_caption") is not None or example.get("rejected_caption") is not None


def _fill_captions(example: Mapping[str, Any]) -> dict[str, Any]:
    """Both caption columns, the prompt where a row lacks one, so that all rows have the same columns."""
    filled = dict(example)
    for name in ("chosen_caption", "rejected_caption"):
        if filled.get(name) is None:
            filled[name] = example["prompt"]
    return filled


def _captions(example: Mapping[str, Any], fields: tuple[str, ...], row: int) -> list[str]:
    names = ["prompt"]
    if fields:
        given = [f"{name}_caption" for name in fields if example.get(f"{name}_caption") is not None]
        names = given if len(given) == len(fields) else ["prompt", *given]
    captions = []
    for name in names:
        caption = example.get(name)
        if not isinstance(caption, str):
            found = "is missing" if caption is None else f"is a {type(caption).__name__}"
            raise DataError(f"row {row}: column {name!r} {found}; a diffusion policy needs a text. Columns are "
                            f"{', '.join(example)}; rename yours with data.columns")
        if name != "prompt" and not caption.strip():
            raise DataError(f"row {row}: column {name!r} is empty; give a caption, or leave it null to use the prompt")
        captions.append(caption)
    return captions


def _picture(example: Mapping[str, Any], name: str, row: int, smallest: int) -> Image.Image:
    value = plain_image(example) if name == "image" else example.get(name)
    if value is None:
        raise DataError(f"row {row}: column {name!r} is missing or null; a diffusion policy needs one picture in it. Columns "
                        f"are {', '.join(example)}; rename yours with data.columns")
    image = read_image(value, where=f"row {row}, column {name!r}")
    if min(image.size) < smallest:
        raise DataError(f"row {row}, column {name!r}: {image.width}x{image.height} pixels; each side needs at least "
                        f"{smallest}")
    return image


def _same(first: Image.Image, second: Image.Image) -> bool:
    return first.size == second.size and first.tobytes() == second.tobytes()


def _describe(example: Mapping[str, Any], fields: tuple[str, ...]) -> str:
    def size(value: Any) -> str:
        image = read_image(value)
        return f"{image.width}x{image.height}"

    if not fields:
        return f"{example['prompt']!r} -> [image {size(plain_image(example))}]"
    parts = [f"[{name} {size(example[name])}: {example.get(f'{name}_caption') or example['prompt']!r}]" for name in fields]
    return " > ".join(parts)
