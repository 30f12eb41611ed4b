"""Log-probabilities of chosen tokens from hidden states and the output head, without a vocabulary-wide tensor.

For position ``n`` with hidden state ``h_n``, head ``W, b`` and target ``y_n``::

    z_n    = cap(scale * (W h_n + b)) / temperature,     cap(x) = c tanh(x / c)
    logp_n = z_n[y_n] - logsumexp(z_n)

All positions meet one block of the vocabulary at a time, with a running maximum and sum (the online softmax of Milakov
and Gimelshein 2018, arXiv 1805.02867; cut cross-entropy, Wijmans et al. 2024, arXiv 2411.09009, is the fused GPU form).
Blocks of the vocabulary beat blocks of positions: each block of the weight gradient is one product instead of a sum over
blocks, the products have better shapes, and a block small enough for the cache makes the element-wise passes cheap.

Three ways through, chosen by what needs a gradient:

* nothing: one product.
* only the hidden states (a frozen head: LoRA): the rows of ``d logp / d h`` are computed in the forward pass, while the
  probabilities are at hand, so that the backward pass does no vocabulary-wide work at all.
* the head as well: the forward pass keeps the hidden states and one number per position; the backward pass recomputes
  each block.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

DIFFERENTIABLE = ("logp", "lse", "entropy", "mean_logp")
"""Outputs with a gradient."""
DETACHED = ("sum_p2", "correct")
"""Outputs without a gradient."""
WANTED = ("entropy", "lse", "mean_logp", "sum_p2", "correct")
"""What ``want`` may name."""

_TILE_BYTES = 8 << 20
"""Target size of a tile on a CPU: beyond the last-level cache every pass over it is 2-3x slower (measured)."""
_MIN_BLOCK = 512
"""Fewest vocabulary entries in a block on a CPU, for the sake of the matrix products."""


@dataclass
class OutputHead:
    """A linear map from hidden states to logits: ``soft_cap(scale * (W h + b))``.

    Attributes:
        weight: ``[V, H]``.
        bias: ``[V]`` or None.
        scale: multiplies the logits (Cohere's ``logit_scale``, Granite's ``1 / logits_scaling``).
        soft_cap: ``c`` of ``c * tanh(x / c)`` (Gemma's ``final_logit_softcapping``), or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    def __post_init__(self) -> None:
        if self.weight.dim() != 2:
            raise ValueError(f"head weight has shape {tuple(self.weight.shape)}; [V, H] is needed")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(f"head bias has shape {tuple(self.bias.shape)}; [{self.weight.shape[0]}] is needed")
        if self.soft_cap is not None and not self.soft_cap > 0:
            raise ValueError(f"soft_cap is {self.soft_cap}; it must be positive, or None for no cap")

    @property
    def vocabulary(self) -> int:
        """Number of entries of the vocabulary."""
        return self.weight.shape[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Plain logits ``[..., V]`` of ``hidden[..., H]``, in the hidden states' dtype (tests and short sequences)."""
        weight = self.weight.to(hidden.dtype)
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        logits = torch.nn.functional.linear(hidden, weight, bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.soft_cap is not None:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        return logits


def score_positions(
    hidden: Tensor,
    head: OutputHead,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    chunk: int = 256,
    want: Iterable[str] = (),
) -> dict[str, Tensor]:
    """Score one target token at each position.

    Args:
        hidden: ``[N, H]``; its dtype is the dtype of the matrix products, everything after them is float32 (float64 for
            float64 hidden states).
        head: the output head; its weight and bias are cast to ``hidden.dtype``.
        targets: ``[N]`` int64 in ``[0, V)``.
        temperature: divides the logits.
        chunk: memory bound, in rows of logits: never more than ``chunk * V`` float32 exist at a time (on a CPU less,
            so that a tile stays inside the cache).
        want: any of ``entropy`` ``-sum_v p_v log p_v``; ``lse`` (logsumexp of the tempered logits); ``mean_logp``
            (mean of ``log p`` over the vocabulary); ``sum_p2`` ``sum_v p_v^2``; ``correct`` (1.0 where no entry has a
            larger logit than the target).

    Returns:
        ``{"logp": [N], **{name: [N] for name in want}}``. ``logp``, ``entropy``, ``lse`` and ``mean_logp`` have exact
        gradients with respect to hidden states, weight and bias; ``sum_p2`` and ``correct`` are detached.

    Raises:
        ValueError: shapes that do not fit, targets outside the vocabulary, a temperature or chunk that is not positive,
            unknown names in ``want``.
    """
    wanted = _checked_want(want)
    _check_inputs(hidden, head, targets, temperature, chunk)
    names = ("logp", *wanted)
    options = _Options(
        scale=head.scale,
        soft_cap=head.soft_cap,
        temperature=temperature,
        chunk=chunk,
        names=names,
        needs_grad=torch.is_grad_enabled(),
    )
    outputs = _ScorePositions.apply(hidden, head.weight, head.bias, targets, options)
    return dict(zip(names, outputs, strict=True))


def _checked_want(want: Iterable[str]) -> tuple[str, ...]:
    wanted = tuple(dict.fromkeys((want,) if isinstance(want, str) else want))
    unknown = [name for name in wanted if name not in WANTED]
    if unknown:
        raise ValueError(f"want names {unknown}; allowed are {', '.join(WANTED)}")
    return wanted


def _check_inputs(hidden: Tensor, head: OutputHead, targets: Tensor, temperature: float, chunk: int) -> None:
    if hidden.dim() != 2 or hidden.shape[1] != head.weight.shape[1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)} and the head {tuple(head.weight.shape)}; [N, H] and [V, H] are needed"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets have shape {tuple(targets.shape)}; [{hidden.shape[0]}] is needed")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1")
    if targets.numel():
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= head.vocabulary:
            raise ValueError(
                f"targets range over [{low}, {high}]; the vocabulary has {head.vocabulary} entries. "
                "Drop ignored positions (-100) first, and check that tokenizer and model belong together"
            )


@dataclass(frozen=True)
class _Options:
    scale: float
    soft_cap: float | None
    temperature: float
    chunk: int
    names: tuple[str, ...]
    needs_grad: bool

    @property
    def slope(self) -> float:
        """d z / d (W h + b) where the cap is flat."""
        return self.scale / self.temperature


@dataclass
class _Block:
    """One block of the vocabulary: its logits, and where the targets lie in it."""

    span: slice
    weight: Tensor
    logits: Tensor
    tanh: Tensor | None
    spare: Tensor | None
    column: Tensor
    inside: Tensor

    def at_target(self, tile: Tensor) -> Tensor:
        """``tile[n, y_n]``, meaningful where ``inside``."""
        return tile.gather(1, self.column).squeeze(1)

    def put_target(self, tile: Tensor, values: Tensor | float) -> None:
        """Write ``tile[n, y_n] = values[n]`` where the target lies in this block."""
        kept = torch.where(self.inside, values, self.at_target(tile))
        tile.scatter_(1, self.column, kept.unsqueeze(1))

    def add_target(self, tile: Tensor, values: Tensor | float) -> None:
        """Add ``values[n]`` to ``tile[n, y_n]`` where the target lies in this block."""
        self.put_target(tile, self.at_target(tile) + values)


class _Blocks:
    """Iterates over the vocabulary, reusing the buffers of a tile."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: _Options,
        *,
        spare: bool,
    ) -> None:
        self.hidden, self.weight, self.bias, self.targets, self.options = hidden, weight, bias, targets, options
        self.dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        count, vocabulary = hidden.shape[0], weight.shape[0]
        self.buffers = 1 + int(spare) + int(options.soft_cap is not None)
        self.width = _block_width(count, vocabulary, options.chunk, self.buffers, on_cpu=hidden.device.type == "cpu")
        make = functools.partial(torch.empty, count * self.width, device=hidden.device)
        self._tile = make(dtype=self.dtype)
        self._spare = make(dtype=self.dtype) if spare else None
        self._tanh = make(dtype=self.dtype) if options.soft_cap is not None else None
        self._product = self._tile if hidden.dtype == self.dtype else make(dtype=hidden.dtype)

    def __iter__(self) -> Iterator[_Block]:
        count, vocabulary = self.hidden.shape[0], self.weight.shape[0]
        if count == 0:
            return
        for start in range(0, vocabulary, self.width):
            span = slice(start, min(start + self.width, vocabulary))
            width = span.stop - span.start
            weight = self.weight[span].to(self.hidden.dtype)
            logits, tanh = self._logits(weight, span)
            spare = None if self._spare is None else self._spare[: count * width].view(count, width)
            column = self.targets - start
            inside = (column >= 0) & (column < width)
            yield _Block(span, weight, logits, tanh, spare, column.clamp(0, width - 1).unsqueeze(1), inside)

    def _logits(self, weight: Tensor, span: slice) -> tuple[Tensor, Tensor | None]:
        options, cap = self.options, self.options.soft_cap
        shape = (self.hidden.shape[0], weight.shape[0])
        size = shape[0] * shape[1]
        product, tile = self._product[:size].view(shape), self._tile[:size].view(shape)
        alpha = options.slope if cap is None else options.scale / cap
        if self.bias is None:
            torch.addmm(product, self.hidden, weight.t(), beta=0.0, alpha=alpha, out=product)
        else:
            bias = self.bias[span].to(self.hidden.dtype)
            torch.addmm(bias, self.hidden, weight.t(), beta=alpha, alpha=alpha, out=product)
        if self._product is not self._tile:
            tile.copy_(product)
        if cap is None or self._tanh is None:
            return tile, None
        tanh = torch.tanh(tile, out=self._tanh[:size].view(shape))
        return torch.mul(tanh, cap / options.temperature, out=tile), tanh

    def operand(self, tile: Tensor) -> Tensor:
        """A finished tile in the dtype of the products."""
        if tile.dtype == self.hidden.dtype:
            return tile
        return self._product[: tile.numel()].view(tile.shape).copy_(tile)


def _block_width(count: int, vocabulary: int, chunk: int, buffers: int, *, on_cpu: bool) -> int:
    width = chunk * vocabulary // (buffers * max(count, 1))
    if on_cpu:
        width = min(width, max(_TILE_BYTES // (4 * buffers * max(count, 1)), _MIN_BLOCK))
    width = min(max(width, 1), vocabulary)
    blocks = -(-vocabulary // width)
    return -(-vocabulary // blocks)  # equal blocks: a short last one makes for poor products


def _dot_rows(left: Tensor, right: Tensor) -> Tensor:
    """Row-wise inner products without a product tile."""
    return torch.bmm(left.unsqueeze(1), right.unsqueeze(2)).flatten()


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``, accumulated in the dtype of ``total``."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


class _ScorePositions(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: _Options
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        needs = ctx.needs_input_grad[:3] if options.needs_grad else (False, False, False)
        frozen = needs[0] and not (needs[1] or needs[2])
        with torch.autocast(hidden.device.type, enabled=False):
            blocks = _Blocks(hidden, weight, bias, targets, options, spare="entropy" in options.names)
            scores, rows, flatness = _forward(blocks, want_rows=frozen)
        ctx.options, ctx.needs, ctx.frozen = options, needs, frozen
        if any(needs):
            kept = (scores["logp"], scores["lse"], scores.get("entropy"), flatness, rows)
            ctx.save_for_backward(hidden, weight, bias, targets, *kept)
        ctx.mark_non_differentiable(*(scores[name] for name in options.names if name in DETACHED))
        return tuple(scores[name] for name in options.names)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        options: _Options = ctx.options
        hidden, weight, bias, targets, logp, lse, entropy, flatness, rows = ctx.saved_tensors
        named = zip(options.names, grads, strict=True)
        upstream = {name: grad for name, grad in named if grad is not None and name in DIFFERENTIABLE}
        if not upstream:
            return None, None, None, None, None
        with torch.autocast(hidden.device.type, enabled=False):
            if ctx.frozen and upstream.keys() <= {"logp", "lse"}:
                grad = _from_rows(upstream, weight, targets, flatness, rows, options)
                return grad.to(hidden.dtype), None, None, None, None
            blocks = _Blocks(hidden, weight, bias, targets, options, spare="entropy" in upstream)
            return *_backward(blocks, logp, lse, entropy, upstream, ctx.needs), None, None


def _forward(blocks: _Blocks, *, want_rows: bool) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
    """All scores; with ``want_rows`` also ``d logp / d h`` ``[N, H]``, and ``cap'`` at the target for a soft cap."""
    options = blocks.options
    zeros = functools.partial(torch.zeros, blocks.hidden.shape[0], dtype=blocks.dtype, device=blocks.hidden.device)
    largest = zeros().fill_(torch.finfo(blocks.dtype).min)
    # Running sums under the running maximum m: e^(z-m) without and with the target, e^(z-m) (z-m), e^(2(z-m)), z.
    others, total, weighted, squares, logit_sum = zeros(), zeros(), zeros(), zeros(), zeros()
    chosen = zeros()
    flatness = zeros() if options.soft_cap is not None else None
    rows = torch.zeros_like(blocks.hidden, dtype=blocks.dtype) if want_rows else None
    for block in blocks:
        tile = block.logits
        chosen = torch.where(block.inside, block.at_target(tile), chosen)
        if "mean_logp" in options.names:
            logit_sum += tile.sum(1)
        drop = largest
        largest = torch.maximum(largest, tile.amax(1))
        drop = drop - largest
        shrink = drop.exp()
        shifted = tile.sub_(largest.unsqueeze(1))
        if block.spare is None:
            powers = shifted.exp_()
        else:
            powers = torch.exp(shifted, out=block.spare)
            weighted = shrink * (weighted + drop * total) + _dot_rows(shifted, powers)
            total = shrink * total + powers.sum(1)
        if "sum_p2" in options.names:
            squares = shrink.square() * squares + _dot_rows(powers, powers)
        # Without the target, 1 - p_y is a sum of small terms and keeps its relative precision when p_y is near 1.
        block.put_target(powers, 0.0)
        others = shrink * others + powers.sum(1)
        if rows is None:
            continue
        if block.tanh is not None and flatness is not None:
            slopes = block.tanh.square_().neg_().add_(1.0)
            flatness = torch.where(block.inside, block.at_target(slopes), flatness)
            powers.mul_(slopes)
        rows.mul_(shrink.unsqueeze(1))
        _add_product(rows, blocks.operand(powers), block.weight)
    behind = chosen - largest
    partition = others + behind.exp()
    # log(partition) without rounding near 1: where the target has the largest logit, logp = -log1p(others).
    log_partition = torch.log1p(others + torch.expm1(behind))
    scores = {"logp": behind - log_partition, "lse": largest + log_partition}
    if "entropy" in options.names:
        scores["entropy"] = log_partition - weighted / partition
    if "mean_logp" in options.names:
        scores["mean_logp"] = logit_sum / blocks.weight.shape[0] - scores["lse"]
    if "sum_p2" in options.names:
        scores["sum_p2"] = squares / partition.square()
    if "correct" in options.names:
        scores["correct"] = (chosen >= largest).to(blocks.dtype)
    if rows is not None:
        on_target = others if flatness is None else others * flatness
        rows = blocks.weight[blocks.targets].to(blocks.dtype).mul_(on_target.unsqueeze(1)).sub_(rows)
        rows = rows.mul_((options.slope / partition).unsqueeze(1)).to(blocks.hidden.dtype)
    return scores, rows, flatness


def _backward(
    blocks: _Blocks,
    logp: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    upstream: dict[str, Tensor],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Recompute each block and accumulate the gradients of hidden states, weight and bias from ``d z``::

    dz = g_logp (onehot - p) + g_lse p - g_entropy p (log p + H) + g_mean (1/V - p)

    When only ``logp`` has a gradient, ``d z = -g_logp (p - onehot)``, whose factor is applied to ``[N, H]`` tensors
    instead of to the block.
    """
    hidden, weight, slope = blocks.hidden, blocks.weight, blocks.options.slope
    upstream = {name: grad.to(blocks.dtype) for name, grad in upstream.items()}
    by_row = upstream.keys() == {"logp"} and blocks.options.soft_cap is None
    factor = -upstream["logp"] * slope if by_row else torch.full_like(lse, slope)
    left = (hidden * factor.unsqueeze(1)).to(hidden.dtype) if needs[1] else None
    of_hidden = torch.zeros_like(hidden, dtype=blocks.dtype) if needs[0] else None
    of_weight = torch.empty_like(weight) if needs[1] else None
    of_bias = torch.empty(weight.shape[:1], dtype=blocks.dtype, device=weight.device) if needs[2] else None
    for block in blocks:
        log_p = block.logits.sub_(lse.unsqueeze(1))
        if by_row:
            dz = log_p.exp_()
            block.put_target(dz, torch.expm1(logp))  # p_y - 1, with its relative precision
        else:
            dz = _logit_gradient(block, log_p, entropy, upstream, weight.shape[0])
        operand = blocks.operand(dz)
        if of_hidden is not None:
            _add_product(of_hidden, operand, block.weight)
        if of_weight is not None and left is not None:
            target = of_weight[block.span]
            if target.dtype == operand.dtype:
                torch.mm(operand.t(), left, out=target)
            else:
                target.copy_(operand.t() @ left)
        if of_bias is not None:
            torch.mv(dz.t(), factor, out=of_bias[block.span])
    if hidden.shape[0] == 0:
        of_weight, of_bias = (None if g is None else g.zero_() for g in (of_weight, of_bias))
    if of_hidden is not None:
        of_hidden = of_hidden.mul_(factor.unsqueeze(1)).to(hidden.dtype)
    if of_bias is not None and blocks.bias is not None:
        of_bias = of_bias.to(blocks.bias.dtype)
    return of_hidden, of_weight, of_bias


def _logit_gradient(
    block: _Block, log_p: Tensor, entropy: Tensor | None, upstream: dict[str, Tensor], vocabulary: int
) -> Tensor:
    """``d z`` of one block for any mix of upstream gradients, before the head's slope."""
    grads = {name: grad.unsqueeze(1) for name, grad in upstream.items()}
    on_p = grads.get("lse", 0.0) - grads.get("logp", 0.0) - grads.get("mean_logp", 0.0)
    if entropy is not None and block.spare is not None:
        p = torch.exp(log_p, out=block.spare)
        dz = log_p.mul_(-grads["entropy"]).add_(on_p - grads["entropy"] * entropy.unsqueeze(1)).mul_(p)
    else:
        dz = log_p.exp_().mul_(on_p)
    if "mean_logp" in grads:
        dz.add_(grads["mean_logp"] / vocabulary)
    if "logp" in upstream:
        block.add_target(dz, upstream["logp"])
    if block.tanh is not None:
        dz.addcmul_(dz, block.tanh.square_(), value=-1.0)
    return dz


def _from_rows(
    upstream: dict[str, Tensor],
    weight: Tensor,
    targets: Tensor,
    flatness: Tensor | None,
    rows: Tensor,
    options: _Options,
) -> Tensor:
    """Gradient of the hidden states of a frozen head from the stored rows ``d logp / d h``."""
    total = torch.zeros_like(rows, dtype=upstream[next(iter(upstream))].dtype)
    if "logp" in upstream:
        total = rows * upstream["logp"].unsqueeze(1)
    if "lse" in upstream:
        # lse = z_y - logp, and d z_y / d h is a row of the head.
        chosen = weight[targets].to(total.dtype) * options.slope
        if flatness is not None:
            chosen = chosen * flatness.unsqueeze(1)
        total = total + (chosen - rows) * upstream["lse"].unsqueeze(1)
    return total
