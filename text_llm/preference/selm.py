"""Online preference optimisation in iterations of sample, rank, train; SELM adds a push away from what is already known."""

from __future__ import annotations

from typing import Any, Literal

from mmalign.config import Options
from mmalign.data.loading import DataOptions
from mmalign.methods.preference import COMPOSITE_LOSSES
from mmalign.methods.registry import Pipeline, as_given, method, model_of_stage
from mmalign.policies.loading import ModelOptions
from mmalign.rewards.base import RewardOptions

TRAINED_BY_PIPELINE = ("model", "data", "losses")


class IterativeDPOOptions(Options):
    """Options of iterative DPO: the pipeline's own, and those of its stages."""

    model: ModelOptions
    """The policy of the first iteration, and its reference."""
    data: DataOptions
    """Rows with ``prompt``, ``chosen`` and ``rejected``; iteration t of T works on the t-th of T equal parts."""
    rewards: list[RewardOptions]
    """The oracle: rewards (rules, reward models, pairwise rankers) whose weighted sum orders a row's own pair and the
    policy's fresh sample."""
    iterations: int = 3
    """Rounds of sample, rank, train; the trained policy is the reference of the next round."""
    first_offline: bool = False
    """One more round before the others: plain DPO on its own part, without samples (for a model that was only SFT-ed)."""
    beta: float = 0.01
    """Inverse temperature of the log-ratios."""
    base_loss: str = "sigmoid"
    """Pair loss of every round."""
    sampling: dict[str, Any] = {"temperature": 0.0}
    """How the policy's sample is drawn: greedy, as published."""
    prompts_per_chunk: int | None = None
    """Prompts sampled and written together."""
    min_margin: float = 0.0
    """Rows whose best and worst candidates score closer than this are left out."""
    train: dict[str, Any] = {}
    """Options of the training stages (method dpo): tuning, batch, steps or epochs, optimizers, encoding, ..."""
    last_train: dict[str, Any] = {}
    """Options that the last round has instead, such as a lower learning rate."""
    evaluation: dict[str, Any] | None = None
    """Options of an evaluate stage (data, sampling, completions_per_prompt, rewards) run on the first and the last model
    and compared; ``rewards`` left out are the oracle's. null does not evaluate."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse what no stage could use."""
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, not {self.iterations}")
        for node in ("train", "last_train"):
            taken = [name for name in TRAINED_BY_PIPELINE if name in getattr(self, node)]
            if taken:
                raise ValueError(f"{node}.{taken[0]}: is set by the pipeline from model, data, beta and base_loss; leave it out")

    def losses(self) -> list[dict[str, Any]]:
        """The ``losses:`` of every round."""
        return [{"name": self.base_loss, "beta": self.beta}]


class SELMOptions(IterativeDPOOptions):
    """Options of SELM."""

    alpha: float = 1e-3
    """Strength of the exploration term ``alpha beta (log-ratio of the policy's own sample)``; 0 is iterative DPO."""
    scaling: Literal["alpha_beta", "alpha"] = "alpha_beta"
    """Factor of the term: alpha times beta (the paper's equation 4.2 and its code), or alpha (its algorithm 1)."""
    floor: float | None = None
    """No push on a sample whose log-ratio has fallen below minus this; null is the published, unbounded term."""
    strict: bool = False
    """Allow the sigmoid loss only, as the official code does."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse values without a meaning."""
        super().model_post_init(context)
        if self.alpha < 0:
            raise ValueError(f"alpha must not be negative, not {self.alpha}: the term pushes away from what is known")
        if self.strict and self.base_loss != "sigmoid":
            raise ValueError(f"base_loss: strict allows sigmoid only, not {self.base_loss}")

    def losses(self) -> list[dict[str, Any]]:
        """Pair loss and exploration term; without the latter at alpha 0, so that nothing of it is computed."""
        return COMPOSITE_LOSSES.get("selm")(beta=self.beta, alpha=self.alpha, scaling=self.scaling, base=self.base_loss,
                                            floor=self.floor)


def iterations(options: IterativeDPOOptions) -> Pipeline:
    """The stages of sample, rank, train, as often as asked for."""
    model, data = as_given(options.model), as_given(options.data)
    rewards = [as_given(reward) for reward in options.rewards]
    rounds = options.iterations + options.first_offline
    stages: list[dict[str, Any]] = []
    if options.evaluation is not None:
        stages.append({"name": "before", "kind": "evaluate", "model": model, "rewards": rewards, **options.evaluation})
    for number in range(1, rounds + 1):
        part = {**data, "part": f"{number}/{rounds}"}
        offline = options.first_offline and number == 1
        settings = options.train | (options.last_train if number == rounds else {})
        if offline:
            stages.append({"name": f"train_{number}", "method": "dpo", "model": model, "data": part,
                           "losses": [{"name": options.base_loss, "beta": options.beta}], **settings})
        else:
            stages += [
                {"name": f"sample_{number}", "kind": "generate", "model": model, "data": part, "sampling": options.sampling,
                 "prompts_per_chunk": options.prompts_per_chunk},
                {"name": f"rank_{number}", "kind": "rank", "data": {"path": f"${{stages.sample_{number}.data}}"},
                 "rewards": rewards, "min_margin": options.min_margin},
                {"name": f"train_{number}", "method": "dpo", "model": model,
                 "data": {"path": f"${{stages.rank_{number}.data}}"}, "losses": options.losses(), **settings},
            ]
        model = model_of_stage(model, f"train_{number}")
    if options.evaluation is not None:
        stages.append({"name": "after", "kind": "evaluate", "model": model, "rewards": rewards, **options.evaluation,
                       "compare_with": "${stages.before.folder}"})
    last = f"train_{rounds}"
    return Pipeline(stages, {"model": f"{last}.model", "folder": f"{last}.folder", "metrics": f"{last}.metrics"})


@method("selm", options=SELMOptions, modality="text", kind="pipeline", paper="Zhang et al., 2024, arXiv 2405.19332")
def selm(options: SELMOptions) -> Pipeline:
    """Self-exploring language models: online DPO that pushes the policy away from its own current answers."""
    return iterations(options)


@method("iterative_dpo", options=IterativeDPOOptions, modality="text", kind="pipeline", paper="Xu et al., 2023, arXiv 2312.16682")
def iterative_dpo(options: IterativeDPOOptions) -> Pipeline:
    """Online DPO in rounds: sample, rank against the data's own pair, train, and go on from there."""
    return iterations(options)
