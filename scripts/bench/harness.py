"""Two programs on the same work, in turns, each step in its own fresh process: CPU-seconds and memory, and a table.

A *bench* has cases and sides (ours first). Every round runs each side once, in a process of its own with one thread, so
that neither side meets caches, allocators or imports of the other, and drift of the machine hits both. Figures:

* seconds: CPU time (user + system) of the process per step, from the end of one step to the end of the next, the first
  step dropped; the median and the minimum over all rounds. CPU time, because wall time of a shared machine says little.
* memory: largest resident size during those steps minus the resident size with the model loaded and everything imported.
* agreement: each side returns the values it computed (losses, gradient norms); they are compared before any ratio is shown,
  in runs of their own whose learning rate is 0. Both sides then hold the same weights in every step, so a difference is a
  difference of the computation, not of the rounding that two optimisers have gathered.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

OURS = "mmalign"
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1")
ENVIRONMENT = {**ONE_THREAD, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1",
               "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
REPOSITORY = Path(__file__).resolve().parents[2]
CHECKING = "MMALIGN_BENCH_CHECKING"


def learning_rate(rate: float) -> float:
    """``rate``, or 0 in a process that only compares values."""
    return 0.0 if os.environ.get(CHECKING) else rate


@dataclass
class Measurement:
    """What one process saw."""

    seconds: list[float]
    """CPU-seconds of each timed step."""
    peak_bytes: int
    """Peak resident size above the loaded model."""
    values: dict[str, list[float]] = field(default_factory=dict)
    """Numbers that every side must give alike, by name."""
    flop: float = 0.0
    """Floating-point operations of the products no implementation can avoid, per step (0: not counted)."""
    tokens: float = 0.0
    """Tokens per step, for throughput."""


@dataclass(frozen=True)
class Case:
    """One line of work."""

    name: str
    description: str
    bound: str
    """What keeps the figure from being better."""
    targets: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Smallest acceptable (time ratio, memory ratio) by peer."""
    tolerance: float = 1e-5
    """Largest relative difference of the compared values."""
    scales: Mapping[str, float] = field(default_factory=dict)
    """Size of the summands of a value whose summands cancel: differences are relative to no less than it."""


Side = Callable[[Case, int], Measurement]
"""``(case, timed steps) -> measurement``, run in a fresh process."""


@dataclass(frozen=True)
class Bench:
    """A script's work: sides by name, ours under :data:`OURS`, peers in the order of the table."""

    name: str
    title: str
    cases: tuple[Case, ...]
    sides: Mapping[str, Side]
    checks: Mapping[str, Side] = field(default_factory=dict)
    """Sides to compare values with when the timed ones draw their own random numbers; default: all sides, with
    :func:`learning_rate` at 0."""
    unit: str = "s/step"


@dataclass
class Row:
    """One peer against ours on one case."""

    bench: str
    case: str
    peer: str
    peer_seconds: tuple[float, float]
    """Median and minimum."""
    our_seconds: tuple[float, float]
    peer_bytes: int
    our_bytes: int
    difference: float
    """Largest relative difference of the compared values; NaN when there are none."""
    agrees: bool
    target: tuple[float, float] | None
    rate: float
    """Our GFLOP/s over the unavoidable products."""
    bound: str
    """What keeps our figure from being better."""
    load: float = 0.0
    """Load average of the machine at the end of the case."""

    @property
    def time_ratio(self) -> tuple[float, float]:
        """Peer over ours: of medians, of minima."""
        return self.peer_seconds[0] / self.our_seconds[0], self.peer_seconds[1] / self.our_seconds[1]

    @property
    def memory_ratio(self) -> float:
        """Peer over ours."""
        return self.peer_bytes / max(self.our_bytes, 1)

    @property
    def reached(self) -> bool:
        """Whether both ratios are at least their targets."""
        return self.target is None or (self.time_ratio[0] >= self.target[0] and self.memory_ratio >= self.target[1])


class Meter:
    """Marks the end of every step; the first mark ends the warm-up."""

    def __init__(self) -> None:
        self.marks: list[float] = []
        self.base = 0
        self.peak = 0

    def model_loaded(self) -> None:
        """Take what is resident now as the base, and forget earlier peaks."""
        self.base = psutil.Process().memory_info().rss
        reset_peak()

    def mark(self) -> None:
        """A step has ended."""
        self.marks.append(time.process_time())
        self.peak = peak_resident()

    def measurement(self, **fields: object) -> Measurement:
        """Steps after the warm-up."""
        seconds = [after - before for before, after in zip(self.marks, self.marks[1:], strict=False)]
        return Measurement(seconds, max(0, self.peak - self.base), **fields)  # type: ignore[arg-type]


def reset_peak() -> None:
    """Start a new peak of the resident size (Linux; elsewhere the peak of the whole process counts)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_resident() -> int:
    """Largest resident size since :func:`reset_peak`, in bytes."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


# -- running -----------------------------------------------------------------------------------------------------------


def run_side(script: Path, side: str, case: str, steps: int, *, check: bool = False) -> Measurement:
    """Run one side of one case in a fresh process and read its measurement."""
    with tempfile.TemporaryDirectory(prefix="mmalign-bench-") as folder:
        out = Path(folder) / "measurement.json"
        command = [sys.executable, str(script), "--side", side, "--case", case, "--steps", str(steps), "--out", str(out)]
        command += ["--check"] if check else []
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(REPOSITORY), "MMALIGN_BENCH_FOLDER": folder,
                       CHECKING: "1" if check else ""}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder, check=False)
        if done.returncode or not out.is_file():
            raise RuntimeError(f"{script.name}: side {side!r} of case {case!r} failed:\n{done.stderr[-4000:]}")
        return Measurement(**json.loads(out.read_text()))


def compare(bench: Bench, case: Case, script: Path, *, rounds: int, steps: int, say: Callable[[str], None]) -> list[Row]:
    """All sides of a case in turns, and one row per peer."""
    found: dict[str, list[Measurement]] = {side: [] for side in bench.sides}
    for number in range(rounds):
        order = list(bench.sides) if number % 2 == 0 else list(bench.sides)[::-1]
        for side in order:
            measurement = run_side(script, side, case.name, steps)
            found[side].append(measurement)
            say(f"{bench.name}/{case.name} round {number + 1} {side}: median {statistics.median(measurement.seconds):.4g} "
                f"{bench.unit}, peak +{measurement.peak_bytes / 2**20:.0f} MiB, load {os.getloadavg()[0]:.1f}")
    checked = {side: run_side(script, side, case.name, 3, check=True).values for side in bench.checks or bench.sides}
    ours = found[OURS]
    our_seconds, our_bytes = summary(ours)
    rows = []
    for peer in bench.sides:
        if peer == OURS:
            continue
        seconds, size = summary(found[peer])
        worst = difference(checked.get(peer, {}), checked.get(OURS, {}), case.scales)
        rows.append(Row(
            bench.name, case.name, peer, seconds, our_seconds, size, our_bytes, worst,
            not worst > case.tolerance, case.targets.get(peer), ours[0].flop / our_seconds[0] / 1e9, case.bound,
            os.getloadavg()[1],
        ))
    return rows


def summary(runs: Sequence[Measurement]) -> tuple[tuple[float, float], int]:
    """((median, minimum) seconds over all steps, median peak) of several processes."""
    seconds = [value for run in runs for value in run.seconds]
    return (statistics.median(seconds), min(seconds)), int(statistics.median(run.peak_bytes for run in runs))


def difference(
    left: Mapping[str, Sequence[float]], right: Mapping[str, Sequence[float]], scales: Mapping[str, float],
) -> float:
    """Largest relative difference of the values both sides report; NaN when they share none."""
    worst = float("nan")
    for name in left.keys() & right.keys():
        if len(left[name]) != len(right[name]):
            raise RuntimeError(f"{name!r}: {len(left[name])} values against {len(right[name])}")
        for a, b in zip(left[name], right[name], strict=True):
            gap = abs(a - b) / max(abs(a), abs(b), scales.get(name, 1e-12))
            worst = gap if worst != worst else max(worst, gap)
    return worst


def save_rows(rows: Sequence[Row], path: Path) -> None:
    """Write rows as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1))


def load_rows(path: Path) -> list[Row]:
    """Rows that :func:`save_rows` wrote."""
    rows = []
    for entry in json.loads(path.read_text()):
        pairs = {name: tuple(entry[name]) for name in ("peer_seconds", "our_seconds")}
        target = None if entry["target"] is None else tuple(entry["target"])
        rows.append(Row(**{**entry, **pairs, "target": target}))
    return rows


# -- showing -----------------------------------------------------------------------------------------------------------


def table(title: str, rows: Sequence[Row], unit: str) -> Table:
    """A rich table of rows."""
    shown = Table(title=title, title_justify="left")
    for column in ("case", "peer", f"peer {unit}\nmedian (min)", f"ours {unit}\nmedian (min)", "time ratio\nmedian (min)",
                   "peer MiB", "ours MiB", "memory\nratio", "target", "values\ndiffer by", "ours\nGFLOP/s", "bound by"):
        shown.add_column(column, justify="left" if column in ("case", "peer", "bound by") else "right",
                         overflow="fold")
    for row in rows:
        shown.add_row(*cells(row))
    return shown


def cells(row: Row) -> list[str]:
    """The cells of a row, in the order of :func:`table`."""
    ratio, fastest = row.time_ratio
    target = "" if row.target is None else f"{row.target[0]:g}x / {row.target[1]:g}x {'ok' if row.reached else 'missed'}"
    agreement = "not compared" if row.difference != row.difference else f"{row.difference:.1e}"
    return [
        row.case, row.peer, f"{row.peer_seconds[0]:.3g} ({row.peer_seconds[1]:.3g})",
        f"{row.our_seconds[0]:.3g} ({row.our_seconds[1]:.3g})", f"{ratio:.2f} ({fastest:.2f})",
        f"{row.peer_bytes / 2**20:.0f}", f"{row.our_bytes / 2**20:.0f}", f"{row.memory_ratio:.2f}", target,
        agreement if row.agrees else f"{agreement} DISAGREE", f"{row.rate:.0f}" if row.rate else "", row.bound,
    ]


def machine() -> dict[str, str]:
    """Where and with what the figures were taken."""
    model = next((line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
                 platform.processor())
    names = ("torch", "transformers", "trl", "peft", "accelerate")
    return {
        "date": time.strftime("%Y-%m-%d"), "processor": f"{model}, {os.cpu_count()} cores, one thread used",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB", "python": platform.python_version(),
        **{name: metadata.version(name) for name in names},
        "load at the start": " ".join(f"{value:.1f}" for value in os.getloadavg()),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


# -- command line ------------------------------------------------------------------------------------------------------


def arguments(bench: Bench) -> argparse.Namespace:
    """The options of a bench script."""
    parser = argparse.ArgumentParser(description=bench.title)
    parser.add_argument("--case", choices=[case.name for case in bench.cases], help="only this case")
    parser.add_argument("--rounds", type=int, default=2, help="fresh processes per side")
    parser.add_argument("--steps", type=int, default=5, help="timed steps per process, after one warm-up")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--side", choices=list(bench.sides), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main(bench: Bench, script: str) -> None:
    """Run a bench from the command line, or one side of it as a worker."""
    options = arguments(bench)
    if options.side is not None:
        case = next(case for case in bench.cases if case.name == options.case)
        sides = (options.check and bench.checks) or bench.sides
        options.out.write_text(json.dumps(asdict(sides[options.side](case, options.steps))))
        return
    cases = [case for case in bench.cases if options.case in (None, case.name)]
    console = Console(width=max(Console().width, 170))
    rows = measure(bench, Path(script).resolve(), cases, rounds=options.rounds, steps=options.steps, console=console)
    if options.json is not None:
        save_rows(rows, options.json)
    if any(not row.agrees for row in rows):
        sys.exit("the sides do not compute the same: no ratio counts")


def measure(
    bench: Bench, script: Path, cases: Sequence[Case], *, rounds: int, steps: int, console: Console,
) -> list[Row]:
    """Run the cases, print the table, return its rows."""
    rows = [
        row for case in cases
        for row in compare(bench, case, script, rounds=rounds, steps=steps,
                           say=lambda text: console.print(text, style="dim", highlight=False))
    ]
    console.print(table(bench.title, rows, bench.unit))
    return rows
