"""The stages that make and judge data: generate, score, select, evaluate."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from mmalign.config import Options, parse
from mmalign.core.seeding import generator
from mmalign.core.selection import best_of_group, best_worst_pair, top_k_indices
from mmalign.data.loading import DataOptions, load_rows
from mmalign.data.rows import Rows
from mmalign.errors import ConfigError, DataError
from mmalign.metrics.statistics import mean_and_error, paired_difference
from mmalign.policies.base import DiffusionSampling, Policy, Rollout, TextSampling
from mmalign.policies.loading import ModelOptions, load_policy
from mmalign.rewards.base import RewardOptions, build_rewards
from mmalign.stages import StageContext, StageResult, stage
from mmalign.training.checkpoint import atomic_folder
from mmalign.training.evaluation import evaluate_policy, save_samples
from mmalign.training.tracking import ProgressBar

SAMPLING: dict[str, type[Options]] = {"text": TextSampling, "diffusion": DiffusionSampling}


class SampledOptions(Options):
    """Keys of stages that sample from a model."""

    model: ModelOptions
    """The model to sample from."""
    data: DataOptions
    """Prompts, with any further columns that rewards need."""
    sampling: dict[str, Any] = {}
    """Sampling options of the model's modality (TextSampling or DiffusionSampling in the configuration reference)."""
    completions_per_prompt: int = 1
    """Samples of every prompt."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse sampling keys that no modality has before any model is loaded."""
        if self.completions_per_prompt < 1:
            raise ValueError(f"completions_per_prompt must be at least 1, not {self.completions_per_prompt}")
        known = {name for cls in SAMPLING.values() for name in cls.model_fields}
        unknown = [name for name in self.sampling if name not in known]
        if unknown:
            parse(TextSampling if len(unknown) < len(self.sampling) else DiffusionSampling, self.sampling, root="sampling")


def sampling_for(policy: Policy, tree: Mapping[str, Any], *, key: str = "sampling") -> Any:
    """The sampling options of the policy's modality from a configuration node."""
    return parse(SAMPLING[policy.modality], tree, root=key)


class GenerateOptions(SampledOptions):
    """Options of the generate stage."""

    prompts_per_chunk: int = 64
    """Prompts sampled and written together; a killed stage resumes at the first chunk not written."""


@stage("generate", options=GenerateOptions, outputs=("data", "folder"))
def generate(options: GenerateOptions, context: StageContext) -> StageResult:
    """Sample completions or images for every prompt and keep them as a data set."""
    from datasets import concatenate_datasets, load_from_disk

    rows = load_rows(options.data, seed=context.seed)
    chunks = [range(start, min(start + options.prompts_per_chunk, len(rows)))
              for start in range(0, len(rows), options.prompts_per_chunk)]
    parts = context.folder / "parts"
    policy: Policy | None = None
    with ProgressBar(context.name, len(chunks), quiet=context.quiet) as bar:
        for number, chunk in enumerate(chunks):
            target = parts / f"{number:05d}"
            if not target.exists():
                policy = policy or load_policy(options.model)
                examples = [rows[i] for i in chunk]
                rollout = policy.sample(
                    [example["prompt"] for example in examples], options.completions_per_prompt,
                    sampling_for(policy, options.sampling), generator(context.seed, context.name, "sampling", number),
                )
                records = sample_records(rollout, examples, first_group=chunk.start)
                with atomic_folder(target) as folder:
                    save_records(records, folder)
            bar.update(number + 1, {})
    data = context.folder / "data"
    joined = concatenate_datasets([load_from_disk(str(parts / f"{number:05d}")) for number in range(len(chunks))])
    with atomic_folder(data) as folder:
        joined.save_to_disk(str(folder))
    shutil.rmtree(parts, ignore_errors=True)
    return StageResult({"data": str(data), "folder": str(context.folder)}, {"samples": float(len(joined))})


def sample_records(rollout: Rollout, examples: Sequence[Mapping[str, Any]], *, first_group: int = 0) -> list[dict[str, Any]]:
    """One data row per sample: the prompt's columns, the sample (``completion`` or ``image``) and its group."""
    records = []
    for i, at in enumerate(rollout.group.tolist()):
        sample = rollout.samples[i]
        own = {"completion": sample} if isinstance(sample, (str, list)) else {"image": sample}
        # The row's own sample gives way to the new one; pictures that belong to a text prompt stay.
        replaced = ("completion", "image", "id") if "completion" in own else ("completion", "image", "images", "id")
        kept = {k: v for k, v in examples[at].items() if k not in replaced}
        reason = {"finish_reason": rollout.finish_reason[i]} if rollout.finish_reason else {}
        records.append({**kept, **own, "group": first_group + at, "id": f"{first_group + at}-{i}", **reason})
    return records


def save_records(records: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write rows as a datasets folder; PIL images, and lists of them, become image columns."""
    from datasets import Dataset, Features, Image, List, disable_progress_bars
    from PIL.Image import Image as PILImage

    disable_progress_bars()
    pictures: dict[str, Any] = {}
    for name, value in records[0].items():
        if isinstance(value, PILImage):
            pictures[name] = Image()
        elif isinstance(value, list) and value and isinstance(value[0], PILImage):
            pictures[name] = List(Image())
    plain = Dataset.from_list([{k: v for k, v in record.items() if k not in pictures} for record in records])
    if pictures:
        features = Features({**plain.features, **pictures})
        plain = Dataset.from_list([dict(record) for record in records], features=features)
    plain.save_to_disk(str(folder))


def sample_column(row: Mapping[str, Any]) -> str:
    """The column that holds a row's sample; raises DataError when there is none."""
    name = next((name for name in ("completion", "image", "images", "views") if name in row), None)
    if name is None:
        raise DataError(f"data.path: no sample in the rows: completion, image or views is needed; columns are {', '.join(row)}")
    return name


def sample_in(row: Mapping[str, Any], name: str) -> Any:
    """The sample of a row; the list of one picture that a loaded ``image`` column becomes is unwrapped."""
    value = row[name]
    if name == "images":
        if len(value) != 1:
            raise DataError(f"data.path: column images holds {len(value)} pictures in a row; a sample is exactly one")
        return value[0]
    return value


class ScoreOptions(Options):
    """Options of the score stage."""

    data: DataOptions
    """Rows with ``prompt`` and ``completion`` or ``image``."""
    rewards: list[RewardOptions]
    """Rewards; the weighted sum becomes the column ``score``."""


@stage("score", options=ScoreOptions, outputs=("data", "folder"))
def score(options: ScoreOptions, context: StageContext) -> StageResult:
    """Add one column per reward and their weighted sum to a data set of samples."""
    rows = load_rows(options.data, seed=context.seed)
    rewards = build_rewards(options.rewards, config_folder=context.config_folder, dump_dir=context.folder / "rewards")
    rollout = rewards.score(rollout_of(rows))
    total = rewards.total(rollout)
    assert rollout.rewards is not None
    records = [
        {**row, **{f"reward_{name}": float(rollout.rewards[i, k]) for k, name in enumerate(rollout.reward_names)},
         "score": float(total[i])}
        for i, row in enumerate(rows)
    ]
    data = context.folder / "data"
    with atomic_folder(data) as folder:
        save_records(records, folder)
    metrics = {f"{name}/mean": float(rollout.rewards[:, k].nanmean()) for k, name in enumerate(rollout.reward_names)}
    return StageResult({"data": str(data), "folder": str(context.folder)}, metrics | {"score/mean": float(total.nanmean())})


def rollout_of(rows: Sequence[Mapping[str, Any]]) -> Rollout:
    """A rollout record (without log-probs) of samples that are already on disk."""
    if not len(rows):
        raise DataError("data.path: the data set has no rows")
    first = rows[0]
    sample = sample_column(first)
    if "prompt" not in first:
        raise DataError(f"data.path: scoring needs the column prompt; columns are {', '.join(first)}")
    columns = {name: [row[name] for row in rows] for name in first if name not in ("prompt", sample)}
    group = torch.tensor(columns.get("group", list(range(len(rows)))), dtype=torch.long)
    empty = torch.zeros(len(rows), 1)
    samples = [sample_in(row, sample) for row in rows]
    return Rollout([row["prompt"] for row in rows], samples, group, Rows({}), empty.bool(), empty, columns)


class SelectOptions(Options):
    """Options of the select stage."""

    data: DataOptions
    """Rows with ``score`` (and ``group`` for the group modes)."""
    mode: Literal["best_worst", "best", "top_k"] = "best_worst"
    """best_worst: one (chosen, rejected) pair per prompt; best: the best sample per prompt; top_k: the k best rows."""
    k: int | None = None
    """Rows kept by top_k."""
    min_margin: float = 0.0
    """best_worst: pairs whose scores differ by no more than this are dropped."""


@stage("select", options=SelectOptions, outputs=("data", "folder"))
def select(options: SelectOptions, context: StageContext) -> StageResult:
    """Turn scored samples into preference pairs, best-of-n rows, or the k best rows."""
    rows = load_rows(options.data, seed=context.seed)
    missing = [name for name in ("score", "group")[: 1 if options.mode == "top_k" else 2] if name not in rows[0]]
    if missing:
        raise DataError(f"data.path: the select stage needs the column {missing[0]!r}; run a score stage first. "
                        f"Columns are {', '.join(rows[0])}")
    scores = torch.tensor([row["score"] for row in rows], dtype=torch.float64)
    if options.mode == "top_k":
        if not options.k:
            raise ConfigError("k: required by mode top_k")
        records = [dict(rows[i]) for i in sorted(top_k_indices(scores, min(options.k, len(rows))).tolist())]
    else:
        _, group = torch.tensor([row["group"] for row in rows]).unique(return_inverse=True)
        if options.mode == "best":
            records = [dict(rows[i]) for i in best_of_group(scores, group).tolist()]
        else:
            records = [_pair(rows[c], rows[r]) for c, r in best_worst_pair(scores, group).tolist()
                       if rows[c]["score"] - rows[r]["score"] > options.min_margin]
    if not records:
        raise DataError("data.path: no row is left: in every group all samples have the same score; sample more "
                        "completions_per_prompt, or use a reward that tells them apart")
    data = context.folder / "data"
    with atomic_folder(data) as folder:
        save_records(records, folder)
    groups = {row.get("group", i) for i, row in enumerate(rows)}
    return StageResult({"data": str(data), "folder": str(context.folder)},
                       {"rows": float(len(records)), "share": len(records) / len(groups)})


def _pair(chosen: Mapping[str, Any], rejected: Mapping[str, Any]) -> dict[str, Any]:
    sample = sample_column(chosen)
    kept = {k: v for k, v in chosen.items() if k not in (sample, "score", "finish_reason") and not k.startswith("reward_")}
    return {**kept, "chosen": sample_in(chosen, sample), "rejected": sample_in(rejected, sample),
            "chosen_score": chosen["score"], "rejected_score": rejected["score"]}


class EvaluateOptions(SampledOptions):
    """Options of the evaluate stage."""

    rewards: list[RewardOptions]
    """Rewards to measure."""
    compare_with: str | None = None
    """Folder of another evaluation of the same prompts: differences are paired and printed with their standard error."""
    seed: int | None = None
    """Seed of the samples; null takes the run's, so that two evaluations of a run share their noise."""


@stage("evaluate", options=EvaluateOptions, outputs=("folder", "samples"))
def evaluate(options: EvaluateOptions, context: StageContext) -> StageResult:
    """Sample held-out prompts at fixed seeds, measure every reward, and compare with an earlier evaluation."""
    before = _read_evaluation(options.compare_with) if options.compare_with else None
    rows = load_rows(options.data, seed=0)
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
    if before is not None:
        metrics |= compare(before["rewards"], evaluation.prompt_means(), context)
    return StageResult({"folder": str(context.folder), "samples": str(target)}, metrics)


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
    table = Table("reward", "before", "after", "difference", "standard errors", title=context.name, title_justify="left")
    table.columns[0].overflow = "fold"
    metrics: dict[str, float] = {}
    for name, values in after.items():
        if name not in before:
            continue
        if len(before[name]) != len(values):
            raise ConfigError(f"compare_with: the other evaluation has {len(before[name])} prompts of {name!r}, this one "
                              f"{len(values)}; use the same data")
        kept = [(a, b) for a, b in zip(before[name], values, strict=True) if a == a and b == b]
        difference, error = paired_difference([a for a, _ in kept], [b for _, b in kept])
        first, first_error = mean_and_error([a for a, _ in kept])
        last, last_error = mean_and_error([b for _, b in kept])
        ratio = difference / error if error else float("inf") if difference else 0.0
        table.add_row(name, f"{first:.3f} ± {first_error:.3f}", f"{last:.3f} ± {last_error:.3f}",
                      f"{difference:+.3f} ± {error:.3f}", f"{ratio:+.1f}")
        metrics |= {f"before/{name}": first, f"after/{name}": last, f"difference/{name}": difference,
                    f"difference/{name}/error": error}
    if not context.quiet:
        Console(stderr=True).print(table)
    return metrics
