"""Reward functions: the protocol, composition, and the built-in rewards.

Names are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmalign.rewards.adapters import cache, from_image_reward
    from mmalign.rewards.base import BoundReward, RewardSet, build_rewards
    from mmalign.rewards.inputs import RewardInputs, TrainerState
    from mmalign.rewards.probe import RewardCheck, check_reward
    from mmalign.rewards.registry import REWARDS, Reward, RewardOptions, Traits, reward, traits

_HOMES = {
    "cache": "adapters", "from_image_reward": "adapters", "BoundReward": "base", "RewardSet": "base", "build_rewards": "base",
    "RewardInputs": "inputs", "TrainerState": "inputs", "RewardCheck": "probe", "check_reward": "probe",
    "REWARDS": "registry", "Reward": "registry", "RewardOptions": "registry", "Traits": "registry",
    "reward": "registry", "traits": "registry",
}

__all__ = [
    "REWARDS", "BoundReward", "Reward", "RewardCheck", "RewardInputs", "RewardOptions", "RewardSet", "TrainerState",
    "Traits", "build_rewards", "cache", "check_reward", "from_image_reward", "reward", "traits",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
