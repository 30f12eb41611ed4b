"""Scoring: the calling convention, composition, failures, metrics."""

from __future__ import annotations

import asyncio
import functools
import json
import math
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmalign.config import Options, parse
from mmalign.data.rows import Rows
from mmalign.errors import ConfigError, RewardError
from mmalign.policies.base import Rollout
from mmalign.rewards.base import BoundReward, RewardOptions, RewardSet, build_rewards, reward, traits
from mmalign.rewards.registry import REWARDS, load_object


def make_rollout(samples: list[Any], prompts: list[Any] | None = None, **columns: list[Any]) -> Rollout:
    count = len(samples)
    return Rollout(
        prompts or [f"p{i}" for i in range(count)], samples, torch.arange(count), Rows({}),
        torch.ones(count, 1, dtype=torch.bool), torch.zeros(count, 1), dict(columns),
    )


def length(completions, **kwargs):
    return [float(len(c)) for c in completions]


def test_scores_land_in_the_rollout_with_names_and_dtype():
    scored = RewardSet([length, "exact_match"]).score(make_rollout(["a", "bb"], answer=["a", "x"]))
    assert scored.rewards.dtype == torch.float32
    assert scored.rewards.tolist() == [[1.0, 1.0], [2.0, 0.0]]
    assert scored.reward_names == ("length", "exact_match")


def test_only_the_keywords_asked_for_are_passed():
    seen = {}

    def strict(completions, answer, missing=5):
        seen.update(completions=completions, answer=answer, missing=missing)
        return [0.0] * len(completions)

    def open_ended(prompts, completions, **kwargs):
        seen["open"] = sorted(kwargs)
        return [0.0] * len(completions)

    def wants_rollout(completions, rollout, trainer_state):
        seen["rollout"], seen["step"] = rollout, trainer_state.global_step
        return [0.0] * len(completions)

    rollout = make_rollout(["a"], answer=["x"], other=[3])
    RewardSet([strict, open_ended, wants_rollout]).score(rollout, step=7)
    assert seen["missing"] == 5
    assert seen["answer"] == ["x"]
    assert seen["open"] == ["answer", "log_extra", "log_metric", "other", "trainer_state"]
    assert seen["rollout"].samples == ["a"]
    assert seen["step"] == 7


def test_completion_ids_come_from_input_ids_and_labels():
    rollout = make_rollout(["a", "b"])
    rollout.rows = Rows({"input_ids": [[1, 2, 3], [4, 5]], "labels": [[-100, 2, 3], [-100, 5]]})
    got = []
    RewardSet([lambda completions, completion_ids: got.extend(completion_ids) or [0.0, 0.0]]).score(rollout)
    assert got == [[2, 3], [5]]


def test_completions_take_the_form_of_their_prompt():
    got = []

    def conversational(prompts, completions, **kwargs):
        got.extend(completions)
        return [1.0] * len(completions)

    RewardSet([conversational]).score(make_rollout(["hi"], prompts=[[{"role": "user", "content": "q"}]]))
    assert got == [[{"role": "assistant", "content": "hi"}]]


def test_missing_column_is_named_with_what_there_is():
    with pytest.raises(RewardError, match=r"'exact_match' needs answer.*columns are truth.*columns: \{answer"):
        RewardSet(["exact_match"]).score(make_rollout(["a"], truth=["a"]))


def test_renamed_and_aliased_columns():
    renamed = RewardSet([{"name": "exact_match", "columns": {"answer": "truth"}}])
    assert renamed.score(make_rollout(["a"], truth=["a"])).rewards.tolist() == [[1.0]]
    with pytest.raises(RewardError, match=r"columns.answer='nope' is not a data column; there are truth"):
        RewardSet([{"name": "exact_match", "columns": {"answer": "nope"}}]).score(make_rollout(["a"], truth=["a"]))

    def trl_style(completions, solution, **kwargs):  # the data layer renames solution to answer
        return [float(c == s) for c, s in zip(completions, solution, strict=True)]

    assert RewardSet([trl_style]).score(make_rollout(["a"], answer=["a"])).rewards.tolist() == [[1.0]]


def test_none_is_nan_in_the_rewards_and_left_out_of_total_and_metrics():
    def sometimes(completions, **kwargs):
        return [None if c == "skip" else 2.0 for c in completions]

    rewards = RewardSet([sometimes, length], [0.5, 1.0])
    scored = rewards.score(make_rollout(["skip", "xyz"]))
    assert scored.rewards[0, 0].isnan()
    assert rewards.total(scored).tolist() == [4.0, 4.0]
    metrics = rewards.metrics(scored)
    assert metrics["rewards/sometimes/mean"] == 2.0
    assert metrics["rewards/sometimes/none_fraction"] == 0.5
    assert metrics["rewards/length/std"] == pytest.approx(math.sqrt(0.5))
    assert metrics["reward"] == 4.0
    assert metrics["rewards/length/seconds"] >= 0


def test_a_sample_that_nothing_applies_to_has_no_total_even_when_a_watched_reward_does():
    def never(completions, **kwargs):
        return [None] * len(completions)

    rewards = RewardSet([never, length], [1.0, 0.0])
    assert rewards.total(rewards.score(make_rollout(["a"]))).isnan().all()


@given(st.lists(st.lists(st.one_of(st.none(), st.floats(-9, 9, width=32)), min_size=3, max_size=3), min_size=1, max_size=6))
def test_total_is_the_weighted_sum_of_what_applies(table):
    weights = [1.0, -0.5, 2.0]
    functions = [lambda completions, k=k: [table[int(c)][k] for c in completions] for k in range(3)]
    rewards = RewardSet(functions, weights)
    total = rewards.total(rewards.score(make_rollout([str(i) for i in range(len(table))])))
    for row, value in zip(table, total.tolist(), strict=True):
        present = [w * v for w, v in zip(weights, row, strict=True) if v is not None]
        assert math.isnan(value) if not present else value == pytest.approx(sum(present), abs=1e-4)


def test_async_rewards_run_at_the_same_time():
    waiting = threading.Barrier(2, timeout=5)  # breaks unless both are inside at once

    async def judge(completions, **kwargs):
        await asyncio.to_thread(waiting.wait)
        return [1.0] * len(completions)

    class Judge:
        async def __call__(self, completions, **kwargs):
            await asyncio.to_thread(waiting.wait)
            return [2.0] * len(completions)

    rewards = RewardSet([judge, Judge(), length])
    assert rewards.score(make_rollout(["a"])).rewards.tolist() == [[1.0, 2.0, 1.0]]
    assert rewards.names == ["judge", "Judge", "length"]
    rewards.close()


def test_async_rewards_work_inside_a_running_loop():
    async def judge(completions, **kwargs):
        await asyncio.sleep(0)
        return [1.0] * len(completions)

    async def notebook_cell():
        return RewardSet([functools.partial(judge)]).score(make_rollout(["a"]))

    assert asyncio.run(notebook_cell()).rewards.tolist() == [[1.0]]


def raising(completions, **kwargs):
    if any(c == "bad" for c in completions):
        raise KeyError("cannot parse this one")
    return [1.0] * len(completions)


@pytest.mark.parametrize("position", [0, 3, 6])
def test_a_raising_reward_stops_with_the_sample_on_disk(tmp_path, position):
    samples = ["ok"] * 7
    samples[position] = "bad"
    rewards = RewardSet([raising], dump_dir=tmp_path)
    with pytest.raises(RewardError, match=f"raised KeyError.*sample {position} of 7.*written to"):
        rewards.score(make_rollout(samples, answer=list(range(7))))
    record = json.loads((tmp_path / "reward_failure_raising_0.json").read_text())
    assert record["completion"] == "bad"
    assert record["columns"] == {"answer": position}
    assert "cannot parse this one" in record["traceback"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "text", [1.0]])
def test_values_that_are_not_finite_numbers_stop_the_run(value):
    with pytest.raises(RewardError, match="sample 1 of 2"):
        RewardSet([lambda completions: [0.0, value]]).score(make_rollout(["a", "b"]))


def test_failures_may_be_dropped_or_take_the_lowest_value():
    dropped = RewardSet([raising], on_error="drop")
    scored = dropped.score(make_rollout(["ok", "bad", "ok"]))
    assert scored.rewards[:, 0].isnan().tolist() == [False, True, False]
    assert dropped.metrics(scored)["rewards/raising/failed"] == 1

    def ranged(completions, **kwargs):
        return [math.nan if c == "bad" else 0.5 for c in completions]

    ranged.range = (-2.0, 1.0)
    assert RewardSet([ranged], on_error="lowest").score(make_rollout(["ok", "bad"])).rewards.tolist() == [[0.5], [-2.0]]
    assert RewardSet([raising], on_error="lowest").score(make_rollout(["ok", "bad"])).rewards.tolist() == [[1.0], [1.0]]
    with pytest.raises(RewardError, match="no lowest value"):
        RewardSet([raising], on_error="lowest").score(make_rollout(["bad"]))


def test_failing_images_are_written_as_png(tmp_path):
    def picky(completions, **kwargs):
        raise ValueError("no")

    image = Image.new("RGB", (4, 4), (255, 0, 0))
    with pytest.raises(RewardError):
        RewardSet([picky], dump_dir=tmp_path).score(make_rollout([image]))
    record = json.loads((tmp_path / "reward_failure_picky_0.json").read_text())
    assert Image.open(tmp_path / record["completion"]["image"]).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("result", "message"),
    [([1.0], "returned 1 values for 2 samples"), (None, "returned NoneType"), (torch.zeros(2, 1), r"shape \(2, 1\)")],
)
def test_a_broken_contract_stops_whatever_on_error_says(result, message):
    with pytest.raises(RewardError, match=message):
        RewardSet([lambda completions: result], on_error="drop").score(make_rollout(["a", "b"]))


def test_values_outside_the_declared_range_stop_the_run():
    def liar(completions, **kwargs):
        return [3.0 for _ in completions]

    liar.range = (0, 1)
    with pytest.raises(RewardError, match="outside its declared range"):
        RewardSet([liar]).score(make_rollout(["a"]))


def test_images_arrive_in_the_form_the_reward_accepts():
    forms = {}

    def pil(completions, **kwargs):
        forms["pil"] = [type(c).__name__ for c in completions]
        return [0.0] * len(completions)

    def tensor(completions, **kwargs):
        forms["tensor"] = completions
        return completions.mean((1, 2, 3))

    tensor.accepts = "tensor"
    image = Image.new("RGB", (4, 2), (255, 0, 0))
    scored = RewardSet([pil, tensor]).score(make_rollout([image, torch.zeros(3, 2, 4)]))
    assert forms["pil"] == ["Image", "Image"]
    assert forms["tensor"].shape == (2, 3, 2, 4)
    assert scored.rewards[:, 1].tolist() == pytest.approx([1 / 3, 0.0])
    with pytest.raises(RewardError, match="sizes differ"):
        RewardSet([tensor]).score(make_rollout([image, torch.zeros(3, 4, 4)]))


def test_extra_columns_and_metrics_are_logged_even_when_a_sample_fails():
    def verbose(completions, log_extra, log_metric, **kwargs):
        if "bad" in completions:
            raise ValueError
        log_extra("parsed", [c.upper() for c in completions])
        log_metric("judged", len(completions))
        return [0.0] * len(completions)

    rewards = RewardSet([verbose], on_error="drop")
    scored = rewards.score(make_rollout(["a", "b", "bad", "c"]))
    assert scored.columns["parsed"] == ["A", "B", None, "C"]
    assert rewards.metrics(scored)["judged"] == 1.5  # calls with ["a", "b"] and ["c"]


class Config(Options):
    rewards: list[RewardOptions]
    """Rewards."""


def test_configuration_items(tmp_path: Path):
    (tmp_path / "helper.py").write_text("FACTOR = 3.0\n")
    (tmp_path / "mine.py").write_text(textwrap.dedent("""
        from helper import FACTOR

        def score(completions, solution, offset=0.0, **kwargs):
            return [FACTOR * len(c) + offset for c in completions]

        class Threshold:
            def __init__(self, at, label="x"):
                self.at = at

            def __call__(self, completions, **kwargs):
                return [float(len(c) > self.at) for c in completions]

        class Configured:
            @classmethod
            def from_config(cls, **options):
                return lambda completions, **kwargs: [options["value"] for _ in completions]
    """))
    config = parse(Config, {"rewards": [
        "exact_match", {"name": "mine.py:score", "offset": 1, "weight": 2, "label": "mine"},
        {"name": "mine.py:Threshold", "at": 1}, {"name": "mine.py:Configured", "value": 9.0},
    ]})
    rewards = build_rewards(config.rewards, config_folder=tmp_path)
    scored = rewards.score(make_rollout(["ab"], answer=["ab"]))
    assert scored.rewards.tolist() == [[1.0, 7.0, 1.0, 9.0]]
    assert rewards.weights.tolist() == [1.0, 2.0, 1.0, 1.0]
    assert rewards.names[1] == "mine"


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"name": "exact_macht"}, "did you mean 'exact_match'.*file.py:function"),
        ({"name": "regex_match", "patern": "x"}, r"rewards.0.patern: unknown key; did you mean rewards.0.pattern\?"),
        ({"name": "regex_match"}, "needs rewards.0.pattern"),
        ({"name": "exact_match", "answer": "x"}, "rewards.0.answer: unknown key"),
        ({"name": "nofile.py:f"}, "'nofile.py' does not exist"),
        ({"name": "no_such_module:f"}, "not installed"),
        ({"name": "json:nothing"}, "has no 'nothing'; callables in it"),
        ({"name": "math:pi"}, "is a float, not a function"),
        ({"name": "clip_score", "model": "x", "scales": 2}, "did you mean rewards.0.scale"),
    ],
)
def test_configuration_errors_name_the_key(item, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        build_rewards([RewardOptions.model_validate(item)], config_folder=tmp_path)


def test_an_option_of_a_file_function_is_checked(tmp_path):
    (tmp_path / "closed.py").write_text("def f(completions, scale=1.0):\n    return [scale for _ in completions]\n")
    with pytest.raises(ConfigError, match=r"did you mean rewards.0.scale"):
        build_rewards([RewardOptions(name="closed.py:f", scael=2)], config_folder=tmp_path)


def test_set_level_refusals():
    with pytest.raises(ConfigError, match="at least one reward"):
        RewardSet([])
    with pytest.raises(ConfigError, match="every weight is 0"):
        RewardSet([length], [0.0])
    with pytest.raises(ConfigError, match="2 weights for 1 rewards"):
        RewardSet([length], [1.0, 2.0])
    with pytest.raises(ConfigError, match="on_error='skip'"):
        RewardSet([length], on_error="skip")  # type: ignore[arg-type]
    with pytest.raises(RewardError, match="positional-only"):
        RewardSet([lambda completions, /: []])
    assert RewardSet([length, length]).names == ["length", "length_2"]


def test_registered_traits_and_lookup():
    @reward("test_only_reward", range=(0, 1), needs=("answer",), aliases=("test-alias",))
    def function(prompts, completions, answer, **columns):
        return [0.5] * len(completions)

    assert REWARDS.get("test_alias") is function is load_object("test-only-reward")
    assert traits(functools.partial(function)).needs == ("answer",)
    assert BoundReward(function).label == "test_only_reward"


def test_gradient_reaches_the_images_through_differentiable_rewards_only():
    def brightness(prompts, completions, **kwargs):
        return completions.mean((1, 2, 3))

    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    with pytest.raises(RewardError, match="'brightness' is not differentiable"):
        RewardSet([brightness]).score_with_gradient(["a", "b"], images)
    brightness.differentiable, brightness.accepts = True, "tensor"
    RewardSet([brightness, length], [3.0, 0.0]).score_with_gradient(["a", "b"], images).sum().backward()
    assert torch.allclose(images.grad, torch.full_like(images, 3.0 / 48))


def test_state_of_rewards_that_have_one():
    class Counting:
        def __init__(self):
            self.calls = 0

        def __call__(self, completions, **kwargs):
            self.calls += 1
            return [float(self.calls)] * len(completions)

        def state_dict(self):
            return {"calls": self.calls}

        def load_state_dict(self, state):
            self.calls = state["calls"]

    first, second = RewardSet([Counting(), length]), RewardSet([Counting(), length])
    first.score(make_rollout(["a"]))
    second.load_state_dict(first.state_dict())
    assert second.score(make_rollout(["a"])).rewards[0, 0] == 2.0


def test_samples_without_a_rollout():
    values = RewardSet(["exact_match"]).score_samples(["p"], ["a"], answer=["a"])
    assert values.tolist() == [[1.0]]
    with pytest.raises(RewardError, match="answer holds 2 values for 1 completions"):
        RewardSet(["exact_match"]).score_samples(["p"], ["a"], answer=["a", "b"])
