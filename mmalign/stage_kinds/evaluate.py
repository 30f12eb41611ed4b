"""The evaluate stage."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mmalign.data.loading import load_rows
from mmalign.errors import ConfigError, DataError
from mmalign.metrics.statistics import mean_and_error, paired_difference, win_rate
from mmalign.policies.loading import load_policy
from mmalign.rewards.base import RewardOptions, build_rewards
from mmalign.stage_kinds.sampling import SampledOptions, sampling_for
from mmalign.stages import StageContext, StageResult, stage
from mmalign.training.checkpoint import atomic_folder
from mmalign.training.evaluation import evaluate_policy, save_samples


class EvaluateOptions(SampledOptions):
    """Options of the evaluate stage."""

    rewards: list[RewardOptions]
    """Rewards to measure."""
    compare_with: str | None = None
    """Folder of another evaluation of the same prompts: differences are paired and printed with their standard error."""
    by: str | None = None
    """Column whose groups (language, task, ...) are measured on their own as well."""
    seed: int | None = None
    """Seed of the samples; null takes the run's, so that two evaluations of a run share their noise."""


@stage("evaluate", options=EvaluateOptions, outputs=("folder", "samples"))
def evaluate(options: EvaluateOptions, context: StageContext) -> StageResult:
    """Sample held-out prompts at fixed seeds, measure every reward, and compare with an earlier evaluation."""
    before = _read_evaluation(options.compare_with) if options.compare_with else None
    rows = load_rows(options.data, seed=0)
    if options.by is not None and any(row.get(options.by) in (None, "") for row in rows):
        raise DataError(f"by: some rows have no {options.by!r}; columns are {', '.join(rows[0])}")
    rewards = build_rewards(options.rewards, config_folder=context.config_folder, dump_dir=context.folder / "rewards")
    policy = load_policy(options.model)
    evaluation = evaluate_policy(
        policy, [rows[i] for i in range(len(rows))], rewards, sampling_for(policy, options.sampling),
        completions_per_prompt=options.completions_per_prompt,
        seed=context.run_seed if options.seed is None else options.seed,
    )
    target = context.folder / "samples"
    with atomic_folder(target) as folder:
        save_samples(evaluation, folder)
    metrics = dict(evaluation.metrics)
    if options.by is not None:
        metrics |= by_group(evaluation.prompt_means(), [row[options.by] for row in rows], context)
    if before is not None:
        metrics |= compare(before["rewards"], evaluation.prompt_means(), context)
    return StageResult({"folder": str(context.folder), "samples": str(target)}, metrics)


def by_group(
    means: Mapping[str, Sequence[float]], groups: Sequence[Any], context: StageContext,
) -> dict[str, float]:
    """Mean and standard error of every reward in every group of prompts, as ``group/GROUP/REWARD``; prints them."""
    table = Table("group", "prompts", *means, title=context.name, title_justify="left")
    metrics: dict[str, float] = {}
    for group in sorted({str(name) for name in groups}):
        at = [i for i, name in enumerate(groups) if str(name) == group]
        cells = []
        for reward, values in means.items():
            mean, error = mean_and_error([values[i] for i in at if values[i] == values[i]])
            metrics |= {f"group/{group}/{reward}": mean, f"group/{group}/{reward}/error": error}
            cells.append(f"{mean:.3f} ± {error:.3f}")
        table.add_row(group, str(len(at)), *cells)
    if not context.quiet:
        Console(stderr=True).print(table)
    return metrics


def _read_evaluation(folder: str) -> dict[str, Any]:
    for path in (Path(folder) / "samples" / "evaluation.json", Path(folder) / "evaluation.json"):
        if path.is_file():
            value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return value
    raise ConfigError(f"compare_with: {folder} holds no evaluation (samples/evaluation.json); name the folder of an "
                      "evaluate stage")


def compare(
    before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]], context: StageContext,
) -> dict[str, float]:
    """Print before, after and the paired difference of every reward; returns the differences."""
    table = Table("reward", "before", "after", "difference", "standard errors", "win rate [95%]", title=context.name,
                  title_justify="left")
    table.columns[0].overflow = "fold"
    metrics: dict[str, float] = {}
    for name, values in after.items():
        if name not in before:
            continue
        if len(before[name]) != len(values):
            raise ConfigError(f"compare_with: the other evaluation has {len(before[name])} prompts of {name!r}, this one "
                              f"{len(values)}; use the same data")
        kept = [(a, b) for a, b in zip(before[name], values, strict=True) if a == a and b == b]
        if not kept:
            continue
        wins = win_rate([b for _, b in kept], [a for a, _ in kept])
        difference, error = paired_difference([a for a, _ in kept], [b for _, b in kept])
        first, first_error = mean_and_error([a for a, _ in kept])
        last, last_error = mean_and_error([b for _, b in kept])
        ratio = difference / error if error else float("inf") if difference else 0.0
        table.add_row(name, f"{first:.3f} ± {first_error:.3f}", f"{last:.3f} ± {last_error:.3f}",
                      f"{difference:+.3f} ± {error:.3f}", f"{ratio:+.1f}",
                      f"{wins.rate:.2f} [{wins.low:.2f}, {wins.high:.2f}]")
        metrics |= {f"before/{name}": first, f"after/{name}": last, f"difference/{name}": difference,
                    f"difference/{name}/error": error, f"win_rate/{name}": wins.rate, f"win_rate/{name}/low": wins.low,
                    f"win_rate/{name}/high": wins.high}
    if not context.quiet:
        Console(stderr=True).print(table)
    return metrics
