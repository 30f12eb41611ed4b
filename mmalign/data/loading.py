"""Reading a data set: a built-in asset, a local file or folder, or a name on the Hugging Face hub."""

from __future__ import annotations

import difflib
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import AliasChoices, Field

from mmalign.config import Options
from mmalign.core.seeding import derive_seed
from mmalign.data.assets import asset_rows, is_asset
from mmalign.data.columns import canonical_row, check_ids, check_rows, is_sharegpt, rename_plan
from mmalign.errors import AssetError, DataError

if TYPE_CHECKING:
    import datasets

FILE_FORMATS = {
    ".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow",
    ".txt": "text",
}
"""File name ending -> builder of the datasets library."""

_IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class DataOptions(Options):
    """Where rows come from and which of them to take."""

    path: str
    """``asset:NAME``, a .json, .jsonl, .csv, .parquet, .arrow or .txt file, a folder (of such files, of images, or
    saved by datasets), or a data set's name on the Hugging Face hub."""
    split: str = "train"
    """Split of the data set."""
    name: str | None = None
    """Configuration (subset) of a data set on the hub."""
    limit: int | None = Field(default=None, validation_alias=AliasChoices("limit", "rows", "max_samples"))
    """Rows to take; null takes all (assets that are made on the spot: their own default)."""
    shuffle: bool = False
    """Take a random subset for ``limit`` rather than the first rows; the order depends on the run's seed alone."""
    part: str | None = None
    """``2/4``: the second of four equal runs of rows, of those that ``limit`` and ``shuffle`` leave; null takes all."""
    columns: dict[str, str | None] = {}
    """Column names: ``theirs: ours``; ``theirs: null`` leaves a column out."""
    arguments: dict[str, Any] = {}
    """Further arguments of an asset, such as ``levels: [1, 2]`` of arithmetic."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse values without a meaning."""
        if not self.path.strip():
            raise ValueError("path is empty")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1 row (or null), not {self.limit}")
        if self.part is not None:
            part_range(self.part, 0)
        if self.arguments and not is_asset(self.path):
            raise ValueError("arguments belong to assets (path: asset:NAME)")


def load_rows(options: DataOptions, seed: int = 0, *, key: str = "data") -> datasets.Dataset | list[dict[str, Any]]:
    """The rows, under our column names, each with a unique ``id`` (its number when the data has none).

    Assets give a list, everything else a ``datasets.Dataset`` that stays on disk. ``key`` is the configuration key of
    ``options``. Raises DataError naming ``<key>.path`` (or the option at fault) when nothing can be read, a split is
    missing, a mapped column does not exist, ids repeat, or there are no rows.
    """
    try:
        rows = _load(options, seed)
        if options.part is None:
            return rows
        kept = part_range(options.part, len(rows))
        check_rows(len(kept), source=f"data.part: {options.part} of {len(rows)} rows")
        return rows[kept.start:kept.stop] if isinstance(rows, list) else rows.select(kept)
    except (AssetError, DataError) as error:
        message = re.sub(r"\bdata\.(?=(?:path|split|name|limit|part|columns|arguments)\b)", f"{key}.", str(error))
        raise type(error)(message) from error.__cause__


def part_range(part: str, rows: int) -> range:
    """The rows of ``"k/n"``, the k-th of n consecutive parts whose sizes differ by one at most; raises ValueError."""
    match = re.fullmatch(r"(\d+)/(\d+)", part.strip())
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"part must be written k/n with 1 <= k <= n, such as 1/3, not {part!r}")
    number, parts = int(match[1]), int(match[2])
    return range(rows * (number - 1) // parts, rows * number // parts)


def _load(options: DataOptions, seed: int) -> datasets.Dataset | list[dict[str, Any]]:
    if is_asset(options.path):
        return _asset(options, seed)
    dataset = _read(options)
    check_rows(len(dataset), source=f"data.path: {options.path}")
    mapping = dict(options.columns)
    if "id" in mapping and "id" in dataset.column_names:
        theirs = mapping.pop("id")
        dataset = dataset.rename_column("id", theirs) if theirs else dataset.remove_columns(["id"])
    if "id" not in dataset.column_names and "id" not in mapping.values():
        # Numbered before any row is left out, so that an id means the same row in every run.
        dataset = dataset.add_column("id", [str(index) for index in range(len(dataset))])
    if options.shuffle:
        order = list(range(len(dataset)))
        random.Random(derive_seed(seed, "data", "subset")).shuffle(order)
        dataset = dataset.select(order)
    if options.limit is not None:
        dataset = dataset.select(range(min(options.limit, len(dataset))))
    dataset = _canonical(dataset, mapping)
    check_ids(dataset["id"], source=f"data.path: {options.path}")
    return dataset


def _asset(options: DataOptions, seed: int) -> list[dict[str, Any]]:
    try:
        rows = asset_rows(options.path, split=options.split, n=options.limit, seed=seed, **options.arguments)
    except (AssetError, DataError) as error:
        raise type(error)(f"data.path: {options.path}: {error}") from None
    check_rows(len(rows), source=f"data.path: {options.path}")
    plan = rename_plan(list(rows[0]), options.columns)
    rows = [canonical_row(row, plan) for row in rows]
    for index, row in enumerate(rows):
        row.setdefault("id", str(index))
    check_ids((row["id"] for row in rows), source=f"data.path: {options.path}")
    if options.shuffle:
        random.Random(derive_seed(seed, "data", "subset")).shuffle(rows)
    return rows


def _canonical(dataset: datasets.Dataset, mapping: Mapping[str, str | None]) -> datasets.Dataset:
    """Columns renamed, and the few columns whose form changes rewritten (on disk, row by row)."""
    names = dataset.column_names
    plan = rename_plan(names, mapping)
    reverse = {ours: theirs for theirs, ours in plan.items() if ours is not None}
    image = reverse.get("images", "images" if "images" in names else None)
    turns = reverse.get("messages", "messages" if "messages" in names else None)
    joins = plan.get("instruction") == "prompt" and "input" in names
    first = dataset[0] if turns else {}
    result = dataset
    if joins or (turns and is_sharegpt(first[turns])):
        touched = [name for name in (*(("instruction", "input") if joins else ()), *([turns] if turns else ())) if name]
        inner = {name: plan[name] for name in touched if name in plan}

        def rewrite(row: Mapping[str, Any]) -> dict[str, Any]:
            return canonical_row({name: row[name] for name in touched}, inner)

        result = dataset.map(rewrite, remove_columns=touched, desc="converting rows")
        plan = {theirs: ours for theirs, ours in plan.items() if theirs not in touched}
    if image is not None and not _is_list(dataset.features[image]):
        result = _wrap_images(result, image, "images")
        plan.pop(image, None)
    removed = [theirs for theirs, ours in plan.items() if ours is None]
    renamed = {theirs: ours for theirs, ours in plan.items() if ours is not None}
    result = result.remove_columns(removed) if removed else result
    return result.rename_columns(renamed) if renamed else result


def _is_list(feature: Any) -> bool:
    return isinstance(feature, list) or type(feature).__name__ in ("List", "LargeList", "Sequence")


def _wrap_images(dataset: datasets.Dataset, theirs: str, ours: str) -> datasets.Dataset:
    """A column of single images as lists of one, without decoding them."""
    from datasets import Features, Image
    from datasets import Sequence as ListOf

    if isinstance(dataset.features[theirs], Image):
        dataset = dataset.cast_column(theirs, Image(decode=False))
    others = {name: feature for name, feature in dataset.features.items() if name != theirs}
    inner = dataset.features[theirs]
    wrapped = dataset.map(
        lambda row: {ours: [] if row[theirs] is None else [row[theirs]]}, remove_columns=[theirs],
        features=Features({**others, ours: ListOf(inner)}), desc="converting images",
    )
    return wrapped.cast_column(ours, ListOf(Image())) if isinstance(inner, Image) else wrapped


def _read(options: DataOptions) -> datasets.Dataset:
    path = Path(options.path).expanduser()
    if path.is_file():
        return _read_file(path, options)
    if path.is_dir():
        return _read_folder(path, options)
    looks_local = options.path.startswith((".", "/", "~")) or path.suffix in FILE_FORMATS
    if looks_local or not _HUB_NAME.fullmatch(options.path):
        around = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, around, n=1)
        hint = f"; did you mean {path.parent / close[0]}?" if close else ""
        raise DataError(f"data.path: {options.path} does not exist{hint}")
    return _read_hub(options)


def _guarded(read: Callable[[], Any], options: DataOptions, *, what: str) -> Any:
    """Run a reader of the datasets library; its many errors become one that names ``data.path``."""
    from datasets.exceptions import DatasetGenerationError

    try:
        return read()
    except DatasetGenerationError as error:
        raise DataError(f"data.path: {what} {options.path} cannot be read: {error.__cause__ or error}") from None
    except Exception as error:  # whatever a reader stumbles on, the cause is this file
        raise DataError(f"data.path: {what} {options.path} cannot be read: {error}") from error


def _pick_split(loaded: Any, options: DataOptions) -> datasets.Dataset:
    """One split of a loaded data set; ``train[:100]`` and the like are cut here, where the splits are known."""
    from datasets import Dataset, ReadInstruction

    if isinstance(loaded, Dataset):
        if options.split not in ("train", "all", str(loaded.split)):
            raise DataError(f"data.split: {options.path} is a single data set without splits, so {options.split!r} "
                            f"does not exist; leave data.split out")
        return loaded
    base = re.split(r"[\[+]", options.split, maxsplit=1)[0]
    if base not in loaded:
        close = difflib.get_close_matches(base, list(loaded), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise DataError(f"data.split: {options.path} has {', '.join(loaded)}, not {base!r}{hint}")
    if base == options.split:
        return loaded[base]
    try:
        instruction = ReadInstruction.from_spec(options.split)
        parts = instruction.to_absolute({name: len(part) for name, part in loaded.items()})
    except (ValueError, AssertionError) as error:
        raise DataError(f"data.split: {options.split!r}: {error}") from None
    if any(part.splitname != base for part in parts) or len(parts) > 1:
        raise DataError(f"data.split: {options.split!r} joins several parts; name one split, or a slice of one")
    return loaded[base].select(range(parts[0].from_ or 0, len(loaded[base]) if parts[0].to is None else parts[0].to))


def _read_file(path: Path, options: DataOptions) -> datasets.Dataset:
    from datasets import Dataset, DatasetDict, load_dataset

    builder = FILE_FORMATS.get(path.suffix.lower())
    if builder is None:
        raise DataError(f"data.path: {options.path}: files ending in {path.suffix or 'nothing'} cannot be read; "
                        f"allowed: {', '.join(FILE_FORMATS)}")
    if path.stat().st_size == 0:
        raise DataError(f"data.path: {options.path} is an empty file")
    extra: dict[str, Any] = {"delimiter": "\t"} if path.suffix.lower() == ".tsv" else {}
    if builder == "json":
        _check_json(path, options)
    loaded = _guarded(lambda: load_dataset(builder, data_files=str(path), **extra), options, what="file")
    assert isinstance(loaded, (Dataset, DatasetDict))
    return _pick_split(loaded, options)


def _check_json(path: Path, options: DataOptions) -> None:
    """Say which line is broken; the reader of datasets does not."""
    with path.open(encoding="utf-8", errors="replace") as stream:
        start = stream.read(4096).lstrip("\ufeff \t\r\n")
        if start.startswith("["):
            if start[1:].lstrip()[:1] not in ("{", "]", ""):
                raise DataError(f"data.path: {options.path} must be a list of objects with columns, or one "
                                f"object per line")
            return
        stream.seek(0)
        for number, line in enumerate(stream, start=1):
            if number > 100:  # a look at the start finds a wrong format; the rest is the reader's
                return
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"data.path: {options.path}, line {number} is not JSON ({error}); a file holds one "
                                f"object per line, or one list of objects") from None
            if not isinstance(row, dict):
                raise DataError(f"data.path: {options.path}, line {number} must be an object with columns, not "
                                f"{type(row).__name__}")


def _read_folder(path: Path, options: DataOptions) -> datasets.Dataset:
    from datasets import load_dataset, load_from_disk

    state = path / "state.json"
    if state.is_file() and not json.loads(state.read_text(encoding="utf-8")).get("_data_files", True):
        check_rows(0, source=f"data.path: {options.path}")  # datasets cannot load what it saved without rows
    if state.is_file() or (path / "dataset_dict.json").is_file():
        return _pick_split(_guarded(lambda: load_from_disk(str(path)), options, what="folder"), options)
    files = [entry for entry in path.rglob("*") if entry.is_file() and not entry.name.startswith(".")]
    images = any(entry.suffix.lower() in _IMAGE_ENDINGS for entry in files)
    tables = any(entry.suffix.lower() in FILE_FORMATS and entry.stem != "metadata" for entry in files)
    if images and not tables:
        loaded = _guarded(lambda: load_dataset("imagefolder", data_dir=str(path)), options, what="image folder")
    elif tables:
        loaded = _guarded(lambda: load_dataset(str(path), options.name), options, what="folder")
    else:
        raise DataError(f"data.path: the folder {options.path} holds no data: no data set saved by datasets, no "
                        f"images, and no {', '.join(FILE_FORMATS)} files")
    return _pick_split(loaded, options)


def _read_hub(options: DataOptions) -> datasets.Dataset:
    import datasets
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    offline = datasets.config.HF_HUB_OFFLINE
    try:
        loaded = load_dataset(options.path, options.name)
    except (ConnectionError, DatasetNotFoundError, FileNotFoundError, OSError) as error:
        reason = "the hub is switched off (HF_HUB_OFFLINE)" if offline else f"the hub does not give it ({error})"
        raise DataError(f"data.path: {options.path!r} is no local file or folder, and {reason}. Give a path that "
                        f"exists here, or an asset (asset:arithmetic, asset:shapes, ...)") from None
    except (ValueError, RuntimeError) as error:
        raise DataError(f"data.path: {options.path}: {error}") from None
    return _pick_split(loaded, options)


def as_examples(rows: datasets.Dataset | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """All rows in memory, as dictionaries."""
    return [dict(row) for row in rows]
