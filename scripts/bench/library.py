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
    """Run ``steps`` updates after one warm-up, as ``mmalign run`` would; ``tree`` is what a configuration file holds."""
    torch.set_num_threads(1)
    import text_llm
    from mmalign.config import parse
    from mmalign.methods.registry import METHODS
    from mmalign.methods.training import BuildContext, prepare_training
    from mmalign.training.tracking import read_metrics

    text_llm.register()
    method = METHODS.get(method_name)
    options: Any = parse(method.options, {**tree, "steps": steps + 1})
    folder = Path(os.environ.get("MMALIGN_BENCH_FOLDER") or tempfile.mkdtemp(prefix="mmalign-bench-")) / "run"
    meter = Meter()
    load = BuildContext.policy

    def load_and_measure(context: Any, *positional: Any, **settings: Any) -> Any:
        policy = load(context, *positional, **settings)
        meter.model_loaded()
        return policy

    BuildContext.policy = load_and_measure  # type: ignore[method-assign]
    _import_everything()
    prepared = prepare_training(method, options, folder=folder, seed=0, config_folder=Path.cwd(), fingerprint="", quiet=True)
    if prepare is not None:
        prepare(prepared.parts)
    prepared.loop.hooks.after_update.append(lambda _state: meter.mark())
    prepared.loop.run()
    log = read_metrics(folder / "metrics.jsonl")
    values = {name: [line[name] for line in log] for name in ("loss", "grad_norm")}
    return meter.measurement(values=values, **fields)


def _import_everything() -> None:
    """Modules that a first step would import, so that they are part of the base and not of the peak."""
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401
