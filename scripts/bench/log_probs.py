"""Log-probs of 2048 tokens from hidden states and the output head: full logits and TRL's kernel against ours.

The gradient of the head (48 MiB) exists on every side and is part of the figures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import workload
from harness import OURS, Bench, Case, Measurement, Meter, main

POSITIONS = 2048

TRAINED = Case(
    "head trained", "forward and backward, hidden states and head with gradients",
    "four products V x d x S (forward, recompute, two gradients); full logits need three",
    {"full logits": (1 / 1.1, 10.0), "TRL kernel": (1.0, 1.0)},
)
FROZEN = Case(
    "head frozen", "forward and backward, gradient of the hidden states only (LoRA)",
    "two products: the gradient's rows are made in the forward pass",
    {"full logits": (1 / 1.1, 10.0), "TRL kernel": (1.0, 1.0)},
)
SCORED = Case(
    "no gradient", "forward only (a reference model)",
    "one product and one pass of exp over the tiles",
    {"full logits": (1 / 1.1, 10.0), "TRL kernel": (1.0, 1.0)},
)
PRODUCTS = {"head trained": 4, "head frozen": 2, "no gradient": 1}

Score = Callable[[Any, Any, Any], Any]
"""``(hidden [N, H], weight [V, H], targets [N]) -> log-probs [N]``."""


def run(case: Case, steps: int, make: Callable[[], Score]) -> Measurement:
    """Time ``steps`` scorings of fresh positions; the loss is a weighted sum of log-probs."""
    import torch

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(workload.VOCABULARY, workload.HIDDEN, generator=generator) * 0.06
    score = make()
    trained, frozen = case.name == "head trained", case.name == "head frozen"
    weight.requires_grad_(trained)
    draws = [(torch.randn(POSITIONS, workload.HIDDEN, generator=generator),
              torch.randint(workload.VOCABULARY, (POSITIONS,), generator=generator),
              torch.randn(POSITIONS, generator=generator)) for _ in range(steps + 1)]
    _warm_products(weight)
    meter = Meter()
    meter.model_loaded()
    losses, norms = [], []
    for hidden, targets, coefficients in draws:
        hidden.requires_grad_(trained or frozen)
        with torch.set_grad_enabled(trained or frozen):
            loss = (score(hidden, weight, targets) * coefficients).mean()
        if loss.requires_grad:
            loss.backward()
            norms.append(float(hidden.grad.norm()))  # type: ignore[union-attr]
        if trained:
            norms.append(float(weight.grad.norm()))  # type: ignore[union-attr]
        hidden.grad = weight.grad = None
        losses.append(float(loss.detach()))
        meter.mark()
    operations = 2 * workload.VOCABULARY * workload.HIDDEN * POSITIONS * PRODUCTS[case.name]
    return meter.measurement(values={"loss": losses, "grad_norm": norms}, flop=float(operations), tokens=float(POSITIONS))


def _warm_products(weight: Any) -> None:
    """The matrix library's own buffers belong to the base."""
    import torch

    with torch.no_grad():
        torch.mm(torch.zeros(64, workload.HIDDEN), weight[:4096].t())


def ours(case: Case, steps: int) -> Measurement:
    """``mmalign.core.output_head.score_positions``."""
    def make() -> Score:
        from mmalign.core.output_head import OutputHead, score_positions

        return lambda hidden, weight, targets: score_positions(hidden, OutputHead(weight), targets)["logp"]

    return run(case, steps, make)


def full_logits(case: Case, steps: int) -> Measurement:
    """``cross_entropy`` of all logits."""
    def make() -> Score:
        from torch.nn.functional import cross_entropy, linear

        return lambda hidden, weight, targets: -cross_entropy(linear(hidden, weight), targets, reduction="none")

    return run(case, steps, make)


def trl(case: Case, steps: int) -> Measurement:
    """The kernel behind TRL's fused head (on a CPU: folded by torch operations), log-probs only."""
    def make() -> Score:
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as width

        return lambda hidden, weight, targets: ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 1.0, width, None, 1.0, ("log_probs",))[0]

    return run(case, steps, make)


BENCH = Bench("log_probs", f"Log-probs of {POSITIONS} tokens, V = 49152, d = 256", (TRAINED, FROZEN, SCORED),
              {OURS: ours, "full logits": full_logits, "TRL kernel": trl}, unit="s/call")

if __name__ == "__main__":
    main(BENCH, __file__)
