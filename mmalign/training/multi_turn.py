"""Rollouts of several turns: what a completion leads to is the next prompt, and every turn is a row with a reward of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mmalign.data.rows import Rows
from mmalign.errors import ConfigError
from mmalign.policies.base import Rollout
from mmalign.rewards.text import completion_text
from mmalign.training.experience import RolloutExperience

Follow = Callable[[Mapping[str, Any], str], Mapping[str, Any] | None]
"""``(row, completion) -> next row, or None``: the row holds a ``prompt`` and the same columns."""

TURN = "turn"
"""Column of the turn a row is from, counted from 0."""


def next_rows(
    policy: Any, rows: Sequence[Mapping[str, Any]], completions: Sequence[Any], follow: Follow, *, max_new_tokens: int,
) -> list[Mapping[str, Any] | None]:
    """What follows each completion; None where nothing does, or its prompt and a completion would not fit the model's window."""
    found: list[Mapping[str, Any] | None] = []
    for row, completion in zip(rows, completions, strict=True):
        following = follow(row, completion_text(completion))
        if following is not None and policy.window is not None:
            tokens = len(policy.encode_prompts([following["prompt"]])[0])
            following = following if tokens + max_new_tokens <= policy.window else None
        found.append(following)
    return found


class MultiTurnExperience(RolloutExperience):
    """:class:`RolloutExperience` whose prompts go on: up to ``max_turns`` rounds of samples, each a group with its own rewards.

    The first completion of a group decides what its next prompt is (with one completion per prompt, as PPO samples, there is
    no other), so that prompts come from the policy itself. Rounds of one rollout are trained on together.
    """

    def __init__(self, *arguments: Any, follow: Follow, max_turns: int, **named: Any) -> None:
        super().__init__(*arguments, **named)
        if max_turns < 1:
            raise ConfigError(f"max_turns must be at least 1, not {max_turns}")
        if self.dynamic is not None:
            raise ConfigError("dynamic_sampling: a rollout of several turns keeps all of them; leave it out")
        if self.settings.greedy_baseline:
            raise ConfigError("advantage.name: remax has no greedy sample of later turns; use gae, rloo or grpo")
        self.follow, self.max_turns = follow, max_turns
        self.figures: dict[str, float] = {}

    def _sample(self) -> Rollout:
        """All turns of the next prompts, with their rewards."""
        state, shape = self.state, self.shape
        chosen = self.sampler.take(shape.prompts_per_rollout)[state.rank :: shape.world_size]
        rows: list[Mapping[str, Any]] = [self.examples[i] for i in chosen]
        turns: list[Rollout] = []
        first, last = torch.zeros(len(rows)), torch.zeros(len(rows))
        alive = list(range(len(rows)))
        for turn in range(self.max_turns):
            rollout = self._scored(rows, shape.completions_per_prompt, self.settings.sampling, "sampling")
            rollout.columns[TURN] = [turn] * len(rollout)
            turns.append(rollout)
            lead = [int((rollout.group == group).nonzero()[0]) for group in range(len(rows))]
            last[alive] = self.rewards.total(rollout)[lead].cpu()
            first = last.clone() if turn == 0 else first
            if turn + 1 == self.max_turns:
                break
            following = next_rows(self.policy, rows, [rollout.samples[i] for i in lead], self.follow,
                                  max_new_tokens=self.settings.sampling.max_new_tokens)
            alive = [at for at, row in zip(alive, following, strict=True) if row is not None]
            rows = [row for row in following if row is not None]
            if not rows:
                break
        groups = sum(len(turn.group.unique()) for turn in turns)
        self.figures = {
            "turns/mean": groups / len(chosen), "turns/most": float(len(turns)),
            "reward/first_turn": float(first.nanmean()), "reward/last_turn": float(last.nanmean()),
        }
        return Rollout.concat(turns)

    def _rollout(self) -> tuple[list[Rows], dict[str, float]]:
        updates, metrics = super()._rollout()
        return updates, metrics | self.figures
