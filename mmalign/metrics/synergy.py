"""What a merge of two models adds to its parents."""

from __future__ import annotations

from mmalign.metrics import metric


@metric("synergy", higher_is_better=True)
def synergy(first: float, second: float, merged: float) -> float:
    """``merged - (first + second) / 2``: above what the parents' mean would give (Lu et al. 2024, arXiv 2409.03444)."""
    return merged - (first + second) / 2


@metric("improvement", higher_is_better=True)
def improvement(first: float, second: float, merged: float) -> float:
    """``merged - max(first, second)``: above the better parent (Lu et al. 2024, arXiv 2409.03444)."""
    return merged - max(first, second)


@metric("diversity", higher_is_better=True, aliases=("parent_diversity",))
def diversity(first: float, second: float) -> float:
    """``|first - second|``: how differently the parents do (Lu et al. 2024, arXiv 2409.03444)."""
    return abs(first - second)
