"""Statistical rejection sampling, pairings and triples."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.core.preference import PREFERENCE_LOSSES
from mmalign.core.selection import first_round, make_triples, rejection_passes, statistical_rejection, tournament

SFT = torch.tensor([0.4, 0.3, 0.2, 0.08, 0.02], dtype=torch.float64)
REWARD = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0], dtype=torch.float64)
BETA = 0.5
OPTIMAL = (SFT.log() + REWARD / BETA).softmax(0)


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- closed forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("index", "probability"), [(0, 0.018316), (1, 0.135335), (2, 0.367879), (3, 1.0)])
def test_acceptance_probabilities(index: int, probability: float) -> None:
    rewards, refused = [0.0, 1.0, 1.5, 2.0], [0.9999] * index
    below = [*refused, max(0.0, min(probability - 1e-6, 1 - 1e-12))]
    assert statistical_rejection(rewards, 1, beta=0.5, uniforms=below) == [index]
    if probability < 1:
        above = [*refused, probability + 1e-6]
        assert statistical_rejection(rewards, 1, beta=0.5, uniforms=above + [0.0] * 4) != [index]


def test_limits_of_the_temperature() -> None:
    rewards = [1.0, 3.0, 2.0, 3.0]
    assert statistical_rejection(rewards, 3, beta=0.0, uniforms=[]) == [1, 3, 2]
    assert statistical_rejection(rewards, 3, beta=math.inf, uniforms=[]) == [0, 1, 2]
    assert statistical_rejection([2.0] * 4, 3, beta=0.5, uniforms=[0.999] * 3) == [0, 1, 2]
    assert statistical_rejection(rewards, 0, beta=0.5, uniforms=[]) == []


def test_the_maximum_is_that_of_the_pass() -> None:
    # Pass 0 accepts only the best; in pass 1 the next best is the maximum, so it is accepted whatever is drawn.
    assert rejection_passes([0.0, 4.0, 8.0], 3, beta=0.5, uniforms=[0.9, 0.9, 0.9, 0.9, 0.9, 0.99]) == [(2, 0), (1, 1), (0, 2)]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_never_more_than_asked_never_twice_and_shifts_change_nothing(data: st.DataObject) -> None:
    rewards = data.draw(st.lists(st.integers(-8, 8), min_size=1, max_size=12))
    n = data.draw(st.integers(0, len(rewards)))
    beta = data.draw(st.sampled_from([0.0, 0.25, 0.5, 4.0, math.inf]))
    seed, shift = data.draw(st.integers(0, 99)), data.draw(st.integers(-1000, 1000))
    picked = statistical_rejection([float(r) for r in rewards], n, beta=beta, uniforms=drawn(seed))
    assert len(picked) == n == len(set(picked))
    assert picked == statistical_rejection([float(r + shift) for r in rewards], n, beta=beta, uniforms=drawn(seed))


def test_extreme_rewards_do_not_overflow() -> None:
    assert statistical_rejection([-1e300, 1e300], 1, beta=1e-3, uniforms=[0.5, 0.5]) == [1]


@pytest.mark.parametrize(("arguments", "message"), [
    ({"n": 3}, "n is 3; it must lie between 0 and the 2 candidates"), ({"n": -1}, "n is -1"),
    ({"beta": -0.1}, "beta is -0.1"), ({"beta": math.nan}, "beta is nan"),
    ({"rewards": [0.0, math.nan]}, "rewards must be"), ({"rewards": [0.0, math.inf]}, "rewards must be"),
    ({"uniforms": [1.0, 0.0]}, "uniforms holds 1.0"), ({"uniforms": [0.9999]}, "uniforms ran out"),
])
def test_refusals(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        statistical_rejection(**{"rewards": [0.0, 2.0], "n": 1, "beta": 0.5, "uniforms": [0.5, 0.5], **arguments})


# -- the exact toy ---------------------------------------------------------------------------------------------------


def total_variation(n: int, *, beta: float = BETA, by_text: bool = False, trials: int = 4000, candidates: int = 64) -> float:
    generator, counts = drawn(0), torch.zeros(5, dtype=torch.float64)
    for _ in range(trials):
        tokens = torch.multinomial(SFT, candidates, replacement=True, generator=generator).tolist()
        if by_text:  # what the printed algorithm does
            tokens = list(dict.fromkeys(tokens))
        for index in statistical_rejection([float(REWARD[t]) for t in tokens], n, beta=beta, uniforms=generator):
            counts[tokens[index]] += 1
    return float((counts / counts.sum() - OPTIMAL).abs().sum() / 2)


def test_accepted_samples_follow_the_optimal_policy() -> None:
    plain = float((SFT - OPTIMAL).abs().sum() / 2)
    assert plain == pytest.approx(0.475, abs=2e-3)
    assert total_variation(1, beta=math.inf, trials=1500) == pytest.approx(plain, abs=0.03)
    assert total_variation(1) < 0.03  # 0.005 and the noise of 4000 draws
    assert total_variation(8, trials=1000) == pytest.approx(0.05, abs=0.02)  # without replacement


def test_candidates_keyed_by_text_lose_their_frequency() -> None:
    assert total_variation(1, by_text=True, trials=1500) == pytest.approx(0.29, abs=0.04)


def sampled_pairs(source: str, seed: int, count: int = 160) -> torch.Tensor:
    """Pairs of responses labelled by draws of the Bradley-Terry probability of the true reward."""
    generator, pairs = drawn(seed), []
    human = torch.tensor([0.5, 0.35, 0.1, 0.04, 0.01], dtype=torch.float64)

    def prefer(meetings):
        wins = torch.rand(len(meetings), generator=generator, dtype=torch.float64)
        return [0.0 if a == b else 1.0 if u < torch.sigmoid(REWARD[a] - REWARD[b]) else -1.0
                for (a, b), u in zip(meetings, wins.tolist(), strict=True)]

    while len(pairs) < count:
        if source == "direct":
            tokens = torch.multinomial(human, 8, replacement=True, generator=generator).tolist()
        else:
            drawn_tokens = torch.multinomial(SFT, 64, replacement=True, generator=generator)
            beta = BETA if source == "rso" else math.inf
            tokens = drawn_tokens[statistical_rejection(REWARD[drawn_tokens], 8, beta=beta, uniforms=generator)].tolist()
        pairs += first_round(tokens, prefer, generator=generator)
    return torch.tensor(pairs[:count])


def learned_policy(pairs: torch.Tensor, loss: str = "sigmoid", steps: int = 200) -> torch.Tensor:
    logits = SFT.log().clone().requires_grad_(True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(steps):
        ratio = logits.log_softmax(0) - SFT.log()
        optimizer.zero_grad()
        PREFERENCE_LOSSES.get(loss).function(ratio[pairs[:, 0]], ratio[pairs[:, 1]], beta=BETA).mean().backward()
        optimizer.step()
    return logits.log_softmax(0).detach()


def test_pairs_of_accepted_samples_lead_closest_to_the_optimal_policy() -> None:
    """A tabular policy trained by DPO on as many pairs of each source; four seeds."""
    distance = {source: [] for source in ("direct", "sft", "rso")}
    for source, found in distance.items():
        for seed in range(4):
            policy = learned_policy(sampled_pairs(source, seed))
            found.append(float((policy.exp() * (policy - OPTIMAL.log())).sum()))
    for rso, sft, direct in zip(distance["rso"], distance["sft"], distance["direct"], strict=True):
        assert rso < 0.3
        assert rso < max(sft, direct)
    mean = {source: sum(found) / 4 for source, found in distance.items()}
    assert mean["rso"] < 0.5 * min(mean["sft"], mean["direct"])


# -- losses of the grid ------------------------------------------------------------------------------------------------


def test_hinge_is_zero_beyond_its_margin_and_slic_is_hinge_without_a_reference() -> None:
    chosen = torch.tensor([30.0, 1.0], requires_grad=True)
    hinge = PREFERENCE_LOSSES.get("hinge").function(chosen, torch.tensor([0.0, 0.0]), beta=0.05)
    hinge.sum().backward()
    assert hinge.tolist() == [0.0, pytest.approx(0.95)]
    assert chosen.grad.tolist() == [0.0, pytest.approx(-0.05)]
    slic = PREFERENCE_LOSSES.get("slic")
    assert not slic.reference
    torch.testing.assert_close(slic.function(chosen, chosen * 0, beta=0.05), hinge)


# -- pairings and triples ----------------------------------------------------------------------------------------------


def by_value(values):
    return lambda pairs: [values[a] - values[b] for a, b in pairs]


def test_first_round_pairs_everyone_once() -> None:
    pairs = first_round([3, 5, 7, 9], by_value({3: 1.0, 5: 2.0, 7: 3.0, 9: 4.0}), generator=drawn(0))
    assert len(pairs) == 2
    assert sorted(i for pair in pairs for i in pair) == [3, 5, 7, 9]
    assert all(winner > loser for winner, loser in pairs)
    draws = {tuple(first_round(list(range(6)), by_value(list(range(6))), generator=drawn(seed))) for seed in range(8)}
    assert len(draws) > 1


def test_odd_numbers_lose_one_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="one is left out"):
        assert len(first_round([0, 1, 2], by_value([0, 1, 2]), generator=drawn(0))) == 1


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_a_tournament_has_one_pair_less_than_players(size: int) -> None:
    pairs = tournament(list(range(size)), by_value(list(range(size))), generator=drawn(1))
    assert len(pairs) == size - 1
    assert sorted(loser for _, loser in pairs) == list(range(size - 1))  # everyone but the best loses once


def test_ties_give_no_pair() -> None:
    assert first_round([0, 1], by_value([1.0, 1.0]), generator=drawn(0)) == []
    assert tournament([0, 1, 2], by_value([1.0, 1.0, 1.0]), generator=drawn(0)) == []
    assert len(tournament([0, 1, 2, 3], by_value([0.0, 0.0, 0.0, 1.0]), generator=drawn(0))) in (1, 2)


def test_triples_by_rank() -> None:
    assert make_triples("abcde", [3.0, 5.0, 1.0, 4.0, 2.0]) == (1, 3, 2, 0)
    assert make_triples("abcde", [3.0, 5.0, 1.0, 4.0, 2.0], chosen_rank=4) == (1, 4, 2, 0)
    assert make_triples("abcd", [2.0, 2.0, 1.0, 0.0]) == (0, 1, 3, 1)  # ties by order, counted
    assert make_triples(["a", "a", "b", "c"], [9.0, 1.0, 2.0, 3.0]) == (0, 3, 2, 0)  # the first of equal responses
    for arguments, message in (((("a", "a", "b"), [1.0, 2.0, 3.0]), "2 distinct"), (("abc", [1.0, 2.0, math.nan]), "finite"),
                               (("abc", [1.0, 2.0]), "finite number for each"), (("abc", [1.0, 2.0, 3.0], 3), "chosen_rank is 3"),
                               (("abcd", [1.0, 2.0, 3.0, 4.0], 1), "chosen_rank is 1")):
        with pytest.raises(ValueError, match=message):
            make_triples(*arguments)
