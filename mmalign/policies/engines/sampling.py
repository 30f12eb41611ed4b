"""Drawing tokens from logits by inverse CDF: ``min {v : sum_{w <= v} p_w > u}``.

``torch.multinomial`` over a vocabulary of 49152 costs a dozen times as much on a CPU, and is half of the time of
sampling from a small model. One uniform number per row and step decides, so a draw can be repeated from them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmalign.policies.base import TextSampling

_BLOCK = 256
"""Entries per block of the two-level search: block sums first, then one block."""
_CANDIDATES = 1024
"""Most likely entries tried for top-p before the whole vocabulary is sorted."""


class UniformStream:
    """Uniform numbers for ``rows`` rows, indexed by step; a row's numbers do not depend on how rows are batched.

    All of them come from one number of ``generator``, so the generator moves on by the same amount however long the
    completions become.
    """

    def __init__(self, rows: int, generator: torch.Generator, *, steps: int = 32) -> None:
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        self._generator = torch.Generator().manual_seed(seed)
        self._rows, self._steps = rows, steps
        self._blocks: list[Tensor] = []

    def at(self, step: int) -> Tensor:
        """``[rows]`` float64 in [0, 1)."""
        block, offset = divmod(step, self._steps)
        while len(self._blocks) <= block:
            self._blocks.append(
                torch.rand(self._steps, self._rows, generator=self._generator, dtype=torch.float64))
        return self._blocks[block][offset]


def draw_tokens(logits: Tensor, uniforms: Tensor, sampling: TextSampling) -> tuple[Tensor, Tensor]:
    """One token per row and its log-prob.

    Args:
        logits: ``[R, V]`` float32; may be overwritten.
        uniforms: ``[R]`` float64 in [0, 1); not read when ``temperature`` is 0.
        sampling: ``temperature``, ``top_k`` and ``top_p``; truncation is in the order temperature, top-k, top-p.

    Returns:
        ``tokens[R]`` int64 and ``logp[R]`` float32 of the distribution sampled from (renormalised after truncation).
        At temperature 0 the most likely token and its log-prob at temperature 1.
    """
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, _pick(logits, tokens) - logits.logsumexp(-1)
    if sampling.temperature != 1.0:
        logits = logits.div_(sampling.temperature)
    probabilities = logits.softmax(-1)
    if not sampling.truncated:
        tokens = inverse_cdf(probabilities, uniforms)
        return tokens, _pick(probabilities, tokens).log()
    kept, order = _truncate(probabilities, sampling.top_k, sampling.top_p)
    rank = inverse_cdf(kept, uniforms)
    mass = kept.sum(-1, dtype=torch.float64)
    logp = (_pick(kept, rank).double() / mass).log().float()
    return _pick(order, rank), logp


def _pick(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(1, index[:, None]).squeeze(1)


def inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Index of the first entry at which the running sum of ``weights[R, V]`` exceeds ``uniforms[R]`` times the total.

    Sums are float64 from blocks on; an entry of weight 0 is never returned.
    """
    size = weights.shape[1]
    if size <= 2 * _BLOCK:
        sums = weights.cumsum(-1, dtype=torch.float64)
        return _first_above(sums, uniforms.to(sums.device) * sums[:, -1])
    whole = size // _BLOCK * _BLOCK
    blocks = weights[:, :whole].unflatten(1, (-1, _BLOCK)).sum(-1)
    if whole < size:
        blocks = torch.cat([blocks, weights[:, whole:].sum(-1, keepdim=True)], 1)
    sums = blocks.cumsum(-1, dtype=torch.float64)
    target = uniforms.to(sums.device) * sums[:, -1]
    block = _first_above(sums, target)
    before = torch.where(block > 0, _pick(sums, (block - 1).clamp(min=0)), 0.0)
    columns = block[:, None] * _BLOCK + torch.arange(_BLOCK, device=weights.device)
    inside = weights.gather(1, columns.clamp(max=size - 1)).masked_fill(columns >= size, 0.0)
    inner = inside.cumsum(-1, dtype=torch.float64)
    return block * _BLOCK + _first_above(inner, target - before)


def _first_above(sums: Tensor, target: Tensor) -> Tensor:
    """First index with ``sums > target``, at most the last one at which the running sum grows."""
    above = torch.searchsorted(sums, target[:, None], right=True)
    last = torch.searchsorted(sums, sums[:, -1:].contiguous())
    return torch.minimum(above, last).squeeze(1)


def _truncate(probabilities: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Weights ``[R, K]`` of the tokens kept, most likely first (0 = not kept), and their ids ``[R, K]``."""
    size = probabilities.shape[1]
    limit = min(top_k or size, size)
    width = limit if top_p >= 1 else min(limit, _CANDIDATES)
    while True:
        kept, order = probabilities.topk(width, dim=-1)
        if top_p >= 1:
            return kept, order
        if top_k:
            total = kept.sum(-1, keepdim=True, dtype=torch.float64) if width == limit else \
                probabilities.topk(limit, dim=-1).values.sum(-1, keepdim=True, dtype=torch.float64)
        else:
            total = probabilities.sum(-1, keepdim=True, dtype=torch.float64)
        above = kept.cumsum(-1, dtype=torch.float64) - kept  # mass of the more likely tokens
        keep = above < top_p * total
        if width == limit or not bool(keep[:, -1].any()):
            return kept * keep, order
        width = limit
