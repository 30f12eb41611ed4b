"""Reward models: where the score is read, what can be loaded, and folders that work without mmalign."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_text import tiny_model, tiny_tokenizer

from mmalign.data.rows import Rows
from mmalign.errors import CheckpointError, ConfigError, DataError
from mmalign.policies.loading import ModelOptions
from mmalign.policies.reward_lm import RewardPolicy, load_reward_lm
from mmalign.training.tuning.base import TuningOptions, make_tuning

SENTENCES = ["w1 w2 w3 <eos>", "w4 <eos>", "w5 w6 w7 w8 w9 <eos>"]


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path, *, seed: int = 0, **further: Any) -> RewardPolicy:
    return RewardPolicy.from_options(ModelOptions(path=str(folder), device="cpu"), seed=seed, **further)


def rows(policy: RewardPolicy, texts: list[str] = SENTENCES) -> Rows:
    return Rows({"input_ids": [policy.tokenizer(text)["input_ids"] for text in texts]})


def scores(policy: RewardPolicy, texts: list[str] = SENTENCES) -> torch.Tensor:
    with torch.no_grad():
        return policy.log_probs(rows(policy, texts)).logp


def test_scores_do_not_depend_on_the_batch(language_model: Path) -> None:
    policy = load(language_model)
    together = scores(policy)
    assert together.shape == (3, 1)
    assert policy.action_mask(rows(policy)).tolist() == [[True]] * 3
    torch.testing.assert_close(together, torch.cat([scores(policy, [text]) for text in SENTENCES]), rtol=1e-5, atol=1e-6)
    policy.rows_per_forward = 2
    torch.testing.assert_close(together, scores(policy), rtol=1e-5, atol=1e-6)


def test_the_score_belongs_to_the_last_token_that_is_not_padding(language_model: Path) -> None:
    policy = load(language_model)
    ids = rows(policy)["input_ids"]
    hidden = [policy.model.model(torch.tensor([row])).last_hidden_state[0, -1] for row in ids]
    expected = torch.stack([policy.model.score(state) for state in hidden])
    torch.testing.assert_close(scores(policy), expected.detach(), rtol=1e-5, atol=1e-6)


def test_the_end_token_as_padding_reads_the_token_before_it(language_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    module, tokenizer = load_reward_lm(ModelOptions(path=str(language_model), device="cpu"))
    tokenizer.pad_token = None
    policy = RewardPolicy(module, tokenizer)
    assert "scores are read at the token before" in caplog.text
    assert policy.model.config.pad_token_id == tokenizer.eos_token_id == policy.pad_id
    torch.testing.assert_close(scores(policy), scores(policy, [text.removesuffix(" <eos>") for text in SENTENCES]),
                               rtol=1e-5, atol=1e-6)


def test_a_new_head_depends_on_the_seed_alone(language_model: Path) -> None:
    before = torch.get_rng_state()
    heads = [load(language_model, seed=seed).model.score.weight for seed in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert torch.equal(torch.get_rng_state(), before)
    assert float(heads[0].std()) == pytest.approx(33**-0.5, rel=0.5)


FRESH = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, base = sys.argv[1:3]
tokenizer = AutoTokenizer.from_pretrained(folder)
if base:
    from peft import PeftModel
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    model = PeftModel.from_pretrained(model, folder)
else:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
batch = tokenizer(json.loads(sys.argv[3]), padding=True, return_tensors="pt")
with torch.no_grad():
    logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
print(json.dumps({"logits": logits.tolist(), "mmalign": "mmalign" in sys.modules}))
"""


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_saved_folders_give_the_same_scores_without_mmalign(language_model: Path, tmp_path: Path, tuning: str) -> None:
    policy = load(language_model, seed=5)
    make_tuning(TuningOptions(name=tuning)).apply(policy, seed=0)
    trained = [p for p in policy.module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    policy.log_probs(rows(policy)).logp.sum().backward()
    assert policy.model.score.weight.requires_grad or tuning == "lora"
    optimizer.step()
    policy.save_pretrained(tmp_path / "model")
    expected = scores(policy)
    base = str(language_model) if tuning == "lora" else ""
    result = subprocess.run([sys.executable, "-c", FRESH, str(tmp_path / "model"), base, json.dumps(SENTENCES)],
                            capture_output=True, text=True, check=True, cwd=tmp_path)
    answer = json.loads(result.stdout.strip().splitlines()[-1])
    assert not answer["mmalign"]
    torch.testing.assert_close(torch.tensor(answer["logits"]), expected, rtol=1e-5, atol=1e-6)
    again = load(tmp_path / "model", head="stored")
    torch.testing.assert_close(scores(again), expected, rtol=1e-5, atol=1e-6)


def test_the_head_learns_beside_an_adapter(language_model: Path) -> None:
    policy = load(language_model)
    make_tuning(TuningOptions.model_validate({"name": "lora", "r": 2})).apply(policy, seed=0)
    learned = {name for name, p in policy.module.named_parameters() if p.requires_grad}
    assert any("score" in name for name in learned)
    assert any("lora_A" in name for name in learned)
    assert not any("embed_tokens" in name for name in learned)


def test_refusals(language_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    policy = load(language_model)
    with pytest.raises(ConfigError, match="no entropy"):
        policy.log_probs(rows(policy), want=("entropy",))
    with pytest.raises(ConfigError, match="cannot generate"):
        policy.sample(["w1"], 1, None, torch.Generator())
    with pytest.raises(ConfigError, match="rollouts"):
        policy.unfold(None, fraction=1.0, generator=torch.Generator())
    with pytest.raises(DataError, match="window of 128"):
        policy.log_probs(Rows({"input_ids": [[7] * 200]}))
    with pytest.raises(DataError, match="prepare_dataset"):
        policy.encode_rows([{"chosen": "a"}])
    with pytest.raises(ConfigError, match="without a score head"):
        load(language_model, head="stored")
    AutoModelForSequenceClassification.from_pretrained(language_model, num_labels=3).save_pretrained(tmp_path / "three")
    with pytest.raises(CheckpointError, match="3 labels"):
        load(tmp_path / "three")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(CheckpointError, match="cannot load"):
        load(tmp_path / "nothing")
    from peft import LoraConfig, get_peft_model

    get_peft_model(tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path=str(language_model))
                   ).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match="adapter of a language model"):
        RewardPolicy.from_options(ModelOptions(path=str(language_model), adapter=str(tmp_path / "adapter"), device="cpu"))
