"""Checkpoints: one folder of safetensors and JSON per save, written under a temporary name and renamed.

A checkpoint is ``{participant name: state}``; a state is nested dictionaries and lists of tensors and JSON values.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmalign.errors import CheckpointError

TENSOR_KEY = "__tensor__"


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary sibling of ``target`` that replaces it when the block ends without an error, and vanishes otherwise.

    The old folder stays until the new one is complete; a kill at any moment leaves either of them whole (a leftover
    ``.partial`` or ``.replaced`` sibling is ignored by every reader and cleaned up by the next write).
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    replaced = target.with_name(f".{target.name}.replaced")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for file in partial.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    partial.rename(target)
    shutil.rmtree(replaced, ignore_errors=True)


def recover_folder(target: Path) -> bool:
    """Undo a replacement that was killed between its two renames; True when ``target`` exists afterwards."""
    replaced = target.with_name(f".{target.name}.replaced")
    if not target.exists() and replaced.exists():
        replaced.rename(target)
    return target.exists()


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name and rename it over ``path``."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1), encoding="utf-8")
    partial.replace(path)


def flatten(state: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """Replace tensors in ``state`` by references and collect them in ``tensors``; the rest must be JSON."""
    if isinstance(state, Tensor):
        tensors[prefix] = state.detach().cpu().contiguous().clone()
        return {TENSOR_KEY: prefix}
    if isinstance(state, Mapping):
        if all(isinstance(key, str) for key in state):
            return {key: flatten(value, f"{prefix}/{key}", tensors) for key, value in state.items()}
        items = [[key, flatten(value, f"{prefix}/{key}", tensors)] for key, value in state.items()]
        return {"__items__": items}  # JSON keys are strings; optimiser state is keyed by integers
    if isinstance(state, tuple):
        return {"__tuple__": [flatten(value, f"{prefix}/{i}", tensors) for i, value in enumerate(state)]}
    if isinstance(state, list):
        return [flatten(value, f"{prefix}/{i}", tensors) for i, value in enumerate(state)]
    if state is None or isinstance(state, (bool, int, float, str)):
        return state
    raise TypeError(f"state at {prefix!r} is a {type(state).__name__}; a checkpoint holds tensors and JSON values")


def unflatten(state: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Inverse of :func:`flatten`."""
    if isinstance(state, dict):
        if set(state) == {TENSOR_KEY}:
            return tensors[state[TENSOR_KEY]]
        if set(state) == {"__items__"}:
            return {_key(key): unflatten(value, tensors) for key, value in state["__items__"]}
        if set(state) == {"__tuple__"}:
            return tuple(unflatten(value, tensors) for value in state["__tuple__"])
        return {key: unflatten(value, tensors) for key, value in state.items()}
    if isinstance(state, list):
        return [unflatten(value, tensors) for value in state]
    return state


def _key(key: Any) -> Any:
    return tuple(key) if isinstance(key, list) else key


def save_state(folder: Path, participants: Mapping[str, Any], *, name: str = "state") -> None:
    """Write ``{participant: state}`` into ``folder`` as ``<name>.safetensors`` and ``<name>.json``."""
    tensors: dict[str, Tensor] = {}
    tree = {key: flatten(state, key, tensors) for key, state in participants.items()}
    save_file(tensors, folder / f"{name}.safetensors")
    write_json(folder / f"{name}.json", tree)


def load_state(folder: Path, *, name: str = "state") -> dict[str, Any]:
    """Read what :func:`save_state` wrote; raises CheckpointError naming a damaged or missing file."""
    try:
        tensors = load_file(folder / f"{name}.safetensors")
        tree = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(f"checkpoint {folder} cannot be read ({type(error).__name__}: {error}); delete it to "
                              "resume from the one before") from None
    restored = unflatten(tree, tensors)
    assert isinstance(restored, dict)
    return restored


def trainable_weights(module: nn.Module, *, stored_in: Path | None = None) -> dict[str, Tensor]:
    """Trainable parameters and buffers of ``module`` by name.

    Tensors that ``stored_in`` (a Hugging Face folder just written from the same module) already holds under the same
    name, shape and dtype are left out, so a fully trained model is on disk once.
    """
    held = _tensors_on_disk(stored_in) if stored_in is not None else {}
    weights = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    weights.update({name: b for name, b in module.named_buffers() if b.is_floating_point()})
    return {name: t for name, t in weights.items() if held.get(name) != (tuple(t.shape), str(t.dtype))}


def _tensors_on_disk(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    names = {"F32": "torch.float32", "F16": "torch.float16", "BF16": "torch.bfloat16", "F64": "torch.float64"}
    held: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 - a reader is not a mapping
                part = reader.get_slice(name)
                held[name] = (tuple(part.get_shape()), names.get(part.get_dtype(), part.get_dtype()))
    return held


def restore_weights(module: nn.Module, weights: Mapping[str, Tensor], *, folder: Path | None, source: str) -> None:
    """Load trainable weights saved by :func:`trainable_weights`; raises CheckpointError when they are another model's."""
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    given = dict(weights)
    needed = {n for n, p in module.named_parameters() if p.requires_grad}
    missing = needed - set(given)
    if missing and folder is not None:
        for file in sorted(folder.rglob("*.safetensors")):
            with safe_open(file, framework="pt") as reader:
                given.update({name: reader.get_tensor(name) for name in missing & set(reader.keys())})
    wrong = [n for n in given if n not in own or own[n].shape != given[n].shape] + sorted(needed - set(given))
    if wrong:
        raise CheckpointError(
            f"{source} belongs to another model or tuning: {len(wrong)} tensors do not fit, the first is {wrong[0]!r} "
            f"({'absent here' if wrong[0] not in own else tuple(own[wrong[0]].shape)}); use the configuration it was "
            "made with, or another run directory"
        )
    with torch.no_grad():
        for name, value in given.items():
            own[name].copy_(value)


def checkpoint_folders(root: Path) -> list[Path]:
    """Complete checkpoints under ``root``, oldest first."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if re.fullmatch(r"step-\d+", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def prune(root: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints."""
    for old in checkpoint_folders(root)[:-keep] if keep > 0 else []:
        shutil.rmtree(old, ignore_errors=True)
