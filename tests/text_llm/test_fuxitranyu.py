"""FuxiTranyu: what balanced sampling does to the small languages, the filter stage, and evaluation per language."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmalign.data.chat import TextEncoding
from mmalign.data.languages import make_languages
from mmalign.data.loading import DataOptions, load_rows
from mmalign.errors import ConfigError, DataError, MmalignError
from mmalign.metrics.representation import neuron_importance, representation_similarity
from mmalign.metrics.tokenization import fertility, word_count
from mmalign.policies.loading import ModelOptions, load_policy
from mmalign.report.diagnosis import diagnose
from mmalign.stage_kinds import filter as filter_stage
from mmalign.stages import make_plan, run_plan

TEXT = {"path": "asset:languages"}


def run(folder: Path, *stages: dict[str, Any], seed: int = 0) -> dict[str, dict[str, Any]]:
    tree = {"run_dir": str(folder), "seed": seed, "stages": list(stages)}
    return run_plan(make_plan(tree, config_folder=folder.parent), quiet=True)


@pytest.mark.slow
def test_a_small_exponent_helps_the_small_languages_more_than_it_costs_the_large(tmp_path: Path) -> None:
    found: dict[float, dict[str, float]] = {}
    rows = make_languages()
    train = {"path": write(tmp_path / "train.jsonl", rows)}
    small = {"path": write(tmp_path / "small.jsonl", [row for row in rows if row["language"] in ("french", "spanish")])}
    for exponent in (1.0, 0.3, 0.0):
        totals: dict[str, float] = {}
        for seed in range(3):
            stages = run(
                tmp_path / f"{exponent}-{seed}",
                {"name": "train", "method": "continued_pretraining", "model": {"path": "asset:tiny_llama"}, "data": train,
                 "mixture": {"exponent": exponent}, "encoding": {"max_length": 48}, "batch": {"examples_per_update": 16},
                 "steps": 120, "optimizers": [{"lr": 4e-3, "schedule": {"name": "cosine", "warmup": 0.1}}]},
                *[{"name": name, "kind": "likelihood", "model": {"path": "${stages.train.model}"}, "by": "language",
                   "data": data, "encoding": {"max_length": 64}}
                  for name, data in (("test", {**TEXT, "split": "test"}), ("seen", small))],
                seed=seed)
            metrics = stages["test"]["metrics"] | {f"seen/{k}": v for k, v in stages["seen"]["metrics"].items()}
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + value / 3
        found[exponent] = totals
    proportional, balanced = found[1.0], found[0.3]
    assert balanced["nll_worst"] < proportional["nll_worst"] - 0.1
    assert balanced["nll_spread"] < proportional["nll_spread"] - 0.1
    lost = balanced["nll/english"] - proportional["nll/english"]
    assert 0 < lost < proportional["nll_worst"] - balanced["nll_worst"]
    gap = {e: m["nll/french"] - m["seen/nll/french"] for e, m in found.items()}
    assert gap[0.0] > gap[0.3] > gap[1.0]  # the smaller the exponent, the more the small languages are learned by heart


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_filter_stage_counts_every_reason_and_group_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasketch")
    sentences = [row["text"] for row in load_rows(DataOptions(path="asset:languages", limit=12))]
    long = " ".join(sentences[:4])
    rows = [{"text": text, "language": "en"} for text in sentences] + [
        {"text": "hi", "language": "en"}, {"text": sentences[0].upper(), "language": "en"},
        {"text": "spam spam spam spam spam spam spam", "language": "de"}, {"text": sentences[1] + "!", "language": "en"},
        {"text": "zq xj kw vb qq zz yy ww", "language": "en"}, {"text": long, "language": "xx"},
        {"text": "buy now at http://spam.com today my friend", "language": "de"}]
    stage = {
        "name": "filter", "kind": "filter", "data": {"path": write(tmp_path / "rows.jsonl", rows)}, "by": "language",
        "heuristics": {"min_words": 3, "repetition": {"n": 2, "max_share": 0.5}, "groups": ["en", "de"],
                       "banned_urls": ["spam.com"]},
        "near_duplicates": {"threshold": 0.8}, "perplexity": {"model": {"path": "asset:tiny_llama"}, "max": 10**6,
                                                               "rows_per_chunk": 4},
    }
    plain = run(tmp_path / "run", stage)["filter"]
    expected = {"words": 1, "exact_duplicate": 1, "repetition": 1, "near_duplicate": 1, "other_group": 1, "banned_urls": 1}
    counts = {name.removeprefix("dropped/"): n for name, n in plain["metrics"].items() if name.startswith("dropped/")}
    assert counts == expected
    assert plain["metrics"]["kept"] == len(rows) - 6
    assert (plain["metrics"]["rows/de"], plain["metrics"]["kept/de"]) == (2, 0)
    kept = list(load_rows(DataOptions(path=plain["outputs"]["data"])))
    assert [row["text"] for row in kept][:12] == sentences
    dropped = json.loads((tmp_path / "run" / "filter" / "dropped.json").read_text())
    assert dropped["13"] == "exact duplicate"
    assert dropped["15"] == "near duplicate"
    # a threshold between the perplexities drops the upper ones, after an interruption as without
    middle = sorted(row["perplexity"] for row in kept)[6]
    stage["perplexity"]["max"] = middle
    calls: list[int] = []
    original = filter_stage.perplexities

    def breaking(policy: Any, texts: Any, rows_per_forward: int = 16) -> list[float]:
        calls.append(len(texts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(policy, texts, rows_per_forward)

    monkeypatch.setattr(filter_stage, "perplexities", breaking)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "two", stage)
    assert len(list((tmp_path / "two" / "filter" / "parts").glob("*.json"))) == 2
    resumed = run(tmp_path / "two", stage)["filter"]
    assert len(calls) == 3 + 2  # four chunks: two were kept, two made after the interruption
    assert resumed["metrics"]["dropped/perplexity"] == len(kept) - 7
    assert all(row["perplexity"] <= middle for row in load_rows(DataOptions(path=resumed["outputs"]["data"])))


def test_perplexity_is_that_of_the_model() -> None:
    policy: Any = load_policy(ModelOptions(path="asset:tiny_llama"), encoding=TextEncoding(max_length=64))
    text = "Anna has two apples"
    value = filter_stage.perplexities(policy, [text, " "])
    ids = policy.prepare_dataset([{"text": text}])[0][0]["input_ids"]
    batch = torch.tensor([ids])
    loss = policy.module(input_ids=batch, labels=batch).loss
    assert value[0] == pytest.approx(math.exp(loss.item()), rel=1e-4)
    assert value[1] == math.inf


@pytest.mark.parametrize(("options", "message"), [
    ({"perplexity": {"model": {"path": "asset:tiny_llama"}}}, "give max, min or both"),
    ({"perplexity": {"model": {"path": "asset:tiny_llama"}, "max": 2, "min": 3}}, "no text can be between"),
    ({"heuristics": {"groups": ["en"]}}, "heuristics.groups needs by"),
    ({"near_duplicates": {"threshold": 1.5}}, "near_duplicates.threshold"),
    ({"heuristics": {"min_word": 3}}, "did you mean .*min_words"),
])
def test_filter_refuses_before_it_runs(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan({"run_dir": str(tmp_path), "stages": [{"name": "f", "kind": "filter", "data": TEXT, **options}]},
                  config_folder=tmp_path)


def test_filter_refuses_what_the_rows_lack_and_an_empty_result(tmp_path: Path) -> None:
    for options, message in (({"by": "dialect"}, "by: the rows have no column 'dialect'"),
                             ({"column": "body"}, "no column 'body'"),
                             ({"heuristics": {"min_words": 500}}, r"every row was left out \(8 words\)")):
        with pytest.raises(DataError, match=message):
            run(tmp_path / message[:4], {"name": "f", "kind": "filter", "data": {**TEXT, "limit": 8}, **options})


def test_likelihood_by_language_matches_the_model(tmp_path: Path) -> None:
    data = {**TEXT, "split": "test", "limit": 12}
    stages = run(
        tmp_path / "run",
        {"name": "a", "kind": "likelihood", "model": {"path": "asset:tiny_llama"}, "data": data, "by": "language"},
        {"name": "b", "kind": "likelihood", "model": {"path": "asset:tiny_llama"}, "data": data, "by": "language",
         "compare_with": "${stages.a.folder}", "rows_per_forward": 5})
    policy: Any = load_policy(ModelOptions(path="asset:tiny_llama"))
    losses, tokens = 0.0, 0
    for row in load_rows(DataOptions.model_validate(data)):
        ids = torch.tensor([policy.prepare_dataset([row])[0][0]["input_ids"]])
        losses += float(policy.module(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    metrics = stages["a"]["metrics"]
    assert metrics["nll"] == pytest.approx(losses / tokens, rel=1e-5)
    languages = [metrics[f"nll/{name}"] for name in ("english", "german", "french", "spanish")]
    assert metrics["nll_worst"] == max(languages)
    assert metrics["nll_spread"] == pytest.approx(max(languages) - min(languages))
    assert stages["b"]["metrics"]["difference/nll/french"] == pytest.approx(0, abs=1e-6)
    assert metrics["fertility/spanish"] > 1
    with pytest.raises(DataError, match="by: some rows have no 'dialect'"):
        run(tmp_path / "bad", {"name": "a", "kind": "likelihood", "model": {"path": "asset:tiny_llama"}, "data": data,
                               "by": "dialect"})


def test_rewards_by_group(tmp_path: Path) -> None:
    reward = "def long(prompts, completions, answer, **columns):\n    return [float(len(a)) for a in answer]\n"
    (tmp_path / "mine.py").write_text(reward)
    rows = [{"prompt": f"{i}", "answer": "x" * (1 + 3 * (i % 2)), "language": "ab"[i % 2]} for i in range(6)]
    stage = {"name": "e", "kind": "evaluate", "model": {"path": "asset:tiny_llama"}, "sampling": {"max_new_tokens": 2},
             "data": {"path": write(tmp_path / "r.jsonl", rows)}, "rewards": [{"name": "mine.py:long"}], "by": "language"}
    metrics = run(tmp_path / "run", stage)["e"]["metrics"]
    values = {name: value for name, value in metrics.items() if name.startswith("group/") and not name.endswith("error")}
    assert sorted(values.values()) == [1.0, 4.0]
    with pytest.raises(DataError, match="by: some rows have no 'dialect'"):
        run(tmp_path / "bad", {**stage, "by": "dialect"})


def test_neuron_importance_properties() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(4, 3, dtype=torch.float64), nn.Linear(3, 1, dtype=torch.float64)
    x = torch.randn(5, 4, dtype=torch.float64)

    def importance(scale: float = 1.0) -> torch.Tensor:
        one, two = nn.Linear(4, 3, dtype=torch.float64), nn.Linear(3, 1, dtype=torch.float64)
        one.weight.data, one.bias.data = first.weight * scale, first.bias * scale
        two.weight.data, two.bias.data = second.weight / scale, second.bias
        return neuron_importance({"h": one}, [lambda: two(one(x)).tanh().mean()])["h"]

    torch.testing.assert_close(importance(7.0), importance())
    with torch.no_grad():
        first.weight[1], first.bias[1] = 0.0, 0.0
    assert importance()[1] == 0
    # linear loss: exactly the change when the neuron is set to zero
    hidden = first(x).detach()
    found = neuron_importance({"h": first}, [lambda: second(first(x)).mean(), lambda: second(first(2 * x)).mean()])["h"]
    for i in range(3):
        exact = [float((h[:, i] * second.weight[0, i]).mean().abs()) for h in (hidden, first(2 * x).detach())]
        assert float(found[i]) == pytest.approx(sum(exact) / 2)
    with pytest.raises(DataError, match="no batch"):
        neuron_importance({"h": first}, [])
    with pytest.raises(DataError, match="was not run"):
        neuron_importance({"other": nn.Linear(1, 1)}, [lambda: first(x).mean()])


def test_representation_similarity() -> None:
    a = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    b = torch.tensor([[0.0, 2.0]])
    torch.testing.assert_close(representation_similarity([a, b, a + torch.tensor([0.0, 2.0])]), torch.tensor(
        [[1, 0, 0.5**0.5], [0, 1, 0.5**0.5], [0.5**0.5, 0.5**0.5, 1]], dtype=torch.float64))
    assert representation_similarity([torch.ones(3, 2, 4), torch.ones(3, 5, 4)]).shape == (3, 2, 2)
    with pytest.raises(DataError, match="mean hidden state is zero"):
        representation_similarity([torch.zeros(1, 2), a])
    with pytest.raises(DataError, match="agree in layers and width"):
        representation_similarity([a, torch.ones(1, 3)])


def test_representations_stage(tmp_path: Path) -> None:
    stage = run(tmp_path / "run", {"name": "r", "kind": "representations", "model": {"path": "asset:tiny_llama"},
                                   "data": {**TEXT, "split": "test"}, "rows_per_group": 4})["r"]
    lines = Path(stage["outputs"]["importance"]).read_text().splitlines()
    assert len(lines) == 1 + 4 * 2 * 7  # languages x layers x linear maps
    assert 0 < stage["metrics"]["importance_deep_share/german"] < 1
    assert -1 <= stage["metrics"]["similarity"] <= 1


def test_fertility_counts_words_and_unspaced_characters() -> None:
    assert word_count("two words") == 2
    assert word_count("我爱 code") == 3
    assert fertility([4, 2], ["a b", "我"]) == 2
    with pytest.raises(DataError):
        fertility([1], ["  "])


def test_a_pad_that_equals_the_end_token_does_not_hide_it_from_the_loss() -> None:
    policy: Any = load_policy(ModelOptions(path="asset:tiny_llama"))
    policy.tokenizer.pad_token = policy.tokenizer.eos_token
    rows = policy.prepare_dataset([{"text": "a"}, {"text": "a longer text"}])[0]
    mask = policy.action_mask(policy.encode_rows(rows))
    assert [int(n) for n in mask.sum(1)] == [len(row["input_ids"]) - 1 for row in rows]
    assert all(row["labels"][-1] == policy.tokenizer.eos_token_id for row in rows)


def test_the_report_says_when_the_loss_jumps() -> None:
    calm = [{"step": i, "nll": 2.0 + 0.01 * (i % 3), "grad_norm": 1.0} for i in range(40)]
    assert not [remark for remark in diagnose(calm) if "jumped" in remark.text]
    calm[30] = {**calm[30], "nll": 4.5}
    assert [remark for remark in diagnose(calm) if "jumped to 4.5 after 30 updates" in remark.text]


@pytest.mark.parametrize(("options", "message"), [
    ({}, "at least one of cpt, sft and preference"),
    ({"sft": {"data": TEXT}, "filter": {}}, "there is no cpt"),
    ({"cpt": {"data": TEXT}, "filter": {"data": TEXT}}, "filter.data"),
    ({"cpt": {"data": TEXT, "model": {"path": "x"}}}, "cpt.model"),
    ({"cpt": {}}, "at least one|cpt.data"),
    ({"cpt": {"data": TEXT}, "mixture": {"exponent": -1}}, "exponent must be 0"),
    ({"cpt": {"data": TEXT}, "mixture": {"exponent": 1, "temperature": 2}}, "exactly one of"),
    ({"cpt": {"data": TEXT}, "evaluation": {"x": {"kind": "score"}}}, "evaluation.x.kind"),
])
def test_pipeline_refusals(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan({"run_dir": str(tmp_path), "method": "fuxitranyu", "model": {"path": "asset:tiny_llama"}, **options},
                  config_folder=tmp_path)


def test_pipeline_order_and_defaults(tmp_path: Path) -> None:
    plan = make_plan({
        "run_dir": str(tmp_path), "method": "fuxitranyu", "model": {"path": "asset:tiny_llama"}, "filter": {},
        "cpt": {"data": TEXT}, "sft": {"data": TEXT, "mixture": None}, "preference": {"data": TEXT},
        "evaluation": {"text": {"kind": "likelihood", "data": TEXT}},
    }, config_folder=tmp_path)
    trees = {stage.name: stage.tree for stage in plan.stages}
    assert list(trees) == ["start-text", "filter", "cpt", "cpt-text", "sft", "sft-text", "preference", "preference-text"]
    assert trees["cpt"]["data"] == {"path": "${stages.filter.data}"}
    assert trees["cpt"]["mixture"]["exponent"] == 0.3
    assert trees["sft"]["mixture"] is None
    assert trees["sft"]["neftune_noise_alpha"] == 5
    assert trees["preference"]["losses"] == [{"name": "sigmoid", "beta": 0.01}]
    assert trees["preference"]["model"]["path"] == "${stages.sft.model}"
    assert trees["preference-text"]["by"] == "language"
    assert trees["preference-text"]["compare_with"] == "${stages.start-text.folder}"


def test_unknown_ratio_and_missing_language_are_named(tmp_path: Path) -> None:
    train = {"name": "t", "method": "sft", "model": {"path": "asset:tiny_llama"}, "data": {**TEXT, "limit": 8}, "steps": 1}
    with pytest.raises(MmalignError, match=r"mixture\.ratios\.klingon: no row has language 'klingon'"):
        run(tmp_path / "1", {**train, "mixture": {"ratios": {"klingon": 1.0}}})
    with pytest.raises(MmalignError, match=r"mixture\.by: row 0 has no 'dialect'"):
        run(tmp_path / "2", {**train, "mixture": {"by": "dialect", "exponent": 0}})
