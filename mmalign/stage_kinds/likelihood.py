"""The likelihood stage: how well a language model predicts held-out rows, in all and by the groups of a column."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mmalign.config import Options
from mmalign.data.chat import TextEncoding
from mmalign.data.filters import row_text
from mmalign.data.loading import DataOptions, load_rows
from mmalign.errors import ConfigError, DataError
from mmalign.metrics.statistics import mean_and_error, paired_difference
from mmalign.metrics.tokenization import fertility
from mmalign.policies.base import Policy
from mmalign.policies.loading import ModelOptions, load_policy
from mmalign.stages import StageContext, StageResult, stage
from mmalign.training.checkpoint import atomic_folder
from mmalign.training.tracking import ProgressBar

RESULTS = "likelihood.jsonl"


class LikelihoodOptions(Options):
    """Options of the likelihood stage."""

    model: ModelOptions
    """The language model."""
    data: DataOptions
    """Held-out rows: text, prompt and completion, or messages."""
    by: str | None = None
    """Column whose groups are measured on their own (language, task, ...)."""
    encoding: TextEncoding = TextEncoding()
    """Tokenisation, and which tokens count."""
    compare_with: str | None = None
    """Folder of another likelihood stage on the same rows: the differences are paired."""
    rows_per_forward: int = 16
    """Rows scored together."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse values without a meaning."""
        if self.rows_per_forward < 1:
            raise ValueError(f"rows_per_forward must be at least 1, not {self.rows_per_forward}")


@stage("likelihood", options=LikelihoodOptions, outputs=("folder", "data"))
def likelihood(options: LikelihoodOptions, context: StageContext) -> StageResult:
    """Mean negative log-likelihood per token of held-out rows, with its spread over the groups of a column."""
    before = _read(options.compare_with) if options.compare_with else None
    rows = load_rows(options.data, seed=0)
    policy = load_policy(options.model, encoding=options.encoding)
    if policy.modality != "text":
        raise ConfigError(f"model.path: {options.model.path} is no language model")
    examples, _ = policy.prepare_dataset(rows)
    if options.by is not None and any(example.get(options.by) in (None, "") for example in examples):
        raise DataError(f"by: some rows have no {options.by!r}; columns are {', '.join(rows[0])}")
    target = context.folder / "rows"
    records = []
    with ProgressBar(context.name, len(examples), quiet=context.quiet) as bar:
        for start in range(0, len(examples), options.rows_per_forward):
            part = [examples[i] for i in range(start, min(start + options.rows_per_forward, len(examples)))]
            for example, (nll, tokens) in zip(part, row_nll(policy, part), strict=True):
                group = str(example[options.by]) if options.by is not None else ""
                records.append({"id": example["id"], "group": group, "nll": nll, "tokens": tokens})
            bar.update(start + len(part), {})
    words = _fertility(rows, policy, options.by)
    with atomic_folder(target) as folder:
        (folder / RESULTS).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    metrics = grouped_nll(records) | words
    if before is not None:
        metrics |= _differences(before, records)
    if not context.quiet:
        Console(stderr=True).print(_table(metrics, context.name))
    return StageResult({"folder": str(context.folder), "data": str(target / RESULTS)}, metrics)


def row_nll(policy: Policy, examples: Sequence[Mapping[str, Any]]) -> list[tuple[float, int]]:
    """``(sum of -log p, tokens)`` of every prepared row."""
    with torch.no_grad():
        scores = policy.log_probs(policy.encode_rows(examples))
    losses = -(scores.logp.double() * scores.mask).sum(1)
    return list(zip(losses.tolist(), [int(n) for n in scores.mask.sum(1)], strict=True))


def grouped_nll(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """``nll`` per token over all rows, ``nll/GROUP`` of every group, and the worst group and spread when there are several.

    ``/error`` is the standard error over rows.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(record["group"], []).append(record)
    metrics = _nll("nll", records)
    if set(groups) == {""}:
        return metrics
    for name, members in sorted(groups.items()):
        metrics |= _nll(f"nll/{name}", members)
    means = [metrics[f"nll/{name}"] for name in groups]
    return metrics | {"nll_worst": max(means), "nll_spread": max(means) - min(means)}


def _nll(name: str, records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    tokens = sum(record["tokens"] for record in records)
    mean = math.fsum(record["nll"] for record in records) / tokens
    # Of a ratio of sums: the error of its residuals, which is that of a plain mean when all rows are equally long.
    residuals = [(record["nll"] - mean * record["tokens"]) * len(records) / tokens for record in records]
    return {name: mean, f"{name}/error": mean_and_error(residuals).error}


def _fertility(rows: Any, policy: Any, by: str | None) -> dict[str, float]:
    """Tokens per word (per character where a script has no spaces) of every group, from at most 200 rows each."""
    seen: dict[str, list[str]] = {}
    for i in range(len(rows)):
        members = seen.setdefault(str(rows[i][by]) if by is not None else "", [])
        if len(members) < 200 and "input_ids" not in rows[i]:
            members.append(row_text(rows[i]))
    found: dict[str, float] = {}
    for name, texts in sorted(seen.items()):
        if any(text.strip() for text in texts):
            counts = [len(ids) for ids in policy.tokenizer(texts, add_special_tokens=False)["input_ids"]]
            found[f"fertility/{name}" if name else "fertility"] = fertility(counts, texts)
    return found


def _read(folder: str) -> list[dict[str, Any]]:
    path = Path(folder) / "rows" / RESULTS
    if not path.is_file():
        raise ConfigError(f"compare_with: {folder} holds no rows/{RESULTS}; name the folder of a likelihood stage")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _differences(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    earlier = {record["id"]: record for record in before}
    if set(earlier) != {record["id"] for record in after}:
        raise ConfigError(f"compare_with: the other stage scored {len(earlier)} other rows; use the same data and encoding")
    metrics: dict[str, float] = {}
    # Means over rows, not tokens: the differences are paired by row.
    for group in ["", *sorted({record["group"] for record in after} - {""})]:
        mine = [record for record in after if not group or record["group"] == group]
        pairs = [(earlier[r["id"]]["nll"] / earlier[r["id"]]["tokens"], r["nll"] / r["tokens"]) for r in mine]
        found = paired_difference([a for a, _ in pairs], [b for _, b in pairs])
        name = f"nll{f'/{group}' if group else ''}"
        metrics |= {f"before/{name}": mean_and_error([a for a, _ in pairs]).mean,
                    f"after/{name}": mean_and_error([b for _, b in pairs]).mean,
                    f"difference/{name}": found.mean, f"difference/{name}/error": found.error}
    return metrics


def _table(metrics: Mapping[str, float], title: str) -> Table:
    table = Table("measure", "value", "standard error", title=title, title_justify="left")
    for name, value in metrics.items():
        if not name.endswith("/error"):
            error = metrics.get(f"{name}/error")
            table.add_row(name, f"{value:.4f}", "" if error is None else f"{error:.4f}")
    return table
