"""Pure functions on tensors: log-probs, losses, advantages, divergences and denoising maths. No model, no I/O, no config.

The names below load with their module on first use. Module names win over function names: the reduction is
``mmalign.core.reduce.reduce``.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "advantages": (
        "ADVANTAGES", "PromptStatistics", "RunningMean", "advantage", "combine_rewards", "discounted_cumsum", "flat_groups",
        "gae", "group_advantages", "group_filter", "overlong_penalty", "shape_rewards", "whiten",
    ),
    "constraints": ("adaptive_coefficient", "hinge_penalty"),
    "denoising": (
        "DDIMStep", "FlowStep", "NoiseSchedule", "ddim_transition", "denoising_error", "denoising_logratio",
        "flow_noise_scale", "flow_sde_transition", "gaussian_log_prob", "guided_prediction",
    ),
    "divergence": ("f_divergence_score", "gaussian_kl", "kl_estimate"),
    "logprobs": (
        "ActionScores", "dense_log_probs", "importance_weights", "masked_log_mean_exp", "paired_head_length",
        "sequence_log_prob", "token_log_probs",
    ),
    "output_head": ("OutputHead", "score_positions"),
    "policy_gradient": ("POLICY_LOSSES", "clip_bounds", "clipped_value_loss", "disco", "policy_loss", "policy_ratio"),
    "preference": (
        "POINTWISE_LOSSES", "PREFERENCE_LOSSES", "PreferenceLoss", "clipped_logratio", "pointwise_loss", "preference_loss",
        "wpo_weights",
    ),
    "reduce": ("REDUCTIONS", "count"),
    "registry": ("Registry",),
    "seeding": ("derive_seed", "generator"),
    "selection": ("best_of_group", "best_worst_pair", "kept_count", "majority_vote", "top_k_indices"),
    "supervised": ("SUPERVISED_LOSSES", "length_normalised", "mle_aug", "mml", "neftune_noise", "supervised_loss"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
