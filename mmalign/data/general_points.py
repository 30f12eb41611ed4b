"""The ``general_points`` asset: playing cards whose numbers must make 24 (or another goal), each used exactly once.

Solutions are found by exhaustive search over exact fractions, so every row has an answer. A multiset of cards belongs to one
split whatever the seeds: a hash decides. Face cards count as 10, or as 11, 12 and 13: models that learned the one rule are
tested on the other (Chu et al. 2025, arXiv 2501.17161).
"""

from __future__ import annotations

import ast
import hashlib
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations_with_replacement
from typing import Any, Literal

from mmalign.core.seeding import derive_seed
from mmalign.errors import DataError

RANKS = ("A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K")
SHARES = {"test": 0.2, "validation": 0.1}
"""Share of the multisets of cards that belongs to a split; the rest is train."""

Faces = Literal["ten", "rank"]
Verdict = Literal["correct", "wrong_value", "illegal_numbers", "unparsable"]

_ALLOWED = re.compile(r"[\d+\-*/()\s]+")
_SIGNS = str.maketrans({"×": "*", "⋅": "*", "·": "*", "÷": "/", "−": "-", "–": "-"})
_MAX_LENGTH = 200
_OPERATORS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


def card_value(rank: str, faces: Faces = "ten") -> int:
    """Number of a card: the ace is 1; J, Q, K are 10 (``ten``) or 11, 12, 13 (``rank``). Raises DataError for no card."""
    if rank not in RANKS:
        raise DataError(f"cards: {rank!r} is no card; cards are {', '.join(RANKS)}")
    position = RANKS.index(rank) + 1
    return min(position, 10) if faces == "ten" else position


@dataclass(frozen=True)
class Expression:
    """A formula of the game: its exact value (None where it divides by zero) and the numbers it uses, in order."""

    value: Fraction | None
    numbers: tuple[int, ...]


def parse_expression(text: str) -> Expression | None:
    """The formula that the whole of ``text`` writes, or None.

    Whole numbers, ``+ - * /`` between two operands (also ``×``, ``÷``) and brackets; one ``= value`` at the end is left out. The
    syntax tree is walked over those node types alone, and nothing is ever evaluated. At most 200 characters.
    """
    text = text.translate(_SIGNS).strip()
    left, equals, right = text.partition("=")
    if equals and re.fullmatch(r"\s*\d+\s*", right):
        text = left.strip()
    if len(text) > _MAX_LENGTH or not _ALLOWED.fullmatch(text):
        return None
    numbers: list[int] = []
    try:
        value = _walk(ast.parse(text, mode="eval").body, numbers)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return Expression(value, tuple(numbers))


def _walk(node: ast.expr, numbers: list[int]) -> Fraction | None:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        numbers.append(node.value)
        return Fraction(node.value)
    if not isinstance(node, ast.BinOp) or type(node.op) not in _OPERATORS:
        raise ValueError("no formula of the game")
    left, right = _walk(node.left, numbers), _walk(node.right, numbers)
    if left is None or right is None:
        return None
    return _apply(_OPERATORS[type(node.op)], left, right)


def _apply(sign: str, left: Fraction, right: Fraction) -> Fraction | None:
    if sign == "/":
        return left / right if right else None
    return {"+": left + right, "-": left - right, "*": left * right}[sign]


def judge(text: str, numbers: Sequence[int], goal: int = 24) -> Verdict:
    """What the game says of a formula: unparsable, illegal numbers (not exactly ``numbers``), wrong value, or correct."""
    expression = parse_expression(text)
    if expression is None:
        return "unparsable"
    if Counter(expression.numbers) != Counter(numbers):
        return "illegal_numbers"
    return "correct" if expression.value == goal else "wrong_value"


def solve(numbers: Sequence[int], goal: int = 24) -> str | None:
    """A formula that makes ``goal`` from ``numbers``, each used once; None when there is none. The same every time."""
    found = _search([(number, 1, str(number)) for number in numbers], goal)
    return None if found is None else _written(found)[0]


_Tree = Any
"""A number as text, or ``(sign, left tree, right tree)``."""


def _search(items: list[tuple[int, int, _Tree]], goal: int) -> _Tree | None:
    """Join two of the items in every way and go on; an item is (numerator, denominator, tree), in whole numbers for speed."""
    if len(items) == 1:
        top, bottom, tree = items[0]
        return tree if top == goal * bottom else None
    tried: set[tuple[int, int, int, int]] = set()
    for i in range(len(items)):
        for j in range(i + 1, len(items)):
            (a, b, first), (c, d, second) = items[i], items[j]
            if (a, b, c, d) in tried:  # equal cards
                continue
            tried.add((a, b, c, d))
            rest = [*items[:i], *items[i + 1 : j], *items[j + 1 :]]
            joined = [(a * d + c * b, b * d, ("+", first, second)), (a * c, b * d, ("*", first, second)),
                      (a * d - c * b, b * d, ("-", first, second)), (c * b - a * d, b * d, ("-", second, first))]
            if c:
                joined.append((a * d, b * c, ("/", first, second)))
            if a:
                joined.append((c * b, d * a, ("/", second, first)))
            for item in joined:
                found = _search([*rest, item], goal)
                if found is not None:
                    return found
    return None


_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}


def _written(tree: _Tree) -> tuple[str, int]:
    """A tree as text with the brackets that it needs, and the precedence of its outermost sign."""
    if isinstance(tree, str):
        return tree, 3
    sign, own = tree[0], _PRECEDENCE[tree[0]]
    (left, outer), (right, inner) = _written(tree[1]), _written(tree[2])
    left = f"({left})" if outer < own else left
    right = f"({right})" if inner < own or (inner == own and sign in "-/") else right
    return f"{left} {sign} {right}", own


def split_of(cards: Sequence[str]) -> str:
    """"train", "validation" or "test": decided by the multiset of the cards alone, so that splits never share one."""
    digest = hashlib.blake2b(" ".join(sorted(cards)).encode(), digest_size=8).digest()
    position = int.from_bytes(digest, "big") / 2**64
    for name, share in SHARES.items():
        if position < share:
            return name
        position -= share
    return "train"


def make_general_points(
    n: int | None, *, split: str = "train", seed: int = 0, faces: Faces = "ten", goal: int = 24, cards: int = 4,
    highest: str = "K", form: Literal["messages", "text"] = "messages",
) -> list[dict[str, Any]]:
    """``n`` rows (None: 512, or all there are) ``id, prompt, completion, answer, cards, numbers, goal``, no multiset twice.

    ``completion`` demonstrates a solution and ``answer`` is the same formula as text; ``cards`` are ranks and ``numbers`` their
    values. ``cards`` counts the cards of a game (2 to 5) and ``highest`` is the largest rank in the deck, for easier games.
    Raises DataError for values without a meaning, or when fewer than ``n`` games have a solution.
    """
    if split not in ("train", *SHARES):
        raise DataError(f"data.split: the general_points asset has train, {', '.join(SHARES)}, not {split!r}")
    if faces not in ("ten", "rank"):
        raise DataError(f"data.arguments.faces: allowed are ten and rank, not {faces!r}")
    if form not in ("messages", "text"):
        raise DataError(f"data.arguments.form: allowed are messages and text, not {form!r}")
    if not 2 <= cards <= 5:
        raise DataError(f"data.arguments.cards: a game has 2 to 5 cards, not {cards}")
    if highest not in RANKS:
        raise DataError(f"data.arguments.highest: {highest!r} is no card; cards are {', '.join(RANKS)}")
    rows: list[dict[str, Any]] = []
    chance = random.Random(derive_seed(seed, "data", "general_points", split))
    for hand in _hands(cards, RANKS[: RANKS.index(highest) + 1], split, chance):
        solution = solve([card_value(card, faces) for card in hand], goal)
        if solution is not None:
            rows.append(_row(hand, solution, split, len(rows), seed, faces, goal, form))
            if len(rows) == (512 if n is None else n):
                break
    if n is not None and len(rows) < n:
        raise DataError(f"data.limit: {len(rows)} games of split {split} have a solution, fewer than {n}; take fewer rows, or "
                        "more cards in data.arguments")
    return rows


def _hands(cards: int, ranks: Sequence[str], split: str, chance: random.Random) -> Iterator[list[str]]:
    """Every multiset of the split once, in random order and dealt in random order."""
    hands = [hand for hand in combinations_with_replacement(ranks, cards) if split_of(hand) == split]
    chance.shuffle(hands)
    for hand in hands:
        dealt = list(hand)
        chance.shuffle(dealt)
        yield dealt


def _row(
    hand: list[str], solution: str, split: str, index: int, seed: int, faces: Faces, goal: int, form: str,
) -> dict[str, Any]:
    rule = "J, Q and K count as 10" if faces == "ten" else "J, Q and K count as 11, 12 and 13"
    question = (f"Cards: {', '.join(hand)}. A counts as 1, {rule}. Make {goal} with + - * / and brackets, using every card's "
                "number exactly once. Answer with the formula only.")
    prompt: Any = question if form == "text" else [{"role": "user", "content": question}]
    completion: Any = f"\n{solution}" if form == "text" else [{"role": "assistant", "content": solution}]
    return {
        "id": f"general_points-{split}-{seed}-{index}", "prompt": prompt, "completion": completion, "answer": solution,
        "cards": list(hand), "numbers": [card_value(card, faces) for card in hand], "goal": goal,
    }
