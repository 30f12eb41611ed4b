"""The teacher_scores stage: how likely other language models find each sample, each with its own tokenizer and template."""

from __future__ import annotations

import gc
import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch

from mmalign.config import Options
from mmalign.core.selection import kept_count, top_k_indices
from mmalign.data.chat import TextEncoding
from mmalign.data.loading import DataOptions, load_rows
from mmalign.errors import ConfigError, DataError, NoRowsLeftError
from mmalign.policies.base import Policy
from mmalign.policies.loading import ModelOptions, load_policy
from mmalign.stage_kinds.likelihood import row_nll
from mmalign.stage_kinds.records import Chunk, write_in_chunks
from mmalign.stages import StageContext, StageResult, stage


class TeacherScoresOptions(Options):
    """Options of the teacher_scores stage."""

    data: DataOptions
    """Rows with a sample: prompt and completion, or messages."""
    teachers: list[ModelOptions]
    """The models that score; one is in memory at a time."""
    encoding: TextEncoding = TextEncoding()
    """How a row becomes tokens of each teacher; the scored tokens are those a loss would count. Use the same options in
    the training stage."""
    rows_per_forward: int = 8
    """Rows scored together."""
    keep: float = 1.0
    """Share of rows kept, those with the highest mean score; 1 keeps all that could be scored."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse values without a meaning."""
        if not self.teachers:
            raise ValueError("teachers: name at least one model")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must lie in (0, 1], not {self.keep}")
        if self.rows_per_forward < 1:
            raise ValueError(f"rows_per_forward must be at least 1, not {self.rows_per_forward}")


@stage("teacher_scores", options=TeacherScoresOptions, outputs=("data", "folder"))
def teacher_scores(options: TeacherScoresOptions, context: StageContext) -> StageResult:
    """Add ``teacher_logp``, the mean over teachers of the mean log-prob per token of each row's sample.

    Rows that a teacher cannot score (nothing left of the sample at its maximum length) are dropped and counted. Each
    teacher's scores are also kept as ``teacher_logp_1``, ``teacher_logp_2``, ...
    """
    rows = load_rows(options.data, seed=context.seed)
    if "teacher_logp" in rows[0]:
        raise DataError("data.path: the rows already hold teacher_logp; map it to null in data.columns to score them anew")
    columns, templates = [], {}
    for number, teacher in enumerate(options.teachers, start=1):
        scores, templates[f"teacher_{number}"] = _score_with(teacher, number, rows, options, context)
        columns.append(scores)
    means = torch.stack(columns).mean(0)  # nan where any teacher has none
    found = ~means.isnan()
    if not bool(found.any()):
        raise DataError("data.path: no row could be scored by every teacher; raise encoding.max_length")
    kept = found.nonzero().flatten()
    if options.keep < 1:
        best = top_k_indices(means[kept], kept_count(len(kept), options.keep))
        kept = kept[best.sort().values]
    chosen = set(kept.tolist())

    def join(examples: list[dict[str, Any]], chunk: range) -> Chunk:
        joined = [
            {**row, "teacher_logp": float(means[i]), **{f"teacher_logp_{k}": float(c[i]) for k, c in enumerate(columns, start=1)}}
            for i, row in zip(chunk, examples, strict=True) if i in chosen
        ]
        return joined, {}

    data, numbers = write_in_chunks(context, rows, join)
    lost = int((~found).sum())
    if lost:
        context.say(f"{lost} of {len(rows)} rows dropped: no token of their sample is left at encoding.max_length")
    metrics = {"rows": numbers["rows"], "dropped/unscored": float(lost), "teacher_logp/mean": float(means[kept].mean()),
               "teacher_logp/std": float(means[kept].std()) if len(kept) > 1 else 0.0}
    return StageResult({"data": str(data), "folder": str(context.folder)}, metrics, {"templates": templates})


def _score_with(
    teacher: ModelOptions, number: int, rows: Sequence[Any], options: TeacherScoresOptions, context: StageContext,
) -> tuple[torch.Tensor, str]:
    """Scores ``[N]`` of one teacher (nan: none) and a hash of its chat template; a finished teacher is not run again."""
    from datasets import Dataset, load_from_disk

    own = StageContext(f"{context.name} {number}/{len(options.teachers)}", context.folder / f"teacher_{number}", context.seed,
                       context.config_folder, context.fingerprint, context.quiet, context.previous, context.run_seed)
    policy: Policy | None = None
    if not (own.folder / "data").exists():
        policy = load_policy(teacher, encoding=options.encoding)
        if policy.modality != "text":
            raise ConfigError(f"teachers[{number - 1}].path: {teacher.path} is a {policy.modality} model; only language models "
                              "score text")

        def score(examples: list[dict[str, Any]], chunk: range) -> Chunk:
            assert policy is not None
            return [{"position": i, "logp": value} for i, value in
                    zip(chunk, mean_log_probs(policy, examples, options.rows_per_forward), strict=True)], {}

        (own.folder / "template.txt").parent.mkdir(parents=True, exist_ok=True)
        template = str(getattr(policy.tokenizer, "chat_template", None))  # type: ignore[attr-defined]
        (own.folder / "template.txt").write_text(template, encoding="utf-8")
        write_in_chunks(own, rows, score, size=256)
        del policy
        gc.collect()
    stored = load_from_disk(str(own.folder / "data"))
    assert isinstance(stored, Dataset)
    digest = hashlib.sha256((own.folder / "template.txt").read_bytes()).hexdigest()[:16]
    return torch.tensor(stored["logp"][:], dtype=torch.float64), digest


def mean_log_probs(policy: Policy, examples: Sequence[dict[str, Any]], rows_per_forward: int) -> list[float]:
    """Mean log-prob per scored token of each row's sample; nan for rows of which no token is left."""
    named = [{**row, "id": str(i)} for i, row in enumerate(examples)]
    values = [math.nan] * len(examples)
    try:
        prepared, _ = policy.prepare_dataset(named)
    except NoRowsLeftError:
        return values
    order = sorted(range(len(prepared)), key=lambda i: len(prepared[i]["input_ids"]))  # rows of like length share a forward
    for start in range(0, len(order), rows_per_forward):
        part = [prepared[i] for i in order[start : start + rows_per_forward]]
        for row, (nll, tokens) in zip(part, row_nll(policy, part), strict=True):
            values[int(row["id"])] = -nll / tokens
    return values
