"""Adapting a language model to a domain: continued pre-training, fine-tuning, preferences, and a merge with a general model."""

from __future__ import annotations

from typing import Any

from mmalign.config import Options
from mmalign.methods.registry import Pipeline, method, model_of_stage
from mmalign.policies.loading import ModelOptions

STAGES = ("cpt", "sft", "preference")
"""Training stages in their order."""

SLERP = {"name": "slerp", "t": {"self_attn": [0, 0.5, 0.3, 0.7, 1], "mlp": [1, 0.5, 0.7, 0.3, 0], "default": 0.5}}
"""The reference schedule of Lu et al. 2024: attention and feed-forward layers change sides over depth."""


class DomainAdaptationOptions(Options):
    """Options of domain adaptation; a stage that is null is left out."""

    model: ModelOptions
    """Where training starts: a base or an instruct model."""
    general: str | None = None
    """General model of the same architecture that the result is merged with (the first parent); null takes model.path."""
    cpt: dict[str, Any] | None = None
    """Options of continued pre-training on raw domain text (method continued_pretraining): data, encoding, epochs, ..."""
    sft: dict[str, Any] | None = None
    """Options of fine-tuning on questions and answers (method sft)."""
    preference: dict[str, Any] | None = None
    """Options of preference optimisation; ``method`` is dpo (default) or orpo."""
    merge: dict[str, Any] | None = {}
    """Options of the merge stage (``merge``, dtype, ...); the function defaults to slerp with the published schedule over
    depth. null does not merge."""
    merge_after: list[str] | None = None
    """Stages whose model is merged: cpt, sft, preference; null merges the last one's. Training goes on from the model that is
    not merged."""
    evaluation: dict[str, dict[str, Any]] = {}
    """Evaluations by name, each with ``kind`` (likelihood or evaluate) and that stage's options but the model: run on the
    general model, after every stage and on every merge, with synergy, improvement and diversity of the merges."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse what no stage could use."""
        trained = self.trained
        if not trained:
            raise ValueError("nothing to do: give options for at least one of cpt, sft and preference")
        for name in trained:
            node = getattr(self, name)
            if "model" in node:
                raise ValueError(f"{name}.model: every stage starts from the one before it, the first from model; leave it out")
        if self.preference is not None and self.preference.get("method", "dpo") not in ("dpo", "orpo"):
            raise ValueError(f"preference.method: dpo or orpo, not {self.preference['method']!r}")
        if self.merge is not None and "models" in self.merge:
            raise ValueError("merge.models: the parents are the general model and the trained one; leave it out")
        if self.merge is None and self.merge_after:
            raise ValueError("merge_after: there is no merge; give merge, or leave merge_after out")
        for name in self.merge_after or ():
            if name not in trained:
                raise ValueError(f"merge_after: {name!r} is no stage of this run; it has {', '.join(trained)}")
        for name, node in self.evaluation.items():
            if node.get("kind") not in ("likelihood", "evaluate"):
                raise ValueError(f"evaluation.{name}.kind: likelihood or evaluate, not {node.get('kind')!r}")
            if "model" in node:
                raise ValueError(f"evaluation.{name}.model: the pipeline evaluates its own models; leave it out")

    @property
    def trained(self) -> list[str]:
        """Training stages of this run."""
        return [name for name in STAGES if getattr(self, name) is not None]


@method("domain_adaptation", options=DomainAdaptationOptions, modality="text", kind="pipeline",
        paper="Lu et al., 2024, arXiv 2409.03444")
def domain_adaptation(options: DomainAdaptationOptions) -> Pipeline:
    """Continued pre-training, fine-tuning, DPO or ORPO, and a spherical merge with the general model; each can be left out."""
    start = options.model.model_dump(exclude_unset=True)
    general = options.general or options.model.path
    merged = [] if options.merge is None else options.merge_after or options.trained[-1:]
    first = start if options.general is None else {k: v for k, v in start.items() if k == "dtype"} | {"path": general}
    stages = _evaluations(options, "general", first)
    model, output = start, ""
    for name in options.trained:
        node = dict(getattr(options, name))
        chosen = node.pop("method", "dpo") if name == "preference" else {"cpt": "continued_pretraining", "sft": "sft"}[name]
        stages.append({"name": name, "method": chosen, "model": model, **node})
        model, output = model_of_stage(start, name), name
        stages += _evaluations(options, name, model)
        if name in merged:
            merge = f"merge_{name}"
            stages.append({"name": merge, "kind": "merge", "models": [general, f"${{stages.{name}.model}}"],
                           "merge": SLERP, **(options.merge or {})})
            stages += _evaluations(options, merge, model_of_stage(start, merge))
            stages += [
                {"name": f"{merge}-{label}-gain", "kind": "compare_parents", "first": f"${{stages.general-{label}.folder}}",
                 "second": f"${{stages.{name}-{label}.folder}}", "merged": f"${{stages.{merge}-{label}.folder}}"}
                for label in options.evaluation
            ]
            output = merge
    return Pipeline(stages, {"model": f"{output}.model", "folder": f"{output}.folder"})


def _evaluations(options: DomainAdaptationOptions, label: str, model: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"name": f"{label}-{name}", "model": model, **node} for name, node in options.evaluation.items()]
