"""RSO: preference pairs from (an estimate of) the optimal policy, made out of SFT samples and a reward."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import AliasChoices, Field

from mmalign.config import Options
from mmalign.data.loading import DataOptions
from mmalign.methods.registry import Pipeline, method, model_of_stage
from mmalign.policies.loading import ModelOptions
from mmalign.rewards.base import RewardOptions

RANKERS = ("ranking_model", "reward_model")


class RSOSelection(Options):
    """How candidates become pairs."""

    n: int = 8
    """Candidates accepted of every prompt."""
    beta: float = 0.5
    """Temperature of the target policy ``sft(y) exp(r / beta)``; 0 accepts the n best, .inf the first n."""
    pairing: Literal["first_round", "tournament"] = "first_round"
    """Accepted samples are paired once (n/2 pairs), or winners go on (n - 1 pairs)."""
    deduplicate: bool = False
    """Equal texts count as one candidate, as in the paper's printed algorithm."""


class RSOOptions(Options):
    """Options of RSO: where pairs come from, what is learned from them, and the options of the stages."""

    model: ModelOptions
    """The SFT policy (or, with ``sft``, what it is trained from): it is sampled from, trained, and the reference."""
    data: DataOptions | None = None
    """Prompts to sample for; a column ``gold`` is kept for ``slic_reg``."""
    preferences: DataOptions | None = None
    """Human pairs: what the ranker learns from, and all there is for ``source: direct``."""
    source: Literal["rso_sample_rank", "sft_sample_rank", "direct"] = "rso_sample_rank"
    """Pairs of samples accepted by rejection, of plain SFT samples, or the human pairs themselves."""
    loss: Literal["sigmoid", "hinge", "slic"] = "sigmoid"
    """sigmoid (DPO, the paper's sigmoid-norm), hinge (hinge-norm), slic (hinge without a reference)."""
    gamma: float = Field(default=0.05, validation_alias=AliasChoices("gamma", "loss_beta"))
    """Inverse temperature of the loss (``loss.beta`` elsewhere); it need not be that of the selection."""
    slic_reg: float = 0.0
    """Weight of the likelihood of the column ``gold`` beside slic; the paper finds no use for it."""
    selection: RSOSelection = RSOSelection()
    """Rejection sampling and pairing."""
    completions_per_prompt: int = 64
    """Candidates sampled of every prompt."""
    sampling: dict[str, Any] = {"temperature": 0.7, "top_k": 40}
    """How candidates (and the baseline answer) are drawn."""
    prompts_per_chunk: int | None = None
    """Prompts sampled and written together."""
    rewards: list[RewardOptions] = []
    """Rewards that score the candidates (rules, models trained before); empty trains ``ranker`` first."""
    ranker: dict[str, Any] | None = None
    """Options of the training stage of the ranker: ``method`` is ranking_model (as published; the default) or reward_model;
    ``data`` defaults to ``preferences``, ``model`` to that of the policy."""
    sft: dict[str, Any] | None = None
    """Options of a supervised stage before everything (``data``, ``steps``, ...); null takes ``model`` as it is."""
    train: dict[str, Any] = {}
    """Options of the last stage (method dpo): tuning, batch, steps or epochs, optimizers, encoding, ..."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse what no stage could use."""
        if self.gamma <= 0:
            raise ValueError(f"gamma must be positive, not {self.gamma}")
        if self.slic_reg < 0 or (self.slic_reg and self.loss != "slic"):
            raise ValueError(f"slic_reg is {self.slic_reg} with loss {self.loss}; it must not be negative and belongs to slic")
        taken = next((name for name in ("model", "data", "losses") if name in self.train), None)
        if taken:
            raise ValueError(f"train.{taken}: is set by the pipeline from model, source, loss and gamma; leave it out")
        if self.source == "direct":
            if self.preferences is None:
                raise ValueError("preferences: source direct trains on human pairs, so it needs them")
            return
        self._check_sampling()

    def _check_sampling(self) -> None:
        if self.data is None:
            raise ValueError(f"data: source {self.source} samples for prompts, so it needs them")
        if self.ranker is not None and self.ranker.get("method", RANKERS[0]) not in RANKERS:
            raise ValueError(f"ranker.method: {self.ranker['method']!r} is no ranker; allowed: {', '.join(RANKERS)}")
        if bool(self.rewards) == (self.ranker is not None):
            raise ValueError("rewards and ranker: give exactly one; rewards score the candidates as they are, ranker trains a "
                             "model first")
        if self.ranker is not None and self.preferences is None and "data" not in self.ranker:
            raise ValueError("preferences: the ranker is trained on human pairs; give them here or as ranker.data")
        if self.selection.beta < 0 or math.isnan(self.selection.beta):
            raise ValueError(f"selection.beta must be 0, positive or .inf, not {self.selection.beta}")
        if not 2 <= self.selection.n <= self.completions_per_prompt:
            raise ValueError(f"selection.n is {self.selection.n}; it must lie between 2 and completions_per_prompt "
                             f"({self.completions_per_prompt})")


def rso_stages(options: RSOOptions) -> list[dict[str, Any]]:
    """The stages, in order."""
    model = options.model.model_dump(exclude_unset=True)
    stages: list[dict[str, Any]] = []
    if options.sft is not None:
        stages.append({"name": "sft", "method": "sft", "model": model, **options.sft})
        model = model_of_stage(model, "sft")
    losses: list[dict[str, Any]] = [{"name": options.loss, "beta": options.gamma}]
    if options.slic_reg:
        losses.append({"name": "nll", "on": "gold", "weight": options.slic_reg})
    if options.source == "direct":
        assert options.preferences is not None
        pairs = options.preferences.model_dump(exclude_unset=True)
    else:
        stages += _sampled_pairs(options, model)
        pairs = {"path": "${stages.pairs.data}"}
    stages.append({"name": "train", "method": "dpo", **options.train, "model": model, "data": pairs, "losses": losses})
    return stages


def _sampled_pairs(options: RSOOptions, model: dict[str, Any]) -> list[dict[str, Any]]:
    """Ranker, samples, scores and pairs."""
    assert options.data is not None
    stages: list[dict[str, Any]] = []
    prompts = options.data.model_dump(exclude_unset=True)
    sampled = {"kind": "generate", "model": model, "sampling": options.sampling, "prompts_per_chunk": options.prompts_per_chunk}
    rewards = [reward.model_dump(exclude_unset=True) for reward in options.rewards]
    label: dict[str, Any] = {}
    if options.ranker is not None:
        kind = options.ranker.get("method", RANKERS[0])
        given = options.preferences.model_dump(exclude_unset=True) if options.preferences is not None else {}
        start = options.model.model_dump(exclude_unset=True)
        stages.append({"name": "ranker", "model": start, "data": given, **options.ranker, "method": kind})
        if kind == "reward_model":
            rewards = [{"name": "reward_model", "path": "${stages.ranker.model}"}]
        else:
            # The baseline answer is a sample of its own, so it is never among the candidates (its reward is 0 by definition).
            stages.append({"name": "baseline", **sampled, "data": prompts, "completions_per_prompt": 1})
            prompts = {"path": "${stages.baseline.data}",
                       "columns": {"completion": "baseline", "group": None, "finish_reason": None}}
            rewards = [{"name": "pairwise_ranker", "path": "${stages.ranker.model}"}]
            label = {"ranker": {"path": "${stages.ranker.model}"}}
    selection = options.selection.model_dump()
    if options.source == "sft_sample_rank":
        selection["beta"] = math.inf
    return [
        *stages,
        {"name": "samples", **sampled, "data": prompts, "completions_per_prompt": options.completions_per_prompt},
        {"name": "scores", "kind": "score", "data": {"path": "${stages.samples.data}"}, "rewards": rewards},
        {"name": "pairs", "kind": "select", "mode": "statistical_rejection", "data": {"path": "${stages.scores.data}"},
         **selection, **label},
    ]


@method("rso", options=RSOOptions, modality="text", kind="pipeline", paper="Liu et al., 2023, arXiv 2309.06657")
def rso(options: RSOOptions) -> Pipeline:
    """Statistical rejection sampling: pairs as the optimal policy would write them, out of SFT samples and a ranker."""
    return Pipeline(rso_stages(options), {"model": "train.model", "folder": "train.folder", "metrics": "train.metrics"})
