"""The generate stage."""

from __future__ import annotations

from typing import Any

from mmalign.core.seeding import generator
from mmalign.data.loading import load_rows
from mmalign.policies.base import Policy, TextSampling
from mmalign.policies.loading import load_policy
from mmalign.stage_kinds.records import Chunk, sample_records, write_in_chunks
from mmalign.stage_kinds.sampling import SampledOptions, sampling_for
from mmalign.stages import StageContext, StageResult, stage
from mmalign.training.rollout_advantages import mean_per_row


class GenerateOptions(SampledOptions):
    """Options of the generate stage."""

    prompts_per_chunk: int | None = None
    """Prompts sampled and written together; null takes those that are decoded together (sampling.rows_per_forward). A killed
    stage resumes at the first chunk not written, so that only rows that were being decoded are sampled again."""
    mean_logp: bool = False
    """Keep the mean log-probability per action of every sample under the model at the sampling temperature, in the column
    ``mean_logp``."""

    @property
    def chunk_size(self) -> int:
        """Prompts of a chunk, the default filled in."""
        if self.prompts_per_chunk is not None:
            return self.prompts_per_chunk
        together = int(self.sampling.get("rows_per_forward", TextSampling().rows_per_forward))
        return max(1, together // self.completions_per_prompt)

    def model_post_init(self, context: Any, /) -> None:
        """Refuse values without a meaning."""
        super().model_post_init(context)
        if self.prompts_per_chunk is not None and self.prompts_per_chunk < 1:
            raise ValueError(f"prompts_per_chunk must be at least 1, not {self.prompts_per_chunk}")


@stage("generate", options=GenerateOptions, outputs=("data", "folder"))
def generate(options: GenerateOptions, context: StageContext) -> StageResult:
    """Sample completions or images for every prompt and keep them as a data set."""
    rows = load_rows(options.data, seed=context.seed)
    policy: Policy | None = None

    def sample(examples: list[dict[str, Any]], chunk: range) -> Chunk:
        nonlocal policy
        policy = policy or load_policy(options.model)
        number = chunk.start // options.chunk_size
        rollout = policy.sample(
            [example["prompt"] for example in examples], options.completions_per_prompt,
            sampling_for(policy, options.sampling), generator(context.seed, context.name, "sampling", number),
        )
        records = sample_records(rollout, examples, first_group=chunk.start)
        if options.mean_logp:
            means = mean_per_row(rollout.old_logp, rollout.mask)
            records = [{**record, "mean_logp": float(mean)} for record, mean in zip(records, means, strict=True)]
        return records, {}

    data, numbers = write_in_chunks(context, rows, sample, size=options.chunk_size)
    return StageResult({"data": str(data), "folder": str(context.folder)}, {"samples": numbers["rows"]})
