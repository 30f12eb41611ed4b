"""Streaming over safetensors folders: sharding changes no bytes, and broken folders are named."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from mmalign.weights.io import ShardReader, ShardWriter, check_readers, parse_size
from mmalign.weights.merge import linear, merge_stream, slerp


def state(seed=0):
    g = torch.Generator().manual_seed(seed)
    sizes = {"embed.weight": (50, 8), "layers.0.w": (8, 8), "layers.1.w": (8, 8), "layers.2.w": (8, 16), "norm.weight": (8,)}
    return {name: torch.randn(size, generator=g) for name, size in sizes.items()} | {"steps": torch.tensor([seed])}


def write(folder, tensors, size="5GB"):
    with ShardWriter(folder, max_shard_size=size) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    return folder


@pytest.mark.parametrize("size", ["1KB", "2KB", "1GB"])
def test_what_is_written_is_read_back(tmp_path, size):
    tensors = state()
    reader = ShardReader(write(tmp_path / "m", tensors, size))
    assert set(reader) == set(tensors)
    assert all(torch.equal(reader[name], tensor) for name, tensor in tensors.items())
    assert reader.shape("embed.weight") == (50, 8)
    files = list((tmp_path / "m").glob("*.safetensors"))
    assert (len(files) > 1) == (size != "1GB")
    assert not list((tmp_path / "m").glob("*.partial"))
    if len(files) > 1:
        index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(tensors)
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())


def test_no_shard_is_larger_than_asked_unless_one_tensor_is(tmp_path):
    write(tmp_path / "m", state(), 700)
    for file in (tmp_path / "m").glob("*.safetensors"):
        shard = ShardReader.__new__(ShardReader)
        shard.folder, shard._file = file.parent, None
        handle = shard._open(file)
        sizes = [handle.get_tensor(name).nbytes for name in handle.keys()]  # noqa: SIM118
        assert sum(sizes) <= 700 or len(sizes) == 1


@pytest.mark.parametrize("function", [slerp(t=[0, 0.5, 1]), linear(weights=[1, 3])])
def test_merging_does_not_depend_on_the_sharding(tmp_path, function):
    results = []
    for number, (mine, theirs, out) in enumerate([("1GB", "1GB", "1GB"), ("1KB", "700", "2KB"), ("2KB", "1GB", 1000)]):
        readers = [ShardReader(write(tmp_path / f"{number}a", state(1), mine)),
                   ShardReader(write(tmp_path / f"{number}b", state(2), theirs))]
        check_readers(readers)
        write(tmp_path / f"{number}out", dict(merge_stream(readers, function)), out)
        results.append(ShardReader(tmp_path / f"{number}out"))
    for other in results[1:]:
        assert {name: other[name].numpy().tobytes() for name in results[0]} == \
            {name: results[0][name].numpy().tobytes() for name in results[0]}
    assert results[0]["steps"].tolist() == [1]


def test_one_tensor_of_each_model_is_read_at_a_time(tmp_path):
    class Counting(ShardReader):
        log: list[str] = []

        def __getitem__(self, name):
            Counting.log.append(name)
            return super().__getitem__(name)

    readers = [Counting(write(tmp_path / str(i), state(i), "1KB")) for i in range(2)]
    for name, _ in merge_stream(readers, slerp(t=0.5)):
        assert Counting.log[-2:] == [name, name]
    assert len(Counting.log) == 2 * len(readers[0])


def test_written_dtype(tmp_path):
    readers = [ShardReader(write(tmp_path / str(i), state(i))) for i in range(2)]
    merged = dict(merge_stream(readers, slerp(t=0.5), dtype=torch.bfloat16))
    assert merged["norm.weight"].dtype == torch.bfloat16
    assert merged["steps"].dtype == torch.int64


def test_different_models_are_refused_by_name(tmp_path):
    first = ShardReader(write(tmp_path / "a", state()))
    renamed = {("other.w" if name == "layers.1.w" else name): tensor for name, tensor in state().items()}
    with pytest.raises(ValueError, match=r"missing layers\.1\.w, unexpected other\.w"):
        check_readers([first, ShardReader(write(tmp_path / "b", renamed))])
    with pytest.raises(ValueError, match=r"'embed.weight' has shape \[50, 8\] .* and \[51, 8\]"):
        check_readers([first, ShardReader(write(tmp_path / "c", state() | {"embed.weight": torch.zeros(51, 8)}))])
    with pytest.raises(ValueError, match="ties its output to its input embedding"):
        check_readers([first, ShardReader(write(tmp_path / "d", state() | {"lm_head.weight": torch.zeros(50, 8)}))])


def test_broken_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        ShardReader(tmp_path / "none")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"has no .safetensors files \(only pytorch_model.bin\)"):
        ShardReader(tmp_path / "bin")
    write(tmp_path / "cut", state(), "1KB")
    sorted((tmp_path / "cut").glob("*.safetensors"))[0].unlink()
    with pytest.raises(ValueError, match="which its index names"):
        ShardReader(tmp_path / "cut")
    save_file(state(), tmp_path / "one.safetensors")
    save_file(state(), tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match="no index"):
        ShardReader(tmp_path)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"12345")
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read"):
        ShardReader(tmp_path / "damaged")
    writer = ShardWriter(tmp_path / "twice")
    writer.add("w", torch.zeros(1))
    with pytest.raises(ValueError, match="written twice"):
        writer.add("w", torch.zeros(1))


@pytest.mark.parametrize(("size", "expected"), [("5GB", 5 * 10**9), ("1MiB", 2**20), (300, 300), ("1.5KB", 1500)])
def test_sizes(size, expected):
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["5 apples", "0", "-1", ""])
def test_sizes_without_a_meaning(size):
    with pytest.raises(ValueError, match="max_shard_size is"):
        parse_size(size)
