"""From per-example or per-action losses to the scalar that is differentiated.

Every reduction is ``sum(weight * values) / denominator``. The weights depend on the mask alone and the denominator is a
plain count, so the counts of several micro-batches (and ranks) can be added up *before* the first backward pass; the
rows of one optimiser update then give the same gradient however they are split.

========================== ===================================== =======================
name                       per-action weight                     what :func:`count` counts
========================== ===================================== =======================
``token_mean``             ``mask``                              actions
``seq_mean_token_mean``    ``mask / actions of the row``         rows with an action
``seq_mean_token_sum``     ``mask``                              rows with an action
``seq_mean_token_sum_norm`` ``mask``                             rows with an action x ``norm_length``
``sum``                    ``mask``                              1, whatever the split
``sum_norm``               ``mask``                              ``norm_length``, whatever the split
========================== ===================================== =======================

``seq_mean_token_sum_norm`` is the constant normaliser of Dr. GRPO (Liu et al. 2025, arXiv 2503.20783) per row, as TRL
computes it; ``sum_norm`` leaves the number of rows out, as verl does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmalign.core.registry import Registry


@dataclass(frozen=True)
class Reduction:
    """One row of the table: how actions are weighted and what the denominator counts."""

    name: str
    counts: str
    """``actions``, ``rows`` or ``nothing`` (a denominator that does not depend on the rows)."""
    mean_within_row: bool = False
    uses_norm_length: bool = False


REDUCTIONS: Registry[Reduction] = Registry("reduction")
"""Reductions by name; TRL's ``loss_type`` and older spellings are aliases."""

for _row, _aliases in (
    (Reduction("token_mean", "actions"), ("token", "global_token_mean", "dapo", "bnpo")),
    (
        Reduction("seq_mean_token_mean", "rows", mean_within_row=True),
        ("sequence", "seq_mean", "example", "grpo"),
    ),
    (Reduction("seq_mean_token_sum", "rows"), ()),
    (Reduction("seq_mean_token_sum_norm", "rows", uses_norm_length=True), ("dr_grpo",)),
    (Reduction("sum", "nothing"), ()),
    (Reduction("sum_norm", "nothing", uses_norm_length=True), ()),
):
    REDUCTIONS.register(_row.name, aliases=_aliases)(_row)


def count(mask: Tensor, how: str, *, norm_length: float | None = None) -> float:
    """The denominator that :func:`reduce` would use for these rows alone.

    Args:
        mask: ``[B]`` or ``[B, A]``, bool or 0/1.
        how: name of a reduction.
        norm_length: the constant length of the ``*_norm`` reductions.

    Returns:
        A float that may be added over micro-batches and ranks (``sum`` and ``sum_norm`` ignore the total, see
        :func:`reduce`). Rows without any action are not counted.
    """
    row = REDUCTIONS.get(how)
    length = _norm_length(row, norm_length)
    if row.counts == "nothing":
        return length
    return _counted(row, _two_dimensional(mask, "mask").to(torch.bool)) * length


def reduce(
    values: Tensor,
    mask: Tensor,
    *,
    how: str,
    denominator: float | Tensor | None = None,
    norm_length: float | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Reduce a loss to a scalar.

    Args:
        values: ``[B]`` (one value per row) or ``[B, A]`` (one per action). ``[B]`` values under a ``[B, A]`` mask stand
            for the same value on every action of the row.
        mask: ``[B]`` or ``[B, A]``, bool or 0/1: the rows or actions that count. Values outside it may be anything,
            NaN included.
        how: name of a reduction (``-`` and ``_`` are the same).
        denominator: the global count, i.e. :func:`count` added over all micro-batches and ranks of the optimiser
            update. By default the count of these rows. Ignored by ``sum`` and ``sum_norm``, whose denominator does not
            depend on the rows.
        norm_length: the constant length of the ``*_norm`` reductions, usually the longest completion allowed. Required
            there: the padded width would make the loss depend on the other rows of a batch.
        weight: optional ``[B]`` row weights. They enter the numerator only.

    Returns:
        A scalar in float32 (float64 for float64 values). With nothing to count it is 0, still connected to ``values``.

    Raises:
        ValueError: unknown ``how``, shapes that do not fit, a missing or non-positive ``norm_length``, a negative
            denominator.
    """
    row = REDUCTIONS.get(how)
    length = _norm_length(row, norm_length)
    kept = _two_dimensional(mask, "mask").to(torch.bool)
    table = _two_dimensional(values, "values")
    if table.shape[0] != kept.shape[0] or table.shape[1] not in (1, kept.shape[1]):
        raise ValueError(
            f"values have shape {tuple(values.shape)} and mask {tuple(mask.shape)}; "
            "pass [B] with [B] or [B, A], or [B, A] with [B, A]"
        )
    table = table if table.dtype == torch.float64 else table.float()
    table = torch.where(kept, table, table.new_zeros(()))
    if row.mean_within_row:
        per_row = table.sum(1) / kept.sum(1).clamp(min=1)
    else:
        per_row = table.sum(1)
    if weight is not None:
        if weight.shape != per_row.shape:
            raise ValueError(f"weight has shape {tuple(weight.shape)}; one weight per row is {tuple(per_row.shape)}")
        per_row = torch.where(kept.any(1), per_row * weight.to(per_row.dtype), per_row)
    total = per_row.sum()
    if row.counts == "nothing":
        return total / length
    if denominator is None:
        denominator = _counted(row, kept) * length
    elif float(denominator) < 0:
        raise ValueError(f"denominator is {float(denominator)}; it must be a count, 0 or more")
    return total / denominator if float(denominator) > 0 else total * 0.0


def _counted(row: Reduction, kept: Tensor) -> float:
    return float(kept.sum() if row.counts == "actions" else kept.any(1).sum())


def _norm_length(row: Reduction, norm_length: float | None) -> float:
    if not row.uses_norm_length:
        return 1.0
    if norm_length is None or norm_length <= 0:
        raise ValueError(
            f"norm_length is {norm_length}; {row.name} divides by a constant length, pass the longest completion allowed"
        )
    return float(norm_length)


def _two_dimensional(tensor: Tensor, name: str) -> Tensor:
    if tensor.dim() not in (1, 2):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; [B] or [B, A] is needed")
    return tensor if tensor.dim() == 2 else tensor.unsqueeze(1)
