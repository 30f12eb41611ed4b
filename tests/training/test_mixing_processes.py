"""Two processes over gloo: mu, its parts and the update are those of one process on the same rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_processes import launch

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from tables import TablePolicy
from toys import FixedExperience
from mmalign.data.rows import Rows
from mmalign.training.experience import BatchShape
from mmalign.training.loop import CheckpointOptions, Loop, LoopOptions, make_accelerator
from mmalign.training.mixing import Mixture
from mmalign.training.mixing_control import MetaMixing, MixedTerms
from mmalign.training.objective import LossTerm, Supervised, TrainState, UpdateBatch
from mmalign.training.optimizers import OptimizerOptions
from mmalign.training.policy_gradient import PolicyGradient, PolicyLoss
from mmalign.training.tracking import TrackingOptions

def rows(count, seed, policy):
    source = torch.Generator().manual_seed(seed)
    plain = Rows({"context": torch.randint(0, 4, (count,), generator=source).tolist(),
                  "choice": torch.randint(0, 4, (count, 3), generator=source).tolist()})
    with torch.no_grad():
        old = policy.log_probs(plain).logp
    return plain.with_columns(advantages=torch.randn(count, generator=source), old_logp=old + 0.1)

def main():
    folder, cut = Path(sys.argv[1]), {"even": (4, 2, 3), "uneven": (5, 1, 2)}[sys.argv[2]]
    options = LoopOptions(steps=2, precision="float32", checkpoint=CheckpointOptions(model_format=False),
                          tracking=TrackingOptions(quiet=True))
    accelerator = make_accelerator(options, folder)
    world, rank = accelerator.num_processes, accelerator.process_index
    policy = TablePolicy()
    with torch.no_grad():
        policy.module.logits.copy_(torch.linspace(-1, 1, 48).reshape(4, 3, 4))
    parts = {}
    for (name, count), at in zip({"train": 8, "sft": 4, "validation": 6}.items(), cut):
        whole = rows(count, count, policy)
        parts[name] = whole if world == 1 else whole.take(range(at) if rank == 0 else range(at, count))
    loss = PolicyLoss("ppo_clip", {}, "token_mean")
    members = {"train": PolicyGradient(policy, loss, on_policy=False), "sft": Supervised(policy, [LossTerm("nll")]),
               "validation": PolicyGradient(policy, loss)}
    members["sft"].part, members["validation"].part = "sft", "validation"
    controller = MetaMixing(0.5, MixedTerms({"sft_nll": 1.0}, {"policy": 1.0}, "validation_policy"), meta_lr=10.0, step_size=0.5,
                            low=0.0, high=1.0, warmup=0, every=1, entropy_lr=0.3, target=1.0)
    objective = Mixture(members, entropy_wanted=controller.wants_entropy, rows_per_forward=2)
    loop = Loop(objective, FixedExperience(parts["train"], 8), policy, BatchShape(8, 2, 1, world),
                TrainState(seed=0, total_steps=2, rank=rank, world_size=world), options=options, controller=controller,
                optimizers=[OptimizerOptions(kind="sgd", lr=1.0, max_grad_norm=None)], folder=folder, accelerator=accelerator)
    before = loop.bare["policy"].logits.detach().clone()
    records = [loop.update(UpdateBatch(dict(parts), probed=frozenset({"validation"}))) for _ in range(2)]
    if accelerator.is_main_process:
        keys = ("mu", "mixing/meta_gradient", "mixing/entropy_gradient", "mixing/grad_norm_rl", "loss", "grad_norm")
        (folder / f"{world}.json").write_text(json.dumps({
            "gradient": (before - loop.bare["policy"].logits.detach()).flatten().tolist(),
            "numbers": [record[key] for record in records for key in keys]}))
    accelerator.wait_for_everyone()

main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("split", ["even", "uneven"])
def test_two_processes_mix_as_one(split: str, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    one, two = (launch(script, tmp_path, processes, split) for processes in (1, 2))
    assert two["gradient"] == pytest.approx(one["gradient"], abs=1e-5)
    assert two["numbers"] == pytest.approx(one["numbers"], abs=1e-5)
    assert 0 < one["numbers"][0] < 1  # type: ignore[index]
    assert min(abs(number) for number in one["numbers"]) > 1e-4  # type: ignore[attr-defined]
