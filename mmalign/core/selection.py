"""Choosing rows by score: exact counts, ties to the lowest index, everything by index and never by text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor


def kept_count(n: int, fraction: float) -> int:
    """``max(1, floor(n * fraction + 1e-9))``, and 0 only for fraction 0; the 1e-9 forgives 0.1 * 30 = 2.999..."""
    if n < 0 or not 0 <= fraction <= 1:
        raise ValueError(f"n is {n} and fraction {fraction}; n must be >= 0 and fraction in [0, 1]")
    if n == 0 or fraction == 0:
        return 0
    return max(1, math.floor(n * fraction + 1e-9))


def top_k_indices(score: Tensor, k: int) -> Tensor:
    """Indices ``[k]`` of the ``k`` largest entries of ``score[N]``, best first, ties to the lowest index."""
    if score.dim() != 1:
        raise ValueError(f"score has shape {tuple(score.shape)}; [N] is needed")
    if not 0 <= k <= len(score):
        raise ValueError(f"k is {k}; it must be between 0 and the {len(score)} scores given")
    if bool(torch.isnan(score).any()):
        raise ValueError("score holds NaN; give such rows -inf to drop them")
    return torch.argsort(score, descending=True, stable=True)[:k]


def _groups(group: Tensor) -> list[Tensor]:
    """Member indices of every group, in order of the group's first row."""
    return [(group == g).nonzero().flatten() for g in dict.fromkeys(group.tolist())]


def best_of_group(scores: Tensor, group: Tensor) -> Tensor:
    """``[Q]``: index of the best row of every group, in order of first appearance; ties to the lowest index."""
    _same_length(scores, group)
    return torch.tensor([int(m[top_k_indices(scores[m], 1)]) for m in _groups(group)], dtype=torch.long)


def best_worst_pair(scores: Tensor, group: Tensor) -> Tensor:
    """``[P, 2]``: (best, worst) row of every group; groups whose best and worst score are equal give no pair."""
    _same_length(scores, group)
    pairs = []
    for members in _groups(group):
        best = int(members[top_k_indices(scores[members], 1)])
        worst = int(members[top_k_indices(-scores[members], 1)])
        if scores[best] > scores[worst]:
            pairs.append([best, worst])
    return torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)


def majority_vote(answers: Sequence[Hashable | None], min_agree: int = 1) -> tuple[Hashable | None, list[int]]:
    """The most frequent answer and the indices that gave it; (None, []) below ``min_agree`` votes or on a tie.

    ``None`` is "no answer" and never wins.
    """
    if min_agree < 1:
        raise ValueError(f"min_agree is {min_agree}; it must be at least 1")
    ranked = Counter(answer for answer in answers if answer is not None).most_common(2)
    if not ranked or ranked[0][1] < min_agree or (len(ranked) == 2 and ranked[0][1] == ranked[1][1]):
        return None, []
    winner = ranked[0][0]
    return winner, [i for i, answer in enumerate(answers) if answer == winner]


def _same_length(scores: Tensor, group: Tensor) -> None:
    if scores.dim() != 1 or scores.shape != group.shape:
        raise ValueError(f"scores and group have shapes {tuple(scores.shape)} and {tuple(group.shape)}; both are [B]")
