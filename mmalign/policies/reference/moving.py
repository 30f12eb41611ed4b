"""References that follow the policy during training."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from mmalign.errors import CheckpointError
from mmalign.policies.base import Policy
from mmalign.policies.reference.averaged import SoupReference
from mmalign.policies.reference.base import REFERENCES, HeldReference, Reference, ReferenceOptions, changing_names, tensors_of


class MovingReference(HeldReference):
    """Held weights that follow the policy."""

    moving = True
    default_every: ClassVar[int]

    def __init__(self, policy: Policy, options: ReferenceOptions) -> None:
        super().__init__(policy, changing_names(policy.module), master=True)
        self.options = options
        self.every = options.every or self.default_every

    def after_update(self, step: int) -> None:
        """Move when due."""
        if step % self.every == 0:
            current = {name: tensor.detach() for name, tensor in tensors_of(self.policy.module).items() if name in self.held}
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


@REFERENCES.register("bema")
class BemaReference(MovingReference):
    """``EMA <- (1 - beta_t) EMA + beta_t theta_t``; ``ref = alpha_t (theta_t - theta_0) + EMA`` every ``every`` updates.

    ``beta_t = max((rho + gamma t)^-kappa, min_ema_multiplier)``, ``alpha_t = (rho + gamma t)^-eta``, t = updates done;
    theta_0 is the policy after ``update_after`` updates. Block and Zhang 2025, arXiv 2508.00180. All in float32.
    """

    kind = "bema"
    default_every = 400

    def __init__(self, policy: Policy, options: ReferenceOptions) -> None:
        super().__init__(policy, options)
        self.start = {name: tensor.clone() for name, tensor in self.held.items()}
        self.average = {name: tensor.clone() for name, tensor in self.held.items()}

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        """Begin at ``update_after``, then move every ``every`` updates."""
        age = step - self.options.update_after
        if age < 0 or age % self.every:
            return
        options, current = self.options, tensors_of(self.policy.module)
        beta = max((options.lag + options.multiplier * step) ** -options.ema_power, options.min_ema_multiplier)
        alpha = (options.lag + options.multiplier * step) ** -options.bias_power
        for name in self.held:
            theta = current[name].detach().to(self.average[name])
            if age == 0:
                self.start[name].copy_(theta)
                self.average[name].copy_(theta)
            else:
                self.average[name].mul_(1 - beta).add_(theta, alpha=beta)
                self.held[name] = self.average[name] + alpha * (theta - self.start[name])

    def state_dict(self) -> dict[str, Any]:
        """The reference, the average and the start weights."""
        return {**super().state_dict(), "start": dict(self.start), "average": dict(self.average)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        super().load_state_dict(state)
        self.start = {name: tensor.to(self.held[name]) for name, tensor in state["start"].items()}
        self.average = {name: tensor.to(self.held[name]) for name, tensor in state["average"].items()}


class IterateReference(MovingReference):
    """The policy at the last outer boundary: as it is now, or renewed every ``every`` updates when that is set."""

    kind = "iterate"
    default_every = 0

    def __init__(self, policy: Policy, options: ReferenceOptions) -> None:
        HeldReference.__init__(self, policy, changing_names(policy.module))  # copies, so nothing is lost to rounding
        self.options = options
        self.every = options.every or 0
        self.moving = self.every > 0

    def after_update(self, step: int) -> None:
        """Copy the policy at an outer boundary."""
        if self.moving:
            super().after_update(step)

    def move(self, current: dict[str, Tensor]) -> None:
        """Replace every weight."""
        self.held = {name: tensor.clone() for name, tensor in current.items()}

    def state_dict(self) -> dict[str, Any]:
        """The held weights, or the identity of those that the stage starts from."""
        return super().state_dict() if self.moving else Reference.state_dict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        if self.moving:
            super().load_state_dict(state)
        else:
            Reference.load_state_dict(self, state)


@REFERENCES.register("iterate")
def iterate(policy: Policy, options: ReferenceOptions) -> Reference:
    """The reference of one outer iteration (SELM, iterative DPO): the policy that the iteration before left.

    Iterations are stages, so within one of them nothing moves: the reference is the folder in ``checkpoints``, or, since a
    stage usually starts from the last policy, the policy now. ``every`` instead puts the boundaries inside one stage.
    """
    if options.checkpoints:
        return SoupReference(policy, options)
    return IterateReference(policy, options)
