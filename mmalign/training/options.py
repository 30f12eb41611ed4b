"""The configuration that every training method shares; a method adds its own fields."""

from __future__ import annotations

from mmalign.config import Options
from mmalign.data.loading import DataOptions
from mmalign.policies.loading import ModelOptions
from mmalign.training.ema import EmaOptions
from mmalign.training.evaluation import EvaluationOptions
from mmalign.training.experience import BatchOptions
from mmalign.training.loop import CheckpointOptions, Precision
from mmalign.training.optimizers import OptimizerOptions
from mmalign.training.tracking import TrackingOptions
from mmalign.training.tuning.base import TuningOptions


class TrainOptions(Options):
    """Keys of every ``kind: train`` stage."""

    model: ModelOptions
    """The policy to start from."""
    data: DataOptions
    """Training rows."""
    tuning: TuningOptions = TuningOptions(name="full")
    """Which parameters learn."""
    batch: BatchOptions = BatchOptions()
    """Batch sizes."""
    steps: int | None = None
    """Optimiser updates; exactly one of steps and epochs is set (100 steps when neither is)."""
    epochs: float | None = None
    """Passes over the data set."""
    optimizers: list[OptimizerOptions] = [OptimizerOptions()]
    """Optimiser groups; every trainable parameter belongs to the first whose pattern it fits."""
    precision: Precision = "auto"
    """Autocast of the forward: auto is bfloat16 on CUDA and float32 on CPU."""
    checkpoint: CheckpointOptions = CheckpointOptions()
    """Saving."""
    tracking: TrackingOptions = TrackingOptions()
    """Logging."""
    evaluation: EvaluationOptions | None = None
    """Held-out prompts sampled and rewarded while training."""
    ema: EmaOptions | None = None
    """Exponential moving average of the trained weights, saved instead of them."""

    def model_post_init(self, context: object, /) -> None:
        """Refuse two lengths at once."""
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps and epochs exclude each other; give one")
        for name in ("steps", "epochs"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, not {value}")
