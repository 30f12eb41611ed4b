"""A policy that is a table of logits over short sequences: it samples, is rewarded and imitates in microseconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from toys import BanditPolicy, make_loop

from mmalign.core.advantages import group_advantages
from mmalign.core.logprobs import ActionScores
from mmalign.data.rows import Rows
from mmalign.policies.base import Rollout
from mmalign.rewards.base import RewardSet
from mmalign.training.experience import BatchShape, DatasetExperience, RolloutExperience, RolloutSettings
from mmalign.training.loop import Loop
from mmalign.training.mixing import MixedExperience, Mixture, SideExperience
from mmalign.training.mixing_control import MixedTerms, MixingController, MixingOptions, make_controller
from mmalign.training.objective import LossTerm, Supervised, TrainState
from mmalign.training.optimizers import OptimizerOptions
from mmalign.training.policy_gradient import PolicyGradient, PolicyLoss


class Table(nn.Module):
    """logits[context, position, symbol]."""

    def __init__(self, contexts: int, length: int, symbols: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(contexts, length, symbols))
        self.dropout = nn.Dropout(dropout)

    def forward(self) -> Tensor:
        return self.dropout(self.logits) if self.dropout.p else self.logits * 1.0


class TablePolicy(BanditPolicy):
    """Strings of a fixed length after an integer prompt; rows hold ``context`` and ``choice`` (a list of symbols).

    Prompts that are equal modulo the number of contexts share their logits: other words for the same question.
    """

    def __init__(self, contexts: int = 4, length: int = 3, symbols: int = 4, *, dropout: float = 0.0) -> None:
        super().__init__(Table(contexts, length, symbols, dropout=dropout))
        self.length, self.contexts = length, contexts

    def log_probs(self, rows: Rows, *, draw: Any = None, temperature: float = 1.0, want: Any = ()) -> ActionScores:
        mask = torch.ones(len(rows), self.length, dtype=torch.bool)
        training = self.module.training
        self.module.train(training and torch.is_grad_enabled())
        table = (self.module() / temperature).log_softmax(-1)[torch.as_tensor(rows["context"], dtype=torch.long)]
        self.module.train(training)
        chosen = torch.as_tensor(rows["choice"], dtype=torch.long).reshape(len(rows), self.length, 1)
        entropy = -(table.exp() * table).sum(-1) if "entropy" in want else None
        return ActionScores(logp=table.gather(2, chosen).squeeze(2), mask=mask, entropy=entropy)

    def action_mask(self, rows: Rows) -> Tensor:
        return torch.ones(len(rows), self.length, dtype=torch.bool)

    def encode_rows(self, examples: Sequence[Mapping[str, Any]]) -> Rows:
        return Rows({"context": [example["prompt"] % self.contexts for example in examples],
                     "choice": [example["completion"] for example in examples]})

    def sample(self, prompts: Sequence[Any], n: int, sampling: Any, generator: torch.Generator) -> Rollout:
        group = torch.arange(len(prompts)).repeat_interleave(n)
        asked = torch.tensor(list(prompts)).repeat_interleave(n)
        context = asked % self.contexts
        with torch.no_grad():
            table = self.module.logits.log_softmax(-1)[context]
        chosen = torch.multinomial(table.exp().flatten(0, 1), 1, generator=generator).reshape(len(context), self.length)
        logp = table.gather(2, chosen[..., None]).squeeze(2)
        samples = chosen.tolist()
        return Rollout(prompts=asked.tolist(), samples=samples, group=group,
                       rows=Rows({"context": context.tolist(), "choice": samples}),
                       mask=torch.ones_like(chosen, dtype=torch.bool), old_logp=logp)

    def unfold(self, rollout: Rollout, *, fraction: float, generator: torch.Generator) -> Rows:
        return rollout.rows.with_columns(
            old_logp=rollout.old_logp, group=rollout.group, advantages=torch.as_tensor(rollout.columns["advantages"]).float())

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.module.state_dict(), folder / "table.pt")

    def accuracy(self, answers: Sequence[Sequence[int]]) -> float:
        """Probability of the right string, averaged over contexts."""
        with torch.no_grad():
            logp = self.log_probs(Rows({"context": list(range(len(answers))), "choice": [list(a) for a in answers]})).logp
        return float(logp.sum(1).exp().mean())


class Arms:
    """The sparse task of the mixing tests: reward for the whole right string only, demonstrations wrong in places.

    Args:
        wrong: share of the contexts whose demonstration ends in a wrong symbol.
    """

    def __init__(self, *, seed: int, contexts: int = 32, length: int = 4, symbols: int = 6, wrong: float = 0.3) -> None:
        source = torch.Generator().manual_seed(1000 + seed)
        self.shape, self.seed, self.contexts = (contexts, length, symbols), seed, contexts
        self.answers = torch.randint(0, symbols, (contexts, length), generator=source).tolist()
        self.shown = [list(answer) for answer in self.answers]
        for context in torch.randperm(contexts, generator=source)[: round(wrong * contexts)].tolist():
            self.shown[context][-1] = (self.shown[context][-1] + 1) % symbols

    def reward(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        return [float(list(found) == self.answers[prompt % self.contexts])
                for prompt, found in zip(prompts, completions, strict=True)]

    def policy(self) -> TablePolicy:
        return TablePolicy(*self.shape)

    def demonstrations(self) -> list[dict[str, Any]]:
        return [{"prompt": i, "completion": shown} for i, shown in enumerate(self.shown)]


@dataclass
class MixedRun:
    """A mixed run built on a table."""

    loop: Loop
    policy: TablePolicy
    controller: MixingController
    experience: MixedExperience
    records: list[dict[str, float]]

    def train(self, steps: int) -> MixedRun:
        """``steps`` updates, whatever is planned."""
        stream = iter(self.experience)
        self.records += [self.loop.update(next(stream)) for _ in range(steps)]
        return self


def mixed_run(
    folder: Path, arms: Arms, options: MixingOptions, *, steps: int = 200, lr: float = 16.0, samples: int = 8, prompts: int = 32,
    per_forward: int | None = None, policy: TablePolicy | None = None, validation_seed: int = 77, every: int = 0,
) -> MixedRun:
    """Demonstrations, rollouts and validation rollouts of the other half of the prompts, through the loop; plain SGD."""
    policy, contexts = policy or arms.policy(), arms.contexts
    state = TrainState(arms.seed, steps)
    rows = prompts * samples
    forward = per_forward or rows
    shape = BatchShape(rows, forward, 1, 1, prompts, samples, 1)
    settings = RolloutSettings(None, lambda rollout, total: group_advantages(total, rollout.group, scale="none"))
    loss = PolicyLoss("ppo_clip", {}, "seq_mean_token_sum")
    imitation = Supervised(policy, [LossTerm("nll", reduction="seq_mean_token_sum")])
    utility = PolicyGradient(policy, loss)
    imitation.part, utility.part = "sft", "validation"
    rewards, held_out = RewardSet([arms.reward]), [{"prompt": contexts + i} for i in range(contexts)]
    sources: dict[str, Any] = {
        "train": RolloutExperience(policy, [{"prompt": i} for i in range(contexts)], rewards, shape, settings, state),
        "sft": DatasetExperience(policy, arms.demonstrations(), BatchShape(prompts, forward, 1, 1), seed=arms.seed),
        "validation": SideExperience(lambda own: RolloutExperience(policy, held_out, rewards, shape, settings, own), state,
                                     seed=validation_seed),
    }
    terms = MixedTerms({"sft_nll": 1.0}, {"policy": 1.0}, "validation_policy")
    controller = make_controller(options, terms, step_size=lr)
    members: Any = {"train": PolicyGradient(policy, loss), "sft": imitation, "validation": utility}
    objective = Mixture(members, entropy_wanted=controller.wants_entropy, rows_per_forward=forward)
    experience = MixedExperience(sources, lambda: controller.parts(state))
    loop = make_loop(folder, objective, experience, policy=policy, steps=steps, per_update=rows, per_forward=forward,
                     controller=controller, every=every, optimizers=[OptimizerOptions(kind="sgd", lr=lr, max_grad_norm=None)])
    loop.state = state
    return MixedRun(loop, policy, controller, experience, [])
