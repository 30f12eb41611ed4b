"""The same function objects in TRL's own reward plumbing and in ours."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmalign.data.rows import Rows
from mmalign.policies.base import Rollout
from mmalign.rewards.adapters import cache
from mmalign.rewards.base import RewardSet
from mmalign.rewards.maths import answer_match
from mmalign.rewards.text import format_tags

GRPOTrainer = pytest.importorskip("trl").GRPOTrainer

PROMPTS = [[{"role": "user", "content": f"q{i}"}] for i in range(4)]
TEXTS = ["<think>a</think><answer>1</answer>", "2", "the answer is 3", ""]
COMPLETIONS = [[{"role": "assistant", "content": text}] for text in TEXTS]
IDS = [[1, 2, 3], [4], [5, 6], []]
ANSWERS = ["1", "2", "4", None]


def everything(completions, prompts, completion_ids, answer, trainer_state, log_extra=None, log_metric=None, **kwargs):
    """What the TRL documentation shows in one function: ids, columns, state and both loggers."""
    log_extra("seen_answer", list(answer))
    log_metric("mean_length", sum(map(len, completion_ids)) / len(completion_ids))
    values = zip(completions, completion_ids, answer, strict=True)
    return [None if a is None else len(ids) + trainer_state.global_step * (a in c[0]["content"]) for c, ids, a in values]


async def judge(completions, **kwargs):
    await asyncio.sleep(0)
    return [float(len(c[0]["content"])) for c in completions]


class Length:
    """An object with state, named after its class."""

    def __call__(self, prompts, completions, **kwargs):
        return torch.tensor([float(len(c[0]["content"])) for c in completions])


def in_trl(functions: list[Any]) -> tuple[torch.Tensor, Any]:
    """Rewards of TRL's own ``GRPOTrainer._calculate_rewards`` on a trainer that has nothing but what it reads."""
    from trl.trainer.utils import get_callable_name

    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", is_main_process=True), state=SimpleNamespace(global_step=7), environments=None,
        reward_funcs=functions, reward_processing_classes=[None] * len(functions), args=SimpleNamespace(report_to=[]),
        reward_func_names=[get_callable_name(f) for f in functions], async_loop=loop,
        _pending_extra_logs=defaultdict(list), _pending_metrics=defaultdict(list),
    )
    trainer._log_completion_extra = GRPOTrainer._log_completion_extra.__get__(trainer)
    trainer._log_metric = GRPOTrainer._log_metric.__get__(trainer)
    inputs = [{"prompt": p, "answer": a} for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    calculate = GRPOTrainer._calculate_rewards
    rewards = getattr(calculate, "__wrapped__", calculate)(trainer, inputs, PROMPTS, COMPLETIONS, IDS)
    loop.call_soon_threadsafe(loop.stop)
    return rewards, trainer


def in_ours(functions: list[Any]) -> tuple[Rollout, RewardSet]:
    width = max(map(len, IDS))
    mask = torch.tensor([[i < len(ids) for i in range(width)] for ids in IDS])
    rollout = Rollout(
        PROMPTS, TEXTS, torch.arange(4), Rows({"completion_ids": IDS}), mask, torch.zeros(mask.shape), {"answer": ANSWERS},
    )
    rewards = RewardSet(functions)
    return rewards.score(rollout, trainer_state=SimpleNamespace(global_step=7)), rewards


def test_the_same_functions_give_the_same_rewards_names_and_logs():
    functions = [everything, judge, Length(), answer_match, format_tags, cache(judge)]
    theirs, trainer = in_trl(functions)
    scored, rewards = in_ours(functions)
    assert torch.equal(theirs.nan_to_num(-1), scored.rewards.nan_to_num(-1))
    assert theirs.isnan().sum() == 2 == scored.rewards.isnan().sum()
    assert list(scored.reward_names[:3]) == trainer.reward_func_names[:3] == ["everything", "judge", "Length"]
    assert scored.columns["seen_answer"] == trainer._pending_extra_logs["seen_answer"]
    assert rewards.metrics(scored)["mean_length"] == trainer._pending_metrics["mean_length"][0]


def test_functions_that_trl_ships():
    from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment, think_format_reward

    functions = [think_format_reward, get_soft_overlong_punishment(3, 2), get_repetition_penalty_reward(1)]
    theirs, _ = in_trl(functions)
    scored, _ = in_ours(functions)
    assert torch.equal(theirs, scored.rewards)
    assert scored.rewards[0].tolist() != [0.0, 0.0, 0.0]
