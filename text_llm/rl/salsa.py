"""SALSA: reinforcement learning whose anchor is the weight average of several fine-tuned models."""

from __future__ import annotations

import math
from typing import Any, Literal

from mmalign.config import Options
from mmalign.data.loading import DataOptions
from mmalign.methods.registry import Pipeline, as_given, method, model_of_stage
from mmalign.policies.loading import ModelOptions
from mmalign.rewards.base import RewardOptions

SET_BY_PIPELINE = {"sft": ("model", "data"), "ppo": ("model", "data", "rewards", "reference")}


class SALSAOptions(Options):
    """Options of SALSA: the pipeline's own, and those of its stages."""

    model: ModelOptions
    """The base model; every SFT run starts from it, for only models from one start can be averaged."""
    sft_data: DataOptions
    """Rows of the SFT runs."""
    data: DataOptions
    """Rows with the ``prompt`` column of the PPO run."""
    rewards: list[RewardOptions]
    """What PPO is rewarded for: rules, functions, or a reward model."""
    sft: dict[str, Any] = {}
    """Options of all SFT runs (method sft): losses, tuning, batch, steps or epochs, optimizers, encoding, ..."""
    sft_runs: list[dict[str, Any]] = [{}, {}]
    """One entry per SFT run with the options that it has instead. The runs are called sft1, sft2, ... and differ in their
    seed, hence in the order of the rows, even where their entries are empty."""
    split_data: bool = False
    """Give each SFT run its own part of the rows instead of all of them in another order."""
    weights: list[float] | None = None
    """Share of each SFT model in the soup, none negative, summing to 1; null is equal shares. [1, 0] is plain PPO."""
    init: str = "sft1"
    """Where the policy starts: sft1, sft2, ..., or soup."""
    anchor: Literal["soup", "init"] = "soup"
    """The reference of the divergence: the soup, or (the baseline: plain PPO) the model that the policy starts from."""
    ppo: dict[str, Any] = {}
    """Options of the PPO run (method ppo): kl, value, batch, sampling, optimizers, steps or epochs, evaluation, ..."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse what no stage could use."""
        runs = len(self.sft_runs)
        if runs < 2:
            raise ValueError(f"sft_runs has {runs} entries; a soup needs at least two models")
        for node, entry in [("sft", self.sft), ("ppo", self.ppo), *((f"sft_runs[{i}]", r) for i, r in enumerate(self.sft_runs))]:
            taken = [name for name in SET_BY_PIPELINE[node.partition("_")[0]] if name in entry]
            if taken:
                raise ValueError(f"{node}.{taken[0]}: is set by the pipeline; leave it out")
        if self.weights is not None:
            if len(self.weights) != runs:
                raise ValueError(f"weights has {len(self.weights)} numbers for {runs} SFT runs; one each is needed")
            if not all(math.isfinite(w) and w >= 0 for w in self.weights) or abs(sum(self.weights) - 1) > 1e-6:
                raise ValueError(f"weights must not be negative and must sum to 1, not {self.weights}")
        names = ["soup", *(f"sft{number}" for number in range(1, runs + 1))]
        if self.init not in names:
            raise ValueError(f"init must be one of {', '.join(names)}, not {self.init!r}")
        kl = self.ppo.get("kl")
        if isinstance(kl, dict) and kl.get("coef") == 0:
            raise ValueError("ppo.kl.coef: 0 leaves the anchor, which is all that SALSA changes, without an effect; use method "
                             "ppo")


@method("salsa", options=SALSAOptions, modality="text", kind="pipeline", paper="Chegini et al., 2024, arXiv 2411.01798")
def salsa(options: SALSAOptions) -> Pipeline:
    """Fine-tune a base model twice, average the two, and run PPO from one of them with the average as its reference."""
    model, runs = as_given(options.model), len(options.sft_runs)
    stages: list[dict[str, Any]] = []
    for number, own in enumerate(options.sft_runs, start=1):
        rows = as_given(options.sft_data) | ({"part": f"{number}/{runs}"} if options.split_data else {})
        stages.append({"name": f"sft{number}", "method": "sft", "model": model, "data": rows, **options.sft, **own})
    checkpoints = [f"${{stages.sft{number}.model}}" for number in range(1, runs + 1)]
    shares = options.weights or [1 / runs] * runs
    if options.init == "soup":
        stages.append({"name": "soup", "kind": "merge", "models": checkpoints,
                       "merge": {"name": "linear", "weights": shares, "normalize": False}})
    reference: dict[str, Any] = {"kind": "auto"}
    if options.anchor == "soup":
        reference = {"kind": "soup", "checkpoints": checkpoints, "weights": shares}
    stages.append({
        "name": "ppo", "method": "ppo", "model": model_of_stage(model, options.init),
        "data": as_given(options.data), "rewards": [as_given(reward) for reward in options.rewards], "reference": reference,
        **options.ppo,
    })
    return Pipeline(stages, {"model": "ppo.model", "folder": "ppo.folder", "metrics": "ppo.metrics"})
