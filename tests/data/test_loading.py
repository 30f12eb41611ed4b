"""Reading data sets of every kind, and errors that name ``data.path``."""

from __future__ import annotations

import json

import datasets
import pytest
from chat_templates import assistant, user
from PIL import Image

from mmalign.config import parse
from mmalign.data.loading import DataOptions, as_examples, load_rows
from mmalign.errors import AssetError, ConfigError, DataError

ROWS = [{"question": f"q{index}", "answer": f"a{index}"} for index in range(10)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


def load(path, seed=0, **options):
    return load_rows(parse(DataOptions, {"path": str(path), **options}), seed)


def write_jsonl(file, rows):
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "folder", "saved"])
def test_every_format_gives_the_same_rows(tmp_path, kind):
    dataset = datasets.Dataset.from_list(ROWS)
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write_jsonl(path, ROWS)
    elif kind == "json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif kind in ("csv", "tsv"):
        dataset.to_csv(str(path), sep="," if kind == "csv" else "\t", index=False)
    elif kind == "parquet":
        dataset.to_parquet(str(path))
    elif kind == "folder":
        path.mkdir()
        write_jsonl(path / "train.jsonl", ROWS)
        write_jsonl(path / "test.jsonl", ROWS[:2])
    else:
        datasets.DatasetDict({"train": dataset, "test": dataset.select(range(2))}).save_to_disk(str(path))
    rows = load(path)
    assert as_examples(rows) == [{"prompt": row["question"], "answer": row["answer"], "id": str(index)}
                                 for index, row in enumerate(ROWS)]
    if kind in ("folder", "saved"):
        assert len(load(path, split="test")) == 2
        assert load(path, split="train[5:7]")["id"] == ["0", "1"]
        with pytest.raises(DataError, match=r"data.split: .* has train, test, not 'tset'; did you mean 'test'"):
            load(path, split="tset")
    else:
        with pytest.raises(DataError, match=r"data.split: .*(single data set|has train)"):
            load(path, split="test")


def test_limit_shuffle_and_ids(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    assert load(path, limit=3)["id"] == ["0", "1", "2"]
    drawn = load(path, limit=4, shuffle=True, seed=1)
    assert list(drawn["id"]) == list(load(path, limit=8, shuffle=True, seed=1)["id"])[:4]
    assert list(drawn["id"]) != list(load(path, limit=4, shuffle=True, seed=2)["id"])
    assert all(row["prompt"] == f"q{row['id']}" for row in drawn)  # ids are positions in the file
    assert len(load(path, max_samples=100)) == 10


def test_columns_are_mapped_left_out_and_checked(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    assert load(path, columns={"answer": "completion"}).column_names == ["prompt", "completion", "id"]
    assert load(path, columns={"answer": None}).column_names == ["prompt", "id"]
    with pytest.raises(DataError, match=r"data.columns.anwser: the data has no column 'anwser'.*did you mean"):
        load(path, columns={"anwser": "completion"})
    twice = write_jsonl(tmp_path / "b.jsonl", [{"id": 1, "text": "a"}, {"id": 1, "text": "b"}])
    with pytest.raises(DataError, match=r"data.path: .*id 1 occurs more than once"):
        load(twice)
    assert load(twice, columns={"id": None})["id"] == ["0", "1"]
    assert load(write_jsonl(tmp_path / "c.jsonl", [{"key": "x", "text": "a"}]), columns={"key": "id"})["id"] == ["x"]


def test_conversations_and_alpaca_rows_are_rewritten(tmp_path):
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"conversations": turns, "source": "x"}])
    assert as_examples(load(path)) == [{"messages": [user("q"), assistant("a")], "source": "x", "id": "0"}]
    path = write_jsonl(tmp_path / "b.jsonl", [{"instruction": "Add.", "input": "1 1", "output": "2"},
                                              {"instruction": "Hi.", "input": "", "output": "Yo"}])
    rows = as_examples(load(path))
    assert [(row["prompt"], row["completion"]) for row in rows] == [("Add.\n\n1 1", "2"), ("Hi.", "Yo")]
    assert "input" not in rows[0]


def test_image_folders(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(3):
        Image.new("RGB", (4, 4), (index, 0, 0)).save(folder / f"{index}.png")
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": f"{i}.png", "prompt": f"p{i}"}) for i in range(3)))
    rows = load(folder)
    assert [row["prompt"] for row in rows] == ["p0", "p1", "p2"]
    assert all(len(row["images"]) == 1 and row["images"][0].getpixel((0, 0)) == (index, 0, 0) for index, row in enumerate(rows))
    assert "image" not in rows.column_names


def test_unreadable_files_say_why(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": ')
    with pytest.raises(DataError, match=r"data.path: .*rows.jsonl, line 2 is not JSON"):
        load(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match=r"data.path: .*row.jsonl does not exist; did you mean .*rows.jsonl"):
        load(tmp_path / "row.jsonl")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "words.jsonl").write_text('"a"\n')
    with pytest.raises(DataError, match=r"line 1 must be an object with columns, not str"):
        load(tmp_path / "words.jsonl")
    with pytest.raises(DataError, match=r"data.path: .*list.jsonl must be a list of objects"):
        load(tmp_path / "list.jsonl")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DataError, match=r"empty file"):
        load(tmp_path / "empty.csv")
    (tmp_path / "data.xlsx").write_text("x")
    with pytest.raises(DataError, match=r"files ending in .xlsx cannot be read; allowed: .json"):
        load(tmp_path / "data.xlsx")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match=r"holds no data"):
        load(tmp_path / "nothing")
    (tmp_path / "broken.parquet").write_text("no parquet")
    with pytest.raises(DataError, match=r"data.path: .*broken.parquet cannot be read"):
        load(tmp_path / "broken.parquet")
    datasets.Dataset.from_dict({"text": []}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match=r"data.path: .*no rows"):
        load(tmp_path / "saved")


def test_the_hub_switched_off_is_said_at_once(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"data.path: 'someone/something' is no local .* the hub is switched off"):
        load("someone/something")


def test_errors_use_the_key_they_are_given(tmp_path):
    with pytest.raises(DataError, match=r"^eval_data\.path: "):
        load_rows(DataOptions(path=str(tmp_path / "no.jsonl")), key="eval_data")


def test_assets_by_name():
    rows = load("asset:arithmetic", limit=6, arguments={"levels": [1]}, seed=3)
    assert [row["level"] for row in rows] == [1] * 6
    assert rows == load("asset:arithmetic", limit=6, arguments={"levels": [1]}, seed=3)
    assert len(load("asset:arithmetic", limit=4, split="test", columns={"completion": None})[0]) == 4
    with pytest.raises(AssetError, match=r"data.path: asset:arithmetc: unknown asset 'arithmetc'; did you mean 'arithmetic'"):
        load("asset:arithmetc")
    with pytest.raises(AssetError, match=r"'asset:arithmetic' has no argument 'lvels'; it has levels, form"):
        load("asset:arithmetic", arguments={"lvels": [1]})
    with pytest.raises(AssetError, match=r"'tiny_llama' is a model: use it as a model path"):
        load("asset:tiny_llama")
    with pytest.raises(DataError, match=r"the arithmetic asset has train and test, not 'dev'"):
        load("asset:arithmetic", split="dev")


def test_options_refuse():
    for tree, message in (({"path": ""}, "path is empty"), ({"path": "x", "limit": 0}, "limit must be at least 1"),
                          ({"path": "x.json", "arguments": {"a": 1}}, "arguments belong to assets"),
                          ({"path": "x", "spilt": "a"}, "did you mean split")):
        with pytest.raises(ConfigError, match=message):
            parse(DataOptions, tree)
