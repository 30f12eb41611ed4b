"""Our side of a bench: a registered method, built from its configuration tree and run by the library's one loop."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from harness import Measurement, Meter

Prepare = Callable[[Any], None]
"""Called with the built parts before the loop starts (to put a stub in, for example)."""


def train(
    method_name: str, tree: Mapping[str, Any], *, steps: int, prepare: Prepare | None = None, **fields: Any,
) -> Measurement:
    """Run ``steps`` updates after one warm-up; ``tree`` is what a configuration file would hold."""
    torch.set_num_threads(1)
    import text_llm
    from mmalign.config import parse
    from mmalign.methods.registry import METHODS
    from mmalign.methods.training import BuildContext
    from mmalign.training.experience import resolve_batch
    from mmalign.training.loop import Hooks, Loop, LoopOptions, make_accelerator
    from mmalign.training.objective import TrainState
    from mmalign.training.tracking import TrackingOptions, read_metrics
    from mmalign.training.tuning.base import make_tuning

    text_llm.register()
    method = METHODS.get(method_name)
    options: Any = parse(method.options, tree)
    folder = Path(os.environ.get("MMALIGN_BENCH_FOLDER", tempfile.mkdtemp(prefix="mmalign-bench-"))) / "run"
    loop_options = LoopOptions(steps=steps + 1, tracking=TrackingOptions(quiet=True))
    accelerator = make_accelerator(loop_options, folder)
    shape = resolve_batch(options.batch, world_size=1, rollout=method.rollout)
    state = TrainState(seed=0, total_steps=steps + 1)
    meter = Meter()
    context = BuildContext(folder, 0, Path.cwd(), accelerator, state, shape, make_tuning(options.tuning), quiet=True)
    load = context.policy

    def load_and_measure(*positional: Any, **settings: Any) -> Any:
        policy = load(*positional, **settings)
        meter.model_loaded()
        return policy

    context.policy = load_and_measure  # type: ignore[method-assign]
    _import_everything()
    parts = method.build(options, context)
    if prepare is not None:
        prepare(parts)
    hooks = Hooks()
    if parts.reference is not None:
        reference = parts.reference
        hooks.after_update.append(lambda state: reference.after_update(state.step))
    hooks.after_update.append(lambda _state: meter.mark())
    loop = Loop(
        parts.objective, parts.experience, parts.policy, shape, state, options=loop_options, optimizers=options.optimizers,
        folder=folder, accelerator=accelerator, tuning=context.tuning, controller=parts.controller, timer=context.timer,
        hooks=hooks,
    )
    loop.run()
    log = read_metrics(folder / "metrics.jsonl")
    values = {name: [line[name] for line in log] for name in ("loss", "grad_norm")}
    return meter.measurement(values=values, **fields)


def _import_everything() -> None:
    """Modules that a first step would import, so that they are part of the base and not of the peak."""
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401
