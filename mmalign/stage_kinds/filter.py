"""The filter stage: documents that are too short, repetitive, banned, improbable or duplicated are left out and counted."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mmalign.config import Options
from mmalign.data.chat import TextEncoding
from mmalign.data.deduplication import NearDuplicateOptions, exact_duplicates, near_duplicates
from mmalign.data.filters import HeuristicOptions, Heuristics, row_text
from mmalign.data.loading import DataOptions, load_rows
from mmalign.errors import ConfigError, DataError
from mmalign.policies.loading import ModelOptions, load_policy
from mmalign.stage_kinds.likelihood import row_nll
from mmalign.stages import StageContext, StageResult, stage
from mmalign.training.checkpoint import atomic_folder, write_json
from mmalign.training.tracking import ProgressBar


class PerplexityOptions(Options):
    """Leave out texts that a model finds too improbable (or too probable)."""

    model: ModelOptions
    """The language model that judges."""
    max: float | None = None
    """Texts of higher perplexity are left out."""
    min: float | None = None
    """Texts of lower perplexity are left out."""
    max_length: int = 1024
    """Tokens of a text that are judged."""
    rows_per_forward: int = 16
    """Texts judged together."""
    rows_per_chunk: int = 256
    """Texts judged and written together; a killed stage resumes at the first chunk not written."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse bounds without a meaning."""
        if self.max is None and self.min is None:
            raise ValueError("perplexity: give max, min or both")
        if any(bound is not None and bound < 1 for bound in (self.max, self.min)):
            raise ValueError(f"perplexity: bounds are at least 1, not {self.min} and {self.max}")
        if self.max is not None and self.min is not None and self.min > self.max:
            raise ValueError(f"perplexity: min is {self.min} and max {self.max}; no text can be between")
        if self.rows_per_chunk < 1 or self.rows_per_forward < 1:
            raise ValueError("perplexity: rows_per_chunk and rows_per_forward must be at least 1")


class FilterOptions(Options):
    """Options of the filter stage; what is left out of the configuration is not applied."""

    data: DataOptions
    """Rows to filter; everything but the texts to be left out is passed on unchanged."""
    column: str | None = None
    """Column that holds the text; null takes ``text``, or all of a row's prompt, completion, answers and messages."""
    by: str | None = None
    """Column whose groups (languages, ...) are counted on their own."""
    heuristics: HeuristicOptions | None = None
    """Length, repetition, banned words and links."""
    exact_duplicates: bool = True
    """Leave out texts that equal an earlier one up to case and white space."""
    near_duplicates: NearDuplicateOptions | None = None
    """Leave out texts nearly equal to an earlier one (MinHash; needs ``pip install 'mmalign[dedup]'``)."""
    perplexity: PerplexityOptions | None = None
    """Leave out texts by their perplexity under a model."""

    def model_post_init(self, context: Any, /) -> None:
        """A list of groups needs the column they are in."""
        if self.heuristics is not None and self.heuristics.groups is not None and self.by is None:
            raise ValueError("heuristics.groups needs by: the column that names a row's group")


@stage("filter", options=FilterOptions, outputs=("data", "folder"))
def filter_rows(options: FilterOptions, context: StageContext) -> StageResult:
    """Leave out documents by heuristics, duplicates and perplexity, counting every reason (and every group)."""
    rows = load_rows(options.data, seed=context.seed)
    if options.by is not None and options.by not in rows[0]:
        raise DataError(f"by: the rows have no column {options.by!r}; they have {', '.join(rows[0])}")

    def text_of(number: int) -> str:
        return row_text(rows[number], options.column)

    reasons: dict[int, str] = {}
    if options.heuristics is not None:
        _heuristics(options, context, rows, reasons)
    if options.exact_duplicates:
        alive = _left(rows, reasons)
        reasons |= {alive[k]: "exact duplicate" for k in exact_duplicates(text_of(number) for number in alive)}
    turns = 0
    if options.near_duplicates is not None:
        alive = _left(rows, reasons)
        found = near_duplicates(lambda k: text_of(alive[k]), len(alive), options.near_duplicates, seed=context.seed,
                                report=lambda turn, removed: context.say(f"near duplicates, turn {turn}: {removed} left out"))
        reasons |= {alive[k]: "near duplicate" for k in found.dropped}
        turns = found.turns
    perplexities = _perplexity(options, context, rows, text_of, reasons) if options.perplexity is not None else {}
    kept = _left(rows, reasons)
    if not kept:
        raise DataError(f"data.path: every row was left out ({_summary(reasons)}); loosen the filters")
    data = context.folder / "data"
    with atomic_folder(data) as folder:
        _save(rows, kept, perplexities, folder)
    shutil.rmtree(context.folder / "parts", ignore_errors=True)
    metrics = _count(rows, reasons, options.by)
    if options.near_duplicates is not None:
        metrics["turns"] = float(turns)
    write_json(context.folder / "dropped.json", {str(rows[number]["id"]): reason for number, reason in sorted(reasons.items())})
    if not context.quiet:
        Console(stderr=True).print(_table(metrics, context.name))
    return StageResult({"data": str(data), "folder": str(context.folder)}, metrics)


def _left(rows: Sequence[Any], reasons: dict[int, str]) -> list[int]:
    return [number for number in range(len(rows)) if number not in reasons]


def _heuristics(options: FilterOptions, context: StageContext, rows: Sequence[Any], reasons: dict[int, str]) -> None:
    assert options.heuristics is not None
    filters = Heuristics(options.heuristics, folder=context.config_folder)
    for number in range(len(rows)):
        row = rows[number]
        reason = filters.reason(row_text(row, options.column), row, group=str(row[options.by]) if options.by else None)
        if reason is not None:
            reasons[number] = reason


def _perplexity(
    options: FilterOptions, context: StageContext, rows: Sequence[Any], text_of: Callable[[int], str], reasons: dict[int, str],
) -> dict[int, float]:
    """Perplexity of every row that is left, chunk by chunk; rows outside of the bounds get their reason."""
    bounds = options.perplexity
    assert bounds is not None
    alive = _left(rows, reasons)
    chunks = [alive[start : start + bounds.rows_per_chunk] for start in range(0, len(alive), bounds.rows_per_chunk)]
    parts, found = context.folder / "parts", dict[int, float]()
    parts.mkdir(parents=True, exist_ok=True)
    policy: Any = None
    with ProgressBar(context.name, len(chunks), quiet=context.quiet) as bar:
        for number, chunk in enumerate(chunks):
            file = parts / f"{number:06d}.json"
            if not file.exists():
                if policy is None:
                    policy = load_policy(bounds.model, encoding=TextEncoding(max_length=bounds.max_length))
                    if policy.modality != "text":
                        raise ConfigError(f"perplexity.model.path: {bounds.model.path} is no language model")
                write_json(file, perplexities(policy, [text_of(k) for k in chunk], bounds.rows_per_forward))
            found |= dict(zip(chunk, json.loads(file.read_text(encoding="utf-8")), strict=True))
            bar.update(number + 1, {})
    for k, value in found.items():
        if (bounds.max is not None and value > bounds.max) or (bounds.min is not None and value < bounds.min):
            reasons[k] = "perplexity"
    return found


def perplexities(policy: Any, texts: Sequence[str], rows_per_forward: int = 16) -> list[float]:
    """``exp`` of the mean negative log-likelihood per token of every text; infinite for one without a token to predict."""
    values = [math.inf] * len(texts)
    rows = [{"id": str(k), "text": text} for k, text in enumerate(texts) if text.strip()]
    if not rows:
        return values
    examples, _ = policy.prepare_dataset(rows)
    for start in range(0, len(examples), rows_per_forward):
        part = [examples[i] for i in range(start, min(start + rows_per_forward, len(examples)))]
        for example, (nll, tokens) in zip(part, row_nll(policy, part), strict=True):
            values[int(example["id"])] = math.exp(min(700.0, nll / tokens))
    return values


def _save(rows: Any, kept: list[int], perplexity: dict[int, float], folder: Path) -> None:
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    left = Dataset.from_list([rows[number] for number in kept]) if isinstance(rows, list) else rows.select(kept)
    if perplexity:
        if "perplexity" in left.column_names:
            left = left.remove_columns(["perplexity"])
        left = left.add_column("perplexity", [perplexity[number] for number in kept])
    left.save_to_disk(str(folder))


def _count(rows: Sequence[Any], reasons: dict[int, str], by: str | None) -> dict[str, float]:
    counts = Counter(reasons.values())
    metrics = {"rows": float(len(rows)), "kept": float(len(rows) - len(reasons))}
    metrics |= {f"dropped/{reason.replace(' ', '_')}": float(count) for reason, count in sorted(counts.items())}
    if by is None:
        return metrics
    names = rows[by] if hasattr(rows, "column_names") else [row[by] for row in rows]  # type: ignore[call-overload]
    groups: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        counted = groups.setdefault(str(name), [0, 0])
        counted[0] += 1
        counted[1] += number not in reasons
    for name, (total, kept) in sorted(groups.items()):
        metrics |= {f"rows/{name}": float(total), f"kept/{name}": float(kept)}
    return metrics


def _summary(reasons: dict[int, str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in Counter(reasons.values()).most_common())


def _table(metrics: dict[str, float], title: str) -> Table:
    table = Table("", "rows", title=title, title_justify="left")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.0f}")
    return table
