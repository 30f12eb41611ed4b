"""The report stage: the page of a pipeline as its last step."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from mmalign.config import Options
from mmalign.errors import ConfigError
from mmalign.report.charts import number, plus_minus, signed
from mmalign.report.page import write_report
from mmalign.report.runs import read_run, results
from mmalign.stages import StageContext, StageResult, is_main_process, stage


def results_table(run_dir: Path) -> Table | None:
    """Before, after and difference of every compared evaluation as a terminal table; None when there is none."""
    compared = [result for result in results(read_run(run_dir)) if result.compared]
    if not compared:
        return None
    table = Table("evaluation", "reward", "before", "after", "difference", "in s.e.", show_edge=False)
    for column in table.columns:
        column.overflow = "fold"
    for result in compared:
        table.add_row(result.stage, result.reward, number(result.before), number(result.after),
                      plus_minus(result.difference, result.error), signed(round(result.ratio, 1)))
    return table


class ReportOptions(Options):
    """Options of the report stage."""

    run_dir: str | None = None
    """Run directory to report on; null takes the pipeline this stage belongs to."""


@stage("report", options=ReportOptions, outputs=("report",), reads_run=True)
def report(options: ReportOptions, context: StageContext) -> StageResult:
    """Write the HTML page of a run and print its results."""
    if options.run_dir is None and not context.previous:
        raise ConfigError("run_dir: a report stage with no stage before it must name the run directory to report on")
    run_dir = Path(options.run_dir) if options.run_dir else context.folder.parent
    target = run_dir / "report.html"
    if is_main_process():
        write_report(run_dir, target)
        table = results_table(run_dir)
        if table is not None and not context.quiet:
            Console(stderr=True).print(table)
        context.say(f"report: {target}")
    return StageResult({"report": str(target)})
