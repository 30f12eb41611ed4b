"""Sampling 16 completions of 64 tokens: ``model.generate`` of transformers against our rollout engine.

The values compared are the greedy tokens, which both must choose alike.
"""

from __future__ import annotations

from typing import Any

import trl_side
import workload
from harness import OURS, Bench, Case, Measurement, Meter, main

NEW_TOKENS = 64

DISTINCT = Case(
    "16 prompts", "16 prompts of 40-80 words, one completion each",
    "the head product [16, 256] x [256, 49152] and one softmax a token; the body's Python overhead",
    {"transformers": (1.4, 1.0)},
)
GROUPS = Case(
    "2 prompts x 8", "2 prompts of 40-80 words, 8 completions each (a GRPO rollout)",
    "the same; the prompt is encoded once a group",
    {"transformers": (1.4, 1.0)},
)
SHAPES = {"16 prompts": (16, 1), "2 prompts x 8": (2, 8)}


def prompts_of(case: Case, step: int) -> list[str]:
    """The prompts of a step."""
    return [row["prompt"] for row in workload.prompt_rows(SHAPES[case.name][0], (40, 80), seed=step)]


def work(case: Case) -> dict[str, float]:
    """Tokens and operations of a step."""
    prompts, _ = SHAPES[case.name]
    new = 16 * NEW_TOKENS
    return {"tokens": new, "flop": workload.flop(prompts * 60 + new, new, body_passes=1, head_passes=1)}


def ours(case: Case, steps: int) -> Measurement:
    """The policy's ``sample``."""
    import torch

    torch.set_num_threads(1)
    from mmalign.policies.base import TextSampling
    from mmalign.policies.causal_lm import CausalLMPolicy

    meter = Meter()
    policy = CausalLMPolicy.from_pretrained(workload.model_folder(), device="cpu")
    meter.model_loaded()
    sampling = TextSampling(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, temperature=1.0)
    generator = torch.Generator().manual_seed(0)
    _, copies = SHAPES[case.name]
    for step in range(steps + 1):
        policy.sample(prompts_of(case, step), copies, sampling, generator)
        meter.mark()
    measured = meter.measurement(**work(case))
    greedy = sampling.model_copy(update={"temperature": 0.0})
    rollout = policy.sample(prompts_of(case, 0), 1, greedy, generator)
    measured.values = {"greedy": [float(i) for ids, labels in zip(rollout.rows["input_ids"], rollout.rows["labels"], strict=True)
                                  for i, label in zip(ids, labels, strict=True) if label != -100]}
    return measured


def transformers(case: Case, steps: int) -> Measurement:
    """``generate`` on left-padded prompts, every prompt repeated for its completions, as TRL calls it."""
    import torch

    meter = Meter()
    model, tokenizer = trl_side.load(workload.model_folder(), meter)
    model.eval()
    _, copies = SHAPES[case.name]

    def generate(step: int, copies: int, **options: Any) -> Any:
        batch = tokenizer([p for p in prompts_of(case, step) for _ in range(copies)], return_tensors="pt", padding=True,
                          padding_side="left", return_token_type_ids=False)
        with torch.no_grad():
            output = model.generate(**batch, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, **options)
        return output[:, batch["input_ids"].shape[1] :]

    for step in range(steps + 1):
        generate(step, copies, do_sample=True, top_k=0, top_p=1.0, temperature=1.0)
        meter.mark()
    measured = meter.measurement()
    measured.values = {"greedy": [float(token) for token in generate(0, 1, do_sample=False).flatten()]}
    return measured


BENCH = Bench("generation", "Sampling 16 x 64 tokens, V = 49152", (DISTINCT, GROUPS),
              {OURS: ours, "transformers": transformers}, unit="s/batch")

if __name__ == "__main__":
    main(BENCH, __file__)
