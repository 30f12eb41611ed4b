"""Which parameters learn, and how: full fine-tuning, every PEFT type, and modes that act between backward and step."""

from mmalign.training.tuning.base import TUNINGS, FullTuning, Tuning, TuningOptions, make_tuning, tuning
from mmalign.training.tuning.peft import PeftTuning

__all__ = ["TUNINGS", "FullTuning", "PeftTuning", "Tuning", "TuningOptions", "make_tuning", "tuning"]
