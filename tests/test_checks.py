"""``mmalign check``: what it says of good and bad configurations, data sets, rewards and models, and that it never raises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmalign.checks import Check, run_checks, target_kind
from mmalign.checks.findings import Findings
from mmalign.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parent.parent


def texts(checks: list[Check], status: str) -> str:
    return "\n".join(check.text for check in checks if check.status == status)


def write_config(folder: Path, **tree: Any) -> str:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sft(**changes: Any) -> dict[str, Any]:
    return {"method": "sft", "model": {"path": "asset:tiny_llama"}, "data": {"path": "asset:arithmetic", "limit": 8},
            "encoding": {"max_length": 256}, **changes}


def grpo(**changes: Any) -> dict[str, Any]:
    return {"method": "grpo", "model": {"path": "asset:tiny_llama"}, "data": {"path": "asset:arithmetic", "limit": 8},
            "rewards": [{"name": "answer_match"}], "batch": {"prompts_per_rollout": 4, "completions_per_prompt": 4}, **changes}


# -- configurations ------------------------------------------------------------------------------------------------------


def test_a_good_configuration_passes_and_shows_what_is_learned(tmp_path: Path) -> None:
    checks = run_checks(write_config(tmp_path, **sft()))
    assert texts(checks, "fail") == ""
    said = texts(checks, "ok")
    for expected in ("every key is known", "examples per update 8", "asset:tiny_llama is a text model", "serve sft", "⟦"):
        assert expected in said


def test_rewards_are_tried_on_a_right_a_wrong_and_an_empty_completion(tmp_path: Path) -> None:
    checks = run_checks(write_config(tmp_path, **grpo()))
    assert texts(checks, "fail") == ""
    assert "1, 0, 0" in texts(checks, "ok")
    assert "4 prompts" in texts(checks, "ok") or "prompts per rollout 4" in texts(checks, "ok")


@pytest.mark.parametrize(("tree", "expected"), [
    (sft(stepz=3), "stepz: unknown key; did you mean steps?"),
    (sft(optimizers=[{"learning_rate": 1}]), "optimizers.0.learning_rate: unknown key"),
    (sft(losses=[{"name": "nlll"}]), "did you mean 'nll'"),
    (sft(losses=[{"name": "label_smoothed_nll", "smoothing": 0.1}]), "losses[0].smoothing"),
    (sft(tuning={"name": "lorra"}), "did you mean 'lora'"),
    (sft(tuning={"name": "lora", "rang": 4}), "tuning.rang: unknown option"),
    (sft(optimizers=[{"kind": "adamx"}]), "optimizers[0].kind: unknown optimizer 'adamx'"),
    (sft(model={"path": "./absent"}), "model.path: folder './absent' does not exist"),
    (sft(model={"path": "asset:shapes_base"}), "is a diffusion model; sft needs a text model"),
    (sft(data={"path": "absent.jsonl"}), "data.path: absent.jsonl does not exist"),
    (sft(data={"path": "asset:shapes", "limit": 4}), "data: sft needs one of text, messages, or prompt and completion"),
    (sft(encoding={"max_length": 8}), "none of the 8 rows can be trained on"),
    (sft(steps=1, epochs=1), "steps and epochs exclude each other"),
    (grpo(batch={"prompts_per_rollout": 4, "completions_per_prompt": 4, "examples_per_update": 6}),
     "batch.examples_per_update = 6 does not divide"),
    (grpo(loss={"name": "ppo_clop"}), "loss.name: unknown policy loss 'ppo_clop'; did you mean 'ppo_clip'"),
    (grpo(loss={"name": "ppo_clip", "clip": 0.2}), "loss.clip: unknown key"),
    (grpo(advantage={"name": "grpp"}), "advantage.name"),
    (grpo(rewards=[{"name": "answer_mach"}]), "did you mean 'answer_match'"),
    (grpo(rewards=[{"name": "absent.py:score"}]), "file 'absent.py' does not exist"),
    (grpo(data={"path": "asset:arithmetic", "limit": 4, "columns": {"answer": None}}),
     "rewards[0]: reward 'answer_match' needs the data column 'answer'"),
    (grpo(kl={"coef": 0.1, "estimator": "k1"}), "zero expected gradient"),
])
def test_what_is_wrong_is_named_by_its_key(tmp_path: Path, tree: dict[str, Any], expected: str) -> None:
    assert expected in texts(run_checks(write_config(tmp_path, **tree)), "fail")


def test_every_problem_of_a_configuration_is_listed_at_once(tmp_path: Path) -> None:
    checks = run_checks(write_config(tmp_path, **sft(stepz=1, tracking={"loud": True})))
    assert sum(check.status == "fail" for check in checks) == 2


def test_overrides_are_applied_before_checking(tmp_path: Path) -> None:
    path = write_config(tmp_path, **sft())
    assert "did you mean 'lora'" in texts(run_checks(path, overrides=["tuning=lorra"]), "fail")


def test_a_rewards_file_is_found_beside_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def long(completions, **columns):\n    return [float(len(str(c))) for c in completions]\n")
    checks = run_checks(write_config(tmp_path, **grpo(rewards=[{"name": "mine.py:long"}])))
    assert texts(checks, "fail") == ""


def test_a_rewards_file_that_cannot_be_imported_is_a_failure_not_a_crash(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def score(completions):\n    return [1.0\n")
    checks = run_checks(write_config(tmp_path, **grpo(rewards=[{"name": "broken.py:score"}])))
    assert "SyntaxError" in texts(checks, "fail")


def test_stages_that_feed_each_other(tmp_path: Path) -> None:
    path = write_config(tmp_path, stages=[
        {"name": "first", **sft()},
        {"name": "second", **sft(model={"path": "${stages.first.model}"}, losses=["nll", "dfx"])},
    ])
    checks = run_checks(path)
    assert "stages.second.model.path: made by an earlier stage" in texts(checks, "ok")
    assert "stages.second.losses[1].name" in texts(checks, "fail")
    assert "names no earlier stage" in texts(run_checks(path, overrides=["stages.first.model.path=${stages.none.model}"]), "fail")


def test_held_out_prompts_in_the_training_data_are_pointed_out(tmp_path: Path) -> None:
    evaluation = {"data": {"path": "asset:arithmetic", "limit": 8}, "rewards": [{"name": "answer_match"}]}
    assert "8 of 8 held-out prompts are in the training data" in texts(
        run_checks(write_config(tmp_path, **grpo(evaluation=evaluation))), "warn")
    evaluation["data"]["split"] = "test"  # type: ignore[index]
    assert "held-out" not in texts(run_checks(write_config(tmp_path, **grpo(evaluation=evaluation))), "warn")


def test_truncation_is_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "say", "completion": "x" * (300 if i < 3 else 10)} for i in range(12)]
    path = write_config(tmp_path, **sft(data={"path": write_rows(tmp_path, rows)}, encoding={"max_length": 64}))
    assert "3 of 12 rows (25.0%) are longer than encoding.max_length = 64" in texts(run_checks(path), "warn")


# -- data sets -----------------------------------------------------------------------------------------------------------


def test_a_data_set_says_what_it_serves(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(5)]
    checks = run_checks(write_rows(tmp_path, rows))
    assert "usable for preference on text pairs (dpo)" in texts(checks, "ok")
    assert "usable for sampling" in texts(checks, "ok")
    assert "usable for supervised training" not in texts(checks, "ok")
    assert "usable for supervised training on captioned images" in texts(run_checks("asset:shapes"), "ok")


def test_unusable_rows_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "same", "chosen": "x", "rejected": "x"}, {"prompt": "p", "chosen": " ", "rejected": "y"},
            {"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "a", "rejected": "b"}]
    warnings = texts(run_checks(write_rows(tmp_path, rows)), "warn")
    assert "1 of 4 rows have equal chosen and rejected" in warnings
    assert "column chosen: 1 of 4 rows are empty, the first is row 1" in warnings
    assert "1 of 4 rows repeat an earlier row" in warnings


def test_columns_that_serve_nothing_fail_with_a_hint(tmp_path: Path) -> None:
    assert "Map names with data.columns" in texts(run_checks(write_rows(tmp_path, [{"a": 1, "b": "x"}])), "fail")


def test_a_model_shows_masks_of_a_data_set(tmp_path: Path) -> None:
    checks = run_checks("asset:arithmetic", model="asset:tiny_llama")
    assert texts(checks, "fail") == ""
    assert "⟦" in texts(checks, "ok")
    assert "prompts:" in texts(checks, "ok")
    assert "is a diffusion model" in texts(run_checks("asset:arithmetic", model="asset:shapes_base"), "fail")


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '{"prompt": "a"}\n{"prompt":', "null\n", "\x00\x01"])
def test_damaged_files_fail_without_raising(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    assert texts(run_checks(str(path)), "fail") != ""


# -- rewards and models --------------------------------------------------------------------------------------------------


def test_a_reward_shows_its_signature_and_three_values(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def score(prompts, completions, answer, *, scale: float = 2.0, **columns):\n"
                    "    return [scale * (a in str(c)) for c, a in zip(completions, answer)]\n")
    said = texts(run_checks(f"{file}:score"), "ok")
    assert "asks for answer; options scale" in said
    assert "2, 0, 0" in said
    assert "6, 0, 0" in texts(run_checks(f"{file}:score", overrides=["scale=6"]), "ok")
    assert "option 'scael' is no parameter of it; did you mean 'scale'" in texts(
        run_checks(f"{file}:score", overrides=["scael=6"]), "warn")


@pytest.mark.parametrize(("body", "status", "expected"), [
    ("return [1.0]", "fail", "1 values for 3 samples"),
    ("return [float('nan')] * len(completions)", "fail", "nan"),
    ("return [c['x'] for c in completions]", "fail", "raised"),
    ("return 3", "fail", "not a list or tensor"),
    ("return [0.5] * len(completions)", "warn", "same value for every sample"),
    ("import random; return [random.random() for _ in completions]", "warn", "not deterministic"),
])
def test_faulty_rewards_are_told_apart(tmp_path: Path, body: str, status: str, expected: str) -> None:
    (tmp_path / "mine.py").write_text(f"def score(completions, **columns):\n    {body}\n")
    assert expected in texts(run_checks(f"{tmp_path / 'mine.py'}:score"), status)


def test_names_that_are_nothing_get_the_nearest(tmp_path: Path) -> None:
    assert "did you mean 'answer_match'" in texts(run_checks("answer_mach"), "fail")
    assert "did you mean 'asset:arithmetic'" in texts(run_checks("arithmetik"), "fail")
    assert "does not exist" in texts(run_checks(str(tmp_path / "absent.yaml")), "fail")


def test_a_model_asset_is_checked_like_an_export() -> None:
    checks = run_checks("asset:tiny_llama")
    assert texts(checks, "fail") == ""
    assert "LlamaForCausalLM" in texts(checks, "ok")


def test_kinds_of_targets(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "images").mkdir()
    expected = {"a.yaml": "config", "asset:tiny_llama": "model", "asset:shapes": "data", str(tmp_path / "model"): "model",
                str(tmp_path / "images"): "data", "x.py:f": "reward", "pkg.mod:f": "reward", "answer_match": "reward",
                "org/name": "data", "gibberish": "unknown"}
    assert {target: target_kind(target) for target in expected} == expected


def test_flags_without_effect_are_said(tmp_path: Path) -> None:
    assert "--model has no effect" in texts(run_checks("answer_match", model="asset:tiny_llama"), "warn")
    assert "has no effect" in texts(run_checks("asset:arithmetic", overrides=["a=1"]), "warn")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(target=st.text(alphabet="ab.:_-$ {}[]\\\"'", max_size=20).filter(lambda text: text.strip() not in ("..", ".")))
def test_no_target_makes_it_raise(target: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert all(isinstance(check, Check) for check in run_checks(target))


def test_the_guard_splits_listed_problems_and_keeps_other_messages_whole() -> None:
    findings = Findings()
    with findings.guard("x"):
        raise ConfigError("a.b: wrong\nc: also wrong")
    with findings.guard("x"):
        raise ConfigError("a sentence\nover two lines")
    with findings.guard("x"):
        raise KeyError("k")
    assert [check.text for check in findings.checks] == [
        "a.b: wrong", "c: also wrong", "a sentence\nover two lines", "x: KeyError: 'k'"]


@pytest.mark.parametrize("config", sorted(p.relative_to(REPOSITORY).as_posix() for p in (REPOSITORY / "configs").glob("*/*.yaml")
                                          if not p.stem.endswith("_paper")))
def test_the_configurations_of_the_repository_pass(config: str) -> None:
    assert texts(run_checks(str(REPOSITORY / config)), "fail") == ""
