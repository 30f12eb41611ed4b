"""The policy-gradient objective: the same for completion tokens, image tokens and denoising steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mmalign.config import Component, Options
from mmalign.core.divergence import kl_estimate
from mmalign.core.policy_gradient import POLICY_LOSSES
from mmalign.core.reduce import count
from mmalign.policies.base import Policy
from mmalign.training.objective import Coupling, Maximum, Mean, Metrics, PolicyObjective, Term, TrainState, UpdateBatch


class PolicyLossOptions(Component):
    """``{name: ppo_clip, reduction: ..., clip_low: 0.2, ...}``: a registered policy loss and its arguments."""

    name: str = "ppo_clip"
    """reinforce, ppo_clip, gspo, cispo, or a registered one."""
    reduction: str = "seq_mean_token_mean"
    """How ``[B, A]`` losses become one number; see the reductions table."""
    norm_length: int | None = None
    """Constant length of ``seq_mean_token_sum_norm``."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus; 0 does not compute entropy gradients."""


class KLOptions(Options):
    """Where the divergence to the reference enters, and how it is estimated."""

    coef: float = 0.0
    """Weight; 0 loads no reference."""
    estimator: Literal["k2", "k3", "k1"] = "k3"
    """k1 = log-ratio, k2 = its square / 2, k3 = exp(-x) - 1 + x (never negative)."""
    placement: Literal["loss", "sequence_reward"] = "loss"
    """Added to the loss, or subtracted from the reward of the sequence before the baseline."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse the combination without an expected gradient."""
        if self.coef < 0:
            raise ValueError(f"kl.coef must not be negative, not {self.coef}")
        if self.placement == "loss" and self.estimator == "k1":
            raise ValueError("kl.estimator k1 has zero expected gradient as a loss; use k3 or k2, or "
                             "kl.placement: sequence_reward")


@dataclass(frozen=True)
class PolicyLoss:
    """A policy loss bound to its arguments."""

    name: str
    arguments: Mapping[str, Any]
    reduction: str
    norm_length: int | None = None


class PolicyGradient(PolicyObjective):
    """``reduce(loss(logp, old_logp, A)) + kl_coef reduce(KL) - entropy_coef reduce(H)`` on rollout rows.

    Rows carry ``advantages[B]``, ``old_logp[B, A]`` (log-probs of the distribution sampled from) and, with a KL term,
    ``ref_logp[B, A]``. With one update per rollout (``on_policy``) the ratio is taken to the detached current
    log-probs, exactly 1, and ``old_logp`` serves only the always-logged gap between sampling and scoring.
    """

    coupling: Coupling = "none"

    def __init__(
        self, policy: Policy, loss: PolicyLoss, *, temperature: float = 1.0, on_policy: bool = True,
        kl: KLOptions | None = None, entropy_coef: float = 0.0,
    ) -> None:
        self.policy, self.policy_loss, self.temperature, self.on_policy = policy, loss, temperature, on_policy
        self.function = POLICY_LOSSES.get(loss.name)
        self.kl = kl if kl is not None and kl.coef and kl.placement == "loss" else None
        self.entropy_coef = entropy_coef

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
        total = count(self._mask(update), how=self.policy_loss.reduction, norm_length=self.policy_loss.norm_length)
        names = ["policy"] + (["kl"] if self.kl else []) + (["entropy"] if self.entropy_coef else [])
        return dict.fromkeys(names, total)

    def loss(self, micro: UpdateBatch, shared: dict[str, Any], state: TrainState) -> tuple[list[Term], Metrics]:
        """Terms of one micro-batch."""
        rows = micro.parts[self.part]
        scores = self.policy.log_probs(
            rows, temperature=self.temperature, want=("entropy",) if self.entropy_coef else (),
        )
        logp, width = scores.logp, scores.logp.shape[1]
        mask = self._mask(micro).to(logp.device)
        behaviour = rows["old_logp"][:, :width].to(logp.device)
        advantages = torch.as_tensor(rows["advantages"], dtype=torch.float32, device=logp.device)
        values = self.function(
            logp, None if self.on_policy else behaviour, advantages, mask=mask, **self.policy_loss.arguments,
        )
        how, norm = self.policy_loss.reduction, self.policy_loss.norm_length
        valid = mask if values.dim() == 2 else mask.any(1)
        terms = [Term("policy", values, valid, how, norm_length=norm)]
        gap = (logp.detach() - behaviour).abs() * mask
        metrics: Metrics = {"rollout_gap/mean": Mean.of(gap, mask), "logp": Mean.of(logp, mask)}
        if self.on_policy:
            metrics["rollout_gap/max"] = Maximum(float(gap.max()) if gap.numel() else 0.0)
        else:
            log_ratio = (logp.detach() - behaviour) * mask
            metrics["kl_old"] = Mean.of(-log_ratio, mask)
            for side, sign in (("low", -1), ("high", 1)):
                limit = self.policy_loss.arguments.get(f"clip_{side}", 0.2)
                outside = (log_ratio.exp() - 1) * sign > limit
                metrics[f"clipped/{side}"] = Mean.of((outside & (advantages[:, None] * sign > 0)).float(), mask)
        if self.kl is not None:
            divergence = kl_estimate(logp, rows["ref_logp"][:, :width].to(logp.device), kind=self.kl.estimator)
            terms.append(Term("kl", divergence, mask, how, self.kl.coef, norm))
            metrics["kl"] = Mean.of(divergence, mask)
        if scores.entropy is not None and self.entropy_coef:
            terms.append(Term("entropy", -scores.entropy, mask, how, self.entropy_coef, norm))
            metrics["entropy"] = Mean.of(scores.entropy, mask)
        return terms, metrics
