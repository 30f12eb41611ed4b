"""What a user gets wrong is refused by name before any work starts, and nothing half-written is left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmalign.data.assets import asset_path
from mmalign.errors import CheckpointError, ConfigError, DataError, MmalignError, RewardError
from mmalign.stages import make_plan, run_plan

Tree = dict[str, Any]


def sft(**extra: Any) -> Tree:
    return {"method": "sft", "model": {"path": "asset:tiny_llama"}, "data": {"path": "asset:arithmetic", "limit": 8},
            "batch": {"examples_per_update": 4}, "steps": 2, **extra}


def dpo(**extra: Any) -> Tree:
    return {**sft(), "method": "dpo", "data": {"path": "asset:arithmetic", "limit": 8, "arguments": {"pairs": True}}, **extra}


def grpo(**extra: Any) -> Tree:
    return {"method": "grpo", "model": {"path": "asset:tiny_llama"}, "data": {"path": "asset:arithmetic", "limit": 8},
            "rewards": [{"name": "answer_match"}], "sampling": {"max_new_tokens": 4}, "steps": 2,
            "batch": {"prompts_per_rollout": 2, "completions_per_prompt": 2}, **extra}


TWO_REWARDS = [{"name": "answer_match"}, {"name": "within_length", "max_length": 9}]


def run(tree: Tree, folder: Path) -> Any:
    return run_plan(make_plan({**tree, "run_dir": str(folder / "run")}, config_folder=folder), quiet=True)


def refused(tree: Tree, folder: Path, error: type[MmalignError], *parts: str) -> str:
    with pytest.raises(error) as caught:
        run(tree, folder)
    message = str(caught.value)
    for part in parts:
        assert part in message, message
    assert not (folder / "run" / "model").exists()
    assert not (folder / "run" / "checkpoints").exists()
    return message


@pytest.mark.parametrize(("tree", "parts"), [
    (sft(stepz=3), ["stepz", "did you mean steps"]),
    (sft(optimizers=[{"learning_rate": 1.0}]), ["optimizers", "learning_rate", "Known"]),
    (sft(tuning={"name": "lorra"}), ["tuning.name", "lora"]),
    (sft(tuning={"name": "lora", "rnk": 4}), ["tuning.rnk"]),
    (sft(losses=[{"name": "nl"}]), ["losses[0].name", "nll"]),
    (dpo(losses=[{"name": "sigmod"}]), ["losses[0].name", "sigmoid"]),
    (dpo(losses=[{"name": "sigmoid", "betta": 1.0}]), ["losses[0].betta", "beta"]),
    (grpo(loss={"name": "ppo_clip", "clip_lo": 0.1}), ["loss.clip_lo", "clip_low"]),
    (grpo(advantage={"name": "grpoo"}), ["advantage.name", "grpo"]),
    (grpo(kl={"coef": 0.1, "estimator": "k1"}), ["kl", "k1", "gradient"]),
    (grpo(advantage={"name": "reinforce", "baseline": "ema"}), ["advantage.baseline", "ema", "batch_mean"]),
    (grpo(advantage={"name": "running_mean", "decay": 1.5}), ["advantage.decay", "1.5"]),
    (grpo(loss={"name": "reinforce"}, batch={"prompts_per_rollout": 2, "completions_per_prompt": 2, "examples_per_update": 2}),
     ["loss.name", "reinforce", "2 updates"]),
    (grpo(loss={"name": "gspo", "reduction": "token_mean"}), ["loss.reduction", "token_mean", "seq_mean_token_mean"]),
    (grpo(reward_combination="normalize_then_sum"), ["reward_combination", "only one"]),
    (grpo(reward_combination="normalize_then_sum", rewards=TWO_REWARDS), ["advantage.name", "grpo", "reinforce_pp_baseline"]),
    (grpo(reward_combination="normalize_then_sum", rewards=TWO_REWARDS,
          advantage={"name": "dr_grpo"}, kl={"coef": 0.1, "placement": "sequence_reward"}), ["kl.placement", "sequence_reward"]),
    (grpo(sampling={"min_new_tokens": 2}), ["sampling.min_new_tokens"]),
    (grpo(sampling={"temperature": 0}), ["sampling.temperature"]),
    (grpo(sampling={"top_p": 0.9}), ["sampling.top_p"]),
    (grpo(batch={"prompts_per_rollout": 2, "completions_per_prompt": 1}), ["completions_per_prompt"]),
    (grpo(rewards=[]), ["rewards"]),
    (grpo(rewards=[{"name": "answer_mach"}]), ["answer_mach", "answer_match"]),
    (sft(steps=2, epochs=1), ["steps", "epochs"]),
    ({**sft(), "method": "sfft"}, ["method", "sft"]),
    (sft(model={"path": "asset:tiny_lama"}), ["tiny_lama", "tiny_llama"]),
    (sft(model={"path": "./nowhere"}), ["model.path", "nowhere"]),
])
def test_unknown_or_senseless_options_name_the_key(tree: Tree, parts: list[str], tmp_path: Path) -> None:
    refused(tree, tmp_path, MmalignError, *parts)


def rows(folder: Path, examples: list[dict[str, Any]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(("make", "examples", "parts"), [
    (dpo, [{"prompt": "a", "chosen": "b"}], ["rejected", "chosen"]),
    (sft, [{"question_text": "a", "reply": "b"}], ["question_text"]),
    (sft, [], ["data.path"]),
    (sft, [{"prompt": "word " * 5000, "completion": "cut off"}] * 4, ["prompt", "max_length"]),
    (dpo, [{"prompt": "a", "chosen": "same", "rejected": "same"}] * 4, ["identical"]),
    (grpo, [{"completion": "no prompt here"}] * 4, ["prompt"]),
    (grpo, [{"prompt": "long " * 4000, "answer": "1"}] * 4, ["window"]),
])
def test_data_that_cannot_be_used_names_the_column_or_the_reason(
    make: Callable[..., Tree], examples: list[dict[str, Any]], parts: list[str], tmp_path: Path,
) -> None:
    refused(make(data={"path": rows(tmp_path, examples)}), tmp_path, DataError, *parts)


REWARDS = '''
def short(prompts, completions, **columns):
    return [1.0] * (len(prompts) - 1)

def nan(prompts, completions, **columns):
    return [float("nan")] * len(prompts)

def text(prompts, completions, **columns):
    return ["good"] * len(prompts)

def broken(prompts, completions, **columns):
    raise KeyError("no such column")
'''


@pytest.mark.parametrize(("function", "parts"), [
    ("short", ["short", "3", "4"]), ("nan", ["nan"]), ("text", ["text", "good"]), ("broken", ["broken", "no such column"]),
])
def test_rewards_that_fail_stop_the_run_with_the_sample_on_disk(function: str, parts: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(REWARDS)
    refused(grpo(rewards=[{"name": f"mine.py:{function}"}]), tmp_path, RewardError, *parts)


def test_missing_reward_function_is_named_before_the_model_loads(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(REWARDS)
    refused(grpo(rewards=[{"name": "mine.py:nothing"}]), tmp_path, ConfigError, "nothing", "mine.py")


def test_corrupt_and_incomplete_model_folders_are_named(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(asset_path("tiny_llama"), model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(sft(model={"path": str(model)}), tmp_path, CheckpointError, str(model))
    for file in model.iterdir():
        file.unlink()
    refused(sft(model={"path": str(model)}), tmp_path, CheckpointError, "not a model folder")


def test_unwritable_output_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the run directory should be")
    with pytest.raises(ConfigError, match="run_dir"):
        run(sft(model={"path": "./nowhere"}), tmp_path)


def test_run_directory_in_use_is_refused(tmp_path: Path) -> None:
    from filelock import FileLock

    (tmp_path / "run").mkdir()
    with FileLock(str(tmp_path / "run" / ".lock")), pytest.raises(ConfigError, match="in use"):
        run(sft(), tmp_path)


def test_results_of_another_configuration_are_kept_aside(tmp_path: Path) -> None:
    run(sft(), tmp_path)
    first = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    run(sft(seed=1), tmp_path)
    kept = next(tmp_path.glob("run*previous-1/model/model.safetensors"))
    assert kept.read_bytes() == first
