"""Choosing rows by score: exact counts, ties to the lowest index, everything by index and never by text."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple

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


def statistical_rejection(
    rewards: Tensor | Sequence[float], n: int, *, beta: float, uniforms: Iterable[float] | torch.Generator,
) -> list[int]:
    """Indices of ``n`` of the candidates, drawn so that they follow ``p(y) exp(r(y) / beta)`` when candidates follow ``p``.

    Passes go through the candidates still there, in order, and accept candidate c when ``u < exp((r_c - max r) / beta)``,
    the maximum being that of the pass; accepted ones leave (no replacement), until n are accepted. ``beta`` = 0 gives
    the n best (best-of-N), ``beta`` = inf the first n (plain sampling). RSO: Liu et al. 2023, arXiv 2309.06657,
    section 3.3 and algorithm 1, which keys candidates by text; here a candidate is its index, so equal texts stay
    several proposals and short answers keep their probability.

    Args:
        rewards: ``[N]`` finite rewards. Adding a constant to all changes nothing.
        n: how many to accept.
        beta: temperature of the target distribution.
        uniforms: numbers in [0, 1), one per candidate looked at, or a generator that makes them.

    Raises:
        ValueError: more accepted than candidates, a reward that is not finite, negative ``beta``, a uniform outside
            [0, 1), or too few of them.
    """
    return [index for index, _ in rejection_passes(rewards, n, beta=beta, uniforms=uniforms)]


def rejection_passes(
    rewards: Tensor | Sequence[float], n: int, *, beta: float, uniforms: Iterable[float] | torch.Generator,
) -> list[tuple[int, int]]:
    """What :func:`statistical_rejection` accepts, each index with the number of the pass that accepted it (from 0)."""
    values = torch.as_tensor(rewards, dtype=torch.float64)
    if values.dim() != 1 or not bool(torch.isfinite(values).all()):
        raise ValueError(f"rewards must be [N] finite numbers, not {values.flatten()[:8].tolist()}")
    if not 0 <= n <= len(values):
        raise ValueError(f"n is {n}; it must lie between 0 and the {len(values)} candidates given")
    if math.isnan(beta) or beta < 0:
        raise ValueError(f"beta is {beta}; it must be 0 (the best n), positive, or inf (the first n)")
    if beta == 0:
        return [(index, 0) for index in top_k_indices(values, n).tolist()]
    if math.isinf(beta):
        return [(index, 0) for index in range(n)]
    stream, listed = _uniforms(uniforms), values.tolist()
    accepted: list[tuple[int, int]] = []
    alive, number = list(range(len(listed))), 0
    while len(accepted) < n:
        highest = max(listed[index] for index in alive)
        rest = []
        for index in alive:
            # Once n are accepted nothing more is drawn, so exactly n are given, in the middle of a pass too.
            if len(accepted) < n and next(stream) < math.exp((listed[index] - highest) / beta):
                accepted.append((index, number))
            else:
                rest.append(index)
        alive, number = rest, number + 1
    return accepted


def _uniforms(source: Iterable[float] | torch.Generator) -> Iterator[float]:
    if isinstance(source, torch.Generator):
        while True:
            yield from torch.rand(256, generator=source, dtype=torch.float64, device=source.device).tolist()
    for value in source:
        if not 0 <= value < 1:
            raise ValueError(f"uniforms holds {value}; all must lie in [0, 1)")
        yield float(value)
    raise ValueError("uniforms ran out before n candidates were accepted; give more of them, or a generator")


Prefer = Callable[[Sequence[tuple[int, int]]], Sequence[float]]
"""For pairs (a, b) of indices: positive where a wins, negative where b does, 0 where neither."""


def first_round(indices: Sequence[int], prefer: Prefer, *, generator: torch.Generator) -> list[tuple[int, int]]:
    """(winner, loser) of every match of one random draw: ``len(indices) // 2`` pairs, fewer when matches end in ties.

    With an odd number the last of the draw sits out (a warning says so). RSO, arXiv 2309.06657, section 3.4.
    """
    drawn = _shuffled(indices, generator)
    if len(drawn) % 2:
        warnings.warn(f"first_round: an odd number of samples ({len(drawn)}) cannot all be paired; one is left out",
                      stacklevel=2)
    return [(a, b) for a, b, result in _matches(drawn, prefer) if result]


def tournament(indices: Sequence[int], prefer: Prefer, *, generator: torch.Generator) -> list[tuple[int, int]]:
    """(winner, loser) of all matches of a knock-out tournament: ``len(indices) - 1`` pairs, fewer by ties.

    Winners meet again until one is left; with an odd number one passes to the next round, and after a tie the first
    drawn goes on without giving a pair. RSO, arXiv 2309.06657, section 3.4.
    """
    remaining, pairs = _shuffled(indices, generator), []
    while len(remaining) > 1:
        played = _matches(remaining, prefer)
        pairs += [(a, b) for a, b, result in played if result]
        remaining = [a for a, _, _ in played] + remaining[2 * len(played) :]
    return pairs


def _shuffled(indices: Sequence[int], generator: torch.Generator) -> list[int]:
    return [indices[i] for i in torch.randperm(len(indices), generator=generator).tolist()]


def _matches(drawn: Sequence[int], prefer: Prefer) -> list[tuple[int, int, bool]]:
    """(winner, loser, whether there was one) of neighbours; the first of a tie stands in for the winner."""
    meetings = list(zip(drawn[0::2], drawn[1::2], strict=False))
    results = prefer(meetings) if meetings else []
    return [(b, a, True) if result < 0 else (a, b, result > 0) for (a, b), result in zip(meetings, results, strict=True)]


PAIRINGS = {"first_round": first_round, "tournament": tournament}
"""How accepted samples meet, by name."""


class Triple(NamedTuple):
    """Indices of the three responses of a row, and how many responses shared their score with an earlier one."""

    gold: int
    chosen: int
    rejected: int
    ties: int


def make_triples(responses: Sequence[Hashable], scores: Tensor | Sequence[float], chosen_rank: int = 2) -> Triple:
    """Gold = the best response, chosen = the one at ``chosen_rank`` (from 1), rejected = the worst.

    Equal responses count once (the first); ties are broken by input order and counted. The triples of TPO: Saeidi et
    al. 2024, arXiv 2405.16681, which takes rank 2, 3 or 4. Raises ValueError for fewer than 3 distinct responses, a
    rank that is the first or last of them, or a score that is not finite.
    """
    values = torch.as_tensor(scores, dtype=torch.float64).tolist()
    if len(values) != len(responses) or not all(math.isfinite(value) for value in values):
        raise ValueError(f"scores must be one finite number for each of the {len(responses)} responses, not {values[:8]}")
    first: dict[Hashable, int] = {}
    for index, response in enumerate(responses):
        first.setdefault(response, index)
    ranked = sorted(first.values(), key=lambda index: (-values[index], index))
    if len(ranked) < 3:
        raise ValueError(f"responses holds {len(ranked)} distinct ones; a triple needs at least 3")
    if not 2 <= chosen_rank < len(ranked):
        raise ValueError(f"chosen_rank is {chosen_rank}; with {len(ranked)} distinct responses it must lie in "
                         f"2..{len(ranked) - 1}")
    ties = len(ranked) - len({values[index] for index in ranked})
    return Triple(ranked[0], ranked[chosen_rank - 1], ranked[-1], ties)


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
