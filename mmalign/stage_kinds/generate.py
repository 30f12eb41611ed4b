"""The generate stage."""

from __future__ import annotations

from typing import Any

from mmalign.core.seeding import generator
from mmalign.data.loading import load_rows
from mmalign.policies.base import Policy
from mmalign.policies.loading import load_policy
from mmalign.stage_kinds.records import Chunk, sample_records, write_in_chunks
from mmalign.stage_kinds.sampling import SampledOptions, sampling_for
from mmalign.stages import StageContext, StageResult, stage


class GenerateOptions(SampledOptions):
    """Options of the generate stage."""

    prompts_per_chunk: int = 64
    """Prompts sampled and written together; a killed stage resumes at the first chunk not written."""


@stage("generate", options=GenerateOptions, outputs=("data", "folder"))
def generate(options: GenerateOptions, context: StageContext) -> StageResult:
    """Sample completions or images for every prompt and keep them as a data set."""
    rows = load_rows(options.data, seed=context.seed)
    policy: Policy | None = None

    def sample(examples: list[dict[str, Any]], chunk: range) -> Chunk:
        nonlocal policy
        policy = policy or load_policy(options.model)
        number = chunk.start // options.prompts_per_chunk
        rollout = policy.sample(
            [example["prompt"] for example in examples], options.completions_per_prompt,
            sampling_for(policy, options.sampling), generator(context.seed, context.name, "sampling", number),
        )
        return sample_records(rollout, examples, first_group=chunk.start), {}

    data, numbers = write_in_chunks(context, rows, sample, size=options.prompts_per_chunk)
    return StageResult({"data": str(data), "folder": str(context.folder)}, {"samples": numbers["rows"]})
