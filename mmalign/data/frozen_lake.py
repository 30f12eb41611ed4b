"""The ``frozen_lake`` asset: a grid of ice with holes, its shortest paths, text rows of them, and pictures.

Cells are numbered row by row; actions are 0 left, 1 down, 2 right, 3 up; a move off the grid stays. Holes and the goal, the
last cell, end the game. The game without slipping is the demonstration of Hua et al. 2024, arXiv 2405.11870.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmalign.core.seeding import derive_seed
from mmalign.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

ACTIONS = ("left", "down", "right", "up")
LETTERS = "LDRU"
_MOVES = ((0, -1), (1, 0), (0, 1), (-1, 0))


@dataclass(frozen=True)
class FrozenLake:
    """One map: ``size x size`` cells, start 0, goal ``size^2 - 1``."""

    size: int
    holes: frozenset[int]

    def __post_init__(self) -> None:
        if self.size < 2:
            raise DataError(f"size: a lake needs at least 2 x 2 cells, not {self.size}")
        outside = [hole for hole in self.holes if not 0 < hole < self.goal]
        if outside:
            raise DataError(f"holes: {outside[0]} is the start, the goal, or off a lake of {self.size} x {self.size} cells")
        if self.start not in self.distance:
            raise DataError(f"holes: no way leads from the start to the goal around {sorted(self.holes)}")

    @property
    def start(self) -> int:
        """The first cell."""
        return 0

    @property
    def goal(self) -> int:
        """The last cell."""
        return self.size**2 - 1

    def is_terminal(self, state: int) -> bool:
        """Whether the game is over at ``state``."""
        return state == self.goal or state in self.holes

    def step(self, state: int, action: int) -> int:
        """Where ``action`` leads; terminal states are not left."""
        if self.is_terminal(state):
            return state
        row, column = divmod(state, self.size)
        down, right = _MOVES[action]
        row, column = min(max(row + down, 0), self.size - 1), min(max(column + right, 0), self.size - 1)
        return row * self.size + column

    @cached_property
    def distance(self) -> dict[int, int]:
        """Moves to the goal of every cell that it can be reached from."""
        found, queue = {self.goal: 0}, deque([self.goal])
        while queue:
            state = queue.popleft()
            row, column = divmod(state, self.size)
            for down, right in _MOVES:
                r, c = row + down, column + right
                other = r * self.size + c
                if 0 <= r < self.size and 0 <= c < self.size and other not in self.holes and other not in found:
                    found[other] = found[state] + 1
                    queue.append(other)
        return found

    def optimal_actions(self, state: int) -> list[int]:
        """Actions that begin a shortest path; empty at terminal states and where no path exists."""
        here = self.distance.get(state)
        if not here:
            return []
        return [action for action in range(4) if self.distance.get(self.step(state, action), here) == here - 1]

    @cached_property
    def optimal_policy(self) -> Tensor:
        """``[S, 4]``: uniform over the optimal actions, zero in states that have none."""
        table = torch.zeros(self.size**2, 4)
        for state in range(self.size**2):
            best = self.optimal_actions(state)
            table[state, best] = 1 / max(1, len(best))
        return table

    def path(self, rng: random.Random | None = None, *, detour: int = 0) -> tuple[list[int], list[int]]:
        """``(states, actions)`` from the start to the goal, the goal left out of the states.

        A shortest one: the first optimal action each time, or a random one with ``rng``. ``detour`` puts that many moves
        back and forth at its beginning, which makes it longer by twice as many moves.
        """
        states: list[int] = []
        actions: list[int] = []
        state = self.start

        def go(action: int) -> None:
            nonlocal state
            states.append(state)
            actions.append(action)
            state = self.step(state, action)

        for _ in range(detour):
            away = next(a for a in (1, 2) if not self.is_terminal(self.step(state, a)))
            go(away)
            go({1: 3, 2: 0}[away])
        while state != self.goal:
            best = self.optimal_actions(state)
            go(rng.choice(best) if rng else best[0])
        return states, actions

    def drawn(self) -> str:
        """The map as text: S start, G goal, H hole, . ice."""
        cells = ["S" if s == self.start else "G" if s == self.goal else "H" if s in self.holes else "."
                 for s in range(self.size**2)]
        return "\n".join("".join(cells[i : i + self.size]) for i in range(0, len(cells), self.size))


OPEN_MAP = FrozenLake(6, frozenset({8, 14, 22, 27}))
"""A wide map, on which states off the training path matter."""


def random_lake(size: int, holes: int, rng: random.Random) -> FrozenLake:
    """A map with ``holes`` random holes whose goal can be reached; raises DataError when none turns up in 200 draws."""
    cells = range(1, size**2 - 1)
    if not 0 <= holes <= len(cells):
        raise DataError(f"holes: a lake of {size} x {size} cells has room for {len(cells)} holes, not {holes}")
    for _ in range(200):
        try:
            return FrozenLake(size, frozenset(rng.sample(cells, holes)))
        except DataError:
            continue
    raise DataError(f"holes: {holes} holes leave no way over a lake of {size} x {size} cells")


def make_frozen_lake(
    n: int, *, split: str = "train", seed: int = 0, size: int = 4, holes: int = 3, pairs: bool = False, images: bool = False,
) -> list[dict[str, Any]]:
    """``n`` rows ``id, prompt, completion, answer``: a random map as text, and a shortest path in the letters L D R U.

    ``pairs`` gives ``chosen`` (a shortest path) and ``rejected`` (one with a detour) instead of the completion;
    ``images`` adds a picture of the map. Raises DataError for an unknown split or maps that cannot be.
    """
    if split not in ("train", "test"):
        raise DataError(f"data.split: the frozen_lake asset has train and test, not {split!r}")
    if n < 1:
        raise DataError(f"frozen_lake: the number of rows must be at least 1, not {n}")
    rows: list[dict[str, Any]] = []
    for index in range(n):
        rng = random.Random(derive_seed(seed, "data", "frozen_lake", split, str(index)))
        lake = random_lake(size, holes, rng)
        best = "".join(LETTERS[a] for a in lake.path(rng)[1])
        row: dict[str, Any] = {"id": f"frozen_lake-{split}-{seed}-{index}", "prompt": f"{lake.drawn()}\nPath:"}
        if pairs:
            try:
                longer = "".join(LETTERS[a] for a in lake.path(rng, detour=1)[1])
            except StopIteration:
                raise DataError("frozen_lake: a map leaves no room for a detour; ask for fewer holes") from None
            row |= {"chosen": f" {best}", "rejected": f" {longer}"}
        else:
            row["completion"] = f" {best}"
        row["answer"] = best
        if images:
            row["images"] = [draw_lake(lake)]
        rows.append(row)
    return rows


def draw_lake(
    lake: FrozenLake, *, paths: Sequence[Sequence[int]] = (), policy: Tensor | None = None, cell: int = 32,
) -> Image:
    """A picture of a map, ``cell`` pixels a cell, with the states of ``paths`` as lines and a policy as arrows.

    ``policy[S, 4]`` holds probabilities; every arrow is as dark as its action is likely.
    """
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (lake.size * cell, lake.size * cell), "white")
    draw = ImageDraw.Draw(image)

    def centre(state: int) -> tuple[float, float]:
        row, column = divmod(state, lake.size)
        return (column + 0.5) * cell, (row + 0.5) * cell

    for state in range(lake.size**2):
        x, y = centre(state)
        box = (x - cell / 2, y - cell / 2, x + cell / 2 - 1, y + cell / 2 - 1)
        fill = {lake.start: "#c9e7cb", lake.goal: "#f6d365"}.get(state, "#33566e" if state in lake.holes else "#eaf4fa")
        draw.rectangle(box, fill=fill, outline="#b8cad6")
        if policy is None or lake.is_terminal(state):
            continue
        for action, probability in enumerate(policy[state].tolist()):
            down, right = _MOVES[action]
            shade = round(235 - 215 * min(1.0, max(0.0, probability)))
            width = max(1, round(cell * 0.12 * probability))
            draw.line((x, y, x + 0.38 * cell * right, y + 0.38 * cell * down), fill=(shade, shade, shade), width=width)
    for path, colour in zip(paths, ("#d1495b", "#2e6f95", "#66a182", "#8d5a97") * len(paths), strict=False):
        points = [centre(state) for state in path]
        if len(points) > 1:
            draw.line(points, fill=colour, width=max(2, cell // 10), joint="curve")
        for x, y in points:
            draw.ellipse((x - cell / 10, y - cell / 10, x + cell / 10, y + cell / 10), fill=colour)
    return image
