"""What policies and references need to know about torch modules that others wrapped or adapted.

A policy's module may be wrapped (DistributedDataParallel, ``torch.compile``, accelerate) and may carry adapters (a
``PeftModel``, or adapter layers injected into a diffusers model). Everything here works on either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_CHUNK = 1 << 22
"""Elements hashed at a time, so that hashing never needs a second copy of a tensor."""


def unwrap(module: Any) -> Any:
    """The network inside DistributedDataParallel, FSDP1 and ``torch.compile`` wrappers (adapters stay)."""
    wrappers: tuple[Any, ...] = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FullyShardedDataParallel

        wrappers += (FullyShardedDataParallel,)
    while True:
        if isinstance(module, wrappers):
            module = module.module
        elif hasattr(module, "_orig_mod"):
            module = module._orig_mod
        else:
            return module


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) inside the block; every submodule's own mode is restored after it."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def adapter_layers(module: nn.Module) -> list[nn.Module]:
    """Submodules that hold an adapter next to (or instead of a copy of) the layer they adapt."""
    return [part for part in module.modules() if isinstance(getattr(part, "_disable_adapters", None), bool)]


def is_peft_model(module: nn.Module) -> bool:
    """Whether ``module`` is (or wraps) a ``peft.PeftModel``; injected adapters alone do not make one."""
    inner = unwrap(module)
    return hasattr(inner, "peft_config") and hasattr(inner, "get_base_model")


def is_adapted(module: nn.Module) -> bool:
    """Whether any adapter of the ``peft`` package is in ``module``, injected or as a ``PeftModel``."""
    return is_peft_model(module) or bool(adapter_layers(module))


def prompt_learning(module: nn.Module) -> Any | None:
    """The active config of a ``PeftModel`` that learns virtual tokens or prefixes, else None."""
    if not is_peft_model(module):
        return None
    config = unwrap(module).active_peft_config
    return config if getattr(config, "is_prompt_learning", False) else None


@contextmanager
def adapters_disabled(module: nn.Module) -> Iterator[None]:
    """The base model's function inside the block; nothing about trainability changes.

    peft's own switch sets ``requires_grad`` when it is turned back on, which would unfreeze frozen adapters.
    """
    layers = [(layer, layer._disable_adapters) for layer in adapter_layers(module)]
    with ExitStack() as stack:
        if is_peft_model(module) and not layers:
            stack.enter_context(unwrap(module).disable_adapter())
        for layer, _ in layers:
            layer._disable_adapters = True  # type: ignore[assignment]
        try:
            yield
        finally:
            for layer, before in layers:
                layer._disable_adapters = before


def adapter_parameter_names(module: nn.Module) -> set[str]:
    """Names of the parameters that :func:`adapters_disabled` takes out of the computation."""
    names = set()
    for prefix, layer in module.named_modules():
        if not isinstance(getattr(layer, "_disable_adapters", None), bool):
            continue
        base = "original_module" if hasattr(layer, "original_module") else "base_layer"
        for name, _ in layer.named_parameters(remove_duplicate=False):
            if not name.startswith(f"{base}."):
                names.add(f"{prefix}.{name}" if prefix else name)
    if is_peft_model(module):
        of_base = {id(parameter) for parameter in unwrap(module).get_base_model().parameters()}
        names |= {name for name, parameter in module.named_parameters() if id(parameter) not in of_base}
    return names


@torch.no_grad()
def adapters_are_identity(module: nn.Module) -> bool:
    """Whether the adapted model computes what its base does (adapters at their zero initialisation).

    False when that cannot be told: prompt learning, adapter types without an explicit weight difference.
    """
    layers = adapter_layers(module)
    return bool(layers) and all(_is_identity(layer) for layer in layers)


def _is_identity(layer: Any) -> bool:
    if getattr(layer, "merged_adapters", None):
        return False
    names = active_adapters(layer)
    if hasattr(layer, "modules_to_save"):
        original = dict(layer.original_module.named_parameters())
        return all(
            torch.equal(value, original[key])
            for name in names if name in layer.modules_to_save
            for key, value in layer.modules_to_save[name].named_parameters()
        )
    return all(_adds_nothing(layer, name) for name in names if _holds(layer, name))


_NEUTRAL = {"lora_B": 0.0, "lora_embedding_B": 0.0, "vera_lambda_b": 0.0, "ia3_l": 1.0}
"""Factors of an adapter that make it do nothing when all their entries have this value."""


def _adds_nothing(layer: Any, name: str) -> bool:
    factors: list[tuple[Any, float]] = [
        (getattr(layer, attribute)[name], neutral) for attribute, neutral in _NEUTRAL.items()
        if name in getattr(layer, attribute, {})
    ]
    if factors:
        tensors: list[tuple[Any, float]] = [
            (factor.weight if isinstance(factor, nn.Module) else factor, neutral) for factor, neutral in factors
        ]
        return all(torch.equal(t, torch.full_like(t, neutral)) for t, neutral in tensors) and _keeps_magnitude(layer, name)
    try:
        return not bool(layer.get_delta_weight(name).any())
    except (AttributeError, NotImplementedError, TypeError, RuntimeError):
        return False


def _keeps_magnitude(layer: Any, name: str) -> bool:
    """Whether DoRA's magnitudes, if there are any, are the norms of the base weight's rows (their initial values)."""
    magnitudes = getattr(layer, "lora_magnitude_vector", {})
    if name not in magnitudes:
        return True
    norms = torch.linalg.vector_norm(layer.base_layer.weight.float(), dim=1)
    return torch.allclose(magnitudes[name].weight.float().flatten(), norms, rtol=1e-5)


def active_adapters(layer: nn.Module) -> list[str]:
    """Names of the adapters an adapted layer currently applies."""
    active = getattr(layer, "active_adapters", None) or getattr(layer, "active_adapter", [])
    return [active] if isinstance(active, str) else list(active)


def _holds(layer: nn.Module, name: str) -> bool:
    return any(name in getattr(layer, attribute, {}) for attribute in getattr(layer, "adapter_layer_names", ()))


def module_identity(module: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of everything that enters the module's function.

    Wrappers do not change it. Inside :func:`adapters_disabled` it is the hash of the base model, the same as that of
    the base model without adapters. Streams: no second copy of a tensor is made.
    """
    inner = unwrap(module)
    layers = adapter_layers(inner)
    disabled = all(layer._disable_adapters for layer in layers) if layers else getattr(inner, "_adapters_disabled", False)
    dropped = adapter_parameter_names(inner) if disabled else set()
    prefix = base_prefix(inner)
    named: dict[str, Tensor] = {}
    for name, tensor in inner.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or name in dropped or (disabled and not name.startswith(prefix)):
            continue
        name = name.removeprefix(prefix).replace(".base_layer.", ".").replace(".original_module.", ".")
        named[name] = tensor
    digest = hashlib.sha256()
    if layers and not disabled:
        digest.update(repr(sorted({name for layer in layers for name in active_adapters(layer)})).encode())
    seen: dict[tuple[int, tuple[int, ...]], str] = {}
    for name in sorted(named):
        tensor = named[name].detach()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and key in seen:  # tied weights are hashed once
            digest.update(seen[key].encode())
            continue
        seen[key] = name
        flat = tensor.reshape(-1)
        for start in range(0, flat.numel(), _CHUNK):
            digest.update(flat[start : start + _CHUNK].contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def base_prefix(inner: Any) -> str:
    """What peft puts in front of the base model's tensor names."""
    if not is_peft_model(inner):
        return ""
    return "base_model." if inner.base_model is inner.get_base_model() else "base_model.model."
