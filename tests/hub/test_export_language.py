"""Exports of language models: same tokens in a process that knows only the plain library."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hub_models import make_run, train_adapter
from safetensors.torch import load_file, save_file

from mmalign.errors import ExportError
from mmalign.hub.check import check_export, load_in_fresh_process
from mmalign.hub.export import ExportOptions, export
from mmalign.hub.language import inference_template, load_model, load_with_adapter, probe_ids, probe_logits
from mmalign.policies.provenance import read_provenance, write_provenance

IDS = [5, 40, 7, 120, 33]


def greedy(model, count: int = 16) -> list[int]:
    ids = torch.tensor([IDS])
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count)
    return out[0, len(IDS):].tolist()


def statuses(folder: Path) -> dict[str, str]:
    order = ("ok", "warn", "fail")
    found: dict[str, str] = {}
    for check in check_export(folder):
        found[check.item] = max(found.get(check.item, "ok"), check.status, key=order.index)
    return found


@pytest.mark.slow
def test_full_model_gives_the_same_tokens_with_transformers_alone(llama, tmp_path):
    model = tmp_path / "run" / "model"
    shutil.copytree(llama, model)
    write_provenance(model, base_model="org/base", modality="text", method="sft")
    make_run(model)
    report = export(ExportOptions(model=str(tmp_path / "run"), output=str(tmp_path / "out"), max_shard_size="100KB"))
    assert report.kind == "transformers"
    assert report.gap.absolute == 0
    assert len(list(report.folder.glob("model-*-of-*.safetensors"))) > 1
    assert (report.folder / "model.safetensors.index.json").is_file()
    fresh = load_in_fresh_process(report.folder, input_ids=IDS)
    assert "mmalign" not in fresh.modules
    assert "peft" not in fresh.modules
    assert fresh.tokens == greedy(load_model(llama))
    assert set(statuses(report.folder).values()) <= {"ok", "warn"}
    assert "{%" in (report.folder / "chat_template.jinja").read_text()
    assert "generation %}" not in (report.folder / "chat_template.jinja").read_text()
    assert not list(tmp_path.glob(".out*"))


def test_generation_config_stops_at_the_end_of_a_turn(llama, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(llama, source)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "temperature": 0.7, "do_sample": False}))
    assert statuses(source)["generation_config"] == "fail"
    out = export(ExportOptions(model=str(source), output=str(tmp_path / "out"))).folder
    written = json.loads((out / "generation_config.json").read_text())
    assert written["eos_token_id"] == [0, 2]  # <|im_end|> joins the one that was there
    assert written["do_sample"] is True
    assert written["pad_token_id"] == 0
    assert statuses(out)["generation_config"] == "ok"


def test_dtype_is_cast_once_and_declared(llama, tmp_path):
    out = export(ExportOptions(model=str(llama), output=str(tmp_path / "out"), dtype="bfloat16"))
    assert out.dtype == "bfloat16"
    assert json.loads((out.folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert 0 < out.gap.relative < 0.05
    original = load_file(llama / "model.safetensors")
    for name, tensor in load_file(out.folder / "model.safetensors").items():
        assert torch.equal(tensor, original[name].bfloat16())
    with pytest.raises(ExportError, match=r"does not reproduce.*Nothing was written"):
        export(ExportOptions(model=str(llama), output=str(tmp_path / "strict"), dtype="bfloat16", tolerance=1e-6))
    assert not (tmp_path / "strict").exists()


@pytest.mark.parametrize("config", [
    {}, {"use_rslora": True}, {"use_dora": True}, {"target_modules": "all-linear"}, {"modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj", "embed_tokens"]},
    {"modules_to_save": ["embed_tokens"]},
    {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
], ids=str)
def test_merged_equals_the_live_adapter_whatever_it_touches(llama, tmp_path, config):
    live = train_adapter(llama, tmp_path / "adapter", **config)
    ids = probe_ids(live.get_base_model())
    with torch.no_grad():
        expected = live(input_ids=ids).logits
    report = export(ExportOptions(model=str(tmp_path / "adapter"), output=str(tmp_path / "out"), kind="merged"))
    merged = load_model(report.folder)
    assert torch.allclose(merged(input_ids=ids).logits, expected, atol=1e-4)
    assert not torch.allclose(probe_logits(load_model(llama)), expected, atol=1e-2)
    written = json.loads((report.folder / "config.json").read_text())
    tied = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    touched = {"lm_head", "embed_tokens"} & {*config.get("modules_to_save", ()), *config.get("target_modules", ())}
    assert written["tie_word_embeddings"] is tied is (not touched or "ensure_weight_tying" in config)
    assert statuses(report.folder)["tied embeddings"] == "ok"


@pytest.mark.slow
def test_merged_model_in_a_fresh_process(llama, tmp_path):
    live = train_adapter(llama, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    report = export(ExportOptions(model=str(tmp_path / "adapter"), output=str(tmp_path / "out"), kind="merged"))
    fresh = load_in_fresh_process(report.folder, "merged", input_ids=IDS)
    assert fresh.tokens == greedy(live)
    assert not {"mmalign", "peft"} & set(fresh.modules)
    assert statuses(report.folder)["tokenizer"] == "ok"  # taken from the base: the adapter folder had none


def test_merging_in_half_precision_rounds_only_the_result(llama, tmp_path):
    live = train_adapter(llama, tmp_path / "adapter")
    report = export(ExportOptions(model=str(tmp_path / "adapter"), output=str(tmp_path / "out"), kind="merged", dtype="float16"))
    exact = live.merge_and_unload().state_dict()
    for name, tensor in load_file(report.folder / "model.safetensors").items():
        assert torch.equal(tensor, exact[name].half()), name


@pytest.mark.slow
def test_adapter_is_portable_and_gives_the_same_tokens(llama, tmp_path):
    live = train_adapter(llama, tmp_path / "adapter", target_modules=r".*layers\.0\..*\.(q|v)_proj")
    shutil.copyfile(llama / "tokenizer_config.json", tmp_path / "adapter" / "tokenizer_config.json")
    shutil.copyfile(llama / "tokenizer.json", tmp_path / "adapter" / "tokenizer.json")
    config_path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(config_path.read_text())
    config["inference_mode"] = False
    config_path.write_text(json.dumps(config))
    report = export(ExportOptions(model=str(tmp_path / "adapter"), output=str(tmp_path / "out")))
    assert report.kind == "adapter"
    assert report.gap.absolute == 0
    written = json.loads((report.folder / "adapter_config.json").read_text())
    assert written["inference_mode"] is True
    assert written["target_modules"] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]
    assert Path(written["base_model_name_or_path"]) == llama
    assert (report.folder / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()
    fresh = load_in_fresh_process(report.folder, input_ids=IDS)  # the base is found through adapter_config.json
    assert fresh.tokens == greedy(live)
    assert "mmalign" not in fresh.modules


def test_hub_id_of_the_base_is_recorded_instead_of_a_path(llama, tmp_path):
    train_adapter(llama, tmp_path / "adapter")
    write_provenance(tmp_path / "adapter", base_model="org/base-model", base_path=llama, modality="text", method="dpo")
    report = export(ExportOptions(model=str(tmp_path / "adapter"), output=str(tmp_path / "out")))
    assert json.loads((report.folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base-model"
    record = read_provenance(report.folder)
    assert (record["base_model"], record["base_path"], record["method"]) == ("org/base-model", None, "dpo")


def test_an_adapter_is_not_put_on_other_weights(llama, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    train_adapter(base, tmp_path / "adapter")
    weights = load_file(base / "model.safetensors")
    save_file({n: t + 0.01 for n, t in weights.items()}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"are not those that .* was trained on.*base=<folder>"):
        export(ExportOptions(model=str(tmp_path / "adapter"), output=str(tmp_path / "out"), kind="merged"))
    report = export(ExportOptions(model=str(tmp_path / "adapter"), output=str(tmp_path / "out"), kind="merged", base=str(base)))
    assert any("are not those" in text for text in report.warnings)
    assert "are not those" in (report.folder / "README.md").read_text()


def test_adapter_that_brought_new_tokens(llama, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.resize_token_embeddings(len(tokenizer))
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", modules_to_save=["embed_tokens"])
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    options = ExportOptions(model=str(tmp_path / "adapter"), output=str(tmp_path / "out"), kind="merged", base=str(llama))
    report = export(options)
    assert load_model(report.folder).get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert "<tool>" in AutoTokenizer.from_pretrained(report.folder).get_vocab()


@pytest.mark.parametrize(("change", "message"), [
    ({"model": "nowhere/at/all"}, "model: folder 'nowhere/at/all' does not exist"),
    ({"kind": "unet"}, "cannot become 'unet'; allowed: auto, adapter, merged"),
    ({"base": "/no/such/base"}, "base: folder '/no/such/base' does not exist"),
    ({"output": "INSIDE"}, "lie in one another"),
    ({"output": "FILE/x"}, "output: cannot write to"),
    ({"output": "FULL"}, "is not empty.*overwrite=true"),
    ({"push_to_hub": "me/model"}, "needs a token; run `hf auth login`"),
])
def test_refused_before_any_work(llama, tmp_path, monkeypatch, change, message):
    train_adapter(llama, tmp_path / "adapter")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "keep.txt").write_text("mine")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("mmalign.hub.export._write", lambda *_: pytest.fail("work was started"))
    places = {"INSIDE": tmp_path / "adapter" / "out", "FILE/x": tmp_path / "file" / "x" / "y", "FULL": tmp_path / "full"}
    options = {"model": str(tmp_path / "adapter"), "output": str(tmp_path / "out"), **change}
    options["output"] = str(places.get(options["output"], options["output"]))
    with pytest.raises(ExportError, match=message):
        export(ExportOptions(**options))
    assert (tmp_path / "full" / "keep.txt").read_text() == "mine"


def test_overwrite_keeps_the_old_folder_until_the_new_one_is_whole(llama, tmp_path, monkeypatch):
    output = tmp_path / "out"
    output.mkdir()
    (output / "old.txt").write_text("old")
    options = ExportOptions(model=str(llama), output=str(output), overwrite=True)
    with monkeypatch.context() as patched:
        patched.setattr("mmalign.hub.language.check_reload", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(RuntimeError, match="killed"):
            export(options)
    assert [p.name for p in output.iterdir()] == ["old.txt"]
    export(options)
    assert not (output / "old.txt").exists()
    assert (output / "model.safetensors").is_file()


def test_a_missing_base_is_named(llama, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    train_adapter(base, tmp_path / "adapter")
    shutil.rmtree(base)
    with pytest.raises(ExportError, match=r"does not exist.*give base=<folder or hub id>"):
        export(ExportOptions(model=str(tmp_path / "adapter"), output=str(tmp_path / "out"), kind="merged"))


def test_prompt_tuning_has_no_merged_form(llama, tmp_path):
    from peft import PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ExportError, match="PROMPT_TUNING adapters have no merged form; export kind=adapter"):
        export(ExportOptions(model=str(tmp_path / "adapter"), output=str(tmp_path / "out"), kind="merged", base=str(llama)))
    assert export(ExportOptions(model=str(tmp_path / "adapter"), output=str(tmp_path / "out"), base=str(llama))).gap.absolute == 0


def test_inference_template_renders_the_same():
    from jinja2 import Environment

    template = ("{% for m in ms %} {%- generation -%} {{ m }} {% endgeneration -%}\n {% generation %}x{%- endgeneration %}"
                " {% endfor %}")
    marked = template.replace("generation", "if true").replace("endif true", "endif")
    environment = Environment(trim_blocks=True, lstrip_blocks=True)
    texts = [environment.from_string(text).render(ms=[1, 2]) for text in (inference_template(template), marked)]
    assert texts[0] == texts[1]


def test_loading_with_an_adapter_that_does_not_fit(llama, tmp_path):
    train_adapter(llama, tmp_path / "adapter")
    other = tmp_path / "other"
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
    )).save_pretrained(other)
    with pytest.raises(ExportError, match="does not fit the base"):
        load_with_adapter(other, tmp_path / "adapter")
