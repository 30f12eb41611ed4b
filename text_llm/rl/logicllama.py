"""LogicLLaMA: first-order logic by corrections, learned from perturbed formulas and then from the reward of a verifier."""

from __future__ import annotations

from typing import Any

from mmalign.config import Options
from mmalign.data.loading import DataOptions
from mmalign.logic.tasks import PerturbationOptions
from mmalign.methods.registry import Pipeline, as_given, method, model_of_stage
from mmalign.policies.loading import ModelOptions
from mmalign.rewards.base import RewardOptions

SET_BY_PIPELINE = ("model", "data", "rewards", "reference")


class TranslatorOptions(Options):
    """A weak translator whose mistakes the corrections are reinforced on: fine-tuned on few rows, then asked about all."""

    part: str = "1/20"
    """Rows of ``data`` that it learns from, ``k/n``."""
    sft: dict[str, Any] = {}
    """Options of its SFT run."""
    sampling: dict[str, Any] = {"temperature": 0.1, "top_p": 0.75, "top_k": 40, "max_new_tokens": 256}
    """How its formulas are drawn."""


class LogicLLaMAOptions(Options):
    """Options of LogicLLaMA: the pipeline's own, and those of its stages."""

    model: ModelOptions
    """The base model."""
    data: DataOptions
    """Sentences and formulas (columns NL and FOL) that corrections are learned from by supervision."""
    correction_data: DataOptions | None = None
    """Rows of the reinforcement, with another model's formulas in Pred FOL unless ``translator`` writes them; null takes
    ``data``."""
    held_out: DataOptions | None = None
    """Rows like those of correction_data on which both models are measured; null measures nothing."""
    translator: TranslatorOptions | None = None
    """Train a weak translator and correct its formulas; null takes those in Pred FOL."""
    perturbation: PerturbationOptions = PerturbationOptions()
    """Noise that the supervised corrections are made with."""
    per_row: int = 1
    """Perturbed formulas of every row."""
    ascii: bool = False
    """Write formulas in ASCII."""
    instruction: str | None = None
    """First line of the prompts of corrections; null takes the built-in one, an empty text leaves it out."""
    sft: dict[str, Any] = {}
    """Options of the supervised run (method sft): tuning, batch, steps or epochs, optimizers, encoding, ..."""
    rewards: list[RewardOptions] = [RewardOptions(name="fol_mixture")]
    """Reward of every generation."""
    rl: dict[str, Any] = {}
    """Options of the reinforcement (method fol_correction): advantage, kl, batch, sampling, max_generations, ..."""
    generations: list[int] = [1, 3, 5, 10]
    """After how many generations held-out formulas are measured."""
    sampling: dict[str, Any] = {"temperature": 0.1, "top_p": 0.75, "top_k": 40, "max_new_tokens": 256}
    """How corrections are drawn when they are measured."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse what no stage could use."""
        parts = {"sft": self.sft, "rl": self.rl, **({"translator.sft": self.translator.sft} if self.translator else {})}
        for node, tree in parts.items():
            taken = next((name for name in SET_BY_PIPELINE if name in tree), None)
            if taken is not None:
                raise ValueError(f"{node}.{taken}: is set by the pipeline; leave it out")
        if self.translator is not None and self.data.part is not None:
            raise ValueError("data.part: the translator takes a part of data itself; choose rows with data.limit")


@method("logicllama", options=LogicLLaMAOptions, modality="text", kind="pipeline", aliases=("logic_llama",),
        paper="Yang et al., 2023, arXiv 2305.15541")
def logicllama(options: LogicLLaMAOptions) -> Pipeline:
    """Learn to correct perturbed formulas step by step, then reinforce corrections of a translator's own mistakes."""
    model, rows = as_given(options.model), as_given(options.data)
    words = {"ascii": options.ascii, **({} if options.instruction is None else {"instruction": options.instruction})}
    stages: list[dict[str, Any]] = []
    loops = {"corrections": as_given(options.correction_data or options.data)}
    if options.held_out is not None:
        loops["held_out"] = as_given(options.held_out)
    if options.translator is not None:
        stages += _translator_stages(options.translator, model, rows, loops, ascii=options.ascii)
        loops = {name: {"path": f"${{stages.{name}_predictions.data}}", "columns": {"completion": "predicted"}}
                 for name in loops}
    stages += [{"name": name, "kind": "fol_tasks", "task": "loop", "data": data, **words} for name, data in loops.items()]
    stages += [
        {"name": "steps", "kind": "fol_tasks", "task": "steps", "data": rows, "per_row": options.per_row,
         "perturbation": as_given(options.perturbation), **words},
        {"name": "sft", "method": "sft", "model": model, "data": {"path": "${stages.steps.data}"}, **options.sft},
        {"name": "rl", "method": "fol_correction", "model": model_of_stage(model, "sft"),
         "data": {"path": "${stages.corrections.data}"}, "rewards": [as_given(reward) for reward in options.rewards],
         **options.rl},
    ]
    if options.held_out is not None:
        stages += [{"name": f"{name}_generations", "kind": "fol_generations", "model": model_of_stage(model, name),
                    "data": {"path": "${stages.held_out.data}"}, "sampling": options.sampling, "generations": options.generations}
                   for name in ("sft", "rl")]
    return Pipeline(stages, {"model": "rl.model", "folder": "rl.folder", "metrics": "rl.metrics"})


def _translator_stages(
    options: TranslatorOptions, model: dict[str, Any], rows: dict[str, Any], loops: dict[str, dict[str, Any]], *, ascii: bool,
) -> list[dict[str, Any]]:
    """Fine-tune a translator on its part of the rows, and let it translate all rows that are to be corrected."""
    task = {"kind": "fol_tasks", "task": "translation", "ascii": ascii}
    stages: list[dict[str, Any]] = [
        {"name": "translations", **task, "data": {**rows, "part": options.part}},
        {"name": "translator", "method": "sft", "model": model, "data": {"path": "${stages.translations.data}"}, **options.sft},
    ]
    for name, data in loops.items():
        stages += [
            {"name": f"{name}_sentences", **task, "data": data},
            {"name": f"{name}_predictions", "kind": "generate", "model": model_of_stage(model, "translator"),
             "data": {"path": f"${{stages.{name}_sentences.data}}"}, "sampling": options.sampling},
        ]
    return stages
