"""An SFT step on prompts and completions with long-tailed lengths: TRL's SFTTrainer, and full logits, against ours."""

from __future__ import annotations

import library
import trl_side
import workload
from dpo import padded
from harness import OURS, Bench, Case, Measurement, Meter, learning_rate, main

RATE = 1e-5
ROWS = 64

FOUR = Case(
    "4 rows", "4 rows a step, median 30 + 30 words, long tail",
    "AdamW over 15.7 M parameters and the head's products; few tokens a step",
    {"TRL": (2.5, 3.0), "full logits": (1.2, 1.5)},
)
EIGHT = Case(
    "8 rows", "8 rows a step, same lengths",
    "the head's products over the scored positions, then AdamW",
    {"TRL": (2.5, 3.0), "full logits": (1.2, 1.5)},
)
SIZES = {"4 rows": 4, "8 rows": 8}


def work(case: Case, steps: int) -> dict[str, float]:
    """Mean tokens and operations of a timed step."""
    rows, size = workload.completion_rows(ROWS), SIZES[case.name]
    order = workload.visiting_order(ROWS, size * (steps + 1))[size:]
    prompt, completion = (sum(len(rows[i][name].split()) for i in order) / steps for name in ("prompt", "completion"))
    scored = completion + size
    return {"tokens": prompt + scored, "flop": workload.flop(prompt + scored, scored, body_passes=3, head_passes=4)}


def ours(case: Case, steps: int) -> Measurement:
    """Method ``sft`` of the library."""
    tree = {
        "model": {"path": str(workload.model_folder())},
        "data": {"path": str(workload.write_rows(workload.completion_rows(ROWS)))},
        "batch": {"examples_per_update": SIZES[case.name]}, "optimizers": [{"lr": learning_rate(RATE)}], "precision": "float32",
    }
    return library.train("sft", tree, steps=steps, **work(case, steps))


def trl(case: Case, steps: int) -> Measurement:
    """TRL's trainer on the same batches."""
    from trl import SFTConfig, SFTTrainer

    meter = Meter()
    rows, size = workload.completion_rows(ROWS), SIZES[case.name]
    order = workload.visiting_order(ROWS, size * (steps + 1))
    model, tokenizer = trl_side.load(workload.model_folder(), meter)
    arguments = SFTConfig(**trl_side.common_arguments(steps, size, learning_rate(RATE)), max_length=1024, shuffle_dataset=False,
                          train_sampling_strategy="sequential")
    trainer = SFTTrainer(model, args=arguments, train_dataset=trl_side.as_dataset([rows[i] for i in order]),
                         processing_class=tokenizer, callbacks=[trl_side.StepMarks(meter)])
    return trl_side.run(trainer, meter)


def full_logits(case: Case, steps: int) -> Measurement:
    """What one writes by hand: padded rows, the model's own logits and ``cross_entropy``."""
    import torch

    meter = Meter()
    rows, size = workload.completion_rows(ROWS), SIZES[case.name]
    order = workload.visiting_order(ROWS, size * (steps + 1))
    model, tokenizer = trl_side.load(workload.model_folder(), meter)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate(RATE), weight_decay=0.0, fused=True)
    losses, norms = [], []
    for step in range(steps + 1):
        batch = [rows[i] for i in order[step * size : (step + 1) * size]]
        ids, mask, scored = padded(tokenizer, [(row["prompt"], row["completion"]) for row in batch])
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        labels = ids.masked_fill(scored == 0, -100)[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        meter.mark()
    return meter.measurement(values={"loss": losses, "grad_norm": norms})


BENCH = Bench("sft", "SFT step, full fine-tuning, completion-only loss", (FOUR, EIGHT),
              {OURS: ours, "TRL": trl, "full logits": full_logits})

if __name__ == "__main__":
    main(BENCH, __file__)
