"""Reward models leave as sequence classifiers: whole, as an adapter with its head, and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign.data.rows import Rows
from mmalign.data.tiny_llama import build_tiny_llama
from mmalign.hub.export import ExportOptions, export
from mmalign.policies.loading import ModelOptions
from mmalign.policies.provenance import write_provenance
from mmalign.policies.reward_lm import RewardPolicy
from mmalign.training.tuning.base import TuningOptions, make_tuning

TEXTS = ["What is 3 + 4?", "How many are left"]


@pytest.mark.parametrize(("tuning", "kind"), [("full", "auto"), ("lora", "adapter"), ("lora", "merged")])
def test_exported_scores(tmp_path: Path, tuning: str, kind: Any) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = tmp_path / "base"
    build_tiny_llama(base)
    policy = RewardPolicy.from_options(ModelOptions(path=str(base), device="cpu"), seed=2)
    make_tuning(TuningOptions(name=tuning)).apply(policy, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        expected = policy.log_probs(Rows({"input_ids": [policy.tokenizer(text)["input_ids"] for text in TEXTS]})).logp
    policy.save_pretrained(tmp_path / "model")
    write_provenance(tmp_path / "model", base_model=str(base), base_path=base, modality="text", method="reward_model")
    report = export(ExportOptions(model=str(tmp_path / "model"), output=str(tmp_path / "out"), kind=kind))
    assert report.gap is not None
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    if kind == "adapter":
        from peft import PeftModel

        plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=tokenizer.pad_token_id)
        model: Any = PeftModel.from_pretrained(plain, str(tmp_path / "out"))
        assert "AutoModelForSequenceClassification" in (tmp_path / "out" / "README.md").read_text()
    else:
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
        assert model.config.num_labels == 1
        assert model.config.pad_token_id == tokenizer.pad_token_id
        assert "text-classification" in (tmp_path / "out" / "README.md").read_text()
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        found = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
