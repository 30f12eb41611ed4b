"""The ``languages`` asset: one little story in four languages of very different sizes, made on the spot.

Every sentence exists in every language under the same ``sentence`` number, so the languages share their structure, and
parallel sentences are at hand; how many rows each has is an argument. Training and test sentences are disjoint.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any, Literal

from mmalign.core.seeding import derive_seed
from mmalign.errors import DataError

SIZES: dict[str, int] = {"english": 1000, "german": 100, "french": 10, "spanish": 10}
"""Training rows of each language unless asked otherwise."""

TEST_SHARE = 0.1
_NAMES = ("Anna", "Tom", "Mia", "Leo", "Eva", "Ben")
_NUMBERS: dict[str, tuple[str, ...]] = {
    "english": (
        "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
        "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
    ),
    "german": (
        "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn", "elf", "zwölf", "dreizehn",
        "vierzehn", "fünfzehn", "sechzehn", "siebzehn", "achtzehn", "neunzehn", "zwanzig",
    ),
    "french": (
        "un", "deux", "trois", "quatre", "cinq", "six", "sept", "huit", "neuf", "dix", "onze", "douze", "treize",
        "quatorze", "quinze", "seize", "dix-sept", "dix-huit", "dix-neuf", "vingt",
    ),
    "spanish": (
        "uno", "dos", "tres", "cuatro", "cinco", "seis", "siete", "ocho", "nueve", "diez", "once", "doce", "trece",
        "catorce", "quince", "dieciséis", "diecisiete", "dieciocho", "diecinueve", "veinte",
    ),
}
_THINGS: dict[str, tuple[str, ...]] = {
    "english": ("apples", "books", "coins", "cards", "stones", "pens"),
    "german": ("Äpfel", "Bücher", "Münzen", "Karten", "Steine", "Stifte"),
    "french": ("pommes", "livres", "pièces", "cartes", "pierres", "stylos"),
    "spanish": ("manzanas", "libros", "monedas", "cartas", "piedras", "plumas"),
}
_STORY = {
    "english": ("{name} has {a} {things} and finds {b} more.", "How many does {name} have?"),
    "german": ("{name} hat {a} {things} und findet noch {b}.", "Wie viele hat {name}?"),
    "french": ("{name} a {a} {things} et en trouve encore {b}.", "Combien en a {name} ?"),
    "spanish": ("{name} tiene {a} {things} y encuentra {b} más.", "¿Cuántas tiene {name}?"),
}
_SENTENCES = len(_NAMES) * 6 * 10 * 10


def _in_test(sentence: int) -> bool:
    digest = hashlib.blake2b(f"languages {sentence}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < TEST_SHARE * 2**64


def make_languages(
    n: int | None = None, *, split: str = "train", seed: int = 0, sizes: Mapping[str, int] | None = None,
    form: Literal["text", "messages"] = "text", pairs: bool = False,
) -> list[dict[str, Any]]:
    """Rows ``id, language, sentence, answer`` with ``text``, ``messages``, or ``prompt, chosen, rejected`` (``pairs``).

    ``sizes`` is the number of training rows of each language (default 1000, 100, 10 and 10); a test split has the same
    20 sentences in every language unless ``n`` asks for others. ``n`` cuts the rows. Raises DataError for unknown
    languages, splits or forms, or more rows than there are sentences.
    """
    if split not in ("train", "test"):
        raise DataError(f"data.split: the languages asset has train and test, not {split!r}")
    if form not in ("text", "messages"):
        raise DataError(f"form: must be text or messages, not {form!r}")
    counts = dict(SIZES if sizes is None else sizes)
    unknown = [name for name in counts if name not in _STORY]
    if unknown or not counts:
        raise DataError(f"sizes: the languages are {', '.join(_STORY)}, not {', '.join(map(str, unknown)) or 'none'}")
    if split == "test":
        each = 20 if n is None else -(-n // len(counts))
        counts = dict.fromkeys(counts, each)
    order = [sentence for sentence in range(_SENTENCES) if _in_test(sentence) == (split == "test")]
    random.Random(derive_seed(seed, "data", "languages", split)).shuffle(order)
    if max(counts.values()) > len(order) or min(counts.values()) < 1:
        raise DataError(f"sizes: 1 to {len(order)} rows of a language in {split}, not {counts}")
    rows = [_row(language, sentence, form, pairs, seed) for language, size in counts.items() for sentence in order[:size]]
    if n is not None and n > len(rows):
        raise DataError(f"data.limit: the languages asset has {len(rows)} {split} rows with these sizes, not {n}")
    return rows if n is None else rows[:n]


def _row(language: str, sentence: int, form: str, pairs: bool, seed: int) -> dict[str, Any]:
    rest, b = divmod(sentence, 10)
    rest, a = divmod(rest, 10)
    name, thing = divmod(rest, 6)
    numbers = _NUMBERS[language]
    values = {"name": _NAMES[name], "things": _THINGS[language][thing], "a": numbers[a], "b": numbers[b]}
    story, question = (text.format(**values) for text in _STORY[language])
    answer = numbers[a + b + 1]
    row: dict[str, Any] = {"id": f"languages-{language}-{sentence}", "language": language, "sentence": sentence, "answer": answer}
    user = [{"role": "user", "content": f"{story} {question}"}]
    if pairs:
        wrong = random.Random(derive_seed(seed, "data", "languages", "wrong", sentence)).choice(
            [number for number in range(20) if number != a + b + 1])
        return row | {"prompt": user, "chosen": [{"role": "assistant", "content": answer}],
                      "rejected": [{"role": "assistant", "content": numbers[wrong]}]}
    if form == "messages":
        return row | {"messages": [*user, {"role": "assistant", "content": answer}]}
    return row | {"text": f"{story} {question} {answer}."}
