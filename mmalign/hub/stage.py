"""The export stage: what ``mmalign export`` does, as a step of a pipeline."""

from __future__ import annotations

from pydantic import Field

from mmalign.hub.export import ExportOptions, Kind, export
from mmalign.stages import StageContext, StageResult, is_main_process, stage


class ExportStageOptions(ExportOptions):
    """Options of the export stage."""

    kind: Kind = Field(default="auto", validation_alias="format")
    """Target kind, written ``format`` in a pipeline, where ``kind`` names the stage."""


@stage("export", options=ExportStageOptions, outputs=("model", "folder"))
def export_stage(options: ExportStageOptions, context: StageContext) -> StageResult:
    """Export a model so that the plain Hugging Face library loads it, and check that it reproduces the trained one."""
    output = options.output or str(context.folder / "model")
    metrics: dict[str, float] = {}
    if is_main_process():
        report = export(options.model_copy(update={"output": output, "overwrite": options.overwrite or options.output is None}))
        context.say(report.summary())
        if report.gap is not None:
            metrics["gap"] = report.gap.absolute
    return StageResult({"model": output, "folder": str(context.folder)}, metrics)
