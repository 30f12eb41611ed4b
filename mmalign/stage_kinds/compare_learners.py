"""The compare_learners stage: several ways of learning the same tasks, at the end and where each first reaches a level."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mmalign.config import Options
from mmalign.errors import ConfigError
from mmalign.metrics.continual import Crossing, first_crossing
from mmalign.stage_kinds.compare_parents import measures
from mmalign.stage_kinds.records import write_csv
from mmalign.stages import StageContext, StageResult, stage
from mmalign.training.checkpoint import write_json

Curve = list[tuple[int, dict[str, float]]]
FIGURES = ("average_accuracy", "learning_accuracy", "backward_transfer", "forgetting")
"""What is compared at the end, where a matrix has it."""


class CurveOptions(Options):
    """One training stage that was evaluated on all tasks while it ran (``evaluation.every``, ``evaluation.by: task``)."""

    learner: str
    """Whose stage it is."""
    task: str
    """The task that it learns, whose level is waited for."""
    folder: str
    """Folder of the training stage."""
    before: dict[str, str] = {}
    """Folders of the evaluations just before it, by task: what the scores at the level are compared with."""


class CompareLearnersOptions(Options):
    """Options of the compare_learners stage."""

    matrices: dict[str, str] = {}
    """Folders of forgetting_matrix stages, by learner."""
    curves: list[CurveOptions] = []
    """Training stages to read at equal task accuracy."""
    levels: dict[str, float] = {}
    """Task -> the score at which its curves are read."""

    def model_post_init(self, context: Any, /) -> None:
        """There must be something to compare, and a level for every curve."""
        if not self.matrices and not self.curves:
            raise ValueError("give matrices, curves, or both; there is nothing to compare")
        missing = [curve.task for curve in self.curves if curve.task not in self.levels]
        if missing:
            raise ValueError(f"levels: no level for task {missing[0]!r} of curves; learners are compared where they reach one")


@stage("compare_learners", options=CompareLearnersOptions, outputs=("folder",))
def compare_learners(options: CompareLearnersOptions, context: StageContext) -> StageResult:
    """Put learners side by side: final figures, and what each has forgotten when it first reaches a task's level."""
    metrics: dict[str, float] = {}
    for learner, folder in options.matrices.items():
        found = _matrix(folder, learner)
        metrics |= {f"{name}/{learner}": found[name] for name in found
                    if name in FIGURES or (name.startswith("general/") and name.endswith("/change"))}
    records: list[dict[str, Any]] = []
    curves: list[tuple[CurveOptions, Curve]] = []
    for entry in options.curves:
        curve = read_curve(entry)
        curves.append((entry, curve))
        crossing = first_crossing(curve, entry.task, options.levels[entry.task])
        record = describe_crossing(entry, crossing, options.levels[entry.task], highest=max(s[entry.task] for _, s in curve))
        records.append(record)
        if crossing is not None:
            label = f"{entry.learner}/{entry.task}"
            metrics |= {f"at_level/{label}/{name}": value for name, value in crossing.scores.items() if name != entry.task}
            metrics[f"step/{label}"] = float(crossing.step)
            if record["change"] is not None:
                metrics[f"change/{label}"] = record["change"]
    write_json(context.folder / "comparison.json", {"metrics": metrics, "crossings": records, "levels": options.levels})
    write_csv(context.folder / "crossings.csv", records)
    if curves:
        draw(curves, options.levels, context.folder / "curves.png")
    if not context.quiet:
        console = Console(stderr=True)
        if options.matrices:
            console.print(_final_table(options.matrices, metrics, context.name))
        if records:
            console.print(_matched_table(records, context.name))
    return StageResult({"folder": str(context.folder)}, metrics)


def read_curve(entry: CurveOptions) -> Curve:
    """(step, score per task) of every evaluation made while a stage trained, and of those before it as step 0."""
    curve: Curve = []
    if entry.before:
        curve.append((0, {task: next(iter(measures(folder, f"curves.before.{task}").values()))
                          for task, folder in entry.before.items()}))
    for file in (Path(entry.folder) / "samples").glob("step-*/metrics.json"):
        values = json.loads(file.read_text(encoding="utf-8"))
        scores: dict[str, float] = {}
        for name, value in values.items():
            match = re.fullmatch(r"group/(.+)/([^/]+)", name)
            if match and match[2] != "error":
                scores.setdefault(match[1], float(value))
        if not scores:
            raise ConfigError(f"curves: the evaluations in {entry.folder} are not per task; set evaluation.by to their column")
        curve.append((int(file.parent.name.removeprefix("step-")), scores))
    if len(curve) <= bool(entry.before):
        raise ConfigError(f"curves: {entry.folder} was not evaluated while it trained (no samples/step-N/metrics.json); give its "
                          "stage an evaluation with every")
    return sorted(curve, key=lambda point: point[0])


def describe_crossing(entry: CurveOptions, crossing: Crossing | None, level: float, *, highest: float) -> dict[str, Any]:
    """One row: where the level was reached, and the scores of the other tasks there and their change."""
    record: dict[str, Any] = {"learner": entry.learner, "task": entry.task, "level": level, "highest": highest,
                              "step": None if crossing is None else crossing.step, "change": None}
    if crossing is None:
        return record
    changes = []
    for task, value in crossing.scores.items():
        if task == entry.task:
            continue
        record[f"score/{task}"] = value
        if task in entry.before:
            before = next(iter(measures(entry.before[task], f"curves.before.{task}").values()))
            record[f"change/{task}"] = value - before
            changes.append(value - before)
    if changes:
        record["change"] = sum(changes) / len(changes)
    return record


def _matrix(folder: str, learner: str) -> dict[str, float]:
    try:
        found: dict[str, float] = json.loads((Path(folder) / "matrix.json").read_text(encoding="utf-8"))["metrics"]
    except (OSError, ValueError, KeyError):
        raise ConfigError(f"matrices.{learner}: {folder} is no folder of a finished forgetting_matrix stage") from None
    return found


def draw(curves: Sequence[tuple[CurveOptions, Curve]], levels: Mapping[str, float], path: Path) -> None:
    """Score of the other tasks over the score of the task that is learned: higher is less forgetting at equal accuracy."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(entry.task for entry, _ in curves))
    figure = Figure(figsize=(4.6 * len(tasks), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for place, task in enumerate(tasks):
        axes = figure.add_subplot(1, len(tasks), place + 1)
        for entry, curve in curves:
            others = [[value for name, value in scores.items() if name != task] for _, scores in curve]
            if entry.task == task and all(others):
                axes.plot([scores[task] for _, scores in curve], [sum(o) / len(o) for o in others], marker="o", markersize=3,
                          linewidth=1.2, label=entry.learner)
        axes.axvline(levels[task], color="0.5", linestyle="--", linewidth=1)
        axes.set_xlabel(f"score on {task}")
        axes.set_ylabel("mean score on the other tasks")
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)


def _final_table(matrices: Mapping[str, str], metrics: Mapping[str, float], title: str) -> Table:
    names = list(dict.fromkeys(name.rpartition("/")[0] for name in metrics
                               if name.rpartition("/")[2] in matrices and not name.startswith(("step/", "at_level/"))))
    names = [name for name in names if name in FIGURES or name.startswith("general/")]
    table = Table("learner", *[name.replace("_", " ") for name in names], title=f"{title}: after the last stage",
                  title_justify="left")
    for learner in matrices:
        values = [metrics.get(f"{name}/{learner}") for name in names]
        table.add_row(learner, *["" if value is None else f"{value:+.3f}" for value in values])
    return table


def _matched_table(records: Sequence[Mapping[str, Any]], title: str) -> Table:
    table = Table("learner", "task", "level", "reached at update", "other tasks there", "change", title_justify="left",
                  title=f"{title}: where the level is first reached")
    for record in records:
        others = ", ".join(f"{name[6:]} {value:.3f}" for name, value in record.items() if name.startswith("score/"))
        reached = f"never (best {record['highest']:.3f})" if record["step"] is None else str(record["step"])
        table.add_row(record["learner"], record["task"], f"{record['level']:g}", reached, others,
                      "" if record["change"] is None else f"{record['change']:+.3f}")
    return table
