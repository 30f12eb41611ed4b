"""Seconds until a command line answers, and what an import costs: CPU-seconds of fresh processes."""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
from dataclasses import dataclass

from harness import ENVIRONMENT, REPOSITORY
from rich.console import Console
from rich.table import Table

COMMANDS: dict[str, tuple[list[str], float | None]] = {
    "python -m mmalign --help": (["-m", "mmalign", "--help"], 1.5),
    "import mmalign": (["-c", "import mmalign"], 0.3),
    "mmalign: everything a DPO run imports": (["-c", "import text_llm; text_llm.register(); import mmalign.training.loop, "
                                               "mmalign.policies.causal_lm, peft, datasets, accelerate"], None),
    "trl --help": (["-c", "import sys; sys.argv = ['trl', '--help']; from trl.cli import main; main()"], None),
    "import trl": (["-c", "import trl"], None),
    "from trl import DPOTrainer": (["-c", "from trl import DPOTrainer"], None),
    "python -c pass": (["-c", "pass"], None),
}
"""Arguments of the interpreter, and the largest acceptable CPU-seconds."""


@dataclass
class Start:
    """One command."""

    command: str
    median: float
    fastest: float
    target: float | None

    @property
    def reached(self) -> bool:
        """Whether the median is within the target."""
        return self.target is None or self.median <= self.target


def seconds(arguments: list[str]) -> float:
    """CPU-seconds (user + system) of one fresh interpreter; raises when the command fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *arguments], env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)},
                          capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"python {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(rounds: int) -> list[Start]:
    """All commands in turns; the first round only fills the file cache."""
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(rounds + 1):
        for name, (arguments, _) in COMMANDS.items():
            value = seconds(arguments)
            if number:
                taken[name].append(value)
    return [Start(name, statistics.median(values), min(values), COMMANDS[name][1]) for name, values in taken.items()]


def cells(start: Start) -> list[str]:
    """The cells of a command."""
    target = "" if start.target is None else f"< {start.target:g} {'ok' if start.reached else 'missed'}"
    return [start.command, f"{start.median:.2f}", f"{start.fastest:.2f}", target]


def show(starts: list[Start], console: Console) -> None:
    """Print the table."""
    table = Table("command", "CPU s, median", "min", "target", title="Start-up", title_justify="left")
    for start in starts:
        table.add_row(*cells(start))
    console.print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    show(measure(parser.parse_args().rounds), Console())
