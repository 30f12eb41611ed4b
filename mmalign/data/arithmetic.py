"""The ``arithmetic`` asset: graded problems whose answers are exact integers, made on the spot.

=====  ====================================================  =======================
level  problems                                              example
=====  ====================================================  =======================
1      one digit, addition and subtraction                   ``3 + 4``
2      two digits, addition and subtraction                  ``52 - 17``
3      three-digit sums, one digit times two digits          ``7 * 46``
4      three terms with precedence and brackets              ``(8 + 5) * 6``
5      word problems of two steps                            ``Tom has 12 apples ...``
=====  ====================================================  =======================

Training and test problems are disjoint whatever the seeds: a hash of the problem decides its split.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mmalign.core.seeding import derive_seed
from mmalign.errors import DataError

LEVELS = (1, 2, 3, 4, 5)
TEST_SHARE = 0.2
"""Share of the distinct problems that belongs to the test split."""

INSTRUCTION = "Answer with the number only."

_NAMES = ("Tom", "Ana", "Leo", "Mia", "Sam", "Eva", "Ben", "Zoe")
_THINGS = ("apples", "books", "coins", "cards", "stones", "pens", "shells", "stamps")


@dataclass(frozen=True)
class Problem:
    """A problem as text, its answer, and the working in one line per step."""

    text: str
    answer: int
    steps: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Level:
    size: int
    make: Callable[[int], Problem]
    """Problem number -> problem; two numbers may give the same text, which is then used once."""


def _digits(number: int, *sizes: int) -> list[int]:
    """Mixed-radix digits of ``number``, least significant first."""
    result = []
    for size in sizes:
        number, digit = divmod(number, size)
        result.append(digit)
    return result


def _sum_or_difference(number: int, low: int, count: int) -> Problem:
    minus, first, second = _digits(number, 2, count, count)
    a, b = first + low, second + low
    if not minus:
        return Problem(f"{a} + {b}", a + b)
    a, b = max(a, b), min(a, b)
    return Problem(f"{a} - {b}", a - b)


def _level_1(number: int) -> Problem:
    return _sum_or_difference(number, 0, 10)


def _level_2(number: int) -> Problem:
    return _sum_or_difference(number, 10, 90)


def _level_3(number: int) -> Problem:
    plus, pair = number % 2, number // 2
    if plus:
        first, second = _digits(pair, 900, 900)
        return Problem(f"{first + 100} + {second + 100}", first + second + 200)
    a, b = _digits(pair % (8 * 90), 8, 90)
    return Problem(f"{a + 2} * {b + 10}", (a + 2) * (b + 10))


def _level_4(number: int) -> Problem:
    form, first, second, third = _digits(number, 4, 18, 18, 8)
    a, b, c = first + 2, second + 2, third + 2
    if form == 0:
        return Problem(f"{a} + {b} * {c}", a + b * c, (f"{b} * {c} = {b * c}", f"{a} + {b * c} = {a + b * c}"))
    if form == 1:
        return Problem(f"({a} + {b}) * {c}", (a + b) * c, (f"{a} + {b} = {a + b}", f"{a + b} * {c} = {(a + b) * c}"))
    if form == 2:
        return Problem(f"{a} * {c} - {b}", a * c - b, (f"{a} * {c} = {a * c}", f"{a * c} - {b} = {a * c - b}"))
    return Problem(f"({a} - {b}) * {c}", (a - b) * c, (f"{a} - {b} = {a - b}", f"{a - b} * {c} = {(a - b) * c}"))


def _level_5(number: int) -> Problem:
    story, who, what, first, second, third = _digits(number, 3, len(_NAMES), len(_THINGS), 18, 8, 8)
    name, things = _NAMES[who], _THINGS[what]
    a, b, c = first + 3, second + 2, third + 2
    if story == 0:
        text = (f"{name} has {a} {things} and buys {b} boxes with {c} {things} each. "
                f"How many {things} does {name} have now?")
        return Problem(text, a + b * c, (f"{b} * {c} = {b * c}", f"{a} + {b * c} = {a + b * c}"))
    if story == 1:
        given = min(a * b - 1, c)
        text = (f"{name} has {a} bags with {b} {things} each and gives {given} {things} away. "
                f"How many {things} are left?")
        return Problem(text, a * b - given, (f"{a} * {b} = {a * b}", f"{a * b} - {given} = {a * b - given}"))
    text = (f"{name} finds {a} {things} on Monday and {b} on Tuesday, then {c} times as many as on both days together "
            f"on Friday. How many {things} does {name} find on Friday?")
    return Problem(text, (a + b) * c, (f"{a} + {b} = {a + b}", f"{a + b} * {c} = {(a + b) * c}"))


_TABLE = {
    1: _Level(2 * 10 * 10, _level_1),
    2: _Level(2 * 90 * 90, _level_2),
    3: _Level(2 * 900 * 900, _level_3),
    4: _Level(4 * 18 * 18 * 8, _level_4),
    5: _Level(3 * len(_NAMES) * len(_THINGS) * 18 * 8 * 8, _level_5),
}


def split_of(problem: str) -> str:
    """"train" or "test": decided by the problem's text alone, so the splits never share a problem."""
    digest = hashlib.blake2b(problem.encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") < TEST_SHARE * 2**64 else "train"


def make_arithmetic(
    n: int, *, split: str = "train", seed: int = 0, levels: Sequence[int] = LEVELS,
    form: Literal["messages", "text"] = "messages", worked: bool = False, pairs: bool = False, triples: bool = False,
) -> list[dict[str, Any]]:
    """``n`` rows ``id, prompt, completion, answer, level``, the levels in turn, no problem twice.

    ``form="messages"`` gives chat messages (one user message that ends with the instruction), ``"text"`` a prompt
    such as ``3 + 4 =`` with the completion `` 7``. ``worked`` puts the steps of levels 4 and 5 before the answer of
    the completion. ``pairs`` adds ``chosen`` (right) and ``rejected`` (a near miss); ``triples`` also adds ``gold``, the
    right answer in a sentence. ``answer`` is text. Raises
    DataError for unknown levels or splits, or when fewer than ``n`` problems exist (a used-up level is skipped).
    """
    if split not in ("train", "test"):
        raise DataError(f"data.split: the arithmetic asset has train and test, not {split!r}")
    unknown = [level for level in levels if level not in _TABLE]
    if unknown or not levels:
        raise DataError(f"levels: must be some of {list(LEVELS)}, not {list(levels)}")
    if form not in ("messages", "text"):
        raise DataError(f"form: must be messages or text, not {form!r}")
    if n < 1:
        raise DataError(f"arithmetic: the number of rows must be at least 1, not {n}")
    streams = {level: _stream(level, split, seed) for level in dict.fromkeys(levels)}
    rows: list[dict[str, Any]] = []
    while len(rows) < n and streams:
        for level in list(streams):
            problem = next(streams[level], None)
            if problem is None:
                del streams[level]
            elif len(rows) < n:
                rows.append(_row(problem, level, split, len(rows), seed, form, worked, pairs or triples))
                if triples:
                    rows[-1]["gold"] = _in_a_sentence(rows[-1]["chosen"], problem)
    if len(rows) < n:
        raise DataError(f"arithmetic: levels {list(levels)} have {len(rows)} {split} problems, not {n}; ask for fewer "
                        f"rows or more levels")
    return rows


def _in_a_sentence(completion: Any, problem: Problem) -> Any:
    sentence = f"The answer is {problem.answer}."
    return f" {sentence}" if isinstance(completion, str) else [{"role": "assistant", "content": sentence}]


def _stream(level: int, split: str, seed: int) -> Iterator[Problem]:
    order = random.Random(derive_seed(seed, "data", "arithmetic", split, str(level)))
    size = _TABLE[level].size
    seen: set[str] = set()
    numbers: Iterable[int]
    if size <= 100_000:
        numbers = order.sample(range(size), size)
    else:  # never used up in practice, and a permutation of it would cost more than the rows
        numbers = (order.randrange(size) for _ in range(20 * size))
    for number in numbers:
        problem = _TABLE[level].make(number)
        if problem.text not in seen and split_of(problem.text) == split:
            seen.add(problem.text)
            yield problem


def _row(
    problem: Problem, level: int, split: str, index: int, seed: int, form: str, worked: bool, pairs: bool,
) -> dict[str, Any]:
    def answered(value: int) -> Any:
        if form == "text":
            return f" {value}"
        steps = [*problem.steps[:-1], problem.steps[-1].rpartition("=")[0] + f"= {value}"] if problem.steps else []
        content = "\n".join([*steps, str(value)]) if worked else str(value)
        return [{"role": "assistant", "content": content}]

    prompt: Any
    if form == "text":
        prompt = f"{problem.text} =" if level < 5 else f"{problem.text} Answer:"
    else:
        question = problem.text if level == 5 else f"What is {problem.text}?"
        prompt = [{"role": "user", "content": f"{question} {INSTRUCTION}" if not worked else question}]
    row = {
        "id": f"arithmetic-{split}-{seed}-{index}", "prompt": prompt, "completion": answered(problem.answer),
        "answer": str(problem.answer), "level": level,
    }
    if pairs:
        chance = random.Random(derive_seed(seed, "data", "arithmetic", "wrong", problem.text))
        miss = chance.choice((-10, -2, -1, 1, 2, 10))
        row |= {"chosen": row["completion"], "rejected": answered(problem.answer + miss)}
        del row["completion"]
    return row
