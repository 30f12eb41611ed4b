"""What stages that sample from a model have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmalign.config import Options, parse
from mmalign.data.loading import DataOptions
from mmalign.policies.base import DiffusionSampling, Policy, TextSampling
from mmalign.policies.loading import ModelOptions

SAMPLING: dict[str, type[Options]] = {"text": TextSampling, "diffusion": DiffusionSampling}


class SampledOptions(Options):
    """Keys of stages that sample from a model."""

    model: ModelOptions
    """The model to sample from."""
    data: DataOptions
    """Prompts, with any further columns that rewards need."""
    sampling: dict[str, Any] = {}
    """Sampling options of the model's modality (TextSampling or DiffusionSampling in the configuration reference)."""
    completions_per_prompt: int = 1
    """Samples of every prompt."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse sampling keys that no modality has before any model is loaded."""
        if self.completions_per_prompt < 1:
            raise ValueError(f"completions_per_prompt must be at least 1, not {self.completions_per_prompt}")
        known = {name for cls in SAMPLING.values() for name in cls.model_fields}
        unknown = [name for name in self.sampling if name not in known]
        if unknown:
            parse(TextSampling if len(unknown) < len(self.sampling) else DiffusionSampling, self.sampling, root="sampling")


def sampling_for(policy: Policy, tree: Mapping[str, Any], *, key: str = "sampling") -> Any:
    """The sampling options of the policy's modality from a configuration node."""
    return parse(SAMPLING[policy.modality], tree, root=key)
