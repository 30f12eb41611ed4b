"""Named optimiser groups: which parameters, which optimiser, which schedule, how often."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from mmalign.config import Options
from mmalign.core.registry import Registry
from mmalign.errors import ConfigError

OPTIMIZERS: Registry[Callable[..., torch.optim.Optimizer]] = Registry("optimizer")


class ScheduleOptions(Options):
    """Learning-rate multiplier over the optimiser updates of a run."""

    name: Literal["constant", "linear", "cosine", "inverse_sqrt", "polynomial"] = "constant"
    """Shape after the warm-up."""
    warmup: float = 0.0
    """Updates of linear warm-up; a value below 1 is a share of all updates."""
    min_ratio: float = 0.0
    """Multiplier at the end of a decaying schedule."""


class OptimizerOptions(Options):
    """One optimiser over the parameters whose qualified name matches a pattern."""

    name: str = "main"
    """Label in logs and checkpoints."""
    match: list[str] = ["*"]
    """Shell patterns over "module.parameter" names (``policy.*lora*``); a parameter goes to the first group it fits."""
    kind: str = "adamw"
    """adamw, adam, sgd, rmsprop, adafactor, or a registered one."""
    lr: float = 1e-6
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay; norms and biases are exempt when ``decay_all`` is false."""
    decay_all: bool = False
    """Apply weight decay to one-dimensional parameters too."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam moments."""
    eps: float = 1e-8
    """Adam epsilon."""
    momentum: float = 0.0
    """Momentum of sgd and rmsprop."""
    schedule: ScheduleOptions = ScheduleOptions()
    """Learning-rate schedule."""
    max_grad_norm: float | None = 1.0
    """Clip the group's gradient norm; null does not clip."""
    every: int = 1
    """Step this group on every n-th update only (gradients accumulate in between)."""


def _fused(groups: list[dict[str, Any]]) -> bool:
    """Whether torch's one-pass Adam takes these parameters: on a CPU it is 7x as fast as the loop over operations."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda", "mps", "xpu") for p in parameters)


def _adamw(groups: list[dict[str, Any]], options: OptimizerOptions) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=_fused(groups))


def _adam(groups: list[dict[str, Any]], options: OptimizerOptions) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=_fused(groups))


def _sgd(groups: list[dict[str, Any]], options: OptimizerOptions) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum)


def _rmsprop(groups: list[dict[str, Any]], options: OptimizerOptions) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(groups, lr=options.lr, momentum=options.momentum, eps=options.eps)


def _adafactor(groups: list[dict[str, Any]], options: OptimizerOptions) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(groups, lr=options.lr)


for _name, _build in {"adamw": _adamw, "adam": _adam, "sgd": _sgd, "rmsprop": _rmsprop, "adafactor": _adafactor}.items():
    OPTIMIZERS.register(_name)(_build)


@dataclass
class OptimizerGroup:
    """A built optimiser with its schedule and the parameters it owns."""

    options: OptimizerOptions
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR

    def state_dict(self) -> dict[str, Any]:
        """Optimiser and schedule state, parameters by name."""
        schedule = {key: value for key, value in self.schedule.state_dict().items() if key != "lr_lambdas"}
        # A group that steps every n-th update carries gradients from one update to the next.
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        return {"optimizer": self.optimizer.state_dict(), "schedule": schedule, "parameters": list(self.parameters),
                "gradients": gradients}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; raises ConfigError when the parameters are not the same."""
        if state["parameters"] != list(self.parameters):
            raise ConfigError(f"optimizers.{self.options.name}: the checkpoint's parameters are not those of this run")
        self.optimizer.load_state_dict(state["optimizer"])
        for name, parameter in self.parameters.items():
            gradient = state["gradients"].get(name)
            parameter.grad = None if gradient is None else gradient.to(parameter.device)
        functions: list[None] = [None] * len(self.schedule.lr_lambdas)  # plain functions keep their own state
        self.schedule.load_state_dict({**state["schedule"], "lr_lambdas": functions})


def schedule_factor(options: ScheduleOptions, total: int) -> Callable[[int], float]:
    """Multiplier as a function of the number of updates done."""
    warmup = round(options.warmup * total) if options.warmup < 1 else int(options.warmup)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        left = max(0.0, 1 - (step - warmup) / max(1, total - warmup))
        if options.name == "constant":
            return 1.0
        if options.name == "inverse_sqrt":
            return float((max(1, warmup) / max(1, step + 1)) ** 0.5) if warmup else 1 / (step + 1) ** 0.5
        if options.name == "cosine":
            left = 0.5 * (1 + float(torch.cos(torch.tensor((1 - left) * torch.pi, dtype=torch.float64))))
        if options.name == "polynomial":
            left = left**2
        return options.min_ratio + (1 - options.min_ratio) * left

    return factor


def build_optimizers(
    modules: Mapping[str, nn.Module], options: Iterable[OptimizerOptions], *, total_steps: int,
) -> list[OptimizerGroup]:
    """One :class:`OptimizerGroup` per entry; every trainable parameter belongs to exactly one.

    Raises ConfigError when a trainable parameter matches no group, or a group matches nothing.
    """
    named = {f"{module}.{name}": p for module, net in modules.items() for name, p in net.named_parameters() if p.requires_grad}
    if not named:
        raise ConfigError("tuning: nothing is trainable; the tuning mode froze every parameter")
    groups: list[OptimizerGroup] = []
    left = dict(named)
    for index, option in enumerate(options):
        owned = {n: p for n, p in left.items() if any(fnmatch.fnmatchcase(n, pattern) for pattern in option.match)}
        if not owned:
            raise ConfigError(f"optimizers[{index}].match: {option.match} fits no trainable parameter that is still free; "
                              f"names look like {next(iter(named))!r}")
        left = {n: p for n, p in left.items() if n not in owned}
        decayed = {n: p for n, p in owned.items() if option.decay_all or p.dim() > 1}
        plain = {n: p for n, p in owned.items() if n not in decayed}
        torch_groups = [
            {"params": list(decayed.values()), "weight_decay": option.weight_decay},
            {"params": list(plain.values()), "weight_decay": 0.0},
        ]
        optimizer = OPTIMIZERS.get(option.kind)([g for g in torch_groups if g["params"]], option)
        schedule = LambdaLR(optimizer, schedule_factor(option.schedule, total_steps))
        ordered = decayed | plain
        groups.append(OptimizerGroup(option, ordered, optimizer, schedule))
    if left:
        raise ConfigError(f"optimizers: {len(left)} trainable parameters match no group, the first is {next(iter(left))!r}; "
                          "add a group with match ['*']")
    return groups

