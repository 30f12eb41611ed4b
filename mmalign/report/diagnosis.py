"""What the logged numbers of a run say, in words: the readings that look broken but are not, and those that are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Curves:
    """Columns of a ``metrics.jsonl``."""

    records: Sequence[Record]

    def values(self, key: str) -> list[float]:
        """Finite values of ``key`` in order."""
        found = [record.get(key) for record in self.records]
        return [float(v) for v in found if isinstance(v, (int, float)) and math.isfinite(v)]

    def late(self, key: str) -> float:
        """Mean over the last quarter of the values (at least one); NaN when there are none."""
        values = self.values(key)
        tail = values[-max(1, len(values) // 4) :]
        return sum(tail) / len(tail) if tail else math.nan

    def early(self, key: str) -> float:
        """Mean over the first quarter of the values; NaN when there are none."""
        values = self.values(key)
        head = values[: max(1, len(values) // 4)]
        return sum(head) / len(head) if head else math.nan


@dataclass(frozen=True)
class Remark:
    """A sentence about a run."""

    text: str
    serious: bool
    """Whether something is wrong, rather than unusual to look at."""


def diagnose(records: Sequence[Record]) -> list[Remark]:
    """Remarks for people, serious ones first; [] when nothing stands out (or fewer than four updates are logged)."""
    if len(records) < 4:
        return []
    curves = Curves(records)
    return [Remark(text, rule in FAULTS) for rule in (*FAULTS, *EXPLANATIONS) if (text := rule(curves))]


def _no_gradient(c: Curves) -> str:
    norms = c.values("grad_norm")
    if norms and max(norms) == 0:
        return ("The gradient norm is 0 in every update: nothing was learned. Check that the tuning mode trains something and, "
                "for rollouts, that the samples of a prompt get different rewards.")
    return ""


def _stuck_at_log_two(c: Curves) -> str:
    losses = c.values("loss/sigmoid")
    tail = losses[-max(4, len(losses) // 4) :]
    if len(losses) >= 8 and all(abs(loss - math.log(2)) < 1e-4 for loss in tail):
        return ("The preference loss is still 0.6931 = log 2: the policy equals its reference. Check the learning rate, beta, "
                "and that an adapter or the weights are trainable.")
    return ""


def _replay_gap(c: Curves) -> str:
    gaps = c.values("rollout_gap/max")
    if gaps and max(gaps) > 0.05:
        return (f"Scoring a rollout again gave log-probs up to {max(gaps):.2g} away from those it was sampled with. In float32 "
                "the gap is below 1e-4; a larger one means that sampling and training see different models, masks, "
                "temperatures or precisions.")
    return ""


def _flat_groups(c: Curves) -> str:
    share = c.late("groups/zero_spread")
    if share > 0.5:
        return (f"In the last updates {100 * share:.0f}% of the groups had equal rewards for all samples, so they had no "
                "gradient. Use harder or easier prompts, more completions_per_prompt, or a reward with more levels.")
    return ""


def _cut_off(c: Curves) -> str:
    share = c.late("completions/cut_off")
    if share > 0.3:
        return (f"{100 * share:.0f}% of the completions hit sampling.max_new_tokens and were cut off; raise it, or set "
                "mask_truncated.")
    return ""


def _not_applicable(c: Curves) -> str:
    names = sorted({k for record in c.records for k in record if k.startswith("rewards/") and k.endswith("/none_fraction")})
    for name in names:
        share = c.late(name)
        if share > 0.5:
            return (f"The reward {name.split('/')[1]!r} did not apply to {100 * share:.0f}% of the samples of the last updates.")
    return ""


def _clipped_gradients(c: Curves) -> str:
    norms = c.values("grad_norm")
    if len(norms) >= 8:
        ordered = sorted(norms)
        typical, largest = ordered[len(ordered) // 2], ordered[-1]
        if typical > 0 and largest > 100 * typical:
            return (f"One update had a gradient norm of {largest:.3g}, {largest / typical:.0f} times the median. It was clipped "
                    "if max_grad_norm is set; look at the rows of that update.")
    return ""


def _loss_spike(c: Curves) -> str:
    losses = c.values("nll")
    window = 10
    for at in range(window, len(losses)):
        before = sorted(losses[at - window : at])
        typical = before[window // 2]
        spread = sorted(abs(value - typical) for value in before)[window // 2]
        if losses[at] > typical + max(0.5, 10 * spread):
            return (f"The loss jumped to {losses[at]:.3g} after {at} updates, from about {typical:.3g}. When it does not come "
                    "back, resume from a checkpoint before it with a smaller learning rate or in bfloat16 rather than float16; "
                    "look at the rows of that update.")
    return ""


def _zero_policy_loss(c: Curves) -> str:
    losses = c.values("loss/policy")
    if losses and c.values("rollout_gap/max") and max(abs(v) for v in losses) < 1e-3 and max(c.values("grad_norm") or [0]) > 0:
        return ("The policy loss is close to 0 throughout. With one update per rollout this is expected: the ratio is exactly 1 "
                "and the advantages of a group add up to 0. The gradient is not 0; read the reward and the gradient norm.")
    return ""


def _chosen_falls(c: Curves) -> str:
    chosen, rejected = c.values("rewards/chosen"), c.values("rewards/rejected")
    if chosen and rejected and c.late("rewards/chosen") < c.early("rewards/chosen") - 0.05 \
            and c.late("rewards/margin") > c.early("rewards/margin"):
        return ("The implicit reward of the chosen samples fell while the margin grew: the rejected ones fell further. This is "
                "common for preference losses on log-ratios; a term {name: nll, on: chosen} or a smaller learning rate "
                "holds the chosen samples up.")
    return ""


Rule = Callable[[Curves], str]
"""Reads the curves and returns a sentence, or "" when it has nothing to say."""

FAULTS: tuple[Rule, ...] = (
    _no_gradient, _stuck_at_log_two, _replay_gap, _flat_groups, _cut_off, _not_applicable, _clipped_gradients, _loss_spike,
)
EXPLANATIONS: tuple[Rule, ...] = (_zero_policy_loss, _chosen_falls)
