"""The discriminative objective on rewarded samples: right ones score above wrong ones, under a bound on the step's KL."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from mmalign.config import Options
from mmalign.core.constraints import hinge_penalty
from mmalign.core.divergence import kl_estimate
from mmalign.core.logprobs import sequence_log_prob
from mmalign.core.policy_gradient import disco, policy_ratio
from mmalign.data.rows import Rows
from mmalign.errors import DataError, RewardError
from mmalign.policies.base import Policy, Rollout
from mmalign.training.objective import (
    Coupling,
    Maximum,
    Mean,
    Metrics,
    PolicyObjective,
    Term,
    TrainState,
    UpdateBatch,
    sum_over_ranks,
)

Score = Literal["log_likelihood", "likelihood_ratio"]


class ConstraintOptions(Options):
    """A trust region on the divergence from the policy that sampled, held by a hinge penalty."""

    placement: Literal["constraint"] = "constraint"
    """Always a constraint: there is no reference model, the divergence is to the policy of the rollout."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """k1 = log-ratio (may be negative in a small batch, and then never penalises), k3 = never negative."""
    radius: float = 1e-4
    """Divergence per token, in nats, up to which nothing is penalised (the paper's delta)."""
    penalty: float = 1e3
    """Strength beyond the radius (the paper's beta); 0 constrains nothing."""
    form: Literal["linear", "squared"] = "linear"
    """linear: gradient penalty x excess x grad KL, as published code runs. squared: twice that, as printed in the paper."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse values without a meaning."""
        for name in ("radius", "penalty"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"kl.{name} must be 0 or positive, and finite, not {value}")


def correctness(positive_threshold: float | None) -> Callable[[Rollout, Tensor], Tensor]:
    """``(rollout, rewards[B]) -> [B]``: 1 for right, -1 for wrong and 0 for samples without a reward.

    Rewards must be 0 or 1; with a threshold, those above it are right. Raises RewardError naming the sample otherwise.
    """

    def signs(rollout: Rollout, total: Tensor) -> Tensor:
        known = ~total.isnan()
        if positive_threshold is None:
            other = (known & (total != 0) & (total != 1)).nonzero().flatten().tolist()
            if other:
                raise RewardError(
                    f"rewards: sample {other[0]} has the total reward {float(total[other[0]]):.6g}; right and wrong samples are "
                    "told apart by rewards of 1 and 0. Set positive_threshold, above which a sample is right, or give "
                    "further rewards the weight 0")
        right = total > (0.5 if positive_threshold is None else positive_threshold)
        return torch.where(known, torch.where(right, 1.0, -1.0), 0.0)

    return signs


class Discriminative(PolicyObjective):
    """``mean_q (tau log mean exp(s- / tau) - mean s+) + hinge(KL(old || policy))`` (Li et al. 2025, arXiv 2505.12366).

    The score ``s`` of a sample is the mean over its actions of the log-prob, or of the ratio to the policy that sampled.
    Rows carry ``advantages[B]`` of :func:`correctness` (right, wrong or unknown), ``old_logp[B, A]`` and ``group[B]``.
    The KL is a mean over all actions of the update, also of groups without a contrast; whether it exceeds the radius
    is decided for the whole update before any gradient, so that splitting the update changes nothing. With one update
    per rollout (``on_policy``) the KL and its gradient are 0, and the ratio is taken to the detached current policy.

    Args:
        score: ``log_likelihood`` or ``likelihood_ratio``.
        tau: temperature of the worst-case weights of wrong samples; inf weighs them equally (DisCO-b).
        groups: whether groups without a contrast stay in the mean over groups ("all") or leave it ("valid").
        kl: radius, strength and estimator of the constraint.
        rows_per_forward: rows of one forward, for the pass that measures the KL; an update that is a single forward
            needs no such pass.
    """

    coupling: Coupling = "group"

    def __init__(
        self, policy: Policy, *, score: Score = "log_likelihood", tau: float = 10.0, groups: Literal["all", "valid"] = "all",
        kl: ConstraintOptions | None = None, temperature: float = 1.0, on_policy: bool = False, rows_per_forward: int = 0,
        world_size: int = 1,
    ) -> None:
        if not tau > 0:
            raise ValueError(f"tau is {tau}; it must be positive (inf weighs all wrong samples equally)")
        self.policy, self.score, self.tau, self.groups, self.kl = policy, score, tau, groups, kl or ConstraintOptions()
        self.temperature, self.on_policy, self.rows_per_forward = temperature, on_policy, rows_per_forward
        self.world_size = world_size

    # -- the update as a whole -----------------------------------------------------------------------------------------

    def counts(self, update: UpdateBatch) -> dict[str, float]:
        """Groups, and actions of the update."""
        rows = update.parts[self.part]
        mask, group = self._mask(rows), _dense(rows["group"])
        if self.groups == "valid":
            sign = self._signs(rows, mask)
            right, wrong = (set(group[sign == value].tolist()) for value in (1, -1))
            total = float(len(right & wrong))
        else:
            total = float(int(group.max()) + 1) if len(rows) else 0.0
        return {"policy": total} | ({} if self.on_policy else {"kl": float(mask.sum())})

    def prepare(self, update: UpdateBatch, state: TrainState) -> dict[str, Any]:
        """The KL of the whole update over all processes: one pass without gradient, unless the update is one forward."""
        rows = update.parts[self.part]
        whole = self.world_size == 1 and (not self.rows_per_forward or len(rows) <= self.rows_per_forward)
        if self.on_policy or whole:
            return {}
        total = torch.zeros(2, dtype=torch.float64)
        for start in range(0, len(rows), self.rows_per_forward or len(rows)):
            part = rows.take(range(start, min(len(rows), start + (self.rows_per_forward or len(rows)))))
            with torch.no_grad():
                logp = self.policy.log_probs(part, temperature=self.temperature).logp
            kept = self._divergence(part, logp)[self._mask(part).to(logp.device)].double()
            total += torch.stack([kept.sum().cpu(), torch.tensor(float(kept.numel()), dtype=torch.float64)])
        if self.world_size > 1:
            total = sum_over_ranks(total.to(next(self.policy.module.parameters()).device)).cpu()
        return {"kl": float(total[0] / total[1].clamp(min=1))}

    # -- one forward ---------------------------------------------------------------------------------------------------

    def loss(self, micro: UpdateBatch, shared: dict[str, Any], state: TrainState) -> tuple[list[Term], Metrics]:
        """Terms of one micro-batch of whole groups."""
        rows = micro.parts[self.part]
        logp = self.policy.log_probs(rows, temperature=self.temperature).logp
        mask = self._mask(rows).to(logp.device)
        sign = self._signs(rows, mask.cpu()).to(logp.device)
        old = rows["old_logp"][:, : logp.shape[1]].to(logp.device)
        judged = sign != 0
        score = self._scores(logp[judged], None if self.on_policy else old[judged], mask[judged])
        group, positive = _dense(rows["group"]).to(logp.device)[judged], sign[judged] > 0
        values = disco(score, positive, group, tau=self.tau)
        valid = torch.ones_like(values, dtype=torch.bool)
        if self.groups == "valid":
            valid = _contrasted(positive, group, len(values))
        terms = [Term("policy", values, valid, "seq_mean_token_mean")]
        gap = (logp.detach() - old) * mask
        metrics: Metrics = {
            "score/right": Mean.of(score, positive), "score/wrong": Mean.of(score, ~positive),
            "logp": Mean.of(logp, mask), "rollout_gap/mean": Mean.of(gap.abs(), mask),
        }
        if self.on_policy:
            metrics["rollout_gap/max"] = Maximum(float(gap.abs().max()) if gap.numel() else 0.0)
            return terms, metrics
        divergence = self._divergence(rows, logp)
        kept = divergence.detach()[mask]
        kl = shared["kl"] if "kl" in shared else float(kept.double().mean()) if kept.numel() else 0.0
        gate = self._gate(kl)
        terms.append(Term("kl", divergence, mask, "token_mean", gate))
        return terms, metrics | {"kl_old": Mean.of(divergence, mask), "kl/gate": Maximum(gate)}

    def _gate(self, kl: float) -> float:
        """Derivative of the penalty at the KL of the update: what the KL term is weighed with."""
        value = torch.tensor(kl, dtype=torch.float64, requires_grad=True)
        penalty = hinge_penalty(value, radius=self.kl.radius, coef=self.kl.penalty, form=self.kl.form)
        return float(torch.autograd.grad(penalty, value)[0])

    def _divergence(self, rows: Rows, logp: Tensor) -> Tensor:
        """``[B, A]`` estimates of ``KL(old || policy)`` on samples of the old policy."""
        return kl_estimate(rows["old_logp"][:, : logp.shape[1]].to(logp.device), logp, kind=self.kl.estimator)

    def _scores(self, logp: Tensor, old: Tensor | None, mask: Tensor) -> Tensor:
        if self.score == "log_likelihood":
            return sequence_log_prob(logp, mask, reduce="mean")[0]
        return sequence_log_prob(policy_ratio(logp, old, mask), mask, reduce="mean")[0]

    def _mask(self, rows: Rows) -> Tensor:
        mask = self.policy.action_mask(rows)
        if len(rows) and not bool(mask.any(1).all()):
            index = int((~mask.any(1)).nonzero()[0])
            raise DataError(f"sampling: row {index} of the update has no action at all, so it has no score; a completion holds "
                            "at least its end token")
        if "action_mask" in rows:  # rows whose completion was cut off may be left out
            mask = mask & rows["action_mask"][:, : mask.shape[1]].to(mask.device)
        return mask

    def _signs(self, rows: Rows, mask: Tensor) -> Tensor:
        """``[B]``: 1 right, -1 wrong, 0 not judged or nothing left to score."""
        sign = torch.as_tensor(rows["advantages"], dtype=torch.float32)
        return torch.where(mask.any(1), sign, torch.zeros_like(sign))


def _dense(group: Any) -> Tensor:
    """Group ids counted from 0."""
    dense: Tensor = torch.as_tensor(group).unique(return_inverse=True)[1]
    return dense


def _contrasted(positive: Tensor, group: Tensor, count: int) -> Tensor:
    """``[Q]``: groups with a right and a wrong member."""
    found = torch.zeros(2, count, dtype=torch.long, device=group.device)
    found[0].index_add_(0, group, positive.long())
    found[1].index_add_(0, group, (~positive).long())
    return (found > 0).all(0)
