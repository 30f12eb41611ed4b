"""Heuristic filters of documents: each says why a text is left out, or nothing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mmalign.config import Options
from mmalign.errors import DataError

_WORD = re.compile(r"\w+", re.UNICODE)
_URL = re.compile(r"https?://[^\s<>\"')\]]+|www\.[^\s<>\"')\]]+", re.IGNORECASE)

Unit = Literal["words", "characters"]


class RepetitionOptions(Options):
    """When a text repeats itself too much."""

    n: int = Field(default=3, ge=1)
    """Length of the pieces that are counted."""
    max_share: float = Field(default=0.3, ge=0, le=1)
    """Largest share of pieces that occurred before in the same text."""
    unit: Unit = "words"
    """Pieces of n words, or of n characters for scripts without spaces."""


class HeuristicOptions(Options):
    """Filters that read one text at a time."""

    min_characters: int | None = Field(default=None, ge=0)
    """Shorter texts are left out."""
    max_characters: int | None = Field(default=None, ge=1)
    """Longer texts are left out."""
    min_words: int | None = Field(default=None, ge=0)
    """Texts of fewer words are left out."""
    max_words: int | None = Field(default=None, ge=1)
    """Texts of more words are left out."""
    repetition: RepetitionOptions | None = None
    """Leave out texts whose n-grams repeat: ``{n: 3, max_share: 0.3}``."""
    banned_words: list[str] | str = []
    """Words, or a file with one per line; compared without case, as whole words."""
    max_banned_words: int = Field(default=0, ge=0)
    """Occurrences of banned words that are still accepted."""
    banned_urls: list[str] | str = []
    """Hosts or beginnings of paths (``example.com``, ``example.com/ads``), or a file with one per line; looked for in the
    column ``url`` and in the links of the text. Subdomains count."""
    groups: list[str] | None = None
    """Accepted values of the column ``by``; rows of others are left out."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse bounds that exclude everything."""
        for unit in ("characters", "words"):
            low, high = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if low is not None and high is not None and low > high:
                raise ValueError(f"min_{unit} is {low} and max_{unit} {high}; no text can be both")


class Heuristics:
    """The filters of a configuration with their lists loaded."""

    def __init__(self, options: HeuristicOptions, *, folder: Path | None = None) -> None:
        self.options = options
        self.words = {word.casefold() for word in _listed(options.banned_words, "banned_words", folder)}
        self.urls = [_address(url) for url in _listed(options.banned_urls, "banned_urls", folder)]

    def reason(self, text: str, row: Mapping[str, Any], *, group: str | None = None) -> str | None:
        """Why ``text`` is left out (a short name, the same for every text left out for that reason), or None."""
        options = self.options
        if options.groups is not None and group not in options.groups:
            return "other group"
        if not text.strip():
            return "empty"
        if _outside(len(text), options.min_characters, options.max_characters):
            return "characters"
        words = _WORD.findall(text.casefold())
        if _outside(len(words), options.min_words, options.max_words):
            return "words"
        if self.words and sum(word in self.words for word in words) > options.max_banned_words:
            return "banned words"
        if self.urls and self._banned_link(text, row):
            return "banned urls"
        if options.repetition is not None:
            pieces: Any = words if options.repetition.unit == "words" else text
            if repeated_share(pieces, options.repetition.n) > options.repetition.max_share:
                return "repetition"
        return None

    def _banned_link(self, text: str, row: Mapping[str, Any]) -> bool:
        links = [*_URL.findall(text), *([row["url"]] if isinstance(row.get("url"), str) else [])]
        return any(_matches(_address(link), banned) for link in links for banned in self.urls)


def repeated_share(pieces: Any, n: int) -> float:
    """Share of the n-grams of a sequence that occurred before in it: ``1 - distinct / all``; 0 without n-grams."""
    grams = Counter(tuple(pieces[i : i + n]) for i in range(len(pieces) - n + 1))
    total = sum(grams.values())
    return 1 - len(grams) / total if total else 0.0


def row_text(row: Mapping[str, Any], column: str | None = None) -> str:
    """The text of a row: a named column, or ``text``, else everything said in its prompt, completion, answers or messages."""
    if column is not None:
        if column not in row:
            raise DataError(f"column: the rows have no column {column!r}; they have {', '.join(row)}")
        return _spoken(row[column])
    if isinstance(row.get("text"), str):
        return str(row["text"])
    columns = ("messages", "prompt", "completion", "chosen", "rejected")
    parts = [_spoken(row[name]) for name in columns if row.get(name) is not None]
    if not parts:
        raise DataError(f"column: no text in the rows (columns {', '.join(row)}); name the column that holds it")
    return "\n".join(parts)


def _spoken(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "\n".join(str(turn.get("content", "")) if isinstance(turn, Mapping) else str(turn) for turn in value)
    return "" if value is None else str(value)


def _outside(size: int, low: int | None, high: int | None) -> bool:
    return (low is not None and size < low) or (high is not None and size > high)


def _listed(value: list[str] | str, key: str, folder: Path | None) -> Iterable[str]:
    if isinstance(value, list):
        return value
    for path in ([folder / value] if folder is not None else []) + [Path(value).expanduser()]:
        if path.is_file():
            return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    raise DataError(f"heuristics.{key}: the file {value} does not exist; give a list, or a file with one entry per line")


def _address(url: str) -> str:
    return re.sub(r"^(?:https?://)?(?:www\.)?", "", url.strip().casefold()).rstrip("/")


def _matches(address: str, banned: str) -> bool:
    host, separator, path = banned.partition("/")
    own_host, _, own_path = address.partition("/")
    own_host = own_host.partition(":")[0]
    same_host = own_host == host or own_host.endswith("." + host)
    return same_host and (not separator or own_path == path or own_path.startswith(path + "/"))
