"""Casting what is written to disk, and keeping third-party libraries quiet meanwhile."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mmalign.data.progress import without_transformers_bars


def cast_weights(module: Any, dtype: torch.dtype) -> None:
    """Cast everything that is saved, in place, except what the model's class keeps in float32.

    ``module.to(dtype)`` would also round those parts, and buffers that are recomputed on loading.
    """
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    for name, tensor in module.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and tensor.dtype != dtype and not kept & set(name.split(".")):
            tensor.data = tensor.data.to(dtype)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, notes or warnings of diffusers, transformers and peft: what matters is in the report."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "peft")]
    levels = [logger.level for logger in loggers]
    from diffusers.utils import logging as diffusers_logging

    for logger in loggers:
        logger.setLevel(logging.ERROR)
    diffusers_logging.disable_progress_bar()
    try:
        with without_transformers_bars(), warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning, UserWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        diffusers_logging.enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
