"""Data sets of samples: one row per sample, written as a ``datasets`` folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmalign.errors import DataError
from mmalign.policies.base import Rollout


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
