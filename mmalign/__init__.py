"""mmalign: the same preference losses, policy gradients, rewards and loop for every kind of generative model.

Sub-packages load on first use, so ``import mmalign`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "run": "mmalign.api", "load_policy": "mmalign.policies.loading", "ModelOptions": "mmalign.policies.loading",
    "reward": "mmalign.rewards.base", "method": "mmalign.methods.registry",
    "preference_loss": "mmalign.core.preference", "policy_loss": "mmalign.core.policy_gradient",
    "supervised_loss": "mmalign.core.supervised", "advantage": "mmalign.core.advantages",
    "Rollout": "mmalign.policies.base", "Rows": "mmalign.data.rows",
}

if TYPE_CHECKING:
    from mmalign.api import run
    from mmalign.core.advantages import advantage
    from mmalign.core.policy_gradient import policy_loss
    from mmalign.core.preference import preference_loss
    from mmalign.core.supervised import supervised_loss
    from mmalign.data.rows import Rows
    from mmalign.methods.registry import method
    from mmalign.policies.base import Rollout
    from mmalign.policies.loading import ModelOptions, load_policy
    from mmalign.rewards.base import reward

__all__ = [
    "ModelOptions", "Rollout", "Rows", "__version__", "advantage", "load_policy", "method", "policy_loss",
    "preference_loss", "reward", "run", "supervised_loss",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'mmalign' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
