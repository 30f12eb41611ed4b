"""Trains Frozen Lake policies with SFT, IFT, DPO and ORPO: ``python scripts/frozen_lake.py [FOLDER] [--linear]``.

Prints a table and writes ``frozen_lake.png`` and ``frozen_lake.csv`` to FOLDER (default ``runs/frozen_lake``).
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from mmalign.metrics.statistics import mean_and_error
from text_llm.evaluation.frozen_lake import METHODS, compare_on_lake, draw_comparison


def main(arguments: list[str]) -> None:
    """Run the comparison over six seeds."""
    places = [argument for argument in arguments if not argument.startswith("--")]
    folder = Path(places[0] if places else "runs/frozen_lake")
    results = compare_on_lake(seeds=6, hidden=0 if "--linear" in arguments else 32)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "frozen_lake.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["method", "seed", "off_path", "error", "reaches_goal"])
        goal = max(state for result in results for state in range(len(result.policy)))
        writer.writerows([r.method, r.seed, r.off_path, r.error, r.walk[-1] == goal] for r in results)
    draw_comparison(results, folder / "frozen_lake.png")
    print(f"{'method':8} {'off-path probability':>22} {'squared error':>18}")
    for method in METHODS:
        mine = [result for result in results if result.method == method]
        off, error = mean_and_error([r.off_path for r in mine]), mean_and_error([r.error for r in mine])
        print(f"{method:8} {off.mean:14.4f} ± {off.error:.4f} {error.mean:11.4f} ± {error.error:.4f}")
    print(folder / "frozen_lake.png")


if __name__ == "__main__":
    main(sys.argv[1:])
