"""Who decides the share mu of imitation in ``mu L_SFT + (1 - mu) L_RL``: nobody, a schedule, the entropy, a meta-gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import AliasChoices, Field
from torch import Tensor

from mmalign.config import Options
from mmalign.core.gradients import MetaScale, gradient_dot, gradient_norm, mixing_gradient
from mmalign.errors import MmalignError
from mmalign.training.controller import Controller, FixedWeights
from mmalign.training.mixing import ENTROPY, MAIN, VALIDATION
from mmalign.training.objective import TrainState

SFT = "sft"
"""Part of the update that holds demonstrations."""

EntropySign = Literal["eq6", "text"]
Utility = Literal["reward", "val_nll"]


class MixScheduleOptions(Options):
    """mu as a function of the update."""

    shape: Literal["linear", "cosine", "step"] = "linear"
    """linear and cosine go from start to end; step stays at start and then is end (sequential: SFT, then RL)."""
    start: float = 1.0
    """mu at the beginning."""
    end: float = 0.0
    """mu afterwards."""
    until: float = 1.0
    """The update at which end is reached (step: at which it switches); a value of at most 1 is a share of all updates."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse values without a meaning."""
        for name in ("start", "end"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], not {getattr(self, name)}")
        if self.until <= 0:
            raise ValueError(f"until must be positive, not {self.until}")
        if self.shape == "step" and self.until == 1.0:
            raise ValueError("until: 1.0, the end of the run, is when a step would come; give the update at which it switches")

    def at(self, step: int, total: int) -> float:
        """mu of the update after ``step`` others."""
        last = self.until * total if self.until <= 1 else self.until
        done = min(1.0, step / last)
        if self.shape == "step":
            done = float(step >= last)
        elif self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done


_OWNERS: dict[str, tuple[str, ...]] = {
    "mu": ("fixed", "entropy", "meta"), "schedule": ("schedule",), "mu_min": ("entropy", "meta"), "mu_max": ("entropy", "meta"),
    "entropy_lr": ("entropy", "meta"), "entropy_sign": ("entropy", "meta"), "target_entropy": ("entropy", "meta"),
    "meta_lr": ("meta",), "meta_scale": ("meta",), "utility": ("meta",), "lookahead_lr": ("meta",),
}
"""Option -> the controllers that read it; the others are everyone's."""


class MixingOptions(Options):
    """The share mu of the imitation loss, and what moves it."""

    name: Literal["fixed", "schedule", "entropy", "meta"] = "meta"
    """fixed: mu stays. schedule: a function of the update. entropy: mu follows the entropy of the policy. meta: mu also follows
    the gradient of a held-out utility."""
    mu: float = Field(default=0.8, validation_alias=AliasChoices("mu", "mu_init"))
    """Share of the imitation loss (its value after the warm-up where it moves); 1 is SFT alone, 0 RL alone."""
    mu_min: float = 0.05
    """Smallest share."""
    mu_max: float = 0.95
    """Largest share."""
    warmup_steps: int | None = None
    """First updates of imitation alone, part of ``steps``; null is 50 for entropy and meta, and 0 otherwise."""
    every: int = Field(default=20, validation_alias=AliasChoices("every", "meta_update_freq"))
    """Updates between two looks at the gradients (norms are logged; meta also needs a validation batch). 0 never looks."""
    schedule: MixScheduleOptions = MixScheduleOptions()
    """The schedule."""
    meta_lr: float = 1e-4
    """Step size of the meta-gradient."""
    meta_scale: MetaScale = "raw"
    """raw: the derivative as it is, which with a learning rate of 1e-6 moves mu by about 1e-10. cosine: the cosine of the
    angle between the utility's gradient and the difference of the two losses' gradients; use a meta_lr of 0.05 to 0.1."""
    utility: Utility = "reward"
    """What held-out data say of a policy: the reward of its own samples, or the likelihood of demonstrations (val_nll)."""
    lookahead_lr: float | None = None
    """Learning rate of the imagined step of ``raw``; null is that of the first optimiser."""
    meta_params: list[str] | None = Field(default=None, validation_alias=AliasChoices("meta_params", "match"))
    """Patterns of the parameters whose gradients are compared (``policy.*layers.11.*``); null is all trainable ones, or those of
    the last block where there are more than 50 million."""
    entropy_lr: float = 5e-4
    """Step size of the entropy term; 0 is without it."""
    entropy_sign: EntropySign = "eq6"
    """eq6: entropy below the target raises mu. text: entropy above the target raises mu."""
    target_entropy: float | None = None
    """Entropy per token, in nats, that is aimed at; null measures it right after the warm-up."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse values without a meaning, and options of another controller."""
        foreign = [key for key in self.model_fields_set if self.name not in _OWNERS.get(key, (self.name,))]
        if foreign:
            raise ValueError(f"{sorted(foreign)[0]} belongs to controllers {' and '.join(_OWNERS[sorted(foreign)[0]])}, not to "
                             f"{self.name}; leave it out")
        if not 0 <= self.mu <= 1:
            raise ValueError(f"mu must be in [0, 1], not {self.mu}")
        for key in ("meta_lr", "entropy_lr", "every"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"{key} must not be negative, not {getattr(self, key)}")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, not {self.warmup_steps}")
        if self.lookahead_lr is not None and self.lookahead_lr <= 0:
            raise ValueError(f"lookahead_lr must be positive, not {self.lookahead_lr}")
        if self.meta_params is not None and not self.meta_params:
            raise ValueError("meta_params is empty; give patterns of parameter names, or null")
        if self.name in ("entropy", "meta"):
            self._check_moving()

    def _check_moving(self) -> None:
        if not 0 <= self.mu_min <= self.mu_max <= 1:
            raise ValueError(f"mu_min and mu_max must satisfy 0 <= mu_min <= mu_max <= 1, not {self.mu_min} and {self.mu_max}")
        if not self.mu_min <= self.mu <= self.mu_max:
            raise ValueError(f"mu must be in [mu_min, mu_max] = [{self.mu_min}, {self.mu_max}], not {self.mu}")
        if self.name == "meta" and self.every < 1:
            raise ValueError("every: 0 never computes the meta-gradient; use at least 1, or controller entropy or fixed")
        if self.entropy_lr and self.target_entropy is None and not self.warmup:
            raise ValueError("target_entropy is not set, and without warmup_steps nothing measures it; give either, or "
                             "entropy_lr: 0")

    @property
    def warmup(self) -> int:
        """Updates of the warm-up, its default filled in."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return 50 if self.name in ("entropy", "meta") else 0

    @property
    def wants_validation(self) -> bool:
        """Whether held-out data are read."""
        return self.name == "meta" and self.meta_lr > 0 and self.mu_min < self.mu_max


@dataclass(frozen=True)
class MixedTerms:
    """Names and own weights of the terms of either side, and the validation term; other terms keep their weight."""

    sft: Mapping[str, float]
    rl: Mapping[str, float]
    validation: str | None = None
    match: tuple[str, ...] = ("policy.*",)
    """Patterns of the parameters that gradients are compared on."""
    extra: Controller = field(default_factory=FixedWeights)
    """Weights of single terms that somebody else adapts (a KL coefficient)."""


class MixingController(FixedWeights):
    """``mu L_SFT + (1 - mu) L_RL`` with a constant mu after ``warmup`` updates of imitation alone.

    Terms of the SFT side have mu times their own weight, terms of the RL side (1 - mu) times theirs; a term of neither side
    (the loss of a separate critic) is left alone. What cannot have a weight is not even drawn (:meth:`parts`).
    """

    def __init__(self, mu: float, terms: MixedTerms, *, warmup: int = 0, every: int = 0) -> None:
        self.mu, self.terms, self.warmup, self.every = mu, terms, warmup, every
        self.match: Sequence[str] = terms.match
        self.seen: dict[str, float] = {}

    def reach(self, state: TrainState) -> tuple[float, float]:
        """Smallest and largest mu that this update may have."""
        if state.step < self.warmup:
            return 1.0, 1.0
        return self._reach(state)

    def _reach(self, state: TrainState) -> tuple[float, float]:
        return self.mu, self.mu

    def share(self, state: TrainState) -> float:
        """mu of this update."""
        return 1.0 if state.step < self.warmup else self.mu

    def parts(self, state: TrainState) -> list[str]:
        """Parts that this update needs."""
        low, high = self.reach(state)
        names = [name for name, needed in ((MAIN, low < 1), (SFT, high > 0)) if needed]
        return [*names, VALIDATION] if self._wants_validation(state) else names

    def _due(self, state: TrainState) -> bool:
        low, high = self.reach(state)
        return self.every > 0 and low < 1 and high > 0 and (state.step - self.warmup) % self.every == 0

    def _wants_validation(self, state: TrainState) -> bool:
        return False

    def wants_entropy(self, state: TrainState) -> bool:
        """Whether the metric ``entropy`` is needed at this update."""
        return False

    def weights(self, state: TrainState) -> dict[str, float]:
        """mu on one side, 1 - mu on the other."""
        mu, adapted = self.share(state), self.terms.extra.weights(state)
        return {
            **adapted, **{name: mu * weight for name, weight in self.terms.sft.items()},
            **{name: (1 - mu) * weight for name, weight in self._rl_weights(adapted).items()},
        }

    def _rl_weights(self, adapted: Mapping[str, float]) -> dict[str, float]:
        return {name: adapted.get(name, weight) for name, weight in self.terms.rl.items()}

    def probe(self, state: TrainState) -> tuple[str, ...]:
        """The terms of both sides when a look is due."""
        if not self._due(state):
            return ()
        names = [*self.terms.sft, *(name for name, weight in self._rl_weights(self.terms.extra.weights(state)).items() if weight)]
        return (*names, self.terms.validation) if self._wants_validation(state) and self.terms.validation else tuple(names)

    def update(self, metrics: Mapping[str, float], gradients: Mapping[str, list[Tensor]], state: TrainState) -> None:
        """Look at the gradients, then let the subclass move mu; before the step that mu weighs."""
        self.seen = {}
        self.terms.extra.update(metrics, {}, state)
        if gradients:
            sft = weighted_sum(gradients, self.terms.sft)
            rl = weighted_sum(gradients, self._rl_weights(self.terms.extra.weights(state)))
            norms = gradient_norm(sft), gradient_norm(rl)
            product = norms[0] * norms[1]
            self.seen |= {"mixing/grad_norm_sft": norms[0], "mixing/grad_norm_rl": norms[1],
                          "mixing/cosine": gradient_dot(sft, rl) / product if product else 0.0}
            self._look(gradients, sft, rl)
        if state.step >= self.warmup:
            self._move(metrics, state)
        if not math.isfinite(self.mu):
            raise MmalignError(f"controller: mu became {self.mu} at update {state.step + 1}; the gradients or the entropy are "
                               "not finite. Lower optimizers.*.lr or check the data")

    def _look(self, gradients: Mapping[str, list[Tensor]], sft: list[Tensor], rl: list[Tensor]) -> None:
        """What a subclass reads off the gradients."""

    def _move(self, metrics: Mapping[str, float], state: TrainState) -> None:
        """How a subclass moves mu."""

    def metrics(self, state: TrainState) -> dict[str, float]:
        """mu of this update, and what was looked at."""
        return {"mu": self.share(state), **self.seen}

    def state_dict(self) -> dict[str, Any]:
        """mu, and the controller inside."""
        return {"mu": self.mu, "extra": self.terms.extra.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.mu = float(state["mu"])
        self.terms.extra.load_state_dict(state["extra"])


class ScheduledMixing(MixingController):
    """mu as a function of the update; at 1 nothing is sampled and at 0 no demonstrations are read."""

    def __init__(self, schedule: MixScheduleOptions, terms: MixedTerms, *, warmup: int = 0, every: int = 0) -> None:
        super().__init__(schedule.start, terms, warmup=warmup, every=every)
        self.schedule = schedule

    def _reach(self, state: TrainState) -> tuple[float, float]:
        mu = self.schedule.at(state.step, state.total_steps)
        return mu, mu

    def _move(self, metrics: Mapping[str, float], state: TrainState) -> None:
        self.mu = self.schedule.at(state.step, state.total_steps)


class EntropyMixing(MixingController):
    """``mu <- clip(mu + entropy_lr g_H, mu_min, mu_max)`` at every update after the warm-up.

    ``g_H = H* - H`` (``eq6``, as printed) or ``H - H*`` (``text``, as the paper describes it in words), with H the mean entropy
    of the policy's tokens and H* its value right after the warm-up unless ``target`` is given.
    He et al. 2025, arXiv 2508.06944, equation 6 (a paper that its authors withdrew).
    """

    def __init__(
        self, mu: float, terms: MixedTerms, *, low: float, high: float, warmup: int, every: int, entropy_lr: float,
        entropy_sign: EntropySign = "eq6", target: float | None = None,
    ) -> None:
        super().__init__(mu, terms, warmup=warmup, every=every)
        self.low, self.high, self.entropy_lr, self.target = low, high, entropy_lr, target
        self.sign = 1.0 if entropy_sign == "eq6" else -1.0

    def _reach(self, state: TrainState) -> tuple[float, float]:
        return self.low, self.high

    def wants_entropy(self, state: TrainState) -> bool:
        """At every update that may move mu."""
        return self.entropy_lr > 0 and self.low < self.high and state.step >= self.warmup

    def _entropy_gradient(self, metrics: Mapping[str, float], state: TrainState) -> float:
        """``g_H``; measures the target first where there is none."""
        if not self.wants_entropy(state):
            return 0.0
        entropy = metrics[ENTROPY]
        if self.target is None:
            if not self.warmup or state.step > self.warmup:
                raise MmalignError("controller.target_entropy is not set, and the update right after the warm-up, which "
                                   "measures it, is not this one; give a value")
            self.target = entropy
        gradient = self.sign * (self.target - entropy)
        self.seen |= {"mixing/entropy_gradient": gradient, "mixing/target_entropy": self.target}
        return gradient

    def _move(self, metrics: Mapping[str, float], state: TrainState) -> None:
        self.mu = self._clipped(self.mu + self.entropy_lr * self._entropy_gradient(metrics, state))

    def _clipped(self, mu: float) -> float:
        return mu if math.isnan(mu) else min(self.high, max(self.low, mu))

    def state_dict(self) -> dict[str, Any]:
        """mu and the target."""
        return {**super().state_dict(), "target": self.target}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        super().load_state_dict(state)
        self.target = None if state["target"] is None else float(state["target"])


class MetaMixing(EntropyMixing):
    """``mu <- clip(mu + meta_lr g_mu + entropy_lr g_H, mu_min, mu_max)``, ``g_mu`` at every K-th update and 0 otherwise.

    ``g_mu = dU(theta') / d mu = step_size <grad L_val, g_SFT - g_RL>`` with ``U = -L_val`` and the look-ahead
    ``theta' = theta - step_size grad L(theta; mu)`` (:func:`~mmalign.core.gradients.mixing_gradient`); all three gradients are
    taken at theta. He et al. 2025, arXiv 2508.06944, equations 5 and 6. Their published code adds the opposite sign, which
    ascends the validation loss.
    """

    def __init__(
        self, mu: float, terms: MixedTerms, *, meta_lr: float, step_size: float, meta_scale: MetaScale = "raw", **entropy: Any,
    ) -> None:
        super().__init__(mu, terms, **entropy)
        self.meta_lr, self.step_size, self.meta_scale = meta_lr, step_size, meta_scale
        self.gradient = 0.0

    def _wants_validation(self, state: TrainState) -> bool:
        return self.meta_lr > 0 and self.low < self.high and self._due(state)

    def _look(self, gradients: Mapping[str, list[Tensor]], sft: list[Tensor], rl: list[Tensor]) -> None:
        name = self.terms.validation
        if name is None or name not in gradients:
            return
        self.gradient = mixing_gradient(gradients[name], sft, rl, step_size=self.step_size, scale=self.meta_scale)
        self.seen |= {"mixing/meta_gradient": self.gradient, "mixing/grad_norm_validation": gradient_norm(gradients[name])}

    def _move(self, metrics: Mapping[str, float], state: TrainState) -> None:
        step = self.meta_lr * self.gradient + self.entropy_lr * self._entropy_gradient(metrics, state)
        self.mu, self.gradient = self._clipped(self.mu + step), 0.0


def weighted_sum(gradients: Mapping[str, list[Tensor]], weights: Mapping[str, float]) -> list[Tensor]:
    """``sum_k w_k g_k`` over the named terms that have gradients; a single term of weight 1 is not copied."""
    named = [(gradients[name], weight) for name, weight in weights.items() if name in gradients and weight]
    if not named:
        some = next(iter(gradients.values()))
        return [tensor.new_zeros(tensor.shape) for tensor in some]
    if len(named) == 1 and named[0][1] == 1:
        return named[0][0]
    first, weight = named[0]
    total = [weight * tensor for tensor in first]
    for tensors, weight in named[1:]:
        for into, tensor in zip(total, tensors, strict=True):
            into.add_(tensor, alpha=weight)
    return total


def make_controller(options: MixingOptions, terms: MixedTerms, *, step_size: float) -> MixingController:
    """The controller of a configuration; ``step_size`` is the look-ahead learning rate where the options leave it open."""
    if options.name == "fixed":
        return MixingController(options.mu, terms, warmup=options.warmup, every=options.every)
    if options.name == "schedule":
        return ScheduledMixing(options.schedule, terms, warmup=options.warmup, every=options.every)
    moving: dict[str, Any] = {
        "low": options.mu_min, "high": options.mu_max, "warmup": options.warmup, "every": options.every,
        "entropy_lr": options.entropy_lr, "entropy_sign": options.entropy_sign, "target": options.target_entropy,
    }
    if options.name == "entropy":
        return EntropyMixing(options.mu, terms, **moving)
    return MetaMixing(options.mu, terms, meta_lr=options.meta_lr, meta_scale=options.meta_scale,
                      step_size=options.lookahead_lr if options.lookahead_lr is not None else step_size, **moving)
