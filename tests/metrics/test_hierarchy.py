"""Path scores, agreement of runs, and the gap that a prompt closes: closed forms."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmalign.errors import DataError, RewardError
from mmalign.metrics.hierarchy import (
    agreement,
    ancestor_f1,
    common_subsequence_score,
    gap_reduction,
    path_matching_score,
    stratum,
)
from mmalign.rewards.text import path_score, read_path

GOLD = ["A", "A61", "A61K", "A61K9/00"]


def test_a_path_that_leaves_the_right_way():
    predicted = ["A", "A61", "A61B"]
    assert ancestor_f1(predicted, GOLD) == pytest.approx(0.571429, abs=1e-6)
    assert common_subsequence_score(predicted, GOLD) == 0.5
    assert path_matching_score(predicted, GOLD) == pytest.approx(0.533333, abs=1e-6)


def test_order_counts():
    path = ["x", "y", "z"]
    assert ancestor_f1(path[::-1], path) == 1
    assert common_subsequence_score(path[::-1], path) == pytest.approx(1 / 3)
    assert path_matching_score(path[::-1], path) == pytest.approx(0.5)


@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=6, unique=True),
       st.lists(st.sampled_from("abcdef"), min_size=1, max_size=6, unique=True))
def test_bounds_symmetry_and_identity(p, g):
    value = path_matching_score(p, g)
    assert 0 <= value <= 1
    assert value == pytest.approx(path_matching_score(g, p))
    assert (value == 1) == (p == g)
    assert (value == 0) == (not set(p) & set(g))


def test_empty_paths_denominator_and_refusal():
    assert path_matching_score([], GOLD) == path_matching_score(GOLD, []) == 0
    longer = [*GOLD, "x", "y"]
    assert common_subsequence_score(longer, GOLD, denominator="gold") == 1
    assert common_subsequence_score(longer, GOLD) == pytest.approx(4 / 6)
    with pytest.raises(DataError, match="denominator"):
        common_subsequence_score(GOLD, GOLD, denominator="shortest")


def test_padding_a_path_with_guesses_does_not_pay():
    """Writing many codes would win by recall alone: precision and the longer path in the denominator stop it."""
    assert path_matching_score([*GOLD, *"qrstuvw"], GOLD) < path_matching_score(GOLD[:3], GOLD)


def test_strata():
    assert [stratum(hops) for hops in range(7)] == ["light"] * 3 + ["middle"] * 2 + ["heavy"] * 2


def test_majority_with_ties_incorrect():
    assert [agreement(runs) for runs in ([True] * 5, [True] * 3 + [False] * 2, [True, False], [True, False, False], [False])] == \
        ["all_correct", "majority_correct", "majority_incorrect", "majority_incorrect", "all_incorrect"]
    with pytest.raises(DataError, match="no runs"):
        agreement([])


def test_gap_reduction_of_the_paper():
    assert gap_reduction(0.778, 0.541, 0.778, 0.703) == pytest.approx(0.683544, abs=1e-6)
    assert gap_reduction(0.5, 0.4, 0.7, 0.7) == 1
    assert math.isnan(gap_reduction(0.5, 0.5, 0.7, 0.6))


@pytest.mark.parametrize(("text", "path"), [
    ("Path: 1 > A00-A09 > A00.0", ["1", "A00-A09", "A00.0"]),
    ("First: path: x > y\nOptions ...\nPath: 1 (infections) > A00 (cholera) > A00.0.\nAnswer: B", ["1", "A00", "A00.0"]),
    ("Path: A > B Answer: C", ["A", "B"]), ("**Path:** `A` > `B`", ["A", "B"]),
    (" > 45 > 6", ["45", "6"]), ("no path at all", []), ("", []),
])
def test_reading_paths(text, path):
    assert read_path(text) == path


def test_path_reward():
    prompts = [""] * 4
    completions = ["Path: A > A61 > A61B", [{"role": "assistant", "content": "Path: A > A61 > A61K > A61K9/00"}], "none", "x"]
    values = path_score(prompts, completions, [" > ".join(GOLD), GOLD, GOLD, None])
    assert values == [pytest.approx(0.533333, abs=1e-6), 1.0, 0.0, None]
    assert path_score([""], ["Path: c > b > a"], [["a", "b", "c"]], order="up") == [1.0]
    for options in ({"order": "sideways"}, {"denominator": "all"}):
        with pytest.raises(RewardError):
            path_score([""], ["x"], [GOLD], **options)
    with pytest.raises(RewardError, match="empty"):
        path_score([""], ["x"], [""])
