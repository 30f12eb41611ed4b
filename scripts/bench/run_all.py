"""Run every bench in turn and, with ``--write``, put the tables into docs/benchmarks.md."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import dpo
import generation
import grpo
import log_probs
import sft
import shared_prompts
import startup
from harness import REPOSITORY, Bench, Row, cells, load_rows, machine, measure, save_rows, table
from rich.console import Console

BENCHES = (dpo.BENCH, sft.BENCH, grpo.BENCH, generation.BENCH, shared_prompts.BENCH, log_probs.BENCH)
PAGE = REPOSITORY / "docs" / "benchmarks.md"
QUIET = 1.0
"""Load average above which figures are marked as taken on a busy machine."""

INTRODUCTION = """# Benchmarks

Written by `python scripts/bench/run_all.py --write`; every table can be made again with the script of its name in
`scripts/bench/`. Both sides train the same model on the same batches in alternating fresh processes of one thread.

- **Time** is CPU time (user + system) of the process per step, all of it: data, forward, backward, optimiser, logging.
  The median and the minimum over all timed steps; the first step of every process is dropped.
- **Memory** is the largest resident size during those steps above the size with the model loaded. AdamW's moments and
  the gradients (3 x 60 MiB here) are part of it on every side.
- **Values differ by**: largest relative difference of losses and gradient norms between the sides over four steps of other
  runs whose learning rate is 0, so that both hold the same weights. No ratio counts unless it is below 1e-5 in float32.
- **Target** is the smallest time and memory ratio that we accept.
- **Ours GFLOP/s** counts only the matrix products that no implementation can avoid: padding, prompts scored in vain and
  work done twice make it smaller.

The model is a Llama of 15.7 M parameters whose tied vocabulary matrix (49152 x 256) is 80% of it. These are **CPU
figures**. TRL is made for CUDA: there its fused head runs as a Triton kernel on the labelled positions only, while on a
CPU it scores every position and always computes the entropy and further statistics. On a GPU expect a smaller gap.
"""


def page(facts: dict[str, str], benches: list[tuple[Bench, list[Row]]], starts: list[startup.Start]) -> str:
    """The documentation page."""
    lines = [INTRODUCTION, "## Machine", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    for bench, rows in benches:
        lines += [f"## {bench.title}", ""]
        lines += [f"- *{case.name}*: {case.description}. Bound by {case.bound}." for case in bench.cases]
        lines += ["", *markdown(
            ["case", "peer", f"peer {bench.unit}", f"ours {bench.unit}", "time ratio", "peer MiB", "ours MiB", "memory ratio",
             "target", "values differ by", "ours GFLOP/s"], [cells(row)[:-1] for row in rows]), ""]
    lines += ["## Start-up", "", "CPU-seconds of a fresh interpreter.", "",
              *markdown(["command", "median", "min", "target"], [startup.cells(start) for start in starts]), ""]
    return "\n".join(lines)


def markdown(header: list[str], body: list[list[str]]) -> list[str]:
    """A table."""
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *body)]


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes per side")
    parser.add_argument("--steps", type=int, default=5, help="timed steps per process, after one warm-up")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(REPOSITORY)}")
    parser.add_argument("--results", type=Path, help="folder to keep the rows of every bench in; those there are not run again")
    options = parser.parse_args()
    console = Console(width=max(Console().width, 170))
    facts = machine()
    results = []
    for bench in BENCHES:
        kept = None if options.results is None else options.results / f"{bench.name}.json"
        if kept is not None and kept.is_file():
            rows = load_rows(kept)
            console.print(table(bench.title, rows, bench.unit))
        else:
            script = Path(__file__).with_name(f"{bench.name}.py")
            rows = measure(bench, script, bench.cases, rounds=options.rounds, steps=options.steps, console=console)
            if kept is not None:
                save_rows(rows, kept)
        results.append((bench, rows))
    starts = startup.measure(options.rounds)
    startup.show(starts, console)
    load = os.getloadavg()
    facts["load at the end"] = " ".join(f"{value:.1f}" for value in load)
    if load[2] > 1 + QUIET:  # our own process is one
        facts["note"] = "taken while other programs ran on the machine; ratios carry 10-20% noise"
    disagreeing = [f"{row.bench}/{row.case}/{row.peer}" for _, rows in results for row in rows if not row.agrees]
    if disagreeing:
        sys.exit(f"the sides do not compute the same, so nothing was written: {', '.join(disagreeing)}")
    if options.write:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(facts, results, starts), encoding="utf-8")
        console.print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
