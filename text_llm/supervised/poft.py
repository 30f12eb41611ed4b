"""Preference-oriented supervised fine-tuning: prefer the trained model's likelihood to that of aligned models."""

from __future__ import annotations

from typing import Any

from mmalign.config import Options
from mmalign.data.loading import DataOptions
from mmalign.methods.registry import Pipeline, method
from mmalign.policies.loading import ModelOptions


class PoFTOptions(Options):
    """Options of PoFT: those of scoring, those of training."""

    model: ModelOptions
    """The model to train."""
    data: DataOptions
    """Rows with a sample: prompt and completion, or messages."""
    teachers: list[ModelOptions] = []
    """Aligned models whose mean log-prob of every sample is the opponent. Empty: rows already hold ``teacher_logp``."""
    beta: float = 1.0
    """Scale s of the difference of mean log-probs."""
    offset: float = 0.0
    """Constant g added inside the sigmoid."""
    encoding: dict[str, Any] = {}
    """Tokenisation, masks and truncation, for teachers and training alike."""
    keep: float = 1.0
    """Share of rows kept, those the teachers find likeliest: the hard filter that PoFT is compared with."""
    rows_per_forward: int = 8
    """Rows a teacher scores together."""
    train: dict[str, Any] = {}
    """Options of the training stage (method dpo): tuning, batch, steps or epochs, optimizers, ..."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse what the pipeline sets itself."""
        for name in ("model", "data", "losses", "encoding"):
            if name in self.train:
                key = "beta and offset" if name == "losses" else name
                raise ValueError(f"train.{name}: is set by the pipeline; use {key} of the method")


@method("poft", options=PoFTOptions, modality="text", kind="pipeline", paper="Fan et al., 2024, arXiv 2412.12865")
def poft(options: PoFTOptions) -> Pipeline:
    """Fine-tuning that counts a row less the less aligned models like it: a Bradley-Terry link between both likelihoods."""
    data = options.data.model_dump(exclude_unset=True)
    stages: list[dict[str, Any]] = []
    if options.teachers:
        stages.append({"name": "scores", "kind": "teacher_scores", "data": data, "encoding": options.encoding,
                       "teachers": [teacher.model_dump(exclude_unset=True) for teacher in options.teachers],
                       "keep": options.keep, "rows_per_forward": options.rows_per_forward})
        data = {"path": "${stages.scores.data}"}
    stages.append({"name": "train", "method": "dpo", "model": options.model.model_dump(exclude_unset=True), "data": data,
                   "losses": [{"name": "poft", "beta": options.beta, "offset": options.offset}], "encoding": options.encoding,
                   **options.train})
    return Pipeline(stages, {"model": "train.model", "folder": "train.folder", "metrics": "train.metrics"})
