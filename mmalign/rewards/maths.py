"""Comparing final answers: numbers exactly, as fractions, and short texts.

The parser reads integers, decimals, fractions, percentages, thousands separators, powers of ten, ``\\boxed`` and small
arithmetic. It is built on :class:`fractions.Fraction` and the syntax tree of :mod:`ast`; nothing is ever evaluated.
"""

from __future__ import annotations

import ast
import operator
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from mmalign.errors import RewardError
from mmalign.rewards.registry import reward
from mmalign.rewards.text import completion_text, nonempty

Extract = Literal["auto", "tag", "boxed", "last_number", "whole"]
Compare = Literal["auto", "number", "text", "math_verify"]

_MAX_LENGTH = 200
_MAX_BITS = 4096
_MAX_EXPONENT = 1000

_NUMBER = re.compile(
    r"(?<![\w.])[-+]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:(?<=\d)\.?|\.(?=\d))\d*(?:[eE][-+]?\d+)?(?:\s?/\s?\d+(?:\.\d+)?)?\s?\\?%?"
)


@dataclass(frozen=True)
class Number:
    """An exact value, and whether it was written with a percent sign (``50%`` has the value 1/2)."""

    value: Fraction
    percent: bool = False

    def equals(self, other: Number, *, tolerance: float = 0.0) -> bool:
        """Same value, within ``tolerance * |self|``. ``50%`` equals ``0.5``, and also ``50`` written without the sign."""
        candidates = [other.value]
        if self.percent != other.percent:
            candidates.append(other.value * 100 if other.percent else other.value / 100)
        allowed = Fraction(tolerance) * abs(self.value)
        return any(abs(self.value - value) <= allowed for value in candidates)


_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_REPLACEMENTS = (
    (re.compile(r"\\(?:left|right|displaystyle|,|!|;|:|quad)|~|\\ "), ""),
    (re.compile(r"\\(?:text|mathrm|mathbf|textbf|operatorname)\s*\{([^{}]*)\}"), r" \1"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\(?:times|cdot)|×|·|⋅"), "*"),
    (re.compile(r"\\div|÷"), "/"),
    (re.compile("[−–]"), "-"),
    (re.compile("⁄"), "/"),
    (re.compile(r"\\?[$€£]"), ""),
)
_THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?:,\d{3})+(?![\d,])")
_LEADING_ZEROS = re.compile(r"(?<![\d.])0+(?=\d)")
_MIXED = re.compile(r"(?<![\d.)])(\d+)\s+(\(?\d+\)?\s*/\s*\(?\d+\)?)")


def parse_number(text: str) -> Number | None:
    """The exact number that the whole of ``text`` writes, or None when it is not one.

    >>> parse_number("1,234.50").value, parse_number(r"\\\\frac{3}{4}").value, parse_number("3 1/2").value
    (Fraction(2469, 2), Fraction(3, 4), Fraction(7, 2))
    """
    text = _plain(text)
    if not text or len(text) > _MAX_LENGTH:
        return None
    percent = text.endswith("%")
    if percent:
        text = text.rstrip("%").rstrip("\\ ")
    try:
        value = _evaluate(ast.parse(text, mode="eval").body, text)
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        return None
    return Number(value / 100 if percent else value, percent)


def _plain(text: str) -> str:
    """``text`` with LaTeX, Unicode and separators rewritten as Python arithmetic."""
    if len(text) > 4 * _MAX_LENGTH:
        return ""
    boxed = last_boxed(text)
    text = text if boxed is None else boxed
    text = _MIXED_UNICODE.sub(r"\1 ", text)
    text = unicodedata.normalize("NFKC", text).strip().rstrip(".").strip()
    for pattern, replacement in _REPLACEMENTS:
        text = pattern.sub(replacement, text)
    text = re.sub(r"(\d)\s*(\\[dtc]?frac)", r"\1 \2", text)  # a mixed number
    while (replaced := _FRACTION.sub(_as_quotient, text)) != text:
        text = replaced
    text = text.rpartition("=")[2].strip()  # x = 5
    text = _THOUSANDS.sub(lambda m: m[0].replace(",", ""), text)
    text = text.replace("^", "**").replace("{", "(").replace("}", ")")
    text = _LEADING_ZEROS.sub("", text)
    return _MIXED.sub(r"(\1 + \2)", text)


_MIXED_UNICODE = re.compile("(\\d)(?=[\u00bc-\u00be\u2150-\u215e])")


def _as_quotient(match: re.Match[str]) -> str:
    top, bottom = match[1] or match[2], match[3] or match[4]
    # Plain integers stay bare so that "1 \frac{1}{2}" can be read as a mixed number.
    return f"{top}/{bottom}" if top.isdigit() and bottom.isdigit() else f"(({top})/({bottom}))"


_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}


def _evaluate(node: ast.expr, source: str) -> Fraction:
    """Exact value of an arithmetic tree; ValueError for anything but numbers, signs and ``+ - * / **``."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        # The digits as written: 0.1 must be 1/10, not the nearest binary number.
        value = _literal(ast.get_source_segment(source, node) or "")
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        inner = _evaluate(node.operand, source)
        value = -inner if isinstance(node.op, ast.USub) else inner
    elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        value = _BINARY[type(node.op)](_evaluate(node.left, source), _evaluate(node.right, source))
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        value = _power(_evaluate(node.left, source), _evaluate(node.right, source))
    else:
        raise ValueError("not arithmetic")
    if value.numerator.bit_length() > _MAX_BITS or value.denominator.bit_length() > _MAX_BITS:
        raise ValueError("too large")
    return value


def _literal(digits: str) -> Fraction:
    _, marker, exponent = digits.lower().partition("e")
    if marker and abs(int(exponent)) > _MAX_EXPONENT:
        raise ValueError("exponent too large")
    return Fraction(digits)


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1 or abs(exponent) > _MAX_EXPONENT:
        raise ValueError("only small whole exponents")
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if bits * abs(int(exponent)) > _MAX_BITS:
        raise ValueError("too large")
    return base ** int(exponent)


def last_boxed(text: str) -> str | None:
    r"""Content of the last complete ``\boxed{...}`` (or ``\fbox``), braces balanced; None when there is none."""
    for match in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))):
        depth = 1
        for position in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[match.end() : position]
    return None


def last_number(text: str) -> Number | None:
    """The last number written anywhere in ``text``, with its sign, fraction bar or percent sign."""
    prepared = text.replace("−", "-").replace("{,}", ",")
    matches = [m[0] for m in _NUMBER.finditer(prepared) if any(c.isdigit() for c in m[0])]
    return parse_number(matches[-1]) if matches else None


def extract_answer(text: str, how: Extract = "auto", *, tag: str = "answer", dotall: bool = True) -> str:
    """The part of a completion that states its answer.

    ``tag``: inside the first ``<tag>...</tag>``, else the whole text. ``boxed``: the last ``\\boxed{}``, else empty.
    ``auto``: the last boxed answer, else the tag, else what follows the last ``####`` (GSM8K), else the whole text.
    ``last_number`` and ``whole`` return the text, stripped.
    """
    if how in ("auto", "boxed"):
        boxed = last_boxed(text)
        if boxed is not None or how == "boxed":
            return (boxed or "").strip()
    if how in ("auto", "tag"):
        found = re.search(rf"<{re.escape(tag)}>(.*?)</{re.escape(tag)}>", text, re.DOTALL if dotall else 0)
        if found:
            return found[1].strip()
    if how == "auto" and "####" in text:
        return text.rpartition("####")[2].strip()
    if how not in ("auto", "tag", "last_number", "whole"):
        raise RewardError(f"extract={how!r} is unknown; allowed: auto, tag, boxed, last_number, whole")
    return text.strip()


@reward("answer_match", aliases=("accuracy", "math_answer"), range=(0, 1), needs=("answer",))
def answer_match(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], *, extract: Extract = "auto",
    compare: Compare = "auto", tag: str = "answer", dotall: bool = True, ignore_case: bool = True,
    tolerance: float = 0.0, **columns: Any,
) -> list[float | None]:
    """1 where the completion's final answer equals ``answer``, else 0; None where the answer is None.

    Args:
        extract: where the answer stands in the completion, see :func:`extract_answer`.
        compare: "number": exactly, as fractions (None where ``answer`` is not a number); "text": as strings, outer
            whitespace ignored; "auto": as numbers when ``answer`` is one, else as text; "math_verify": symbolically,
            by the extra package of that name.
        tag, dotall: the tag that holds the answer, and whether it may span lines.
        ignore_case: for text.
        tolerance: relative, for numbers; 0 asks for equality.

    With ``compare="text", extract="tag"`` this is the accuracy reward of CLS-RL (Li et al. 2025, arXiv 2503.16188)
    without its symbolic comparison, which would confuse class names that contain numbers.
    """
    if compare not in ("auto", "number", "text", "math_verify"):
        raise RewardError(f"compare={compare!r} is unknown; allowed: auto, number, text, math_verify")
    if tolerance < 0:
        raise RewardError(f"tolerance={tolerance} cannot be negative")
    results: list[float | None] = []
    for completion, truth in zip(completions, answer, strict=True):
        if truth is None:
            results.append(None)
            continue
        text, expected = completion_text(completion), nonempty(truth)
        if compare == "math_verify":
            results.append(_verify(text, expected))
            continue
        target = extract_answer(expected, "tag" if extract == "tag" else "auto", tag=tag, dotall=dotall)
        number = None if compare == "text" else parse_number(target)
        if compare == "number" and number is None:
            results.append(None)
            continue
        found = extract_answer(text, extract, tag=tag, dotall=dotall)
        if number is not None:
            given = None if extract == "last_number" else parse_number(found)
            given = given or last_number(found)
            results.append(float(given is not None and number.equals(given, tolerance=tolerance)))
        else:
            results.append(float(found.casefold() == target.casefold() if ignore_case else found == target))
    return results


def _verify(text: str, expected: str) -> float | None:
    """Symbolic equality by math-verify; None when it cannot read the expected answer."""
    import threading

    try:
        from math_verify import parse, verify
    except ImportError:
        raise RewardError("compare=math_verify needs `pip install mmalign[maths]` (the package math-verify)") from None
    # math-verify stops long parses with a signal, which only the main thread may set.
    limits = {} if threading.current_thread() is threading.main_thread() else {"parsing_timeout": None}
    gold = parse(expected if "\\" not in expected or "$" in expected or "boxed" in expected else f"${expected}$", **limits)
    if not gold:
        return None
    answer = parse(text, **limits)
    timeout = {} if not limits else {"timeout_seconds": None}
    return float(bool(verify(gold, answer, **timeout)))
