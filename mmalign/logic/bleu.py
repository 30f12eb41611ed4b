"""BLEU of one sequence of tokens against another, as first-order logic translations are measured."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence


def token_bleu(gold: Sequence[str], predicted: Sequence[str], *, max_order: int = 4) -> float:
    """``exp(min(0, 1 - g / p)) * (prod_n precision_n) ** (1 / N)`` in [0, 1], not smoothed; 0 for an empty sequence.

    ``N = min(max_order, g, p)`` with ``g`` and ``p`` the lengths, so that short formulas are not 0 for want of 4-grams.
    Papineni et al. 2002; with the tokens of formulas in Yang et al. 2023, arXiv 2305.15541.
    """
    order = min(max_order, len(gold), len(predicted))
    if order < 1:
        return 0.0
    total = 0.0
    for n in range(1, order + 1):
        found, wanted = _grams(predicted, n), _grams(gold, n)
        matches = sum(min(count, wanted[gram]) for gram, count in found.items())
        if not matches:
            return 0.0
        total += math.log(matches / (len(predicted) - n + 1))
    return math.exp(total / order + min(0.0, 1 - len(gold) / len(predicted)))


def _grams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
