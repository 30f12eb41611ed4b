"""Domain adaptation end to end: what a merge keeps, which stages run, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmalign.errors import ConfigError
from mmalign.metrics.synergy import diversity, improvement, synergy
from mmalign.stages import make_plan, run_plan

GENERAL = {"path": "asset:languages", "arguments": {"sizes": {"english": 300}}}
DOMAIN = {"path": "asset:languages", "arguments": {"sizes": {"german": 300}}}
PAIRS = {"path": "asset:languages", "arguments": {"sizes": {"german": 16}, "pairs": True}}
CPT = {"encoding": {"max_length": 64}, "batch": {"examples_per_update": 16}, "optimizers": [{"lr": 3e-3}]}
SHORT = {"batch": {"examples_per_update": 8}, "steps": 2, "encoding": {"max_length": 96}, "optimizers": [{"lr": 1e-3}]}


def plan(folder: Path, seed: int = 0, **options: Any) -> Any:
    tree = {"run_dir": str(folder), "seed": seed, "method": "domain_adaptation", **options}
    return make_plan(tree, config_folder=folder.parent)


def likelihood_of(data: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "likelihood", "data": {**data, "split": "test"}, "encoding": {"max_length": 64}}


@pytest.mark.slow
def test_a_merge_keeps_the_general_model_and_gains_the_domain(tmp_path: Path) -> None:
    """At t 0.5 it is better on the domain than the general parent, and on general text than the domain parent."""
    for seed in range(3):
        general = run_plan(make_plan({
            "run_dir": str(tmp_path / f"general{seed}"), "seed": seed, "method": "continued_pretraining",
            "model": {"path": "asset:tiny_llama"}, "data": GENERAL, "steps": 100, **CPT}, config_folder=tmp_path), quiet=True)
        start = next(iter(general.values()))["outputs"]["model"]
        manifests = run_plan(plan(
            tmp_path / f"run{seed}", seed, model={"path": start},
            cpt={"data": DOMAIN, "steps": 25, **CPT, "optimizers": [{"lr": 1e-3}]},
            merge={"merge": {"name": "slerp", "t": 0.5}},
            evaluation={"general": likelihood_of(GENERAL), "domain": likelihood_of(DOMAIN)},
        ), quiet=True)
        nll = {(model, text): manifests[f"{model}-{text}"]["metrics"]["nll"]
               for model in ("general", "cpt", "merge_cpt") for text in ("general", "domain")}
        assert nll["merge_cpt", "domain"] < nll["general", "domain"] - 0.2
        assert nll["merge_cpt", "general"] < nll["cpt", "general"] - 0.1
        gains = manifests["merge_cpt-domain-gain"]["metrics"]
        assert gains["improvement/-nll"] <= 0  # no more than the better parent, as published for small models
        assert gains["synergy/-nll"] == pytest.approx(
            (nll["general", "domain"] + nll["cpt", "domain"]) / 2 - nll["merge_cpt", "domain"])
        assert "merge/fallback_share" in manifests["merge_cpt"]["metrics"]


@pytest.mark.parametrize("kind", ["dpo", "orpo"])
def test_all_stages_chain_and_each_merge_follows_its_own(tmp_path: Path, kind: str) -> None:
    manifests = run_plan(plan(
        tmp_path / "run", model={"path": "asset:tiny_llama"}, cpt={"data": DOMAIN, **SHORT}, sft={"data": DOMAIN, **SHORT},
        preference={"method": kind, "data": PAIRS, **SHORT}, merge_after=["sft", "preference"],
    ), quiet=True)
    assert list(manifests) == ["cpt", "sft", "merge_sft", "preference", "merge_preference"]
    assert manifests["sft"]["config"]["model"]["path"] == manifests["cpt"]["outputs"]["model"]
    assert manifests["preference"]["config"]["model"]["path"] == manifests["sft"]["outputs"]["model"]
    assert manifests["merge_preference"]["config"]["models"] == ["asset:tiny_llama", manifests["preference"]["outputs"]["model"]]
    if kind == "dpo":  # the reference is the fine-tuned model: the first loss is log 2
        first = (Path(manifests["preference"]["outputs"]["metrics"]).read_text().splitlines())[0]
        assert '"loss": 0.6931' in first


def test_an_untouched_stage_merges_into_itself(tmp_path: Path) -> None:
    """A learning rate of zero: parents are identical and every tensor falls back."""
    manifests = run_plan(plan(
        tmp_path / "run", model={"path": "asset:tiny_llama"}, preference={"data": PAIRS, **SHORT, "optimizers": [{"lr": 0.0}]},
    ), quiet=True)
    assert manifests["merge_preference"]["metrics"]["merge/fallback_share"] == 1
    before, after = (load_file(next(Path(manifests[name]["outputs"]["model"]).glob("*.safetensors")))
                     for name in ("preference", "merge_preference"))
    assert all(torch.allclose(before[name], after[name], rtol=0, atol=1e-7) for name in before)


def test_stages_are_switchable_and_the_general_model_may_be_another(tmp_path: Path) -> None:
    only = plan(tmp_path / "a", model={"path": "asset:tiny_llama"}, sft={"data": DOMAIN, **SHORT}, merge=None)
    assert [stage.name for stage in only.stages] == ["sft"]
    assert next(iter(only.outputs.values()))["model"] == "sft.model"
    other = plan(tmp_path / "b", model={"path": "asset:tiny_llama"}, general="some/instruct", sft={"data": DOMAIN, **SHORT})
    assert other.stages[-1].tree["models"] == ["some/instruct", "${stages.sft.model}"]
    assert other.stages[-1].tree["merge"]["t"]["self_attn"] == [0, 0.5, 0.3, 0.7, 1]
    assert next(iter(other.outputs.values()))["model"] == "merge_sft.model"


@pytest.mark.parametrize(("options", "message"), [
    ({}, "at least one of cpt, sft and preference"),
    ({"sft": {"data": DOMAIN, "model": {"path": "x"}}}, "sft.model"),
    ({"preference": {"method": "ppo", "data": PAIRS}}, "preference.method: dpo or orpo"),
    ({"sft": {"data": DOMAIN}, "merge_after": ["cpt"]}, "merge_after: 'cpt' is no stage of this run"),
    ({"sft": {"data": DOMAIN}, "merge": None, "merge_after": ["sft"]}, "there is no merge"),
    ({"sft": {"data": DOMAIN}, "merge": {"models": ["a", "b"]}}, "merge.models"),
    ({"sft": {"data": DOMAIN}, "merge": {"merge": {"name": "slerp", "t": 1.5}}}, r"merge.t is 1.5"),
    ({"sft": {"data": DOMAIN, "stepz": 3}}, "did you mean stages?.sft.steps|did you mean .*steps"),
    ({"sft": {"data": DOMAIN}, "evaluation": {"x": {"kind": "score"}}}, "evaluation.x.kind"),
])
def test_refusals_name_the_key(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(tmp_path, model={"path": "asset:tiny_llama"}, **options)


def test_synergy_improvement_and_diversity() -> None:
    assert synergy(0.4, 0.6, 0.7) == pytest.approx(0.2)
    assert improvement(0.4, 0.6, 0.7) == pytest.approx(0.1)
    assert diversity(0.4, 0.6) == pytest.approx(0.2)


def test_packing_needs_a_length_and_learns_every_token(tmp_path: Path) -> None:
    base = {"run_dir": str(tmp_path / "r"), "method": "continued_pretraining", "model": {"path": "asset:tiny_llama"}, "steps": 1,
            "data": DOMAIN}
    for encoding, message in (({"max_length": None}, "encoding.max_length: packing needs"),
                              ({"completion_only_loss": True}, "encoding.completion_only_loss")):
        with pytest.raises(ConfigError, match=message):
            run_plan(make_plan({**base, "encoding": encoding}, config_folder=tmp_path), quiet=True)
