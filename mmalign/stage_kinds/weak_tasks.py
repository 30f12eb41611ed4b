"""The weak_tasks stage: an evaluation per task -> a map of what the model can do, and the training rows of its weak tasks."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mmalign.config import Options
from mmalign.core.selection import kept_count
from mmalign.data.concatenation import column
from mmalign.data.loading import DataOptions, load_rows
from mmalign.errors import ConfigError, DataError
from mmalign.stage_kinds.records import as_they_are, write_in_chunks
from mmalign.stages import StageContext, StageResult, stage
from mmalign.training.checkpoint import write_json


class WeakTasksOptions(Options):
    """Options of the weak_tasks stage."""

    evaluation: str
    """Folder of an evaluate stage with ``by`` (the map of the model's capabilities)."""
    data: DataOptions
    """Training rows, of which those of weak tasks are kept."""
    by: str = "task"
    """Column of the training rows that names their task."""
    measure: str | None = None
    """Reward that decides; null takes the first that was measured."""
    weak_threshold: float | None = None
    """Tasks with a lower score are weak; null goes by weak_fraction alone."""
    weak_fraction: float = 1 / 3
    """Without a threshold, or where no task is below it: the share of tasks, the worst first, that count as weak."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse values without a meaning."""
        if not 0 < self.weak_fraction <= 1:
            raise ValueError(f"weak_fraction must be in (0, 1], not {self.weak_fraction}")


@stage("weak_tasks", options=WeakTasksOptions, outputs=("data", "folder"))
def weak_tasks(options: WeakTasksOptions, context: StageContext) -> StageResult:
    """Find the tasks that a model is worst at, and keep their training rows."""
    scores = task_scores(options.evaluation, options.measure)
    weak = weakest(scores, threshold=options.weak_threshold, fraction=options.weak_fraction)
    if options.weak_threshold is not None and min(scores.values()) >= options.weak_threshold:
        context.say(f"{context.name}: no task is below weak_threshold {options.weak_threshold:g}; taking the worst "
                    f"{len(weak)} of {len(scores)} tasks")
    rows = load_rows(options.data, seed=context.seed)
    if options.by not in rows[0]:
        raise DataError(f"by: the rows have no column {options.by!r}; they have {', '.join(rows[0])}")
    names = [str(name) for name in column(rows, options.by)]
    counts = Counter(names)
    missing = [task for task in weak if not counts[task]]
    if missing:
        raise DataError(f"data.path: task {missing[0]!r} is weak, and there are no training rows of it; tasks are "
                        f"{', '.join(sorted(counts))}")
    chosen = [index for index, name in enumerate(names) if name in weak]
    kept = rows.select(chosen) if hasattr(rows, "select") else [rows[index] for index in chosen]
    data, numbers = write_in_chunks(context, kept, as_they_are)
    write_json(context.folder / "capabilities.json", {"scores": scores, "weak": weak, "rows": dict(counts)})
    metrics = {"rows": numbers["rows"], "weak": float(len(weak)), "tasks": float(len(scores))}
    metrics |= {f"score/{task}": value for task, value in scores.items()} | {f"weak/{task}": 1.0 for task in weak}
    if not context.quiet:
        Console(stderr=True).print(_table(scores, weak, counts, context.name))
    return StageResult({"data": str(data), "folder": str(context.folder)}, metrics, {"weak": weak})


def task_scores(folder: str, measure: str | None) -> dict[str, float]:
    """Score of every task in an evaluate stage's folder; raises ConfigError when it was not measured per task."""
    try:
        manifest = json.loads((Path(folder) / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConfigError(f"evaluation: {folder} is no folder of a finished stage (no manifest.json); evaluate the model per "
                          "task first, weak tasks are known from nothing else") from None
    found: dict[str, dict[str, float]] = {}
    for name, value in manifest.get("metrics", {}).items():
        match = re.fullmatch(r"group/(.+)/([^/]+)", name)
        if match and match[2] != "error" and value is not None and math.isfinite(value):
            found.setdefault(match[2], {})[match[1]] = float(value)
    if not found:
        raise ConfigError(f"evaluation: {folder} was not measured per task; give its evaluate stage by: the column of the task")
    if measure is None:
        return next(iter(found.values()))
    if measure not in found:
        raise ConfigError(f"measure: {measure!r} was not measured in {folder}; it has {', '.join(found)}")
    return found[measure]


def weakest(scores: Mapping[str, float], *, threshold: float | None, fraction: float) -> list[str]:
    """Tasks below ``threshold``; where there is none, the worst ``fraction`` of them (at least one), worst first.

    Equal scores are taken in the order of ``scores``.
    """
    order = sorted(scores, key=lambda task: scores[task])
    below = [task for task in order if threshold is not None and scores[task] < threshold]
    return below or order[: kept_count(len(order), fraction)]


def _table(scores: Mapping[str, float], weak: Sequence[str], counts: Mapping[str, int], title: str) -> Table:
    table = Table("task", "score", "training rows", "", title=title, title_justify="left")
    for task, value in sorted(scores.items(), key=lambda item: item[1]):
        table.add_row(task, f"{value:.3f}", str(counts.get(task, 0)), "weak" if task in weak else "")
    return table
