"""The representations stage: which parts of a language model its groups of rows use, and how alike it represents them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mmalign.config import Options
from mmalign.data.balance import group_rows
from mmalign.data.chat import TextEncoding
from mmalign.data.loading import DataOptions, load_rows
from mmalign.errors import ConfigError
from mmalign.metrics.representation import neuron_importance, representation_similarity
from mmalign.policies.hidden_states import collect_hidden_states
from mmalign.policies.loading import ModelOptions, load_policy
from mmalign.stage_kinds.records import write_csv
from mmalign.stages import StageContext, StageResult, stage
from mmalign.training.checkpoint import atomic_folder


class RepresentationsOptions(Options):
    """Options of the representations stage."""

    model: ModelOptions
    """The language model."""
    data: DataOptions
    """Rows of every group; for the similarities, the groups should say the same things (parallel sentences)."""
    by: str = "language"
    """Column that names a row's group."""
    encoding: TextEncoding = TextEncoding(max_length=256)
    """Tokenisation."""
    rows_per_group: int = 64
    """Rows of a group that are measured, the first ones."""
    rows_per_forward: int = 8
    """Rows of one batch; importance is averaged over batches."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse values without a meaning."""
        if self.rows_per_group < 1 or self.rows_per_forward < 1:
            raise ValueError("rows_per_group and rows_per_forward must be at least 1")


@stage("representations", options=RepresentationsOptions, outputs=("folder", "importance", "similarity"))
def representations(options: RepresentationsOptions, context: StageContext) -> StageResult:
    """Importance of every layer and component for each group of rows, and cosine of the groups' mean hidden states."""
    rows = load_rows(options.data, seed=0)
    policy: Any = load_policy(options.model, encoding=options.encoding)
    if policy.modality != "text":
        raise ConfigError(f"model.path: {options.model.path} is no language model")
    policy.module.eval()
    examples, _ = policy.prepare_dataset(rows)
    groups = {name: members[: options.rows_per_group]
              for name, members in group_rows([example.get(options.by) for example in examples], by=options.by).items()}
    network = _network(policy.module)
    modules = {name: module for name, module in network.named_modules()
               if isinstance(module, nn.Linear) and any(part.isdigit() for part in name.split("."))}
    if not modules:
        raise ConfigError("model.path: no linear layers inside of numbered blocks; this model cannot be measured")
    importance: list[dict[str, Any]] = []
    hidden: list[Tensor] = []
    for name, members in groups.items():
        chosen = [examples[i] for i in members]
        batches = [chosen[i : i + options.rows_per_forward] for i in range(0, len(chosen), options.rows_per_forward)]
        found = neuron_importance(modules, [partial(_mean_nll, policy, batch) for batch in batches])
        importance += [{"group": name, "layer": _layer(module), "component": module.rpartition(".")[2],
                        "importance": float(values.sum())} for module, values in found.items()]
        hidden.append(torch.cat([collect_hidden_states(policy.module, _padded(batch)) for batch in batches], dim=1))
    similarity = representation_similarity(hidden)
    with atomic_folder(context.folder / "tables") as folder:
        write_csv(folder / "importance.csv", importance)
        write_csv(folder / "similarity.csv", [
            {"layer": layer, "first": a, "second": b, "cosine": float(similarity[layer, i, j])}
            for layer in range(len(similarity)) for i, a in enumerate(groups) for j, b in enumerate(groups) if i < j])
    metrics = _summary(importance, similarity, list(groups))
    if not context.quiet:
        Console(stderr=True).print(_table(metrics, context.name))
    tables = context.folder / "tables"
    return StageResult({"folder": str(context.folder), "importance": str(tables / "importance.csv"),
                        "similarity": str(tables / "similarity.csv")}, metrics)


def _network(module: nn.Module) -> Any:
    inner: Any = module
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def _mean_nll(policy: Any, batch: Sequence[Mapping[str, Any]]) -> Tensor:
    scores = policy.log_probs(policy.encode_rows(batch))
    loss: Tensor = -(scores.logp * scores.mask).sum() / scores.mask.sum().clamp(min=1)
    return loss


def _padded(batch: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    width = max(len(example["input_ids"]) for example in batch)
    ids, mask = (torch.zeros(len(batch), width, dtype=torch.long) for _ in range(2))
    for row, example in enumerate(batch):
        size = len(example["input_ids"])
        ids[row, :size], mask[row, :size] = torch.tensor(example["input_ids"]), 1
    return {"input_ids": ids, "attention_mask": mask}


def _layer(name: str) -> int:
    return next(int(part) for part in name.split(".") if part.isdigit())


def _summary(importance: Sequence[Mapping[str, Any]], similarity: Tensor, groups: Sequence[str]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    depth = 1 + max(row["layer"] for row in importance)
    for group in groups:
        mine = [row for row in importance if row["group"] == group]
        total = sum(row["importance"] for row in mine)
        metrics[f"importance/{group}"] = total
        deep = sum(row["importance"] for row in mine if 2 * row["layer"] >= depth)
        metrics[f"importance_deep_share/{group}"] = deep / total if total else 0.0
    pairs = [(i, j) for i in range(len(groups)) for j in range(i)]
    if pairs:
        metrics["similarity"] = float(torch.stack([similarity[:, i, j].mean() for i, j in pairs]).mean())
    return metrics


def _table(metrics: Mapping[str, float], title: str) -> Table:
    table = Table("measure", "value", title=title, title_justify="left")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4g}")
    return table
