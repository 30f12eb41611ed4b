"""The export stage: what ``mmalign export`` does, as a step of a pipeline."""

from __future__ import annotations

from mmalign.hub.export import ExportOptions, export
from mmalign.stages import StageContext, StageResult, is_main_process, stage


@stage("export", options=ExportOptions, outputs=("model", "folder"))
def export_stage(options: ExportOptions, context: StageContext) -> StageResult:
    """Export a model so that the plain Hugging Face library loads it, and check that it reproduces the trained one."""
    output = options.output or str(context.folder / "model")
    options = options.model_copy(update={"output": output, "overwrite": options.overwrite or options.output is None})
    metrics: dict[str, float] = {}
    if is_main_process():
        report = export(options)
        context.say(report.summary())
        if report.gap is not None:
            metrics["gap"] = report.gap.absolute
    return StageResult({"model": output, "folder": str(context.folder)}, metrics)
