"""The rows of the policy-gradient family: what each name composes, the greedy baseline, several rewards, and learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from prepared_runs import prepared, rollout_tree

from mmalign.policies.base import TextSampling

FOUR_BY_FOUR = {"prompts_per_rollout": 4, "completions_per_prompt": 4, "examples_per_update": 8}
ONE_EACH = {"prompts_per_rollout": 8, "completions_per_prompt": 1}


def built(method: str, folder: Path, **changes: Any) -> Any:
    batch = ONE_EACH if method in ("reinforce", "remax") else FOUR_BY_FOUR
    return prepared(rollout_tree(0.8, **{"method": method, "batch": batch, **changes}), folder)


@pytest.mark.parametrize(("method", "loss", "reduction", "level", "bounds"), [
    ("dr_grpo", "ppo_clip", "seq_mean_token_sum_norm", "token", {"low": 0.8, "high": 1.2}),
    ("dapo", "ppo_clip", "token_mean", "token", {"low": 0.8, "high": 1.28}),
    ("gspo", "gspo", "seq_mean_token_mean", "sequence", {"low": 1 - 3e-4, "high": 1 + 4e-4}),
    ("cispo", "cispo", "token_mean", "token", {"high": 5.0}),
    ("rloo", "ppo_clip", "seq_mean_token_mean", "sequence_sum", {"low": 0.8, "high": 1.2}),
    ("reinforce", "reinforce", "seq_mean_token_sum", "token", {}),
    ("remax", "reinforce", "seq_mean_token_sum", "token", {}),
])
def test_defaults_are_the_published_composition(
    method: str, loss: str, reduction: str, level: str, bounds: dict[str, float], tmp_path: Path,
) -> None:
    objective = built(method, tmp_path).parts.objective
    assert (objective.policy_loss.name, objective.policy_loss.reduction, objective.level) == (loss, reduction, level)
    assert objective.bounds == pytest.approx(bounds)


def test_dr_grpo_divides_by_the_limit_unless_told_otherwise(tmp_path: Path) -> None:
    assert built("dr_grpo", tmp_path / "a").parts.objective.policy_loss.norm_length == 6
    given = built("dr_grpo", tmp_path / "b", loss={"norm_length": 100})
    assert given.parts.objective.policy_loss.norm_length == 100


@pytest.mark.parametrize("seed", [0, 1])
def test_remax_compares_with_the_greedy_completion_of_the_same_weights(seed: int, tmp_path: Path) -> None:
    parts = built("remax", tmp_path, rewards=[{"name": "within_length", "max_length": 3 + seed}]).parts
    seen: list[Any] = []
    parts.experience.observers.append(lambda rollout, step: seen.append(rollout))
    next(iter(parts.experience))
    rollout = seen[0]
    again = parts.policy.sample(rollout.prompts, 1, TextSampling(max_new_tokens=6, temperature=0),
                                torch.Generator().manual_seed(99))
    greedy = parts.experience.rewards.total(parts.experience.rewards.score(again))
    total = parts.experience.rewards.total(rollout)
    assert rollout.columns["greedy_reward"] == greedy.tolist()
    assert rollout.columns["advantages"] == pytest.approx((total - greedy).tolist())


def test_several_rewards_are_standardised_one_by_one(tmp_path: Path) -> None:
    """A reward in thousands does not drown one in units, and the advantages are whitened over the rows (GDPO)."""
    rewards = [{"name": "within_length", "max_length": 5}, {"name": "regex_match", "pattern": "[a-e]"}]
    seen: list[Any] = []
    for weights in ((1.0, 1.0), (1.0, 3.0)):
        parts = built("grpo", tmp_path / str(weights), reward_combination="normalize_then_sum",
                      rewards=[{**r, "weight": w} for r, w in zip(rewards, weights, strict=True)],
                      advantage={"name": "reinforce_pp_baseline", "over": "rows", "eps": 1e-4}).parts
        parts.experience.observers.append(lambda rollout, step: seen.append(rollout))
        next(iter(parts.experience))
        rollout = seen[-1]
        single = rollout.rewards.double().reshape(4, 4, 2)
        centred = single - single.mean(1, keepdim=True)
        flat = single.amax(1, keepdim=True) == single.amin(1, keepdim=True)
        standard = torch.where(flat, 0.0, centred / (single.std(1, keepdim=True) + 1e-4)).reshape(16, 2)
        total = standard @ torch.tensor(weights, dtype=torch.float64)
        expected = (total - total.mean()) / (total.std() + 1e-4)
        found = torch.tensor(rollout.columns["advantages"], dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert seen[0].columns["advantages"] != seen[1].columns["advantages"]


def test_figures_are_logged_for_every_loss(tmp_path: Path) -> None:
    """Entropy, the gap between sampling and scoring, and the share that is clipped, at the level of the loss."""
    for method, clipped in (("grpo", {"clipped/low", "clipped/high"}), ("gspo", {"clipped/low", "clipped/high"}),
                            ("cispo", {"clipped/high"}), ("reinforce", set())):
        loop = built(method, tmp_path / method).loop
        first = loop.update(next(iter(loop.experience)))
        assert {name for name in first if name.startswith("clipped/")} == clipped
        assert first["rollout_gap/max"] < 1e-4  # the policy that sampled is the one that is scored
        assert 0 < first["entropy"] < 7


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dr_grpo", "gspo", "cispo", "rloo", "reinforce", "remax"])
def test_the_reward_rises(method: str, tmp_path: Path) -> None:
    """Over three seeds the last fifth of a short run is above the first by more than twice the standard error."""
    rises = []
    for seed in (11, 12, 13):
        batch = {"prompts_per_rollout": 32, "completions_per_prompt": 1} if method in ("reinforce", "remax") else \
            {"prompts_per_rollout": 8, "completions_per_prompt": 4}
        tree = rollout_tree(1.0, method=method, batch=batch, rewards=[{"name": "regex_match", "pattern": "[0-9]"}], steps=40,
                            optimizers=[{"kind": "adamw", "lr": 3e-3}])
        loop = prepared(tree, tmp_path / str(seed), seed=seed).loop
        updates = iter(loop.experience)
        curve = [loop.update(next(updates))["reward"] for _ in range(40)]
        rises.append(sum(curve[-8:]) / 8 - sum(curve[:8]) / 8)
    mean, spread = torch.tensor(rises).mean(), torch.tensor(rises).std()
    assert mean > 2 * spread / 3**0.5, rises
    assert min(rises) > 0, rises
