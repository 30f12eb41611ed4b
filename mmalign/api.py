"""Run configurations from Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmalign.stages import Plan


def run(
    config: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), *, run_dir: str | None = None, quiet: bool = False,
) -> dict[str, dict[str, Any]]:
    """Run a configuration file or tree, as ``mmalign run`` does; returns the manifest of every stage by name.

    >>> import mmalign
    >>> mmalign.run("configs/text/sft.yaml", ["steps=20"])  # doctest: +SKIP

    Raises ConfigError, DataError, ... before any work when something in the configuration is wrong.
    """
    from mmalign.stages import load_plan, make_plan

    if isinstance(config, Mapping):
        tree = dict(config)
        if run_dir is not None:
            tree["run_dir"] = run_dir
        from mmalign.config import apply_overrides

        plan = make_plan(apply_overrides(tree, overrides), config_folder=Path.cwd())
    else:
        plan = load_plan(config, overrides, run_dir=run_dir)
    return execute(plan, quiet=quiet)


def execute(plan: Plan, *, quiet: bool = False, only: str | None = None) -> dict[str, dict[str, Any]]:
    """Run a plan and write the page of its run directory; returns the manifest of every stage by name."""
    from mmalign.report import write_report
    from mmalign.stages import is_main_process, run_plan

    manifests = run_plan(plan, quiet=quiet, only=only)
    if is_main_process():
        write_report(plan.run_dir)
    return manifests
