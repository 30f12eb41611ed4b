"""What a run tells: metrics in JSONL always, trackers through accelerate, progress with throughput, time per phase."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mmalign.config import Options
from mmalign.training.objective import Maximum, Mean, Metrics


class TrackingOptions(Options):
    """Where metrics go beside ``metrics.jsonl``."""

    trackers: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = []
    """Trackers driven through accelerate; each must be installed."""
    project: str = "mmalign"
    """Project name given to the trackers."""
    log_every: int = 1
    """Updates between two logged lines."""
    quiet: bool = False
    """No progress bar."""


class PhaseTimer:
    """Seconds spent per phase (rollout, reward, reference, update, ...); phases may not nest in each other's sum."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._running: list[tuple[str, float]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block's time under ``name``; an inner phase's time is taken off the outer one."""
        start = time.perf_counter()
        if self._running:
            outer, since = self._running[-1]
            self.seconds[outer] += start - since
        self._running.append((name, start))
        try:
            yield
        finally:
            _, since = self._running.pop()
            now = time.perf_counter()
            self.seconds[name] += now - since
            if self._running:
                self._running[-1] = (self._running[-1][0], now)

    def take(self) -> dict[str, float]:
        """Seconds since the last call, by phase."""
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken


class MetricSums:
    """Accumulates :class:`Mean` and :class:`Maximum` metrics over micro-batches (and, when reduced, over ranks)."""

    def __init__(self) -> None:
        self.means: dict[str, tuple[float, float]] = {}
        self.maxima: dict[str, float] = {}

    def add(self, metrics: Metrics) -> None:
        """Add one micro-batch."""
        for name, metric in metrics.items():
            if isinstance(metric, Mean):
                total, count = self.means.get(name, (0.0, 0.0))
                self.means[name] = (total + metric.total, count + metric.count)
            elif isinstance(metric, Maximum):
                self.maxima[name] = max(self.maxima.get(name, -math.inf), metric.value)

    def values(self, gathered: list[MetricSums] | None = None) -> dict[str, float]:
        """Plain numbers over ``gathered`` ranks (default: this one)."""
        parts = gathered or [self]
        merged = MetricSums()
        for part in parts:
            merged.add({name: Mean(*pair) for name, pair in part.means.items()})
            merged.add({name: Maximum(value) for name, value in part.maxima.items()})
        means = {name: total / count for name, (total, count) in merged.means.items() if count}
        return means | merged.maxima


class MetricLog:
    """``metrics.jsonl`` of a run: one JSON object per logged update, appended, cut back to the resumed step."""

    def __init__(self, path: Path, *, resume_step: int = 0) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(path) if line.get("step", 0) <= resume_step] if resume_step else []
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        partial.replace(path)
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record and flush it."""
        self._file.write(json.dumps({key: _plain(value) for key, value in record.items()}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of a ``metrics.jsonl``; a last line cut off by a kill is ignored."""
    records = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return records


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return None if not math.isfinite(value) else float(f"{value:.8g}")
    return value


class ProgressBar:
    """A rich progress bar with steps, time left and a few live numbers; silent when asked or without a terminal."""

    def __init__(self, description: str, total: int, *, done: int = 0, quiet: bool = False) -> None:
        self.console = Console(stderr=True)
        self.quiet = quiet
        self.live = not quiet and self.console.is_terminal
        self.description, self.total = description, total
        self.started, self.first, self.last_line = time.monotonic(), done, 0.0
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[numbers]}"), console=self.console,
        )
        self.task = self.progress.add_task(description, total=total, completed=done, numbers="")

    def __enter__(self) -> ProgressBar:
        if self.live:
            self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live:
            self.progress.stop()

    def update(self, done: int, numbers: Mapping[str, float]) -> None:
        """Show ``done`` steps and the numbers; without a terminal, one line every few seconds."""
        shown = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        if self.live:
            self.progress.update(self.task, completed=done, numbers=shown)
        elif not self.quiet and (time.monotonic() - self.last_line > 5 or done >= self.total):
            self.last_line = time.monotonic()
            elapsed = self.last_line - self.started
            left = elapsed / max(1, done - self.first) * (self.total - done)
            self.console.print(
                f"{self.description} {done}/{self.total}  {elapsed:.0f}s, {left:.0f}s left  {shown}",
                highlight=False, soft_wrap=True,
            )
