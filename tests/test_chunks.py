"""Stages work on their rows chunk by chunk: bounded memory, nothing done twice, the same result after a kill."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import load_from_disk

from mmalign.errors import DataError
from mmalign.stage_kinds import records
from mmalign.stage_kinds.records import write_in_chunks
from mmalign.stages import StageContext


class Lazy(Sequence[dict[str, Any]]):
    """100,000 rows that exist only while they are looked at."""

    def __init__(self, size: int) -> None:
        self.size, self.read = size, 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        self.read += 1
        return {"prompt": f"p{index}", "id": str(index)}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        raise AssertionError("a stage must not walk through all rows at once")


def context(folder: Path) -> StageContext:
    return StageContext("stage", folder, 0, folder, quiet=True)


def test_no_more_than_a_chunk_is_in_memory(tmp_path):
    rows, largest = Lazy(100_000), 0

    def make(examples: list[dict[str, Any]], chunk: range) -> Any:
        nonlocal largest
        largest = max(largest, len(examples))
        assert rows.read == chunk.stop  # nothing was read ahead
        return examples, {"even": float(sum(i % 2 == 0 for i in chunk))}

    data, numbers = write_in_chunks(context(tmp_path), rows, make, size=10_000)
    assert largest == 10_000
    assert numbers == {"rows": 100_000.0, "even": 50_000.0}
    stored = load_from_disk(str(data))
    assert len(stored) == 100_000
    assert stored[99_999]["prompt"] == "p99999"
    assert not (tmp_path / "parts").exists()


@pytest.mark.parametrize("killed_at", range(4))
def test_a_killed_stage_goes_on_at_the_first_chunk_that_is_not_written(killed_at, tmp_path):
    done: list[int] = []

    def make(examples: list[dict[str, Any]], chunk: range) -> Any:
        if chunk.start // 3 == killed_at and killed_at not in done:
            done.append(killed_at)
            raise KeyboardInterrupt
        done.append(chunk.start // 3)
        kept = [row for row in examples if int(row["id"]) % 2]
        return kept, {"dropped": float(len(examples) - len(kept))}

    with pytest.raises(KeyboardInterrupt):
        write_in_chunks(context(tmp_path), Lazy(10), make, size=3)
    data, numbers = write_in_chunks(context(tmp_path), Lazy(10), make, size=3)
    assert done == [*range(killed_at + 1), *range(killed_at, 4)]
    assert numbers == {"rows": 5.0, "dropped": 5.0}
    assert [row["id"] for row in load_from_disk(str(data))] == ["1", "3", "5", "7", "9"]


@pytest.mark.parametrize("killed_at", [0, 3, 4, 5, 9])
def test_chunks_become_blocks_and_a_kill_finds_either(killed_at, tmp_path, monkeypatch):
    """Few files for many rows; the rows of a finished block are never made again."""
    monkeypatch.setattr(records, "CHUNKS_PER_BLOCK", 4)
    made: list[int] = []

    def make(examples: list[dict[str, Any]], chunk: range) -> Any:
        if chunk.start == killed_at and killed_at not in made:
            made.append(killed_at)
            assert len(list((tmp_path / "parts").glob("*"))) <= 4 + 3 if killed_at else True
            raise KeyboardInterrupt
        made.append(chunk.start)
        return ([], {"seen": 1.0}) if chunk.start in (4, 5, 6, 7) else (examples, {"seen": 1.0})

    with pytest.raises(KeyboardInterrupt):
        write_in_chunks(context(tmp_path), Lazy(11), make, size=1)
    data, numbers = write_in_chunks(context(tmp_path), Lazy(11), make, size=1)
    assert made == [*range(killed_at + 1), *range(killed_at, 11)]
    assert numbers == {"rows": 7.0, "seen": 11.0}
    assert [row["id"] for row in load_from_disk(str(data))] == ["0", "1", "2", "3", "8", "9", "10"]


@pytest.mark.parametrize("left", ["both", "block"])
def test_a_kill_while_a_block_is_written(left, tmp_path, monkeypatch):
    """Between the block and the removal of its chunks both are there, and afterwards only the block."""
    monkeypatch.setattr(records, "CHUNKS_PER_BLOCK", 2)
    real = shutil.rmtree

    def killed(path: Any, **options: Any) -> None:
        if left == "block":
            real(path, **options)
        if left == "both" or path.name == "000001":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(records, "shutil", SimpleNamespace(rmtree=killed))
        with pytest.raises(KeyboardInterrupt):
            write_in_chunks(context(tmp_path), Lazy(4), lambda examples, chunk: (examples, {}), size=1)
    rows = Lazy(4)
    data, numbers = write_in_chunks(context(tmp_path), rows, lambda examples, chunk: (examples, {}), size=1)
    assert rows.read == 2  # the second block only
    assert numbers == {"rows": 4.0}
    assert [row["id"] for row in load_from_disk(str(data))] == ["0", "1", "2", "3"]


def test_nothing_left_is_an_error_that_names_the_stage(tmp_path):
    with pytest.raises(DataError, match="stage stage: no row is left of the 4"):
        write_in_chunks(context(tmp_path), Lazy(4), lambda examples, chunk: ([], {}), size=3)
