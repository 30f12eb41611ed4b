"""One reward for rows of several kinds, and the graded text rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmalign.errors import ConfigError, DataError, RewardError
from mmalign.rewards.base import RewardOptions, RewardSet, build_rewards
from mmalign.rewards.text_metrics import overlap_f1, token_f1, translation_score

ROUTES = {"exact": "exact_match", "pattern": {"name": "regex_match", "pattern": "^- "},
          "metric": [{"name": "token_f1"}, {"name": "regex_match", "pattern": "x", "weight": 3.0}]}


def route(routes: Any = None, **options: Any) -> RewardSet:
    return build_rewards([RewardOptions(name="route", routes=ROUTES if routes is None else routes, **options)])


def test_every_kind_is_judged_by_its_own_reward() -> None:
    rewards = route()
    values = rewards.score_samples(["p"] * 4, ["7", "- 7", "a x", "7"], answer=["7", "7", "a b", None],
                                   reward_type=["exact", "pattern", "metric", "exact"])
    assert values[:3, 0].tolist() == pytest.approx([1.0, 1.0, (0.5 + 3 * 1.0) / 4])
    assert values[3, 0].isnan()
    assert rewards._last["rewards/route/pattern"] == 1.0


def test_another_column_and_messages() -> None:
    rewards = route({"sums": "exact_match"}, by="task")
    completion = [{"role": "assistant", "content": "7"}]
    assert rewards.score_samples([[{"role": "user", "content": "?"}]], [completion], answer=["7"], task=["sums"]).item() == 1.0


def test_rewards_of_a_file_beside_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def half(prompts, completions, **columns):\n    return [0.5] * len(prompts)\n")
    options = [RewardOptions(name="route", routes={"x": "mine.py:half"})]
    assert build_rewards(options, config_folder=tmp_path).score_samples(["p"], ["c"], reward_type=["x"]).item() == 0.5


@pytest.mark.parametrize(("routes", "options", "message"), [
    ({}, {}, "routes: map every value"), ({"x": "exact_mach"}, {}, r"routes.x.*exact_mach.*exact_match"),
    ({"x": {"name": "length_penalty", "max_length": 3}}, {}, r"routes.x: 'length_penalty' ranges from -1 to 0.*scale: true"),
    ({"x": {"name": "exact_match", "weight": 0}}, {}, "weight 0.0 of 'exact_match' must be positive"),
    ({"x": {"name": "exact_match", "normalise": "strip"}}, {}, "routes.x.normalise.*normalize"),
    ({"x": []}, {}, "at least one reward"), ({"x": 3}, {}, "routes.x: 3 is no reward"),
    ({"x": "exact_match"}, {"bye": "task"}, "bye"),
])
def test_senseless_routes_are_refused(routes: Any, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        route(routes, **options)


def test_scaled_ranges() -> None:
    rewards = route({"x": {"name": "length_penalty", "max_length": 4, "unit": "characters"}}, scale=True)
    assert rewards.score_samples(["p"] * 2, ["ab", ""], reward_type=["x", "x"])[:, 0].tolist() == pytest.approx([0.5, 1.0])


def test_values_out_of_bounds_and_unknown_kinds_name_the_route() -> None:
    def large(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        return [1.3] * len(prompts)

    rewards = route({"exact": "exact_match"})
    rewards.rewards[0].function.routes["metric"] = RewardSet([large]).rewards
    with pytest.raises(RewardError, match=r"routes.metric: large gave 1.3, outside of \[0, 1\]"):
        rewards.score_samples(["p"], ["c"], reward_type=["metric"], answer=["a"])
    with pytest.raises(RewardError, match="reward_type is 'judged', and routes has exact"):
        rewards.score_samples(["p"], ["c"], reward_type=["judged"], answer=["a"])
    with pytest.raises(RewardError, match=r"routes\.exact: exact_match"):  # the sample that fails is found
        rewards.score_samples(["p"] * 2, ["c"] * 2, reward_type=["exact"] * 2, answer=["a", " "])


def test_rows_are_checked_before_anything_is_sampled() -> None:
    rewards = route()
    rewards.check_rows([{"reward_type": "exact"}, {"reward_type": "metric"}])
    with pytest.raises(DataError, match="reward_type is 'judged' in some rows, and routes has exact, pattern, metric"):
        rewards.check_rows([{"reward_type": "exact"}, {"reward_type": "judged"}])
    with pytest.raises(DataError, match="no column 'reward_type'; columns are prompt"):
        rewards.check_rows([{"prompt": "p"}])


def test_token_f1() -> None:
    assert overlap_f1(["a", "a", "b"], ["a", "c"]) == pytest.approx(2 * 1 / 5)
    assert token_f1(["p"] * 3, ["Red lamps", "", "x"], ["red lamps", "red", None]) == [1.0, 0.0, None]
    with pytest.raises(RewardError, match="answer is empty"):
        token_f1(["p"], ["x"], [" "])


def test_translation_score() -> None:
    pytest.importorskip("sacrebleu")
    for metric in ("chrf", "bleu"):
        same, other, none = translation_score(["p"] * 3, ["zwei rote Lampen hier", "nichts", "x"],
                                              [["zwei rote Lampen hier", "zwei"], "zwei rote Lampen", None], metric=metric)
        assert same == pytest.approx(1.0)
        assert other is not None
        assert other < 0.3
        assert none is None


def test_translation_score_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from mmalign.rewards.text_metrics import _sentence_scorer

    _sentence_scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ConfigError, match=r"pip install 'mmalign\[eval\]'"):
        translation_score(["p"], ["a"], ["a"])
    with pytest.raises(ConfigError, match="metric: 'ter' is unknown"):
        translation_score(["p"], ["a"], ["a"], metric="ter")  # type: ignore[arg-type]
