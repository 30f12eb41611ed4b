"""The budget_pools stage: rows and pairs of a budget study in one fixed order, so that small budgets are part of large ones."""

from __future__ import annotations

import json
import random
from typing import Any

from mmalign.config import Options
from mmalign.core.seeding import derive_seed
from mmalign.data.assets import is_asset
from mmalign.data.columns import split_implicit_prompt
from mmalign.data.loading import DataOptions, load_rows
from mmalign.errors import DataError
from mmalign.stages import StageContext, StageResult, stage
from mmalign.training.checkpoint import atomic_folder


class BudgetPoolsOptions(Options):
    """Options of the budget_pools stage."""

    rows: DataOptions
    """Supervised rows to buy from."""
    pairs: DataOptions
    """Preference pairs to buy from."""
    rows_needed: int
    """Rows that the dearest cell of the study buys."""
    pairs_needed: int
    """Pairs that the dearest cell buys."""
    test: DataOptions | None = None
    """Evaluation rows: none of their prompts may be in the pools."""


@stage("budget_pools", options=BudgetPoolsOptions, outputs=("rows", "pairs", "folder"))
def budget_pools(options: BudgetPoolsOptions, context: StageContext) -> StageResult:
    """Shuffle the pools of a budget study once per seed, and refuse pools that are too small or hold test prompts."""
    tested = set[str]()
    if options.test is not None:
        tests = load_rows(options.test, seed=0, key="evaluation.data")
        tested = {_prompt(tests[i]) for i in range(len(tests))}
    outputs: dict[str, str] = {"folder": str(context.folder)}
    metrics: dict[str, float] = {}
    for name, needed in (("rows", options.rows_needed), ("pairs", options.pairs_needed)):
        target = context.folder / name
        target.mkdir(parents=True, exist_ok=True)
        outputs[name] = str(target)
        if not needed:
            continue
        data: DataOptions = getattr(options, name)
        if is_asset(data.path) and data.limit is None:
            data = data.model_copy(update={"limit": needed})
        pool = load_rows(data, seed=context.seed, key=name)
        if len(pool) < needed:
            raise DataError(f"{name}: the study buys up to {needed} {name}, and the pool has {len(pool)}; nothing is repeated, "
                            "so lower the budgets or give more data")
        order = list(range(len(pool)))
        random.Random(derive_seed(context.seed, "data", "budget", name)).shuffle(order)
        shared = [i for i in order[:needed] if _prompt(pool[i]) in tested] if tested else []
        if shared:
            raise DataError(f"{name}: the prompt of row {pool[shared[0]]['id']!r} (and of {len(shared) - 1} more) is also in "
                            "evaluation.data; train and test must not share prompts")
        _save(pool, order[:needed], target)
        metrics[name] = float(needed)
    return StageResult(outputs, metrics)


def _prompt(row: Any) -> str:
    """What a row asks, in one form for every layout of rows."""
    if row.get("prompt") is not None:
        asked = row["prompt"]
    elif row.get("messages") is not None:
        asked = [turn for turn in row["messages"] if turn["role"] != "assistant"]
    elif row.get("chosen") is not None and row.get("rejected") is not None:
        asked = split_implicit_prompt(row, ("chosen", "rejected"))["prompt"]
    else:
        asked = row.get("text")
    if isinstance(asked, list):
        asked = [[turn.get("role"), turn.get("content")] for turn in asked]
    return json.dumps(asked, ensure_ascii=False)


def _save(pool: Any, order: list[int], target: Any) -> None:
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    chosen = Dataset.from_list([pool[i] for i in order]) if isinstance(pool, list) else pool.select(order)
    with atomic_folder(target) as folder:
        chosen.save_to_disk(str(folder))
