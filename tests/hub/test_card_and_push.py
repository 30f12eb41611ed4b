"""The model card, the reproducibility file, and uploading."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
from hub_models import make_run, train_adapter, train_lora
from huggingface_hub import ModelCard

from mmalign.errors import ExportError
from mmalign.hub.card import CardFacts, Measure, card_text, measures
from mmalign.hub.export import ExportOptions, export
from mmalign.policies.provenance import write_provenance


def card_of(text: str) -> ModelCard:
    return ModelCard(text)


def test_card_of_an_adapter_from_a_run(llama, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\nbase\n")
    model = tmp_path / "my-run" / "model"
    train_adapter(base, model)
    write_provenance(
        model, base_model="org/base-model", base_path=base, modality="text", method="no_such_method", reference="beef",
    )
    run = make_run(model)
    out = export(ExportOptions(model=str(run))).folder
    assert out == run / "export"
    card = ModelCard.load(out / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == "org/base-model"
    assert data["base_model_relation"] == "adapter"
    assert (data["license"], data["library_name"], data["pipeline_tag"]) == ("apache-2.0", "peft", "text-generation")
    assert data["datasets"] == ["org/some-data"]
    assert {"mmalign", "no_such_method", "text", "lora"} <= set(data["tags"])
    result = data["model-index"][0]["results"][0]
    assert (result["metrics"][0]["type"], result["metrics"][0]["value"]) == ("answer_match", 0.75)
    assert "| answer_match | 0.25 ± 0.05 | 0.75 ± 0.04 | +0.5 |" in card.text
    assert "`answer_match`, weight 2.0, extract = tag" in card.text
    assert "PeftModel.from_pretrained" in card.text
    record = json.loads((out / "reproducibility.json").read_text())
    assert (record["seed"], record["git"], record["reference"], record["inputs"]) == (3, "abc", "beef", {"d": "1f"})
    assert record["config"]["tracking"] == {"wandb_api_key": "***"}
    assert record["versions"]["training"] == {"torch": "2"}
    assert "transformers" in record["versions"]["export"]


def test_card_claims_nothing_that_is_not_known(sd, tmp_path):
    train_lora(sd, tmp_path / "lora", provenance=False)
    out = export(ExportOptions(model=str(tmp_path / "lora"), output=str(tmp_path / "out"), base=str(sd))).folder
    card = ModelCard.load(out / "README.md")
    data = card.data.to_dict()
    assert "base_model" not in data  # a path of this machine is no hub id
    assert "model-index" not in data
    assert "datasets" not in data
    assert data["license"] == "openrail++"
    assert {"text-to-image", "diffusers", "lora"} <= set(data["tags"])
    assert "Not evaluated." in card.text
    assert "load_lora_weights" in card.text


@pytest.mark.parametrize("kind", ["transformers", "merged", "adapter", "pipeline", "unet", "diffusers_lora"])
def test_snippets_are_python_and_cards_parse(kind):
    facts = CardFacts("x", kind, base_id="org/base", repo_id="me/x", measures=[Measure("m", 1.0)], absent=["text_encoder_3"])
    text = card_text(facts)
    compile(text.partition("```python\n")[2].partition("```")[0], "snippet", "exec")
    card = card_of(text)
    assert card.data.base_model == "org/base"
    assert card.data.base_model_relation == ("adapter" if kind in ("adapter", "diffusers_lora") else "finetune")
    if kind == "pipeline":
        assert "text_encoder_3=None" in text


def test_measures_prefer_a_paired_comparison(tmp_path):
    numbers = {"before/r": 0.1, "after/r": 0.4, "difference/r": 0.3, "difference/r/error": 0.02, "eval/r": 0.4}
    (found,) = measures({"metrics": numbers}, None)
    assert (found.before, found.after, found.difference_error) == (0.1, 0.4, 0.02)
    (only,) = measures({"metrics": {"eval/r": 0.5, "eval/r/error": 0.1, "loss": 1.0}}, tmp_path)
    assert (only.before, only.after, only.after_error) == (None, 0.5, 0.1)
    assert measures({}, tmp_path) == []


class StubApi:
    """Records calls instead of making them."""

    calls: list[tuple]

    def __init__(self, token=None, failing=False):
        self.calls, self.failing = [], failing

    def create_repo(self, repo_id, *, private, exist_ok):
        self.calls.append(("create", repo_id, private, exist_ok))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        if self.failing:
            raise OSError("connection reset")
        self.calls.append(("upload", repo_id, folder_path))


@pytest.fixture
def stub(monkeypatch):
    stub = StubApi()
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda token: stub)
    return stub


def test_push(llama, tmp_path, stub):
    report = export(ExportOptions(model=str(llama), output=str(tmp_path / "out"), push_to_hub="me/model", private=False))
    assert stub.calls == [("create", "me/model", False, True), ("upload", "me/model", str(tmp_path / "out"))]
    assert report.url == "https://huggingface.co/me/model"
    assert "uploaded to" in report.summary()
    assert 'from_pretrained("me/model"' in (tmp_path / "out" / "README.md").read_text()


def test_a_failed_upload_keeps_the_export(llama, tmp_path, stub):
    stub.failing = True
    with pytest.raises(ExportError, match=r"export is complete in .*connection reset.*hf upload me/model"):
        export(ExportOptions(model=str(llama), output=str(tmp_path / "out"), push_to_hub="me/model"))
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_push_is_refused_offline(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants", SimpleNamespace(HF_HUB_OFFLINE=True))
    with pytest.raises(ExportError, match="HF_HUB_OFFLINE is set"):
        export(ExportOptions(model=str(llama), output=str(tmp_path / "out"), push_to_hub="me/model"))


@pytest.mark.parametrize(("key", "value"), [("push_to_hub", "model"), ("tolerance", -1.0), ("kind", "gguf"), ("dtype", "int8")])
def test_options_are_checked(key, value):
    with pytest.raises(ValueError, match=key):
        ExportOptions(model="x", **{key: value})
