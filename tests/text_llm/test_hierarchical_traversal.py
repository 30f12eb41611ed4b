"""The traversal study: prompts and what answers say, a whole run, what it refuses, and representations of checkpoints."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign.api import run
from mmalign.config import parse
from mmalign.data.code_trees import load_tree, make_items
from mmalign.errors import ConfigError, DataError
from mmalign.policies.loading import ModelOptions, load_policy
from text_llm.evaluation.hierarchical_traversal import HierarchicalTraversalOptions, numbers, summarise
from text_llm.evaluation.representation_probes import check_comparable, make_probes, statement_ids
from text_llm.evaluation.traversal_prompts import TEMPLATES, question, read_answer

TREE = load_tree("objects")
ITEM = make_items(TREE, 1, seed=0, codes=["AMC1"])[0]
LETTER = "ABCD"[ITEM.answer]
WRONG = "ABCD"[(ITEM.answer + 1) % 4]


def test_structured_prompt_names_levels_and_the_control_others():
    plain, structured, control = (question(ITEM, TREE, TEMPLATES["meaning"][name]) for name in ("qa", "structured", "shuffled"))
    assert "lion" in plain
    assert "AMC1" in plain
    assert "chapter, block, category, item" in structured
    assert "breakdown of the code AMC1" in structured
    assert "chapter, block, category, item" not in control
    assert "breakdown of the code AMC1" not in control
    assert abs(len(control) - len(structured)) < 40  # as long, so that length alone explains nothing
    assert control == question(ITEM, TREE, TEMPLATES["meaning"]["shuffled"])


@pytest.mark.parametrize("ask", list(TEMPLATES))
def test_no_prompt_gives_the_answer_away(ask):
    for name, template in TEMPLATES[ask].items():
        text = question(ITEM, TREE, template)
        if ask == "code":
            assert ITEM.code not in text, name
        if ask == "meaning":
            assert text.count("lion") == 1, name


@pytest.mark.parametrize(("text", "correct"), [
    (f"Answer: {LETTER}", True), (f"Answer: {WRONG}", False), (f"({LETTER})", True), (LETTER, True), ("", False),
    (f"Answer: {WRONG}? No. The answer is {LETTER}.", True), (f"**Answer: {LETTER}**", True), ("A lion is a cat.", False),
    (f"Path: A > AM > AMC > AMC1\nOption {WRONG} is out.\nAnswer: {LETTER}", True), ("Answer: all of them", False),
])
def test_reading_letters(text, correct):
    assert read_answer(text, ITEM, ask="meaning").correct is correct


def test_reading_codes_and_tops():
    assert read_answer("Path: A > AM > AMC > AMC1", ITEM, ask="code").correct
    assert not read_answer("Path: A > AM > AMC", ITEM, ask="code").correct
    assert read_answer("AMC1", ITEM, ask="code").correct
    assert read_answer("Path: A > AM", ITEM, ask="top").correct
    up = read_answer(" > AMC > AM > A", ITEM, ask="top", order="up")
    assert up.correct
    assert up.path == ["A", "AM", "AMC"]
    assert not read_answer("I do not know", ITEM, ask="top").correct


def rows_of(correct: list[list[bool]], hops: list[int]) -> list[dict[str, Any]]:
    return [{"item": i, "prompt_name": "qa", "hops": hops[i], "correct": right, "path_score": float(right), "ancestor_f1": 1.0,
             "subsequence": 1.0, "finish_reason": "stop", "words": 3} for i, runs in enumerate(correct) for right in runs]


def test_majority_bins_and_strata():
    rows = rows_of([[True, True, True], [True, True, False], [False, False, True], [False] * 3], [2, 2, 5, 3])
    whole, light, middle, heavy = summarise("model", rows, ["qa"])
    assert (whole["accuracy"], whole["all_correct"], whole["majority_incorrect"]) == (0.5, 0.25, 0.25)
    assert (light["stratum"], light["accuracy"], middle["accuracy"], heavy["accuracy"]) == ("light", 1.0, 0.0, 0.0)
    assert heavy["path_score"] == pytest.approx(1 / 3)


def test_gaps_of_two_models():
    def record(model: str, prompt: str, accuracy: float) -> dict[str, Any]:
        return {"model": model, "prompt": prompt, "stratum": "all", "items": 9, "accuracy": accuracy, "accuracy_error": 0.0,
                "path_score": 0.0}

    metrics = numbers([record("model", "qa", 0.778), record("before", "qa", 0.541), record("model", "structured", 0.778),
                       record("before", "structured", 0.703)], [], ["qa", "structured"])
    assert metrics["gap/qa"] == pytest.approx(0.237)
    assert metrics["gap_reduction/structured"] == pytest.approx(0.683544, abs=1e-6)


def config(folder: Path, **options: Any) -> dict[str, Any]:
    return {"method": "hierarchical_traversal", "model": {"path": "asset:tiny_llama"}, "items": 6, "runs": 2, "probes": 5,
            "sampling": {"max_new_tokens": 8}, "run_dir": str(folder), **options}


def test_a_model_compared_with_itself(tmp_path):
    manifest = next(iter(run(config(tmp_path, compare_with={"path": "asset:tiny_llama"}), quiet=True).values()))
    metrics = manifest["metrics"]
    assert metrics["similarity/between_models/queries"] == pytest.approx(1, abs=1e-6)
    assert metrics["centred_similarity/between_models/answers"] == pytest.approx(1, abs=1e-6)
    assert metrics["similarity/within_model"] == metrics["similarity/within_before"] < 1
    assert metrics["gap/qa"] == 0  # the same questions at the same seeds
    for name in ("accuracy", "path_score", "similarity"):
        assert (tmp_path / "plots" / f"{name}.png").stat().st_size > 5000
    records = list(csv.DictReader((tmp_path / "tables" / "answers.csv").open()))
    assert {(r["model"], r["prompt"]) for r in records} == {(m, p) for m in ("model", "before")
                                                            for p in ("qa", "cot", "structured", "shuffled")}
    from datasets import load_from_disk

    assert len(load_from_disk(manifest["outputs"]["data"])) == 6 * 4 * 2
    assert json.loads(Path(manifest["outputs"]["metrics"]).read_text()).keys() == metrics.keys()


def test_a_killed_study_resumes_at_the_first_chunk_not_written(tmp_path, monkeypatch):
    from mmalign.policies.causal_lm import CausalLMPolicy
    from text_llm.evaluation import hierarchical_traversal as module

    monkeypatch.setattr(module, "PROMPTS_PER_CHUNK", 6)
    calls: list[int] = []
    sample = CausalLMPolicy.sample

    def counted(self: Any, prompts: Any, *args: Any) -> Any:
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample(self, prompts, *args)

    monkeypatch.setattr(CausalLMPolicy, "sample", counted)
    with pytest.raises(KeyboardInterrupt):
        run(config(tmp_path / "a", probes=0), quiet=True)
    run(config(tmp_path / "a", probes=0), quiet=True)
    assert len(calls) == 3 + 2  # four chunks, two of them written before the end
    run(config(tmp_path / "b", probes=0), quiet=True)
    from datasets import load_from_disk

    first, second = (load_from_disk(str(tmp_path / name / "model" / "data"))["completion"] for name in "ab")
    assert list(first) == list(second)


@pytest.mark.parametrize(("options", "message"), [
    ({"options": 1}, "options"), ({"options": 27}, "options"), ({"runs": 0}, "runs"), ({"items": 0}, "items"),
    ({"prompts": ["qa", "qa"]}, "prompts"), ({"prompts": ["tree_of_thought"]}, "tree_of_thought"),
    ({"templates": {"qa": "{cod}"}}, "cod"), ({"templates": {"qa": "{"}}, "templates.qa"), ({"difficulty": "no"}, "difficulty"),
    ({"probes": -1}, "probes"), ({"ask": "color"}, "ask"),
])
def test_refused_options(options, message):
    with pytest.raises(ConfigError, match=message):
        parse(HierarchicalTraversalOptions, {"model": {"path": "asset:tiny_llama"}, **options}, root="")


def test_refuses_codes_that_are_not_in_the_tree(tmp_path):
    with pytest.raises(DataError, match="'A99' is not in the tree"):
        run(config(tmp_path, codes=["A99"], items=None), quiet=True)


def test_refuses_models_that_cannot_be_compared():
    from transformers import LlamaConfig, LlamaForCausalLM

    first: Any = load_policy(ModelOptions(path="asset:tiny_llama"))
    second: Any = load_policy(ModelOptions(path="asset:tiny_llama"))
    check_comparable(first, second)
    for key, value, message in (("num_hidden_layers", 3, "layers"), ("hidden_size", 32, "hidden size")):
        sizes = {"num_hidden_layers": 2, "hidden_size": 64, key: value}
        with torch.random.fork_rng(devices=[]):
            shape = LlamaConfig(vocab_size=len(first.tokenizer), intermediate_size=64, num_attention_heads=4, **sizes)
            other = LlamaForCausalLM(shape)
        second.replace_module(other)
        with pytest.raises(ConfigError, match=message):
            check_comparable(first, second)
    second.tokenizer.add_tokens(["<new>"])
    with pytest.raises(ConfigError, match="tokenizers"):
        check_comparable(first, second)


def test_statements_end_with_their_own_last_token():
    """The trap: an end mark behind every statement would be what "last token" reads."""

    class Marked:
        def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
            ids = [ord(c) for c in text]
            return type("Encoding", (), {"input_ids": [1, *ids, 2] if add_special_tokens else ids})

    assert statement_ids(Marked(), "ab") == [1, 97, 98]
    probes = make_probes(TREE, ["AMC1"])
    assert probes.queries[0].endswith("AMC1")
    assert probes.answers[0].endswith("lion")
    tokenizer = load_policy(ModelOptions(path="asset:tiny_llama")).tokenizer  # type: ignore[attr-defined]
    assert tokenizer.decode(statement_ids(tokenizer, probes.answers[0])) == probes.answers[0]
