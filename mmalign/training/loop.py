"""The loop: for every update of an experience, minimise an objective. There is no other."""

from __future__ import annotations

import atexit
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmalign.config import Options
from mmalign.core.reduce import reduce
from mmalign.errors import CheckpointError, MmalignError
from mmalign.policies.base import Policy, Stateful
from mmalign.training.checkpoint import (
    atomic_folder,
    checkpoint_folders,
    load_state,
    prune,
    recover_folder,
    restore_weights,
    save_state,
    trainable_weights,
)
from mmalign.training.controller import Controller, FixedWeights, accumulate_gradients, fork_generators, probed_parameters
from mmalign.training.experience import BatchShape, Experience
from mmalign.training.objective import Objective, Term, TrainState, UpdateBatch
from mmalign.training.optimizers import OptimizerGroup, OptimizerOptions, build_optimizers
from mmalign.training.tracking import MetricLog, MetricSums, PhaseTimer, ProgressBar, TrackingOptions
from mmalign.training.tuning.base import FullTuning, Tuning

Precision = Literal["auto", "float32", "bfloat16", "float16"]


class CheckpointOptions(Options):
    """When the run is saved, and how many saves are kept."""

    every: int = 0
    """Updates between checkpoints; 0 saves at the end only."""
    keep: int = 2
    """Newest checkpoints kept; 0 keeps all."""
    model_format: bool = True
    """Also write the model in its Hugging Face format inside every checkpoint."""


class LoopOptions(Options):
    """How long and how the loop runs."""

    steps: int = 100
    """Optimiser updates."""
    precision: Precision = "auto"
    """Autocast of the forward: auto is bfloat16 on CUDA and float32 on CPU."""
    checkpoint: CheckpointOptions = CheckpointOptions()
    """Saving."""
    tracking: TrackingOptions = TrackingOptions()
    """Logging."""


@dataclass
class LoopResult:
    """What a finished loop tells its stage."""

    step: int
    metrics: dict[str, float]
    seconds: dict[str, float]
    resumed_from: int = 0


def leave_process_group() -> None:
    """Destroy the group of processes, if there is one: at exit, since the stages of a run share it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def make_accelerator(options: LoopOptions, folder: Path) -> Any:
    """An ``accelerate.Accelerator`` for this loop; a later loop of the same process may use another precision."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import ProjectConfiguration

    precision = options.precision
    if precision == "auto":
        precision = "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"
    AcceleratorState._reset_state()
    atexit.unregister(leave_process_group)
    atexit.register(leave_process_group)
    names = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
    # Without an accelerator, accelerate joins a launched group of processes only when told that CPUs are meant.
    return Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=names[precision], log_with=list(options.tracking.trackers) or None,
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "trackers")),
    )


@dataclass
class Hooks:
    """Callables ``(state)`` run by the loop, and further participants of its checkpoints."""

    after_update: list[Callable[[TrainState], None]] = field(default_factory=list)
    participants: dict[str, Stateful] = field(default_factory=dict)


class Loop:
    """Accumulate, clip, step, log, save: the same for every objective, experience, tuning mode and controller."""

    def __init__(
        self, objective: Objective, experience: Experience, policy: Policy, shape: BatchShape, state: TrainState, *,
        options: LoopOptions, optimizers: Sequence[OptimizerOptions], folder: Path, accelerator: Any,
        tuning: Tuning | None = None, controller: Controller | None = None, timer: PhaseTimer | None = None,
        hooks: Hooks | None = None, fingerprint: str = "", description: str = "train",
    ) -> None:
        self.objective, self.experience, self.policy, self.shape, self.state = objective, experience, policy, shape, state
        self.options, self.folder, self.accelerator = options, folder, accelerator
        self.tuning, self.controller = tuning or FullTuning(), controller or FixedWeights()
        self.timer, self.hooks = timer or PhaseTimer(), hooks or Hooks()
        self.fingerprint, self.description = fingerprint, description
        self.groups: list[OptimizerGroup] = build_optimizers(objective.modules(), optimizers, total_steps=state.total_steps)
        self.last: dict[str, float] = {}
        self._prepare_modules()

    def _prepare_modules(self) -> None:
        modules = self.objective.modules()
        # Participants are named by the bare modules; accelerate's wrappers change parameter names.
        self.bare: dict[str, nn.Module] = dict(modules)
        self.wrapped: dict[str, nn.Module] = {
            name: self.accelerator.prepare(module) if any(p.requires_grad for p in module.parameters()) else module
            for name, module in modules.items()
        }
        for group in self.groups:
            group.optimizer = self.accelerator.prepare(group.optimizer)
        self.objective.replace_modules(self.wrapped)

    # -- running ---------------------------------------------------------------------------------------------------

    def run(self) -> LoopResult:
        """Train from the newest checkpoint (or the start) to the last step."""
        resumed = self.resume()
        if not resumed:
            self._seed_global_generators()
        metrics_path = self.folder / "metrics.jsonl"
        log = MetricLog(metrics_path, resume_step=resumed) if self.accelerator.is_main_process else None
        if self.options.tracking.trackers:
            self.accelerator.init_trackers(self.options.tracking.project)
        totals: dict[str, float] = {}
        with ProgressBar(self.description, self.state.total_steps, done=resumed, quiet=self._quiet()) as bar:
            try:
                for record in self._updates():
                    for name, value in record.items():
                        if name.startswith("seconds/"):
                            totals[name[8:]] = totals.get(name[8:], 0.0) + value
                    self._report(record, log, bar)
                    if self._save_due():
                        self.save()
            finally:
                if log is not None:
                    log.close()
        for tracker in self.accelerator.trackers:  # not end_training: a later stage needs the process group
            tracker.finish()
        return LoopResult(self.state.step, self.last, totals, resumed)

    def _quiet(self) -> bool:
        return self.options.tracking.quiet or not self.accelerator.is_main_process

    def _seed_global_generators(self) -> None:
        # Dropout inside models reads the global generator; everything of ours has its own.
        torch.manual_seed(self.state.seed + self.state.rank)

    def _updates(self) -> Iterator[dict[str, float]]:
        stream = iter(self.experience)
        while self.state.step < self.state.total_steps:
            started = time.perf_counter()
            with self.timer.phase("data"):
                update = next(stream)
            with self.timer.phase("update"):
                record = self.update(update)
            for hook in self.hooks.after_update:
                hook(self.state)
            seconds = time.perf_counter() - started
            record |= {f"seconds/{name}": value for name, value in self.timer.take().items()}
            record |= {"seconds": seconds, "examples_per_second": self.shape.examples_per_update / seconds}
            self.last = record
            yield record

    def update(self, update: UpdateBatch) -> dict[str, float]:
        """One optimiser update; returns its metrics."""
        state, objective = self.state, self.objective
        shared = objective.prepare(update, state)
        denominators = self._sum_over_ranks(objective.counts(update))
        self._control(update, shared, denominators)
        micros = self._split(update.learned())
        weights = self.controller.weights(state)
        sums = MetricSums()
        for position, micro in enumerate(micros):
            with self._synchronised(position == len(micros) - 1):
                terms, metrics = objective.loss(micro, shared, state)
                loss = self._weighted(terms, weights, denominators, sums)
                # accelerate and DDP average gradients over ranks; ours are parts of one global sum.
                self.accelerator.backward(loss * self.shape.world_size)
            sums.add(metrics)
            self.tuning.after_micro_backward(self.policy, state)
        record = update.metrics | self.controller.metrics(state)
        record |= self._penalty()
        self.tuning.before_step(self.policy, state)
        record |= self._step()
        state.step += 1
        self.tuning.after_update(self.policy, state)
        record |= sums.values(self._gather(sums))
        return record

    def _weighted(
        self, terms: Sequence[Term], weights: Mapping[str, float], denominators: Mapping[str, float], sums: MetricSums,
    ) -> Tensor:
        total: Tensor | None = None
        for term in terms:
            value = reduce(
                term.values, term.mask, how=term.reduction, denominator=denominators[term.name], norm_length=term.norm_length,
            )
            part = weights.get(term.name, term.weight) * value
            total = part if total is None else total + part
            name = f"loss/{term.name}"
            # Parts of one global mean: they add up over micro-batches and ranks instead of averaging.
            before = sums.means.get(name, (0.0, 1.0))[0]
            sums.means[name] = (before + float(value.detach()), 1.0 / self.shape.world_size)
        if total is None:
            raise MmalignError("the objective returned no terms for a micro-batch")
        before = sums.means.get("loss", (0.0, 1.0))[0]
        sums.means["loss"] = (before + float(total.detach()), 1.0 / self.shape.world_size)
        return total

    def _penalty(self) -> dict[str, float]:
        term = self.tuning.penalty(self.policy)
        if term is None:
            return {}
        value = reduce(term.values, term.mask, how=term.reduction)
        self.accelerator.backward(term.weight * value)
        return {f"loss/{term.name}": float(value.detach())}

    def _split(self, update: UpdateBatch) -> list[UpdateBatch]:
        """Micro-batches of at most ``examples_per_forward`` rows per part, as many on every rank."""
        coupling = self.objective.coupling
        sizes = {name: len(rows) for name, rows in update.parts.items()}
        if coupling == "update":
            count = 1
        else:
            count = max(1, max(math.ceil(size / self.shape.examples_per_forward) for size in sizes.values()))
        count = int(self._max_over_ranks(count))
        pieces = {
            name: _whole_groups(rows, count) if coupling == "group" and "group" in rows
            else list(torch.arange(len(rows)).tensor_split(count))
            for name, rows in update.parts.items()
        }
        return [update.take({name: parts[i] for name, parts in pieces.items()}) for i in range(count)]

    def _control(self, update: UpdateBatch, shared: dict[str, Any], denominators: Mapping[str, float]) -> None:
        """Show the controller the update's metrics and the gradients that it asks for."""
        names = self.controller.probe(self.state)
        gradients: dict[str, list[Tensor]] = {}
        if names:
            parameters = probed_parameters(self.bare, self.controller.match)
            # Looking must not move the dropout masks of the update that follows.
            with fork_generators(self.accelerator.device), self._synchronised(last=False):
                for micro in self._split(update):
                    terms, _ = self.objective.loss(micro, shared, self.state)
                    for term in terms:
                        if term.name in names:
                            value = reduce(term.values, term.mask, how=term.reduction,
                                           denominator=denominators[term.name], norm_length=term.norm_length)
                            gradients[term.name] = accumulate_gradients(value, parameters, gradients.get(term.name))
            gradients = {name: [self.accelerator.reduce(g, "sum") for g in grads] for name, grads in gradients.items()}
        self.controller.update({**self.last, **update.metrics}, gradients, self.state)

    def _step(self) -> dict[str, float]:
        record: dict[str, float] = {}
        for group in self.groups:
            option = group.options
            if (self.state.step + 1) % option.every:
                continue
            label = "" if len(self.groups) == 1 else f"/{option.name}"
            limit = option.max_grad_norm if option.max_grad_norm is not None else math.inf
            norm = float(self.accelerator.clip_grad_norm_(list(group.parameters.values()), limit))
            if not math.isfinite(norm) and self.accelerator.scaler is None:
                raise MmalignError(
                    f"the gradient norm is {norm} at update {self.state.step + 1}; the model was left as it was. "
                    f"Look at {self.folder / 'metrics.jsonl'}; lower optimizers.{option.name}.lr or check the data"
                )
            record |= {f"grad_norm{label}": norm, f"lr{label}": float(group.schedule.get_last_lr()[0])}
            group.optimizer.step()
            group.schedule.step()
            group.optimizer.zero_grad(set_to_none=True)
        return record

    # -- ranks -----------------------------------------------------------------------------------------------------

    def _synchronised(self, last: bool) -> Any:
        from contextlib import ExitStack

        stack = ExitStack()
        if not last:
            for module in self.wrapped.values():
                stack.enter_context(self.accelerator.no_sync(module))
        return stack

    def _sum_over_ranks(self, counts: Mapping[str, float]) -> dict[str, float]:
        if self.shape.world_size == 1 or not counts:
            return dict(counts)
        stacked = torch.tensor(list(counts.values()), dtype=torch.float64, device=self.accelerator.device)
        return dict(zip(counts, self.accelerator.reduce(stacked, "sum").tolist(), strict=True))

    def _max_over_ranks(self, value: float) -> float:
        if self.shape.world_size == 1:
            return value
        return float(self.accelerator.gather(torch.tensor([value], device=self.accelerator.device)).max())

    def _gather(self, sums: MetricSums) -> list[MetricSums]:
        if self.shape.world_size == 1:
            return [sums]
        from accelerate.utils import gather_object

        return list(gather_object([sums]))

    # -- saving ----------------------------------------------------------------------------------------------------

    def _report(self, record: Mapping[str, float], log: MetricLog | None, bar: ProgressBar) -> None:
        step = self.state.step
        due = step % self.options.tracking.log_every == 0 or step == self.state.total_steps
        if log is not None and due:
            log.write({"step": step, **record})
        if self.options.tracking.trackers and due:
            self.accelerator.log({k: v for k, v in record.items() if isinstance(v, (int, float))}, step=step)
        live = {name: record[name] for name in ("loss", "reward", "accuracy", "examples_per_second") if name in record}
        bar.update(step, live)

    def _save_due(self) -> bool:
        every = self.options.checkpoint.every
        return self.state.step == self.state.total_steps or (every > 0 and self.state.step % every == 0)

    def participants(self) -> dict[str, Stateful]:
        """Everything but the weights that a checkpoint holds."""
        return {
            "state": self.state, "objective": self.objective, "experience": self.experience,
            "controller": self.controller, "tuning": self.tuning,
            **{f"optimizer.{group.options.name}": group for group in self.groups}, **self.hooks.participants,
        }

    def save(self) -> Path:
        """Write a checkpoint of this update; every rank adds its own experience and generators."""
        root = self.folder / "checkpoints"
        target = root / f"step-{self.state.step}"
        with self.timer.phase("checkpoint"):
            own = {"state": self.state.state_dict(), "experience": self.experience.state_dict(), "global": _global_state()}
            shared = {n: p.state_dict() for n, p in self.participants().items() if n not in own}
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                with atomic_folder(target) as folder:
                    if self.options.checkpoint.model_format:
                        self.policy.save_pretrained(folder / "model")
                    for name, module in self.bare.items():
                        held = folder / "model" if name == "policy" and self.options.checkpoint.model_format else None
                        shared[f"weights.{name}"] = trainable_weights(module, stored_in=held)
                    save_state(folder, shared)
                    save_state(folder, own, name="rank0")
                    (folder / "run.json").write_text(json.dumps(
                        {"step": self.state.step, "world_size": self.shape.world_size, "fingerprint": self.fingerprint}))
                prune(root, self.options.checkpoint.keep)
            self.accelerator.wait_for_everyone()
            if not self.accelerator.is_main_process:
                save_state(target, own, name=f"rank{self.state.rank}")
            self.accelerator.wait_for_everyone()
        return target

    def resume(self) -> int:
        """Load the newest checkpoint of this run's folder, if any; returns its step."""
        root = self.folder / "checkpoints"
        if root.is_dir():
            for leftover in root.glob(".step-*.replaced"):
                recover_folder(root / leftover.name.removeprefix(".").removesuffix(".replaced"))
        folders = checkpoint_folders(root)
        if not folders:
            return 0
        newest = folders[-1]
        try:
            run = json.loads((newest / "run.json").read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise CheckpointError(f"checkpoint {newest} has no readable run.json ({error}); delete it to resume from the "
                                  "one before") from None
        if run["fingerprint"] != self.fingerprint:
            raise CheckpointError(f"checkpoint {newest} was made with another configuration (model, data, method or seed "
                                  "changed); choose a new run_dir or delete the old checkpoints")
        if run["world_size"] != self.shape.world_size:
            raise CheckpointError(f"checkpoint {newest} was made by {run['world_size']} processes, this run has "
                                  f"{self.shape.world_size}; resume with the same number")
        shared, own = load_state(newest), load_state(newest, name=f"rank{self.state.rank}")
        for name, module in self.bare.items():
            restore_weights(module, shared[f"weights.{name}"], source=str(newest),
                            folder=newest / "model" if name == "policy" else None)
        for name, participant in self.participants().items():
            participant.load_state_dict(own[name] if name in own else shared[name])
        _restore_global_state(own["global"])
        return self.state.step


def _whole_groups(rows: Any, count: int) -> list[Tensor]:
    """``count`` index sets that keep the rows of a group together, about equally many groups each."""
    group = torch.as_tensor(rows["group"])
    ids = list(dict.fromkeys(group.tolist()))
    nothing = torch.empty(0, dtype=torch.long)
    return [
        torch.cat([nothing, *((group == ids[i]).nonzero().flatten() for i in part.tolist())])
        for part in torch.arange(len(ids)).tensor_split(count)
    ]


def _global_state() -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": [version, list(internal), gauss]}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_global_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
