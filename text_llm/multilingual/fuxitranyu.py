"""FuxiTranyu: balanced multilingual pre-training data, filtered; then instruction tuning, DPO, and a look at every language."""

from __future__ import annotations

from typing import Any

from mmalign.config import Options
from mmalign.data.balance import BalanceOptions
from mmalign.data.loading import DataOptions
from mmalign.methods.registry import Pipeline, method, model_of_stage
from mmalign.policies.loading import ModelOptions


class FuxiTranyuOptions(Options):
    """Options of the FuxiTranyu recipe; a stage that is null is left out."""

    model: ModelOptions
    """The model to start from."""
    mixture: BalanceOptions = BalanceOptions(exponent=0.3)
    """How languages are balanced in pre-training and fine-tuning: by column, exponent (or temperature, or ratios), cap. A
    stage may have a ``mixture`` of its own, or null."""
    filter: dict[str, Any] | None = None
    """Options of the filter stage (heuristics, exact_duplicates, near_duplicates, perplexity) that the pre-training
    documents pass first; needs cpt."""
    cpt: dict[str, Any] | None = None
    """Options of continued pre-training (method continued_pretraining): data with ``text`` and the language, ..."""
    sft: dict[str, Any] | None = None
    """Options of instruction tuning (method sft)."""
    preference: dict[str, Any] | None = None
    """Options of DPO; beta is 0.01 unless ``losses`` says otherwise, the reference is the model before this stage."""
    evaluation: dict[str, dict[str, Any]] = {}
    """Evaluations by name, each with ``kind`` (likelihood, evaluate or representations) and that stage's options but the
    model: run before, and after every training stage; ``by`` is the column of the mixture unless given."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse what no stage could use."""
        if not any((self.cpt, self.sft, self.preference)):
            raise ValueError("nothing to do: give options for at least one of cpt, sft and preference")
        for name in ("cpt", "sft", "preference"):
            if "model" in (getattr(self, name) or {}):
                raise ValueError(f"{name}.model: every stage starts from the one before it, the first from model; leave it out")
        if self.filter is not None and self.cpt is None:
            raise ValueError("filter: the documents of cpt are filtered, and there is no cpt; filter others in their own stage")
        if self.filter is not None and "data" in self.filter:
            raise ValueError("filter.data: the documents of cpt are filtered; leave it out")
        if self.cpt is not None and "data" not in self.cpt:
            raise ValueError("cpt.data: required and not given")
        for name, node in self.evaluation.items():
            if node.get("kind") not in ("likelihood", "evaluate", "representations"):
                raise ValueError(f"evaluation.{name}.kind: likelihood, evaluate or representations, not {node.get('kind')!r}")


@method("fuxitranyu", options=FuxiTranyuOptions, modality="text", kind="pipeline", paper="Sun et al., 2024, arXiv 2408.06273")
def fuxitranyu(options: FuxiTranyuOptions) -> Pipeline:
    """Filtered documents balanced over languages, instruction tuning with NEFTune, DPO, and an evaluation per language."""
    model: dict[str, Any] = options.model.model_dump(exclude_unset=True)
    start, by = model, options.mixture.by
    mixture = options.mixture.model_dump(exclude_none=True)
    stages: list[dict[str, Any]] = []

    def evaluate(label: str) -> None:
        for name, node in options.evaluation.items():
            previous = {} if label == "start" or node["kind"] == "representations" or not stages else \
                {"compare_with": f"${{stages.start-{name}.folder}}"}
            stages.append({"name": f"{label}-{name}", "model": model, "by": by, **previous, **node})

    evaluate("start")
    last = ""
    if options.cpt is not None:
        data = DataOptions.model_validate(options.cpt["data"]).model_dump(exclude_unset=True)
        if options.filter is not None:
            stages.append({"name": "filter", "kind": "filter", "data": data, "by": by, **options.filter})
            data = {"path": "${stages.filter.data}"}
        stages.append({"name": "cpt", "method": "continued_pretraining", "model": model, "mixture": mixture,
                       **options.cpt, "data": data})
        model, last = model_of_stage(start, "cpt"), "cpt"
        evaluate("cpt")
    if options.sft is not None:
        stages.append({"name": "sft", "method": "sft", "model": model, "mixture": mixture, "neftune_noise_alpha": 5.0,
                       **options.sft})
        model, last = model_of_stage(start, "sft"), "sft"
        evaluate("sft")
    if options.preference is not None:
        stages.append({"name": "preference", "method": "dpo", "model": model, "losses": [{"name": "sigmoid", "beta": 0.01}],
                       **options.preference})
        model, last = model_of_stage(start, "preference"), "preference"
        evaluate("preference")
    return Pipeline(stages, {"model": f"{last}.model", "folder": f"{last}.folder"})
