"""Stages that order a row's candidates and that score samples with other models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_from_disk

from mmalign.api import run
from mmalign.data.chat import TextEncoding
from mmalign.errors import ConfigError, DataError
from mmalign.policies.loading import ModelOptions, load_policy
from mmalign.stage_kinds import records as chunks
from mmalign.stage_kinds.rank import rank_row


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


ORDER = ("chosen", "generated", "rejected")


@pytest.mark.parametrize(("texts", "scores", "best", "worst"), [
    (("a", "b", "c"), (1.0, 3.0, 2.0), "b", "a"), (("a", "b", "c"), (2.0, 2.0, 2.0), "a", "c"),
    (("a", "b", "c"), (2.0, 2.0, 1.0), "a", "c"), (("a", "b", "c"), (1.0, 2.0, 1.0), "b", "c"),
    (("a", "a", "c"), (1.0, 1.0, 1.0), "a", "c"), (("a", "c", "c"), (1.0, 2.0, 2.0), "c", "a"),
    (("a", "c", "a"), (2.0, 2.0, 2.0), "a", "c"),
])
def test_order_of_candidates(texts, scores, best, worst):
    """Ties keep the pair of the data set; a pair never holds the same text twice."""
    row = rank_row(dict(zip(ORDER, texts, strict=True)), ORDER, scores)
    assert row is not None
    assert (row["chosen"], row["rejected"]) == (best, worst)
    assert row["chosen_score"] >= row["rejected_score"]


def test_rows_of_one_text_cannot_be_ranked():
    assert rank_row({"chosen": "a", "generated": "a", "rejected": "a"}, ORDER, (1.0, 1.0, 1.0)) is None


def test_rank_stage(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [
        {"prompt": "p", "answer": "7", "chosen": " 8", "rejected": " 9", "completion": " 7"},
        {"prompt": "q", "answer": "7", "chosen": " 7", "rejected": " 9", "completion": " 8"},
        {"prompt": "r", "answer": "7", "chosen": " 7", "rejected": " 7", "completion": " 7"},
    ])
    tree = {"kind": "rank", "data": {"path": data}, "rewards": [{"name": "answer_match"}], "run_dir": str(tmp_path / "run")}
    manifest = next(iter(run(tree, quiet=True).values()))
    rows = list(load_from_disk(manifest["outputs"]["data"]))
    assert [(row["chosen"], row["rejected"], row["generated"], row["chosen_from"]) for row in rows] == [
        (" 7", " 9", " 7", "generated"), (" 7", " 9", " 8", "chosen")]
    assert manifest["metrics"]["dropped/indistinct"] == 1
    with pytest.raises(DataError, match="'candidate'"):
        run({**tree, "candidates": ["candidate", "chosen"], "run_dir": str(tmp_path / "other")}, quiet=True)


def scored(folder: Path, data: str, **options: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    tree = {"kind": "teacher_scores", "data": {"path": data}, "teachers": [{"path": "asset:tiny_llama"}],
            "run_dir": str(folder), **options}
    manifest = next(iter(run(tree, quiet=True).values()))
    return list(load_from_disk(manifest["outputs"]["data"])), manifest


def other_model(folder: Path) -> str:
    """The same architecture with other weights and its own chat template."""
    policy = load_policy(ModelOptions(path="asset:tiny_llama"))
    with torch.no_grad():
        for parameter in policy.module.parameters():
            parameter.mul_(1.3)
    policy.save_pretrained(folder)
    return str(folder)


SENTENCES = [{"prompt": f"Say {word}:", "completion": f" {word} {word}"} for word in ("red", "green", "blue", "seven")]


def test_teacher_scores_are_means_over_tokens_and_teachers(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", SENTENCES)
    teachers = [{"path": "asset:tiny_llama"}, {"path": other_model(tmp_path / "other")}]
    rows, manifest = scored(tmp_path / "run", data, teachers=teachers, rows_per_forward=3)
    for k, teacher in enumerate(teachers, start=1):
        policy = load_policy(ModelOptions(path=teacher["path"]), encoding=TextEncoding())
        for row, sentence in zip(rows, SENTENCES, strict=True):
            prepared, _ = policy.prepare_dataset([sentence])
            value = policy.log_probs(policy.encode_rows(prepared)).sequence("mean")[0]
            assert row[f"teacher_logp_{k}"] == pytest.approx(float(value.detach()), abs=1e-5)
    for row in rows:
        assert row["teacher_logp"] == pytest.approx((row["teacher_logp_1"] + row["teacher_logp_2"]) / 2)
    assert manifest["details"]["templates"].keys() == {"teacher_1", "teacher_2"}
    swapped, _ = scored(tmp_path / "swapped", data, teachers=teachers[::-1])
    assert [row["teacher_logp"] for row in swapped] == pytest.approx([row["teacher_logp"] for row in rows])


def test_rows_without_a_scored_token_are_dropped_and_counted(tmp_path):
    long = {"prompt": "word " * 60, "completion": " end"}
    data = write_rows(tmp_path / "rows.jsonl", [SENTENCES[0], long, SENTENCES[1]])
    rows, manifest = scored(tmp_path / "run", data, encoding={"max_length": 40})
    assert [row["prompt"] for row in rows] == [SENTENCES[0]["prompt"], SENTENCES[1]["prompt"]]
    assert manifest["metrics"]["dropped/unscored"] == 1
    with pytest.raises(DataError, match="max_length"):
        scored(tmp_path / "none", write_rows(tmp_path / "long.jsonl", [long]), encoding={"max_length": 40})


def test_the_best_share_is_kept(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", SENTENCES)
    every, _ = scored(tmp_path / "all", data)
    half, _ = scored(tmp_path / "half", data, keep=0.5)
    best = sorted(every, key=lambda row: -row["teacher_logp"])[:2]
    assert {row["prompt"] for row in half} == {row["prompt"] for row in best}


def test_a_killed_scoring_goes_on_where_it_was(tmp_path, monkeypatch):
    data = write_rows(tmp_path / "rows.jsonl", SENTENCES)
    monkeypatch.setattr("mmalign.stage_kinds.teacher_scores.write_in_chunks",
                        lambda context, rows, make, size=1: chunks.write_in_chunks(context, rows, make, size=1))
    from mmalign.stage_kinds import teacher_scores

    original, seen = teacher_scores.mean_log_probs, []

    def killed(policy: Any, examples: Any, size: int) -> list[float]:
        seen.append(examples[0]["prompt"])
        if len(seen) == 3:
            raise KeyboardInterrupt
        return original(policy, examples, size)

    monkeypatch.setattr(teacher_scores, "mean_log_probs", killed)
    with pytest.raises(KeyboardInterrupt):
        scored(tmp_path / "run", data)
    rows, _ = scored(tmp_path / "run", data)
    assert seen == [s["prompt"] for s in (*SENTENCES[:3], *SENTENCES[2:])]
    expected, _ = scored(tmp_path / "whole", data)
    assert [row["teacher_logp"] for row in rows] == [row["teacher_logp"] for row in expected]


@pytest.mark.parametrize(("change", "key"), [
    ({"teachers": []}, "teachers"), ({"keep": 0.0}, "keep"), ({"rows_per_forward": 0}, "rows_per_forward"),
])
def test_teacher_scores_refuses(change, key, tmp_path):
    with pytest.raises(ConfigError, match=key):
        scored(tmp_path, "asset:arithmetic", **change)


def test_rows_that_are_scored_already_and_repeated_ids_are_refused(tmp_path):
    twice = write_rows(tmp_path / "a.jsonl", [{**row, "teacher_logp": -1.0} for row in SENTENCES])
    with pytest.raises(DataError, match="teacher_logp"):
        scored(tmp_path / "one", twice)
    with pytest.raises(DataError, match="id"):
        scored(tmp_path / "two", write_rows(tmp_path / "b.jsonl", [{**row, "id": "x"} for row in SENTENCES]))


def test_poft_starts_at_log_2_when_its_teacher_is_itself(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", SENTENCES)
    tree = {"method": "poft", "model": {"path": "asset:tiny_llama"}, "data": {"path": data},
            "teachers": [{"path": "asset:tiny_llama"}], "run_dir": str(tmp_path / "run"),
            "train": {"steps": 1, "batch": {"examples_per_update": 4}}}
    run(tree, quiet=True)
    first = json.loads((tmp_path / "run" / "train" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
