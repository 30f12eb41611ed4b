"""The frozen (or slowly moving) model that a policy is compared with.

A reference scores through the policy itself, with other weights in place, in evaluation mode and without gradients: so
it needs no second model object, sees the rows exactly as the policy does (shared ``draw`` included), and works for
every modality. What differs between kinds is one row of a table: which weights are put in place.

============== ====================================================================================================
``frozen_copy`` a copy of all weights, taken now
``adapter_off`` the base model with its adapters switched off: no copy at all; right when the adapters started as zero
``adapter_ref`` a copy of what is trained (an adapter that was already trained, say), taken now
``sync``        a copy that jumps ``alpha`` of the way to the policy every ``every`` updates (TR-DPO, Gorbatovski et
                al. 2024, arXiv 2404.09656)
``ema``         a moving average: ``decay`` of the old, the rest from the policy, every ``every`` updates
``precomputed`` scores stored before training, by the content of each row
``none``        no reference: every log-prob is 0
============== ====================================================================================================
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mmalign.config import Options
from mmalign.core.logprobs import ActionScores
from mmalign.core.registry import Registry
from mmalign.data.rows import Rows
from mmalign.errors import CheckpointError, ConfigError, DataError
from mmalign.policies.base import Draw, Policy, Scorer
from mmalign.policies.modules import (
    adapter_parameter_names,
    adapters_are_identity,
    adapters_disabled,
    evaluating,
    is_adapted,
    module_identity,
    unwrap,
)

logger = logging.getLogger(__name__)

ReferenceKind = Literal["auto", "frozen_copy", "adapter_off", "adapter_ref", "precomputed", "sync", "ema", "none"]


class ReferenceOptions(Options):
    """Which model the policy is compared with."""

    kind: ReferenceKind = "auto"
    """auto: adapter_off for adapters that start at zero, adapter_ref for others, frozen_copy without adapters."""
    alpha: float = 0.6
    """sync: share of the policy's weights in the new reference; 1 replaces it."""
    decay: float = 0.999
    """ema: share of the reference's own weights that is kept."""
    every: int | None = None
    """Updates between two moves of the reference; null is 512 for sync and 1 for ema."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse values without a meaning."""
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha must be in (0, 1], not {self.alpha}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), not {self.decay}")
        if self.every is not None and self.every < 1:
            raise ValueError(f"every must be at least 1, not {self.every}")


REFERENCES: Registry[Callable[[Policy, ReferenceOptions], Reference]] = Registry("reference kind")
"""Kinds by name; built from the policy as it is now."""


class Reference:
    """Base of all kinds: a :class:`~mmalign.policies.base.Scorer` with an ``identity``.

    Subclasses say which weights are in place while scoring.
    """

    kind: ClassVar[str] = "given"
    moving: ClassVar[bool] = False
    """Whether the weights change during training."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self._identity: str | None = None

    def weights(self) -> AbstractContextManager[None]:
        """Inside the block the policy's module computes the reference."""
        return nullcontext()

    @property
    def identity(self) -> str:
        """SHA-256 of the reference's weights; the same weights give the same hash in every kind."""
        if self._identity is None or self.moving:
            with self.weights():
                self._identity = module_identity(self.policy.module)
        return self._identity

    def action_mask(self, rows: Rows) -> Tensor:
        """``[B, A]`` bool: the policy's own."""
        return self.policy.action_mask(rows)

    def draw(self, rows: Rows, generator: torch.Generator) -> Draw | None:
        """A draw of the policy's kind; comparisons pass the policy's draw to both instead."""
        return self.policy.draw(rows, generator)

    @torch.no_grad()
    def log_probs(
        self, rows: Rows, *, draw: Draw | None = None, temperature: float = 1.0, want: Iterable[str] = (),
    ) -> ActionScores:
        """Scores of ``rows`` under the reference, detached."""
        with evaluating(self.policy.module), self.weights():
            scores: ActionScores = self.policy.log_probs(rows, draw=draw, temperature=temperature, want=want)
        return scores

    def after_update(self, step: int) -> None:
        """Called after every optimiser update with the number of updates done."""

    def state_dict(self) -> dict[str, Any]:
        """The identity, and whatever cannot be made again from the model a run starts from."""
        return {"kind": self.kind, "identity": self.identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; raises CheckpointError when the reference is another model than the checkpoint's."""
        if state["kind"] != self.kind:
            raise CheckpointError(f"the checkpoint's reference is of kind {state['kind']!r}, this run's {self.kind!r}; "
                                  "resume with the same reference.kind")
        if not self.moving and state["identity"] != self.identity:
            raise CheckpointError(
                f"the reference ({self.kind}) has other weights than the checkpoint's (identity {self.identity[:12]}, not "
                f"{state['identity'][:12]}): the run must start from the same model.path and model.adapter")


@REFERENCES.register("adapter_off")
class AdapterOffReference(Reference):
    """The base model under the adapters."""

    kind = "adapter_off"

    def __init__(self, policy: Policy, options: ReferenceOptions) -> None:
        super().__init__(policy)
        module = policy.module
        if not is_adapted(module):
            raise ConfigError("reference.kind: adapter_off needs a policy with an adapter; set tuning.name to lora (or "
                              "another adapter), or use frozen_copy")
        outside = _trained_outside_adapters(module)
        if outside:
            raise ConfigError(f"reference.kind: adapter_off does not undo trained parameters outside the adapter "
                              f"({', '.join(sorted(outside)[:3])}); use frozen_copy or adapter_ref")
        if not adapters_are_identity(module):
            logger.warning("reference.kind adapter_off compares with the base model, but the adapter is not at zero: the "
                           "policy starts away from its reference. adapter_ref keeps the adapter as it is now")

    def weights(self) -> AbstractContextManager[None]:
        """Adapters disabled."""
        return adapters_disabled(self.policy.module)


class HeldReference(Reference):
    """Weights kept beside the policy's and exchanged with them for the time of a score."""

    def __init__(self, policy: Policy, names: Iterable[str], *, master: bool = False) -> None:
        super().__init__(policy)
        current = _tensors(policy.module)
        # A moving average of half-precision weights would stand still; it is kept in float32.
        self.held = {
            name: current[name].detach().clone().to(_master_dtype(current[name]) if master else current[name].dtype)
            for name in names
        }

    @contextmanager
    def weights(self) -> Iterator[None]:  # type: ignore[override]
        """The held tensors in the place of the module's; exchanging storage copies nothing."""
        current = _tensors(self.policy.module)
        missing = sorted(set(self.held) - set(current))
        if missing:
            raise ConfigError(f"the module no longer has the parameters the reference was made of ({missing[0]}, ...): make "
                              "the reference after adapters are injected")
        originals: dict[str, Tensor] = {}
        try:
            for name, kept in self.held.items():
                tensor = current[name]
                if kept.device != tensor.device:
                    kept = self.held[name] = kept.to(tensor.device)
                originals[name] = tensor.data
                tensor.data = kept.to(tensor.dtype)
            yield
        finally:
            for name, original in originals.items():
                current[name].data = original


@REFERENCES.register("frozen_copy")
class FrozenCopyReference(HeldReference):
    """Every weight as it is now."""

    kind = "frozen_copy"

    def __init__(self, policy: Policy, options: ReferenceOptions) -> None:
        super().__init__(policy, _tensors(policy.module))


@REFERENCES.register("adapter_ref")
class AdapterReference(HeldReference):
    """What is trained (adapters, and anything beside them) as it is now; the frozen base is shared."""

    kind = "adapter_ref"

    def __init__(self, policy: Policy, options: ReferenceOptions) -> None:
        if not is_adapted(policy.module):
            raise ConfigError("reference.kind: adapter_ref needs a policy with an adapter; use frozen_copy")
        super().__init__(policy, _changing(policy.module))


class MovingReference(HeldReference):
    """Held weights that follow the policy."""

    moving = True
    default_every: ClassVar[int]

    def __init__(self, policy: Policy, options: ReferenceOptions) -> None:
        super().__init__(policy, _changing(policy.module), master=True)
        self.options = options
        self.every = options.every or self.default_every

    def after_update(self, step: int) -> None:
        """Move when due."""
        if step % self.every == 0:
            current = {name: tensor.detach() for name, tensor in _tensors(self.policy.module).items() if name in self.held}
            self.held = {name: tensor.to(current[name].device) for name, tensor in self.held.items()}
            self.move(current)

    def move(self, current: dict[str, Tensor]) -> None:
        """Take a step towards the policy's weights."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """The held weights."""
        return {"kind": self.kind, "held": dict(self.held)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the held weights; raises CheckpointError when they belong to another model."""
        super().load_state_dict({"identity": "", **state})
        held = state["held"]
        if {name: t.shape for name, t in held.items()} != {name: t.shape for name, t in self.held.items()}:
            raise CheckpointError(f"the checkpoint's {self.kind} reference has other parameters than this run's model")
        self.held = {name: tensor.to(self.held[name]) for name, tensor in held.items()}


@REFERENCES.register("sync", aliases=("tr_dpo",))
class SyncReference(MovingReference):
    """``ref <- alpha policy + (1 - alpha) ref`` every ``every`` updates."""

    kind = "sync"
    default_every = 512

    def move(self, current: dict[str, Tensor]) -> None:
        """Interpolate in float32."""
        from mmalign.weights.arithmetic import lerp

        self.held = lerp(self.held, current, self.options.alpha)


@REFERENCES.register("ema")
class EmaReference(MovingReference):
    """``ref <- decay ref + (1 - decay) policy`` every ``every`` updates."""

    kind = "ema"
    default_every = 1

    def move(self, current: dict[str, Tensor]) -> None:
        """Average in float32."""
        from mmalign.weights.arithmetic import ema_update

        ema_update(self.held, current, self.options.decay)


@REFERENCES.register("precomputed")
class PrecomputedReference(Reference):
    """Scores of the policy's first weights, stored by row content; nothing is computed once training has begun.

    :meth:`precompute` fills the store; until the first update, rows that are not in it are scored and stored on the
    way. Afterwards an unknown row is refused: its reference could only be computed from weights that have moved.
    """

    kind = "precomputed"

    def __init__(self, policy: Policy, options: ReferenceOptions) -> None:
        super().__init__(policy)
        self.stored: dict[str, Tensor] = {}
        self.started = False
        # Before the first update the policy itself is the reference.
        self._identity = module_identity(policy.module)

    def precompute(self, rows: Rows, *, rows_per_forward: int = 8, temperature: float = 1.0, draw: Draw | None = None) -> None:
        """Score ``rows`` and store the result of each."""
        for start in range(0, len(rows), rows_per_forward):
            index = list(range(start, min(len(rows), start + rows_per_forward)))
            self.log_probs(rows.take(index), temperature=temperature, draw=None if draw is None else draw.take(index))

    @torch.no_grad()
    def log_probs(
        self, rows: Rows, *, draw: Draw | None = None, temperature: float = 1.0, want: Iterable[str] = (),
    ) -> ActionScores:
        """Stored scores; raises DataError for rows that were not stored in time."""
        if tuple(want):
            raise ConfigError(f"reference.kind: precomputed keeps log-probs only, not {', '.join(want)}")
        keys = [self._key(rows, row, draw, temperature) for row in range(len(rows))]
        missing = [row for row, key in enumerate(keys) if key not in self.stored]
        if missing and self.started:
            raise DataError(f"{len(missing)} of {len(rows)} rows have no precomputed reference score, and the weights have "
                            "moved since: precompute the whole data set before training, or use another reference.kind")
        if missing:
            drawn = None if draw is None else draw.take(missing)
            part = super().log_probs(rows.take(missing), draw=drawn, temperature=temperature)
            for at, row in enumerate(missing):
                self.stored[keys[row]] = part.logp[at][part.mask[at]].cpu()
        mask = self.policy.action_mask(rows)
        logp = torch.zeros(mask.shape)
        for row, key in enumerate(keys):
            logp[row, mask[row].cpu()] = self.stored[key].float()
        device = next(self.policy.module.parameters()).device
        return ActionScores(logp=logp.to(device), mask=mask.to(device))

    def _key(self, rows: Rows, row: int, draw: Draw | None, temperature: float) -> str:
        digest = hashlib.sha256(f"{temperature}".encode())
        for name in sorted(getattr(self.policy, "score_columns", None) or rows.columns):
            digest.update(name.encode())
            _feed(digest, rows[name][row])
        if draw is not None:
            _feed(digest, [draw.timesteps[row], draw.noise[row]])
        return digest.hexdigest()

    def after_update(self, step: int) -> None:
        """From now on the store is closed."""
        self.started = True

    def state_dict(self) -> dict[str, Any]:
        """The store as one tensor with the length of each row."""
        values = list(self.stored.values())
        return {
            "kind": self.kind, "identity": self.identity, "started": self.started, "keys": list(self.stored),
            "sizes": [len(value) for value in values], "values": torch.cat([torch.zeros(0), *values]),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the store; the identity is the one it was computed with."""
        if state["kind"] != self.kind:
            super().load_state_dict(state)
        self._identity, self.started = state["identity"], bool(state["started"])
        parts = state["values"].split([int(size) for size in state["sizes"]])
        self.stored = {key: part.clone() for key, part in zip(state["keys"], parts, strict=True)}


class GivenReference(Reference):
    """Another scorer, loaded from another checkpoint."""

    kind = "given"


def make_reference(
    policy: Policy, options: ReferenceOptions | None = None, *, scorer: Scorer | None = None,
) -> Reference | None:
    """The reference of ``policy`` as it is now (after adapters were injected), or None for ``kind: none``.

    ``scorer`` is a policy loaded from another checkpoint to compare with instead. Raises ConfigError when it is, or
    shares trained weights with, the policy itself; or when the policy cannot have the kind that is asked for.
    """
    options = options or ReferenceOptions()
    if scorer is not None:
        _refuse_shared(policy, scorer)
        reference: Reference = GivenReference(scorer)
    elif options.kind == "none":
        return None
    else:
        kind = automatic_kind(policy.module) if options.kind == "auto" else options.kind
        reference = REFERENCES.get(kind)(policy, options)
    logger.info("reference: %s", reference.kind)
    return reference


def automatic_kind(module: nn.Module) -> str:
    """What ``auto`` stands for: the cheapest kind that equals the policy as it is now."""
    if not is_adapted(module):
        return "frozen_copy"
    if adapters_are_identity(module) and not _trained_outside_adapters(module):
        return "adapter_off"
    return "adapter_ref"


def _refuse_shared(policy: Policy, scorer: Scorer) -> None:
    module = getattr(scorer, "module", None)
    shared: set[int] = set()
    if isinstance(module, nn.Module):
        trained = {parameter.data_ptr() for parameter in policy.module.parameters() if parameter.requires_grad}
        shared = trained & {parameter.data_ptr() for parameter in module.parameters()}
    if scorer is policy or shared:
        raise ConfigError("the reference is the policy itself (or shares its trained weights), so every log-ratio would be "
                          "0; load it separately, or let reference.kind make a copy")


def _trained_outside_adapters(module: nn.Module) -> set[str]:
    inside = adapter_parameter_names(module)
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad and name not in inside}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and floating-point buffers of the state by name, each once, without wrappers' prefixes."""
    inner = unwrap(module)
    return dict(inner.named_parameters()) | _buffers(inner)


def _buffers(inner: nn.Module) -> dict[str, Tensor]:
    saved = inner.state_dict().keys()
    return {name: buffer for name, buffer in inner.named_buffers() if name in saved and buffer.is_floating_point()}


def _changing(module: nn.Module) -> list[str]:
    """Names of what training may change: trained parameters, every adapter, buffers."""
    inner = unwrap(module)
    adapters = adapter_parameter_names(inner) if is_adapted(inner) else set()
    parameters = [name for name, p in inner.named_parameters() if p.requires_grad or name in adapters]
    return [*parameters, *_buffers(inner)]


def _master_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else tensor.dtype


def _feed(digest: Any, value: Any) -> None:
    """Hash the content of a value of a row, its structure included."""
    if isinstance(value, Tensor):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"T{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, np.ndarray):
        _feed(digest, torch.from_numpy(np.ascontiguousarray(value)))
    elif isinstance(value, (list, tuple)) and value and all(type(item) is int for item in value):
        _feed(digest, torch.tensor(value, dtype=torch.int64))
    elif isinstance(value, (list, tuple)):
        digest.update(f"L{len(value)}".encode())
        for item in value:
            _feed(digest, item)
    elif isinstance(value, dict):
        _feed(digest, [[str(key), value[key]] for key in sorted(value, key=str)])
    elif hasattr(value, "tobytes") and hasattr(value, "size"):  # a PIL image
        digest.update(f"I{value.mode}{value.size}".encode())
        digest.update(value.tobytes())
    else:
        digest.update(f"V{type(value).__name__}:{value!r}".encode())
