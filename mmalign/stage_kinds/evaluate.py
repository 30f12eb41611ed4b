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
from mmalign.metrics.sampling import majority_accuracy, pass_at_k
from mmalign.metrics.statistics import mean_and_error, paired_difference, win_rate
from mmalign.policies.loading import load_policy
from mmalign.rewards.base import RewardOptions, build_rewards
from mmalign.rewards.maths import extract_answer, last_number, parse_number
from mmalign.rewards.text import completion_text
from mmalign.stage_kinds.sampling import SampledOptions, sampling_for
from mmalign.stages import StageContext, StageResult, stage
from mmalign.training.checkpoint import atomic_folder
from mmalign.training.evaluation import Evaluation, evaluate_policy, group_means, save_samples


class EvaluateOptions(SampledOptions):
    """Options of the evaluate stage."""

    rewards: list[RewardOptions]
    """Rewards to measure."""
    compare_with: str | None = None
    """Folder of another evaluation of the same prompts: differences are paired and printed with their standard error."""
    by: str | None = None
    """Column whose groups (language, task, ...) are measured on their own as well."""
    pass_at: list[int] = []
    """Values of k for pass@k, the chance that one of k samples is right, of every reward that is 0 or 1 throughout."""
    majority: str | None = None
    """Also score the answer that most samples of a prompt give: ``completion`` takes the final answer of completions, another
    name the column that a reward logs (``program_answer`` of programs)."""
    seed: int | None = None
    """Seed of the samples; null takes the run's, so that two evaluations of a run share their noise."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse more samples than are drawn."""
        super().model_post_init(context)
        wrong = [k for k in self.pass_at if not 1 <= k <= self.completions_per_prompt]
        if wrong:
            raise ValueError(f"pass_at must hold numbers from 1 to completions_per_prompt ({self.completions_per_prompt}), not "
                             f"{wrong[0]}; draw more completions")


@stage("evaluate", options=EvaluateOptions, outputs=("folder", "samples"))
def evaluate(options: EvaluateOptions, context: StageContext) -> StageResult:
    """Sample held-out prompts at fixed seeds, measure every reward, and compare with an earlier evaluation."""
    before = _read_evaluation(options.compare_with) if options.compare_with else None
    rows = load_rows(options.data, seed=0)
    if options.by is not None and any(row.get(options.by) in (None, "") for row in rows):
        raise DataError(f"by: some rows have no {options.by!r}; columns are {', '.join(rows[0])}")
    rewards = build_rewards(options.rewards, config_folder=context.config_folder, dump_dir=context.folder / "rewards")
    rewards.check_rows(rows)
    policy = load_policy(options.model)
    evaluation = evaluate_policy(
        policy, [rows[i] for i in range(len(rows))], rewards, sampling_for(policy, options.sampling),
        completions_per_prompt=options.completions_per_prompt,
        seed=context.run_seed if options.seed is None else options.seed,
    )
    target = context.folder / "samples"
    with atomic_folder(target) as folder:
        save_samples(evaluation, folder)
    metrics = dict(evaluation.metrics) | of_several_samples(evaluation, options, context)
    if options.by is not None:
        metrics |= by_group(evaluation.prompt_means(), [row[options.by] for row in rows], context)
    if before is not None:
        metrics |= compare(before["rewards"], evaluation.prompt_means(), context)
    return StageResult({"folder": str(context.folder), "samples": str(target)}, metrics)


def of_several_samples(evaluation: Evaluation, options: EvaluateOptions, context: StageContext) -> dict[str, float]:
    """``pass@k/REWARD`` and ``majority/REWARD`` with their standard errors over prompts; prints them.

    A reward that is anything but 0 or 1 somewhere has no pass@k. Samples without a value are left out, and prompts with fewer
    than k left.
    """
    figures: dict[str, list[float]] = {}
    groups = [(evaluation.rollout.group == g).nonzero().flatten().tolist() for g in evaluation.rollout.group.unique()]
    answers = _answers(evaluation, options.majority) if options.majority is not None else []
    for name, values in evaluation.rewards().items():
        known = [[i for i in group if values[i] == values[i]] for group in groups]
        if all(value in (0.0, 1.0) or value != value for value in values):
            for k in options.pass_at:
                figures[f"pass@{k}/{name}"] = [
                    pass_at_k(len(group), sum(values[i] == 1 for i in group), k) for group in known if len(group) >= k
                ]
        if answers:
            figures[f"majority/{name}"] = [
                majority_accuracy([answers[i] for i in group], [values[i] for i in group]) for group in known if group
            ]
    if options.pass_at and not any(name.startswith("pass@") for name in figures):
        raise ConfigError("pass_at: none of the rewards is 0 or 1 throughout, so that no sample is right or wrong; measure one "
                          f"that is (rewards: {', '.join(evaluation.rewards())})")
    table = Table("measure", "prompts", "mean", title=context.name, title_justify="left")
    metrics: dict[str, float] = {}
    for name, numbers in figures.items():
        mean, error = mean_and_error(numbers)
        metrics |= {name: mean, f"{name}/error": error}
        table.add_row(name, str(len(numbers)), f"{mean:.3f} ± {error:.3f}")
    if figures and not context.quiet:
        Console(stderr=True).print(table)
    return metrics


def _answers(evaluation: Evaluation, source: str) -> list[str | None]:
    """The answer of every sample, numbers in one spelling; None where there is none."""
    if source == "completion":
        return [_answer(extract_answer(completion_text(sample))) for sample in evaluation.rollout.samples]
    if source not in evaluation.rollout.columns:
        raise ConfigError(f"majority: no reward logs a column {source!r}; columns are "
                          f"{', '.join(evaluation.rollout.columns) or 'none'}. Use completion for the final answer of the text")
    return [None if value is None else _answer(str(value)) for value in evaluation.rollout.columns[source]]


def _answer(text: str) -> str | None:
    number = parse_number(text) or last_number(text)
    return str(number.value) if number is not None else text.strip().casefold() or None


def by_group(
    means: Mapping[str, Sequence[float]], groups: Sequence[Any], context: StageContext,
) -> dict[str, float]:
    """Mean and standard error of every reward in every group of prompts, as ``group/GROUP/REWARD``; prints them."""
    metrics: dict[str, float] = {}
    for reward, values in means.items():
        metrics |= group_means(values, groups, reward)
    table = Table("group", "prompts", *means, title=context.name, title_justify="left")
    for group in sorted({str(name) for name in groups}):
        count = sum(str(name) == group for name in groups)
        table.add_row(group, str(count), *[f"{metrics[f'group/{group}/{reward}']:.3f} ± "
                                           f"{metrics[f'group/{group}/{reward}/error']:.3f}" for reward in means])
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
