"""Cache, image-reward adapter, and the probe."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.errors import ConfigError
from mmalign.rewards.adapters import cache, fingerprint, from_image_reward
from mmalign.rewards.base import RewardSet
from mmalign.rewards.probe import check_reward
from mmalign.rewards.registry import RewardOptions


def counting():
    calls: list[list[str]] = []

    def judge(prompts, completions, answer, *, factor=1.0, **kwargs):
        calls.append(list(completions))
        return [None if a is None else factor * len(c) for c, a in zip(completions, answer, strict=True)]

    return judge, calls


def test_cache_calls_only_for_what_is_new_and_keeps_none():
    judge, calls = counting()
    rewards = RewardSet([cache(judge)])
    first = rewards.score_samples(["p"] * 3, ["a", "bb", "a"], answer=["x", None, "x"])
    assert calls == [["a", "bb"]]
    assert first[:, 0].nan_to_num(-1).tolist() == [1, -1, 1]
    rewards.score_samples(["p"] * 3, ["a", "bb", "ccc"], answer=["x", None, "x"])
    rewards.score_samples(["other"], ["a"], answer=["x"])  # another prompt
    rewards.score_samples(["p"], ["a"], answer=["y"])  # another column
    assert calls[1:] == [["ccc"], ["a"], ["a"]]


def test_cache_key_holds_options_and_survives_on_disk(tmp_path):
    judge, calls = counting()
    path = tmp_path / "cache" / "judge.jsonl"
    arguments = {"prompts": ["p"], "completions": ["a"], "answer": ["x"]}
    assert cache(judge, path=path)(**arguments) == [1.0]
    assert cache(judge, path=path)(**arguments, factor=2.0) == [2.0]
    with path.open("a") as file:
        file.write('{"cut short')
    assert cache(path=path)(judge)(**arguments) == [1.0]
    assert len(calls) == 2


def test_cache_of_async_functions_and_by_option():
    calls = []

    async def judge(completions, **kwargs):
        calls.append(len(completions))
        return [1.0] * len(completions)

    cached = cache(judge)
    assert asyncio.run(cached(prompts=["p"], completions=["a"])) == [1.0] == asyncio.run(cached(prompts=["p"], completions=["a"]))
    assert calls == [1]
    assert RewardSet([RewardOptions(name="exact_match", cache=True)]).score_samples(["p"], ["a"], answer=["a"]).item() == 1


def test_cache_does_not_keep_nan_and_refuses_state():
    answers = iter([float("nan"), 3.0])
    flaky = cache(lambda completions: [next(answers) for _ in completions])
    assert np.isnan(flaky(completions=["a"])[0])
    assert flaky(completions=["a"]) == [3.0]
    with pytest.raises(ValueError, match="asks for trainer_state"):
        cache(lambda completions, trainer_state: [])


def test_fingerprint_sees_content():
    image, same, other = (Image.new("RGB", (4, 4), (c, 0, 0)) for c in (1, 1, 2))
    assert fingerprint(image) == fingerprint(same) != fingerprint(other)
    assert fingerprint(torch.zeros(2)) != fingerprint(torch.zeros(2, dtype=torch.float64)) != fingerprint(torch.zeros(2, 1))
    assert fingerprint([{"a": torch.ones(1)}]) == fingerprint([{"a": torch.ones(1)}])
    assert fingerprint(torch.ones(2, dtype=torch.bfloat16)) != fingerprint(torch.zeros(2, dtype=torch.bfloat16))
    assert fingerprint(torch.tensor(3.0)) == fingerprint(torch.tensor(3.0))


def test_image_rewards_of_the_diffusion_world():
    seen = {}

    def ddpo_style(images, prompts, metadata):
        seen.update(images=images, prompts=prompts, metadata=metadata)
        return np.array([0.25, 0.75], dtype=np.float32), {"info": 1}

    ddpo_style.accepts = "tensor"
    images = [Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), (255, 255, 255))]
    rewards = RewardSet([ddpo_style, from_image_reward(lambda images, prompts: [float(i.size[0]) for i in images], name="width")])
    values = rewards.score_samples(["a", "b"], images, tag=["x", "y"])
    assert values.tolist() == [[0.25, 4.0], [0.75, 4.0]]
    assert rewards.names == ["ddpo_style", "width"]
    assert seen["images"].shape == (2, 3, 4, 4)
    assert seen["prompts"] == ["a", "b"]
    assert seen["metadata"] == [{"tag": "x"}, {"tag": "y"}]


def test_probe_tries_text_messages_and_images():
    assert check_reward("answer_match").values == [1, 0, 0]
    assert check_reward(lambda completions: [float(len(c[0]["content"])) for c in completions]).form == "messages"
    assert check_reward("jpeg_compressibility").form == "images"
    assert "FAILED" not in str(check_reward({"name": "within_length", "max_length": 100}))


def test_probe_reports_what_would_go_wrong():
    state = iter(range(1000))
    assert any("not deterministic" in w for w in check_reward(lambda completions: [next(state) for _ in completions]).warnings)
    relative = check_reward(lambda completions: [len(c) / sum(map(len, completions)) if c else 0.0 for c in completions])
    assert any("scored alone" in w for w in relative.warnings)
    assert any("without spread" in w for w in check_reward(lambda completions: [1.0] * len(completions)).warnings)
    assert any("never apply" in w for w in check_reward(lambda completions: [None] * len(completions)).warnings)
    broken = check_reward(lambda completions, solution_column: [0.0])
    assert not broken.ok
    assert "solution_column" in str(broken)
    with pytest.raises(ConfigError, match="unknown reward"):
        check_reward("no_such_reward")


def test_probe_on_rows_of_a_data_set():
    rows = [{"prompt": f"{i}?", "answer": str(i), "extra": i} for i in range(5)]
    check = check_reward("answer_match", rows)
    assert check.form == "given"
    assert check.values == [1, 1, 1]
    assert not check_reward("answer_match", [{"prompt": "a", "completion": "b"}]).ok
    with pytest.raises(ConfigError, match="needs a prompt and a completion"):
        check_reward("answer_match", [{"question": "a"}])
