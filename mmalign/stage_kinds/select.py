"""The select stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from mmalign.config import Options
from mmalign.core.selection import best_of_group, best_worst_pair, top_k_indices
from mmalign.data.loading import DataOptions, load_rows
from mmalign.errors import ConfigError, DataError
from mmalign.stage_kinds.records import sample_column, sample_in, save_records
from mmalign.stages import StageContext, StageResult, stage
from mmalign.training.checkpoint import atomic_folder


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
