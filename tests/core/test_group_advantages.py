"""Advantage estimators, running statistics, GAE and reward shaping."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.core.advantages import (
    ADVANTAGES,
    PromptStatistics,
    RunningMean,
    combine_rewards,
    discounted_cumsum,
    flat_groups,
    gae,
    group_advantages,
    group_filter,
    overlong_penalty,
    shape_rewards,
    whiten,
)

GROUPED = ("grpo", "dr_grpo", "rloo", "grpo_batch_std")


def rewards_and_groups(groups=4, size=5, seed=0):
    rewards = torch.randn(groups * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rewards, torch.arange(groups).repeat_interleave(size)


def test_closed_forms():
    rewards, group = torch.tensor([1.0, 2.0, 3.0, 10.0, 10.0, 40.0]), torch.tensor([0, 0, 0, 1, 1, 1])
    std = math.sqrt(300)
    expected = {
        "dr_grpo": [-1, 0, 1, -10, -10, 20], "rloo": [-1.5, 0, 1.5, -15, -15, 30],
        "grpo": [-1 / 1.0001, 0, 1 / 1.0001, -10 / (std + 1e-4), -10 / (std + 1e-4), 20 / (std + 1e-4)],
        "reinforce": [-10, -9, -8, -1, -1, 29],
    }
    for name, values in expected.items():
        torch.testing.assert_close(ADVANTAGES.get(name)(rewards, group), torch.tensor(values, dtype=torch.float32), msg=name)
    whitened = ADVANTAGES.get("reinforce_pp_baseline")(rewards, group)
    assert whitened.mean().item() == pytest.approx(0, abs=1e-6)
    assert whitened.std().item() == pytest.approx(1)
    greedy = torch.tensor([2.0, 2.0, 2.0, math.nan, 10.0, 10.0])
    assert ADVANTAGES.get("remax")(rewards, group, greedy=greedy).tolist() == [-1, 0, 1, 0, 0, 30]


def test_reinforce_pp_counts_rows_by_their_actions():
    """The same as writing every row's advantage on each of its actions and whitening those."""
    rewards, group = rewards_and_groups(seed=5)
    rewards[3] = math.nan
    actions = torch.randint(1, 9, (len(rewards),), generator=torch.Generator().manual_seed(1))
    actions[3] = 4
    ours = ADVANTAGES.get("reinforce_pp_baseline")(rewards, group, actions=actions)
    centred = group_advantages(rewards, group, scale="none").double()
    spread_out = torch.cat([centred[i].expand(int(n)) for i, n in enumerate(actions) if i != 3])
    expected = (centred - spread_out.mean()) / (spread_out.std() + 1e-8)
    expected[3] = 0
    torch.testing.assert_close(ours, expected.float())
    by_rows = ADVANTAGES.get("reinforce_pp_baseline")(rewards, group, actions=actions, over="rows")
    assert not torch.allclose(ours, by_rows)
    torch.testing.assert_close(by_rows, ADVANTAGES.get("reinforce_pp_baseline")(rewards, group))


class TestRunningMean:
    def test_the_baseline_is_of_the_batches_before(self):
        estimator = RunningMean(decay=0.5)
        assert estimator.update(["a", "b"], torch.tensor([1.0, 3.0])).tolist() == [-1.0, 1.0]  # nothing before: its own mean
        assert estimator.update(["a", "b"], torch.tensor([4.0, 8.0])).tolist() == [2.0, 6.0]
        assert estimator.update(["c"], torch.tensor([0.0])).tolist() == [-4.0]

    def test_rewards_that_do_not_apply_leave_no_trace(self):
        estimator = RunningMean()
        assert estimator.update(["a"], torch.tensor([math.nan])).tolist() == [0.0]
        assert estimator.update(["a", "b"], torch.tensor([2.0, math.nan])).tolist() == [0.0, 0.0]
        assert estimator.value == 2.0

    def test_state_restores(self):
        estimator, other = RunningMean(), RunningMean()
        estimator.update(["a"], torch.tensor([2.0]))
        other.load_state_dict(estimator.state_dict())
        values = torch.tensor([5.0, -1.0])
        assert torch.equal(estimator.update(["a", "b"], values), other.update(["a", "b"], values))

    def test_refusals(self):
        with pytest.raises(ValueError, match="decay"):
            RunningMean(decay=1.0)
        with pytest.raises(ValueError, match="infinite"):
            RunningMean().update(["a"], torch.tensor([math.inf]))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), shift=st.floats(-5, 5), scale=st.floats(0.1, 10))
def test_invariances(seed, shift, scale):
    rewards, group = rewards_and_groups(seed=seed)
    for name in GROUPED:
        estimate = ADVANTAGES.get(name)
        value = estimate(rewards, group)
        sums = torch.zeros(4).index_add(0, group, value)
        torch.testing.assert_close(sums, torch.zeros(4), atol=1e-4, rtol=0)
        torch.testing.assert_close(estimate(rewards + shift, group), value, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        group_advantages(rewards * scale + shift, group, eps=0.0), group_advantages(rewards, group, eps=0.0), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(ADVANTAGES.get("rloo")(rewards, group), 5 / 4 * ADVANTAGES.get("dr_grpo")(rewards, group))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), name=st.sampled_from(GROUPED))
def test_permuting_rows_permutes_advantages_and_ids_do_not_matter(seed, name):
    rewards, group = rewards_and_groups(seed=seed)
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))
    value = ADVANTAGES.get(name)(rewards, group)
    torch.testing.assert_close(ADVANTAGES.get(name)(rewards[order], group[order]), value[order])
    torch.testing.assert_close(ADVANTAGES.get(name)(rewards, 100 - 7 * group), value)


def test_flat_groups_are_decided_by_equality_not_by_the_std():
    """0.35 is not a float: sums of it leave a std of 1e-9, which a small eps would blow up."""
    residue = torch.tensor([0.35, 0.35, 0.35 + 1e-9, 0.35, 0.0, 0.0, 0.0, 1e-3], dtype=torch.float64)
    group = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    for name in GROUPED:
        assert ADVANTAGES.get(name)(residue, group)[:4].tolist() == [0.0] * 4, name
    assert flat_groups(residue, group).tolist() == [True] * 4 + [False] * 4
    seven_to_one = torch.tensor([0.35] * 7 + [0.7])
    value = ADVANTAGES.get("grpo")(seven_to_one, torch.zeros(8, dtype=torch.long))
    assert value.abs().max() < 3


def test_rewards_that_do_not_apply_stay_out_of_the_baseline():
    rewards, group = torch.tensor([1.0, 3.0, math.nan, math.nan]), torch.tensor([0, 0, 0, 1])
    value = group_advantages(torch.cat([rewards, torch.tensor([math.nan])]), torch.cat([group, torch.tensor([1])]), scale="none")
    assert value.tolist() == [-1.0, 1.0, 0.0, 0.0, 0.0]


def test_refusals():
    with pytest.raises(ValueError, match="single row"):
        ADVANTAGES.get("grpo")(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match="infinite"):
        ADVANTAGES.get("grpo")(torch.tensor([1.0, math.inf]), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="shapes"):
        ADVANTAGES.get("grpo")(torch.zeros(2), torch.zeros(3, dtype=torch.long))


class TestPromptStatistics:
    def test_batch_statistics_until_a_prompt_has_enough_values(self):
        tracker = PromptStatistics(buffer_size=4, min_count=3)
        first = tracker.update(["a", "b"], torch.tensor([1.0, 3.0]))
        torch.testing.assert_close(first, torch.tensor([-1.0, 1.0]))
        second = tracker.update(["a", "a"], torch.tensor([2.0, 6.0]))
        history = torch.tensor([1.0, 2.0, 6.0])
        expected = (torch.tensor([2.0, 6.0]) - history.mean()) / (history.std(correction=0) + 1e-6)
        torch.testing.assert_close(second, expected)

    def test_buffer_forgets_the_oldest(self):
        tracker = PromptStatistics(buffer_size=2, min_count=1)
        tracker.update(["a"], torch.tensor([100.0]))
        value = tracker.update(["a", "a"], torch.tensor([0.0, 2.0]))
        torch.testing.assert_close(value, torch.tensor([-1.0, 1.0]))

    def test_state_restores(self):
        tracker = PromptStatistics(min_count=2)
        tracker.update(["a", "a", "b"], torch.tensor([1.0, 2.0, 5.0]))
        other = PromptStatistics(min_count=2)
        other.load_state_dict(tracker.state_dict())
        new = (["a", "b"], torch.tensor([3.0, 1.0]))
        assert torch.equal(other.update(*new), tracker.update(*new))

    def test_integer_rewards_are_not_truncated_and_flat_prompts_give_zero(self):
        tracker = PromptStatistics(min_count=1)
        expected = torch.tensor([2**0.5, -(0.5**0.5), -(0.5**0.5)])
        torch.testing.assert_close(tracker.update(["a", "a", "a"], torch.tensor([1, 0, 0])), expected, rtol=1e-5, atol=0)
        assert PromptStatistics(min_count=1).update(["a", "a"], torch.tensor([7, 7])).tolist() == [0.0, 0.0]

    def test_refusals(self):
        with pytest.raises(ValueError, match="buffer_size"):
            PromptStatistics(buffer_size=0)
        with pytest.raises(ValueError, match="2 prompts but 1"):
            PromptStatistics().update(["a", "b"], torch.zeros(1))


def direct_gae(rewards, values, gamma, lam):
    n = len(rewards)
    following = [*values[1:], 0.0]
    delta = [rewards[t] + gamma * following[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]


@settings(max_examples=30, deadline=None)
@given(mask=st.lists(st.booleans(), min_size=1, max_size=7), gamma=st.floats(0, 1), lam=st.floats(0, 1), seed=st.integers(0, 99))
def test_gae_equals_the_definition_on_the_actions_that_count(mask, gamma, lam, seed):
    g = torch.Generator().manual_seed(seed)
    keep = torch.tensor([mask])
    rewards, values = (torch.randn(1, len(mask), generator=g, dtype=torch.float64) for _ in range(2))
    advantages, returns = gae(rewards, values, keep, gamma=gamma, lam=lam)
    expected = direct_gae(rewards[keep].tolist(), values[keep].tolist(), gamma, lam)
    torch.testing.assert_close(advantages[keep], torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(returns[keep], (advantages + values)[keep])
    assert advantages[~keep].eq(0).all()


def test_gae_limits():
    rewards, mask = torch.tensor([[0.0, 0.0, 5.0]]), torch.ones(1, 3)
    zero = torch.zeros(1, 3)
    assert gae(rewards, zero, mask, gamma=1.0, lam=1.0)[0].tolist() == [[5.0, 5.0, 5.0]]
    values = torch.tensor([[1.0, 2.0, 3.0]])
    assert gae(rewards, values, mask, gamma=1.0, lam=0.0)[0].tolist() == [[1.0, 1.0, 2.0]]
    assert gae(rewards, values, mask, gamma=0.5, lam=1.0)[0].tolist() == [[0.25, 0.5, 2.0]]


def test_discounted_cumsum_skips_masked_actions():
    x, mask = torch.tensor([[1.0, 9.0, 2.0, 4.0]]), torch.tensor([[1, 0, 1, 1]])
    assert discounted_cumsum(x, mask, 0.5).tolist() == [[3.0, 0.0, 4.0, 4.0]]


def test_whiten():
    x, mask = torch.tensor([[1.0, 3.0, 99.0], [5.0, 98.0, 97.0]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert whiten(x, mask).tolist() == [[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    assert whiten(x, torch.zeros(2, 3)).eq(0).all()


def test_shape_rewards_puts_the_task_reward_on_the_last_action():
    kl, mask = torch.ones(3, 3), torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    shaped = shape_rewards(torch.tensor([10.0, 20.0, 30.0]), kl, mask, kl_coef=0.5)
    assert shaped.tolist() == [[-0.5, 9.5, 0.0], [-0.5, -0.5, 19.5], [0.0, 0.0, 0.0]]


def test_overlong_penalty():
    lengths = torch.tensor([1, 60, 80, 100, 200])
    assert overlong_penalty(lengths, max_length=100, cache=40).tolist() == [0.0, 0.0, -0.5, -1.0, -1.0]
    for cache in (0, 101):
        with pytest.raises(ValueError, match="cache"):
            overlong_penalty(lengths, max_length=100, cache=cache)


def test_group_filter():
    rewards, group = torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.2, 0.3]), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    assert group_filter(rewards, group, mode="any").tolist() == [False, True, True, True]
    assert group_filter(rewards, group, mode="mixed").tolist() == [False, True, False, False]
    assert group_filter(rewards, group, mode="spread").tolist() == [False, True, False, True]
    assert group_filter(rewards, group, mode="any", threshold=0.25).tolist() == [False, True, True, True]
    with pytest.raises(ValueError, match="mode"):
        group_filter(rewards, group, mode="all")


class TestCombineRewards:
    rewards = torch.tensor([[1.0, 10.0], [3.0, math.nan], [math.nan, math.nan], [5.0, 30.0]])

    def test_weighted_sum_of_what_applies(self):
        total = combine_rewards(self.rewards, torch.tensor([1.0, 0.1]))
        assert total[[0, 1, 3]].tolist() == [2.0, 3.0, 8.0]
        assert total[2].isnan()

    def test_normalise_then_sum(self):
        rewards, group = torch.tensor([[0.0, 0.0], [1.0, 100.0], [0.0, 0.0], [3.0, 0.0]]), torch.tensor([0, 0, 1, 1])
        total = combine_rewards(rewards, torch.ones(2), mode="normalize_then_sum", group=group)
        torch.testing.assert_close(total, torch.tensor([-2.0, 2.0, -1.0, 1.0]) * 0.5**0.5, rtol=1e-3, atol=0)

    def test_refusals(self):
        with pytest.raises(ValueError, match="group"):
            combine_rewards(self.rewards, torch.ones(2), mode="normalize_then_sum")
        with pytest.raises(ValueError, match="weights"):
            combine_rewards(self.rewards, torch.ones(3))
