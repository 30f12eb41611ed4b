"""The ``short_tasks`` asset: five small tasks of a shop's note board, each rewarded in its own way, and a general set.

========== ============ =========================================== ==============================
task       reward_type  prompt                                      answer
========== ============ =========================================== ==============================
tagging    exact        ``tag: two red lamps``                      ``home``
extraction metric       ``what is sold: Tom sells two red lamps``   ``red lamps``
reformat   pattern      ``list: lamps, cups``                       ``- lamps`` newline ``- cups``
translate  metric       ``German: two lamps``                       ``zwei Lampen``
code       sandbox      ``code: 3 lamps at 4``                      ``12``, from ``print(3 * 4)``
========== ============ =========================================== ==============================

General rows ask for sums (with the working as ``rationale``) and for a phrase to be repeated. The number of rows of a task
differs, as it does in a real domain. Training and test prompts are disjoint whatever the seeds: a hash of the prompt decides
its split.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mmalign.core.seeding import derive_seed
from mmalign.errors import DataError

TEST_SHARE = 0.2
SHARES: dict[str, float] = {"tagging": 0.3, "extraction": 0.25, "reformat": 0.2, "translate": 0.15, "code": 0.1}
"""Part of each task in the domain rows, unless asked otherwise."""

_NAMES = ("Tom", "Ana", "Leo", "Mia", "Sam", "Eva")
_COUNTS = {"two": "zwei", "three": "drei", "four": "vier", "five": "fünf", "six": "sechs"}
_COLOURS = ("red", "blue", "green", "old", "new")
_GOODS = {  # thing: (tag, German plural)
    "lamps": ("home", "Lampen"), "cups": ("home", "Tassen"), "chairs": ("home", "Stühle"),
    "books": ("reading", "Bücher"), "maps": ("reading", "Karten"), "comics": ("reading", "Comics"),
    "balls": ("sport", "Bälle"), "skis": ("sport", "Ski"), "bikes": ("sport", "Räder"),
}
Row = dict[str, Any]


def _tagging() -> Iterator[Row]:
    for count, colour, thing in itertools.product(_COUNTS, _COLOURS, _GOODS):
        tag = _GOODS[thing][0]
        yield {"prompt": f"tag: {count} {colour} {thing}", "answer": tag, "completion": tag, "reward_type": "exact"}


def _extraction() -> Iterator[Row]:
    for name, count, colour, thing in itertools.product(_NAMES, _COUNTS, _COLOURS, _GOODS):
        found = f"{colour} {thing}"
        yield {"prompt": f"what is sold: {name} sells {count} {found}", "answer": found, "completion": found,
               "reward_type": "metric"}


def _reformat() -> Iterator[Row]:
    for first, second in itertools.permutations([f"{c} {g}" for c in _COLOURS for g in _GOODS], 2):
        lines = f"- {first}\n- {second}"
        yield {"prompt": f"list: {first}, {second}", "answer": lines, "completion": lines, "reward_type": "pattern"}


def _translate() -> Iterator[Row]:
    for count, thing in itertools.product(_COUNTS, _GOODS):
        german = f"{_COUNTS[count]} {_GOODS[thing][1]}"
        yield {"prompt": f"German: {count} {thing}", "answer": german, "completion": german, "reward_type": "metric"}


def _code() -> Iterator[Row]:
    for a, b, thing in itertools.product(range(2, 10), range(2, 10), _GOODS):
        yield {"prompt": f"code: {a} {thing} at {b}", "answer": str(a * b), "completion": f"print({a} * {b})",
               "reward_type": "sandbox"}


def _sums() -> Iterator[Row]:
    for a, b in itertools.product(range(10), range(10)):
        yield {"prompt": f"{a} + {b} =", "answer": str(a + b), "completion": str(a + b), "reward_type": "exact",
               "rationale": f"{a} and {b} more is {a + b}"}


def _repeat() -> Iterator[Row]:
    for count, colour, thing in itertools.product(_COUNTS, _COLOURS, _GOODS):
        text = f"{count} {colour} {thing}"
        yield {"prompt": f"repeat: {text}", "answer": text, "completion": text, "reward_type": "exact"}


_DOMAIN: dict[str, Callable[[], Iterator[Row]]] = {
    "tagging": _tagging, "extraction": _extraction, "reformat": _reformat, "translate": _translate, "code": _code,
}
_GENERAL: dict[str, Callable[[], Iterator[Row]]] = {"sums": _sums, "repeat": _repeat}


def make_short_tasks(
    n: int | None = None, *, split: str = "train", seed: int = 0, source: str = "domain",
    shares: Mapping[str, float] | None = None, form: str = "text",
) -> list[Row]:
    """Rows ``id, prompt, completion, answer, task, source, reward_type, rationale``.

    ``source`` is ``domain`` or ``general``. ``form="text"`` ends a prompt with a line break, ``"messages"`` gives chat messages.
    ``shares`` maps tasks to their part in the rows (default: :data:`SHARES`, and
    equal parts of the general tasks). ``n`` is the number of rows (default 400 for training, 100 for tests); a task that has
    fewer prompts than its part is given whole. Raises DataError for unknown tasks, splits or sources.
    """
    if split not in ("train", "test"):
        raise DataError(f"data.split: the short_tasks asset has train and test, not {split!r}")
    if source not in ("domain", "general"):
        raise DataError(f"source: must be domain or general, not {source!r}")
    if form not in ("text", "messages"):
        raise DataError(f"form: must be text or messages, not {form!r}")
    makers = _DOMAIN if source == "domain" else _GENERAL
    parts = dict(shares) if shares is not None else dict(SHARES) if source == "domain" else dict.fromkeys(makers, 1.0)
    unknown = [task for task in parts if task not in makers]
    if unknown or not parts or min(parts.values()) <= 0:
        raise DataError(f"shares: map some of {', '.join(makers)} to positive numbers, not {shares}")
    wanted = (400 if split == "train" else 100) if n is None else n
    if wanted < 1:
        raise DataError(f"short_tasks: the number of rows must be at least 1, not {wanted}")
    rows: list[Row] = []
    for task, share in parts.items():
        found = [row for row in makers[task]() if _in_test(row["prompt"]) == (split == "test")]
        random.Random(derive_seed(seed, "data", "short_tasks", split, task)).shuffle(found)
        rows += [{**row, "task": task, "source": source, "rationale": row.get("rationale")}
                 for row in found[: max(1, round(wanted * share / sum(parts.values())))]]
    random.Random(derive_seed(seed, "data", "short_tasks", split, source)).shuffle(rows)
    return [{"id": f"{source}-{split}-{seed}-{index}", **row, **_formed(row, form)} for index, row in enumerate(_cut(rows, n))]


def _formed(row: Row, form: str) -> Row:
    if form == "text":
        return {"prompt": row["prompt"] + "\n"}
    return {"prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}]}


def _cut(rows: Sequence[Row], n: int | None) -> Sequence[Row]:
    return rows if n is None else rows[:n]


def _in_test(prompt: str) -> bool:
    digest = hashlib.blake2b(f"short_tasks {prompt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < TEST_SHARE * 2**64
