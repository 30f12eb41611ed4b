"""The reward of the card game: four verdicts, where the formula stands, several tries."""

from __future__ import annotations

import pytest

from mmalign.errors import RewardError
from mmalign.rewards import REWARDS, RewardSet
from mmalign.rewards.general_points import formulas, general_points

HAND = [3, 3, 8, 8]


def rewarded(completion, **options):
    return general_points(["p"], [completion], [HAND], **options)[0]


@pytest.mark.parametrize(("completion", "value"), [
    ("8/(3-8/3)", 5.0), ("3+3+8+8", -1.0), ("3*8", -2.0), ("I do not know", -3.0), ("", -3.0),
    ("First 3 * 8 is 24.\n8 / (3 - 8/3) = 24", 5.0), ("<think>3*8</think><answer>8/(3-8/3)</answer>", 5.0),
    (r"So \boxed{8/(3-8/3)}", 5.0), ('{"cards": ["3"], "formula": "8/(3-8/3)=24"}', 5.0),
    ([{"role": "assistant", "content": "8/(3-8/3)"}], 5.0),
])
def test_published_values(completion, value):
    assert rewarded(completion) == value


def test_other_goals_and_values():
    assert general_points(["p"], ["3*8"], [[3, 8]], goal=[24]) == [5.0]
    assert general_points(["p", "p"], ["3+8", "3*8"], [[3, 8], [3, 8]], goal=[11, 11], correct=1.0, wrong_value=0.0) == [1.0, 0.0]


def test_one_right_try_is_enough_and_otherwise_the_last_decides():
    text = "3*8\n8/(3-8/3)\nnothing"
    assert rewarded(text) == -3.0
    assert rewarded(text, tries=2) == 5.0
    assert rewarded("3*8\n3+3+8+8", tries=5) == -1.0
    assert formulas("a\n\nb\nc", 2) == ["b", "c"]
    with pytest.raises(RewardError, match="tries=0"):
        rewarded("1", tries=0)


def test_it_is_registered_and_names_the_column_it_needs():
    assert REWARDS.get("game24") is general_points
    assert RewardSet(["general_points"]).rewards[0].traits.needs == ("numbers",)
