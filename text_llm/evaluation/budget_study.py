"""How to split an annotation budget between supervised rows and preference pairs, measured on one's own data."""

from __future__ import annotations

from typing import Any

from mmalign.config import Options
from mmalign.data.loading import DataOptions
from mmalign.data.mixture import split_budget
from mmalign.errors import ConfigError
from mmalign.methods.registry import Pipeline, method, model_of_stage
from mmalign.policies.loading import ModelOptions

DEFAULT_BATCH = 16


class BudgetStudyOptions(Options):
    """Options of a budget study."""

    model: ModelOptions
    """The base model."""
    rows: DataOptions
    """Pool of supervised rows (prompt and completion, or messages)."""
    pairs: DataOptions
    """Pool of preference pairs (prompt, chosen, rejected) over the same kind of prompts."""
    budgets: list[float]
    """Money to spend."""
    shares: list[float] = [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0]
    """Shares of it that go to preference pairs."""
    seeds: list[int] = [0, 1, 2]
    """Seeds: each shuffles the pools anew and repeats the whole grid. Differences at small budgets are noise without them."""
    row_price: float = 1.0
    """Price of a supervised row."""
    pair_price: float = 1.0
    """Price of a preference pair."""
    sft: dict[str, Any] = {"epochs": 2, "optimizers": [{"lr": 2e-5}]}
    """Options of the fine-tuning stages (method sft), with epochs rather than steps."""
    preference: dict[str, Any] = {"epochs": 1, "losses": [{"name": "sigmoid", "beta": 0.1}], "optimizers": [{"lr": 5e-7}]}
    """Options of the preference stages (method dpo), with epochs rather than steps."""
    evaluation: dict[str, Any]
    """Options of the evaluate stage (data, rewards, sampling, ...) that measures every model."""
    measure: str | None = None
    """Reward that is compared; null takes the first."""
    target: float | None = None
    """Level whose isoquant is computed: the cheapest budget that reaches it, for every share."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse what the grid cannot hold."""
        for name in ("budgets", "shares", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name}: give at least one value, each once, not {values}")
        for budget in self.budgets:
            for share in self.shares:
                rows, pairs = split_budget(budget, share, row_price=self.row_price, pair_price=self.pair_price)
                if rows + pairs == 0:
                    raise ValueError(f"budgets: {budget:g} buys neither a row nor a pair at share {share:g}; raise it")
        for name in ("sft", "preference"):
            node = getattr(self, name)
            taken = [key for key in ("model", "data", "seed") if key in node]
            if taken:
                raise ValueError(f"{name}.{taken[0]}: is set by the study; leave it out")
            if node.get("steps") is not None or not node.get("epochs"):
                raise ValueError(f"{name}.epochs: required, and no steps: with fixed steps a cheap run sees its rows more often")
        if "model" in self.evaluation:
            raise ValueError("evaluation.model: every model of the study is evaluated; leave it out")
        if "data" not in self.evaluation:
            raise ValueError("evaluation.data: required and not given")


@method("budget_study", options=BudgetStudyOptions, modality="text", kind="pipeline",
        paper="Raghavendra et al., 2025, arXiv 2502.11284")
def budget_study(options: BudgetStudyOptions) -> Pipeline:
    """A grid of budgets and of shares spent on preference pairs: fine-tune, then DPO, evaluate, draw the response surface."""
    model = options.model.model_dump(exclude_unset=True)
    grid = [(budget, share, *split_budget(budget, share, row_price=options.row_price, pair_price=options.pair_price))
            for budget in options.budgets for share in options.shares]
    evaluate = {"kind": "evaluate", **options.evaluation}
    stages: list[dict[str, Any]] = [{"name": "start", "model": model, **evaluate}]
    cells: list[dict[str, Any]] = []
    for seed in options.seeds:
        pools = f"pools-seed{seed}"
        stages.append({
            "name": pools, "kind": "budget_pools", "seed": seed, "rows": options.rows.model_dump(exclude_unset=True),
            "pairs": options.pairs.model_dump(exclude_unset=True), "rows_needed": max(rows for _, _, rows, _ in grid),
            "pairs_needed": max(pairs for *_, pairs in grid), "test": options.evaluation["data"],
        })
        for rows, pairs in dict.fromkeys((rows, pairs) for _, _, rows, pairs in grid):
            stages += _run(options, model, rows, pairs, seed, pools, done={stage["name"] for stage in stages})
            stages.append({"name": f"eval-{rows}-{pairs}-seed{seed}", "model": _model(model, rows, pairs, seed), **evaluate})
        cells += [{"budget": budget, "share": share, "seed": seed, "rows": rows, "pairs": pairs,
                   "folder": f"${{stages.eval-{rows}-{pairs}-seed{seed}.folder}}"} for budget, share, rows, pairs in grid]
    stages.append({"name": "surface", "kind": "response_surface", "cells": cells, "measure": options.measure,
                   "target": options.target, "start": "${stages.start.folder}"})
    return Pipeline(stages, {"table": "surface.table", "plot": "surface.plot", "folder": "surface.folder"})


def _run(
    options: BudgetStudyOptions, model: dict[str, Any], rows: int, pairs: int, seed: int, pools: str, *, done: set[str],
) -> list[dict[str, Any]]:
    """The training stages of one cell; cells that buy the same rows share their fine-tuned model."""
    stages = []
    if rows and f"sft-{rows}-seed{seed}" not in done:
        stages.append({"name": f"sft-{rows}-seed{seed}", "method": "sft", "seed": seed, "model": model,
                       "data": {"path": f"${{stages.{pools}.rows}}", "limit": rows}, **_batched(options.sft, rows, "sft")})
    if pairs:
        stages.append({"name": f"dpo-{rows}-{pairs}-seed{seed}", "method": "dpo", "seed": seed,
                       "model": _model(model, rows, 0, seed), "data": {"path": f"${{stages.{pools}.pairs}}", "limit": pairs},
                       **_batched(options.preference, pairs, "preference")})
    return stages


def _model(start: dict[str, Any], rows: int, pairs: int, seed: int) -> dict[str, Any]:
    """The model after the stages of a cell (the reference of its preference stage is the fine-tuned one, never the base)."""
    if not rows and not pairs:
        return start
    stage = f"dpo-{rows}-{pairs}-seed{seed}" if pairs else f"sft-{rows}-seed{seed}"
    return model_of_stage(start, stage)


def _batched(node: dict[str, Any], count: int, key: str) -> dict[str, Any]:
    """``node`` with at least four updates per epoch: a batch of at most a quarter of the rows."""
    batch = dict(node.get("batch") or {})
    asked, forward = batch.get("examples_per_update", DEFAULT_BATCH), batch.get("examples_per_forward")
    if not isinstance(asked, int) or asked < 1:
        raise ConfigError(f"{key}.batch.examples_per_update: must be a positive integer, not {asked!r}")
    update = max(1, min(asked, count // 4))
    if forward is not None:
        update = update if update <= forward else update - update % forward
        batch["examples_per_forward"] = min(forward, update)
    return {**node, "batch": {**batch, "examples_per_update": update}}
