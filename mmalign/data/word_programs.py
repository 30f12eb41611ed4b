"""The ``word_programs`` asset: arithmetic word problems with one reference program each, and its equivalents.

Each problem has a program of straight-line Python that ends in ``answer=...`` and two to six others that compute the same:
operands swapped, sums in another order, factors multiplied out. Training shows the reference only.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from mmalign.core.seeding import derive_seed
from mmalign.data.arithmetic import split_of
from mmalign.errors import DataError

_NAMES = ("Tom", "Ana", "Leo", "Mia")
_THINGS = ("pens", "cards", "coins", "books")


@dataclass(frozen=True)
class _Story:
    text: str
    programs: tuple[str, ...]
    """Statements after the constants n0, n1, n2, separated by semicolons; the reference first."""
    answer: Callable[[int, int, int], int]


_STORIES = (
    _Story("{who} has {a} boxes of {b} {things} and {c} more. How many {things}?",
           ("t0=n0*n1;answer=t0+n2", "t0=n1*n0;answer=t0+n2", "t0=n0*n1;answer=n2+t0", "t0=n1*n0;answer=n2+t0",
            "answer=n0*n1+n2", "answer=n2+n0*n1"), lambda a, b, c: a * b + c),
    _Story("{who} finds {a} {things}, then {b}, and sells them for {c} coins each. How many coins?",
           ("t0=n0+n1;answer=t0*n2", "t0=n1+n0;answer=t0*n2", "t0=n0+n1;answer=n2*t0", "t0=n1+n0;answer=n2*t0",
            "t0=n0*n2;t1=n1*n2;answer=t0+t1", "answer=n0*n2+n1*n2"), lambda a, b, c: (a + b) * c),
    _Story("{who} has {a} bags of {b} {things} and gives {c} away. How many {things} are left?",
           ("t0=n0*n1;answer=t0-n2", "t0=n1*n0;answer=t0-n2", "answer=n0*n1-n2"), lambda a, b, c: a * b - c),
    _Story("{who} buys {a}, {b} and {c} {things}. How many {things}?",
           ("t0=n0+n1;answer=t0+n2", "t0=n1+n2;answer=n0+t0", "t0=n0+n2;answer=t0+n1", "t0=n1+n0;answer=n2+t0",
            "answer=n0+n1+n2", "t0=n2+n1;answer=t0+n0"), lambda a, b, c: a + b + c),
)


def make_word_programs(
    n: int, *, split: str = "train", seed: int = 0, form: Literal["text", "messages"] = "text", largest: int = 20,
    stories: int = len(_STORIES), short: bool = False, varied: bool = False,
) -> list[dict[str, Any]]:
    """``n`` rows ``id, prompt, completion, answer, programs, story``: no problem twice, the splits disjoint whatever the seeds.

    ``completion`` is the reference program, ``programs`` all that are known (the reference first), ``answer`` text.
    ``form="text"`` gives a prompt that ends in a newline. ``largest`` bounds the numbers of a problem, ``stories`` takes the
    first so many kinds, ``short`` leaves names and nouns the same in all, ``varied`` makes any of the programs the reference, as
    texts of many authors would. Raises DataError for arguments outside these, and
    when there are fewer problems than ``n``.
    """
    if split not in ("train", "test"):
        raise DataError(f"data.split: the word_programs asset has train and test, not {split!r}")
    if form not in ("text", "messages"):
        raise DataError(f"form: must be text or messages, not {form!r}")
    if n < 1:
        raise DataError(f"word_programs: the number of rows must be at least 1, not {n}")
    if not 1 <= stories <= len(_STORIES):
        raise DataError(f"stories: must be 1 to {len(_STORIES)}, not {stories}")
    if largest < 4:
        raise DataError(f"largest: must be at least 4, not {largest}")
    rows: list[dict[str, Any]] = []
    for text, constants, story in _problems(split, seed, largest, stories, short):
        if len(rows) == n:
            break
        programs = ["\n".join([*constants, *program.split(";")]) for program in _STORIES[story].programs]
        if varied:
            chosen = random.Random(derive_seed(seed, "data", "word_programs", "reference", text)).randrange(len(programs))
            programs.insert(0, programs.pop(chosen))
        values = [int(line.partition("=")[2]) for line in constants]
        rows.append({
            "id": f"word_programs-{split}-{seed}-{len(rows)}", "prompt": _prompt(text, form),
            "completion": programs[0] if form == "text" else [{"role": "assistant", "content": programs[0]}],
            "answer": str(_STORIES[story].answer(*values)), "programs": programs, "story": story,
        })
    if len(rows) < n:
        raise DataError(f"word_programs: there are {len(rows)} {split} problems with numbers up to {largest}, not {n}; ask for "
                        "fewer rows or larger numbers")
    return rows


def _prompt(text: str, form: str) -> Any:
    return f"{text}\n" if form == "text" else [{"role": "user", "content": text}]


def _problems(split: str, seed: int, largest: int, stories: int, short: bool) -> Iterator[tuple[str, list[str], int]]:
    chance = random.Random(derive_seed(seed, "data", "word_programs", split))
    seen: set[str] = set()
    for _ in range(200 * largest**3 if largest < 30 else 10**6):
        story = chance.randrange(stories)
        numbers = [chance.randint(2, largest) for _ in range(3)]
        if story == 2:  # nobody gives away more than there is
            numbers[2] = min(numbers[2], numbers[0] * numbers[1] - 1)
        who, things = (_NAMES[0], _THINGS[0]) if short else (chance.choice(_NAMES), chance.choice(_THINGS))
        text = _STORIES[story].text.format(who=who, things=things, a=numbers[0], b=numbers[1], c=numbers[2])
        if text not in seen and split_of(text) == split:
            seen.add(text)
            yield text, [f"n{i}={value}" for i, value in enumerate(numbers)], story
