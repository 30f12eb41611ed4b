"""The card game 24: its solver, its checker of formulas, and rows whose splits share no cards."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations_with_replacement

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.data.assets import asset_rows
from mmalign.data.general_points import RANKS, card_value, judge, make_general_points, parse_expression, solve, split_of
from mmalign.errors import AssetError, DataError


def test_as_many_hands_have_a_solution_as_is_known():
    """566 of the 715 hands of four numbers from 1 to 10 make 24."""
    hands = list(combinations_with_replacement(range(1, 11), 4))
    solved = {hand: solve(hand) for hand in hands}
    assert len(hands) == 715
    assert sum(formula is not None for formula in solved.values()) == 566
    assert all(judge(formula, hand) == "correct" for hand, formula in solved.items() if formula is not None)


@pytest.mark.parametrize(("hand", "formula"), [
    ([3, 3, 8, 8], "8 / (3 - 8 / 3)"), ([1, 5, 5, 5], "5 * (5 - 1 / 5)"), ([1, 1, 1, 1], None), ([24, 1], "24 * 1"),
])
def test_solutions_through_fractions(hand, formula):
    assert solve(hand) == formula


@settings(max_examples=60, deadline=None)
@given(hand=st.lists(st.integers(0, 13), min_size=2, max_size=3), goal=st.integers(-5, 60))
def test_a_solution_is_found_exactly_when_some_order_signs_and_brackets_make_the_goal(hand, goal):
    from itertools import permutations, product

    def values(items):
        if len(items) == 1:
            return {items[0]}
        found = set()
        for cut in range(1, len(items)):
            for left, right in product(values(items[:cut]), values(items[cut:])):
                found |= {left + right, left - right, left * right}
                if right:
                    found.add(left / right)
        return found

    reachable = any(Fraction(goal) in values([Fraction(n) for n in order]) for order in permutations(hand))
    formula = solve(hand, goal)
    assert (formula is not None) == reachable
    assert formula is None or judge(formula, hand, goal) == "correct"


@pytest.mark.parametrize(("text", "verdict"), [
    ("8/(3-8/3)", "correct"), (" 8 ÷ (3 − 8/3) = 24 ", "correct"), ("3*8*3/8", "wrong_value"), ("3*8", "illegal_numbers"),
    ("3+3+8+8+1", "illegal_numbers"), ("24", "illegal_numbers"), ("38-3-8", "illegal_numbers"), ("", "unparsable"),
    ("8/(3-8/3", "unparsable"), ("eight by three", "unparsable"), ("8**3+3-8", "unparsable"), ("8//3+3*8", "unparsable"),
    ("-3+3+8+8", "unparsable"), ("8(3)+3-8", "unparsable"), ("8 3 3 8", "unparsable"), ("3.0+3+8+8", "unparsable"),
    ("8/(3-3)+8", "wrong_value"), ("1" * 250, "unparsable"), ("(" * 99 + "3" + ")" * 99, "illegal_numbers"),
    ("__import__('os').getcwd()", "unparsable"), ("3+3+8+8 if 1 else 2", "unparsable"), ("3+3+8+8=22=22", "unparsable"),
])
def test_verdicts(text, verdict):
    assert judge(text, [3, 3, 8, 8]) == verdict


def test_a_formula_is_read_and_not_evaluated():
    expression = parse_expression("7 / (2 - 2)")
    assert expression is not None
    assert (expression.value, expression.numbers) == (None, (7, 2, 2))
    assert parse_expression("1/3*3").value == 1


def test_face_cards_follow_the_rule():
    assert [card_value(rank) for rank in ("A", "10", "J", "K")] == [1, 10, 10, 10]
    assert [card_value(rank, "rank") for rank in ("A", "10", "J", "Q", "K")] == [1, 10, 11, 12, 13]
    with pytest.raises(DataError, match="no card"):
        card_value("Z")


def test_rows_are_solvable_games_and_the_same_for_a_seed():
    rows = make_general_points(60, seed=4)
    assert rows == make_general_points(60, seed=4) != make_general_points(60, seed=5)
    for row in rows:
        assert row["numbers"] == [card_value(card) for card in row["cards"]]
        assert judge(row["completion"][0]["content"], row["numbers"]) == "correct"
        assert ", ".join(row["cards"]) in row["prompt"][0]["content"]
    other = make_general_points(60, seed=4, faces="rank")
    assert any(max(row["numbers"]) > 10 for row in other)
    assert "count as 11, 12 and 13" in other[0]["prompt"][0]["content"]


def test_splits_share_no_hand_whatever_the_seeds():
    hands = {split: {tuple(sorted(row["cards"])) for seed in range(2) for row in make_general_points(40, split=split, seed=seed)}
             for split in ("train", "validation", "test")}
    assert all(split_of(hand) == split for split, found in hands.items() for hand in found)
    assert not hands["train"] & hands["test"]
    assert not hands["train"] & hands["validation"]
    assert len({split_of(hand) for hand in combinations_with_replacement(RANKS, 4)}) == 3


def test_easier_games():
    rows = asset_rows("general_points", n=5, cards=3, goal=12, highest="6", form="text")
    assert all(len(row["cards"]) == 3 and row["goal"] == 12 and isinstance(row["prompt"], str) for row in rows)
    with pytest.raises(DataError, match=r"data\.limit: \d+ games of split train"):
        asset_rows("general_points", n=500, cards=2, goal=6, highest="6")


@pytest.mark.parametrize(("arguments", "message"), [
    ({"split": "dev"}, r"data\.split"), ({"faces": "eleven"}, r"data\.arguments\.faces"),
    ({"cards": 1}, r"data\.arguments\.cards"),
    ({"highest": "X"}, r"data\.arguments\.highest"), ({"form": "html"}, r"data\.arguments\.form"),
])
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(DataError, match=message):
        make_general_points(4, **arguments)
    with pytest.raises(AssetError, match="no argument 'decks'"):
        asset_rows("general_points", n=1, decks=2)
