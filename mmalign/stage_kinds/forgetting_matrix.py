"""The forgetting_matrix stage: evaluations of every task after every stage of a sequence, as one matrix with its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mmalign.config import Options
from mmalign.errors import ConfigError
from mmalign.metrics.continual import (
    average_accuracy,
    backward_transfer,
    check_matrix,
    forgetting,
    forward_transfer,
    learning_accuracy,
)
from mmalign.stage_kinds.compare_parents import measures
from mmalign.stage_kinds.records import write_csv
from mmalign.stages import StageContext, StageResult, stage
from mmalign.training.checkpoint import write_json


class ProbeFolders(Options):
    """A general ability measured before and after the sequence."""

    before: str
    """Folder of an evaluate or likelihood stage of the model before the first stage."""
    after: str
    """The same stage after the last."""


class ForgettingMatrixOptions(Options):
    """Options of the forgetting_matrix stage."""

    tasks: list[str]
    """Tasks in the order in which they were learned."""
    stages: list[str]
    """Stages in their order; as many as tasks for a sequence, or one for training on all at once."""
    cells: list[list[str]]
    """Folders of evaluate (or likelihood) stages: ``cells[k][j]`` is task j after stage k."""
    start: list[str] | None = None
    """Folders of the same evaluations before the first stage, one per task."""
    measure: str | None = None
    """Metric that is read (a reward's name, ``-nll``); null takes the first of every evaluation."""
    general: dict[str, ProbeFolders] = {}
    """General abilities by name, measured before and after."""

    def model_post_init(self, context: Any, /) -> None:
        """Every cell must be there."""
        if not self.tasks or not self.stages:
            raise ValueError("tasks and stages must each name at least one")
        for name, values in (("tasks", self.tasks), ("stages", self.stages)):
            if len(set(values)) != len(values):
                raise ValueError(f"{name}: a name is used twice in {values}")
        if len(self.cells) != len(self.stages):
            raise ValueError(f"cells has {len(self.cells)} rows for {len(self.stages)} stages; give one row per stage")
        for label, row in [*zip(self.stages, self.cells, strict=True), ("start", self.start or self.tasks)]:
            if len(row) != len(self.tasks):
                raise ValueError(f"cells: stage {label!r} has {len(row)} of {len(self.tasks)} evaluations; every task is "
                                 "measured after every stage")


@stage("forgetting_matrix", options=ForgettingMatrixOptions, outputs=("folder", "matrix", "plot"))
def forgetting_matrix(options: ForgettingMatrixOptions, context: StageContext) -> StageResult:
    """Collect the evaluations of a sequence of tasks: accuracy, transfer and forgetting, table, CSV and heat map."""
    scores = [[_score(folder, options.measure, f"cells[{k}][{j}]") for j, folder in enumerate(row)]
              for k, row in enumerate(options.cells)]
    start = None if options.start is None else [_score(folder, options.measure, f"start[{j}]")
                                                for j, folder in enumerate(options.start)]
    check_matrix(scores, square=False)
    metrics = {"average_accuracy": average_accuracy(scores)}
    if len(options.stages) == len(options.tasks):
        metrics |= {"learning_accuracy": learning_accuracy(scores), "backward_transfer": backward_transfer(scores),
                    "backward_transfer_over_all": backward_transfer(scores, include_last=True), "forgetting": forgetting(scores)}
        if start is not None:
            metrics["forward_transfer"] = forward_transfer(scores, start)
    if start is not None:
        metrics["start/average_accuracy"] = sum(start) / len(start)
    for name, probe in options.general.items():
        before, after = (_score(getattr(probe, side), None, f"general.{name}.{side}") for side in ("before", "after"))
        metrics |= {f"general/{name}/before": before, f"general/{name}/after": after, f"general/{name}/change": after - before}
    rows = ([("start", start)] if start is not None else []) + list(zip(options.stages, scores, strict=True))
    for label, row in rows:
        metrics |= {f"score/{label}/{task}": value for task, value in zip(options.tasks, row, strict=True)}
    write_json(context.folder / "matrix.json", {"tasks": options.tasks, "stages": options.stages, "scores": scores,
                                                 "start": start, "metrics": metrics})
    write_csv(context.folder / "matrix.csv", [
        {"stage": label, **dict(zip(options.tasks, row, strict=True))} for label, row in rows])
    plot = context.folder / "matrix.png"
    draw(rows, options.tasks, plot)
    if not context.quiet:
        Console(stderr=True).print(_table(rows, options.tasks, metrics, context.name))
    return StageResult({"folder": str(context.folder), "matrix": str(context.folder / "matrix.json"), "plot": str(plot)}, metrics)


def _score(folder: str, measure: str | None, key: str) -> float:
    found = measures(folder, key)
    if measure is None:
        return next(iter(found.values()))
    if measure not in found:
        raise ConfigError(f"measure: {measure!r} was not measured in {folder} ({key}); it has {', '.join(found)}")
    return found[measure]


def draw(rows: Sequence[tuple[str, Sequence[float]]], tasks: Sequence[str], path: Path) -> None:
    """Scores as coloured cells with their numbers, stages from top to bottom."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 + 0.9 * len(tasks), 1.2 + 0.5 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    values = [list(row) for _, row in rows]
    low, high = min(map(min, values)), max(map(max, values))
    if low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    axes.imshow(values, aspect="auto", vmin=low, vmax=high, cmap="viridis")
    for k, row in enumerate(values):
        for j, value in enumerate(row):
            dark = high > low and (value - low) / (high - low) < 0.6
            axes.text(j, k, f"{value:.2f}", ha="center", va="center", color="white" if dark else "black", fontsize="small")
    axes.set_xticks(range(len(tasks)), list(tasks), rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.set_xlabel("task measured")
    axes.set_ylabel("after stage")
    figure.savefig(path, dpi=120)


def _table(rows: Sequence[tuple[str, Sequence[float]]], tasks: Sequence[str], metrics: Mapping[str, float], title: str) -> Table:
    figures = [f"{name.replace('_', ' ')} {metrics[name]:+.3f}" for name in
               ("average_accuracy", "backward_transfer", "forgetting", "forward_transfer") if name in metrics]
    table = Table("after", *tasks, title=f"{title}: {', '.join(figures)}", title_justify="left")
    for label, row in rows:
        table.add_row(label, *[f"{value:.3f}" for value in row])
    return table
