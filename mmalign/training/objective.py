"""What an update minimises: ``Term`` lists with global denominators, and the contract of an objective.

An objective never reduces: it returns terms, each with its own mask and reduction, and the loop divides every term by
the count over the whole optimiser update on all ranks, so the same rows give the same gradient however they are split.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from mmalign.core.logprobs import ActionScores
from mmalign.core.reduce import count
from mmalign.core.seeding import generator
from mmalign.core.supervised import SUPERVISED_LOSSES
from mmalign.data.rows import Rows
from mmalign.policies.base import Draw, Policy

Coupling = Literal["none", "group", "update"]


@dataclass
class Term:
    """One summand of the loss: ``weight * reduce(values, mask, how=reduction)`` over the whole update."""

    name: str
    """Key of its denominator in ``Objective.counts`` and of its weight in ``Controller.weights``."""
    values: Tensor
    """``[B]``, ``[Q]`` or ``[B, A]`` losses with a graph."""
    mask: Tensor
    """Which values count; shape of ``values``."""
    reduction: str
    """A name of :mod:`mmalign.core.reduce`."""
    weight: float = 1.0
    """Default weight, used unless a controller sets one."""
    norm_length: int | None = None
    """Constant length of ``seq_mean_token_sum_norm``."""


@dataclass(frozen=True)
class Mean:
    """A metric averaged over everything that contributed to it: ``total / count`` summed over micro-batches and ranks."""

    total: float
    count: float

    @staticmethod
    def of(values: Tensor, mask: Tensor | None = None) -> Mean:
        """Mean of ``values`` where ``mask`` (default: everywhere)."""
        values = values.detach().float()
        if mask is None:
            return Mean(float(values.sum()), values.numel())
        return Mean(float((values * mask).sum()), float(mask.sum()))


@dataclass(frozen=True)
class Maximum:
    """A metric that keeps its largest value over micro-batches and ranks."""

    value: float


Metrics: TypeAlias = "dict[str, Mean | Maximum]"


@dataclass
class UpdateBatch:
    """Rows of ONE optimiser update on this rank, by part; the usual part is "train"."""

    parts: dict[str, Rows]
    metrics: dict[str, float] = field(default_factory=dict)
    """What the experience measured while making it (rewards, lengths, dropped groups)."""
    index: dict[str, Tensor] = field(default_factory=dict)
    """In a micro-batch: positions of its rows in the whole update."""
    draws: dict[str, Draw] = field(default_factory=dict)
    """Shared randomness per part, drawn once for the whole update so that splitting cannot change it."""
    probed: frozenset[str] = frozenset()
    """Parts whose gradients a controller looks at and that nothing is learned from."""

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.parts.values())

    def learned(self) -> UpdateBatch:
        """The update without the parts that are only probed."""
        return replace(self, parts={name: rows for name, rows in self.parts.items() if name not in self.probed})

    def take(self, indices: Mapping[str, Tensor]) -> UpdateBatch:
        """The micro-batch of the given rows of each part."""
        return UpdateBatch(
            {name: rows.take(indices[name]) for name, rows in self.parts.items()}, {}, dict(indices),
            {name: draw.take(indices[name]) for name, draw in self.draws.items() if name in self.parts}, self.probed,
        )


@dataclass
class TrainState:
    """Where a run is: optimiser updates done, progress in [0, 1], and its named generators."""

    seed: int
    total_steps: int
    step: int = 0
    rank: int = 0
    world_size: int = 1
    generators: dict[str, torch.Generator] = field(default_factory=dict)

    @property
    def progress(self) -> float:
        """Share of the planned updates that is done."""
        return self.step / max(1, self.total_steps)

    def generator(self, purpose: str) -> torch.Generator:
        """The CPU generator of ``purpose`` on this rank; created from the run's seed on first use, checkpointed."""
        if purpose not in self.generators:
            self.generators[purpose] = generator(self.seed, "train", purpose, f"rank{self.rank}")
        return self.generators[purpose]

    def state_dict(self) -> dict[str, Any]:
        """Step and generator states."""
        return {"step": self.step, "generators": {name: g.get_state() for name, g in self.generators.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.step = int(state["step"])
        for name, value in state["generators"].items():
            self.generator(name).set_state(value)


def sum_over_ranks(values: Tensor) -> Tensor:
    """``values`` summed over all processes; themselves in a single one. Not differentiable."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        values = values.clone()
        torch.distributed.all_reduce(values)
    return values


class Objective(Protocol):
    """What to minimise over an update; see :class:`Supervised` for the shortest instance."""

    coupling: Coupling
    """Rows that one forward must hold together: none, a group, or the rank's whole update."""

    def modules(self) -> dict[str, nn.Module]:
        """Everything that is prepared, saved and resumed; "policy" is exported."""
        ...

    def replace_modules(self, modules: Mapping[str, nn.Module]) -> None:
        """Use the wrapped modules that accelerate returned."""
        ...

    def counts(self, update: UpdateBatch) -> dict[str, float]:
        """Denominator of every term, from masks alone, before any forward."""
        ...

    def prepare(self, update: UpdateBatch, state: TrainState) -> dict[str, Any]:
        """Statistics over the whole update without gradient; {} when none are needed."""
        ...

    def loss(self, micro: UpdateBatch, shared: dict[str, Any], state: TrainState) -> tuple[list[Term], Metrics]:
        """Terms (with a graph) and detached metrics of one micro-batch."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Running statistics of the objective."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        ...


class PolicyObjective:
    """Common ground of the built-in objectives: one policy, one part, no running state."""

    coupling: Coupling = "none"
    part = "train"
    policy: Policy

    def modules(self) -> dict[str, nn.Module]:
        """The policy's network."""
        return {"policy": self.policy.module}

    def replace_modules(self, modules: Mapping[str, nn.Module]) -> None:
        """Hand the wrapped network back to the policy."""
        self.policy.replace_module(modules["policy"])

    def prepare(self, update: UpdateBatch, state: TrainState) -> dict[str, Any]:
        """Draw what all scores of the update share."""
        return self.share_draw(update, self.sample_rows(update.parts[self.part]), state)

    def share_draw(self, update: UpdateBatch, rows: Rows, state: TrainState) -> dict[str, Any]:
        """Attach the update's draw (timesteps and noise) for ``rows``, one per row of the part."""
        draw = self.policy.draw(rows, state.generator("noise")) if len(rows) else None
        if draw is not None:
            update.draws[self.part] = draw
        return {}

    def sample_rows(self, rows: Rows) -> Rows:
        """The rows whose draw is shared: those of the plain sample."""
        return rows

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


@dataclass(frozen=True)
class LossTerm:
    """One entry of a ``losses:`` list, bound to its function's arguments."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    reduction: str = "token_mean"
    on: str | None = None
    """Field of the row the term reads (chosen, gold, ...); None = the plain sample."""


class Supervised(PolicyObjective):
    """Weighted supervised losses on the plain sample of each row: ``sum_k w_k reduce(loss_k(scores))``.

    With a text policy this is SFT; with a diffusion policy, whose score is the negative denoising error, it is
    denoising training. ``field`` reads another sample of the row (chosen, gold). ``neftune_noise_alpha`` adds uniform
    noise to a text policy's input embeddings (Jain et al., 2023, arXiv 2310.05914).
    """

    def __init__(
        self, policy: Policy, losses: Sequence[LossTerm] = (LossTerm("nll"),), *, field: str | None = None,
        neftune_noise_alpha: float | None = None,
    ) -> None:
        self.policy, self.losses, self.field = policy, list(losses), field
        self.neftune_noise_alpha = neftune_noise_alpha

    def sample_rows(self, rows: Rows) -> Rows:
        """The rows of the chosen field."""
        return rows.field(self.field) if self.field else rows

    def _noise(self, state: TrainState) -> AbstractContextManager[None]:
        if not self.neftune_noise_alpha:
            return nullcontext()
        noisy: AbstractContextManager[None] = self.policy.neftune(  # type: ignore[attr-defined]
            self.neftune_noise_alpha, state.generator("embedding_noise"))
        return noisy

    def counts(self, update: UpdateBatch) -> dict[str, float]:
        """Tokens or rows of the update, per term."""
        mask = self.policy.action_mask(self.sample_rows(update.parts[self.part]))
        return {term.name: count(mask, how=term.reduction) for term in self.losses}

    def loss(self, micro: UpdateBatch, shared: dict[str, Any], state: TrainState) -> tuple[list[Term], Metrics]:
        """Terms of one micro-batch."""
        rows = self.sample_rows(micro.parts[self.part])
        with self._noise(state):
            scores = self.policy.log_probs(rows, draw=micro.draws.get(self.part), want=supervised_wants(self.losses))
        terms = supervised_terms(self.losses, scores)
        metrics: Metrics = {"nll": Mean.of(-scores.logp, scores.mask)}
        if scores.correct is not None:
            metrics["token_accuracy"] = Mean.of(scores.correct, scores.mask)
        return terms, metrics


def supervised_wants(losses: Iterable[LossTerm]) -> tuple[str, ...]:
    """Extra score fields that the named supervised losses read."""
    wanted = {name for term in losses for name in getattr(SUPERVISED_LOSSES.get(term.name), "want", ())}
    return tuple(sorted(wanted))


def supervised_terms(losses: Iterable[LossTerm], scores: ActionScores) -> list[Term]:
    """The named supervised losses on ``scores`` as terms."""
    return [
        Term(term.name if term.on is None else f"{term.name}_{term.on}",
             SUPERVISED_LOSSES.get(term.name)(scores, **term.arguments), scores.mask, term.reduction, term.weight)
        for term in losses
    ]
