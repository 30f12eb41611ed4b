"""Graded rewards that compare a completion with a reference answer: token F1, BLEU and chrF, all from 0 to 1."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal

from mmalign.errors import ConfigError, RewardError
from mmalign.rewards.registry import reward
from mmalign.rewards.text import completion_text, nonempty

_WORDS = re.compile(r"\w+|[^\w\s]", re.UNICODE)


def words(text: str) -> list[str]:
    """Words and punctuation marks, in lower case."""
    return _WORDS.findall(text.casefold())


def overlap_f1(found: Sequence[str], expected: Sequence[str]) -> float:
    """``2PR / (P + R)`` over multisets of tokens; 0 when nothing is shared. Rajpurkar et al. 2016, arXiv 1606.05250."""
    shared = sum((Counter(found) & Counter(expected)).values())
    return 2 * shared / (len(found) + len(expected)) if shared else 0.0


@reward("token_f1", range=(0, 1), needs=("answer",))
def token_f1(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str | None], **columns: Any,
) -> list[float | None]:
    """F1 between the words of the completion and of ``answer``, case ignored; None where the answer is None."""
    return [None if truth is None else overlap_f1(words(completion_text(c)), words(nonempty(truth)))
            for c, truth in zip(completions, answer, strict=True)]


@reward("translation_score", range=(0, 1), needs=("answer",))
def translation_score(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], *, metric: Literal["chrf", "bleu"] = "chrf",
    **columns: Any,
) -> list[float | None]:
    """Sentence chrF (or BLEU with effective order) of ``answer`` by sacrebleu, divided by 100; None where it is None.

    ``answer`` is one reference or a list of them. Popović 2015 (chrF); Post 2018, arXiv 1804.08771 (sacrebleu). Raises
    ConfigError when sacrebleu is not installed.
    """
    score = _sentence_scorer(metric)
    values: list[float | None] = []
    for completion, truth in zip(completions, answer, strict=True):
        if truth is None:
            values.append(None)
            continue
        references = [nonempty(truth)] if isinstance(truth, str) else [nonempty(reference) for reference in truth]
        if not references:
            raise RewardError("answer is an empty list of references; drop the row or use null")
        values.append(min(1.0, score(completion_text(completion), references) / 100))
    return values


@lru_cache(maxsize=4)
def _sentence_scorer(metric: str) -> Callable[[str, list[str]], float]:
    if metric not in ("chrf", "bleu"):
        raise ConfigError(f"metric: {metric!r} is unknown; allowed: chrf, bleu")
    library = _sacrebleu("reward translation_score", "eval", "; or use token_f1")
    scorer = library.CHRF() if metric == "chrf" else library.BLEU(effective_order=True)
    return lambda found, references: float(scorer.sentence_score(found, references).score)


def token_bleu(gold: Sequence[str], predicted: Sequence[str], *, max_order: int = 4) -> float:
    """BLEU in [0, 1] of one sequence of tokens (without white space) against another, by sacrebleu and not smoothed.

    ``exp(min(0, 1 - g / p)) * (prod_n precision_n) ** (1 / N)`` with ``N = min(max_order, g, p)`` and ``g``, ``p`` the lengths,
    so that short sequences are not 0 for want of 4-grams; 0 for an empty one. Papineni et al. 2002; with the tokens of
    formulas in Yang et al. 2023, arXiv 2305.15541. Raises ConfigError when sacrebleu is not installed.
    """
    order = min(max_order, len(gold), len(predicted))
    if order < 1:
        return 0.0
    return min(1.0, _token_scorer(order)(" ".join(predicted), [" ".join(gold)]) / 100)


@lru_cache(maxsize=8)
def _token_scorer(order: int) -> Callable[[str, list[str]], float]:
    library = _sacrebleu("BLEU of tokens", "logic")
    scorer = library.BLEU(max_ngram_order=order, tokenize="none", smooth_method="none", effective_order=True)
    return lambda found, references: float(scorer.sentence_score(found, references).score)


def _sacrebleu(needed_by: str, extra: str, hint: str = "") -> Any:
    try:
        import sacrebleu
    except ImportError:
        raise ConfigError(f"{needed_by} needs sacrebleu: pip install 'mmalign[{extra}]'{hint}") from None
    return sacrebleu
