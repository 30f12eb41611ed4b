"""Pictures of a traversal study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STRATA = ("light", "middle", "heavy")


def draw(results: Sequence[Mapping[str, Any]], curves: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Write ``accuracy.png``, ``path_score.png`` and, where representations were compared, ``similarity.png``."""
    files = [draw_accuracy(results, folder / "accuracy.png"), draw_paths(results, folder / "path_score.png")]
    if curves:
        files.append(draw_similarity(curves, folder / "similarity.png"))
    return files


def draw_accuracy(results: Sequence[Mapping[str, Any]], file: Path) -> Path:
    """Majority accuracy by prompt and model, with standard errors, and the four bins of agreement below each."""
    whole = [row for row in results if row["stratum"] == "all"]
    figure, (top, bottom) = _figure(2, (1.6 + 1.2 * len(whole), 6.0))
    colours = ("#2e6f95", "#7fb3d5", "#e8b07a", "#d1495b")
    names = [f"{row['prompt']}\n{row['model']}" for row in whole]
    top.bar(range(len(whole)), [row["accuracy"] for row in whole], yerr=[row["accuracy_error"] for row in whole], capsize=3,
            color=["#2e6f95" if row["model"] == "model" else "#b0bec5" for row in whole])
    top.set(ylabel="accuracy (majority of runs)", ylim=(0, 1.05), xticks=range(len(whole)))
    below = [0.0] * len(whole)
    for colour, name in zip(colours, ("all_correct", "majority_correct", "majority_incorrect", "all_incorrect"), strict=True):
        heights = [row[name] for row in whole]
        bottom.bar(range(len(whole)), heights, bottom=below, color=colour, label=name.replace("_", " "))
        below = [a + b for a, b in zip(below, heights, strict=True)]
    bottom.set(ylabel="share of questions", ylim=(0, 1.0), xticks=range(len(whole)))
    bottom.legend(fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    for axes in (top, bottom):
        axes.set_xticklabels(names, fontsize=8)
    return _save(figure, file)


def draw_paths(results: Sequence[Mapping[str, Any]], file: Path) -> Path:
    """Mean path score by hops to the top: light, middle, heavy."""
    figure, (axes,) = _figure(1, (6.5, 3.6))
    present = [name for name in STRATA if any(row["stratum"] == name for row in results)]
    drawn = list(dict.fromkeys((row["model"], row["prompt"]) for row in results))
    for number, (model, prompt) in enumerate(drawn):
        aside = 0.06 * (number - (len(drawn) - 1) / 2)  # equal scores stay apart
        mine = {row["stratum"]: row for row in results if (row["model"], row["prompt"]) == (model, prompt)}
        at = [i for i, name in enumerate(present) if name in mine]
        shown = [mine[present[i]] for i in at]
        axes.errorbar([i + aside for i in at], [row["path_score"] for row in shown], [row["path_score_error"] for row in shown],
                      marker="o", capsize=3, linestyle="-" if model == "model" else "--", label=f"{prompt}, {model}")
    axes.set(ylabel="path matching score", ylim=(-0.03, 1.05), xticks=range(len(present)), xlim=(-0.5, len(present) - 0.5))
    names = {"light": "light (< 3 hops)", "middle": "middle", "heavy": "heavy (≥ 5 hops)"}
    axes.set_xticklabels([names[name] for name in present])
    axes.legend(fontsize=7)
    return _save(figure, file)


def draw_similarity(curves: Sequence[Mapping[str, Any]], file: Path) -> Path:
    """Cosine by layer: plain on the left, mean-centred on the right."""
    figure, panels = _figure(2, (10.0, 3.6), across=True)
    layers = max(row["layer"] for row in curves)
    for centred, axes in enumerate(panels):
        for number, curve in enumerate(dict.fromkeys(row["curve"] for row in curves)):
            mine = [row for row in curves if row["curve"] == curve and row["centred"] == centred]
            axes.plot([row["layer"] for row in mine], [row["cosine"] for row in mine], marker=".", label=curve,
                      linestyle=("-", "--", "-.", ":")[number % 4])
        axes.set(xlabel="layer (0 = embedding)", ylabel="mean-centred cosine" if centred else "cosine", ylim=(-1.05, 1.05),
                 xticks=range(0, layers + 1, 1 + layers // 12))
    panels[0].legend(fontsize=7)
    return _save(figure, file)


def _figure(panels: int, size: tuple[float, float], *, across: bool = False) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)  # no window system, no global state of pyplot
    shape = (1, panels) if across else (panels, 1)
    return figure, figure.subplots(*shape, squeeze=False).ravel()


def _save(figure: Any, file: Path) -> Path:
    figure.savefig(file, dpi=130)
    return file
