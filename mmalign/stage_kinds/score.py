"""The score stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mmalign.config import Options
from mmalign.data.loading import DataOptions, load_rows
from mmalign.data.rows import Rows
from mmalign.errors import DataError
from mmalign.policies.base import Rollout
from mmalign.rewards.base import RewardOptions, build_rewards
from mmalign.stage_kinds.records import JUDGED_PER_CHUNK, Chunk, sample_column, sample_in, write_in_chunks
from mmalign.stages import StageContext, StageResult, stage


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
    rewards.check_rows(rows)

    def judge(examples: list[dict[str, Any]], chunk: range) -> Chunk:
        rollout = rewards.score(rollout_of(examples, first=chunk.start))
        total = rewards.total(rollout)
        assert rollout.rewards is not None
        scored = [
            {**row, **{f"reward_{name}": float(rollout.rewards[i, k]) for k, name in enumerate(rollout.reward_names)},
             "score": float(total[i])}
            for i, row in enumerate(examples)
        ]
        columns = {f"{name}/mean": rollout.rewards[:, k] for k, name in enumerate(rollout.reward_names)} | {"score/mean": total}
        numbers: dict[str, float] = {}
        for name, values in columns.items():
            numbers |= {f"sum {name}": float(values.nansum()), f"count {name}": float((~values.isnan()).sum())}
        return scored, numbers

    data, numbers = write_in_chunks(context, rows, judge, size=JUDGED_PER_CHUNK)
    names = [name.removeprefix("sum ") for name in numbers if name.startswith("sum ")]
    metrics = {name: numbers[f"sum {name}"] / max(numbers[f"count {name}"], 1.0) for name in names}
    return StageResult({"data": str(data), "folder": str(context.folder)}, metrics)


def rollout_of(rows: Sequence[Mapping[str, Any]], *, first: int = 0) -> Rollout:
    """A rollout record (without log-probs) of samples that are already on disk; ``first`` is the position of row 0."""
    if not len(rows):
        raise DataError("data.path: the data set has no rows")
    example = rows[0]
    sample = sample_column(example)
    if "prompt" not in example:
        raise DataError(f"data.path: scoring needs the column prompt; columns are {', '.join(example)}")
    columns = {name: [row[name] for row in rows] for name in example if name not in ("prompt", sample)}
    group = torch.tensor(columns.get("group", list(range(first, first + len(rows)))), dtype=torch.long)
    empty = torch.zeros(len(rows), 1)
    samples = [sample_in(row, sample) for row in rows]
    return Rollout([row["prompt"] for row in rows], samples, group, Rows({}), empty.bool(), empty, columns)
