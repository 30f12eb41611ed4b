"""Built-in assets: the cache, the tiny model, pictures, and the real small chat model."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import threading
import time
import zipfile

import pytest
import torch
from PIL import Image

from mmalign.data import assets, emoji, fetch
from mmalign.data.assets import asset_path, asset_rows, fetch_asset, list_assets
from mmalign.data.chat import TextEncoding, encode_example, encode_prompt, mark_trained
from mmalign.data.digits import load_digits
from mmalign.data.tiny_llama import build_tiny_llama
from mmalign.errors import AssetError, DataError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_table_names_every_asset_with_its_size():
    entries = list_assets()
    assert {entry.name for entry in entries} >= {
        "smollm2", "tiny_llama", "shapes_base", "shapes", "arithmetic", "emoji", "digits"}
    assert all(entry.description and entry.size for entry in entries)
    assert [entry.kind for entry in entries] == sorted((entry.kind for entry in entries), reverse=True)


def test_a_folder_appears_only_when_it_is_complete(cache):
    def fail(folder):
        (folder / "half").write_text("x")
        raise AssetError("no network")

    with pytest.raises(AssetError, match=r"no network"):
        fetch.cached_folder("thing", fail)
    assert not (cache / "thing").exists()
    assert [path.name for path in cache.iterdir()] == [".thing.lock"] or not list(cache.iterdir())
    stale = cache / ".thing.abc"
    stale.mkdir()
    folder = fetch.cached_folder("thing", lambda target: (target / "whole").write_text("y") and None)
    assert (folder / "whole").read_text() == "y"
    assert not stale.exists()
    assert fetch.cached_folder("thing", fail) == folder


def test_two_at_once_fill_the_cache_once(cache):
    fills = []

    def fill(folder):
        fills.append(1)
        time.sleep(0.2)
        (folder / "file").write_text("x")

    found = []
    threads = [threading.Thread(target=lambda: found.append(fetch.cached_folder("thing", fill))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fills) == 1
    assert found == [cache / "thing"] * 4


def test_an_unwritable_cache_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MMALIGN_CACHE", str(tmp_path / "file"))
    with pytest.raises(AssetError, match=r"set MMALIGN_CACHE"):
        fetch.cached_folder("thing", lambda folder: None)


def test_clients_that_are_missing_or_fail(tmp_path):
    with pytest.raises(AssetError, match=r"no-such-client is not installed; do this"):
        fetch.run_client(["no-such-client"], tmp_path, description="x", size=1, advice="do this")
    command = [sys.executable, "-c", "print('the cause'); raise SystemExit(3)"]
    with pytest.raises(AssetError, match=r"failed \(exit 3\); do this\nthe cause"):
        fetch.run_client(command, tmp_path, description="x", size=1, advice="do this")
    assert list(tmp_path.iterdir()) == []


def test_wrong_files_are_refused(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"content")
    fetch.check_sha256(file, hashlib.sha256(b"content").hexdigest())
    with pytest.raises(AssetError, match=r"not the file this version"):
        fetch.check_sha256(file, "0" * 64)
    fetch.check_integrity(file, "sha512-" + base64.b64encode(hashlib.sha512(b"content").digest()).decode())
    with pytest.raises(AssetError, match=r"not the file this version"):
        fetch.check_integrity(file, "sha512-xxxx")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("../evil", "x")
        archive.writestr("good", "y")
    fetch.extract_member(tmp_path / "a.zip", "good", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "y"
    with pytest.raises(AssetError, match=r"cannot be read"):
        fetch.extract_member(tmp_path / "a.zip", "missing", tmp_path / "out")
    with pytest.raises(AssetError, match=r"cannot be read"):
        fetch.extract_member(file, "good", tmp_path / "out")


def test_tiny_llama_is_the_same_everywhere_and_loads_plainly(tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before = torch.random.get_rng_state()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        build_tiny_llama(tmp_path / name)
    assert torch.equal(torch.random.get_rng_state(), before)
    (tmp_path / "c").mkdir()
    build_tiny_llama(tmp_path / "c", seed=1)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["model.embed_tokens.weight"], c["model.embed_tokens.weight"])
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "a"), AutoTokenizer.from_pretrained(tmp_path / "a")
    assert model.config.vocab_size == len(tokenizer)
    assert 300 <= len(tokenizer) <= 500
    assert model.config.hidden_size == 64
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id
    assert tokenizer.decode(tokenizer("héllo 12\n").input_ids) == "héllo 12\n"
    row = encode_example({"messages": [{"role": "user", "content": "12?"}, {"role": "assistant", "content": "3"}]}, tokenizer)
    assert mark_trained(row["input_ids"], row["labels"], tokenizer).endswith("<|im_start|>assistant\n⟦3<|im_end|>⟧\n")
    assert tokenizer.convert_ids_to_tokens(tokenizer("12").input_ids) == ["1", "2"]
    logits = model(torch.tensor([row["input_ids"]])).logits
    assert 0.2 < logits.std(-1).mean() < 5  # distributions one can tell apart, none of them degenerate


def test_model_and_data_assets_are_not_mixed_up(cache):
    assert asset_path("asset:tiny_llama") == asset_path("tiny-llama") == cache / "tiny-llama-v1"
    assert fetch_asset("tiny_llama") == str(cache / "tiny-llama-v1")
    assert "columns id, prompt, completion, answer, level" in fetch_asset("arithmetic")
    with pytest.raises(AssetError, match=r"'arithmetic' is a data set: use it as data.path"):
        asset_path("arithmetic")
    with pytest.raises(AssetError, match=r"did you mean 'smollm2'"):
        asset_path("smollm")


def test_shapes_rows_have_the_common_columns():
    rows = asset_rows("shapes", split="train", n=3, seed=1)
    assert all(isinstance(row["images"][0], Image.Image) and "image" not in row for row in rows)
    assert {row["prompt"] for row in asset_rows("shapes", split="train", n=200)}.isdisjoint(
        row["prompt"] for row in asset_rows("shapes", split="test", n=50))


def test_digits():
    train, test = load_digits(split="train"), load_digits(split="test")
    assert len(train) + len(test) == 1797
    assert {row["id"] for row in train}.isdisjoint(row["id"] for row in test)
    row = train[0]
    assert row["images"][0].size == (32, 32)
    assert row["answer"] == str(row["class_id"])
    assert load_digits(5, seed=1)[0]["id"] != load_digits(5, seed=2)[0]["id"]
    with pytest.raises(DataError, match=r"has 1437 train rows, not 5000"):
        load_digits(5000)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(AssetError, match=r"pip install scikit-learn"):
        load_digits(1)


def fake_emoji(path, extra=()):
    """An archive shaped like the npm package, with 40 one-colour pictures."""
    categories = emoji.CATEGORIES
    entries = [{"name": f"THING {i}", "short_name": f"thing_{i}", "unified": f"1F{i:03X}", "image": f"1f{i:03x}.png",
                "category": categories[i % 3]} for i in range(40)]
    with tarfile.open(path, "w:gz") as archive:
        def add(name, content):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

        for i, entry in enumerate(entries):
            buffer = io.BytesIO()
            Image.new("RGBA", (64, 64), (i, 0, 0, 255 if i % 2 else 0)).save(buffer, "PNG")
            add(f"package/img/google/64/{entry['image']}", buffer.getvalue())
        add("package/emoji.json", json.dumps(entries).encode())
        add("package/LICENSE", b"MIT")
        add("package/img/google/sheets/64.png", b"sheet")
        for name, content in extra:
            add(name, content)


def test_emoji_rows_from_a_package(cache, tmp_path, monkeypatch):
    fake_emoji(tmp_path / "emoji.tgz", extra=[("package/img/google/64/../../../evil.png", b"x"), ("../evil", b"x")])
    monkeypatch.setattr(emoji, "npm_pack", lambda package, folder, **_: tmp_path / "emoji.tgz")
    monkeypatch.setattr(emoji, "check_integrity", lambda *_: None)
    train, test = asset_rows("emoji", split="train"), asset_rows("emoji", split="test")
    assert len(train) + len(test) == 40
    assert test
    row = next(row for row in train if row["id"] == "emoji-google-1f001")
    assert row["prompt"] == "thing 1"
    assert row["images"][0].getpixel((0, 0)) == (1, 0, 0)
    assert row["class_id"] == 1
    clear = next(row for row in train if row["id"] == "emoji-google-1f002")
    assert clear["images"][0].getpixel((0, 0)) == (255, 255, 255)  # transparent parts are white
    assert {row["answer"] for row in asset_rows("emoji", categories=["Flags"])} == {"Flags"}
    assert not list(tmp_path.rglob("evil*"))
    assert not (cache / "emoji-google-16.0.0" / "sheets").exists()
    for arguments, message in (({"vendor": "nokia"}, "vendor: the emoji asset has google"), ({"categories": ["Cars"]}, "Cars"),
                               ({"n": 500}, "data.limit")):
        with pytest.raises(DataError, match=message):
            asset_rows("emoji", **arguments)


def test_emoji_without_npm(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AssetError, match=r"npm is not installed; .*install Node.js"):
        asset_rows("emoji", n=1)


@pytest.mark.slow
def test_emoji_from_npm(tmp_path_factory):
    try:
        rows = asset_rows("emoji")
    except AssetError as error:
        pytest.skip(str(error))
    assert len(rows) > 1500
    assert {row["answer"] for row in rows} == set(emoji.CATEGORIES)
    assert rows[0]["images"][0].size == (64, 64)


@pytest.fixture(scope="module")
def smollm2():
    try:
        return asset_path("smollm2")
    except AssetError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_smollm2_loads_plainly_in_a_fresh_process_and_chats(smollm2):
    program = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]); tok = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "assert model.dtype == torch.float32 and not hasattr(model.config, 'quantization_config')\n"
        "assert not getattr(model, 'is_quantized', False) and 'mmalign' not in sys.modules\n"
        "chat = [{'role': 'user', 'content': 'What is the capital of France?'}]\n"
        "ids = tok.apply_chat_template(chat, add_generation_prompt=True, return_tensors='pt', return_dict=True)\n"
        "out = model.generate(**ids, max_new_tokens=20, do_sample=False)[0, ids['input_ids'].shape[1]:]\n"
        "print(repr(tok.decode(out)))\n"
    )
    run = subprocess.run([sys.executable, "-c", program, str(smollm2)], capture_output=True, text=True, check=True)
    assert run.stdout.strip().endswith("Paris.<|im_end|>'")
    config = json.loads((smollm2 / "config.json").read_text())
    assert "gguf" not in json.dumps(config).lower()
    assert config["pad_token_id"] != config["eos_token_id"]
    assert json.loads((smollm2 / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
    assert "Apache" in (smollm2 / "LICENSE").read_text()
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in (smollm2 / "README.md").read_text()


@pytest.mark.slow
def test_smollm2_tokenizer_and_template(smollm2):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.tokenize("  2024") == ["ĠĠ", "2", "0", "2", "4"]  # digits apart, as in the original
    talk = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"},
            {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
    row = encode_example({"messages": talk}, tokenizer)
    text = mark_trained(row["input_ids"], row["labels"], tokenizer)
    assert text.count("⟦") == 2
    assert "assistant\n⟦4<|im_end|>⟧\n" in text
    assert text.endswith("assistant\n⟦Yes.<|im_end|>⟧\n")
    pair = encode_example({"prompt": talk[:3], "completion": talk[3:]}, tokenizer, TextEncoding(max_length=None))
    prompt = encode_prompt(talk[:3], tokenizer)
    assert pair["input_ids"][: len(prompt)] == prompt
    assert [label for label in pair["labels"] if label != -100] == tokenizer("Yes.<|im_end|>").input_ids


def test_registering_an_asset_from_outside(cache):
    @assets.asset("test_rows", kind="data", description="for this test", size="built")
    def _rows(n, *, split, seed, letter="a"):
        return [{"text": letter} for _ in range(n)]

    try:
        assert asset_rows("test-rows", n=2, letter="b") == [{"text": "b"}] * 2
    finally:
        assets._ASSETS._entries.pop("test_rows")
