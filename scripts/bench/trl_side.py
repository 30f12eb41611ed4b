"""TRL's side of a bench: a trainer as a user would write it, with a callback that marks the end of every step."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from harness import Measurement, Meter
from transformers import TrainerCallback


class StepMarks(TrainerCallback):  # type: ignore[misc]
    """Marks the end of every optimiser step."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The step is over."""
        self.meter.mark()


def common_arguments(steps: int, rows: int, learning_rate: float) -> dict[str, Any]:
    """Arguments that all trainers share: float32 on the CPU, AdamW without decay, constant rate, log every step."""
    folder = os.environ.get("MMALIGN_BENCH_FOLDER", tempfile.mkdtemp(prefix="mmalign-bench-"))
    return {
        "output_dir": str(Path(folder) / "trl"), "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "report_to": "none", "save_strategy": "no", "logging_steps": 1, "max_steps": steps + 1, "disable_tqdm": True,
        "per_device_train_batch_size": rows, "learning_rate": learning_rate, "weight_decay": 0.0,
        "lr_scheduler_type": "constant", "max_grad_norm": 1.0, "seed": 0,
    }


def load(folder: Path, meter: Meter) -> tuple[Any, Any]:
    """Model and tokenizer; the meter's base is taken once both are there."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    meter.model_loaded()
    return model, tokenizer


def as_dataset(rows: Sequence[dict[str, Any]]) -> Any:
    """Rows in memory as a data set."""
    from datasets import Dataset

    return Dataset.from_list(list(rows))


def run(trainer: Any, meter: Meter, **fields: Any) -> Measurement:
    """Train and read the losses and gradient norms off the trainer's log."""
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return meter.measurement(values={name: [float(entry[name]) for entry in log] for name in ("loss", "grad_norm")}, **fields)
