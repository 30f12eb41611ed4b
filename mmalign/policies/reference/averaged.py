"""References read from checkpoints: one, or the weighted average of several (a soup), one tensor at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.errors import ConfigError
from mmalign.policies.base import Policy
from mmalign.policies.loading import model_kind, resolve_model_path
from mmalign.policies.modules import adapter_parameter_names, adapters_disabled, base_prefix, is_adapted, unwrap
from mmalign.policies.pretrained import load_causal_lm
from mmalign.policies.provenance import read_provenance
from mmalign.policies.reference.base import REFERENCES, HeldReference, Reference, ReferenceOptions, tensors_of
from mmalign.weights.arithmetic import weighted_average
from mmalign.weights.io import ShardReader, check_readers

logger = logging.getLogger(__name__)

KEY = "reference.checkpoints"
_NESTED = "base_model.model."


@REFERENCES.register("soup")
class SoupReference(HeldReference):
    """``sum_i w_i theta_i`` over checkpoints of the policy's own architecture, frozen.

    The average replaces the weights of the base model and the policy's adapters are switched off while it scores, so
    it is the same model whether the policy trains all weights or an adapter. Chegini et al. 2024, arXiv 2411.01798.
    """

    def __init__(self, policy: Policy, options: ReferenceOptions) -> None:
        Reference.__init__(self, policy)
        self.kind = options.kind  # type: ignore[misc]  # also the single checkpoint of kind iterate
        self.shares = options.weights or [1 / len(options.checkpoints)] * len(options.checkpoints)
        self.checkpoints = list(options.checkpoints)
        self.held = average_checkpoints(policy, self.checkpoints, self.shares, same_base=options.same_base)

    @contextmanager
    def weights(self) -> Iterator[None]:  # type: ignore[override]
        """The average in the place of the base model's weights, adapters off."""
        module = self.policy.module
        with adapters_disabled(module) if is_adapted(module) else nullcontext(), super().weights():
            yield

    def state_dict(self) -> dict[str, Any]:
        """Identity and shares; the weights are read again from the checkpoints."""
        return {**super().state_dict(), "checkpoints": self.checkpoints, "weights": list(self.shares)}


def average_checkpoints(
    policy: Policy, checkpoints: Sequence[str], shares: Sequence[float], *, same_base: bool = True,
) -> dict[str, Tensor]:
    """``{name in the policy's module: sum_i share_i tensor_i}`` in the module's dtypes and on its device.

    Each tensor is read, averaged in float64 and rounded once; tied tensors are averaged once. A folder with a PEFT
    adapter is merged into its base in float32 (a temporary folder) first: averaging its factors would average something
    else. Raises ConfigError for folders whose names, shapes, vocabularies or recorded base models differ from each other
    or from the policy, for files that cannot be read, and for an average that is not finite.
    """
    with ExitStack() as stack:
        folders = [Path(resolve_model_path(path, key=KEY)) for path in checkpoints]
        if same_base:
            _check_bases(folders)
        _check_vocabularies(policy, folders)
        try:
            readers = [ShardReader(_weights_folder(folder, policy.module, stack)) for folder in folders]
            for reader in readers:
                stack.callback(reader.close)
            check_readers(readers)
        except ValueError as error:
            raise ConfigError(f"{KEY}: {error}") from None
        return _average(policy.module, readers, shares)


@torch.no_grad()
def _average(module: nn.Module, readers: Sequence[ShardReader], shares: Sequence[float]) -> dict[str, Tensor]:
    current, names, tied = tensors_of(module), _plain_names(module), _tied_names(module)
    source = {plain: plain for plain in names}
    for other, plain in tied.items():
        if plain in names and plain not in readers[0] and other in readers[0]:
            source[plain] = other
    _check_names(readers[0], source, _known_names(module))
    averaged: dict[str, Tensor] = {}
    for plain, actual in names.items():
        target, entry = current[actual], source[plain]
        for reader in readers:
            if reader.shape(entry) != tuple(target.shape):
                raise ConfigError(f"{KEY}: {entry!r} has shape {list(reader.shape(entry))} in {reader.folder} and "
                                  f"{list(target.shape)} in the policy; a soup needs one vocabulary and one size")
        tensors = [reader[entry] for reader in readers]
        for other in (name for name, of in tied.items() if of == plain and name in readers[0] and name != entry):
            if any(not torch.equal(reader[other], tensor) for reader, tensor in zip(readers, tensors, strict=True)):
                raise ConfigError(f"{KEY}: {other!r} and {entry!r} are one tensor in the policy but differ in "
                                  f"{readers[0].folder}")
        states = [{plain: tensor.double()} for tensor in tensors]
        value = weighted_average(states, shares, normalize=False, precision=torch.float64)[plain].to(target.dtype)
        if not bool(torch.isfinite(value).all()):
            listed = ", ".join(str(reader.folder) for reader in readers)
            raise ConfigError(f"{KEY}: the average of {entry!r} is not finite; one of {listed} holds NaN or infinite weights")
        averaged[actual] = value.to(target.device)
    return averaged


def _weights_folder(folder: Path, module: nn.Module, stack: ExitStack) -> Path:
    """Where the safetensors of the network that the policy trains are."""
    kind = model_kind(str(folder))
    if kind == "diffusion":
        found = [folder / name for name in ("unet", "transformer") if (folder / name).is_dir()]
        if not found:
            raise ConfigError(f"{KEY}: {folder} has neither a unet nor a transformer folder")
        return found[0]
    if kind == "text_adapter":
        target = Path(stack.enter_context(TemporaryDirectory(prefix="mmalign-merged-")))
        adapted, _ = load_causal_lm(folder, dtype="float32", device="cpu", adapter_trainable=False)
        if not hasattr(adapted, "merge_and_unload") or not is_adapted(adapted):
            raise ConfigError(f"{KEY}: {folder} holds an adapter that cannot be merged into its base, so it cannot be averaged")
        try:
            adapted.merge_and_unload().save_pretrained(target)
        except (AttributeError, NotImplementedError, ValueError) as error:
            raise ConfigError(f"{KEY}: {folder} holds an adapter that cannot be merged into its base ({error}), so it cannot be "
                              "averaged") from None
        return target
    if kind != "text":
        raise ConfigError(f"{KEY}: {folder} holds an image LoRA; merge it into its pipeline first (mmalign export, kind merged)")
    return folder


def _plain_names(module: nn.Module) -> dict[str, str]:
    """Name in a checkpoint of the base model -> name in the (wrapped, adapted) module, for weights outside adapters."""
    inner = unwrap(module)
    adapters = adapter_parameter_names(inner) if is_adapted(inner) else set()
    prefix = base_prefix(inner)
    return {_plain(name, prefix): name for name in tensors_of(inner) if name not in adapters and name.startswith(prefix)}


def _plain(name: str, prefix: str) -> str:
    name = name.removeprefix(prefix)
    while name.startswith(_NESTED):  # a new adapter on a model that was loaded with one
        name = name.removeprefix(_NESTED)
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def _known_names(module: nn.Module) -> set[str]:
    inner = unwrap(module)
    return {_plain(name, base_prefix(inner)) for name in inner.state_dict()}


def _tied_names(module: nn.Module) -> dict[str, str]:
    """Further names of tensors that the module holds once (tied embeddings) -> the name they are listed under."""
    inner = unwrap(module)
    prefix, listed = base_prefix(inner), {id(tensor): name for name, tensor in tensors_of(inner).items()}
    return {
        _plain(name, prefix): _plain(listed[id(tensor)], prefix) for name, tensor in inner.state_dict(keep_vars=True).items()
        if id(tensor) in listed and listed[id(tensor)] != name
    }


def _check_names(reader: ShardReader, source: Mapping[str, str], known: set[str]) -> None:
    missing = sorted(set(source.values()) - set(reader))
    extra = sorted(set(reader) - known - set(source.values()))
    if missing or extra:
        raise ConfigError(f"{KEY}: {reader.folder} is of another architecture than the policy: missing "
                          f"{', '.join(missing[:3]) or 'none'}, unexpected {', '.join(extra[:3]) or 'none'}")


def _check_bases(folders: Sequence[Path]) -> None:
    """Weights of different pre-training runs do not lie in one basin; their average is no model."""
    known = {folder: (read_provenance(folder) or {}).get("base_hash") for folder in folders}
    bases = {base for base in known.values() if base}
    if len(bases) > 1:
        listed = ", ".join(f"{folder} ({str(base)[:12]})" for folder, base in known.items() if base)
        raise ConfigError(f"{KEY}: these models were trained from different base models: {listed}. Average runs from one base, "
                          "or set reference.same_base: false")


def _check_vocabularies(policy: Policy, folders: Sequence[Path]) -> None:
    own = getattr(policy, "tokenizer", None)
    if own is None:
        return
    from transformers import AutoTokenizer

    vocabulary = own.get_vocab()
    for folder in folders:
        if not (folder / "tokenizer_config.json").is_file():
            continue
        theirs = AutoTokenizer.from_pretrained(str(folder)).get_vocab()
        if theirs != vocabulary:
            odd = next(iter(sorted(set(theirs.items()) ^ set(vocabulary.items()))))
            raise ConfigError(f"{KEY}: {folder} has another vocabulary than the policy (token {odd[0]!r}, for one); only models "
                              "with the same tokens can be averaged")
