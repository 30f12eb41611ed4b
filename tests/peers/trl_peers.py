"""TRL trainers and our objectives on the same model and rows, ready to be compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.core.reduce import reduce
from mmalign.data.chat import TextEncoding
from mmalign.data.rows import Rows
from mmalign.policies.causal_lm import CausalLMPolicy
from mmalign.training.objective import Objective, TrainState, UpdateBatch

RELATIVE = 1e-5
"""Agreement asked of losses in float32."""

PAIRS = [
    {"prompt": "What is the answer of 12 and 7", "chosen": " The answer is 19", "rejected": " The answer is only 5, no."},
    {"prompt": "How many are left", "chosen": " 3 are left now", "rejected": " yes"},
    {"prompt": "Tom has 4. How many has Tom now", "chosen": " The number is 4.", "rejected": " Tom has 11 or 12 of them"},
    {"prompt": "Answer with yes or no: 2 is 2", "chosen": " yes", "rejected": " no, that is a number"},
]
COMPLETIONS = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]


def as_messages(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    """A row of strings as a conversation."""
    return {name: [{"role": "user" if name == "prompt" else "assistant", "content": text.strip()}]
            for name, text in row.items()}


def load_model(folder: Path, *, noise: float = 0.0) -> Any:
    """The model; with ``noise`` a neighbour of it, the same for every caller."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if noise:
        perturb(model, noise)
    return model


@torch.no_grad()
def perturb(model: nn.Module, noise: float) -> None:
    """Add noise that depends on the order of the parameters alone."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(noise * torch.randn(parameter.shape, generator=generator))


def load_policy(folder: Path, *, noise: float = 0.0, layout: Any = "auto", **encoding: Any) -> CausalLMPolicy:
    """Our policy around :func:`load_model`."""
    from transformers import AutoTokenizer

    return CausalLMPolicy(load_model(folder, noise=noise), AutoTokenizer.from_pretrained(folder),
                          encoding=TextEncoding(**encoding), layout=layout)


def tokenizer(folder: Path) -> Any:
    """The tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def dataset(rows: Sequence[dict[str, Any]]) -> Any:
    """Rows as a data set."""
    from datasets import Dataset

    return Dataset.from_list(list(rows))


def arguments(folder: Path, rows: int) -> dict[str, Any]:
    """Arguments of every TRL trainer here: float32 on the CPU, the whole data set in one batch, rows in order."""
    return {"output_dir": str(folder), "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none",
            "save_strategy": "no", "disable_tqdm": True, "per_device_train_batch_size": rows}


def encoded(policy: CausalLMPolicy, rows: Sequence[dict[str, Any]], fields: tuple[str, ...] = ()) -> Rows:
    """Rows as the data experience hands them to an objective."""
    examples, report = policy.prepare_dataset(rows, fields=fields)
    assert report.kept == len(rows)
    return policy.encode_rows(list(examples))


def our_loss(objective: Objective, rows: Rows, *, micro_batches: int = 1) -> Tensor:
    """The loop's loss of one update: every term over its own global denominator, summed over micro-batches."""
    state = TrainState(seed=0, total_steps=1)
    update = UpdateBatch({"train": rows})
    shared = objective.prepare(update, state)
    denominators = objective.counts(update)
    total = torch.zeros(())
    for index in torch.arange(len(rows)).tensor_split(micro_batches):
        terms, _ = objective.loss(update.take({"train": index}), shared, state)
        for term in terms:
            total = total + term.weight * reduce(term.values, term.mask, how=term.reduction, denominator=denominators[term.name],
                                                 norm_length=term.norm_length)
    return total


def assert_close(ours: Tensor | float, theirs: Tensor | float, *, relative: float = RELATIVE, scale: float = 0.0) -> None:
    """Equal up to ``relative`` times the larger of the value and ``scale`` (the size of summands that cancel)."""
    a, b = (float(value.detach()) if isinstance(value, Tensor) else value for value in (ours, theirs))
    assert abs(a - b) <= relative * max(abs(a), abs(b), scale), f"ours {a!r}, TRL {b!r}"


def assert_same_gradients(ours: nn.Module, theirs: nn.Module, *, relative: float = RELATIVE) -> None:
    """Every trainable parameter has the same gradient, relative to the largest entry of the tensor."""
    mine = {strip(name): p for name, p in ours.named_parameters() if p.requires_grad}
    other = {strip(name): p for name, p in theirs.named_parameters() if p.requires_grad}
    assert mine.keys() == other.keys()
    assert mine
    for name, parameter in mine.items():
        assert parameter.grad is not None
        assert other[name].grad is not None
        gap = (parameter.grad - other[name].grad).abs().max()
        assert float(gap) <= relative * max(float(other[name].grad.abs().max()), 1e-6), f"{name}: {gap}"


def strip(name: str) -> str:
    """A parameter's name without wrappers."""
    return name.removeprefix("module.")
