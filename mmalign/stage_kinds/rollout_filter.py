"""The rollout_filter stage: scored samples of the current model -> the prompts (or samples) it can learn from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from mmalign.config import Options
from mmalign.core.advantages import group_filter
from mmalign.data.loading import DataOptions, load_rows
from mmalign.errors import ConfigError, DataError, RewardError
from mmalign.stage_kinds.groups import Groups, write_by_group
from mmalign.stage_kinds.records import Chunk, NoRowsError, sample_column
from mmalign.stages import StageContext, StageResult, stage
from mmalign.training.checkpoint import write_json

BINS = 10
"""Bins of the histogram of pass rates; a pass rate of 1 falls in the last."""


class RolloutFilterOptions(Options):
    """Options of the rollout_filter stage."""

    data: DataOptions
    """Samples of the current model with ``group`` and ``score`` (stages generate and score)."""
    mode: Literal["any", "mixed"] = "any"
    """any: keep prompts with at least one success (hopeless ones give no signal). mixed: drop those that always succeed,
    too, which leaves exactly the prompts with a non-zero group advantage under a binary reward."""
    threshold: float = 0.0
    """A sample is a success when its score is above this: 0 suits rewards of 0 and 1, 0.5 graded ones."""
    score: str = "score"
    """Column with the score that counts: ``reward_NAME`` for a single reward, such as the accuracy without shaping."""
    max_pass_rate: float = 1.0
    """Prompts with a larger share of successes are dropped as too easy; 1 keeps them all."""
    keep: Literal["prompts", "successes", "all"] = "prompts"
    """What becomes a row: every kept prompt once; every distinct success of kept prompts with its sample as the
    completion (fine-tuning on the model's own right answers); or every prompt, marked in the column ``kept``."""
    top_score: float | None = None
    """The largest score there can be; a threshold at or above it is refused, because nothing could pass. null does not check."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse values without a meaning."""
        if not math.isfinite(self.threshold):
            raise ValueError(f"threshold must be a finite number, not {self.threshold}")
        if self.top_score is not None and self.threshold >= self.top_score:
            raise ValueError(f"threshold is {self.threshold} and the largest score {self.top_score}: no sample could ever be a "
                             "success; lower the threshold")
        if not 0 < self.max_pass_rate <= 1:
            raise ValueError(f"max_pass_rate must be in (0, 1], not {self.max_pass_rate}")


@stage("rollout_filter", options=RolloutFilterOptions, outputs=("data", "folder"))
def rollout_filter(options: RolloutFilterOptions, context: StageContext) -> StageResult:
    """Keep the prompts that the current model sometimes answers right; adds rollout_rewards, pass_rate and kept."""
    rows = load_rows(options.data, seed=context.seed)
    missing = [name for name in (options.score, "group") if name not in rows[0]]
    if missing:
        hint = "" if missing[0] == "group" else "; score: names it"
        raise DataError(f"data.path: the rollout_filter stage needs the column {missing[0]!r}{hint}. Run stages generate and "
                        f"score first; columns are {', '.join(rows[0])}")
    groups = Groups(rows)

    def choose(items: list[dict[str, Any]], chunk: range) -> Chunk:
        records: list[dict[str, Any]] = []
        numbers: dict[str, float] = {}
        for item in items:
            kept, rate, samples = judge(item["rows"], options)
            # A prompt that is left out is counted, not written: the histogram needs no row of it.
            for name, value in (("prompts", 1.0), ("kept", float(kept is not None)), ("samples", float(samples)),
                                ("sum pass_rate", rate), ("hopeless", float(rate == 0)), ("mastered", float(rate == 1)),
                                (f"bin {histogram_bin(rate)}", 1.0)):
                numbers[name] = numbers.get(name, 0.0) + value
            records += as_rows(item["rows"], kept, rate, options)
        return records, numbers

    try:
        data, numbers = write_by_group(context, groups, choose)
    except NoRowsError:
        histogram = read_bins(context.folder / "parts")
        raise DataError(f"data.path: no prompt is left of {len(groups)}: mode {options.mode} with threshold {options.threshold} "
                        f"and max_pass_rate {options.max_pass_rate}. Prompts by pass rate: {describe(histogram)}. Sample more "
                        "completions_per_prompt, use easier data, or lower the threshold") from None
    histogram = [numbers.get(f"bin {index}", 0.0) for index in range(BINS)]
    if not numbers["kept"]:
        raise DataError(f"data.path: no prompt of {len(groups)} passes mode {options.mode} with threshold {options.threshold}. "
                        f"Prompts by pass rate: {describe(histogram)}")
    write_json(context.folder / "pass_rates.json", {"bins": histogram, "edges": [index / BINS for index in range(BINS + 1)]})
    draw(histogram, context.folder / "pass_rates.png", kept=numbers["kept"] / numbers["prompts"])
    metrics = {
        "prompts": numbers["prompts"], "kept": numbers["kept"], "share": numbers["kept"] / numbers["prompts"],
        "pass_rate": numbers["sum pass_rate"] / numbers["prompts"], "hopeless": numbers["hopeless"],
        "mastered": numbers["mastered"], "samples": numbers["samples"], "rows": numbers["rows"],
    }
    if not context.quiet:
        Console(stderr=True).print(_table(histogram, metrics, context.name))
    return StageResult({"data": str(data), "folder": str(context.folder)}, metrics, {"histogram": histogram})


def judge(rows: Sequence[Mapping[str, Any]], options: RolloutFilterOptions) -> tuple[list[int] | None, float, int]:
    """(positions of the successes of one prompt, or None when it is left out; its pass rate; its scored samples).

    A sample without a score (a reward that does not apply) counts for nothing; a prompt without any is left out.
    """
    values = [math.nan if row[options.score] is None else float(row[options.score]) for row in rows]
    if any(math.isinf(value) for value in values):
        raise RewardError(f"{options.score}: prompt {rows[0].get('group')!r} has an infinite score")
    scored = [value for value in values if not math.isnan(value)]
    if options.mode == "mixed" and len(rows) < 2:
        raise ConfigError("mode: mixed compares the samples of a prompt and needs at least 2 of them; set "
                          f"completions_per_prompt of the generate stage (prompt {rows[0].get('group')!r} has {len(rows)})")
    if not scored:
        return None, 0.0, 0
    tensor = torch.tensor(scored, dtype=torch.float64)
    keep = bool(group_filter(tensor, torch.zeros(len(scored), dtype=torch.long), mode=options.mode,
                             threshold=options.threshold)[0])
    successes = [i for i, value in enumerate(values) if value > options.threshold]
    rate = len(successes) / len(scored)
    return (successes if keep and rate <= options.max_pass_rate + 1e-12 else None), rate, len(scored)


def as_rows(
    rows: Sequence[Mapping[str, Any]], kept: list[int] | None, rate: float, options: RolloutFilterOptions,
) -> list[dict[str, Any]]:
    """The rows that the samples of one prompt become."""
    if kept is None and options.keep != "all":
        return []
    sample, first = sample_column(rows[0]), rows[0]
    added = {"rollout_rewards": [None if row[options.score] is None else float(row[options.score]) for row in rows],
             "pass_rate": rate, "kept": kept is not None}
    own = ("score", "finish_reason", "mean_logp", "group")
    if options.keep != "successes":
        plain = {k: v for k, v in first.items() if k != sample and k not in own and not k.startswith("reward_")}
        return [{**plain, **added, "id": str(first["group"])}]
    records, seen = [], list[Any]()
    for index in kept or ():
        row = rows[index]
        if row[sample] not in seen:
            seen.append(row[sample])
            records.append({**{k: v for k, v in row.items() if k not in own and not k.startswith("reward_")}, **added})
    return records


def histogram_bin(rate: float) -> int:
    """Bin of a pass rate; the small shift keeps 0.3 = 3/10 in the fourth bin."""
    return min(BINS - 1, int(rate * BINS + 1e-9))


def read_bins(parts: Path) -> list[float]:
    """Histogram of the chunks of a stage that kept nothing."""
    histogram = [0.0] * BINS
    for file in sorted(parts.glob("*/numbers.json")):
        for name, value in json.loads(file.read_text(encoding="utf-8")).items():
            if name.startswith("bin "):
                histogram[int(name[4:])] += value
    return histogram


def describe(histogram: Sequence[float]) -> str:
    """``0-10%: 12, 90-100%: 3``: the bins that are not empty."""
    width = 100 // BINS
    return ", ".join(f"{width * i}-{width * (i + 1)}%: {count:.0f}" for i, count in enumerate(histogram) if count) or "none"


def draw(histogram: Sequence[float], path: Path, *, kept: float) -> None:
    """Bars of prompts over pass rate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.bar([(i + 0.5) / BINS for i in range(BINS)], histogram, width=0.9 / BINS)
    axes.set_xlabel("pass rate of the current model")
    axes.set_ylabel("prompts")
    axes.set_title(f"{100 * kept:.0f}% of prompts kept", fontsize="medium")
    figure.savefig(path, dpi=120)


def _table(histogram: Sequence[float], metrics: Mapping[str, float], title: str) -> Table:
    table = Table("pass rate", "prompts", title=f"{title}: {metrics['kept']:.0f} of {metrics['prompts']:.0f} prompts kept",
                  title_justify="left")
    width = 100 // BINS
    for index, count in enumerate(histogram):
        if count:
            table.add_row(f"{width * index}-{width * (index + 1)}%", f"{count:.0f}")
    return table
