"""Types of the peft package by name: what is trained, what is frozen, and that the start is the base model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmalign.data.assets import asset_path
from mmalign.data.rows import Rows
from mmalign.errors import ConfigError
from mmalign.policies.causal_lm import CausalLMPolicy
from mmalign.training.tuning import TUNINGS, TuningOptions, make_tuning

ZERO_START = {
    "lora": {"r": 4}, "dora": {"r": 4}, "rslora": {"r": 4}, "ia3": {}, "loha": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "lokr": {"r": 4, "target_modules": ["q_proj", "v_proj"]}, "oft": {"oft_block_size": 8, "target_modules": ["q_proj"]},
    "boft": {"boft_block_size": 8, "target_modules": ["q_proj"]}, "vera": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "layer_norm": {}, "hra": {"r": 4, "target_modules": ["q_proj"]},
    "fourierft": {"n_frequency": 8, "target_modules": ["q_proj"], "init_weights": True},
    "adalora": {"init_r": 4, "target_r": 2, "total_step": 10, "target_modules": ["q_proj", "v_proj"]},
}
PROMPTS = {"prompt": {"num_tokens": 4}, "prefix": {"num_virtual_tokens": 4}, "p_tuning": {"num_virtual_tokens": 4}}


def policy() -> CausalLMPolicy:
    return CausalLMPolicy.from_pretrained(asset_path("tiny_llama"))


def rows() -> Rows:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 300, (n,), generator=generator) for n in (7, 9, 5)]
    return Rows({"input_ids": ids, "labels": [i.clone() for i in ids]})


@pytest.mark.parametrize("name", [*ZERO_START, *PROMPTS])
def test_adapter_trains_alone_and_starts_as_the_base(name: str) -> None:
    base, adapted = policy(), policy()
    make_tuning(TuningOptions.model_validate({"name": name, **{**ZERO_START, **PROMPTS}[name]})).apply(adapted, seed=0)
    if name in ZERO_START:
        with torch.no_grad():
            torch.testing.assert_close(adapted.log_probs(rows()).logp, base.log_probs(rows()).logp, atol=2e-5, rtol=0)
    trained = {n: p for n, p in adapted.module.named_parameters() if p.requires_grad}
    frozen = {n: p.detach().clone() for n, p in adapted.module.named_parameters() if not p.requires_grad}
    assert trained
    assert sum(p.numel() for p in trained.values()) < 0.2 * sum(p.numel() for p in base.module.parameters())
    optimizer = torch.optim.SGD(trained.values(), lr=0.05)
    losses = []
    for _ in range(8):
        loss = -adapted.log_probs(rows()).logp.sum() / 18
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in adapted.module.named_parameters() if n in frozen)


def test_adapter_start_depends_on_the_seed_alone() -> None:
    def start(seed: int) -> Any:
        torch.rand(int(torch.randint(1, 9, ())))  # the global generator is somewhere else each time
        adapted = policy()
        make_tuning(TuningOptions.model_validate({"name": "lora", "r": 4})).apply(adapted, seed=seed)
        return [p.detach() for n, p in adapted.module.named_parameters() if "lora_A" in n]

    assert all(torch.equal(a, b) for a, b in zip(start(1), start(1), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(start(1), start(2), strict=True))


def test_lora_trains_what_peft_itself_trains() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    ours = policy()
    options = {"name": "lora", "r": 4, "alpha": 8, "target_modules": "all-linear"}
    make_tuning(TuningOptions.model_validate(options)).apply(ours, seed=0)
    plain = AutoModelForCausalLM.from_pretrained(asset_path("tiny_llama"))
    theirs = get_peft_model(plain, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    names = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (ours.module, theirs)]
    assert names[0] == names[1]


@pytest.mark.parametrize(("options", "parts"), [
    ({"name": "lora", "rnk": 4}, ["tuning.rnk", "r"]), ({"name": "lora", "target_modules": ["nothing"]}, ["target_modules"]),
    ({"name": "peft", "type": "lorra"}, ["tuning.type", "lora"]), ({"name": "lora", "r": 0}, ["tuning"]),
])
def test_senseless_adapter_options_are_refused_by_name(options: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        make_tuning(TuningOptions.model_validate(options)).apply(policy(), seed=0)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_every_common_peft_type_has_a_name() -> None:
    assert {"lora", "dora", "ia3", "prompt", "prefix", "adalora", "vera", "oft", "boft", "full"} <= set(TUNINGS.names())


def lora_run(folder, model):
    from mmalign.api import run

    tree = {"method": "dpo", "model": {"path": model}, "run_dir": str(folder), "steps": 3, "encoding": {"max_length": 64},
            "data": {"path": "asset:arithmetic", "limit": 16, "arguments": {"pairs": True, "levels": [1]}},
            "batch": {"examples_per_update": 4}, "optimizers": [{"kind": "adamw", "lr": 1e-2}],
            "tuning": {"name": "lora", "r": 4, "target_modules": "all-linear"}}
    run(tree, quiet=True)
    return str(folder / "model")


def test_training_goes_on_with_the_adapter_of_a_loaded_model(tmp_path):
    """As rounds of an online method do: no second adapter, the reference is the loaded one, the folder loads as before."""
    import json
    import math

    from safetensors.torch import load_file

    from mmalign.policies.loading import ModelOptions, load_policy
    from mmalign.policies.provenance import read_provenance

    first = lora_run(tmp_path / "one", "asset:tiny_llama")
    second = lora_run(tmp_path / "two", first)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    before, after = (load_file(f"{folder}/adapter_model.safetensors") for folder in (first, second))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    record = read_provenance(second)
    assert record["base_model"] == "asset:tiny_llama"  # not the first run's folder, whose adapter would be applied twice
    assert record["started_from"] == first
    policy = load_policy(ModelOptions(path=second))
    from mmalign.policies.base import TextSampling

    rollout = policy.sample(["1 + 1 ="], 2, TextSampling(max_new_tokens=4), torch.Generator().manual_seed(0))
    assert len(rollout) == 2


@pytest.mark.parametrize(("tuning", "key"), [
    ({"name": "lora", "r": 8}, "tuning.r"), ({"name": "ia3"}, "tuning.name"),
    ({"name": "lora", "r": 4, "target_modules": ["q_proj"]}, "tuning.target_modules"),
])
def test_another_adapter_on_top_of_a_loaded_one_is_refused(tuning, key, tmp_path):
    from mmalign.policies.loading import ModelOptions, load_policy

    loaded = load_policy(ModelOptions(path=lora_run(tmp_path, "asset:tiny_llama")))
    with pytest.raises(ConfigError, match=key):
        make_tuning(TuningOptions(**tuning)).apply(loaded, seed=0)
