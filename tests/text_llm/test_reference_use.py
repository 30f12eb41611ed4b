"""References in whole runs: stored scores replace the model, and what each kind holds in memory."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmalign.api import run
from mmalign.errors import ConfigError
from mmalign.policies.loading import ModelOptions, load_policy
from mmalign.policies.reference import PrecomputedReference, ReferenceOptions, make_reference
from mmalign.training.tuning import TuningOptions, make_tuning


def losses(folder: Path, kind: str, **options: Any) -> list[float]:
    tree = {"method": "dpo", "model": {"path": "asset:tiny_llama"}, "run_dir": str(folder), "reference": {"kind": kind},
            "data": {"path": "asset:arithmetic", "limit": 24, "arguments": {"pairs": True}}, "losses": [{"name": "rpo"}],
            "batch": {"examples_per_update": 8, "examples_per_forward": 4}, "steps": 6, "encoding": {"max_length": 128},
            "optimizers": [{"kind": "adamw", "lr": 1e-2}], **options}
    run(tree, quiet=True)
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_stored_scores_train_as_the_model_itself_does_over_epochs_and_other_batches(tmp_path):
    """24 rows, 6 updates of 8: every row is seen twice, beside other rows and so under other padding."""
    copy, stored = losses(tmp_path / "copy", "frozen_copy"), losses(tmp_path / "stored", "precomputed")
    assert stored == pytest.approx(copy, abs=2e-6)
    assert stored[-1] != pytest.approx(stored[0], abs=1e-2)


def test_stored_scores_are_computed_once(tmp_path, monkeypatch):
    whole = losses(tmp_path / "whole", "precomputed", checkpoint={"every": 2})
    calls = []
    original = PrecomputedReference.precompute
    monkeypatch.setattr(PrecomputedReference, "precompute",
                        lambda self, *args, **kwargs: (calls.append(1), original(self, *args, **kwargs))[1])
    folder = tmp_path / "whole"
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "status": "running"}))
    again = losses(folder, "precomputed", checkpoint={"every": 2})
    assert again == whole
    assert not calls


def test_scores_that_need_noise_cannot_be_stored(tmp_path):
    with pytest.raises(ConfigError, match=r"reference\.kind: precomputed"):
        run({"method": "diffusion_dpo", "model": {"path": "asset:shapes_base"}, "reference": {"kind": "precomputed"}, "steps": 1,
             "data": {"path": "asset:shapes", "limit": 4, "arguments": {"pairs": True}}, "run_dir": str(tmp_path),
             "batch": {"examples_per_update": 4}}, quiet=True)


def live_bytes() -> int:
    """Bytes of all tensors that exist, each storage once."""
    gc.collect()
    tensors = (item for item in gc.get_objects() if isinstance(item, torch.Tensor))
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def live_networks() -> int:
    gc.collect()
    return sum(isinstance(item, nn.Module) for item in gc.get_objects())


@pytest.mark.parametrize(("kind", "lora", "share"), [
    ("frozen_copy", False, 1.0), ("precomputed", False, 0.0), ("adapter_off", True, 0.0), ("adapter_ref", True, None),
])
def test_what_a_reference_holds(kind, lora, share):
    """One copy of the weights at most, nothing beside an adapter; never a second network."""
    policy = load_policy(ModelOptions(path="asset:tiny_llama"))
    if lora:
        make_tuning(TuningOptions(name="lora", r=2, target_modules="all-linear")).apply(policy, seed=0)  # type: ignore[call-arg]
    prepared, _ = policy.prepare_dataset([{"prompt": "a", "completion": " b"}])
    rows = policy.encode_rows(prepared)
    with torch.no_grad():
        policy.log_probs(rows)
    model = sum(p.numel() * p.element_size() for p in policy.module.parameters())
    adapter = sum(p.numel() * p.element_size() for p in policy.module.parameters() if p.requires_grad)
    before, networks = live_bytes(), live_networks()
    reference = make_reference(policy, ReferenceOptions(kind=kind))  # type: ignore[arg-type]
    assert reference is not None
    with torch.no_grad():
        reference.log_probs(rows)
    held = live_bytes() - before
    allowed = adapter if share is None else share * model
    assert held <= allowed + 0.02 * model
    assert held >= 0.9 * allowed
    assert live_networks() == networks
