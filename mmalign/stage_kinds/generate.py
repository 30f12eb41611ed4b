"""The generate stage."""

from __future__ import annotations

import shutil

from mmalign.core.seeding import generator
from mmalign.data.loading import load_rows
from mmalign.policies.base import Policy
from mmalign.policies.loading import load_policy
from mmalign.stage_kinds.records import sample_records, save_records
from mmalign.stage_kinds.sampling import SampledOptions, sampling_for
from mmalign.stages import StageContext, StageResult, stage
from mmalign.training.checkpoint import atomic_folder
from mmalign.training.tracking import ProgressBar


class GenerateOptions(SampledOptions):
    """Options of the generate stage."""

    prompts_per_chunk: int = 64
    """Prompts sampled and written together; a killed stage resumes at the first chunk not written."""


@stage("generate", options=GenerateOptions, outputs=("data", "folder"))
def generate(options: GenerateOptions, context: StageContext) -> StageResult:
    """Sample completions or images for every prompt and keep them as a data set."""
    from datasets import concatenate_datasets, load_from_disk

    rows = load_rows(options.data, seed=context.seed)
    chunks = [range(start, min(start + options.prompts_per_chunk, len(rows)))
              for start in range(0, len(rows), options.prompts_per_chunk)]
    parts = context.folder / "parts"
    policy: Policy | None = None
    with ProgressBar(context.name, len(chunks), quiet=context.quiet) as bar:
        for number, chunk in enumerate(chunks):
            target = parts / f"{number:05d}"
            if not target.exists():
                policy = policy or load_policy(options.model)
                examples = [rows[i] for i in chunk]
                rollout = policy.sample(
                    [example["prompt"] for example in examples], options.completions_per_prompt,
                    sampling_for(policy, options.sampling), generator(context.seed, context.name, "sampling", number),
                )
                records = sample_records(rollout, examples, first_group=chunk.start)
                with atomic_folder(target) as folder:
                    save_records(records, folder)
            bar.update(number + 1, {})
    data = context.folder / "data"
    joined = concatenate_datasets([load_from_disk(str(parts / f"{number:05d}")) for number in range(len(chunks))])
    with atomic_folder(data) as folder:
        joined.save_to_disk(str(folder))
    shutil.rmtree(parts, ignore_errors=True)
    return StageResult({"data": str(data), "folder": str(context.folder)}, {"samples": float(len(joined))})
