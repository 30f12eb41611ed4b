"""The reward of the card game General Points: is this a formula of the given numbers that makes the goal?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mmalign.data.general_points import judge
from mmalign.errors import RewardError
from mmalign.rewards.maths import extract_answer
from mmalign.rewards.registry import reward
from mmalign.rewards.text import completion_text

_FORMULA = re.compile(r'"formula"\s*:\s*"([^"]*)"')


@reward("general_points", aliases=("game24",), needs=("numbers",))
def general_points(
    prompts: Sequence[Any], completions: Sequence[Any], numbers: Sequence[Sequence[int]], goal: Sequence[int] | None = None, *,
    correct: float = 5.0, wrong_value: float = -1.0, illegal_numbers: float = -2.0, unparsable: float = -3.0, tries: int = 1,
    **columns: Any,
) -> list[float]:
    """+5 for a formula of exactly ``numbers`` that makes ``goal`` (24), -1 for another value, -2 other numbers, -3 for none.

    The formula is what ``<answer>``, ``\\boxed{}`` or the key ``"formula"`` of a JSON answer holds, else the last line that is
    not empty. It is read through a whitelisted syntax tree and never evaluated (:func:`mmalign.data.general_points.judge`).

    Args:
        correct, wrong_value, illegal_numbers, unparsable: value of each verdict (Chu et al. 2025, arXiv 2501.17161).
        tries: formulas that a completion may hold, the last ones count; one right formula is enough, otherwise the last decides.
    """
    if tries < 1:
        raise RewardError(f"tries={tries} must be at least 1")
    values = {"correct": correct, "wrong_value": wrong_value, "illegal_numbers": illegal_numbers, "unparsable": unparsable}
    goals = [24] * len(completions) if goal is None else goal
    results = []
    for completion, given, wanted in zip(completions, numbers, goals, strict=True):
        verdicts = [judge(formula, [int(number) for number in given], int(wanted))
                    for formula in formulas(completion_text(completion), tries)]
        results.append(values["correct" if "correct" in verdicts else verdicts[-1] if verdicts else "unparsable"])
    return results


def formulas(text: str, tries: int = 1) -> list[str]:
    """The last ``tries`` formulas that a completion states, in order."""
    found = _FORMULA.findall(text)
    if not found:
        stated = extract_answer(text)
        found = [line.strip() for line in stated.splitlines() if line.strip()]
    return found[-tries:]
