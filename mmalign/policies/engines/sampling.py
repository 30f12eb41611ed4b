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
_CANDIDATES = 512
"""Most likely entries tried first for top-p; eight times as many when they do not hold enough."""


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
    # Not softmax: its sum over a large vocabulary is off by 1e-5 on a CPU, and its log-probs with it.
    weights = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    if not sampling.truncated:
        tokens, total = inverse_cdf(weights, uniforms)
        return tokens, _log_share(weights, tokens, total)
    kept, order = _truncate(weights, sampling.top_k, sampling.top_p)
    rank, total = inverse_cdf(kept, uniforms)
    return _pick(order, rank), _log_share(kept, rank, total)


def _pick(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(1, index[:, None]).squeeze(1)


def _log_share(weights: Tensor, index: Tensor, total: Tensor) -> Tensor:
    return (_pick(weights, index).double() / total).log().float()


def inverse_cdf(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw from unnormalised ``weights[R, V]``.

    Returns:
        ``index[R]``, the first entry at which the running sum exceeds ``uniforms[R]`` times the total (never one of
        weight 0), and the total ``[R]`` float64. Sums are float64 except inside blocks of 256 entries.
    """
    size = weights.shape[1]
    if size <= 2 * _BLOCK:
        sums = weights.cumsum(-1, dtype=torch.float64)
        return _first_above(sums, uniforms.to(sums.device) * sums[:, -1]), sums[:, -1]
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
    return block * _BLOCK + _first_above(inner, target - before), sums[:, -1]


def _first_above(sums: Tensor, target: Tensor) -> Tensor:
    """First index with ``sums > target``, at most the last one at which the running sum grows."""
    above = torch.searchsorted(sums, target[:, None], right=True)
    last = torch.searchsorted(sums, sums[:, -1:].contiguous())
    return torch.minimum(above, last).squeeze(1)


def _truncate(weights: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Weights ``[R, K]`` of the tokens kept, most likely first (0 = not kept), and their ids ``[R, K]``."""
    size = weights.shape[1]
    limit = min(top_k or size, size)
    if top_p >= 1:
        kept, order = weights.topk(limit, dim=-1)
        return kept, order
    among = weights.topk(limit, dim=-1).values if top_k else weights
    total = among.sum(-1, keepdim=True, dtype=torch.float64)
    width = min(limit, _CANDIDATES)
    while True:  # a full sort of the vocabulary is dear, and seldom needed
        kept, order = weights.topk(width, dim=-1)
        above = kept.cumsum(-1, dtype=torch.float64) - kept  # mass of the more likely tokens
        keep = above < top_p * total
        if width == limit or not bool(keep[:, -1].any()):
            return kept * keep, order
        width = min(limit, 8 * width)
