"""Rewards that run programs: what they compare, what they log, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest

from mmalign.errors import ConfigError
from mmalign.rewards.base import RewardOptions, RewardSet
from mmalign.rewards.programs import ExecutionMatch, UnitTests, extract_program, same_answer, straight_line_match
from mmalign.rewards.sandbox import Sandbox, SandboxOptions


def confined() -> bool:
    try:
        return bool(Sandbox().isolation)
    except ConfigError:
        return False


needs_kernel = pytest.mark.skipif(not confined(), reason="this kernel cannot confine programs")


def score(name: str, completions: list[Any], **columns: Any) -> list[float | None]:
    options = columns.pop("options", {})
    rewards = RewardSet([RewardOptions(name=name, **options)])
    found = rewards.score_samples(["p"] * len(completions), completions, **columns)[:, 0].tolist()
    return [None if value != value else value for value in found]


def test_where_the_program_stands() -> None:
    text = "First\n```python\na = 1\n```\nthen\n```\nb = 2\n```\n"
    assert extract_program(text) == "b = 2\n"
    assert extract_program("c = 3") == "c = 3"
    assert extract_program("c = 3", "fence") == ""
    assert extract_program(text, "whole") == text
    assert extract_program("```py\nopen end") == "open end"


@pytest.mark.parametrize(("found", "expected", "same"), [
    (24, "24", True), (24.0, 24, True), (0.30004, "0.3", True), (0.3002, "0.3", False),
    ("yes", " yes ", True), ("yes", "no", False),
    ("1,200", "1200", True), (True, "True", True), (True, "1", False), (None, "0", False), ("1/2", 0.5, True),
])
def test_equal_answers(found: Any, expected: Any, same: bool) -> None:
    assert same_answer(found, expected, tolerance=1e-4) is same


@needs_kernel
def test_output_and_variables_are_compared_with_the_column() -> None:
    programs = ["print(6 * 7)", "print('the answer is', 42.0)", "print(41)", "print(42); raise SystemExit(1)", "answer = 42",
                "while True: pass", "print('x' * 10**6)", "print(open('/etc/passwd').read())"]
    truth = ["42"] * 7 + [None]
    options = {"seconds": 1.0}
    assert score("program_output", programs, answer=truth, options=options) == [1, 1, 0, 0, 0, 0, 0, None]
    message = [{"role": "assistant", "content": "answer = 42"}]
    found = score("execution_match", ["answer = 6 * 7", "answer = [6, 7]", "x = 1", message],
                  answer=["42", "[6, 7]", "1", "42"], options={"read": "variable"})
    assert found == [1, 1, 0, 1]
    assert score("execution_match", ["print(sqrt(16))"], answer=["4"], options={"prefix": "from math import sqrt"}) == [1]


@needs_kernel
def test_the_truth_is_not_shown_to_the_program() -> None:
    spy = "import gc\nprint([o for o in gc.get_objects() if 'mark-of-truth' in str(o)[:200]] or 'mark-of-truth' in str(vars()))"
    assert score("program_output", [spy], answer=["mark-of-truth"]) == [0]


@needs_kernel
def test_tests_give_their_share_or_all() -> None:
    programs = ["def f(x): return x + 1", "def f(x): return 2", "import os; os._exit(0)", "nonsense("]
    tests = [["assert f(1) == 2", "assert f(2) == 3"]] * 4
    assert score("unit_tests", programs, tests=tests) == [1, 0.5, 0, 0]
    assert score("unit_tests", programs, tests=tests, options={"partial": False}) == [1, 0, 0, 0]
    assert score("unit_tests", programs[:1] * 2, tests=["assert f(0) == 1", None]) == [1, None]


@needs_kernel
def test_outcomes_and_answers_are_logged() -> None:
    logged: dict[str, Any] = {}
    reward = ExecutionMatch(read="variable", seconds=1.0)
    reward([], ["answer = 1", "1 / 0"], ["1", "1"], log_extra=logged.__setitem__, log_metric=logged.__setitem__)
    assert logged["program_status"] == ["ok", "error"]
    assert logged["program_answer"] == ["1", None]
    assert (logged["programs/ok"], logged["programs/error"], logged["programs/timeout"]) == (0.5, 0.5, 0.0)


def test_straight_line_programs_need_no_process() -> None:
    programs = ["a = 4\nanswer = a / 2", "```\nanswer = 2\n```", "answer = 3", "answer = 2\nanswer = 3", "import os",
                "x = 2", "answer = 2"]
    truth: list[Any] = ["2", "2", "2", "2", "2", "2", None]
    assert score("straight_line_match", programs, answer=truth) == [1, 1, 0, 1, 0, 0, None]
    logged: dict[str, Any] = {}
    straight_line_match([], ["answer = 4 / 2"], ["2"], log_extra=logged.__setitem__)
    assert logged == {"program_answer": ["2"]}


@pytest.mark.parametrize(("name", "options", "part"), [
    ("execution_match", {"read": "stdin"}, "rewards.read"), ("execution_match", {"extract": "all"}, "extract"),
    ("execution_match", {"tolerance": -1.0}, "tolerance"), ("execution_match", {"seconds": 0.0}, "seconds"),
    ("execution_match", {"memory": 1}, "memory_bytes"), ("unit_tests", {"second": 1}, "seconds"),
    ("straight_line_match", {"extrat": "whole"}, "extract"),
])
def test_options_that_mean_nothing_are_refused(name: str, options: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        RewardSet([RewardOptions(name=name, **options)])


def test_a_machine_that_cannot_confine_is_refused_when_the_reward_is_made(monkeypatch: Any) -> None:
    def refuse(self: Sandbox) -> dict[str, str]:
        raise ConfigError("this machine cannot enforce: network")

    monkeypatch.setattr(Sandbox, "isolation", property(refuse))
    for make in (ExecutionMatch, UnitTests):
        with pytest.raises(ConfigError, match="cannot enforce"):
            make()
    assert SandboxOptions().required == ["network", "files", "processes"]
