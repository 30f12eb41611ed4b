"""Two processes over gloo: the gradient and the reported loss are those of one process on the same rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from toys import BanditPolicy, FixedExperience, bandit_rows
from mmalign.training.discriminative import ConstraintOptions, Discriminative
from mmalign.training.experience import BatchShape
from mmalign.training.loop import CheckpointOptions, Loop, LoopOptions, make_accelerator
from mmalign.training.objective import LossTerm, Supervised, TrainState, UpdateBatch
from mmalign.training.preference import Preference
from mmalign.training.optimizers import OptimizerOptions
from mmalign.training.policy_gradient import KLOptions, PolicyGradient, PolicyLoss
from mmalign.training.tracking import TrackingOptions

class Module(torch.nn.Module):
    # DistributedDataParallel synchronises gradients of what its own forward computed.
    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.linspace(-1, 1, 20).reshape(4, 5).clone())
    def forward(self):
        return self.logits * 1.0

class Policy(BanditPolicy):
    def log_probs(self, rows, *, draw=None, temperature=1.0, want=()):
        table = self.module().log_softmax(-1)
        return self.scores_from(table, rows)

class Value:
    want = ()
    def __init__(self):
        self.module = Module()
    def replace_module(self, module):
        self.module = module
    def values(self, rows, scores=None):
        return (self.module()[rows["context"]] ** 2)[:, :3]

def policy_gradient(kind, policy):
    loss = {"ppo": PolicyLoss("ppo_clip", {}, "token_mean"),
            "gspo": PolicyLoss("gspo", {"clip_high": 0.1}, "seq_mean_token_mean"),
            "cispo": PolicyLoss("cispo", {}, "seq_mean_token_sum_norm", 7),
            "rloo": PolicyLoss("ppo_clip", {"level": "sequence_sum"}, "seq_mean_token_mean")}[kind]
    value = Value() if kind == "ppo" else None
    return PolicyGradient(policy, loss, on_policy=False, kl=KLOptions(coef=0.5, estimator="k3"), value=value, value_coef=0.7)

def main():
    folder, reduction, uneven = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "uneven"
    options = LoopOptions(steps=1, precision="float32", checkpoint=CheckpointOptions(model_format=False),
                          tracking=TrackingOptions(quiet=True))
    accelerator = make_accelerator(options, folder)
    world, rank = accelerator.num_processes, accelerator.process_index
    rows = bandit_rows(8, seed=3)
    cut = 4 if not uneven else 6 if reduction == "disco" else 5
    if reduction in ("ppo", "gspo", "cispo", "rloo"):
        noise = torch.Generator().manual_seed(1)
        with torch.no_grad():
            now = BanditPolicy().log_probs(rows)
        width = (8, 3)
        rows = rows.with_columns(
            advantages=torch.randn(8, generator=noise),
            old_logp=(now.logp + 0.1 * torch.randn(width, generator=noise)) * now.mask,
            ref_logp=(now.logp + 0.3) * now.mask, values=torch.randn(width, generator=noise),
            returns=torch.randn(width, generator=noise))
    if reduction == "disco":  # groups of two rows are never split; the old policy is elsewhere, so that the constraint acts
        with torch.no_grad():
            old = BanditPolicy().log_probs(rows)
        rows = rows.with_columns(advantages=torch.tensor([1.0, -1.0] * 3 + [1.0, 1.0]), old_logp=(old.logp + 0.1) * old.mask)
    mine = rows if world == 1 else rows.take(range(cut) if rank == 0 else range(cut, 8))
    policy = Policy(Module())
    if reduction in ("kto", "bco"):  # losses with a statistic over the rows of all processes
        label = torch.arange(8) % 3 > 0
        mine = mine.with_columns(label=label if world == 1 else label[:cut] if rank == 0 else label[cut:])
        start = Module()
        with torch.no_grad():
            start.logits.mul_(0.3)
        objective = Preference(policy, [LossTerm(reduction, {"beta": 0.5})], reference=BanditPolicy(start), unpaired=True)
    elif reduction == "disco":
        objective = Discriminative(policy, tau=0.5, kl=ConstraintOptions(penalty=10.0), rows_per_forward=2, world_size=world)
    elif reduction in ("ppo", "gspo", "cispo", "rloo"):
        objective = policy_gradient(reduction, policy)
    else:
        objective = Supervised(policy, [LossTerm("nll", reduction=reduction)])
    loop = Loop(objective, FixedExperience(mine, 8), policy,
                BatchShape(8, 2, 1, world), TrainState(seed=0, total_steps=1, rank=rank, world_size=world), options=options,
                optimizers=[OptimizerOptions(kind="sgd", lr=1.0, max_grad_norm=None)], folder=folder, accelerator=accelerator)
    before = loop.bare["policy"].logits.detach().clone()
    record = loop.update(UpdateBatch({"train": mine}))
    if accelerator.is_main_process:
        gradient = (before - loop.bare["policy"].logits.detach()).flatten().tolist()
        other = next(record[name] for name in ("nll", "kl_old", "kl", "shift") if name in record)
        (folder / f"{world}.json").write_text(json.dumps({"gradient": gradient, "loss": record["loss"], "other": other}))
    # As run_training ends. A thread of gloo that still holds the tensors of the last collective needs the interpreter
    # to release them, and aborts the process when that is gone; a barrier holds none.
    accelerator.wait_for_everyone()

main()
"""


def launch(script: Path, folder: Path, processes: int, *arguments: str) -> dict[str, object]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent.parent}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", str(script)]
    done = subprocess.run([*command, str(folder), *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, object] = json.loads((folder / f"{processes}.json").read_text())
    return result


@pytest.mark.slow
@pytest.mark.parametrize(
    "reduction", ["token_mean", "seq_mean_token_mean", "kto", "bco", "disco", "ppo", "gspo", "cispo", "rloo"])
@pytest.mark.parametrize("split", ["even", "uneven"])
def test_two_processes_give_the_gradient_of_one(reduction: str, split: str, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    one, two = (launch(script, tmp_path, processes, reduction, split) for processes in (1, 2))
    assert two["gradient"] == pytest.approx(one["gradient"], abs=1e-6)
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-6)
    assert two["other"] == pytest.approx(one["other"], abs=1e-6)
    assert max(abs(g) for g in one["gradient"]) > 1e-3  # type: ignore[union-attr]


ADVANTAGES = """
import json, sys
from pathlib import Path
import torch
from mmalign.data.rows import Rows
from mmalign.policies.base import Rollout
from mmalign.training.advantages import AdvantageOptions, advantage_function
from mmalign.training.loop import LoopOptions, make_accelerator

folder, uneven = Path(sys.argv[1]), sys.argv[2] == "uneven"
accelerator = make_accelerator(LoopOptions(steps=1, precision="float32"), folder)
world, rank = accelerator.num_processes, accelerator.process_index
noise = torch.Generator().manual_seed(0)
result = {}
for name in ("grpo", "rloo", "grpo_batch_std", "reinforce", "reinforce_pp_baseline", "prompt_statistics", "running_mean"):
    options = AdvantageOptions.model_validate({"name": name, **({"min_count": 3} if name == "prompt_statistics" else {})})
    function, _ = advantage_function(options)
    result[name] = []
    for _ in range(3):  # statistics grow
        rewards, mask = torch.randn(12, generator=noise), torch.rand(12, 4, generator=noise) < 0.7
        cut = 12 if world == 1 else 8 if uneven else 6
        mine = slice(0, cut) if rank == 0 else slice(cut, 12)
        total, group = rewards[mine], torch.arange(12)[mine] // 2
        rollout = Rollout([f"prompt {int(g) % 3}" for g in group], [""] * len(group), group - group[0], Rows({"g": group}),
                          mask[mine], mask[mine].float())
        result[name] += function(rollout, total).tolist()
(folder / f"{world}-{rank}.json").write_text(json.dumps(result))
accelerator.wait_for_everyone()
(folder / f"{world}.json").write_text("{}")
"""


@pytest.mark.slow
@pytest.mark.parametrize("split", ["even", "uneven"])
def test_statistics_of_a_batch_are_those_of_all_processes(split: str, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(ADVANTAGES)
    for processes in (1, 2):
        launch(script, tmp_path, processes, split)
    one, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    cut = 8 if split == "uneven" else 6
    rest = 12 - cut
    for name, values in one.items():
        for n in range(3):
            together = first[name][n * cut : (n + 1) * cut] + second[name][n * rest : (n + 1) * rest]
            assert together == pytest.approx(values[n * 12 : (n + 1) * 12], abs=1e-6), name
