"""Data sets of samples: one row per sample, written as a ``datasets`` folder."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.errors import DataError
from mmalign.policies.base import Rollout
from mmalign.training.checkpoint import atomic_folder
from mmalign.training.tracking import ProgressBar

if TYPE_CHECKING:
    from mmalign.stages import StageContext

ROWS_PER_CHUNK = 1024
"""Rows read, worked on and written together by stages whose work is cheap; a killed stage resumes at a whole chunk."""

JUDGED_PER_CHUNK = 64
"""The same for stages that ask rewards, which may be models or servers."""

CHUNKS_PER_BLOCK = 256
"""Chunks that are joined as soon as all are written, so that the number of files stays small however many rows there are."""

Chunk = tuple[list[dict[str, Any]], dict[str, float]]
"""Rows that a chunk became, and numbers that are summed over chunks."""


class NoRowsError(DataError):
    """A stage is left without a single row."""


def as_they_are(rows: list[dict[str, Any]], chunk: range) -> Chunk:
    """Rows that a stage has chosen already."""
    return rows, {}


def write_in_chunks(
    context: StageContext, rows: Sequence[Mapping[str, Any]], make: Callable[[list[dict[str, Any]], range], Chunk], *,
    size: int = ROWS_PER_CHUNK,
) -> tuple[Path, dict[str, float]]:
    """Turn ``rows`` into a data set on disk, ``size`` rows in memory at a time; chunks already written are kept.

    ``make`` gets the rows of a chunk and their positions. Returns the folder of the data set and the summed numbers, with
    ``rows`` among them. Raises NoRowsError when no row is left.
    """
    data, parts = context.folder / "data", context.folder / "parts"
    chunks = [range(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]
    blocks = [range(start, min(start + CHUNKS_PER_BLOCK, len(chunks))) for start in range(0, len(chunks), CHUNKS_PER_BLOCK)]
    with ProgressBar(context.name, len(chunks), quiet=context.quiet) as bar:
        for index, block in enumerate(blocks):
            joined = parts / f"block-{index:06d}"
            for number in block if not joined.exists() else ():
                target = parts / f"{number:06d}"
                if not target.exists():
                    records, numbers = make([dict(rows[i]) for i in chunks[number]], chunks[number])
                    with atomic_folder(target) as folder:
                        (folder / "numbers.json").write_text(json.dumps({**numbers, "rows": len(records)}), encoding="utf-8")
                        if records:
                            save_records(records, folder / "data")
                bar.update(number + 1, {})
            _join([parts / f"{number:06d}" for number in block], joined)
            bar.update(block.stop, {})
    folders = [parts / f"block-{index:06d}" for index in range(len(blocks))]
    if not any((folder / "data").exists() for folder in folders):
        raise NoRowsError(f"stage {context.name}: no row is left of the {len(rows)} that data.path gave")
    totals = _totals(folders)
    _save_joined(folders, data)
    shutil.rmtree(parts, ignore_errors=True)
    return data, totals


def _join(parts: Sequence[Path], target: Path) -> None:
    """Chunks into one block, once; a killed stage finds the block, the chunks, or both."""
    if not target.exists():
        with atomic_folder(target) as folder:
            (folder / "numbers.json").write_text(json.dumps(_totals(parts)), encoding="utf-8")
            if any((part / "data").exists() for part in parts):
                _save_joined(parts, folder / "data")
    for part in parts:
        shutil.rmtree(part, ignore_errors=True)


def _totals(folders: Sequence[Path]) -> dict[str, float]:
    totals: dict[str, float] = {}
    for folder in folders:
        for name, value in json.loads((folder / "numbers.json").read_text(encoding="utf-8")).items():
            totals[name] = totals.get(name, 0.0) + float(value)
    return totals


def _save_joined(folders: Sequence[Path], target: Path) -> None:
    """The rows of all folders that have some as one data set."""
    from datasets import concatenate_datasets, load_from_disk

    filled = [folder / "data" for folder in folders if (folder / "data").exists()]
    joined = concatenate_datasets([load_from_disk(str(folder)) for folder in filled])
    with atomic_folder(target) as folder:
        joined.save_to_disk(str(folder))



def write_csv(file: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Records as a CSV file whose columns are those of any record, in the order they appear; an empty file for none."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        if records:
            writer = csv.DictWriter(stream, list(dict.fromkeys(name for record in records for name in record)))
            writer.writeheader()
            writer.writerows(records)


def sample_records(rollout: Rollout, examples: Sequence[Mapping[str, Any]], *, first_group: int = 0) -> list[dict[str, Any]]:
    """One data row per sample: the prompt's columns, the sample (``completion`` or ``image``) and its group."""
    records = []
    for i, at in enumerate(rollout.group.tolist()):
        sample = rollout.samples[i]
        own = {"completion": sample} if isinstance(sample, (str, list)) else {"image": sample}
        # The row's own sample gives way to the new one; pictures that belong to a text prompt stay.
        replaced = ("completion", "image", "id") if "completion" in own else ("completion", "image", "images", "id")
        kept = {k: v for k, v in examples[at].items() if k not in replaced}
        reason = {"finish_reason": rollout.finish_reason[i]} if rollout.finish_reason else {}
        records.append({**kept, **own, "group": first_group + at, "id": f"{first_group + at}-{i}", **reason})
    return records


def save_records(records: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write rows as a datasets folder; PIL images, and lists of them, become image columns."""
    from datasets import Dataset, Features, Image, List, disable_progress_bars
    from PIL.Image import Image as PILImage

    disable_progress_bars()
    pictures: dict[str, Any] = {}
    for name, value in records[0].items():
        if isinstance(value, PILImage):
            pictures[name] = Image()
        elif isinstance(value, list) and value and isinstance(value[0], PILImage):
            pictures[name] = List(Image())
    plain = Dataset.from_list([{k: v for k, v in record.items() if k not in pictures} for record in records])
    if pictures:
        features = Features({**plain.features, **pictures})
        plain = Dataset.from_list([dict(record) for record in records], features=features)
    plain.save_to_disk(str(folder))


def sample_column(row: Mapping[str, Any]) -> str:
    """The column that holds a row's sample; raises DataError when there is none."""
    name = next((name for name in ("completion", "image", "images", "views") if name in row), None)
    if name is None:
        raise DataError(f"data.path: no sample in the rows: completion, image or views is needed; columns are {', '.join(row)}")
    return name


def sample_in(row: Mapping[str, Any], name: str) -> Any:
    """The sample of a row; the list of one picture that a loaded ``image`` column becomes is unwrapped."""
    value = row[name]
    if name == "images":
        if len(value) != 1:
            raise DataError(f"data.path: column images holds {len(value)} pictures in a row; a sample is exactly one")
        return value[0]
    return value
