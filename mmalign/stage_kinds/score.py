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
from mmalign.stage_kinds.records import sample_column, sample_in, save_records
from mmalign.stages import StageContext, StageResult, stage
from mmalign.training.checkpoint import atomic_folder


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
