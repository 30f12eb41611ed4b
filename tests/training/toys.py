"""The smallest policies, experiences and objectives that exercise the loop's contracts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.core.logprobs import ActionScores
from mmalign.data.rows import Rows
from mmalign.training.experience import BatchShape
from mmalign.training.loop import CheckpointOptions, Loop, LoopOptions, make_accelerator
from mmalign.training.objective import Mean, Metrics, Term, TrainState, UpdateBatch
from mmalign.training.optimizers import OptimizerOptions
from mmalign.training.tracking import TrackingOptions


class Bandit(nn.Module):
    """Independent categorical choices: logits[context, action]."""

    def __init__(self, contexts: int = 4, actions: int = 5) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.linspace(-1, 1, contexts * actions).reshape(contexts, actions).clone())


class BanditPolicy:
    """Scores rows ``context[B], choice: list of [A_i]`` (ragged numbers of choices in one context)."""

    modality = "toy"

    def __init__(self, module: nn.Module | None = None) -> None:
        self.module = module or Bandit()

    def replace_module(self, module: nn.Module) -> None:
        self.module = module

    def action_mask(self, rows: Rows) -> Tensor:
        lengths = torch.tensor([len(c) for c in rows["choice"]])
        return torch.arange(max(1, int(lengths.max()) if len(lengths) else 1))[None] < lengths[:, None]

    def draw(self, rows: Rows, generator: torch.Generator) -> None:
        return None

    def log_probs(self, rows: Rows, *, draw: Any = None, temperature: float = 1.0, want: Any = ()) -> ActionScores:
        return self.scores_from((self.module.logits / temperature).log_softmax(-1), rows)

    def scores_from(self, table: Tensor, rows: Rows) -> ActionScores:
        mask = self.action_mask(rows)
        choices = torch.zeros(mask.shape, dtype=torch.long)
        for i, choice in enumerate(rows["choice"]):
            choices[i, : len(choice)] = torch.as_tensor(choice)
        logp = table[rows["context"]].gather(1, choices) * mask
        return ActionScores(logp=logp, mask=mask)

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.module.state_dict(), folder / "bandit.pt")

    def identity(self) -> str:
        return str(float(self.module.logits.sum()))


def bandit_rows(count: int, *, seed: int = 0, actions: int = 5) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 4, (count,), generator=generator).tolist()
    return Rows({
        "context": torch.randint(0, 4, (count,), generator=generator),
        "choice": [torch.randint(0, actions, (length,), generator=generator) for length in lengths],
        "group": torch.arange(count) // 2,
    })


class FixedExperience:
    """The same rows again and again, shuffled by its own generator (so that its state matters)."""

    def __init__(self, rows: Rows, per_update: int, seed: int = 0) -> None:
        self.rows, self.per_update = rows, per_update
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[UpdateBatch]:
        while True:
            index = torch.randperm(len(self.rows), generator=self.generator)[: self.per_update]
            yield UpdateBatch({"train": self.rows.take(index)})

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])


class QuadraticObjective:
    """Two modules, two terms: pulls each module's vector to its own target."""

    coupling = "none"

    def __init__(self, *, alternate: bool = False) -> None:
        self.nets = {"policy": nn.Linear(3, 1, bias=False), "critic": nn.Linear(3, 1, bias=False)}
        for net in self.nets.values():
            nn.init.zeros_(net.weight)
        self.alternate, self.seen = alternate, 0

    def modules(self) -> dict[str, nn.Module]:
        return dict(self.nets)

    def replace_modules(self, modules: Any) -> None:
        self.nets = dict(modules)

    def counts(self, update: UpdateBatch) -> dict[str, float]:
        rows = float(len(update.parts["train"]))
        return {"policy": rows, "critic": rows}

    def prepare(self, update: UpdateBatch, state: TrainState) -> dict[str, Any]:
        return {}

    def loss(self, micro: UpdateBatch, shared: dict[str, Any], state: TrainState) -> tuple[list[Term], Metrics]:
        x = torch.nn.functional.one_hot(micro.parts["train"]["context"] % 3, 3).float()
        mask = torch.ones(len(x), dtype=torch.bool)
        self.seen += len(x)
        terms = []
        for position, (name, target) in enumerate({"policy": 1.0, "critic": -2.0}.items()):
            active = not self.alternate or state.step % 2 == position
            terms.append(Term(name, (self.nets[name](x).squeeze(1) - target) ** 2 * active, mask, "seq_mean_token_mean"))
        return terms, {"rows": Mean(float(len(x)), 1.0)}

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


def make_loop(
    folder: Path, objective: Any, experience: Any, *, policy: Any = None, steps: int = 4, per_update: int = 8,
    per_forward: int = 8, optimizers: list[OptimizerOptions] | None = None, every: int = 0, seed: int = 0, **extra: Any,
) -> Loop:
    """A quiet CPU loop over toys."""
    options = LoopOptions(steps=steps, precision="float32",
                          checkpoint=CheckpointOptions(every=every, model_format=policy is not None),
                          tracking=TrackingOptions(quiet=True))
    shape = BatchShape(per_update, per_forward, max(1, per_update // per_forward), 1)
    return Loop(
        objective, experience, policy or BanditPolicy(), shape, TrainState(seed=seed, total_steps=steps), options=options,
        optimizers=optimizers or [OptimizerOptions(lr=0.1)], folder=folder,
        accelerator=make_accelerator(options, folder), **extra,
    )
