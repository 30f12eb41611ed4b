"""How many tokens a tokenizer needs for a text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mmalign.errors import DataError
from mmalign.metrics import metric

_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
"""Thai, Lao, Burmese, Khmer, Japanese and Chinese: scripts that put no spaces between words."""


def word_count(text: str) -> int:
    """Words of a text: runs without white space; every character of a script without spaces is one."""
    unspaced = len(_UNSPACED.findall(text))
    return unspaced + len(_UNSPACED.sub(" ", text).split())


@metric("fertility", higher_is_better=False)
def fertility(tokens: Sequence[int], texts: Sequence[str]) -> float:
    """Tokens per word over all texts (per character in scripts that put no spaces between words).

    Raises DataError for lists of different lengths, or texts without a word.
    """
    if len(tokens) != len(texts):
        raise DataError(f"{len(tokens)} token counts for {len(texts)} texts; one each is needed")
    words = sum(map(word_count, texts))
    if not words:
        raise DataError("the texts hold no words, so tokens per word have no meaning")
    return sum(tokens) / words
