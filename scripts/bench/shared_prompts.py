"""What it saves to compute the tokens of a prompt once for the eight completions of its group, against the prompt's length.

Both sides are ours: one shares the prompt, the other repeats it for every completion, as rows of a padded batch. The values
compared are losses and gradient norms (scoring) and greedy tokens (sampling), which sharing must not change.
"""

from __future__ import annotations

from typing import Any, Literal

import workload
from harness import OURS, Bench, Case, Measurement, Meter, main

GROUPS, COPIES, NEW_TOKENS = 2, 8, 32
LENGTHS = (32, 128, 512)
ALONE = "repeated"


def case_of(kind: str, length: int) -> Case:
    """A line of the table."""
    tokens = f"{GROUPS} prompts of {length} words x {COPIES} completions of {NEW_TOKENS} tokens"
    if kind == "scoring":
        bound = "body passes over every distinct token, head passes over the completions"
        return Case(f"scoring, {length}", f"forward and backward of log-probs, {tokens}", bound, {ALONE: (1.0, 1.0)})
    return Case(f"sampling, {length}", f"a rollout, {tokens}", "decoding, which is the same on both sides; prompts once a group",
                {ALONE: (0.95, 0.95)})


CASES = tuple(case_of(kind, length) for kind in ("scoring", "sampling") for length in LENGTHS)


def side(case: Case, steps: int, *, share: bool) -> Measurement:
    """Either side."""
    import torch

    torch.set_num_threads(1)
    from mmalign.policies.causal_lm import CausalLMPolicy

    kind, length = case.name.split(", ")
    layout: Literal["auto", "padded"] = "auto" if share else "padded"
    meter = Meter()
    policy = CausalLMPolicy.from_pretrained(workload.model_folder(), device="cpu", layout=layout)
    meter.model_loaded()
    if kind == "scoring":
        return _scoring(policy, int(length), steps, meter)
    return _sampling(policy, int(length), steps, meter, share)


def _scoring(policy: Any, length: int, steps: int, meter: Meter) -> Measurement:
    import torch

    losses, norms = [], []
    for step in range(steps + 1):
        prompts = workload.prompt_rows(GROUPS, (length, length), seed=step)
        answers = workload.prompt_rows(GROUPS * COPIES, (NEW_TOKENS, NEW_TOKENS), seed=1000 + step)
        pairs = [(prompts[i // COPIES]["prompt"], " " + answer["prompt"]) for i, answer in enumerate(answers)]
        rows = policy.encode_rows(policy.prepare_dataset([{"prompt": p, "completion": c} for p, c in pairs])[0])
        weights = torch.randn(len(rows), 1, generator=torch.Generator().manual_seed(step))
        loss = (policy.log_probs(rows).logp * weights).sum() / (len(rows) * NEW_TOKENS)
        loss.backward()
        norms.append(float(torch.stack([p.grad.norm() for p in policy.module.parameters()]).norm()))
        losses.append(float(loss.detach()))
        policy.module.zero_grad(set_to_none=True)
        meter.mark()
    scored = GROUPS * COPIES * NEW_TOKENS
    return meter.measurement(values={"loss": losses, "grad_norm": norms}, tokens=scored,
                             flop=workload.flop(GROUPS * length + scored, scored, body_passes=3, head_passes=4))


def _sampling(policy: Any, length: int, steps: int, meter: Meter, share: bool) -> Measurement:
    import torch

    from mmalign.policies.base import TextSampling

    sampling = TextSampling(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, temperature=1.0)
    generator = torch.Generator().manual_seed(0)

    def sample(step: int, options: TextSampling) -> Any:
        prompts = [row["prompt"] for row in workload.prompt_rows(GROUPS, (length, length), seed=step)]
        if share:
            return policy.sample(prompts, COPIES, options, generator)
        return policy.sample([prompt for prompt in prompts for _ in range(COPIES)], 1, options, generator)

    for step in range(steps + 1):
        sample(step, sampling)
        meter.mark()
    new = GROUPS * COPIES * NEW_TOKENS
    measured = meter.measurement(tokens=new, flop=workload.flop(GROUPS * length + new, new, body_passes=1, head_passes=1))
    rows = sample(0, sampling.model_copy(update={"temperature": 0.0})).rows
    measured.values = {"greedy": [float(i) for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True)
                                  for i, label in zip(ids, labels, strict=True) if label != -100]}
    return measured


def shared(case: Case, steps: int) -> Measurement:
    """Every prompt once per group."""
    return side(case, steps, share=True)


def repeated(case: Case, steps: int) -> Measurement:
    """Every prompt with every completion."""
    return side(case, steps, share=False)


BENCH = Bench("shared_prompts", f"Prompts shared by {COPIES} completions, against their length", CASES,
              {OURS: shared, ALONE: repeated}, unit="s/batch")

if __name__ == "__main__":
    main(BENCH, __file__)
