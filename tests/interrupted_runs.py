"""Runs that are killed in the middle, and what two runs must have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmalign.training.loop import Loop
from mmalign.training.tracking import read_metrics


class Killed(BaseException):
    """Stands for a kill in the middle of a run."""


def kill_at(number: int, run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Start ``run`` and end it before its optimiser update ``number`` (from 1)."""
    update, calls = Loop.update, []

    def interrupted(self: Loop, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            raise Killed
        return update(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "update", interrupted)
        with pytest.raises(Killed):
            run()


def records(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run without what depends on the machine."""
    return [{k: v for k, v in record.items() if "second" not in k} for record in read_metrics(folder / "metrics.jsonl")]
