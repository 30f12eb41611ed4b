"""Sample held-out prompts with fixed seeds, reward the samples, keep them for people to look at."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mmalign.config import Options
from mmalign.core.seeding import generator
from mmalign.data.loading import DataOptions
from mmalign.metrics.statistics import mean_and_error
from mmalign.policies.base import Policy, Rollout
from mmalign.rewards.base import RewardOptions, RewardSet


class EvaluationOptions(Options):
    """Held-out evaluation while training."""

    data: DataOptions
    """Held-out prompts."""
    rewards: list[RewardOptions] | None = None
    """Rewards to measure; null takes those of training."""
    every: int = 0
    """Updates between evaluations; 0 evaluates before and after training only."""
    completions_per_prompt: int = 1
    """Samples of every prompt."""
    greedy: bool = True
    """Text: take the most likely tokens. Images always use fixed seeds."""
    by: str | None = None
    """Column whose groups (tasks, languages, ...) are measured on their own as well, as ``group/GROUP/REWARD``."""


@dataclass
class Evaluation:
    """Samples of held-out prompts and what each reward says of them."""

    rollout: Rollout
    metrics: dict[str, float]

    def rewards(self) -> dict[str, list[float]]:
        """Reward name -> one value per sample."""
        assert self.rollout.rewards is not None
        columns = self.rollout.rewards.T.tolist()
        return dict(zip(self.rollout.reward_names, columns, strict=True))

    def prompt_means(self) -> dict[str, list[float]]:
        """Reward name -> one mean per prompt (NaN where the reward never applied).

        Samples of one prompt are not independent: errors are computed over prompts.
        """
        assert self.rollout.rewards is not None
        groups = [self.rollout.group == g for g in self.rollout.group.unique()]
        means = torch.stack([self.rollout.rewards[members].nanmean(0) for members in groups])
        return dict(zip(self.rollout.reward_names, means.T.tolist(), strict=True))


def evaluate_policy(
    policy: Policy, examples: Sequence[Mapping[str, Any]], rewards: RewardSet, sampling: Any, *,
    completions_per_prompt: int = 1, seed: int = 0, by: str | None = None,
) -> Evaluation:
    """Sample every example's prompt and score the samples; the same seed gives the same noise whatever the weights.

    ``by`` names a column whose groups are measured on their own as well.
    """
    with torch.no_grad():
        rollout = policy.sample(
            [example["prompt"] for example in examples], completions_per_prompt, sampling,
            generator(seed, "evaluation", "sampling"),
        )
    rollout.columns |= {
        name: [examples[i][name] for i in rollout.group.tolist()] for name in examples[0] if name != "prompt"
    }
    rollout = rewards.score(rollout)
    evaluation = Evaluation(rollout, {})
    for name, values in evaluation.prompt_means().items():
        mean, error = mean_and_error([value for value in values if value == value])
        evaluation.metrics |= {f"eval/{name}": mean, f"eval/{name}/error": error}
        if by is not None:
            evaluation.metrics |= group_means(values, [example[by] for example in examples], name)
    return evaluation


def group_means(values: Sequence[float], groups: Sequence[Any], reward: str) -> dict[str, float]:
    """Mean and standard error of a reward in every group of prompts, as ``group/GROUP/REWARD``; NaN values are left out."""
    metrics: dict[str, float] = {}
    for group in sorted({str(name) for name in groups}):
        kept = [value for value, own in zip(values, groups, strict=True) if str(own) == group and value == value]
        mean, error = mean_and_error(kept)
        metrics |= {f"group/{group}/{reward}": mean, f"group/{group}/{reward}/error": error}
    return metrics


def save_samples(evaluation: Evaluation, folder: Path, *, limit: int | None = None) -> None:
    """``samples.jsonl`` with one line per sample; images as PNG files beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    rollout, rewards = evaluation.rollout, evaluation.rewards()
    lines = []
    for i in range(len(rollout) if limit is None else min(limit, len(rollout))):
        sample = rollout.samples[i]
        record: dict[str, Any] = {"prompt": rollout.prompts[i]}
        if isinstance(sample, Image.Image):
            name = f"{i:05d}.png"
            sample.save(folder / name)
            record["image"] = name
        else:
            record["completion"] = sample
        record["rewards"] = {name: None if values[i] != values[i] else values[i] for name, values in rewards.items()}
        # A column of the data may be called as the sample is (the reference completion): the sample stays.
        record |= {name: values[i] for name, values in rollout.columns.items() if name not in record and _is_json(values[i])}
        lines.append(json.dumps(record, ensure_ascii=False))
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "evaluation.json").write_text(json.dumps({
        "metrics": evaluation.metrics, "rewards": evaluation.prompt_means(), "samples": len(rollout),
    }), encoding="utf-8")


def _is_json(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool, type(None)))
