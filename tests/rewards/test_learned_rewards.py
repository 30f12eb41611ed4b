"""Trained models as rewards: sequence classifiers and pairwise rankers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from mmalign.data.ranking import RANKING_TEMPLATE, check_template, ranking_text
from mmalign.data.tiny_llama import build_tiny_llama
from mmalign.errors import ConfigError, DataError, RewardError
from mmalign.policies.loading import ModelOptions
from mmalign.policies.reward_lm import RewardPolicy
from mmalign.rewards.base import RewardSet
from mmalign.rewards.learned import RewardModel
from mmalign.rewards.ranking import LanguageModelRanker, PairwiseRanker, PairwiseRankerReward, log_odds, pairwise_scores

PROMPTS = ["What is 3 + 4?", "How many"]
ANSWERS = [" 7", " are left now. Yes"]


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    build_tiny_llama(folder)
    return folder


@pytest.fixture(scope="module")
def reward_folder(language_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scores") / "model"
    RewardPolicy.from_options(ModelOptions(path=str(language_model), device="cpu"), seed=3).save_pretrained(folder)
    return folder


def test_a_reward_model_scores_text_and_messages(reward_folder: Path) -> None:
    rewards = RewardSet([{"name": "reward_model", "path": str(reward_folder), "rows_per_forward": 1}])
    plain = rewards.score_samples(PROMPTS, ANSWERS)
    assert plain.shape == (2, 1)
    swapped = rewards.score_samples(PROMPTS[::-1], ANSWERS[::-1])
    torch.testing.assert_close(plain, swapped.flip(0))
    asked = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    replies = [[{"role": "assistant", "content": answer}] for answer in ANSWERS]
    chat = RewardModel(str(reward_folder), chat=True)
    torch.testing.assert_close(RewardModel(str(reward_folder))(asked, replies), chat(PROMPTS, ANSWERS))
    assert not torch.allclose(chat(PROMPTS, ANSWERS), plain[:, 0])
    assert not any(p.requires_grad for p in chat.policy.module.parameters())


def test_long_samples_are_cut(reward_folder: Path) -> None:
    short = RewardModel(str(reward_folder), max_length=6)
    assert len(short.policy.encode_sample("What is 3 + 4? Answer", " 7")) == 6
    assert math.isfinite(float(short(["What is 3 + 4? Answer" * 400], [" 7"])[0]))


def test_reward_model_refusals(language_model: Path, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="without a score head"):
        RewardSet([{"name": "reward_model", "path": str(language_model)}]).score_samples(["a"], ["b"])
    with pytest.raises(ConfigError, match="rows_per_forward"):
        RewardModel("x", rows_per_forward=0)
    with pytest.raises(ConfigError, match="max_length"):
        RewardModel("x", max_length=1)
    with pytest.raises(ConfigError, match="path"):
        RewardSet([{"name": "reward_model"}])


# -- rankers ---------------------------------------------------------------------------------------------------------


class Fixed:
    """Probabilities by the pair of texts, with a liking for the first place."""

    def __init__(self, table: dict[tuple[str, str], float], other: float = 0.5) -> None:
        self.table, self.other = table, other

    def preference(self, prompts, first, second):
        return torch.tensor([self.table.get(pair, self.other) for pair in zip(first, second, strict=True)], dtype=torch.float64)


def test_log_odds_against_a_baseline() -> None:
    ranker = Fixed({("good", "base"): 0.8, ("base", "good"): 0.2})
    assert isinstance(ranker, PairwiseRanker)
    values, clamped = pairwise_scores(ranker, ["x"], ["good"], ["base"])
    assert values.tolist() == [pytest.approx(1.386294, abs=1e-6)]
    assert clamped == 0
    assert log_odds(Fixed({}), ["x"], ["a"], ["b"])[0].tolist() == [0.0]


def test_a_liking_for_one_place_cancels() -> None:
    ranker = Fixed({}, other=0.9)  # always the first
    assert pairwise_scores(ranker, ["x"], ["same"], ["same"])[0].tolist() == [0.0]
    assert pairwise_scores(ranker, ["x"], ["same"], ["same"], symmetrize=False)[0].tolist() == [pytest.approx(2.197225, abs=1e-6)]


def test_saturated_probabilities_are_clamped_and_counted() -> None:
    limit = math.log((1 - 1e-6) / 1e-6)
    reward = PairwiseRankerReward(ranker=Fixed({("a", "b"): 1.0, ("b", "a"): 0.0}))
    logged: list[tuple[str, float]] = []
    values = reward(["x", "x"], ["a", "c"], baseline=["b", None], log_metric=lambda *entry: logged.append(entry))
    assert values == [pytest.approx(limit), None]
    assert reward.clamped == 2
    assert logged == [("pairwise_ranker/clamped", 2.0)]


@pytest.mark.parametrize("wrong", [1.2, -0.1, math.nan])
def test_probabilities_that_are_none_are_refused(wrong: float) -> None:
    with pytest.raises(RewardError, match="probabilities lie in"):
        log_odds(Fixed({}, other=wrong), ["x"], ["a"], ["b"])


def test_language_model_ranker(language_model: Path, tmp_path: Path) -> None:
    ranker = LanguageModelRanker(str(language_model), device="cpu", rows_per_forward=1)
    first, second = [" 7", " 8"], [" 8", " 7"]
    rho = ranker.preference(PROMPTS, first, second)
    assert bool(((rho > 0) & (rho < 1)).all())
    together = LanguageModelRanker(str(language_model), rows_per_forward=8).preference(PROMPTS, first, second)
    torch.testing.assert_close(together, rho, rtol=1e-5, atol=1e-6)
    policy = ranker.policy
    text = ranking_text(PROMPTS[0], first[0], second[0])
    rows, _ = policy.prepare_dataset([{"prompt": text, "completion": label} for label in (" A", " B")])
    with torch.no_grad():
        logp, _ = policy.log_probs(policy.encode_rows(list(rows))).sequence()
    assert float(rho[0]) == pytest.approx(float(logp.double().softmax(0)[0]), rel=1e-5)
    values, _ = pairwise_scores(ranker, PROMPTS, first, second)
    back, _ = pairwise_scores(ranker, PROMPTS, second, first)
    torch.testing.assert_close(values, -back)
    with pytest.raises(RewardError, match="does not fit"):
        ranker.preference(["word " * 2000], [" 7"], [" 8"])


def test_the_template_comes_from_the_model(language_model: Path, tmp_path: Path) -> None:
    import json
    import shutil

    shutil.copytree(language_model, tmp_path / "model")
    assert LanguageModelRanker(str(tmp_path / "model")).template == RANKING_TEMPLATE
    (tmp_path / "model" / "mmalign.json").write_text(json.dumps({"ranking_template": "{prompt}|{first}|{second}"}))
    assert LanguageModelRanker(str(tmp_path / "model")).template == "{prompt}|{first}|{second}"
    assert LanguageModelRanker(str(tmp_path / "model"), template="{first}{second}{prompt}").template == "{first}{second}{prompt}"


def test_comparison_text() -> None:
    assert ranking_text("x", "{second}", "b") == "[CONTEXT] x [RESPONSE A] {second} [RESPONSE B] b"
    asked = [{"role": "user", "content": "x"}]
    assert ranking_text(asked, [{"role": "assistant", "content": "a"}], "b").startswith("[CONTEXT] user: x [RESPONSE A] a")
    with pytest.raises(DataError, match="response must be"):
        ranking_text("x", 3, "b")
    for template in ("{prompt}{first}", "{prompt}{first}{second}{second}"):
        with pytest.raises(ConfigError, match="once each"):
            check_template(template)


def test_a_ranker_reward_needs_a_model_and_a_baseline(language_model: Path) -> None:
    with pytest.raises(ConfigError, match="give path"):
        PairwiseRankerReward()
    rewards = RewardSet([{"name": "pairwise_ranker", "path": str(language_model)}])
    with pytest.raises(Exception, match="baseline"):
        rewards.score_samples(["x"], ["a"])
    mapped = RewardSet([{"name": "pairwise_ranker", "path": str(language_model), "columns": {"baseline": "chosen"}}])
    assert mapped.score_samples(["x"], [" 7"], chosen=[" 7"]).tolist() == [[0.0]]
