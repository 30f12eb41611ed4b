"""The policy-gradient objective: the same for completion tokens, image tokens and denoising steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.config import Component
from mmalign.core.divergence import kl_estimate
from mmalign.core.policy_gradient import POLICY_LOSSES, clip_bounds, clipped_value_loss, policy_ratio
from mmalign.core.reduce import count
from mmalign.data.rows import Rows
from mmalign.policies.base import Policy
from mmalign.policies.value import ValueFunction
from mmalign.training.objective import Coupling, Maximum, Mean, Metrics, PolicyObjective, Term, TrainState, UpdateBatch
from mmalign.training.rollout_advantages import KLOptions

__all__ = ["KLOptions", "PolicyGradient", "PolicyLoss", "PolicyLossOptions"]


class PolicyLossOptions(Component):
    """``{name: ppo_clip, reduction: ..., clip_low: 0.2, ...}``: a registered policy loss and its arguments."""

    name: str = "ppo_clip"
    """reinforce, ppo_clip, gspo, cispo, or a registered one."""
    reduction: str = "seq_mean_token_mean"
    """How ``[B, A]`` losses become one number; see the reductions table."""
    norm_length: int | None = None
    """Constant length of ``seq_mean_token_sum_norm``."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus; 0 only logs the entropy."""


@dataclass(frozen=True)
class PolicyLoss:
    """A policy loss bound to its arguments."""

    name: str
    arguments: Mapping[str, Any]
    reduction: str
    norm_length: int | None = None


class PolicyGradient(PolicyObjective):
    """``reduce(loss(logp, old_logp, A)) + kl_coef reduce(KL) - entropy_coef reduce(H) + value_coef token_mean(L_V)``.

    Rows carry ``advantages[B]`` (or ``[B, A]``), ``old_logp[B, A]`` (log-probs of the distribution sampled from), with a KL
    term ``ref_logp[B, A]``, and with a value function ``values[B, A]`` and ``returns[B, A]`` of the rollout. With one
    update per rollout (``on_policy``) the ratio is taken to the detached current log-probs, exactly 1, and ``old_logp``
    serves only the always-logged gap between sampling and scoring. The value loss is
    :func:`~mmalign.core.policy_gradient.clipped_value_loss` (Schulman et al. 2017, arXiv 1707.06347, equation 9).
    """

    coupling: Coupling = "none"

    def __init__(
        self, policy: Policy, loss: PolicyLoss, *, temperature: float = 1.0, on_policy: bool = True,
        kl: KLOptions | None = None, entropy_coef: float = 0.0, value: ValueFunction | None = None, value_coef: float = 0.1,
        value_clip: float = 0.2,
    ) -> None:
        self.policy, self.policy_loss, self.temperature, self.on_policy = policy, loss, temperature, on_policy
        self.function = POLICY_LOSSES.get(loss.name)
        self.level, self.bounds = clip_bounds(loss.name, loss.arguments)
        self.kl = kl if kl is not None and kl.coef and kl.placement == "loss" else None
        self.entropy_coef = entropy_coef
        self.value, self.value_coef, self.value_clip = value, value_coef, value_clip

    def modules(self) -> dict[str, nn.Module]:
        """The policy's network, and that of the value function."""
        return {"policy": self.policy.module} | ({"value": self.value.module} if self.value is not None else {})

    def replace_modules(self, modules: Mapping[str, nn.Module]) -> None:
        """Hand the wrapped networks back."""
        super().replace_modules(modules)
        if self.value is not None:
            self.value.replace_module(modules["value"])

    def prepare(self, update: UpdateBatch, state: TrainState) -> dict[str, Any]:
        """Rollout rows hold their own noise: nothing to draw."""
        return {}

    def _mask(self, update: UpdateBatch) -> Tensor:
        rows = update.parts[self.part]
        mask = self.policy.action_mask(rows)
        if "action_mask" in rows:  # rows whose completion was cut off keep their reward but not their loss
            mask = mask & rows["action_mask"][:, : mask.shape[1]].to(mask.device)
        return mask

    def counts(self, update: UpdateBatch) -> dict[str, float]:
        """Actions or sequences of the update."""
        mask = self._mask(update)
        total = count(mask, how=self.policy_loss.reduction, norm_length=self.policy_loss.norm_length)
        names = ["policy"] + (["kl"] if self.kl else []) + (["entropy"] if self.entropy_coef else [])
        counts = dict.fromkeys(names, total)
        if self.value is not None:
            counts["value"] = count(mask, how="token_mean")
        return counts

    def loss(self, micro: UpdateBatch, shared: dict[str, Any], state: TrainState) -> tuple[list[Term], Metrics]:
        """Terms of one micro-batch."""
        rows = micro.parts[self.part]
        wanted = ("entropy", *(self.value.want if self.value is not None else ()))
        scores = self.policy.log_probs(rows, temperature=self.temperature, want=wanted)
        logp, width = scores.logp, scores.logp.shape[1]
        mask = self._mask(micro).to(logp.device)
        behaviour = rows["old_logp"][:, :width].to(logp.device)
        advantages = torch.as_tensor(rows["advantages"], dtype=torch.float32, device=logp.device)
        advantages = advantages if advantages.dim() == 1 else advantages[:, :width]
        values = self.function(
            logp, None if self.on_policy else behaviour, advantages, mask=mask, **self.policy_loss.arguments,
        )
        how, norm = self.policy_loss.reduction, self.policy_loss.norm_length
        valid = mask if values.dim() == 2 else mask.any(1)
        terms = [Term("policy", values, valid, how, norm_length=norm)]
        metrics = self._ratio_metrics(logp.detach(), behaviour, advantages, mask)
        if self.kl is not None:
            divergence = kl_estimate(logp, rows["ref_logp"][:, :width].to(logp.device), kind=self.kl.kind)
            terms.append(Term("kl", divergence, mask, how, self.kl.coef, norm))
            metrics["kl"] = Mean.of(divergence, mask)
        if scores.entropy is not None:
            metrics["entropy"] = Mean.of(scores.entropy, mask)
            if self.entropy_coef:
                terms.append(Term("entropy", -scores.entropy, mask, how, self.entropy_coef, norm))
        if self.value is not None:
            predicted = self.value.values(rows, scores if self.value.want else None)
            term, clipped = self._value_term(predicted, rows, mask)
            terms.append(term)
            metrics["value/clipped"] = Mean.of(clipped, mask)
        return terms, metrics

    def _ratio_metrics(self, logp: Tensor, behaviour: Tensor, advantages: Tensor, mask: Tensor) -> Metrics:
        gap = (logp - behaviour).abs() * mask
        metrics: Metrics = {"rollout_gap/mean": Mean.of(gap, mask), "logp": Mean.of(logp, mask),
                            "rollout_gap/max": Maximum(float(gap.max()) if gap.numel() else 0.0)}
        if self.on_policy:
            return metrics
        metrics["kl_old"] = Mean.of((behaviour - logp) * mask, mask)
        ratio = policy_ratio(logp, behaviour, mask, level=self.level)
        where = mask if ratio.dim() == 2 else mask.any(1)
        signs = advantages[:, None] if ratio.dim() > advantages.dim() else advantages
        if "low" in self.bounds:
            metrics["clipped/low"] = Mean.of(((ratio < self.bounds["low"]) & (signs < 0)).float(), where)
        if "high" in self.bounds:  # a clipped weight is the same for both signs
            affected = torch.ones_like(where) if self.policy_loss.name == "cispo" else signs > 0
            metrics["clipped/high"] = Mean.of(((ratio > self.bounds["high"]) & affected).float(), where)
        return metrics

    def _value_term(self, predicted: Tensor, rows: Rows, mask: Tensor) -> tuple[Term, Tensor]:
        """The value loss, and where its clipping is active."""
        width = mask.shape[1]
        predicted = predicted[:, :width].float()
        old, returns = (rows[name][:, :width].to(predicted.device) for name in ("values", "returns"))
        losses = clipped_value_loss(predicted, old, returns, clip=self.value_clip)
        clipped = (losses.detach() > (predicted.detach() - returns).square() / 2).float()
        return Term("value", losses, mask, "token_mean", self.value_coef), clipped
