"""What all kinds of reference share: options, the table of kinds, scoring through the policy, and exchanged weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mmalign.config import Options
from mmalign.core.logprobs import ActionScores
from mmalign.core.registry import Registry
from mmalign.data.rows import Rows
from mmalign.errors import CheckpointError, ConfigError
from mmalign.policies.base import Draw, Policy
from mmalign.policies.modules import adapter_parameter_names, evaluating, is_adapted, module_identity, unwrap

ReferenceKind = Literal[
    "auto", "frozen_copy", "adapter_off", "adapter_ref", "precomputed", "sync", "ema", "bema", "soup", "iterate", "none",
]


class ReferenceOptions(Options):
    """Which model the policy is compared with."""

    kind: ReferenceKind = "auto"
    """auto: adapter_off for adapters that start at zero, adapter_ref for others, frozen_copy without adapters."""
    alpha: float = 0.6
    """sync: share of the policy's weights in the new reference; 1 replaces it."""
    decay: float = 0.999
    """ema: share of the reference's own weights that is kept."""
    every: int | None = None
    """Updates between two moves of the reference; null is 512 for sync, 400 for bema, 1 for ema, never for iterate."""
    checkpoints: list[str] = []
    """soup: the model folders that are averaged (an adapter folder stands for its merged model). iterate: the one folder of
    the last iteration's policy; empty takes the policy as it is when the stage starts."""
    weights: list[float] | None = None
    """soup: share of each checkpoint, none negative, summing to 1; null is equal shares."""
    same_base: bool = True
    """soup: refuse checkpoints that record different base models, whose average is no model at all."""
    ema_power: float = 0.5
    """bema: kappa of beta_t = (rho + gamma t)^-kappa, the share of the policy's weights in the average."""
    bias_power: float = 0.2
    """bema: eta of alpha_t = (rho + gamma t)^-eta, the weight of the bias correction."""
    lag: float = 10.0
    """bema: rho, the age at which the schedules start."""
    multiplier: float = 1.0
    """bema: gamma, how fast the schedules age."""
    min_ema_multiplier: float = 0.0
    """bema: smallest beta_t."""
    update_after: int = 0
    """bema: updates before the average begins; the start weights are taken there."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse values without a meaning."""
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha must be in (0, 1], not {self.alpha}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), not {self.decay}")
        if self.every is not None and self.every < 1:
            raise ValueError(f"every must be at least 1, not {self.every}")
        if self.every is not None and self.kind == "precomputed":
            raise ValueError("every moves the reference, but kind precomputed keeps scores of the first weights only, which a "
                             "moving reference would make wrong; use kind sync, ema or bema, or leave every out")
        self._check_checkpoints()
        if self.ema_power < 0 or self.bias_power < 0 or self.lag < 1 or self.multiplier < 0:
            raise ValueError("ema_power, bias_power and multiplier must not be negative and lag must be at least 1, not "
                             f"{self.ema_power}, {self.bias_power}, {self.multiplier} and {self.lag}")
        if not 0 <= self.min_ema_multiplier <= 1 or self.update_after < 0:
            raise ValueError(f"min_ema_multiplier must be in [0, 1] and update_after not negative, not "
                             f"{self.min_ema_multiplier} and {self.update_after}")

    def _check_checkpoints(self) -> None:
        count = len(self.checkpoints)
        if self.kind == "soup" and not count:
            raise ValueError("kind soup averages model folders; list them as checkpoints")
        if count and self.kind not in ("soup", "iterate"):
            raise ValueError(f"checkpoints belong to kind soup or iterate, not {self.kind}")
        if self.kind == "iterate" and count > 1:
            raise ValueError(f"checkpoints holds {count} folders; kind iterate compares with one, the last iteration's policy. "
                             "kind soup averages several")
        if self.kind == "iterate" and count and self.every is not None:
            raise ValueError("every and checkpoints exclude each other for kind iterate: the outer boundary is either between "
                             "stages (checkpoints) or every so many updates of this one")
        if self.weights is None:
            return
        if self.kind != "soup":
            raise ValueError(f"weights belong to kind soup, not {self.kind}")
        if len(self.weights) != count:
            raise ValueError(f"weights has {len(self.weights)} numbers for {count} checkpoints; one each is needed")
        if not all(math.isfinite(w) and w >= 0 for w in self.weights) or abs(sum(self.weights) - 1) > 1e-6:
            raise ValueError(f"weights must not be negative and must sum to 1, not {self.weights} (sum {sum(self.weights):g})")

REFERENCES: Registry[Callable[[Policy, ReferenceOptions], Reference]] = Registry("reference kind")
"""Kinds by name; built from the policy as it is now."""


class Reference:
    """Base of all kinds: a :class:`~mmalign.policies.base.Scorer` with an ``identity``.

    Subclasses say which weights are in place while scoring.
    """

    kind: ClassVar[str] = "given"
    moving: bool = False
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
                f"{state['identity'][:12]}): the run must start from the same model.path, model.adapter and "
                "reference.checkpoints")


class HeldReference(Reference):
    """Weights kept beside the policy's and exchanged with them for the time of a score."""

    def __init__(self, policy: Policy, names: Iterable[str], *, master: bool = False) -> None:
        super().__init__(policy)
        current = tensors_of(policy.module)
        # A moving average of half-precision weights would stand still; it is kept in float32.
        self.held = {
            name: current[name].detach().clone().to(master_dtype(current[name]) if master else current[name].dtype)
            for name in names
        }

    @contextmanager
    def weights(self) -> Iterator[None]:  # type: ignore[override]
        """The held tensors in the place of the module's; exchanging storage copies nothing."""
        current = tensors_of(self.policy.module)
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


def trained_outside_adapters(module: nn.Module) -> set[str]:
    """Names of trained parameters that switching the adapters off would not undo."""
    inside = adapter_parameter_names(module)
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad and name not in inside}


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and floating-point buffers of the state by name, each once, without wrappers' prefixes."""
    inner = unwrap(module)
    return dict(inner.named_parameters()) | _buffers(inner)


def _buffers(inner: nn.Module) -> dict[str, Tensor]:
    saved = inner.state_dict().keys()
    return {name: buffer for name, buffer in inner.named_buffers() if name in saved and buffer.is_floating_point()}


def changing_names(module: nn.Module) -> list[str]:
    """Names of what training may change: trained parameters, every adapter, buffers."""
    inner = unwrap(module)
    adapters = adapter_parameter_names(inner) if is_adapted(inner) else set()
    parameters = [name for name, p in inner.named_parameters() if p.requires_grad or name in adapters]
    return [*parameters, *_buffers(inner)]


def master_dtype(tensor: Tensor) -> torch.dtype:
    """float32 for half-precision weights, so that small moves are not lost."""
    return torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else tensor.dtype
