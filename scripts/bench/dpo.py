"""A DPO step: TRL's DPOTrainer, and a plain loop over full logits, against ours."""

from __future__ import annotations

from typing import Any

import library
import trl_side
import workload
from harness import OURS, Bench, Case, Measurement, Meter, learning_rate, main

PAIRS = 2
BETA = 0.1
RATE = 1e-5
ROWS = 64

SHORT = Case(
    "short", "2 pairs; prompt and answers of 80-160 words",
    "the head's matrix products over the scored positions (forward twice, recompute once, two gradients)",
    {"TRL": (2.5, 2.5), "full logits": (1.5, 1.8)},
)
LONG = Case(
    "long prompt", "2 pairs; prompt of 240-300 words, answers of 20-60",
    "the body over the prompt tokens; the head works on one position in six",
    {"TRL": (2.5, 2.5), "full logits": (1.5, 1.8)},
)
LENGTHS = {"short": ((80, 160), (80, 160)), "long prompt": ((240, 300), (20, 60))}


def rows_of(case: Case) -> list[dict[str, str]]:
    """The data set of a case."""
    return workload.preference_rows(ROWS, *LENGTHS[case.name])


def work(case: Case, steps: int) -> dict[str, float]:
    """Mean tokens and operations of a timed step."""
    rows = rows_of(case)
    order = workload.visiting_order(ROWS, PAIRS * (steps + 1))[PAIRS:]
    length = {name: sum(len(rows[i][name].split()) for i in order) / steps for name in ("prompt", "chosen", "rejected")}
    scored = length["chosen"] + length["rejected"] + 2 * PAIRS  # one end token per answer
    tokens = 2 * length["prompt"] + scored
    # Body: policy forward + backward (3) and reference (1); head: forward, recompute, two gradients, and reference.
    return {"tokens": tokens, "flop": workload.flop(tokens, scored, body_passes=4, head_passes=5)}


def ours(case: Case, steps: int) -> Measurement:
    """Method ``dpo`` of the library."""
    tree = {
        "model": {"path": str(workload.model_folder())}, "data": {"path": str(workload.write_rows(rows_of(case)))},
        "batch": {"examples_per_update": PAIRS}, "losses": [{"name": "sigmoid", "beta": BETA}],
        "optimizers": [{"lr": learning_rate(RATE)}], "precision": "float32",
    }
    return library.train("dpo", tree, steps=steps, **work(case, steps))


def trl(case: Case, steps: int) -> Measurement:
    """TRL's trainer on the same batches."""
    from trl import DPOConfig, DPOTrainer

    meter = Meter()
    rows = rows_of(case)
    order = workload.visiting_order(ROWS, PAIRS * (steps + 1))
    model, tokenizer = trl_side.load(workload.model_folder(), meter)
    arguments = DPOConfig(**trl_side.common_arguments(steps, PAIRS, learning_rate(RATE)), beta=BETA, max_length=1024,
                          precompute_ref_log_probs=False, train_sampling_strategy="sequential")
    trainer = DPOTrainer(model, args=arguments, train_dataset=trl_side.as_dataset([rows[i] for i in order]),
                         processing_class=tokenizer, callbacks=[trl_side.StepMarks(meter)])
    return trl_side.run(trainer, meter)


def full_logits(case: Case, steps: int) -> Measurement:
    """What one writes by hand: the model's own logits of padded rows, ``log_softmax``, ``gather``."""
    import copy

    import torch

    meter = Meter()
    rows = rows_of(case)
    order = workload.visiting_order(ROWS, PAIRS * (steps + 1))
    model, tokenizer = trl_side.load(workload.model_folder(), meter)
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate(RATE), weight_decay=0.0, fused=True)
    losses, norms = [], []
    for step in range(steps + 1):
        batch = [rows[i] for i in order[step * PAIRS : (step + 1) * PAIRS]]
        ids, mask, scored = padded(tokenizer, [(row["prompt"], row[name]) for name in ("chosen", "rejected") for row in batch])
        with torch.no_grad():
            base = sequence_log_probs(reference, ids, mask, scored)
        chosen, rejected = (sequence_log_probs(model, ids, mask, scored) - base).chunk(2)
        loss = -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        meter.mark()
    return meter.measurement(values={"loss": losses, "grad_norm": norms})


def padded(tokenizer: Any, pairs: list[tuple[str, str]]) -> tuple[Any, Any, Any]:
    """Right-padded ids, attention mask and completion mask."""
    import torch

    prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in pairs]
    answers = [[*tokenizer(answer)["input_ids"], tokenizer.eos_token_id] for _, answer in pairs]
    width = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    ids, mask, scored = (torch.zeros(len(pairs), width, dtype=torch.long) for _ in range(3))
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        size = len(prompt) + len(answer)
        ids[row, :size], mask[row, :size], scored[row, len(prompt) : size] = torch.tensor(prompt + answer), 1, 1
    return ids, mask, scored


def sequence_log_probs(model: Any, ids: Any, mask: Any, scored: Any) -> Any:
    """Sum of the completion's log-probs per row, from full logits."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    picked = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    return (picked * scored[:, 1:]).sum(1)


BENCH = Bench("dpo", "DPO step, full fine-tuning, reference in memory", (SHORT, LONG),
              {OURS: ours, "TRL": trl, "full logits": full_logits})

if __name__ == "__main__":
    main(BENCH, __file__)
