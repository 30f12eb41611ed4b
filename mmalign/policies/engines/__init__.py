"""Rollout engines: the in-process one (``hf``), and the table to which others are added."""

from __future__ import annotations

from mmalign.policies.engines.base import ENGINES, EngineHost, RolloutEngine, RolloutResult
from mmalign.policies.engines.hf import HFEngine

__all__ = ["ENGINES", "EngineHost", "HFEngine", "RolloutEngine", "RolloutResult"]
