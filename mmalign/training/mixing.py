"""Several losses on several kinds of rows in one update: ``mu L_SFT + (1 - mu) L_RL``, with mu decided by a controller.

:class:`MixedExperience` draws the parts of an update (demonstrations, rollouts, validation rollouts), :class:`Mixture`
turns every part into terms, and a :class:`~mmalign.training.mixing_control.MixingController` weighs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.data.rows import Rows
from mmalign.errors import ConfigError
from mmalign.policies.base import Policy
from mmalign.training.experience import Experience
from mmalign.training.objective import Coupling, Metrics, Objective, Term, TrainState, UpdateBatch, sum_over_ranks

MAIN = "train"
"""The part whose terms keep their own names; those of other parts are prefixed (``sft_nll``, ``validation_policy``)."""

VALIDATION = "validation"
"""The part that is read by the controller alone: it has gradients that are looked at and never followed."""

ENTROPY = "entropy"
"""Metric of an update: mean entropy of the present policy at the tokens of its own rollouts."""


class MixedExperience:
    """Updates with the parts that are wanted at the time, each from an experience of its own.

    Args:
        sources: part name -> where its rows come from.
        wanted: the parts of the next update, asked for right before it is drawn; a source that is not asked does nothing,
            so that a weight of 0 costs nothing.
    """

    def __init__(self, sources: Mapping[str, Experience], wanted: Callable[[], Sequence[str]]) -> None:
        self.sources, self.wanted = dict(sources), wanted

    def __iter__(self) -> Iterator[UpdateBatch]:
        """Endless updates."""
        streams = {name: iter(source) for name, source in self.sources.items()}
        while True:
            parts: dict[str, Rows] = {}
            metrics: dict[str, float] = {}
            for name in self.wanted():
                update = next(streams[name])
                parts[name] = next(iter(update.parts.values()))
                prefix = "" if name == MAIN else f"{name}/"
                metrics |= {f"{prefix}{key}": value for key, value in update.metrics.items()}
            yield UpdateBatch(parts, metrics, probed=frozenset({VALIDATION} & parts.keys()))

    def state_dict(self) -> dict[str, Any]:
        """State of every source."""
        return {name: source.state_dict() for name, source in self.sources.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        for name, source in self.sources.items():
            source.load_state_dict(state[name])


class SideExperience:
    """An experience with generators of its own, so that drawing from it changes nothing of the run beside it.

    Args:
        build: makes the experience around the given state.
        state: the run's state; the side state has its rank and step, and seeds of its own.
        seed: seed of the side state.
    """

    def __init__(self, build: Callable[[TrainState], Experience], state: TrainState, *, seed: int) -> None:
        self.run = state
        self.own = TrainState(seed=seed, total_steps=state.total_steps, rank=state.rank, world_size=state.world_size)
        self.inner = build(self.own)

    def __iter__(self) -> Iterator[UpdateBatch]:
        """Updates of the inner experience."""
        stream = iter(self.inner)
        while True:
            self.own.step = self.run.step
            yield next(stream)

    def state_dict(self) -> dict[str, Any]:
        """The experience and its generators."""
        return {"inner": self.inner.state_dict(), "state": self.own.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.inner.load_state_dict(state["inner"])
        self.own.load_state_dict(state["state"])


class Mixture:
    """Terms of every part that an update has, each part with an objective of its own on one shared policy.

    Args:
        members: part -> objective that reads it. The member of the part "train" owns the modules.
        entropy_wanted: whether the present update's entropy is needed (one pass over its rollouts without a gradient).
        temperature: temperature of that entropy, the rollouts' own.
        rows_per_forward: rows of a pass.
    """

    def __init__(
        self, members: Mapping[str, Objective], *, entropy_wanted: Callable[[TrainState], bool] = lambda state: False,
        temperature: float = 1.0, rows_per_forward: int = 8,
    ) -> None:
        self.members, self.entropy_wanted = dict(members), entropy_wanted
        self.temperature, self.rows_per_forward = temperature, rows_per_forward
        groups = any(member.coupling == "group" for member in self.members.values())
        if any(member.coupling == "update" for member in self.members.values()):
            raise ConfigError("a loss that couples all rows of an update cannot be mixed with others: its rows would be split")
        self.coupling: Coupling = "group" if groups else "none"

    @property
    def policy(self) -> Policy:
        """The policy that all members share."""
        return self.members[MAIN].policy  # type: ignore[attr-defined]

    def modules(self) -> dict[str, nn.Module]:
        """Those of the main member: the policy, and a value function where there is one."""
        return self.members[MAIN].modules()

    def replace_modules(self, modules: Mapping[str, nn.Module]) -> None:
        """Hand the wrapped networks back; members share them through the policy."""
        self.members[MAIN].replace_modules(modules)

    def present(self, update: UpdateBatch) -> list[str]:
        """Parts of ``update`` in the order of the members."""
        return [name for name in self.members if name in update.parts]

    def counts(self, update: UpdateBatch) -> dict[str, float]:
        """Denominators of all terms of the parts that are there."""
        return {
            term_name(part, name): value for part in self.present(update)
            for name, value in self.members[part].counts(update).items()
        }

    def prepare(self, update: UpdateBatch, state: TrainState) -> dict[str, Any]:
        """Shared statistics of every member; adds the metric ``entropy`` to the update where it is wanted."""
        if MAIN in update.parts and self.entropy_wanted(state):
            update.metrics[ENTROPY] = self.entropy(update.parts[MAIN])
        return {part: self.members[part].prepare(update, state) for part in self.present(update)}

    @torch.no_grad()
    def entropy(self, rows: Rows) -> float:
        """Mean over the tokens of ``rows`` on all processes of the policy's entropy there, in nats."""
        total: Tensor | None = None
        for start in range(0, len(rows), self.rows_per_forward):
            chunk = rows.take(range(start, min(len(rows), start + self.rows_per_forward)))
            scores = self.policy.log_probs(chunk, temperature=self.temperature, want=("entropy",))
            if scores.entropy is None:
                raise ConfigError("controller: this policy gives no entropies; use a controller that needs none (fixed, "
                                  "schedule, or meta with entropy_lr: 0)")
            part = torch.stack([(scores.entropy.double() * scores.mask).sum(), scores.mask.sum().double()])
            total = part if total is None else total + part
        assert total is not None
        summed = sum_over_ranks(total)
        return float(summed[0]) / max(float(summed[1]), 1.0)

    def loss(self, micro: UpdateBatch, shared: dict[str, Any], state: TrainState) -> tuple[list[Term], Metrics]:
        """Terms of every part that has rows in this micro-batch."""
        terms: list[Term] = []
        metrics: Metrics = {}
        for part in self.present(micro):
            if not len(micro.parts[part]):
                continue
            made, measured = self.members[part].loss(micro, shared[part], state)
            terms += [replace(term, name=term_name(part, term.name)) for term in made]
            metrics |= measured
        return terms, metrics

    def state_dict(self) -> dict[str, Any]:
        """State of the members."""
        return {part: member.state_dict() for part, member in self.members.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        for part, member in self.members.items():
            member.load_state_dict(state[part])


def term_name(part: str, name: str) -> str:
    """Name of a part's term in the mixture."""
    return name if part == MAIN else f"{part}_{name}"
