"""RedOne 2.0: reinforcement on a whole domain, fine-tuning on what it is still weak at, reinforcement again."""

from __future__ import annotations

import math
from typing import Any, Literal

from mmalign.config import Options
from mmalign.data.loading import DataOptions
from mmalign.errors import ConfigError
from mmalign.methods.continual import RolloutFilterNode
from mmalign.methods.registry import Pipeline, as_given, method, model_of_stage
from mmalign.policies.loading import ModelOptions

Entry = dict[str, Any]
TIME_LIMITS = ("seconds", "timeout")
"""Options of execution rewards that stop a program."""
TAKEN = ("model", "data", "rewards", "method")


class TrainNode(Options):
    """What the three stages have in common."""

    general_share: float = 0.0625
    """Share of general rows among those trained on; 0 trains on domain rows alone."""
    general: DataOptions | None = None
    """General rows of this stage; null takes the pipeline's."""
    rows: int | None = None
    """Domain rows taken; null takes each once."""
    exponent: float
    """Domain tasks of n rows get a part in proportion to n^exponent (0: all alike, 1: as they are)."""
    train: dict[str, Any] = {}
    """Options of the training stage: batch, steps, optimizers, ..."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse values without a meaning."""
        if not 0 <= self.general_share < 1:
            raise ValueError(f"general_share must be in [0, 1), not {self.general_share}")
        if not 0 <= self.exponent < math.inf:
            raise ValueError(f"exponent must be 0 or positive, not {self.exponent}")
        if self.rows is not None and self.rows < 1:
            raise ValueError(f"rows must be at least 1 (or null), not {self.rows}")
        taken = [key for key in TAKEN if key in self.train]
        if taken:
            raise ValueError(f"train.{taken[0]}: is set by the pipeline; leave it out")


class ExplorationOptions(TrainNode):
    """Stage 1: DAPO on all tasks."""

    exponent: float = 0.0
    """Domain tasks of n rows get a part in proportion to n^exponent; 0 balances them."""


class TargetedOptions(TrainNode):
    """Stage 2: fine-tuning on weak tasks."""

    weak_threshold: float | None = None
    """Tasks that score lower after stage 1 are weak; null goes by weak_fraction."""
    weak_fraction: float = 1 / 3
    """Without a threshold: the share of tasks, the worst first, that are weak."""
    exponent: float = 0.5
    """Weak tasks of n rows get a part in proportion to n^exponent: 0.5 weighs rows by 1/sqrt(n), so rare tasks count more."""
    general_labels: Literal["soft", "hard"] = "soft"
    """Targets of general rows. soft: the best of the model's own samples; hard: the ``completion`` of the data."""
    completions_per_prompt: int = 8
    """soft: samples of which the best is taken by reward, ties by the mean log-probability under the model."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse values without a meaning."""
        super().model_post_init(context)
        if self.completions_per_prompt < 1:
            raise ValueError(f"completions_per_prompt must be at least 1, not {self.completions_per_prompt}")


class RefinementOptions(TrainNode):
    """Stage 3: DAPO on a smaller, harder mixture."""

    weak_threshold: float | None = None
    """As in stage 2, by the scores after it."""
    weak_fraction: float = 2 / 3
    """As in stage 2."""
    exponent: float = 0.5
    """As in stage 2."""
    filter: RolloutFilterNode | None = None
    """Keep prompts by the pass rate of the model after stage 2 (mode mixed and max_pass_rate make the mixture harder)."""


class RedOne2Options(Options):
    """Options of RedOne 2.0; a stage that is null is left out."""

    model: ModelOptions
    """The model to adapt."""
    domain: DataOptions
    """Domain rows: ``prompt``, ``answer``, ``completion``, ``task`` and ``reward_type``."""
    general: DataOptions | None = None
    """General rows of the same columns; their ``completion`` is read by ``general_labels: hard`` only."""
    evaluation: DataOptions
    """Held-out domain rows: scores per task, before and after every stage."""
    general_evaluation: DataOptions | None = None
    """Held-out general rows; null does not measure them."""
    rewards: dict[str, Any]
    """``reward_type`` -> reward (a name, ``{name: ..., options}``, or a weighted list), with values from 0 to 1. The type
    ``sandbox`` runs programs and needs a time limit."""
    scale_rewards: bool = False
    """Map the declared range of rewards onto 0 to 1 instead of refusing other ranges."""
    overlong: dict[str, Any] | None = None
    """Options of the reward ``overlong`` (max_length, cache_length, weight) added in stages 1 and 3; filters and evaluations
    never see it. null adds none."""
    sampling: dict[str, Any] = {}
    """Sampling options of rollouts and evaluations."""
    evaluation_sampling: dict[str, Any] = {"temperature": 0.0}
    """Sampling options that evaluations have instead."""
    exploration: ExplorationOptions | None = ExplorationOptions()
    """Stage 1, exploratory learning."""
    targeted: TargetedOptions | None = TargetedOptions()
    """Stage 2, targeted fine-tuning."""
    refinement: RefinementOptions | None = RefinementOptions()
    """Stage 3, refinement learning."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse what no stage could use."""
        stages = [node for node in (self.exploration, self.targeted, self.refinement) if node is not None]
        if not stages:
            raise ValueError("nothing to do: give options for at least one of exploration, targeted and refinement")
        if self.general is None and any(node.general_share and node.general is None for node in stages):
            raise ValueError("general: required while a stage has a general_share above 0; give rows, or set the shares to 0")
        if not self.rewards:
            raise ValueError("rewards: map every reward_type of the rows to a reward, such as {exact: exact_match}")
        sandbox = self.rewards.get("sandbox")
        for item in sandbox if isinstance(sandbox, list) else [sandbox] if sandbox is not None else []:
            limits = [item[key] for key in TIME_LIMITS if key in item] if isinstance(item, dict) else []
            if not limits or not all(isinstance(limit, (int, float)) and 0 < limit < math.inf for limit in limits):
                raise ValueError(f"rewards.sandbox: programs of a model may never end, so a time limit must be given, such as "
                                 f"{{name: execution_match, seconds: 5}}, not {item!r}")


@method("redone2", options=RedOne2Options, modality="text", kind="pipeline", paper="Zhao et al., 2025, arXiv 2511.07070",
        aliases=("redone_2", "redone2.0"))
def redone2(options: RedOne2Options) -> Pipeline:
    """DAPO on a domain of many tasks, fine-tuning on the weak ones with soft general labels, DAPO on a harder mixture."""
    builder = _Builder(options)
    builder.evaluate("start")
    if options.exploration is not None:
        builder.explore(options.exploration)
    if options.targeted is not None:
        builder.target(options.targeted)
    if options.refinement is not None:
        builder.refine(options.refinement)
    last = builder.label
    return Pipeline(builder.stages, {"model": f"{last}.model", "folder": f"{last}.folder", "metrics": f"{last}.metrics"})


class _Builder:
    """Collects the stages; ``label`` is the stage whose model is the current one."""

    def __init__(self, options: RedOne2Options) -> None:
        self.options = options
        self.model = as_given(options.model)
        self.label = "start"
        self.stages: list[Entry] = []

    @property
    def route(self) -> Entry:
        """The reward by type: what counts as right."""
        return {"name": "route", "label": "score", "by": "reward_type", "routes": self.options.rewards,
                "scale": self.options.scale_rewards}

    def evaluate(self, label: str) -> None:
        """Scores per task of the current model, compared with those before any training."""
        self.label = label
        sampling = self.options.sampling | self.options.evaluation_sampling
        for name, data in (("domain", self.options.evaluation), ("general", self.options.general_evaluation)):
            if data is not None:
                compare = {} if label == "start" else {"compare_with": f"${{stages.start-{name}.folder}}"}
                self.stages.append({"name": f"{label}-{name}", "kind": "evaluate", "model": self.model, "data": as_given(data),
                                    "sampling": sampling, "rewards": [self.route], "by": "task", **compare})

    def general(self, node: TrainNode, key: str) -> Entry:
        """The general rows of a stage."""
        data = node.general or self.options.general
        if data is None:
            raise ConfigError(f"{key}.general: required by general_share {node.general_share:g}")
        return as_given(data)

    def mix(self, name: str, node: TrainNode, domain: Entry, general: Entry | None) -> Entry:
        """The rows of one stage: domain tasks balanced, and the general share."""
        sources: list[Entry] = [{"data": domain, "by": "task", "exponent": node.exponent, "rows": node.rows}]
        if general is not None:
            sources.append({"data": general, "share": node.general_share})
        self.stages.append({"name": name, "kind": "mix", "sources": sources})
        return {"path": f"${{stages.{name}.data}}"}

    def weak(self, name: str, node: TargetedOptions | RefinementOptions) -> Entry:
        """The domain rows of the tasks that the current model is worst at."""
        self.stages.append({"name": name, "kind": "weak_tasks", "evaluation": f"${{stages.{self.label}-domain.folder}}",
                            "data": as_given(self.options.domain), "weak_threshold": node.weak_threshold,
                            "weak_fraction": node.weak_fraction})
        return {"path": f"${{stages.{name}.data}}"}

    def reinforce(self, name: str, data: Entry, node: TrainNode) -> None:
        """One stage of DAPO; groups are filtered by correctness, before the length penalty."""
        rewards = [self.route]
        if self.options.overlong is not None:
            rewards.append({"name": "overlong", **self.options.overlong})
        filtering = {"filter_on": "score", "mode": "spread", **node.train.get("dynamic_sampling", {})}
        own = {key: value for key, value in node.train.items() if key != "dynamic_sampling"}
        self.train(name, {"method": "dapo", "data": data, "rewards": rewards, "dynamic_sampling": filtering,
                          "sampling": self.options.sampling, **own})

    def train(self, name: str, entry: Entry) -> None:
        """A training stage from the current model, and the evaluations of what it makes."""
        self.stages.append({"name": name, "model": self.model, **entry})
        self.model = model_of_stage(self.model, name)
        self.evaluate(name)

    def explore(self, node: ExplorationOptions) -> None:
        """Stage 1."""
        general = self.general(node, "exploration") if node.general_share else None
        data = self.mix("exploration-rows", node, as_given(self.options.domain), general)
        self.reinforce("exploration", data, node)

    def target(self, node: TargetedOptions) -> None:
        """Stage 2."""
        weak = self.weak("targeted-weak", node)
        general: Entry | None = None
        if node.general_share:
            general = self.general(node, "targeted")
            if node.general_labels == "soft":
                general = self.soft_labels(general, node)
        self.train("targeted", {"method": "sft", "data": self.mix("targeted-rows", node, weak, general), **node.train})

    def soft_labels(self, general: Entry, node: TargetedOptions) -> Entry:
        """The best of several samples of the current model for every general prompt."""
        self.stages += [
            {"name": "soft-sample", "kind": "generate", "model": self.model, "data": general, "mean_logp": True,
             "sampling": self.options.sampling, "completions_per_prompt": node.completions_per_prompt},
            {"name": "soft-score", "kind": "score", "data": {"path": "${stages.soft-sample.data}"}, "rewards": [self.route]},
            {"name": "soft-best", "kind": "select", "data": {"path": "${stages.soft-score.data}"}, "mode": "best",
             "tie_break": "mean_logp"},
        ]
        return {"path": "${stages.soft-best.data}"}

    def refine(self, node: RefinementOptions) -> None:
        """Stage 3."""
        data = self.weak("refinement-weak", node)
        general = self.general(node, "refinement") if node.general_share else None
        if node.filter is not None:
            filtering = node.filter
            self.stages += [
                {"name": "refinement-sample", "kind": "generate", "model": self.model, "data": data,
                 "sampling": self.options.sampling | filtering.sampling, "prompts_per_chunk": filtering.prompts_per_chunk,
                 "completions_per_prompt": filtering.completions_per_prompt},
                {"name": "refinement-score", "kind": "score", "data": {"path": "${stages.refinement-sample.data}"},
                 "rewards": [self.route]},
                {"name": "refinement-filter", "kind": "rollout_filter", "data": {"path": "${stages.refinement-score.data}"},
                 "mode": filtering.mode, "threshold": filtering.threshold, "max_pass_rate": filtering.max_pass_rate},
            ]
            data = {"path": "${stages.refinement-filter.data}"}
        self.reinforce("refinement", self.mix("refinement-rows", node, data, general), node)
