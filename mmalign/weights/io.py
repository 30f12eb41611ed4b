"""Weights on disk, one tensor at a time: reading and writing folders of (sharded) safetensors files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: str | int) -> int:
    """Bytes of ``5GB``, ``200MB``, ``1GiB`` or a plain number; raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B)?\s*", str(size), re.IGNORECASE)
    value = float(match[1]) * (_UNITS[match[2].upper()] if match[2] else 1) if match else 0.0
    if value < 1:
        raise ValueError(f"max_shard_size is {size!r}; give a size such as 5GB, 200MB or a number of bytes")
    return int(value)


class ShardReader(Mapping[str, Tensor]):
    """The tensors of a folder by name, each read from disk when it is asked for.

    The folder holds one ``.safetensors`` file, or several with their index. Iteration is in the order of the files and, in
    a file, of its header: reading in this order touches every byte once. One file is open at a time.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._file: tuple[Path, Any] | None = None
        self._files = {name: file for file in self._weight_files() for name in self._open(file).keys()}  # noqa: SIM118
        if not self._files:
            raise ValueError(f"{self.folder} holds no tensors")

    def _weight_files(self) -> list[Path]:
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder} is not a folder")
        indices = sorted(self.folder.glob("*.safetensors.index.json"))
        files = sorted(self.folder.glob("*.safetensors"))
        if indices:
            try:
                listed = json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError) as error:
                raise ValueError(f"{indices[0]} is damaged ({error})") from None
            files = [self.folder / name for name in sorted(set(listed.values()))]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise ValueError(f"{self.folder} lacks {', '.join(missing)}, which its index names; the folder is incomplete")
        if not files:
            others = sorted(p.name for p in self.folder.glob("*.bin"))
            raise ValueError(f"{self.folder} has no .safetensors files{f' (only {others[0]})' if others else ''}; save the "
                             "model in that format first")
        if not indices and len(files) > 1:
            raise ValueError(f"{self.folder} has {len(files)} .safetensors files and no index; they may be several models")
        return files

    def _open(self, file: Path) -> Any:
        if self._file is None or self._file[0] != file:
            self.close()
            try:
                self._file = (file, safe_open(str(file), framework="pt", device="cpu"))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} cannot be read ({error})") from None
        return self._file[1]

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._open(self._files[name]).get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return tuple(self._open(self._files[name]).get_slice(name).get_shape())

    def close(self) -> None:
        """Close the file that is open."""
        if self._file is not None:
            self._file[1].__exit__(None, None, None)
            self._file = None


def check_readers(readers: Sequence[ShardReader]) -> None:
    """Raise ValueError unless all folders hold the same names and shapes; the message lists what differs."""
    first = readers[0]
    shapes = {name: first.shape(name) for name in first}
    for reader in readers[1:]:
        missing, extra = sorted(first.keys() - reader.keys()), sorted(reader.keys() - first.keys())
        if missing or extra:
            tied = " (one model ties its output to its input embedding and the other does not)" \
                if {"lm_head.weight"} == set(missing) | set(extra) else ""
            raise ValueError(f"{reader.folder} has other tensors than {first.folder}{tied}: missing {_some(missing)}, "
                             f"unexpected {_some(extra)}; only models of one architecture can be merged")
        for name in reader:
            if reader.shape(name) != shapes[name]:
                raise ValueError(f"{name!r} has shape {list(shapes[name])} in {first.folder} and {list(reader.shape(name))} in "
                                 f"{reader.folder}; give both models the same vocabulary and sizes first")


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5]) or "none"
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")


class ShardWriter:
    """Writes tensors to safetensors shards as they come, and the index at the end.

    A shard is written when the next tensor would make it larger than ``max_shard_size``, so no more than one shard is held.
    The bytes of a tensor do not depend on the sharding. Use it as a context manager, or call :meth:`finish`.
    """

    def __init__(self, folder: str | Path, *, max_shard_size: str | int = "5GB", stem: str = "model") -> None:
        self.folder, self.stem = Path(folder), stem
        self.limit = parse_size(max_shard_size)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._pending: dict[str, Tensor] = {}
        self._bytes = 0
        self._total = 0
        self._shards: list[tuple[Path, list[str]]] = []
        self._names: set[str] = set()

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor; raises ValueError for a name that was written already."""
        if name in self._names:
            raise ValueError(f"{name!r} is written twice")
        self._names.add(name)
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._bytes + size > self.limit:
            self._flush()
        self._pending[name] = tensor.detach().cpu().contiguous()
        self._bytes += size
        self._total += size

    def _flush(self) -> None:
        file = self.folder / f"{self.stem}-{len(self._shards) + 1:05d}.partial"
        save_file(self._pending, file, metadata={"format": "pt"})
        self._shards.append((file, list(self._pending)))
        self._pending, self._bytes = {}, 0

    def finish(self) -> list[Path]:
        """Write what is left, give the shards their final names and write the index; returns the weight files."""
        if self._pending:
            self._flush()
        if not self._shards:
            raise ValueError("no tensor was written")
        count = len(self._shards)
        if count == 1:
            target = self.folder / f"{self.stem}.safetensors"
            self._shards[0][0].rename(target)
            return [target]
        files, places = [], {}
        for number, (partial, names) in enumerate(self._shards, start=1):
            target = self.folder / f"{self.stem}-{number:05d}-of-{count:05d}.safetensors"
            partial.rename(target)
            files.append(target)
            places.update(dict.fromkeys(names, target.name))
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(places.items()))}
        path = self.folder / f"{self.stem}.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return files

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is None:
            self.finish()
