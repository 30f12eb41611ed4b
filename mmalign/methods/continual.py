"""Continual post-training of any modality: tasks in order, one or several learners, and what each of them forgets."""

from __future__ import annotations

import re
from typing import Any, Literal

from mmalign.config import Options
from mmalign.data.loading import DataOptions
from mmalign.errors import ConfigError
from mmalign.methods.registry import METHODS, Method, Pipeline, as_given, model_of_stage
from mmalign.policies.loading import ModelOptions
from mmalign.rewards.base import RewardOptions
from mmalign.rewards.registry import REWARDS

Entry = dict[str, Any]
_NAME = re.compile(r"[A-Za-z0-9_]+")
UNION = "all"
"""Label of the one stage that learns every task at once."""
TAKEN = ("model", "data", "rewards", "evaluation", "method")
"""Keys of a training stage that the pipeline sets."""


class ContinualTask(Options):
    """One task of the sequence."""

    name: str
    """Short name: letters, digits and _."""
    data: DataOptions | None = None
    """Training rows with ``prompt`` and what the rewards and the target need; null for a task that is ``known``."""
    evaluation: DataOptions
    """Held-out rows of the task."""
    rewards: list[RewardOptions]
    """Rewards; the first is the one that evaluations report and that filters read (the accuracy), others shape it."""
    target: str = "completion"
    """Column that fine-tuning learns."""
    known: bool = False
    """The model knows the task already: it is measured like the others, and not trained on."""

    def model_post_init(self, context: Any, /) -> None:
        """The name becomes part of stage names."""
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name: {self.name!r} may hold letters, digits and _ only")
        if self.name == UNION:
            raise ValueError(f"name: {UNION!r} stands for the union of the tasks; choose another")
        if self.known == (self.data is not None):
            raise ValueError(f"data: task {self.name!r} is known already, so there is nothing to train on; leave it out"
                             if self.known else f"data: required by task {self.name!r}, unless it is known already (known: true)")
        if not self.rewards:
            raise ValueError("rewards: at least one is needed; its first is what the task is measured by")


class RolloutFilterNode(Options):
    """Rollout-based instance filtering before a task, with the model of that moment."""

    completions_per_prompt: int = 8
    """Samples of every prompt."""
    mode: Literal["any", "mixed"] = "any"
    """any: prompts with at least one success. mixed: of these, only those with a failure, too."""
    threshold: float = 0.0
    """A sample is a success when the task's first reward is above this: 0 for rewards of 0 and 1, 0.5 for graded ones."""
    max_pass_rate: float = 1.0
    """Prompts with a larger share of successes are dropped."""
    sampling: dict[str, Any] = {}
    """Sampling options that differ from the pipeline's."""
    prompts_per_chunk: int = 64
    """Prompts sampled and written together."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse what could not tell prompts apart."""
        least = 2 if self.mode == "mixed" else 1
        if self.completions_per_prompt < least:
            raise ValueError(f"completions_per_prompt must be at least {least} for mode {self.mode}, not "
                             f"{self.completions_per_prompt}")
        if self.sampling.get("temperature") == 0 and self.completions_per_prompt > 1:
            raise ValueError("sampling.temperature: at 0 all samples of a prompt are the same, so there is no pass rate to "
                             "filter by; use 1")


class Learner(Options):
    """A way of learning the tasks."""

    method: str
    """sft, or any method of ``kind: train`` that learns from rewards: grpo, dapo, disco, ppo, ..."""
    order: Literal["sequence", "union"] = "sequence"
    """sequence: task after task, each from the model before. union: all tasks at once (multi-task training, the upper bound)."""
    filter: RolloutFilterNode | None = None
    """Leave out prompts that the current model never answers right, before every task; null trains on all."""
    self_sampled: RolloutFilterNode | None = None
    """sft: learn the model's own successes instead of the targets of the data (the honest control of what sampling from the
    current model does without reinforcement learning)."""
    train: dict[str, Any] = {}
    """Options of the training stages: batch, steps, optimizers, advantage, kl, ..."""
    per_task: dict[str, dict[str, Any]] = {}
    """Options that certain tasks have instead, by task."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse combinations without a meaning."""
        if self.filter is not None and self.self_sampled is not None:
            raise ValueError("filter and self_sampled exclude each other: own successes are filtered prompts already")
        for label, node in [("train", self.train), *((f"per_task.{task}", node) for task, node in self.per_task.items())]:
            taken = [key for key in TAKEN if key in node]
            if taken:
                raise ValueError(f"{label}.{taken[0]}: is set by the pipeline; leave it out")


class MatchedOptions(Options):
    """Reading learners where they first reach a level of a task, not after equal numbers of updates."""

    levels: dict[str, float]
    """Task -> score."""
    every: int = 10
    """Updates between evaluations of all tasks while training."""
    completions_per_prompt: int = 1
    """Samples of every held-out prompt in these evaluations; more make a crossing less a matter of luck."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse values without a meaning."""
        if not self.levels:
            raise ValueError("levels: give the level of at least one task")
        if self.every < 1:
            raise ValueError(f"every must be at least 1, not {self.every}")


class TaskSequenceOptions(Options):
    """What every pipeline over a sequence of tasks takes."""

    model: ModelOptions
    """The model before the first task."""
    tasks: list[ContinualTask]
    """Tasks in their order; nothing of an earlier one is replayed."""
    sampling: dict[str, Any] = {}
    """Sampling options of rollouts, filters and evaluations (which take the most likely tokens unless told otherwise)."""
    evaluation_sampling: dict[str, Any] = {"temperature": 0.0}
    """Sampling options that evaluations have instead."""
    general: dict[str, dict[str, Any]] = {}
    """General abilities by name, measured before and after: ``kind`` (evaluate or likelihood) and that stage's options but
    the model."""
    matched: MatchedOptions | None = None
    """Compare learners at equal task accuracy; null compares after the last update only."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse what no stage could use."""
        names = [task.name for task in self.tasks]
        if not names:
            raise ValueError("tasks: at least one is needed")
        if all(task.known for task in self.tasks):
            raise ValueError("tasks: all of them are known already; there is nothing to learn")
        if len(set(names)) != len(names):
            raise ValueError(f"tasks: a name is used twice in {names}")
        for name, node in self.general.items():
            if node.get("kind") not in ("evaluate", "likelihood"):
                raise ValueError(f"general.{name}.kind: evaluate or likelihood, not {node.get('kind')!r}")
            if "model" in node:
                raise ValueError(f"general.{name}.model: the pipeline measures its own models; leave it out")
        learned = [task.name for task in self.tasks if not task.known]
        unknown = [task for task in (self.matched.levels if self.matched else {}) if task not in learned]
        if unknown:
            raise ValueError(f"matched.levels: no task {unknown[0]!r} is learned here; tasks are {', '.join(learned)}")


def continual_pipeline(options: TaskSequenceOptions, learners: dict[str, Learner]) -> Pipeline:
    """Evaluations before, the stages of every learner, their forgetting matrices, and their comparison."""
    builder = _Builder(options)
    methods = {name: _checked(name, learner, options) for name, learner in learners.items()}
    builder.start()
    for name, learner in learners.items():
        builder.learn(name, learner, methods[name])
    if options.matched is not None or len(learners) > 1:
        builder.compare(learners)
    first = builder.last[next(iter(learners))]
    return Pipeline(builder.stages, {"model": f"{first}.model", "folder": f"{first}.folder", "metrics": f"{first}.metrics"})


def _checked(name: str, learner: Learner, options: TaskSequenceOptions) -> Method:
    """The method of a learner; raises ConfigError for one that cannot learn a task."""
    key = f"learners.{name}"
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{key}: a learner's name may hold letters, digits and _ only")
    try:
        method = METHODS.get(learner.method)
    except ValueError as error:
        raise ConfigError(f"{key}.method: {error}") from None
    fields = method.options.model_fields
    if method.kind != "train" or "data" not in fields:
        raise ConfigError(f"{key}.method: {learner.method} is no training method; use sft, grpo, dapo, ...")
    if learner.self_sampled is not None and "rewards" in fields:
        raise ConfigError(f"{key}.self_sampled: {learner.method} samples by itself; self_sampled is for sft")
    unknown = [task for task in learner.per_task if task not in [t.name for t in options.tasks]]
    if unknown:
        raise ConfigError(f"{key}.per_task: there is no task {unknown[0]!r}")
    if learner.order == "union" and any(len(task.rewards) > 1 for task in options.tasks) and "rewards" in fields:
        raise ConfigError(f"{key}.order: the union is rewarded by one reward per task, and some have several; combine them in a "
                          "reward of your own")
    if learner.order == "union" and learner.per_task:
        raise ConfigError(f"{key}.per_task: the union is one stage; use train")
    if options.matched is not None and method.modality == "text" and "rewards" not in fields and "sampling" not in fields:
        raise ConfigError(f"{key}.method: {learner.method} cannot be evaluated while it trains, which matched needs")
    for node in (learner.filter, learner.self_sampled):
        for task in options.tasks:
            _check_threshold(key, task, node)
    return method


def _check_threshold(key: str, task: ContinualTask, node: RolloutFilterNode | None) -> None:
    """A threshold that the task's reward can never exceed leaves nothing; its range is known for registered rewards."""
    top = _top_score(task.rewards[0])
    if node is not None and top is not None and node.threshold >= top:
        raise ConfigError(f"{key}.filter.threshold: {node.threshold:g} is not below {top:g}, the largest value of {task.name}'s "
                          f"reward {task.rewards[0].name}, so no sample could be a success")


def _top_score(reward: RewardOptions) -> float | None:
    limits = getattr(REWARDS.get(reward.name), "range", None) if reward.name in REWARDS else None
    return None if limits is None else float(limits[1])


class _Builder:
    """Collects the stages of a pipeline."""

    def __init__(self, options: TaskSequenceOptions) -> None:
        self.options = options
        self.model = as_given(options.model)
        self.stages: list[Entry] = []
        self.last: dict[str, str] = {}
        self.trained: dict[str, list[tuple[str, str, str]]] = {}
        """learner -> (task, training stage, label of the evaluations before it)."""
        self.names = [task.name for task in options.tasks]

    def evaluate(self, label: str, model: Entry) -> None:
        """Every task on one model, at the same prompts and seeds each time."""
        sampling = self.options.sampling | self.options.evaluation_sampling
        for task in self.options.tasks:
            self.stages.append({"name": f"{label}-on-{task.name}", "kind": "evaluate", "model": model, "sampling": sampling,
                                "data": as_given(task.evaluation), "rewards": [as_given_reward(task.rewards[0])]})

    def probe(self, label: str, model: Entry) -> None:
        """The general abilities of one model."""
        for name, node in self.options.general.items():
            self.stages.append({"name": f"{label}-{name}", "model": model, **node})

    def start(self) -> None:
        """What is measured before anything is learned, and the joined data where they are needed."""
        self.evaluate("start", self.model)
        self.probe("start", self.model)
        if self.options.matched is not None:
            self.stages.append({"name": "held_out", "kind": "mix", "shuffle": False, "sources": [
                {"data": as_given(task.evaluation), "add": {"task": task.name}} for task in self.options.tasks]})

    def learn(self, learner: str, settings: Learner, method: Method) -> None:
        """The training stages of one learner, evaluations after each, and its matrix."""
        model, before = self.model, "start"
        labels: list[str] = []
        for name, data, target, rewards in self.parts(learner, settings):
            if data is None:  # known already: the row of the matrix is that of the model before
                labels.append(before)
                continue
            label = f"{learner}-{name}"
            data = self.rows(label, settings, model, data, target, rewards)
            own = settings.train | settings.per_task.get(name, {})
            self.stages.append({"name": label, "method": settings.method, "model": model, "data": data,
                                **self.extras(method, rewards, own), **own})
            model = model_of_stage(model, label)
            self.trained.setdefault(learner, []).append((name, label, before))
            self.evaluate(label, model)
            labels.append(label)
            before = label
        self.last[learner] = before
        self.probe(before, model)
        self.matrix(learner, labels, union=settings.order == "union")

    def parts(self, learner: str, settings: Learner) -> list[tuple[str, Entry | None, str, list[Entry]]]:
        """(name, data or None where there is nothing to learn, target column, rewards) of every stage."""
        if settings.order == "sequence":
            return [(task.name, as_given(task.data) if task.data else None, task.target,
                     [as_given_reward(reward) for reward in task.rewards]) for task in self.options.tasks]
        targets = self.learns_targets(settings)
        union = f"{learner}-rows"
        self.stages.append({"name": union, "kind": "mix", "sources": [
            {"data": renamed(as_given(task.data), {task.target: "completion"} if targets else {}), "add": {"task": task.name}}
            for task in self.options.tasks if task.data is not None]})
        return [(UNION, {"path": f"${{stages.{union}.data}}"}, "completion", [self.routed()])]

    @staticmethod
    def learns_targets(settings: Learner) -> bool:
        """Whether a learner reads the targets of the data."""
        return "rewards" not in METHODS.get(settings.method).options.model_fields and settings.self_sampled is None

    def routed(self) -> Entry:
        """One reward for rows of all tasks."""
        return {"name": "route", "by": "task", "label": "score",
                "routes": {task.name: as_given_reward(task.rewards[0]) for task in self.options.tasks}}

    def rows(
        self, label: str, settings: Learner, model: Entry, data: Entry, target: str, rewards: list[Entry],
    ) -> Entry:
        """The rows that are trained on: all, those the model of this moment can learn from, or its own successes."""
        node = settings.filter or settings.self_sampled
        targets = self.learns_targets(settings)
        if node is None:
            return renamed(data, {target: "completion"}) if targets else data
        if targets and target == "completion":  # samples take the place of the completion, which must survive them
            columns = data.get("columns", {})
            source = next((theirs for theirs, ours in columns.items() if ours == "completion"), "completion")
            data, target = {**data, "columns": {**columns, source: "gold"}}, "gold"
        self.stages += [
            {"name": f"{label}-sample", "kind": "generate", "model": model, "data": data,
             "sampling": self.options.sampling | node.sampling, "completions_per_prompt": node.completions_per_prompt,
             "prompts_per_chunk": node.prompts_per_chunk},
            {"name": f"{label}-score", "kind": "score", "data": {"path": f"${{stages.{label}-sample.data}}"},
             "rewards": [{**rewards[0], "weight": 1.0}]},
            {"name": f"{label}-filter", "kind": "rollout_filter", "data": {"path": f"${{stages.{label}-score.data}}"},
             "mode": node.mode, "threshold": node.threshold, "max_pass_rate": node.max_pass_rate,
             "keep": "successes" if settings.self_sampled is not None else "prompts"},
        ]
        kept: Entry = {"path": f"${{stages.{label}-filter.data}}"}
        return renamed(kept, {target: "completion"}) if targets else kept

    def extras(self, method: Method, rewards: list[Entry], own: Entry) -> Entry:
        """Rewards, sampling and evaluation of a training stage, as far as its method takes them."""
        fields = method.options.model_fields
        found: Entry = {}
        if "rewards" in fields:
            found["rewards"] = rewards
        if self.options.matched is not None:
            found["evaluation"] = {"data": {"path": "${stages.held_out.data}"}, "rewards": [self.routed()], "by": "task",
                                   "every": self.options.matched.every,
                                   "completions_per_prompt": self.options.matched.completions_per_prompt,
                                   "greedy": self.options.evaluation_sampling.get("temperature") == 0}
        if "sampling" in fields and ("rewards" in fields or self.options.matched is not None) and "sampling" not in own:
            found["sampling"] = self.options.sampling
        return found

    def matrix(self, learner: str, labels: list[str], *, union: bool) -> None:
        """The forgetting matrix of a learner."""
        last = self.last[learner]
        general = {name: {"before": f"${{stages.start-{name}.folder}}", "after": f"${{stages.{last}-{name}.folder}}"}
                   for name in self.options.general}
        self.stages.append({
            "name": f"{learner}-matrix", "kind": "forgetting_matrix", "tasks": self.names,
            "stages": [UNION] if union else self.names,
            "cells": [[f"${{stages.{label}-on-{task}.folder}}" for task in self.names] for label in labels],
            "start": [f"${{stages.start-on-{task}.folder}}" for task in self.names], "general": general})

    def compare(self, learners: dict[str, Learner]) -> None:
        """All learners side by side."""
        levels = self.options.matched.levels if self.options.matched is not None else {}
        curves = [
            {"learner": learner, "task": waited, "folder": f"${{stages.{label}.folder}}",
             "before": {other: f"${{stages.{before}-on-{other}.folder}}" for other in self.names}}
            for learner, stages in self.trained.items() for task, label, before in stages
            for waited in levels if task in (waited, UNION)
        ]
        self.stages.append({"name": "comparison", "kind": "compare_learners", "levels": levels, "curves": curves,
                            "matrices": {learner: f"${{stages.{learner}-matrix.folder}}" for learner in learners}})


def as_given_reward(reward: RewardOptions) -> Entry:
    """A reward as the configuration said it, options of the reward included."""
    return {**reward.model_dump(exclude_unset=True), **reward.arguments}


def renamed(data: Entry, columns: dict[str, str]) -> Entry:
    """``data`` with further columns renamed; a name that stays is no renaming."""
    changes = {theirs: ours for theirs, ours in columns.items() if theirs != ours}
    return {**data, "columns": {**data.get("columns", {}), **changes}} if changes else data
