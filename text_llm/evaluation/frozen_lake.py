"""Intuitive fine-tuning on a game that can be seen: Frozen Lake from one demonstrated path.

A policy network reads one-hot states. Training sees the states of one shortest path only; what it does elsewhere is
compared with the policy that is uniform over optimal actions. After Hua et al. 2024, arXiv 2405.11870, section 4.3; the
sizes of grid and network are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.core.logprobs import ActionScores
from mmalign.core.preference import odds_ratio, sigmoid
from mmalign.core.seeding import generator
from mmalign.core.supervised import propagated_nll
from mmalign.data.frozen_lake import OPEN_MAP, FrozenLake, draw_lake

METHODS = ("sft", "ift", "dpo", "orpo")


@dataclass(frozen=True)
class LakeResult:
    """What a trained policy does in the states that are not terminal."""

    method: str
    seed: int
    policy: Tensor
    """``[S, 4]`` probabilities."""
    off_path: float
    """Mean probability of the optimal actions in states that the demonstration does not visit."""
    error: float
    """Mean squared difference to the optimal policy over states and actions."""
    walk: list[int]
    """States of the greedy walk from the start, ended at a terminal state or after ``size^2`` moves."""


def train_on_lake(
    method: str, seed: int, *, lake: FrozenLake = OPEN_MAP, hidden: int = 32, steps: int = 120, lr: float = 0.02,
    lam: float = 0.2, gamma: float = 0.95, detach: bool = True, beta: float = 0.1,
) -> LakeResult:
    """Train a policy with ``sft``, ``ift``, ``dpo`` or ``orpo`` on one path (and, for pairs, one with a detour).

    ``hidden`` 0 is a linear policy. Raises ValueError for an unknown method or values out of range.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; allowed are {', '.join(METHODS)}")
    if not 0 <= lam <= 1:
        raise ValueError(f"lam is {lam}; it must lie in [0, 1]")
    network = _network(lake.size**2, hidden, seed)
    chosen, rejected = lake.path(), lake.path(detour=1)
    optimizer = torch.optim.RMSprop(network.parameters(), lr=lr)
    with torch.no_grad():
        reference = _log_probs(network, lake, *chosen)[0].sum() - _log_probs(network, lake, *rejected)[0].sum()
    for _ in range(steps):
        if method in ("sft", "ift"):
            mix = lam if method == "ift" else 0.0
            logp, mask = _log_probs(network, lake, *chosen, lam=mix)
            decay = gamma if method == "ift" else 0.0
            loss = propagated_nll(ActionScores(logp[None], mask[None]), gamma=decay, detach=detach).mean()
        else:
            good, bad = _log_probs(network, lake, *chosen)[0], _log_probs(network, lake, *rejected)[0]
            if method == "dpo":
                loss = sigmoid((good.sum() - bad.sum() - reference)[None], good.new_zeros(1), beta=beta).mean()
            else:
                loss = -good.mean() + beta * odds_ratio(good.mean()[None], bad.mean()[None]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return _measured(network, lake, method, seed, set(chosen[0]))


def _network(states: int, hidden: int, seed: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(states, 4)] if not hidden else [
        nn.Linear(states, hidden), nn.Tanh(), nn.Linear(hidden, 4)]
    for index, layer in enumerate(layers):
        if isinstance(layer, nn.Linear):
            bound = layer.in_features**-0.5
            random = generator(seed, "init", "frozen_lake", str(index))
            with torch.no_grad():
                layer.weight.uniform_(-bound, bound, generator=random)
                layer.bias.uniform_(-bound, bound, generator=random)
    return nn.Sequential(*layers)


def _log_probs(
    network: nn.Module, lake: FrozenLake, states: list[int], actions: list[int], *, lam: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``[N]`` log-probs of the demonstrated actions, each state mixed with the one the policy itself would be in."""
    inputs = nn.functional.one_hot(torch.tensor(states), lake.size**2).float()
    if lam:
        with torch.no_grad():
            greedy = network(inputs[:-1]).argmax(-1).tolist()
        reached = [lake.step(state, action) for state, action in zip(states[:-1], greedy, strict=True)]
        own = nn.functional.one_hot(torch.tensor(reached), lake.size**2).float()
        inputs = torch.cat([inputs[:1], (1 - lam) * inputs[1:] + lam * own])
    logp = network(inputs).log_softmax(-1)[torch.arange(len(states)), torch.tensor(actions)]
    return logp, torch.ones(len(states), dtype=torch.bool)


@torch.no_grad()
def _measured(network: nn.Module, lake: FrozenLake, method: str, seed: int, seen: set[int]) -> LakeResult:
    policy = network(torch.eye(lake.size**2)).softmax(-1)
    playable = [state for state in range(lake.size**2) if lake.optimal_actions(state)]
    off = [state for state in playable if state not in seen]
    right = (policy * (lake.optimal_policy > 0)).sum(-1)
    error = (policy - lake.optimal_policy)[playable].square().mean()
    walk = [lake.start]
    while not lake.is_terminal(walk[-1]) and len(walk) < lake.size**2:
        walk.append(lake.step(walk[-1], int(policy[walk[-1]].argmax())))
    return LakeResult(method, seed, policy, float(right[off].mean()), float(error), walk)


def compare_on_lake(seeds: int = 6, methods: tuple[str, ...] = METHODS, **settings: Any) -> list[LakeResult]:
    """Every method from every seed."""
    return [train_on_lake(method, seed, **settings) for method in methods for seed in range(seeds)]


def draw_comparison(results: list[LakeResult], file: Path, *, lake: FrozenLake = OPEN_MAP) -> None:
    """A PNG with one lake per method (its first seed): policy as arrows, demonstration in red, greedy walk in blue."""
    from PIL import Image, ImageDraw

    shown = list({result.method: result for result in reversed(results)}.values())[::-1]
    cell, margin = 40, 26
    side = lake.size * cell
    picture = Image.new("RGB", (len(shown) * (side + 12) - 12, side + margin), "white")
    text = ImageDraw.Draw(picture)
    demonstration = [*lake.path()[0], lake.goal]
    for column, result in enumerate(shown):
        mine = [r for r in results if r.method == result.method]
        mean = sum(r.off_path for r in mine) / len(mine)
        picture.paste(draw_lake(lake, paths=[demonstration, result.walk], policy=result.policy, cell=cell),
                      (column * (side + 12), margin))
        text.text((column * (side + 12), 6), f"{result.method}: {mean:.3f} off the path", fill="black")
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file)
