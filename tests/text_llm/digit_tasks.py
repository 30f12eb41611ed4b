"""Tasks of one digit, on which forgetting can be seen in seconds: which digit is asked for, and what counts as right.

``a``: the first digit, exactly. ``b`` and ``c``: any digit of the second one's parity. A base model knows ``a``, and answers
``b`` and ``c`` with the second digit or at random. Fine-tuning labels of ``b`` and ``c`` are always 0 or 1: right, and far from
what the base model says by itself.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

REWARDS = '''
def exact(prompts, completions, answer, **columns):
    return [float(text.strip() == truth) for text, truth in zip(completions, answer)]

def parity(prompts, completions, answer, **columns):
    return [float(text.strip() in tuple("0123456789") and int(text.strip()) % 2 == int(truth) % 2 if truth.isdigit() else 0)
            for text, truth in zip(completions, answer)]

exact.range = parity.range = (0, 1)
'''


def rows(
    task: str, count: int, seed: int, *, fixed: bool = False, noise: float = 0.0, hopeless: float = 0.0,
) -> list[dict[str, Any]]:
    """``fixed``: labels 0 and 1. ``noise``: share of random labels. ``hopeless``: share of rows that no answer can satisfy."""
    draw, made = random.Random(f"{task} {seed}"), []
    for number in range(count):
        first, second = draw.randrange(10), draw.randrange(10)
        asked = first if task == "a" else second
        label = draw.randrange(10) if draw.random() < noise else asked % 2 if fixed else asked
        made.append({"id": f"{task}{number}", "prompt": f"{task} {first} {second} =", "completion": str(label), "task": task,
                     "answer": "none" if draw.random() < hopeless else str(asked),
                     "reward_type": "exact" if task == "a" else "metric"})
    return made


def write(file: Path, *parts: list[dict[str, Any]]) -> dict[str, str]:
    """Rows in one file, as a data node."""
    joined = [{**row, "id": str(number)} for number, row in enumerate(row for part in parts for row in part)]
    file.write_text("".join(json.dumps(row) + "\n" for row in joined))
    return {"path": str(file)}


def base_stage(data: dict[str, str], steps: int = 220) -> dict[str, Any]:
    return {"name": "base", "method": "sft", "model": {"path": "asset:tiny_llama"}, "data": data,
            **supervised(steps, 4e-3), "optimizers": [{"lr": 4e-3, "schedule": {"name": "cosine", "warmup": 0.1}}]}


def supervised(steps: int, lr: float) -> dict[str, Any]:
    return {"encoding": {"max_length": 32}, "batch": {"examples_per_update": 16}, "steps": steps, "optimizers": [{"lr": lr}]}


def reinforced(steps: int, lr: float) -> dict[str, Any]:
    return {"batch": {"prompts_per_rollout": 8, "completions_per_prompt": 8}, "steps": steps, "optimizers": [{"lr": lr}]}
