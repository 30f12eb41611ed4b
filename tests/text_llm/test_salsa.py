"""SALSA: the anchor in closed form, identity with PPO where the soup is one model, and the run against its baseline."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mmalign.core.advantages import shape_rewards
from mmalign.core.divergence import kl_estimate
from mmalign.data.arithmetic import make_arithmetic
from mmalign.errors import ConfigError
from mmalign.policies.base import TextSampling
from mmalign.policies.causal_lm import CausalLMPolicy
from mmalign.policies.reference import ReferenceOptions, make_reference
from mmalign.stages import Plan, load_plan, make_plan, run_plan
from mmalign.training.tracking import read_metrics
from mmalign.weights.arithmetic import weighted_average

# -- closed forms ----------------------------------------------------------------------------------------------------------


def free_energy(anchor: Tensor, reward: Tensor, coef: float) -> float:
    """``max_p E_p[r] - coef KL(p || anchor) = coef log sum anchor exp(r / coef)``."""
    return float(coef * (anchor * (reward / coef).exp()).sum().log())


def kl(p: Tensor, q: Tensor) -> float:
    return float((p * (p / q).log()).sum())


def test_the_soup_of_a_tabular_policy_in_closed_form() -> None:
    first, second = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64), torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    reward, coef = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64), 0.5
    state = weighted_average([{"logits": first.log()}, {"logits": second.log()}], [0.5, 0.5], normalize=False)
    soup = state["logits"].softmax(0)
    torch.testing.assert_close(soup, torch.tensor([0.362854, 0.274292, 0.362854], dtype=torch.float64), atol=1e-6, rtol=0)
    values = [free_energy(anchor, reward, coef) for anchor in (first, second, soup)]
    assert values == pytest.approx([0.447970, 0.623604, 0.608339], abs=1e-6)
    best = {name: (anchor * (reward / coef).exp()) / (anchor * (reward / coef).exp()).sum()
            for name, anchor in (("sft1", first), ("soup", soup))}
    assert float(best["sft1"] @ reward) == pytest.approx(0.658760, abs=1e-6)
    assert float(best["soup"] @ reward) == pytest.approx(0.746435, abs=1e-6)
    assert kl(best["sft1"], first) == pytest.approx(0.421580, abs=1e-6)
    assert kl(best["soup"], soup) == pytest.approx(0.276192, abs=1e-6)
    assert kl(best["soup"], first) == pytest.approx(0.771757, abs=1e-6)
    for name, anchor in (("sft1", first), ("soup", soup)):  # the optimum attains the value
        attained = float(best[name] @ reward) - coef * kl(best[name], anchor)
        assert attained == pytest.approx(free_energy(anchor, reward, coef), abs=1e-9)


def test_gradient_ascent_reaches_the_tilted_anchor() -> None:
    """The exact objective of the toy, climbed from sft1 with either anchor: the reward and KL of the closed form."""
    first, second = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64), torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    reward, coef = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64), 0.5
    soup = ((first.log() + second.log()) / 2).softmax(0)
    for anchor, expected in ((first, 0.658760), (soup, 0.746435)):
        logits = first.log().clone().requires_grad_()
        for _ in range(400):
            p = logits.softmax(0)
            (gradient,) = torch.autograd.grad((p * (reward - coef * (p / anchor).log())).sum(), logits)
            logits = (logits + 0.5 * gradient).detach().requires_grad_()
        assert float(logits.softmax(0).detach() @ reward) == pytest.approx(expected, abs=1e-4)


def test_shaped_rewards_of_the_anchor() -> None:
    own, soup = torch.tensor([[-1.2, -0.7, -2.0]]), torch.tensor([[-1.6, -0.5, -2.2]])
    shaped = shape_rewards(torch.tensor([0.8]), kl_estimate(own, soup, kind="k1"), torch.ones(1, 3), kl_coef=0.1)
    torch.testing.assert_close(shaped, torch.tensor([[-0.04, 0.02, 0.78]]))


# -- the pipeline ----------------------------------------------------------------------------------------------------------


SHORT = ["sft.steps=10", "sft.checkpoint.every=0", "ppo.steps=4", "ppo.checkpoint.every=0"]


def plan(root: Path, folder: Path, *overrides: str) -> Plan:
    return load_plan(root / "configs/text/salsa.yaml", list(overrides), run_dir=str(folder))


def trained(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "ppo" / "model" / "model.safetensors")


def records(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if "second" not in k} for line in read_metrics(folder / "ppo" / "metrics.jsonl")]


def test_stages_of_the_pipeline(root: Path, tmp_path: Path) -> None:
    stages = {stage.name: stage for stage in plan(root, tmp_path).stages}
    assert list(stages) == ["sft1", "sft2", "ppo"]
    assert stages["sft1"].seed != stages["sft2"].seed
    assert [stages[name].tree["data"]["part"] for name in ("sft1", "sft2")] == ["1/2", "2/2"]
    tree = stages["ppo"].tree
    assert tree["model"]["path"] == "${stages.sft1.model}"
    assert tree["reference"] == {"kind": "soup", "weights": [0.5, 0.5],
                                 "checkpoints": ["${stages.sft1.model}", "${stages.sft2.model}"]}
    several = plan(root, tmp_path, "sft_runs=[{}, {steps: 3}, {}]", "weights=null", "init=soup").stages
    assert [stage.name for stage in several] == ["sft1", "sft2", "sft3", "soup", "ppo"]
    assert several[1].tree["steps"] == 3
    assert several[4].tree["model"]["path"] == "${stages.soup.model}"
    baseline = plan(root, tmp_path, "anchor=init").stages[-1]
    assert baseline.tree["reference"] == {"kind": "auto"}
    assert (baseline.name, baseline.seed) == ("ppo", stages["ppo"].seed)


def test_a_soup_of_one_model_is_ppo_token_by_token(root: Path, tmp_path: Path) -> None:
    run_plan(plan(root, tmp_path / "one", *SHORT, "weights=[1.0, 0.0]"), quiet=True)
    run_plan(plan(root, tmp_path / "ppo", *SHORT, "anchor=init"), quiet=True)
    same = [*SHORT, "split_data=false", "sft_runs=[{seed: 3}, {seed: 3}]"]
    run_plan(plan(root, tmp_path / "twins", *same), quiet=True)
    run_plan(plan(root, tmp_path / "twins_ppo", *same, "anchor=init"), quiet=True)
    for left, right in (("one", "ppo"), ("twins", "twins_ppo")):
        ours, theirs = trained(tmp_path / left), trained(tmp_path / right)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert records(tmp_path / left) == records(tmp_path / right)
        assert abs(records(tmp_path / left)[0]["kl/sample"]) < 1e-4
    run_plan(plan(root, tmp_path / "soup", *SHORT), quiet=True)
    # The policy does not start at its anchor: there is something to pay from the first sample on.
    assert abs(records(tmp_path / "soup")[0]["kl/sample"]) > 1e-3  # an estimate from 16 samples may be negative
    assert any(not torch.equal(tensor, trained(tmp_path / "soup")[name]) for name, tensor in trained(tmp_path / "ppo").items())


def test_starting_from_the_soup_starts_at_the_anchor(root: Path, tmp_path: Path) -> None:
    run_plan(plan(root, tmp_path, *SHORT, "init=soup"), quiet=True)
    assert abs(records(tmp_path)[0]["kl/sample"]) < 1e-4


@pytest.mark.parametrize(("override", "message"), [
    ("weights=[0.5, 0.6]", "sum to 1"),
    ("weights=[1.5, -0.5]", "must not be negative"),
    ("weights=[1.0]", "1 numbers for 2 SFT runs"),
    ("sft_runs=[{}]", "at least two models"),
    ("init=sft3", "init must be one of soup, sft1, sft2"),
    ("sft.model={path: x}", r"sft\.model"),
    ("ppo.reference={kind: none}", r"ppo\.reference"),
    ("ppo.kl.coef=0", r"ppo\.kl\.coef"),
    ("sft_runs=[{}, {data: {path: x}}]", r"sft_runs\[1\]\.data"),
    ("ppo.stepz=3", r"ppo.*stepz"),
])
def test_bad_configurations_are_refused_by_name(override: str, message: str, root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(root, tmp_path, override)


def test_another_base_is_refused_before_ppo_starts(root: Path, tmp_path: Path) -> None:
    """SFT models of two base models: the soup is refused by what their folders record."""
    run_plan(plan(root, tmp_path / "first", *SHORT), quiet=True)
    second = tmp_path / "second"
    sft = {"method": "sft", "model": {"path": str(tmp_path / "first/ppo/model")}, "steps": 1, "run_dir": str(second),
           "data": {"path": "asset:arithmetic", "limit": 16}}
    run_plan(make_plan(sft, config_folder=tmp_path), quiet=True)
    folders = [str(tmp_path / "first/sft1/model"), str(second / "model")]
    policy = CausalLMPolicy.from_pretrained(folders[0], device="cpu")
    with pytest.raises(ConfigError, match="different base models"):
        make_reference(policy, ReferenceOptions(kind="soup", checkpoints=folders))


# -- against plain PPO -------------------------------------------------------------------------------------------------------


def large_digits(texts: list[Any]) -> Tensor:
    plain = [text if isinstance(text, str) else text[-1]["content"] for text in texts]
    digits = [[int(c) for c in text if c in "0123456789"] for text in plain]
    return torch.tensor([sum(found) / (9 * len(found)) if found else 0.0 for found in digits])


def judge(folder: Path) -> dict[str, float]:
    """Reward, and KL to the start and to the soup, of 512 fresh samples of a run's policy."""
    policy, start = (CausalLMPolicy.from_pretrained(folder / name / "model", device="cpu") for name in ("ppo", "sft1"))
    soup: Any = make_reference(start, ReferenceOptions(kind="soup", checkpoints=[str(folder / f"sft{i}/model") for i in (1, 2)]))
    prompts = [row["prompt"] for row in make_arithmetic(64, levels=[1])]
    rollout = policy.sample(prompts, 8, TextSampling(max_new_tokens=8), torch.Generator().manual_seed(5))
    distances = []
    for scorer in (start, soup):
        with torch.no_grad():
            logp = scorer.log_probs(rollout.rows).logp[:, : rollout.mask.shape[1]]
        distances.append(float(((rollout.old_logp - logp) * rollout.mask).sum(1).mean()))
    return {"reward": float(large_digits(rollout.samples).mean()), "start": distances[0], "soup": distances[1]}


@pytest.mark.slow
def test_the_anchor_moves_the_policy_towards_the_soup_and_the_reward_still_rises(root: Path, tmp_path: Path) -> None:
    """Three seeds at one KL coefficient. Not claimed: that the soup gives more reward; see docs/methods/salsa.md."""
    for seed in (0, 1, 2):
        found = {}
        for anchor in ("soup", "init"):
            folder = tmp_path / f"{anchor}{seed}"
            changes = [f"seed={seed}", f"anchor={anchor}", "ppo.kl.coef=0.4", "ppo.checkpoint.every=0"]
            run_plan(plan(root, folder, *changes), quiet=True)
            found[anchor] = judge(folder)
            first = records(folder)[0]
            assert found[anchor]["reward"] > first["reward"] + 0.05
            assert (abs(first["kl/sample"]) > 1e-3) == (anchor == "soup")
        assert found["soup"]["soup"] < found["soup"]["start"]
        assert found["soup"]["soup"] - found["soup"]["start"] < found["init"]["soup"] - found["init"]["start"]
        assert all(math.isfinite(value) for run in found.values() for value in run.values())
    assert json.loads((tmp_path / "soup0" / "ppo" / "manifest.json").read_text())["status"] == "done"
