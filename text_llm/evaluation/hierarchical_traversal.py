"""Does a model not know, or not find the way? Structured prompts, path scores and layer-wise similarity on trees of codes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mmalign.config import Options
from mmalign.core.seeding import generator
from mmalign.data.code_trees import CodeTree, Difficulty, TreeItem, load_tree, make_items
from mmalign.errors import ConfigError
from mmalign.methods.registry import method
from mmalign.metrics.hierarchy import (
    AGREEMENTS,
    agreement,
    ancestor_f1,
    common_subsequence_score,
    gap_reduction,
    path_matching_score,
    stratum,
)
from mmalign.metrics.statistics import mean_and_error
from mmalign.policies.loading import ModelOptions, load_policy
from mmalign.rewards.text import completion_text
from mmalign.stage_kinds.records import write_csv, write_in_chunks
from mmalign.stage_kinds.sampling import sampling_for
from mmalign.stages import StageContext, StageResult
from mmalign.training.checkpoint import atomic_folder
from text_llm.evaluation.representation_probes import check_comparable, make_probes, probe_states, similarity_curves
from text_llm.evaluation.traversal_prompts import Ask, Order, check_template, question, read_answer, templates_for

PROMPTS_PER_CHUNK = 64


class TreeOptions(Options):
    """Which hierarchy."""

    name: str = "objects"
    """objects (built in, 76 codes), synthetic, icd10_cm or icd10 (the extra ``hierarchy``)."""
    root: str | None = None
    """Keep this code and what is below it."""
    arguments: dict[str, Any] = {}
    """Arguments of the tree: branching, depth and seed of synthetic."""


class HierarchicalTraversalOptions(Options):
    """Options of the traversal study."""

    model: ModelOptions
    """The model studied, usually after reinforcement learning."""
    compare_with: ModelOptions | None = None
    """The model before (base or supervised): gaps and representations are compared with it."""
    tree: TreeOptions = TreeOptions()
    """The hierarchy asked about."""
    ask: Ask = "meaning"
    """What a code means (a choice of options), which code a description has, or which top-level code a code is under."""
    items: int | None = 100
    """Questions; null asks one about every leaf, or about every one of ``codes``."""
    codes: list[str] = []
    """Codes to ask about; empty: leaves drawn at random."""
    options: int = 4
    """Options of a choice, the right one included."""
    difficulty: Difficulty = "hard"
    """Where wrong options come from: siblings (hard), the same top-level code (medium), others (easy)."""
    prompts: list[str] = ["qa", "cot", "structured", "shuffled"]
    """Prompts compared; shuffled is the control: a breakdown as long as that of structured, of the wrong thing."""
    templates: dict[str, str] = {}
    """Wordings of your own by prompt; fields: code, description, options, levels, shuffled_levels, decoy, tree, top_level."""
    chat: bool = True
    """Ask in a user message (the model's chat template); false gives the bare text."""
    order: Order = "down"
    """Direction in which completions write a path."""
    runs: int = 5
    """Independent answers to every question; it counts as answered by their majority."""
    sampling: dict[str, Any] = {}
    """Sampling options (TextSampling)."""
    probes: int = 100
    """Codes whose representations are compared; 0 leaves that part out."""
    rows_per_forward: int = 16
    """Statements in one forward pass of the comparison."""
    seed: int = 0
    """Seed of the questions and decoys, so that several studies ask the same."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse what cannot be asked."""
        for name, least in (("options", 2), ("runs", 1), ("probes", 0), ("rows_per_forward", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.options > 26:
            raise ValueError(f"options must be at most 26, one per letter, not {self.options}")
        if self.items is not None and self.items < 1:
            raise ValueError(f"items must be at least 1, not {self.items}")
        if not self.prompts or len(set(self.prompts)) < len(self.prompts):
            raise ValueError("prompts must be a list of different names")
        templates_for(self.ask, self.prompts, self.templates)
        for name, template in self.templates.items():
            check_template(name, template)


@method("hierarchical_traversal", options=HierarchicalTraversalOptions, modality="text", kind="evaluate",
        paper="Zhang et al., 2025, arXiv 2511.05933")
def hierarchical_traversal(options: HierarchicalTraversalOptions, context: StageContext) -> StageResult:
    """Ask about a hierarchy of codes in several ways, score answers and paths, and compare representations layer by layer."""
    tree = load_tree(options.tree.name, **options.tree.arguments)
    tree = tree.subtree(options.tree.root) if options.tree.root else tree
    items = make_items(tree, options.items, seed=options.seed, options=options.options, difficulty=options.difficulty,
                       codes=options.codes or None)
    probes = make_probes(tree, [item.code for item in items[: options.probes]])
    models = {"model": options.model} | ({"before": options.compare_with} if options.compare_with else {})
    answers: dict[str, list[dict[str, Any]]] = {}
    states: dict[str, dict[str, Any]] = {}
    folders: dict[str, Path] = {}
    first: Any = None
    for label, chosen in models.items():
        policy: Any = load_policy(chosen)
        if policy.modality != "text":
            raise ConfigError(f"{'model' if label == 'model' else 'compare_with'}.path: {chosen.path} is no language model")
        if first is None:
            first = policy
        elif options.probes:
            check_comparable(first, policy)
        own = replace(context, folder=context.folder / label, name=f"{context.name} {label}")
        folders[label] = ask(policy, items, tree, options, own)
        answers[label] = read_answers(folders[label])
        if options.probes:
            states[label] = {kind: probe_states(policy, getattr(probes, kind), rows_per_forward=options.rows_per_forward)
                             for kind in ("queries", "answers")}
    results = [record for label in models for record in summarise(label, answers[label], options.prompts)]
    curves = similarity_curves(states) if states else []
    metrics = numbers(results, curves, options.prompts)
    with atomic_folder(context.folder / "tables") as folder:
        write_csv(folder / "answers.csv", results)
        write_csv(folder / "similarity.csv", curves)
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    from text_llm.evaluation.traversal_plots import draw

    with atomic_folder(context.folder / "plots") as folder:
        draw(results, curves, folder)
    if not context.quiet:
        Console(stderr=True).print(table_of(results, context.name))
    return StageResult({"folder": str(context.folder), "data": str(folders["model"]),
                        "metrics": str(context.folder / "tables" / "metrics.json")}, metrics)


def ask(
    policy: Any, items: Sequence[TreeItem], tree: CodeTree, options: HierarchicalTraversalOptions, context: StageContext,
) -> Path:
    """Answer every question with every prompt ``runs`` times; the folder of the data set, one row per answer.

    Answers come in chunks that a killed stage need not repeat.
    """
    templates = templates_for(options.ask, options.prompts, options.templates)
    sampling = sampling_for(policy, options.sampling)
    asked = [{"item": at, "prompt_name": name} for name in options.prompts for at in range(len(items))]

    def make(rows: list[dict[str, Any]], chunk: range) -> tuple[list[dict[str, Any]], dict[str, float]]:
        texts = [question(items[row["item"]], tree, templates[row["prompt_name"]], seed=options.seed) for row in rows]
        prompts: list[Any] = [[{"role": "user", "content": text}] if options.chat else text for text in texts]
        random = generator(context.run_seed, "traversal", "sampling", str(chunk.start))
        rollout = policy.sample(prompts, options.runs, sampling, random)
        records = []
        for i, at in enumerate(rollout.group.tolist()):
            item, completion = items[rows[at]["item"]], completion_text(rollout.samples[i])
            read = read_answer(completion, item, ask=options.ask, order=options.order)
            gold = item.path[:1] if options.ask == "top" and rows[at]["prompt_name"] in ("qa", "cot") else item.path
            records.append({
                "id": f"{rows[at]['prompt_name']}-{rows[at]['item']}-{i % options.runs}", "item": rows[at]["item"],
                "prompt_name": rows[at]["prompt_name"], "code": item.code, "path": list(gold), "hops": item.hops,
                "prompt": texts[at], "completion": completion, "correct": read.correct, "predicted_path": read.path,
                "ancestor_f1": ancestor_f1(read.path, gold), "subsequence": common_subsequence_score(read.path, gold),
                "path_score": path_matching_score(read.path, gold), "finish_reason": rollout.finish_reason[i],
                "words": len(completion.split()),
            })
        return records, {}

    return write_in_chunks(context, asked, make, size=PROMPTS_PER_CHUNK)[0]


def read_answers(folder: Path) -> list[dict[str, Any]]:
    """The scored answers, without their texts."""
    from datasets import load_from_disk

    names = ["item", "prompt_name", "hops", "correct", "path_score", "ancestor_f1", "subsequence", "finish_reason", "words"]
    rows: list[dict[str, Any]] = load_from_disk(str(folder)).select_columns(names).to_list()
    return rows


def summarise(label: str, rows: Sequence[Mapping[str, Any]], prompts: Sequence[str]) -> list[dict[str, Any]]:
    """One record per prompt and stratum (``all``, light, middle, heavy): accuracy by majority, bins, path scores."""
    records = []
    for prompt in prompts:
        by_item: dict[int, list[Mapping[str, Any]]] = {}
        for row in rows:
            if row["prompt_name"] == prompt:
                by_item.setdefault(row["item"], []).append(row)
        for name in ("all", "light", "middle", "heavy"):
            chosen = [runs for runs in by_item.values() if name in ("all", stratum(runs[0]["hops"]))]
            if not chosen:
                continue
            bins = [agreement([row["correct"] for row in runs]) for runs in chosen]
            shares: dict[str, float] = {bin: bins.count(bin) / len(bins) for bin in AGREEMENTS}
            accuracy = mean_and_error([float(bin in ("all_correct", "majority_correct")) for bin in bins])
            scores = {key: mean_and_error([sum(row[key] for row in runs) / len(runs) for runs in chosen])
                      for key in ("path_score", "ancestor_f1", "subsequence", "words")}
            cut = sum(row["finish_reason"] == "length" for runs in chosen for row in runs) / sum(map(len, chosen))
            records.append({
                "model": label, "prompt": prompt, "stratum": name, "items": len(chosen), "accuracy": accuracy.mean,
                "accuracy_error": accuracy.error, **shares,
                "path_score": scores["path_score"].mean, "path_score_error": scores["path_score"].error,
                "ancestor_f1": scores["ancestor_f1"].mean, "subsequence": scores["subsequence"].mean,
                "words": scores["words"].mean, "cut_off": cut,
            })
    return records


def numbers(
    results: Sequence[Mapping[str, Any]], curves: Sequence[Mapping[str, Any]], prompts: Sequence[str],
) -> dict[str, float]:
    """The stage's metrics: accuracies and path scores, gaps and what a structured prompt closes of them, mean similarities."""
    metrics: dict[str, float] = {}
    for row in results:
        where = f"{row['model']}/{row['prompt']}" + ("" if row["stratum"] == "all" else f"/{row['stratum']}")
        metrics |= {f"accuracy/{where}": row["accuracy"], f"path_score/{where}": row["path_score"]}
        if row["items"] > 1:  # the error of a single question is unknown
            metrics[f"accuracy/{where}/error"] = row["accuracy_error"]
    whole = {(row["model"], row["prompt"]): row["accuracy"] for row in results if row["stratum"] == "all"}
    if any(model == "before" for model, _ in whole):
        for prompt in prompts:
            metrics[f"gap/{prompt}"] = whole["model", prompt] - whole["before", prompt]
        for prompt in prompts:
            if prompt != "qa" and "qa" in prompts and metrics["gap/qa"]:
                metrics[f"gap_reduction/{prompt}"] = gap_reduction(
                    whole["model", "qa"], whole["before", "qa"], whole["model", prompt], whole["before", prompt])
    for curve in dict.fromkeys(row["curve"] for row in curves):
        for centred, name in ((0, "similarity"), (1, "centred_similarity")):
            values = [row["cosine"] for row in curves if row["curve"] == curve and row["centred"] == centred]
            if values:
                metrics[f"{name}/{curve.replace(', ', '/').replace(' ', '_')}"] = sum(values) / len(values)
    return metrics


def table_of(results: Sequence[Mapping[str, Any]], title: str) -> Table:
    """The results for a terminal."""
    table = Table("model", "prompt", "stratum", "items", "accuracy", "path score", "all / maj. right", "words", title=title,
                  title_justify="left")
    for row in results:
        table.add_row(row["model"], row["prompt"], row["stratum"], str(row["items"]),
                      f"{row['accuracy']:.3f} ± {row['accuracy_error']:.3f}",
                      f"{row['path_score']:.3f} ± {row['path_score_error']:.3f}",
                      f"{row['all_correct']:.2f} / {row['majority_correct']:.2f}", f"{row['words']:.0f}")
    return table
