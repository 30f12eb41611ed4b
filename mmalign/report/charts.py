"""Charts as SVG text: line panels with a raw and a smoothed line, and stacked bars. No plotting library, no script.

Colours are CSS variables (``--ink``, ``--grid``, ``--series-0`` ...) that the page sets for light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

SERIES_COLOURS = 6
"""Number of ``--series-<i>`` variables a page defines; further series repeat them."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 8, 8, 22
_DENSE = 400
"""Points beyond which a raw line is drawn as the smallest and largest value of every bucket."""
_DECADES = 3.0
"""Positive values that span more decades than this are drawn on a logarithmic axis."""
_TINY = 1e-200


@dataclass(frozen=True)
class Series:
    """One line: ``y`` over ``x`` (NaN = no value there), and optionally half the height of a band around it."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] | None = None


def smooth(values: Sequence[float], span: float) -> list[float]:
    """Exponential moving average with weight ``2 / (span + 1)`` on the newest value, corrected for its start.

    The correction divides by the weight seen so far, so the first value is itself and a constant stays constant.
    NaN stays NaN and is not averaged in.
    """
    keep = 1 - 2 / (span + 1)
    total = weight = 0.0
    result = []
    for value in values:
        if math.isnan(value):
            result.append(math.nan)
            continue
        total = keep * total + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        result.append(total / weight)
    return result


def smoothing_span(count: int) -> float:
    """Span of the average for ``count`` points: a fifteenth of them, and none (1) for fewer than sixteen."""
    return max(1.0, count / 15) if count >= 16 else 1.0


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About ``count`` round numbers (1, 2 or 5 times a power of ten apart) inside ``[low, high]``."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def number(value: float) -> str:
    """A number as people read it: four significant digits, no trailing zeros."""
    if math.isnan(value):
        return "–"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        text = f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
        return text.replace("-", "−")
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}".replace("-", "−")


def signed(value: float) -> str:
    """:func:`number` with a plus sign before positive values."""
    return f"+{number(value)}" if value > 0 else number(value)


def plus_minus(value: float, error: float) -> str:
    """``+0.0021 ± 0.0027``: both with as many decimals as give the error two significant digits."""
    if not error > 0 or not math.isfinite(value):
        return f"{signed(value)} ± {number(error)}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:+.{decimals}f} ± {error:.{decimals}f}".replace("-", "−")


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    first: float
    last: float
    log: bool = False

    def at(self, value: float) -> float:
        """Pixel of ``value``."""
        if self.log:
            value = math.log10(value)
        return self.first + (value - self.low) / (self.high - self.low) * (self.last - self.first)

    def ticks(self, count: int) -> list[float]:
        """Tick values."""
        if self.log:
            decades = range(math.ceil(self.low - 1e-9), math.floor(self.high + 1e-9) + 1)
            every = max(1, math.ceil(len(decades) / count))
            return [10.0**d for d in decades][::every]
        return nice_ticks(self.low, self.high, count)


def _axis(values: Sequence[float], first: float, last: float, *, margin: float, log: bool = False) -> _Axis:
    numbers = [math.log10(v) for v in values] if log else list(values)
    low, high = min(numbers), max(numbers)
    if high - low < 1e-12 * max(1.0, abs(high)):
        if high == 0 and not log:
            return _Axis(0.0, 1.0, first, last)
        pad = abs(high) * 0.1 or 1.0
        return _Axis(low - pad, high + pad, first, last, log)
    pad = margin * (high - low)
    return _Axis(low - pad, high + pad, first, last, log)


def line_panel(title: str, series: Sequence[Series], *, x_label: str = "update", width: int = 320, height: int = 170) -> str:
    """One panel of a small-multiples page as an HTML ``figure``: heading, latest values, SVG.

    Every series is drawn twice, raw and thin, smoothed and thick (:func:`smooth`); fewer than 16 points are only drawn
    raw, with markers. A series with ``spread`` gets a band of that half height around the smoothed line. Returns "" when
    no series has a finite value.
    """
    series = [s for s in series if any(math.isfinite(y) for y in s.y)]
    if not series:
        return ""
    spans = [smoothing_span(len(s.y)) for s in series]
    lines = [smooth(s.y, span) for s, span in zip(series, spans, strict=True)]
    bands = [_band(s, line, span) for s, line, span in zip(series, lines, spans, strict=True)]
    heights = [y for s in series for y in s.y if math.isfinite(y)]
    # Below _TINY the powers of ten of the ticks would leave the range of floats.
    log = min(heights) > _TINY and math.log10(max(heights)) - math.log10(min(heights)) > _DECADES
    heights += [] if log else [y for band in bands for y in band if math.isfinite(y)]
    xs = [x for s in series for x in s.x]
    horizontal = _axis(xs, _LEFT, width - _RIGHT, margin=0.0)
    vertical = _axis(heights, height - _BOTTOM, _TOP, margin=0.06, log=log)
    parts = _frame(horizontal, vertical, width, height, x_label)
    for index, (s, line, band) in enumerate(zip(series, lines, bands, strict=True)):
        parts += _draw(s, line, [] if log else band, horizontal, vertical, f"var(--series-{index % SERIES_COLOURS})")
    svg = "".join(parts)
    label = escape(f"{title} over {x_label}s")
    heading = f'{escape(title)}{" (log scale)" if log else ""}<span>{_legend(series, lines)}</span>'
    return (
        f'<figure class="panel"><figcaption>{heading}</figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{svg}</svg></figure>'
    )


def _band(series: Series, line: Sequence[float], span: float) -> list[float]:
    if series.spread is None:
        return []
    half = smooth(series.spread, span)
    return [m + h for m, h in zip(line, half, strict=True)] + [m - h for m, h in zip(line, half, strict=True)]


def _legend(series: Sequence[Series], lines: Sequence[Sequence[float]]) -> str:
    shown = []
    for index, (s, line) in enumerate(zip(series, lines, strict=True)):
        last = next((y for y in reversed(line) if math.isfinite(y)), math.nan)
        key = f'<i style="background:var(--series-{index % SERIES_COLOURS})"></i>{escape(s.label)} ' if len(series) > 1 else ""
        shown.append(f'<span class="last">{key}{number(last)}</span>')
    return "".join(shown)


def _frame(horizontal: _Axis, vertical: _Axis, width: int, height: int, x_label: str) -> list[str]:
    parts = []
    for tick in vertical.ticks(4):
        y = vertical.at(tick)
        parts.append(f'<line x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
                     f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in horizontal.ticks(4):
        if tick == int(tick):  # updates are whole numbers
            x = min(horizontal.at(tick), width - _RIGHT)
            anchor = "end" if x > width - 24 else "middle"
            parts.append(f'<text x="{x:.1f}" y="{height - 7}" text-anchor="{anchor}">{number(tick)}</text>')
    parts.append(f'<text x="{_LEFT - 6}" y="{height - 7}" text-anchor="end" class="unit">{escape(x_label)}</text>')
    return parts


def _draw(series: Series, line: Sequence[float], band: Sequence[float], h: _Axis, v: _Axis, colour: str) -> list[str]:
    parts = []
    count = len(series.y)
    if band:
        upper = [(x, y) for x, y in zip(series.x, band[:count], strict=True) if math.isfinite(y)]
        lower = [(x, y) for x, y in zip(series.x, band[count:], strict=True) if math.isfinite(y)]
        corners = " ".join(f"{h.at(x):.1f},{v.at(y):.1f}" for x, y in [*_thin(upper), *reversed(_thin(lower))])
        parts.append(f'<polygon points="{corners}" fill="{colour}" class="band"/>')
    raw = list(zip(series.x, series.y, strict=True))
    if count < 16:
        parts.append(_path(raw, h, v, colour, "smooth"))
        parts += [f'<circle cx="{h.at(x):.1f}" cy="{v.at(y):.1f}" r="2.2" fill="{colour}"/>' for x, y in raw if math.isfinite(y)]
        return parts
    parts.append(_path(_extremes(raw), h, v, colour, "raw"))
    parts.append(_path(_thin(list(zip(series.x, line, strict=True))), h, v, colour, "smooth"))
    return parts


Point = tuple[float, float]


def _thin(points: Sequence[Point]) -> list[Point]:
    """Every n-th point and the last, so that about ``_DENSE`` stay."""
    step = max(1, math.ceil(len(points) / _DENSE))
    kept = list(points[::step])
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


def _extremes(points: Sequence[Point]) -> list[Point]:
    """The smallest and the largest point of every bucket, in order: a dense line keeps its spikes."""
    if len(points) <= _DENSE:
        return list(points)
    size = math.ceil(len(points) / (_DENSE / 2))
    kept: list[Point] = []
    for start in range(0, len(points), size):
        bucket = [p for p in points[start : start + size] if math.isfinite(p[1])]
        if bucket:
            kept += sorted({min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])})
    return kept


def _path(points: Sequence[Point], h: _Axis, v: _Axis, colour: str, kind: str) -> str:
    commands, pen = [], "M"
    for x, y in points:
        if not math.isfinite(y):
            pen = "M"
            continue
        commands.append(f"{pen}{h.at(x):.1f} {v.at(y):.1f}")
        pen = "L"
    return f'<path d="{"".join(commands)}" stroke="{colour}" class="{kind}"/>'


def stacked_bar(parts: Mapping[str, float], *, width: int = 660) -> str:
    """One horizontal bar of seconds split into ``parts`` in their order, with a legend of shares; "" for nothing."""
    total = sum(value for value in parts.values() if value > 0)
    if not total > 0:
        return ""
    bars, legend, x = [], [], 0.0
    for index, (name, value) in enumerate(parts.items()):
        if value <= 0:
            continue
        colour = f"var(--series-{index % SERIES_COLOURS})"
        opacity = 1.0 if index < SERIES_COLOURS else 0.55
        share = value / total
        text = f"{name}: {duration(value)} ({100 * share:.0f}%)"
        bars.append(f'<rect x="{x:.2f}" y="0" width="{max(share * width, 0.5):.2f}" height="22" fill="{colour}" '
                    f'fill-opacity="{opacity}"><title>{escape(text)}</title></rect>')
        legend.append(f'<span class="key"><i style="background:{colour};opacity:{opacity}"></i>{escape(text)}</span>')
        x += share * width
    label = escape(", ".join(f"{name} {100 * value / total:.0f}%" for name, value in parts.items()))
    return (f'<figure class="bar"><svg viewBox="0 0 {width} 22" preserveAspectRatio="none" role="img" aria-label="{label}">'
            f'{"".join(bars)}</svg><figcaption>{"".join(legend)}</figcaption></figure>')


def duration(seconds: float) -> str:
    """``3.2 s``, ``4 min 10 s`` or ``2 h 05 min``."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
