"""Self-sampled programs: rows, prefixes, buffers over checkpoints and processes, split updates, refusals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import prepared_runs
import pytest
import torch

from mmalign.core.logprobs import sequence_log_prob
from mmalign.data.straight_line import trace_program
from mmalign.data.word_programs import make_word_programs
from mmalign.errors import ConfigError, DataError, MmalignError
from mmalign.policies.base import Rollout
from mmalign.training.checkpoint import load_state, save_state
from mmalign.training.experience import BatchOptions, resolve_batch
from mmalign.training.objective import TrainState, UpdateBatch
from mmalign.training.self_sampling import SelfSamplingExperience
from text_llm.rl.self_sampling import read_tasks

ROWS = [
    {"prompt": "four and six\n", "completion": "n0=4\nn1=6\nt0=n0*n1\nanswer=t0+n0", "answer": "28"},
    {"prompt": "two and three\n", "completion": "n0=2\nn1=3\nanswer=n0+n1", "answer": "5"},
]
OTHER = "n0=6\nn1=4\nt0=n0*n1\nanswer=n1+t0"
HALF = "n0=4\nn1=6\nt0=n1*n0\nanswer=t0-n0"


def tree(folder: Path, rows: Sequence[dict[str, Any]] = ROWS, **changes: Any) -> dict[str, Any]:
    path = folder / "rows.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"method": "self_sampling", "model": {"path": "asset:tiny_llama"}, "data": {"path": str(path)}, "steps": 2,
            "batch": {"prompts_per_rollout": 2, "completions_per_prompt": 2}, "sampling": {"max_new_tokens": 12},
            "optimizers": [{"lr": 1e-3}], **changes}


def prepared(folder: Path, rows: Sequence[dict[str, Any]] = ROWS, **changes: Any) -> Any:
    return prepared_runs.prepared(tree(folder, rows, **changes), folder)


def script(experience: SelfSamplingExperience, texts: dict[str, list[str]]) -> list[list[int]]:
    """Let the policy say ``texts`` (prompt as text -> samples); returns the prompts it will be asked for, as ids."""
    policy, asked, sample = experience.policy, [], experience.policy.sample

    def scripted(prompts: Sequence[Any], n: int, sampling: Any, generator: torch.Generator) -> Rollout:
        asked.extend(list(prompt) for prompt in prompts)
        rollout = sample(prompts, n, sampling, generator)
        decoded = [policy.tokenizer.decode(ids) for ids in prompts for _ in range(n)]
        rollout.samples = [texts.get(text, ["?"] * n)[i % n] for i, text in enumerate(decoded)]
        return rollout

    policy.sample = scripted  # type: ignore[method-assign]
    return asked


def decoded(experience: SelfSamplingExperience, ids: Sequence[int]) -> str:
    return str(experience.policy.tokenizer.decode(list(ids)))


# -- rows --------------------------------------------------------------------------------------------------------------


def test_whole_programs_end_and_parts_of_programs_do_not(tmp_path: Path) -> None:
    experience = prepared(tmp_path).parts.experience
    eos = experience.policy.tokenizer.eos_token
    for form in ("text", "messages"):
        prompt: Any = "four and six\n" if form == "text" else [{"role": "user", "content": "four and six"}]
        whole = experience.encoder.row(prompt, ("n0=4", "answer=n0"), whole=True)
        part = experience.encoder.row(prompt, ("n0=4", "t0=n0"), whole=False)
        learned = [decoded(experience, [label for label in row["labels"] if label != -100]) for row in (whole, part)]
        assert learned[0].startswith("n0=4\nanswer=n0")
        assert len(learned[0]) > len("n0=4\nanswer=n0")  # the token that ends a completion
        assert learned[1] == "n0=4\nt0=n0\n"
        assert eos not in learned[1]
        start = experience.encoder.open(prompt, ())
        assert part["input_ids"] == experience.encoder.open(prompt, ("n0=4", "t0=n0"))
        assert whole["input_ids"][: len(start)] == part["input_ids"][: len(start)] == start
        assert start == experience.policy.encode_prompts([prompt])[0]
    assert whole["input_ids"][-1] in experience.policy.stop_ids or whole["labels"][-1] == -100


def test_prompts_may_be_learned_and_then_count_once_in_the_marginal(tmp_path: Path) -> None:
    made = prepared(tmp_path, ROWS[:1], loss={"name": "mml"}, encoding={"completion_only_loss": False},
                    batch={"prompts_per_rollout": 1, "completions_per_prompt": 1})
    experience = made.parts.experience
    experience.solutions[0].add(trace_program(OTHER))
    experience.solutions[0].add(trace_program(HALF))
    rows = experience._training_set(0, 0)
    assert len(rows) == 3
    values, _ = made.parts.objective.loss(UpdateBatch({"train": rows}), {}, made.context.state)
    total, _ = sequence_log_prob(*_scores(experience, rows))
    assert float(values[0].values.detach()) == pytest.approx(-float(torch.logsumexp(total.double(), 0)), rel=1e-5)
    prompt = len(experience.encoder.open("four and six\n", ()))
    assert all(all(label != -100 for label in labels[1:prompt]) and labels[0] == -100 for labels in rows["labels"])


def _scores(experience: SelfSamplingExperience, rows: Any) -> tuple[torch.Tensor, torch.Tensor]:
    scores = experience.policy.log_probs(rows)
    return scores.logp.detach(), scores.mask


# -- sampling ----------------------------------------------------------------------------------------------------------


def test_samples_are_judged_and_later_ones_start_from_what_was_right(tmp_path: Path) -> None:
    made = prepared(tmp_path, ROWS[:1], batch={"prompts_per_rollout": 1, "completions_per_prompt": 2})
    experience = made.parts.experience
    first = "four and six\n"
    started = first + "n0=4\nn1=6\nt0=n1*n0\n"
    asked = script(experience, {first: [HALF, "nonsense"], started: ["answer=n0+t0", "answer=n0+t0"]})
    stream = iter(experience)
    update = next(stream)
    assert update.metrics["samples/partial"] == 0.5
    assert update.metrics["samples/invalid"] == 0.5
    assert update.metrics["solutions/partial"] == 1.0
    rows = update.parts["train"]
    assert (rows["whole"].tolist(), rows["gold"].tolist()) == ([True, False], [True, False])
    for _ in range(12):
        update = next(stream)
    assert {decoded(experience, ids) for ids in asked} == {first, started}
    assert ("n0=4", "n1=6", "t0=n1*n0", "answer=n0+t0") in experience.solutions[0].full
    assert experience.solutions[0].partial == [()]  # the partial program became part of a right one
    assert update.metrics["sampled_tokens"] > 0
    assert sum(value for name, value in update.metrics.items()
               if name.startswith("samples/") and name != "samples/from_partial") == pytest.approx(1.0)


def test_programs_may_run_in_processes_of_their_own(tmp_path: Path) -> None:
    """A loop is no straight-line program: refused by the interpreter, a right solution where programs are executed."""
    loop = "n0=4\nn1=6\nt0=0\nfor _i in range(n1):\n    t0+=n0\nanswer=t0+n0".replace("_i", "i")
    batch = {"prompts_per_rollout": 1, "completions_per_prompt": 2}
    for execution, kept in (("interpreter", 1), ("process", 2)):
        made = prepared(tmp_path / execution, ROWS[:1], batch=batch, execution=execution,
                        solutions={"partial": False}, sandbox={"seconds": 3.0})
        experience = made.parts.experience
        script(experience, {"four and six\n": [loop, "import os\nanswer=28"]})
        update = next(iter(experience))
        assert len(experience.solutions[0].full) == kept
        assert update.metrics["samples/invalid"] == (1.0 if execution == "interpreter" else 0.5)
    with pytest.raises(DataError, match=r"row 0: .*ZeroDivision"):
        prepared(tmp_path / "bad", [{"prompt": "p", "completion": "answer=1/0", "answer": "1"}], execution="process")


def test_fully_correct_only_never_starts_from_a_part(tmp_path: Path) -> None:
    made = prepared(tmp_path, ROWS[:1], solutions={"partial": False},
                    batch={"prompts_per_rollout": 1, "completions_per_prompt": 2})
    experience = made.parts.experience
    asked = script(experience, {"four and six\n": [HALF, OTHER]})
    stream = iter(experience)
    for _ in range(4):
        update = next(stream)
    assert {decoded(experience, ids) for ids in asked} == {"four and six\n"}
    assert update.metrics["solutions/full"] == 2.0
    assert update.metrics["solutions/partial"] == 0.0


def test_maximum_likelihood_samples_nothing_and_learns_the_reference(tmp_path: Path) -> None:
    made = prepared(tmp_path, loss={"name": "mle"})
    made.parts.policy.sample = None
    update = next(iter(made.parts.experience))
    assert update.parts["train"]["gold"].tolist() == [True, True]
    assert update.metrics["sampled_tokens"] == 0
    terms, _ = made.parts.objective.loss(update, {}, made.context.state)
    scores = made.parts.policy.log_probs(update.parts["train"])
    assert sorted(terms[0].values.tolist()) == pytest.approx(sorted((-scores.logp.sum(1)).tolist()), rel=1e-5)


@pytest.mark.parametrize(("size", "first", "expected"), [
    (2, True, [True, True]), (3, True, [True, True, False]), (9, True, None), (2, False, None),
])
def test_few_programs_of_a_task_are_drawn_whole_ones_first(size: int, first: bool, expected: Any, tmp_path: Path) -> None:
    experience = prepared(tmp_path, ROWS[:1], solutions={"marg_set_size": size, "prioritize_fcp": first},
                          batch={"prompts_per_rollout": 1, "completions_per_prompt": 1}).parts.experience
    known = experience.solutions[0]
    for text in (OTHER, HALF, "a=4\nb=6\nanswer=0"):
        known.add(trace_program(text))
    rows = experience._training_set(0, 0)
    assert len(rows) == min(size, len(known.full) + len(known.partial) - 1)
    if expected is not None:
        assert rows["whole"].tolist() == expected


def test_programs_that_do_not_fit_are_not_kept(tmp_path: Path) -> None:
    experience = prepared(tmp_path, ROWS[:1], encoding={"max_length": 64},
                          batch={"prompts_per_rollout": 1, "completions_per_prompt": 1}).parts.experience
    assert experience._judge(0, trace_program("answer=" + "+".join(["1"] * 28))) == "too_long"
    assert experience._judge(0, trace_program(OTHER)) == "full"


# -- updates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [
    {"name": "mle_aug"}, {"name": "mle_aug", "normalize": True}, {"name": "mml", "norm_marg_by_len": True},
    {"name": "beta_mml", "beta": 0.25},
])
def test_the_update_does_not_depend_on_the_forward_size(loss: dict[str, Any], tmp_path: Path) -> None:
    records = []
    for size in (4, 2, 1):  # with 1, there are more forwards than tasks
        made = prepared(tmp_path / str(size), loss=loss,
                        batch={"prompts_per_rollout": 2, "completions_per_prompt": 2, "examples_per_forward": size})
        for text in (OTHER, HALF):
            made.parts.experience.solutions[0].add(trace_program(text))
        sets = [made.parts.experience._training_set(task, task) for task in (0, 1)]
        records.append(made.loop.update(UpdateBatch({"train": type(sets[0]).concat(sets)})))
    for record in records[1:]:
        for key in ("loss", "loss/solutions", "grad_norm", "nll", "nll/gold", "nll/sampled"):
            assert record[key] == pytest.approx(records[0][key], rel=1e-4), key


def test_a_rollout_gives_several_updates_of_whole_tasks(tmp_path: Path) -> None:
    made = prepared(tmp_path, batch={"prompts_per_rollout": 2, "completions_per_prompt": 2, "examples_per_update": 2,
                                     "passes_per_rollout": 2})
    stream = iter(made.parts.experience)
    groups = [next(stream).parts["train"]["group"].tolist() for _ in range(4)]
    assert not made.parts.experience.pending
    assert sorted(groups[:2]) == sorted(groups[2:]) == [[0], [1]]


# -- checkpoints and processes -----------------------------------------------------------------------------------------


def test_buffers_and_unused_rows_survive_a_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    batch = {"prompts_per_rollout": 2, "completions_per_prompt": 2, "examples_per_update": 2}
    first, second = (prepared(tmp_path / name, batch=batch) for name in ("a", "b"))
    stream = iter(first.parts.experience)
    first.parts.experience.solutions[0].add(trace_program(HALF))
    for _ in range(3):
        next(stream)
    save_state(tmp_path, {"experience": first.parts.experience.state_dict(), "state": first.context.state.state_dict()})
    saved = load_state(tmp_path)
    second.parts.experience.load_state_dict(saved["experience"])
    second.context.state.load_state_dict(saved["state"])
    resumed = iter(second.parts.experience)
    for _ in range(6):
        one, other = next(stream), next(resumed)
        assert one.metrics == other.metrics
        assert one.parts["train"]["input_ids"] == other.parts["train"]["input_ids"]
        assert torch.equal(one.parts["train"]["group"], other.parts["train"]["group"])
    assert [known.state_dict() for known in first.parts.experience.solutions] == [
        known.state_dict() for known in second.parts.experience.solutions]


def test_every_task_belongs_to_one_process(tmp_path: Path) -> None:
    made = prepared(tmp_path)
    tasks = read_tasks(make_word_programs(7), "completion")
    owned = []
    for rank in range(2):
        state = TrainState(seed=0, total_steps=1, rank=rank, world_size=2)
        shape = resolve_batch(BatchOptions(prompts_per_rollout=4, completions_per_prompt=1), world_size=2, rollout=True)
        experience = SelfSamplingExperience(made.parts.policy, tasks, shape, state)
        assert len(set(next(iter(experience)).parts["train"]["group"].tolist())) == 2
        owned.append([task.prompt for task in experience.tasks])
    assert sorted(owned[0] + owned[1]) == sorted(task.prompt for task in tasks)
    assert not set(owned[0]) & set(owned[1])


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "message"), [
    ({"sampling": {"temperature": 0.0}}, r"sampling\.temperature"),
    ({"loss": {"name": "beta_mml", "beta": 0.0}}, r"loss\.beta must lie in \(0, 1\]"),
    ({"loss": {"name": "beta_mml", "beta": 1.5}}, r"loss\.beta must lie in \(0, 1\]"),
    ({"loss": {"name": "mml", "beta": 0.5}}, r"loss\.beta belongs to beta_mml"),
    ({"loss": {"name": "mml", "normalize": True}}, r"loss\.normalize belongs to mle_aug"),
    ({"loss": {"name": "mle_augmented"}}, r"loss\.name"),
    ({"solutions": {"marg_set_size": 0}}, "marg_set_size"),
    ({"solutions": {"state_key": "types"}}, r"solutions\.state_key"),
    ({"solutions": {"variable": "1x"}}, "variable"),
    ({"batch": {"action_fraction": 0.5, "prompts_per_rollout": 2, "completions_per_prompt": 2}}, r"batch\.action_fraction"),
    ({"rewards": [{"name": "answer_match"}]}, "rewards"),
])
def test_bad_configurations_are_refused_by_name(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        prepared(tmp_path, **changes)


@pytest.mark.parametrize(("change", "message"), [
    ({"completion": "n0=4\nanswer=n0"}, "row 1: .*does not arrive at answer = 5: it gives 4"),
    ({"completion": "for i in range(3):\n    answer = i"}, "row 1: .*only assignments"),
    ({"completion": "import os\nanswer=5"}, "row 1: .*only assignments"),
    ({"completion": ""}, "row 1: .*never assigns it"),
    ({"answer": "many"}, "row 1: answer 'many' is not a number"),
    ({"completion": "answer=5#" + "x" * 2000}, None),
    ({"prompt": "x" * 600}, "row 1"),
])
def test_bad_rows_are_refused_by_number(change: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    rows = [ROWS[0], {**ROWS[1], **change}]
    if message is None:
        assert len(prepared(tmp_path, rows).parts.experience.tasks) == 2  # comments are no part of a program
        return
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, rows, encoding={"max_length": 512})


@pytest.mark.parametrize("column", ["prompt", "completion", "answer"])
def test_missing_columns_are_named(column: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"column '{column}' is missing"):
        prepared(tmp_path, [{name: value for name, value in row.items() if name != column} for row in ROWS])


def test_worked_answers_become_programs(tmp_path: Path) -> None:
    rows = [{"prompt": "How many?", "completion": "48/2 = <<48/2=24>>24. 48+24 = <<48+24=72>>72.\n#### 72"},
            {"prompt": "And here?", "completion": "No annotation.\n#### 5"}]
    tasks = read_tasks(rows, "calculator")
    assert [(task.gold, task.answer) for task in tasks] == [("n0=48\nn1=2\nt0=n0/n1\nanswer=n0+t0", 72.0)]
    with pytest.raises(DataError, match="programs_from"):
        read_tasks(rows[1:], "calculator")
    made = prepared(tmp_path, rows, programs_from="calculator", batch={"prompts_per_rollout": 1, "completions_per_prompt": 1})
    assert made.parts.rows == 1


def test_held_out_programs_are_measured_while_training(tmp_path: Path) -> None:
    from mmalign.stages import make_plan, run_plan

    changes = {"evaluation": {"data": {"path": "asset:word_programs", "split": "test", "limit": 2}}, "steps": 1}
    plan = make_plan({**tree(tmp_path, **changes), "run_dir": str(tmp_path / "run")}, config_folder=tmp_path)
    run_plan(plan, quiet=True)
    found = json.loads((tmp_path / "run" / "samples" / "step-1" / "metrics.json").read_text())
    assert found["eval/straight_line_match"] in (0.0, 0.5, 1.0)


def test_pass_at_k_and_votes_of_an_evaluation(tmp_path: Path) -> None:
    from mmalign.stages import make_plan, run_plan

    stage = {"name": "e", "kind": "evaluate", "model": {"path": "asset:tiny_llama"}, "completions_per_prompt": 4,
             "data": {"path": "asset:word_programs", "split": "test", "limit": 3}, "sampling": {"max_new_tokens": 4},
             "rewards": [{"name": "straight_line_match"}, {"name": "length_penalty", "max_length": 8}],
             "pass_at": [1, 4], "majority": "program_answer"}

    def run(name: str, **changes: Any) -> dict[str, Any]:
        plan = make_plan({"run_dir": str(tmp_path / name), "stages": [{**stage, **changes}]}, config_folder=tmp_path)
        return dict(next(iter(run_plan(plan, quiet=True).values()))["metrics"])

    metrics = run("run")
    assert {"pass@1/straight_line_match", "pass@4/straight_line_match/error", "majority/straight_line_match"} <= metrics.keys()
    assert "pass@1/length_penalty" not in metrics  # it is not 0 or 1
    lines = [json.loads(line) for line in next((tmp_path / "run").rglob("samples.jsonl")).read_text().splitlines()]
    assert not any(line["completion"].startswith("n0=") for line in lines)  # what was sampled, not the reference of the same name
    assert metrics["pass@1/straight_line_match"] == pytest.approx(metrics["eval/straight_line_match"])
    with pytest.raises(MmalignError, match=r"pass_at.*completions_per_prompt"):
        run("more", pass_at=[5])
    with pytest.raises(MmalignError, match=r"pass_at.*none of the rewards"):
        run("none", rewards=[{"name": "length_penalty", "max_length": 8}], majority=None)
    with pytest.raises(MmalignError, match=r"majority.*'vote'"):
        run("vote", majority="vote")
