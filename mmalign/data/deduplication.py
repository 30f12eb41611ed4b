"""Exact and near duplicates of texts.

Near duplicates are found with MinHash signatures in a locality-sensitive index (Broder 1997; the ``datasketch`` package,
extra ``dedup``) and confirmed by the exact Jaccard similarity of their shingles. Where the index of all texts does not fit
in memory, texts are compared chunk by chunk in several turns.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field

from mmalign.config import Options
from mmalign.core.seeding import derive_seed, generator
from mmalign.errors import ConfigError

_SPACE = re.compile(r"\s+")
_WORD = re.compile(r"\w+", re.UNICODE)


class NearDuplicateOptions(Options):
    """How alike two texts must be for the later one to be left out."""

    threshold: float = Field(default=0.8, gt=0, le=1)
    """Jaccard similarity of their shingles at and above which two texts count as the same."""
    permutations: int = Field(default=128, ge=16)
    """Length of a MinHash signature: more find more of the pairs near the threshold, and cost more."""
    shingle: int = Field(default=5, ge=1)
    """Units in a shingle."""
    unit: Literal["words", "characters"] = "characters"
    """Unit of a shingle; characters suit scripts without spaces as well."""
    chunks: int = Field(default=1, ge=1)
    """1 compares all texts at once. More split them into so many chunks, of which ``chunks_per_turn`` are compared together."""
    chunks_per_turn: int = Field(default=2, ge=1)
    """Chunks drawn in a turn; after each turn the texts that are left are split anew."""
    smallest_gain: float = Field(default=0.01, ge=0, lt=1)
    """Turns end when one removes less than this share of the texts it looked at."""
    max_turns: int = Field(default=100, ge=1)
    """Turns at most."""


@dataclass(frozen=True)
class Deduplication:
    """What was found."""

    dropped: frozenset[int]
    """Numbers of the texts to leave out; of every pair the later one."""
    turns: int
    """Turns it took (1 when everything was compared at once)."""


def exact_duplicates(texts: Iterable[str]) -> set[int]:
    """Numbers of texts that equal an earlier one up to case and white space; 16 bytes are kept per text."""
    seen: set[bytes] = set()
    dropped = set()
    for number, text in enumerate(texts):
        key = hashlib.blake2b(_SPACE.sub(" ", text.casefold()).strip().encode(), digest_size=16).digest()
        if key in seen:
            dropped.add(number)
        seen.add(key)
    return dropped


def shingles(text: str, size: int, unit: str) -> frozenset[str]:
    """The set of runs of ``size`` words or characters; a shorter text is one shingle."""
    plain = _SPACE.sub(" ", text.casefold()).strip()
    units: Sequence[str] = _WORD.findall(plain) if unit == "words" else plain
    glue = " " if unit == "words" else ""
    return frozenset(glue.join(units[i : i + size]) for i in range(max(1, len(units) - size + 1)))


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    """``|A and B| / |A or B|``."""
    return len(first & second) / max(1, len(first | second))


def near_duplicates(
    text_of: Callable[[int], str], count: int, options: NearDuplicateOptions, *, seed: int,
    report: Callable[[int, int], None] | None = None,
) -> Deduplication:
    """Which of ``count`` texts nearly equal an earlier one.

    ``text_of`` reads a text by number, so only signatures are held: all of them with ``chunks: 1``, those of a turn
    otherwise. In the second case pairs that never meet in a turn stay; turns go on until one removes hardly anything (the
    procedure of FuxiTranyu, Sun et al. 2024, arXiv 2408.06273). ``report(turn, removed)`` is called after every turn.
    Raises ConfigError when ``datasketch`` is not installed.
    """
    if options.chunks == 1:
        dropped = _compare(text_of, list(range(count)), options, seed)
        if report is not None:
            report(1, len(dropped))
        return Deduplication(frozenset(dropped), 1)
    alive, gone, turn = list(range(count)), set[int](), 0
    while turn < options.max_turns and alive:
        random = generator(seed, "data", "deduplication", turn)
        order = torch.randperm(len(alive), generator=random).tolist()
        parts = [[alive[i] for i in order[k :: options.chunks]] for k in range(options.chunks)]
        drawn = torch.randperm(options.chunks, generator=random).tolist()[: options.chunks_per_turn]
        together = sorted(number for k in drawn for number in parts[k])
        removed = _compare(text_of, together, options, seed)
        turn += 1
        gone |= removed
        alive = [number for number in alive if number not in removed]
        if report is not None:
            report(turn, len(removed))
        if len(removed) < options.smallest_gain * max(1, len(together)) or not removed:
            break
    return Deduplication(frozenset(gone), turn)


def _compare(text_of: Callable[[int], str], numbers: Sequence[int], options: NearDuplicateOptions, seed: int) -> set[int]:
    sketch = _datasketch()
    index = sketch.MinHashLSH(threshold=options.threshold, num_perm=options.permutations)
    template = sketch.MinHash(num_perm=options.permutations, seed=derive_seed(seed, "data", "minhash") % 2**31)
    dropped: set[int] = set()
    for number in numbers:
        mine = shingles(text_of(number), options.shingle, options.unit)
        signature = template.copy()
        signature.update_batch([piece.encode() for piece in sorted(mine)])
        # The index answers by chance near the threshold; what it names is compared exactly.
        near = sorted(index.query(signature))
        if any(jaccard(mine, shingles(text_of(other), options.shingle, options.unit)) >= options.threshold for other in near):
            dropped.add(number)
        else:
            index.insert(number, signature)
    return dropped


def _datasketch() -> Any:
    try:
        import datasketch
    except ImportError:
        raise ConfigError("near_duplicates: needs the package datasketch; install it with pip install 'mmalign[dedup]'") from None
    return datasketch
