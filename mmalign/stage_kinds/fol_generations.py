"""The fol_generations stage."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mmalign.core.seeding import generator
from mmalign.data.columns import require_columns
from mmalign.data.loading import DataOptions, load_rows
from mmalign.errors import ConfigError
from mmalign.logic.parser import try_parse
from mmalign.logic.tasks import following_row, read_answer
from mmalign.metrics.statistics import mean_and_error
from mmalign.policies.loading import ModelOptions, load_policy
from mmalign.rewards.logic import bleu_score, check_gold, equivalence_score
from mmalign.rewards.text import completion_text
from mmalign.stage_kinds.records import Chunk, write_csv, write_in_chunks
from mmalign.stage_kinds.sampling import SampledOptions, sampling_for
from mmalign.stages import StageContext, StageResult, stage
from mmalign.training.checkpoint import atomic_folder
from mmalign.training.multi_turn import next_rows

ROWS_PER_CHUNK = 64

LOOP_COLUMNS = ("prompt", "gold", "nl", "predicted", "previous", "instruction")
"""What rows of the task ``loop`` hold."""

SCORES = ("le", "bleu", "mixture", "parsed")


class FolGenerationsOptions(SampledOptions):
    """Options of the fol_generations stage."""

    model: ModelOptions
    """A model that corrects formulas."""
    data: DataOptions
    """Rows of the stage fol_tasks with task loop."""
    generations: list[int] = [1, 3, 5, 10]
    """After how many generations the formula is measured; the largest is how long corrections may go on."""
    omega: float = 0.7
    """Share of LE in ``mixture``."""
    quantifier_penalty: bool = False
    """Multiply LE by the share of quantifiers that agree."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse values without a meaning."""
        super().model_post_init(context)
        if not self.generations or min(self.generations) < 1 or sorted(set(self.generations)) != self.generations:
            raise ValueError(f"generations must be rising numbers from 1 on, such as [1, 3, 5, 10], not {self.generations}")
        if not 0 <= self.omega <= 1:
            raise ValueError(f"omega must be in [0, 1], not {self.omega}")
        if self.completions_per_prompt != 1:
            raise ValueError("completions_per_prompt must be 1: every generation continues the one before")


@stage("fol_generations", options=FolGenerationsOptions, outputs=("data", "folder", "metrics"))
def fol_generations(options: FolGenerationsOptions, context: StageContext) -> StageResult:
    """Let a model correct formulas again and again, and measure LE, BLEU and their mixture by the number of generations."""
    rows = load_rows(options.data, seed=0)
    require_columns(list(rows[0]), LOOP_COLUMNS, purpose="fol_generations (rows of fol_tasks with task: loop)")
    check_gold(rows)
    policy: Any = None

    def make(examples: list[dict[str, Any]], chunk: range) -> Chunk:
        nonlocal policy
        policy = policy or load_policy(options.model)
        if policy.modality != "text":
            raise ConfigError(f"model.path: {options.model.path} is no language model")
        return corrected(policy, examples, options, context, chunk.start), {}

    data, _ = write_in_chunks(context, rows, make, size=ROWS_PER_CHUNK)
    metrics, table = summarise(data, options)
    with atomic_folder(context.folder / "tables") as folder:
        write_csv(folder / "generations.csv", table)
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    if not context.quiet:
        Console(stderr=True).print(_shown(table, context.name))
    return StageResult({"data": str(data), "folder": str(context.folder),
                        "metrics": str(context.folder / "tables" / "metrics.json")}, metrics)


def corrected(
    policy: Any, rows: Sequence[Mapping[str, Any]], options: FolGenerationsOptions, context: StageContext, first: int,
) -> list[dict[str, Any]]:
    """One record per row: the formula before (``generation`` 0) and after every generation, with its scores."""
    sampling = sampling_for(policy, options.sampling)
    formulas: list[list[str]] = [[row["predicted"]] for row in rows]
    comments: list[list[str]] = [[] for _ in rows]
    open_rows: dict[int, Mapping[str, Any]] = dict(enumerate(rows))
    for turn in range(options.generations[-1]):
        if not open_rows:
            break
        random = generator(context.run_seed, "fol_generations", "sampling", first, turn)
        asked = list(open_rows.values())
        rollout = policy.sample([row["prompt"] for row in asked], 1, sampling, random)
        following = next_rows(policy, asked, rollout.samples, following_row, max_new_tokens=sampling.max_new_tokens)
        for at, sample, row in zip(list(open_rows), rollout.samples, following, strict=True):
            answer = read_answer(completion_text(sample))
            formulas[at].append(answer.formula)
            comments[at].append("\n".join(answer.corrections))
            if row is None:
                del open_rows[at]
            else:
                open_rows[at] = row
    records = []
    for i, row in enumerate(rows):
        scores = [_score(row["gold"], formula, options) for formula in formulas[i]]
        records.append({
            "id": row["id"], "nl": row["nl"], "gold": row["gold"], "formulas": formulas[i], "comments": comments[i] or [""],
            **{name: [score[name] for score in scores] for name in SCORES},
        })
    return records


def _score(gold: str, formula: str, options: FolGenerationsOptions) -> dict[str, float]:
    le = equivalence_score(gold, formula, quantifier_penalty=options.quantifier_penalty)
    bleu = bleu_score(gold, formula)
    return {"le": le, "bleu": bleu, "mixture": options.omega * le + (1 - options.omega) * bleu,
            "parsed": float(try_parse(formula) is not None)}


def summarise(data: Path, options: FolGenerationsOptions) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Metrics ``SCORE/GENERATIONS`` (0: before any) with errors, and as a table; a row that stopped keeps its formula."""
    from datasets import load_from_disk

    rows = load_from_disk(str(data)).select_columns([*SCORES, "comments"]).to_list()
    metrics: dict[str, float] = {"generations/mean": sum(len(row["le"]) - 1 for row in rows) / len(rows)}
    table = []
    for count in (0, *options.generations):
        record: dict[str, Any] = {"generations": count}
        for name in SCORES:
            mean, error = mean_and_error([row[name][min(count, len(row[name]) - 1)] for row in rows])
            record |= {name: mean, f"{name}_error": error}
            metrics |= {f"{name}/{count}": mean, f"{name}/{count}/error": error}
        table.append(record)
    return metrics, table


def _shown(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    table = Table("generations", "LE", "BLEU", "mixture", "parsed", title=title, title_justify="left")
    for row in rows:
        table.add_row(str(row["generations"]), *(f"{row[name]:.3f} ± {row[f'{name}_error']:.3f}" for name in SCORES))
    return table
