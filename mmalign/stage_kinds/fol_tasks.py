"""The fol_tasks stage."""

from __future__ import annotations

from typing import Any

from mmalign.data.loading import DataOptions, load_rows
from mmalign.logic.tasks import TaskOptions, task_rows, vocabulary_of
from mmalign.stage_kinds.records import Chunk, write_in_chunks
from mmalign.stages import StageContext, StageResult, stage

ROWS_FOR_NAMES = 1000
"""Rows at the start of the data whose predicates and terms random edits may bring in."""


class FolTasksOptions(TaskOptions):
    """Options of the fol_tasks stage."""

    data: DataOptions
    """Sentences and formulas: columns NL and FOL (or nl and gold), and Pred FOL (or predicted) for the tasks correction and
    loop. The same run reads the same rows in all its stages of this kind."""


@stage("fol_tasks", options=FolTasksOptions, outputs=("data", "folder"))
def fol_tasks(options: FolTasksOptions, context: StageContext) -> StageResult:
    """Turn sentences with first-order logic into prompts and completions: translation, correction, corrections in steps."""
    rows = load_rows(options.data, seed=context.run_seed)
    names = vocabulary_of([dict(rows[i]) for i in range(min(len(rows), ROWS_FOR_NAMES))]) if options.task == "steps" else None

    def make(examples: list[dict[str, Any]], chunk: range) -> Chunk:
        return list(task_rows(examples, options, seed=context.seed, first=chunk.start, vocabulary=names)), {}

    data, numbers = write_in_chunks(context, rows, make)
    return StageResult({"data": str(data), "folder": str(context.folder)}, {"rows": numbers["rows"]})
