"""Dynamic sampling: which groups are kept, what is left over, bounded rounds, and resuming in the middle."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_discriminative import Questions
from torch import Tensor

from mmalign.config import parse
from mmalign.core.advantages import group_advantages
from mmalign.errors import ConfigError, RewardError
from mmalign.methods.registry import METHODS
from mmalign.methods.training import prepare_training
from mmalign.policies.base import Rollout
from mmalign.rewards.base import RewardSet
from mmalign.stages import make_plan
from mmalign.training.checkpoint import load_state, save_state
from mmalign.training.dynamic_sampling import DynamicSampling, DynamicSamplingOptions
from mmalign.training.experience import BatchShape, RolloutExperience, RolloutSettings
from mmalign.training.objective import TrainState


def accuracy(completions: Any, **columns: Any) -> list[float]:
    return [float(text == "0") for text in completions]


def shape_of_it(completions: Any, **columns: Any) -> list[float]:
    return [-int(text) / 10 for text in completions]


def rollout(rewards: list[list[float]], *, second: float = 0.1) -> Rollout:
    """One group per inner list; a second reward differs within every group."""
    size = len(rewards[0])
    count = len(rewards) * size
    source = Questions(torch.full((4, 3), 1 / 3)).sample([0] * len(rewards), size, None, torch.Generator().manual_seed(0))
    source.rewards = torch.stack([torch.tensor(rewards).flatten(), torch.arange(count) * second], 1)
    return source


def sampler(rounds: list[list[list[float]]], groups: int, **options: Any) -> tuple[DynamicSampling, Any]:
    source = iter([rollout(r) for r in rounds])
    rewards = RewardSet([accuracy, shape_of_it], weights=[1.0, 0.0])
    return DynamicSampling(DynamicSamplingOptions(**options), rewards, groups), lambda: next(source)


FLAT, MIXED, RIGHT = [0.0, 0.0], [0.0, 1.0], [1.0, 1.0]


def kept(rollout: Rollout) -> list[list[float]]:
    assert rollout.rewards is not None
    return [rollout.rewards[rollout.group == g, 0].tolist() for g in rollout.group.unique()]


def test_rounds_go_on_until_enough_groups_differ_and_the_rest_waits() -> None:
    dynamic, draw = sampler([[FLAT, MIXED], [RIGHT, FLAT], [MIXED, [1.0, 0.0]], [FLAT, FLAT], [MIXED, MIXED]], 2)
    found, everything, metrics = dynamic.collect(draw)
    assert kept(found) == [MIXED, MIXED]
    assert kept(everything) == [FLAT, MIXED, RIGHT, FLAT, MIXED, [1.0, 0.0]]
    assert metrics == {"dynamic_sampling/rounds": 3, "dynamic_sampling/surplus": 1, "dynamic_sampling/rejected": 0.5,
                       "dynamic_sampling/filled": 1.0}
    found, everything, metrics = dynamic.collect(draw)  # starts with the one left over
    assert kept(found) == [[1.0, 0.0], MIXED]
    assert metrics["dynamic_sampling/rounds"] == 2
    assert metrics["dynamic_sampling/rejected"] == 0.5
    assert kept(dynamic.surplus) == [MIXED]  # type: ignore[arg-type]


def test_after_the_last_round_training_goes_on_with_what_there_is_or_stops() -> None:
    dynamic, draw = sampler([[FLAT, MIXED, FLAT]] + [[FLAT, RIGHT, FLAT]] * 5, 3, max_rounds=2)
    found, _, metrics = dynamic.collect(draw)
    assert kept(found) == [MIXED]
    assert metrics["dynamic_sampling/filled"] == pytest.approx(1 / 3)
    assert metrics["dynamic_sampling/rounds"] == 2
    with pytest.raises(RewardError, match=r"dynamic_sampling\.max_rounds: none of 6 groups in 2 rounds"):
        dynamic.collect(draw)


@pytest.mark.parametrize(("options", "expected"), [
    ({}, [MIXED]), ({"mode": "any"}, [MIXED, RIGHT]), ({"mode": "mixed", "threshold": 0.5}, [MIXED]),
    ({"filter_on": "shape_of_it"}, [FLAT, MIXED, RIGHT]), ({"filter_on": "accuracy"}, [MIXED]),
])
def test_the_filter_reads_the_reward_that_is_named(options: dict[str, Any], expected: list[Any]) -> None:
    dynamic, draw = sampler([[FLAT, MIXED, RIGHT]], 3, max_rounds=1, **options)
    assert kept(dynamic.collect(draw)[0]) == expected


def test_shaping_must_not_make_a_flat_group_look_useful() -> None:
    rewards = RewardSet([accuracy, shape_of_it], weights=[1.0, 1.0])
    flat = rollout([FLAT])
    assert DynamicSampling(DynamicSamplingOptions(), rewards, 1).collect(lambda: flat)
    with pytest.raises(RewardError, match="accuracy"):
        DynamicSampling(DynamicSamplingOptions(filter_on="accuracy"), rewards, 1).collect(lambda: flat)


def test_groups_that_differ_by_rounding_are_flat() -> None:
    dynamic, draw = sampler([[[0.1, 0.1 + 1e-9], MIXED]], 1)
    assert kept(dynamic.collect(draw)[0]) == [MIXED]


def test_samples_without_a_reward_do_not_count() -> None:
    dynamic, draw = sampler([[[math.nan, 1.0], [math.nan, math.nan], MIXED]], 3, max_rounds=1)
    assert kept(dynamic.collect(draw)[0]) == [MIXED]


# -- in an experience --------------------------------------------------------------------------------------------------------


def experience(*, used: int = 0) -> RolloutExperience:
    """Three groups of four samples per rollout; ``used`` numbers have been drawn already."""
    right = torch.tensor([0.02, 0.5, 0.9, 0.3])
    table = torch.cat([right[:, None], ((1 - right) / 4)[:, None].expand(-1, 4)], 1)
    state = TrainState(0, 10)
    torch.rand(used, generator=state.generator("sampling"))
    settings = RolloutSettings(None, lambda rollout, total: group_advantages(total, rollout.group),
                               dynamic_sampling=DynamicSamplingOptions())
    return RolloutExperience(Questions(table), [{"prompt": str(i)} for i in range(4)], RewardSet([accuracy]),
                             BatchShape(12, 12, 1, 1, 3, 4, 1), settings, state)


def test_every_group_of_an_update_has_a_gradient_and_rewards_are_of_all_samples() -> None:
    source = experience()
    stream = iter(source)
    rewards, rejected = [], []
    for _ in range(6):
        update = next(stream)
        rows = update.parts["train"]
        assert len(rows) == 12
        for group in rows["group"].unique():
            assert rows["advantages"][rows["group"] == group].abs().sum() > 0
        torch.testing.assert_close(source.policy.log_probs(rows).logp, rows["old_logp"])  # rows keep their own log-probs
        rewards.append(update.metrics["reward"])
        rejected.append(update.metrics["dynamic_sampling/rejected"])
    assert 0.3 < sum(rewards) / 6 < 0.55  # the mean over prompts is 0.43, rejected groups included
    assert sum(rejected) > 0


def test_a_resumed_experience_goes_on_with_its_surplus(tmp_path: Path) -> None:
    first = experience()
    stream = iter(first)
    for _ in range(9):
        next(stream)
        if first.dynamic is not None and first.dynamic.surplus is not None:
            break
    save_state(tmp_path, {"experience": first.state_dict(), "state": first.state.state_dict()})
    second = experience(used=7)
    saved = load_state(tmp_path)
    second.load_state_dict(saved["experience"])
    second.state.load_state_dict(saved["state"])
    assert first.dynamic is not None
    assert first.dynamic.surplus is not None
    resumed = iter(second)
    for _ in range(4):
        ours, theirs = (next(s).parts["train"] for s in (stream, resumed))
        for name in ("context", "old_logp", "advantages", "group"):
            assert torch.equal(ours[name], theirs[name]), name


# -- as configuration ----------------------------------------------------------------------------------------------------------


def prepared(folder: Path, **changes: Any) -> Any:
    tree = {
        "method": "grpo", "model": {"path": "asset:tiny_llama"}, "data": {"path": "asset:arithmetic", "limit": 16},
        "rewards": [{"name": "regex_match", "pattern": "[0-9]"}, {"name": "overlong", "max_length": 6, "cache_length": 3}],
        "sampling": {"max_new_tokens": 6}, "batch": {"prompts_per_rollout": 4, "completions_per_prompt": 4}, "steps": 2,
        "dynamic_sampling": {"filter_on": "regex_match"}, **changes,
    }
    planned = make_plan({**tree, "run_dir": str(folder)}, config_folder=folder).stages[0]
    method = METHODS.get(planned.kind)
    return prepare_training(method, parse(method.options, planned.tree), folder=folder, seed=0, config_folder=folder,
                            fingerprint="", quiet=True)


def test_a_language_model_with_surplus_is_not_taken_for_on_policy(tmp_path: Path) -> None:
    made = prepared(tmp_path)
    assert not made.parts.objective.on_policy
    result = made.loop.run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert result.step == 2
    assert all(line["dynamic_sampling/filled"] == 1 and line["groups/zero_spread"] < 1 for line in lines)
    saved = load_state(sorted((tmp_path / "checkpoints").iterdir())[-1], name="rank0")["experience"]["dynamic_sampling"]
    restored = made.parts.experience.dynamic
    before: Tensor | None = None if restored.surplus is None else restored.surplus.old_logp
    restored.load_state_dict(saved)
    assert (restored.surplus is None) == (before is None)
    if before is not None:
        assert torch.equal(restored.surplus.old_logp, before)


@pytest.mark.parametrize(("changes", "message"), [
    ({"dynamic_sampling": {"filter_on": "accuracy"}}, r"dynamic_sampling\.filter_on: there is no reward 'accuracy'"),
    ({"dynamic_sampling": {"max_rounds": 0}}, r"dynamic_sampling.*max_rounds must be at least 1"),
    ({"dynamic_sampling": {"mode": "best"}}, r"dynamic_sampling\.mode"),
    ({"batch": {"prompts_per_rollout": 4, "completions_per_prompt": 1}, "advantage": "reinforce"},
     r"dynamic_sampling\.mode: spread"),
    ({"loss": "reinforce"}, "dynamic_sampling: groups left over"),
    ({"method": "ppo"}, "dynamic_sampling: a value function"),
])
def test_senseless_settings_are_refused_by_name(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        prepared(tmp_path, **changes)


def test_dapo_is_a_row_of_settings(tmp_path: Path) -> None:
    made = prepared(tmp_path, method="dapo", dynamic_sampling={"filter_on": "regex_match"}, loss={"clip_low": 0.1})
    loss = made.parts.objective.policy_loss
    assert loss.arguments == {"clip_low": 0.1, "clip_high": 0.28}
    assert loss.reduction == "token_mean"
    assert made.parts.objective.kl is None
    assert made.parts.experience.dynamic is not None
    plain = prepared(tmp_path / "plain", method="grpo", dynamic_sampling=None)
    assert plain.parts.experience.dynamic is None
    assert plain.parts.objective.on_policy
