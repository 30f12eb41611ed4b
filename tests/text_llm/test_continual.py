"""Continual post-training and RIF-RFT: what the pipelines are, what they refuse, and what is forgotten at equal accuracy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from digit_tasks import REWARDS, reinforced, rows, supervised, write

from mmalign.errors import ConfigError
from mmalign.stages import make_plan, run_plan


def task(name: str, **changes: Any) -> dict[str, Any]:
    return {"name": name, "data": {"path": f"{name}.jsonl"}, "evaluation": {"path": f"{name}_test.jsonl"},
            "rewards": [{"name": "exact_match", "normalize": "strip"}], **changes}


def plan(folder: Path, method: str = "continual", **options: Any) -> Any:
    tree = {"method": method, "model": {"path": "asset:tiny_llama", "dtype": "float32"}, "tasks": [task("one"), task("two")],
            "run_dir": str(folder), **options}
    return make_plan(tree, config_folder=folder)


def stages(folder: Path, method: str = "continual", **options: Any) -> dict[str, Any]:
    return {stage.name: stage.tree for stage in plan(folder, method, **options).stages}


# -- what the pipeline is --------------------------------------------------------------------------------------------------


def test_sequence_of_one_learner(tmp_path: Path) -> None:
    made = stages(tmp_path, learners={"rft": {"method": "grpo", "train": {"steps": 3}, "per_task": {"two": {"steps": 7}}}})
    assert list(made) == ["start-on-one", "start-on-two", "rft-one", "rft-one-on-one", "rft-one-on-two", "rft-two",
                          "rft-two-on-one", "rft-two-on-two", "rft-matrix"]
    assert (made["rft-one"]["steps"], made["rft-two"]["steps"]) == (3, 7)
    assert made["rft-one"]["model"]["path"] == "asset:tiny_llama"
    assert made["rft-two"]["model"] == {"path": "${stages.rft-one.model}", "dtype": "float32"}
    assert made["rft-two"]["rewards"] == [{"name": "exact_match", "normalize": "strip"}]
    assert made["rft-matrix"]["cells"][1] == ["${stages.rft-two-on-one.folder}", "${stages.rft-two-on-two.folder}"]
    assert made["start-on-one"]["sampling"] == {"temperature": 0.0}


def test_filters_sample_the_model_of_that_moment_with_the_accuracy_alone(tmp_path: Path) -> None:
    rewards = [{"name": "exact_match", "weight": 0.5}, {"name": "within_length", "max_length": 4}]
    made = stages(tmp_path, "rif_rft", tasks=[task("one", rewards=rewards), task("two")], sampling={"max_new_tokens": 9},
                  filter={"completions_per_prompt": 6, "mode": "mixed", "threshold": 0.5}, compare=True)
    assert made["rif_rft-one-sample"]["model"]["path"] == "asset:tiny_llama"
    assert made["rif_rft-two-sample"]["model"]["path"] == "${stages.rif_rft-one.model}"  # never the base model again
    assert made["rif_rft-two-sample"]["sampling"] == {"max_new_tokens": 9}
    assert made["rif_rft-one-score"]["rewards"] == [{"name": "exact_match", "weight": 1.0}]
    assert made["rif_rft-one-filter"]["mode"] == "mixed"
    assert made["rif_rft-one"]["data"] == {"path": "${stages.rif_rft-one-filter.data}"}
    assert len(made["rif_rft-one"]["rewards"]) == 2
    assert made["rft-two"]["data"] == {"path": "two.jsonl"}
    assert made["comparison"]["matrices"].keys() == {"rif_rft", "rft"}


def test_targets_survive_a_filter(tmp_path: Path) -> None:
    tasks = [task("one", target="answer"), task("two", data={"path": "two.jsonl", "columns": {"reply": "completion"}})]
    made = stages(tmp_path, tasks=tasks, learners={
        "plain": {"method": "sft"}, "kept": {"method": "sft", "filter": {}}, "own": {"method": "sft", "self_sampled": {}}})
    assert made["plain-one"]["data"]["columns"] == {"answer": "completion"}
    assert "columns" not in made["kept-one-sample"]["data"]  # the reward still reads answer
    assert made["kept-one"]["data"]["columns"] == {"answer": "completion"}
    assert made["kept-two-sample"]["data"]["columns"] == {"reply": "gold"}
    assert made["kept-two"]["data"]["columns"] == {"gold": "completion"}
    assert made["own-two-filter"]["keep"] == "successes"
    assert "columns" not in made["own-two"]["data"]
    assert "rewards" not in made["own-two"]


def test_known_tasks_are_measured_and_the_union_is_one_stage(tmp_path: Path) -> None:
    made = stages(tmp_path, tasks=[task("old", known=True, data=None), task("one"), task("two")], learners={
        "rft": {"method": "grpo"}, "all_sft": {"method": "sft", "order": "union"},
        "all_rft": {"method": "rloo", "order": "union"}},
        matched={"levels": {"two": 0.9}, "every": 5}, general={"text": {"kind": "likelihood", "data": {"path": "t.jsonl"}}})
    assert "rft-old" not in made
    assert made["rft-matrix"]["cells"][0] == [f"${{stages.start-on-{name}.folder}}" for name in ("old", "one", "two")]
    assert [source["add"] for source in made["all_sft-rows"]["sources"]] == [{"task": "one"}, {"task": "two"}]
    assert made["all_sft-matrix"]["stages"] == ["all"]
    route = made["all_rft-all"]["rewards"][0]
    assert (route["name"], route["by"], list(route["routes"])) == ("route", "task", ["old", "one", "two"])
    evaluation = made["rft-two"]["evaluation"]
    assert (evaluation["by"], evaluation["every"], evaluation["data"]["path"]) == ("task", 5, "${stages.held_out.data}")
    curves = made["comparison"]["curves"]
    assert [(curve["learner"], curve["folder"]) for curve in curves] == [
        ("rft", "${stages.rft-two.folder}"), ("all_sft", "${stages.all_sft-all.folder}"),
        ("all_rft", "${stages.all_rft-all.folder}")]
    assert curves[0]["before"]["old"] == "${stages.rft-one-on-old.folder}"
    assert made["rft-matrix"]["general"]["text"]["after"] == "${stages.rft-two-text.folder}"


@pytest.mark.parametrize(("options", "message"), [
    ({"learners": {}}, "learners: at least one|at least one is needed"),
    ({"learners": {"x": {"method": "grpoo"}}}, r"learners.x.method.*grpo"),
    ({"learners": {"x": {"method": "selm"}}}, "selm is no training method"),
    ({"learners": {"a-b": {"method": "grpo"}}}, "letters, digits and _"),
    ({"learners": {"x": {"method": "grpo", "train": {"data": {}}}}}, "train.data: is set by the pipeline"),
    ({"learners": {"x": {"method": "grpo", "per_task": {"three": {}}}}}, "no task 'three'"),
    ({"learners": {"x": {"method": "grpo", "train": {"stepz": 3}}}}, "stages.*stepz|did you mean steps"),
    ({"learners": {"x": {"method": "grpo", "self_sampled": {}}}}, "grpo samples by itself"),
    ({"learners": {"x": {"method": "sft", "self_sampled": {}, "filter": {}}}}, "exclude each other"),
    ({"learners": {"x": {"method": "grpo", "filter": {"completions_per_prompt": 0}}}}, "must be at least 1 for mode any"),
    ({"learners": {"x": {"method": "grpo", "filter": {"completions_per_prompt": 1, "mode": "mixed"}}}}, "at least 2 for mode"),
    ({"learners": {"x": {"method": "grpo", "filter": {"sampling": {"temperature": 0}}}}}, "all samples of a prompt are the same"),
    ({"learners": {"x": {"method": "grpo", "filter": {"threshold": 1.0}}}}, "threshold: 1 is not below 1, the largest value"),
    ({"tasks": []}, "tasks: at least one"), ({"tasks": [task("one"), task("one")]}, "used twice"),
    ({"tasks": [task("one", known=True)]}, "is known already, so there is nothing to train on"),
    ({"tasks": [task("one", known=True, data=None)]}, "all of them are known already"),
    ({"tasks": [task("one", data=None)]}, "data: required by task 'one'"), ({"tasks": [task("a-b")]}, "letters, digits and _"),
    ({"tasks": [task("all")]}, "stands for the union"), ({"tasks": [task("one", rewards=[])]}, "rewards: at least one"),
    ({"matched": {"levels": {"three": 1}}}, "no task 'three' is learned here"), ({"matched": {"levels": {}}}, "levels"),
    ({"general": {"x": {"kind": "merge"}}}, "general.x.kind"),
    ({"general": {"x": {"kind": "evaluate", "model": {}}}}, "general.x.model"),
    ({"tasks": [task("one", rewards=[{"name": "exact_match"}, {"name": "exact_match"}])],
      "learners": {"x": {"method": "grpo", "order": "union"}}}, "one reward per task"),
])
def test_refusals_name_the_key(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(tmp_path, **{"learners": {"rft": {"method": "grpo"}}, **options})


# -- what it shows ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def comparisons(digit_base: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The same new task by three learners, three seeds: fixed labels, own successes, and policy gradient."""
    found = []
    for seed in (30, 31, 32):
        folder = tmp_path_factory.mktemp(f"continual{seed}")
        (folder / "mine.py").write_text(REWARDS)
        tree = {
            "run_dir": str(folder / "run"), "seed": seed, "method": "continual", "model": {"path": str(digit_base(seed))},
            "sampling": {"max_new_tokens": 2}, "evaluation_sampling": {"temperature": 1.0},
            "tasks": [{"name": "a", "known": True, "evaluation": write(folder / "a.jsonl", rows("a", 60, seed + 50)),
                       "rewards": [{"name": "mine.py:exact"}]},
                      {"name": "b", "data": write(folder / "b.jsonl", rows("b", 300, seed + 1, fixed=True)),
                       "evaluation": write(folder / "b_test.jsonl", rows("b", 60, seed + 50)),
                       "rewards": [{"name": "mine.py:parity"}]}],
            "matched": {"levels": {"b": 0.8}, "every": 5, "completions_per_prompt": 4},
            "learners": {"sft": {"method": "sft", "train": supervised(60, 5e-4)},
                         "own": {"method": "sft", "self_sampled": {"completions_per_prompt": 4}, "train": supervised(100, 5e-4)},
                         "rft": {"method": "grpo", "train": {**reinforced(60, 5e-4), "advantage": {"name": "dr_grpo"}}}},
        }
        found.append(run_plan(make_plan(tree, config_folder=folder), quiet=True)["comparison"]["metrics"])
    return found


def crossings(comparisons: list[dict[str, float]], learner: str) -> list[float]:
    """Score on the old task at the new one's level, above that of fixed labels, where both reach the level."""
    key = f"at_level/{learner}/b/a"
    sft = "at_level/sft/b/a"
    return [metrics[key] - metrics[sft] for metrics in comparisons if key in metrics and sft in metrics]


@pytest.mark.slow
def test_at_equal_accuracy_reinforcement_forgets_less_than_fixed_labels(comparisons: list[dict[str, float]]) -> None:
    gains = crossings(comparisons, "rft")
    assert len(gains) >= 2  # a seed whose policy does not reach the level in time says nothing
    assert min(gains) > -0.05
    assert sum(gains) / len(gains) > 0.15


@pytest.mark.slow
def test_fine_tuning_on_own_successes_forgets_little_too(comparisons: list[dict[str, float]]) -> None:
    """The cause is staying on the model's own distribution, not reinforcement as such."""
    gains = crossings(comparisons, "own")
    assert len(gains) >= 2
    assert min(gains) > -0.05
    assert sum(gains) / len(gains) > 0.1


@pytest.mark.slow
def test_filtering_saves_rollouts_where_many_prompts_are_hopeless(digit_base: Callable[[int], Path], tmp_path: Path) -> None:
    scores: dict[str, list[float]] = {"rif_rft": [], "rft": []}
    for seed in (30, 31, 32):
        folder = tmp_path / str(seed)
        folder.mkdir()
        (folder / "mine.py").write_text(REWARDS)
        data = rows("b", 160, seed + 1, hopeless=0.4)
        impossible = sum(row["answer"] == "none" for row in data)
        tree = {
            "run_dir": str(folder / "run"), "seed": seed, "method": "rif_rft", "model": {"path": str(digit_base(seed))},
            "sampling": {"max_new_tokens": 2}, "evaluation_sampling": {"temperature": 1.0}, "compare": True,
            "filter": {"completions_per_prompt": 8},
            "tasks": [{"name": "b", "data": write(folder / "b.jsonl", data), "rewards": [{"name": "mine.py:parity"}],
                       "evaluation": write(folder / "b_test.jsonl", rows("b", 100, seed + 50))}],
            "train": {**reinforced(12, 5e-4), "advantage": {"name": "dr_grpo"}},
        }
        manifests = run_plan(make_plan(tree, config_folder=folder), quiet=True)
        filtered = manifests["rif_rft-b-filter"]["metrics"]
        assert impossible / 160 > 0.3
        assert filtered["hopeless"] >= impossible
        assert filtered["kept"] >= 0.95 * (160 - impossible)
        for learner in scores:
            scores[learner].append(manifests[f"{learner}-b-on-b"]["metrics"]["eval/parity"])
    # Equal updates, so equal rollouts in training: with the filter none of them is spent on a prompt without a signal.
    assert sum(scores["rif_rft"]) / 3 > sum(scores["rft"]) / 3 - 0.02
