"""The merge stage: folders, assets and adapters in, a folder that transformers loads out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmalign.data.assets import asset_path
from mmalign.errors import MmalignError
from mmalign.hub.card import card_text, gather_facts
from mmalign.hub.source import locate
from mmalign.policies.provenance import read_provenance
from mmalign.stages import make_plan, run_plan


def run(folder: Path, **stage: Any) -> dict[str, Any]:
    entry = {"name": "merged", "kind": "merge", **stage}
    manifests = run_plan(make_plan({"run_dir": str(folder), "stages": [entry]}, config_folder=folder.parent), quiet=True)
    return manifests["merged"]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_llama with other weights, far enough for an arc."""
    folder = tmp_path_factory.mktemp("other")
    model = AutoModelForCausalLM.from_pretrained(asset_path("tiny_llama"))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.std().nan_to_num(1.0).clamp(min=0.1))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(asset_path("tiny_llama")).save_pretrained(folder)
    return folder


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_slerp_of_two_folders_loads_and_lists_its_parents(tmp_path: Path, other: Path) -> None:
    manifest = run(tmp_path / "run", models=["asset:tiny_llama", str(other)], merge={"name": "slerp", "t": 0.25},
                   max_shard_size="60KB")
    folder = Path(manifest["outputs"]["model"])
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    first, second = weights(asset_path("tiny_llama")), weights(other)
    from mmalign.weights.interpolate import slerp

    expected = slerp(first, second, 0.25)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])
    assert AutoTokenizer.from_pretrained(folder).chat_template == AutoTokenizer.from_pretrained(other).chat_template
    assert (folder / "generation_config.json").is_file()
    assert manifest["metrics"]["merge/fallback_share"] == 0
    record = read_provenance(folder)
    assert record is not None
    assert [parent["model"] for parent in record["parents"]] == ["asset:tiny_llama", str(other)]
    assert len({parent["weights"] for parent in record["parents"]}) == 2
    card = card_text(gather_facts(locate(str(folder)), "transformers"))
    assert f"merged from `asset:tiny_llama`, `{other}`" in card


def test_copies_of_one_model_are_reported_as_straight_lines(tmp_path: Path) -> None:
    """An untouched stage, or a small learning rate, makes "slerp" a soup: it must say so."""
    manifest = run(tmp_path / "run", models=["asset:tiny_llama", "asset:tiny_llama"])
    assert manifest["metrics"]["merge/fallback_share"] == 1
    assert manifest["metrics"]["merge/fallback_share_entries"] == 1
    merged, base = weights(manifest["outputs"]["model"]), weights(asset_path("tiny_llama"))
    assert all(torch.allclose(merged[name], base[name], rtol=0, atol=1e-7) for name in base)


def test_linear_of_three_in_bfloat16(tmp_path: Path, other: Path) -> None:
    manifest = run(tmp_path / "run", models=["asset:tiny_llama", str(other), str(other)], merge="linear", dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(manifest["outputs"]["model"], dtype="auto")
    assert model.dtype == torch.bfloat16
    first, second = weights(asset_path("tiny_llama")), weights(other)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, ((first[name] + 2 * second[name]) / 3).bfloat16())


def test_an_adapter_is_merged_into_its_base_first(tmp_path: Path) -> None:
    run_plan(make_plan({
        "run_dir": str(tmp_path / "lora"), "method": "sft", "model": {"path": "asset:tiny_llama"}, "steps": 2,
        "data": {"path": "asset:arithmetic", "limit": 8}, "tuning": {"name": "lora", "r": 4},
        "optimizers": [{"lr": 0.05}],
    }, config_folder=tmp_path, default_name="lora"), quiet=True)
    adapter = tmp_path / "lora" / "model"
    manifest = run(tmp_path / "run", models=["asset:tiny_llama", str(adapter)], merge={"name": "slerp", "t": 1.0})
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(asset_path("tiny_llama"))
    expected = PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    merged = weights(manifest["outputs"]["model"])
    changed = 0
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name])
        changed += not torch.equal(tensor, weights(asset_path("tiny_llama"))[name])
    assert changed > 0
    assert not (tmp_path / "run" / "merged" / "adapters").exists()


@pytest.mark.parametrize(("options", "message"), [
    ({"models": ["asset:tiny_llama"]}, "slerp merges exactly 2 models, not 1"),
    ({"models": ["a", "b"], "merge": {"name": "slerp", "t": 2}}, r"merge.t is 2.0; it must lie in \[0, 1\]"),
    ({"models": ["a", "b"], "merge": {"name": "sleerp"}}, "did you mean 'slerp'"),
    ({"models": ["a", "b"], "merge": {"name": "slerp", "tt": 0.5}}, r"merge\.tt: unknown key; did you mean merge\.t"),
    ({"models": ["a", "b"], "max_shard_size": "big"}, "max_shard_size is 'big'"),
])
def test_mistakes_are_found_before_anything_runs(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(MmalignError, match=message):
        make_plan({"run_dir": str(tmp_path), "stages": [{"name": "m", "kind": "merge", **options}]}, config_folder=tmp_path)


def test_models_that_do_not_fit_are_refused(tmp_path: Path, other: Path) -> None:
    with pytest.raises(MmalignError, match=r"models\[1\].*does not exist"):
        run(tmp_path / "1", models=["asset:tiny_llama", "./nowhere"])
    with pytest.raises(MmalignError, match=r"models\[1\].*diffusers pipeline"):
        run(tmp_path / "2", models=["asset:tiny_llama", "asset:shapes_base"])
    heads = tmp_path / "heads"
    shutil.copytree(other, heads)
    config = json.loads((heads / "config.json").read_text())
    (heads / "config.json").write_text(json.dumps(config | {"num_attention_heads": 8}))
    with pytest.raises(MmalignError, match=r"num_attention_heads is 4 in .* and 8 in"):
        run(tmp_path / "3", models=["asset:tiny_llama", str(heads)])
    assert not (tmp_path / "3" / "merged" / "model").exists()
    wide = tmp_path / "wide"
    shutil.copytree(other, wide)
    model = AutoModelForCausalLM.from_pretrained(wide)
    model.resize_token_embeddings(model.config.vocab_size + 8, mean_resizing=False)
    model.save_pretrained(wide)
    with pytest.raises(MmalignError, match=r"embed_tokens.weight' has shape"):
        run(tmp_path / "4", models=["asset:tiny_llama", str(wide)])
