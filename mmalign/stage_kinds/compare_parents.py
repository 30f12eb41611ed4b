"""The compare_parents stage: what a merged model gains over the two it was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mmalign.config import Options
from mmalign.errors import ConfigError
from mmalign.metrics.synergy import diversity, improvement, synergy
from mmalign.stages import StageContext, StageResult, stage
from mmalign.training.checkpoint import write_json


class CompareParentsOptions(Options):
    """Options of the compare_parents stage."""

    first: str
    """Folder of an evaluate or likelihood stage of the first parent (``${stages.NAME.folder}``)."""
    second: str
    """The same stage of the second parent."""
    merged: str
    """The same stage of the merged model."""


@stage("compare_parents", options=CompareParentsOptions, outputs=("folder",))
def compare_parents(options: CompareParentsOptions, context: StageContext) -> StageResult:
    """Synergy, improvement and diversity of a merge, measure by measure; positive is better, also for likelihoods."""
    measured = [(name, measures(getattr(options, name), name)) for name in ("first", "second", "merged")]
    shared = [name for name in measured[0][1] if all(name in values for _, values in measured)]
    if not shared:
        raise ConfigError("first, second, merged: the three stages measured nothing in common; run the same stage with the same "
                          "data on all three models")
    table = Table("measure", "first", "second", "merged", "synergy", "improvement", "diversity", title=context.name,
                  title_justify="left")
    metrics: dict[str, float] = {}
    for name in shared:
        values = [found[name] for _, found in measured]
        gains = {"synergy": synergy(*values), "improvement": improvement(*values), "diversity": diversity(*values[:2])}
        metrics |= {f"{gain}/{name}": value for gain, value in gains.items()}
        table.add_row(name, *[f"{value:.4f}" for value in values], *[f"{value:+.4f}" for value in gains.values()])
    if not context.quiet:
        Console(stderr=True).print(table)
    write_json(context.folder / "comparison.json", {"parents": [options.first, options.second], "merged": options.merged,
                                                     "metrics": metrics})
    return StageResult({"folder": str(context.folder)}, metrics)


def measures(folder: str, key: str) -> dict[str, float]:
    """Means that a stage measured, turned so that higher is better: rewards as they are, likelihoods negated."""
    path = Path(folder) / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConfigError(f"{key}: {folder} is no folder of a finished stage (no manifest.json)") from None
    found = {}
    for name, value in manifest.get("metrics", {}).items():
        if name.endswith("/error") or value is None or value != value:
            continue
        if name.startswith(("eval/", "group/")):
            found[name.removeprefix("eval/")] = float(value)
        elif name == "nll" or name.startswith("nll/") or name == "nll_worst":
            found[f"-{name}"] = -float(value)
    if not found:
        raise ConfigError(f"{key}: {folder} measured nothing; name the folder of an evaluate or likelihood stage")
    return found
