"""What every training method shares: load, tune, build, loop, save."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mmalign.config import Component, bind
from mmalign.core.registry import Registry
from mmalign.data.chat import TextEncoding
from mmalign.data.columns import PreparationReport
from mmalign.data.loading import DataOptions, load_rows
from mmalign.errors import ConfigError, DataError
from mmalign.methods.registry import Method
from mmalign.policies.base import Policy
from mmalign.policies.loading import ModelOptions, base_of_adapter, load_policy, model_kind, resolve_model_path
from mmalign.policies.provenance import read_provenance, write_provenance
from mmalign.policies.reference import Reference
from mmalign.rewards.base import RewardOptions, RewardSet, build_rewards
from mmalign.training.checkpoint import atomic_folder, write_json
from mmalign.training.controller import Controller
from mmalign.training.ema import ExponentialAverage
from mmalign.training.evaluation import EvaluationOptions, evaluate_policy, save_samples
from mmalign.training.experience import BatchShape, Experience, resolve_batch
from mmalign.training.loop import Hooks, Loop, LoopOptions, LoopResult, make_accelerator
from mmalign.training.objective import LossTerm, Objective, TrainState
from mmalign.training.options import TrainOptions
from mmalign.training.tracking import PhaseTimer
from mmalign.training.tuning.base import Tuning, make_tuning, trainable_report


@dataclass
class TrainingParts:
    """What a method's builder returns: the composition that the loop runs."""

    policy: Policy
    objective: Objective
    experience: Experience
    rows: int
    """Rows (or prompts) of one epoch."""
    reference: Reference | None = None
    controller: Controller | None = None
    evaluation: tuple[EvaluationOptions, RewardSet, Any] | None = None
    """Held-out evaluation: options, rewards, sampling options."""
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass
class BuildContext:
    """What a builder may use: the stage's folder and seed, and the shared services of the run."""

    folder: Path
    seed: int
    config_folder: Path
    accelerator: Any
    state: TrainState
    shape: BatchShape
    tuning: Tuning
    timer: PhaseTimer = field(default_factory=PhaseTimer)
    console: Console = field(default_factory=lambda: Console(stderr=True))
    quiet: bool = False
    base_hash: str = ""
    """Identity of the last policy loaded, before the tuning mode changed it."""

    def policy(
        self, options: ModelOptions, *, encoding: TextEncoding | None = None, load: Callable[..., Policy] = load_policy,
        **settings: Any,
    ) -> Policy:
        """Load a policy (with ``load``) on the accelerator's device and apply the tuning mode."""
        if options.device is None:
            options = options.model_copy(update={"device": str(self.accelerator.device)})
        policy = load(options, encoding=encoding, **settings)
        self.base_hash = policy.identity()
        self.tuning.apply(policy, seed=self.seed)
        report = trainable_report(policy.module)
        self.say(f"model {options.path}: {report['all'] / 1e6:.2f} M parameters, {report['trainable'] / 1e6:.3f} M trainable, "
                 f"{options.dtype} on {options.device}")
        return policy

    def rows(self, options: DataOptions, *, key: str = "data") -> Sequence[Mapping[str, Any]]:
        """Load data rows."""
        rows: Sequence[Mapping[str, Any]] = load_rows(options, seed=self.seed, key=key)
        return rows

    def prepared(self, policy: Policy, options: DataOptions, *, fields: tuple[str, ...] = ()) -> Sequence[Mapping[str, Any]]:
        """Load and prepare data rows, and say what was dropped."""
        return self.prepare(policy, self.rows(options), fields=fields)

    def prepare(
        self, policy: Policy, rows: Sequence[Mapping[str, Any]], *, fields: tuple[str, ...] = (),
    ) -> Sequence[Mapping[str, Any]]:
        """Prepare rows that are loaded already, and say what was dropped."""
        examples, report = policy.prepare_dataset(rows, fields=fields)
        self.say(describe(report))
        return examples

    def rewards(self, options: Sequence[RewardOptions], *, on_error: str = "stop") -> RewardSet:
        """Build the reward functions of a configuration list."""
        return build_rewards(options, config_folder=self.config_folder, on_error=on_error, dump_dir=self.folder / "rewards")

    def say(self, text: str) -> None:
        """Print one line on the main process."""
        if not self.quiet and self.accelerator.is_main_process:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def describe(report: PreparationReport) -> str:
    """One sentence on what became of a data set."""
    parts = [f"data: {report.kept} of {report.rows} rows"]
    parts += [f"{count} dropped ({reason})" for reason, count in report.dropped.items()]
    if report.truncated:
        parts.append(f"{report.truncated} truncated ({100 * report.truncated / max(1, report.rows):.1f}%)")
    return ", ".join(parts) + (f"\n  first row: {report.example}" if report.example else "")


class LossOptions(Component):
    """One entry of ``losses:``: a registered loss with its arguments."""

    weight: float = 1.0
    """Weight of this term."""
    reduction: str | None = None
    """Supervised terms: how token losses become one number; null takes token_mean."""
    on: str | None = None
    """Supervised terms: the sample of a row they read (chosen, gold, ...); null is the plain one, or chosen."""


def loss_terms(
    options: Sequence[LossOptions], tables: Sequence[Registry[Any]], *, key: str = "losses", reduction: str = "token_mean",
) -> list[LossTerm]:
    """Check a ``losses:`` list against the loss tables; raises ConfigError naming the entry."""
    terms = []
    for index, option in enumerate(options):
        where = f"{key}[{index}]"
        table = next((table for table in tables if option.name in table), None)
        if table is None:
            try:
                tables[0].get(option.name)
            except ValueError as error:
                raise ConfigError(f"{where}.name: {error}") from None
        assert table is not None
        row = table.get(option.name)
        function = getattr(row, "function", row)
        reserved = set(getattr(row, "inputs", ()))
        terms.append(LossTerm(
            table.canonical(option.name), bind(option, function, key=where, ignore=reserved), option.weight,
            option.reduction or reduction, option.on,
        ))
    return terms


@dataclass
class PreparedTraining:
    """A method built for a run: everything loaded, checked and wired, nothing trained yet."""

    loop: Loop
    parts: TrainingParts
    context: BuildContext


def prepare_training(
    method: Method, options: TrainOptions, *, folder: Path, seed: int, config_folder: Path, fingerprint: str,
    quiet: bool = False, name: str | None = None,
) -> PreparedTraining:
    """Load the model and data, apply the tuning mode and build the loop of a method."""
    loop_options = LoopOptions(precision=options.precision, checkpoint=options.checkpoint,
                               tracking=options.tracking.model_copy(update={"quiet": options.tracking.quiet or quiet}))
    accelerator = make_accelerator(loop_options, folder)
    shape = resolve_batch(options.batch, world_size=accelerator.num_processes, rollout=method.rollout)
    state = TrainState(seed=seed, total_steps=1, rank=accelerator.process_index, world_size=accelerator.num_processes)
    context = BuildContext(folder, seed, config_folder, accelerator, state, shape, make_tuning(options.tuning), quiet=quiet)
    _show_batch(shape, context)
    parts: TrainingParts = method.build(options, context)
    state.total_steps = total_steps(options, parts.rows, shape, rollout=method.rollout)
    loop = Loop(
        parts.objective, parts.experience, parts.policy, shape, state, options=loop_options, optimizers=options.optimizers,
        folder=folder, accelerator=accelerator, tuning=context.tuning, controller=parts.controller, timer=context.timer,
        hooks=_hooks(options, parts, context), fingerprint=fingerprint, description=name or method.name,
    )
    return PreparedTraining(loop, parts, context)


def run_training(
    method: Method, options: TrainOptions, *, folder: Path, seed: int, config_folder: Path, fingerprint: str,
    quiet: bool = False, name: str | None = None,
) -> tuple[LoopResult, dict[str, str]]:
    """Build a method's parts, run the loop, save the model; returns the result and the output paths."""
    prepared = prepare_training(method, options, folder=folder, seed=seed, config_folder=config_folder,
                                fingerprint=fingerprint, quiet=quiet, name=name)
    result = prepared.loop.run()
    accelerator, policy = prepared.context.accelerator, prepared.parts.policy
    outputs = {"model": str(folder / "model"), "metrics": str(folder / "metrics.jsonl"), "folder": str(folder)}
    if accelerator.is_main_process:
        average = prepared.loop.hooks.participants.get("ema")
        if isinstance(average, ExponentialAverage):
            average.copy_to_module()
        with atomic_folder(folder / "model") as model:
            policy.save_pretrained(model)
            write_provenance(model, **_provenance(method, options, prepared))
    accelerator.wait_for_everyone()
    return result, outputs


def total_steps(options: TrainOptions, rows: int, shape: BatchShape, *, rollout: bool) -> int:
    """Optimiser updates from ``steps`` or ``epochs``."""
    if options.epochs is None:
        return options.steps or 100
    if rollout:
        return max(1, math.ceil(options.epochs * rows / shape.prompts_per_rollout) * shape.updates_per_rollout)
    return max(1, math.ceil(options.epochs * rows / shape.examples_per_update))


def _provenance(method: Method, options: TrainOptions, prepared: PreparedTraining) -> dict[str, Any]:
    return {
        **_base(options.model, prepared.context.base_hash), "modality": prepared.parts.policy.modality, "method": method.name,
        **prepared.parts.provenance,
    }


def _base(options: ModelOptions, identity: str) -> dict[str, Any]:
    """What a trained model or adapter stands on: the loaded model, or the base of the adapter that it was loaded with."""
    path = resolve_model_path(options.path)
    if not Path(path).is_dir() or not model_kind(path).endswith("_adapter"):
        return {"base_model": options.path, "base_path": path if Path(path).is_dir() else None, "base_hash": identity}
    known = read_provenance(Path(path)) or {}
    base = base_of_adapter(Path(path))
    return {"base_model": known.get("base_model") or base, "base_path": base if Path(base).is_dir() else None,
            "base_hash": known.get("base_hash"), "started_from": options.path}


def _show_batch(shape: BatchShape, context: BuildContext) -> None:
    if context.quiet or not context.accelerator.is_main_process:
        return
    table = Table("batch", "rows", show_edge=False)
    for label, value in shape.table():
        table.add_row(label, str(value))
    context.console.print(table)


def _hooks(options: TrainOptions, parts: TrainingParts, context: BuildContext) -> Hooks:
    hooks = Hooks()
    if parts.reference is not None:
        reference = parts.reference
        hooks.participants["reference"] = reference
        hooks.after_update.append(lambda state: reference.after_update(state.step))
    if options.ema is not None:
        average = ExponentialAverage(parts.policy.module, options.ema)
        hooks.participants["ema"] = average
        hooks.after_update.append(average.after_update)
    if parts.evaluation is not None:
        hooks.after_update.append(_evaluation_hook(parts, context))
    return hooks


def _evaluation_hook(parts: TrainingParts, context: BuildContext) -> Callable[[TrainState], None]:
    assert parts.evaluation is not None
    options, rewards, sampling = parts.evaluation
    examples = context.rows(options.data, key="evaluation.data")
    rewards.check_rows(examples)
    if options.by is not None and any(example.get(options.by) in (None, "") for example in examples):
        raise DataError(f"evaluation.by: some rows have no {options.by!r}; columns are {', '.join(examples[0])}")
    if options.greedy and hasattr(sampling, "top_k"):
        sampling = sampling.model_copy(update={"temperature": 0.0})

    def evaluate(state: TrainState) -> None:
        last = state.step == state.total_steps
        if not (last or (options.every and state.step % options.every == 0)) or not context.accelerator.is_main_process:
            return
        with context.timer.phase("evaluation"):
            evaluation = evaluate_policy(parts.policy, examples, rewards, sampling, seed=context.seed,
                                         completions_per_prompt=options.completions_per_prompt, by=options.by)
        folder = context.folder / "samples" / f"step-{state.step}"
        save_samples(evaluation, folder)
        write_json(folder / "metrics.json", evaluation.metrics)
        context.say("  ".join(f"{name} {value:.4g}" for name, value in evaluation.metrics.items()))

    return evaluate
