"""How sure a measured number is: standard errors, intervals, paired differences and win rates.

Every result of an evaluation is shown with one of these. Sums are in float64. NaN is refused with DataError; what a
reward did not apply to is left out by the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from mmalign.errors import DataError

Values = Sequence[float] | Tensor


class Estimate(NamedTuple):
    """A mean and its standard error."""

    mean: float
    error: float


def as_values(values: Values, name: str = "values") -> Tensor:
    """``[N]`` float64; raises DataError for NaN, infinity, or anything that is not one-dimensional."""
    tensor = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    if tensor.dim() != 1:
        raise DataError(f"{name} must be one-dimensional, not of shape {tuple(tensor.shape)}")
    bad = (~torch.isfinite(tensor)).nonzero().flatten().tolist()
    if bad:
        raise DataError(f"{name}[{bad[0]}] is {tensor[bad[0]].item()}; leave out what has no value before averaging")
    return tensor


def _same_length(a: Tensor, b: Tensor) -> None:
    if len(a) != len(b):
        raise DataError(f"paired values differ in number: {len(a)} and {len(b)}; pair them by example first")


def mean_and_error(values: Values) -> Estimate:
    """Mean and its standard error ``s / sqrt(N)`` with ``s`` of N - 1 degrees of freedom.

    N = 0 gives (nan, nan); N = 1 has an unknown error, given as nan.
    """
    x = as_values(values)
    if not len(x):
        return Estimate(math.nan, math.nan)
    return Estimate(float(x.mean()), float(x.std() / math.sqrt(len(x))) if len(x) > 1 else math.nan)


def paired_difference(before: Values, after: Values) -> Estimate:
    """Mean of ``after - before`` over the same examples, and the standard error of that mean.

    The examples' own spread cancels, so the error is usually far below that of either mean. (nan, nan) for none.
    """
    x, y = as_values(before, "before"), as_values(after, "after")
    _same_length(x, y)
    return mean_and_error(y - x)


def bootstrap_interval(
    values: Values, *, confidence: float = 0.95, resamples: int = 2000,
    statistic: Callable[[Tensor], Tensor] | None = None, generator: torch.Generator | None = None,
) -> tuple[float, float]:
    """Percentile bootstrap interval (Efron 1979) of ``statistic`` (default: the mean) of the values.

    ``statistic`` maps ``[R, N]`` resamples to ``[R]`` numbers. Without ``generator`` the resamples are those of seed 0,
    so the interval of the same values is always the same.
    """
    x = as_values(values)
    if not len(x):
        raise DataError("no values: an interval needs at least one")
    _check_confidence(confidence)
    if resamples < 1:
        raise DataError(f"resamples={resamples} must be at least 1")
    generator = generator or torch.Generator().manual_seed(0)
    statistic = statistic or (lambda rows: rows.mean(1))
    rows_per_chunk = max(1, 2**22 // len(x))  # a few dozen megabytes whatever N
    parts = [
        statistic(x[torch.randint(len(x), (min(rows_per_chunk, resamples - start), len(x)), generator=generator)])
        for start in range(0, resamples, rows_per_chunk)
    ]
    tail = (1 - confidence) / 2
    low, high = torch.quantile(torch.cat(parts), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def wilson_interval(successes: float, count: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927): centre ``(p + z^2/2n) / (1 + z^2/n)``; always within [0, 1].

    ``successes`` may be fractional (half a success for a tie).
    """
    if count < 1 or not 0 <= successes <= count:
        raise DataError(f"successes={successes} of count={count}: needs 0 <= successes <= count and count >= 1")
    _check_confidence(confidence)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / count
    scale = 1 + z * z / count
    centre = (share + z * z / (2 * count)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise DataError(f"confidence={confidence} must be between 0 and 1, for example 0.95")


@dataclass(frozen=True)
class WinRate:
    """How often one system beats another on the same examples, ties counting half."""

    rate: float
    low: float
    high: float
    wins: int
    losses: int
    ties: int

    @property
    def count(self) -> int:
        """Number of comparisons."""
        return self.wins + self.losses + self.ties

    def __str__(self) -> str:
        return (f"{self.rate:.3f} [{self.low:.3f}, {self.high:.3f}] ({self.wins} wins, {self.losses} losses, "
                f"{self.ties} ties)")


def win_rate(ours: Values, theirs: Values, *, margin: float = 0.0, confidence: float = 0.95) -> WinRate:
    """Share of examples on which ``ours`` scores higher, with its Wilson interval.

    Scores that differ by ``margin`` or less are a tie, which counts as half a win.
    """
    x, y = as_values(ours, "ours"), as_values(theirs, "theirs")
    _same_length(x, y)
    if not len(x):
        raise DataError("no comparisons: a win rate needs at least one")
    wins, losses = int((x - y > margin).sum()), int((y - x > margin).sum())
    ties = len(x) - wins - losses
    low, high = wilson_interval(wins + ties / 2, len(x), confidence=confidence)
    return WinRate((wins + ties / 2) / len(x), low, high, wins, losses, ties)
