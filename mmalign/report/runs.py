"""Reading a run directory: its stages with their manifests and metrics, and the results that evaluations left."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmalign.config import parse_yaml
from mmalign.errors import ConfigError, MmalignError

_MOVED_ASIDE = re.compile(r"\.previous-\d+$")


@dataclass
class StageRecord:
    """One stage on disk."""

    name: str
    folder: Path
    manifest: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    """Lines of ``metrics.jsonl``."""

    @property
    def kind(self) -> str:
        """Stage kind or method name."""
        return str(self.manifest.get("kind", ""))

    @property
    def finished(self) -> bool:
        """Whether the manifest says that the stage is done."""
        return self.manifest.get("status") == "done"

    @property
    def seconds(self) -> float:
        """Duration; of an unfinished stage, what its logged updates took."""
        own = self.manifest.get("seconds")
        return float(own) if own is not None else sum(float(r.get("seconds") or 0.0) for r in self.records)

    @property
    def numbers(self) -> dict[str, float]:
        """Final numeric metrics of the manifest."""
        values = self.manifest.get("metrics") or {}
        return {k: float(v) for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration."""
        return dict(self.manifest.get("config") or {})


@dataclass
class Run:
    """A run directory."""

    folder: Path
    stages: list[StageRecord]
    config_text: str
    """``config.yaml`` as written by the run; "" when there is none."""

    def is_base(self, stage: StageRecord) -> bool:
        """Whether another evaluation compares itself with ``stage``."""
        compared = [other.config.get("compare_with") for other in self.stages if other is not stage]
        return any(self.stage_at(str(path)) is stage for path in compared if path)

    def stage_at(self, path: str) -> StageRecord | None:
        """The stage whose folder ``path`` is, or has the same name in this run (a run directory may have been moved)."""
        wanted = Path(path)
        names = [wanted.parent.name, wanted.name] if wanted.name == "samples" else [wanted.name]
        for stage in self.stages:
            if stage.folder.resolve() in (wanted.resolve(), wanted.resolve().parent):
                return stage
        return next((stage for stage in self.stages if stage.folder.name in names), None)


@dataclass(frozen=True)
class Result:
    """What one evaluation says about one reward; NaN where it does not say."""

    stage: str
    reward: str
    after: float
    after_error: float
    before: float
    difference: float
    error: float
    """Standard error of the paired difference."""

    @property
    def compared(self) -> bool:
        """Whether there is another evaluation to differ from."""
        return self.difference == self.difference

    @property
    def ratio(self) -> float:
        """The difference in standard errors; NaN without a difference or without spread."""
        return self.difference / self.error if self.error else math.nan


def read_run(run_dir: Path) -> Run:
    """Read a single-stage or pipeline directory; raises ConfigError when it holds no run."""
    if not run_dir.is_dir():
        raise ConfigError(f"run_dir: folder {run_dir} does not exist")
    config = run_dir / "config.yaml"
    text = config.read_text(encoding="utf-8") if config.is_file() else ""
    own = _read_stage(run_dir)
    if own is not None:
        return Run(run_dir, [own], text)
    folders = [path for path in sorted(run_dir.iterdir()) if path.is_dir() and not _MOVED_ASIDE.search(path.name)]
    stages = [stage for folder in folders if (stage := _read_stage(folder)) is not None and stage.kind != "report"]
    if not stages:
        raise ConfigError(f"run_dir: {run_dir} holds no run: neither it nor a folder in it has a manifest.json or "
                          "metrics.jsonl; name the run_dir of `mmalign run`")
    order = _configured_order(text)
    stages.sort(key=lambda s: (order.get(s.name, len(order)), str(s.manifest.get("started", "")), s.name))
    return Run(run_dir, stages, text)


def _read_stage(folder: Path) -> StageRecord | None:
    manifest_path, metrics_path = folder / "manifest.json", folder / "metrics.jsonl"
    if not manifest_path.is_file() and not metrics_path.is_file():
        return None
    manifest: Any = {}
    if manifest_path.is_file():
        try:
            manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError):
            manifest = {}
    manifest = manifest if isinstance(manifest, dict) else {}
    return StageRecord(str(manifest.get("name") or folder.name), folder, manifest, read_json_lines(metrics_path))


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file; [] when it does not exist. A line cut off by a kill is left out."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def _configured_order(text: str) -> dict[str, int]:
    try:
        tree = parse_yaml(text) if text else None
    except MmalignError:
        return {}
    entries = tree.get("stages") if isinstance(tree, Mapping) else None
    names = [entry.get("name", entry.get("method", entry.get("kind"))) for entry in entries or [] if isinstance(entry, Mapping)]
    return {str(name): position for position, name in enumerate(names)}


def results(run: Run) -> Iterator[Result]:
    """Every evaluated reward, with before and difference where the evaluation compares with another."""
    for stage in run.stages:
        numbers = stage.numbers
        for key, value in numbers.items():
            if not key.startswith("eval/") or key.endswith("/error"):
                continue
            reward = key.removeprefix("eval/")
            yield _result(stage.name, reward, numbers, value)
        for key in numbers:  # comparisons whose evaluation kept no figures of its own
            reward = key.removeprefix("difference/")
            if key.startswith("difference/") and not key.endswith("/error") and f"eval/{reward}" not in numbers:
                yield _result(stage.name, reward, numbers, math.nan)


def _result(stage: str, reward: str, numbers: Mapping[str, float], mean: float) -> Result:
    def known(key: str, default: float = math.nan) -> float:
        return numbers.get(key, default)

    return Result(stage, reward, known(f"after/{reward}", mean), known(f"eval/{reward}/error"), known(f"before/{reward}"),
                  known(f"difference/{reward}"), known(f"difference/{reward}/error"))
