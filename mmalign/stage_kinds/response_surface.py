"""The response_surface stage: table, best share per budget, isoquant and plot of a budget study."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mmalign.config import Options
from mmalign.errors import ConfigError
from mmalign.metrics.statistics import mean_and_error
from mmalign.stage_kinds.records import write_csv
from mmalign.stages import StageContext, StageResult, is_main_process, stage
from mmalign.training.checkpoint import atomic_folder


class SurfaceCell(Options):
    """One training run of the study and where it was measured."""

    budget: float
    """Money spent."""
    share: float
    """Share of it that went to preference pairs."""
    seed: int
    """Seed of the run."""
    rows: int
    """Supervised rows bought."""
    pairs: int
    """Preference pairs bought."""
    folder: str
    """Folder of the evaluate (or likelihood) stage."""


class ResponseSurfaceOptions(Options):
    """Options of the response_surface stage."""

    cells: list[SurfaceCell]
    """Every run of the study."""
    measure: str | None = None
    """Metric of the evaluations that is compared (``eval/REWARD``, or REWARD); null takes their first."""
    higher_is_better: bool = True
    """Direction of the measure."""
    target: float | None = None
    """Level whose isoquant is drawn: the cheapest budget that reaches it, for every share."""
    start: str | None = None
    """Folder of the same evaluation of the model before any training."""

    def model_post_init(self, context: Any, /) -> None:
        """There must be something to draw."""
        if not self.cells:
            raise ValueError("cells is empty; there is nothing to draw")


@stage("response_surface", options=ResponseSurfaceOptions, outputs=("folder", "table", "plot"))
def response_surface(options: ResponseSurfaceOptions, context: StageContext) -> StageResult:
    """Read the runs of a budget study: mean and error per budget and share, the best share, the isoquant, a plot."""
    numbers = [_metrics(cell.folder) for cell in options.cells]
    measure = _measure(options.measure, numbers[0])
    missing = [cell.folder for cell, found in zip(options.cells, numbers, strict=True) if measure not in found]
    if missing:
        raise ConfigError(f"measure: {measure!r} was not measured in {missing[0]}; it has {', '.join(_metrics(missing[0]))}")
    summary = summarise([(cell.budget, cell.share, found[measure]) for cell, found in zip(options.cells, numbers, strict=True)])
    best = best_shares(summary, higher_is_better=options.higher_is_better)
    metrics = {f"best_share/{budget:g}": share for budget, share in best.items()}
    metrics |= {f"best/{budget:g}": summary[budget, share][0] for budget, share in best.items()}
    metrics |= {f"value/{budget:g}/{share:g}": mean for (budget, share), (mean, _, _) in summary.items()}
    reached: dict[float, float] = {}
    if options.target is not None:
        reached = isoquant(summary, options.target, higher_is_better=options.higher_is_better)
        metrics |= {f"isoquant/{share:g}": budget for share, budget in reached.items() if math.isfinite(budget)}
    start = _metrics(options.start).get(measure) if options.start else None
    if start is not None:
        metrics["start"] = start
    target = context.folder / "surface"
    if is_main_process():
        with atomic_folder(target) as folder:
            write_csv(folder / "runs.csv", [
                {**cell.model_dump(exclude={"folder"}), **found} for cell, found in zip(options.cells, numbers, strict=True)])
            write_csv(folder / "summary.csv", [
                {"budget": budget, "share": share, "measure": measure, "mean": mean, "error": error, "runs": count}
                for (budget, share), (mean, error, count) in summary.items()])
            write_csv(folder / "isoquant.csv", [{"share": share, "budget": budget} for share, budget in reached.items()])
            draw(summary, best, folder / "surface.png", measure=measure, start=start, target=options.target)
        if not context.quiet:
            Console(stderr=True).print(_table(summary, best, context.name, measure))
    return StageResult({"folder": str(context.folder), "table": str(target / "summary.csv"), "plot": str(target / "surface.png")},
                       metrics)


Surface = Mapping[tuple[float, float], tuple[float, float, int]]
"""(budget, share) -> (mean, standard error, runs)."""


def summarise(results: Sequence[tuple[float, float, float]]) -> dict[tuple[float, float], tuple[float, float, int]]:
    """Mean, standard error and number of the ``(budget, share, value)`` of every cell, sorted."""
    cells: dict[tuple[float, float], list[float]] = {}
    for budget, share, value in results:
        cells.setdefault((budget, share), []).append(value)
    return {cell: (*mean_and_error(values), len(values)) for cell, values in sorted(cells.items())}


def best_shares(surface: Surface, *, higher_is_better: bool = True) -> dict[float, float]:
    """The share with the best mean for every budget; ties to the smaller share, which needs no second stage."""
    sign = 1 if higher_is_better else -1
    best: dict[float, float] = {}
    for (budget, share), (mean, _, _) in sorted(surface.items()):
        if budget not in best or sign * mean > sign * surface[budget, best[budget]][0]:
            best[budget] = share
    return best


def isoquant(surface: Surface, target: float, *, higher_is_better: bool = True) -> dict[float, float]:
    """The cheapest budget whose mean reaches ``target``, for every share; infinite where none does."""
    found: dict[float, float] = {share: math.inf for _, share in sorted(surface, key=lambda cell: cell[1])}
    for (budget, share), (mean, _, _) in surface.items():
        if (mean >= target) if higher_is_better else (mean <= target):
            found[share] = min(found[share], budget)
    return found


def draw(
    surface: Surface, best: Mapping[float, float], path: Path, *, measure: str, start: float | None, target: float | None,
) -> None:
    """One line per budget over the share of pairs, with error bars; stars mark the best shares."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    budgets = sorted({budget for budget, _ in surface})
    for number, budget in enumerate(budgets):
        shares = [share for b, share in surface if b == budget]
        means = [surface[budget, share][0] for share in shares]
        errors = [0.0 if math.isnan(surface[budget, share][1]) else surface[budget, share][1] for share in shares]
        colour = f"C{number % 10}"
        axes.errorbar(shares, means, yerr=errors, marker="o", markersize=3.5, linewidth=1.4, capsize=2, color=colour,
                      label=f"budget {budget:g}")
        axes.plot([best[budget]], [surface[budget, best[budget]][0]], marker="*", markersize=13, color=colour)
    for level, label, style in ((start, "before training", ":"), (target, "target", "--")):
        if level is not None:
            axes.axhline(level, color="0.5", linestyle=style, linewidth=1, label=label)
    axes.set_xlabel("share of the budget spent on preference pairs")
    axes.set_ylabel(measure.removeprefix("eval/"))
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=144)


def _metrics(folder: str) -> dict[str, float]:
    try:
        manifest = json.loads((Path(folder) / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConfigError(f"cells: {folder} is no folder of a finished stage (no manifest.json)") from None
    return {name: float(value) for name, value in manifest["metrics"].items() if value is not None}


def _measure(asked: str | None, found: Mapping[str, float]) -> str:
    names = [name for name in found if not name.endswith("/error")]
    if asked is None:
        if not names:
            raise ConfigError("measure: the evaluations measured nothing")
        return names[0]
    return next((name for name in (asked, f"eval/{asked}") if name in names), asked)


def _table(surface: Surface, best: Mapping[float, float], title: str, measure: str) -> Table:
    shares = sorted({share for _, share in surface})
    table = Table("budget", *[f"{share:g}" for share in shares], "best share", title=f"{title}: {measure} by share of pairs",
                  title_justify="left")
    for budget in sorted(best):
        cells = [surface.get((budget, share)) for share in shares]
        table.add_row(f"{budget:g}", *["" if c is None else f"{c[0]:.3f}" if math.isnan(c[1]) else f"{c[0]:.3f} ± {c[1]:.3f}"
                                       for c in cells], f"{best[budget]:g}")
    return table
