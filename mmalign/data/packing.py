"""Bin packing of sequences, and ``TokenLayout``: how the rows of a batch are laid out for one forward pass.

A batch is a list of rows ``(input_ids, labels)``. The same log-probabilities can be computed from very different
tensors, and which is cheapest depends on the lengths:

``padded``
    one row each, padded on the right. A causal model needs no mask: a scored position never sees the padding.
``packed``
    several rows behind each other in one tensor row, kept apart by a block-diagonal mask.
``shared_prefix``
    rows that begin with the same prompt are a tree: the prompt once, then every continuation, each of which attends to
    the prompt and to itself. ``G`` completions of ``P`` prompt tokens cost ``P + G C`` tokens instead of ``G (P + C)``.

Scores are always returned per action of a row (column ``a`` = the row's ``a``-th scored token), so nothing above this
module can tell the layouts apart.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmalign.core.registry import Registry
from mmalign.data.rows import Rows
from mmalign.errors import DataError

IGNORED = -100
"""Label of a token that is not scored."""

LayoutKind = Literal["padded", "packed", "shared_prefix"]
LayoutMode = Literal["auto", "padded", "packed", "shared_prefix"]

PAIRS_PER_TOKEN = 2048.0
"""Query-key pairs that cost as much as one more token (about 6 H by operations, fewer because softmax is slow)."""

_MAX_MASK_ENTRIES = 1 << 27
"""Largest explicit mask: the attention kernels expand it to one float an entry."""


# -- bin packing ---------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """Tokens ``start:stop`` of one sequence."""

    sequence: int
    """Index of the sequence."""
    start: int
    stop: int


PACKERS: Registry[Callable[[list[int], int], list[list[Piece]]]] = Registry("packing strategy")
"""Strategies by name: ``(lengths, capacity) -> bins of pieces``."""


def pack_pieces(lengths: Sequence[int], capacity: int, strategy: str = "bfd") -> list[list[Piece]]:
    """Distribute sequences over bins of ``capacity`` tokens.

    ================ ================================================================================================
    ``bfd``          longest first, each into the fullest bin that still holds it (ties: the earliest bin); a sequence
                     longer than a bin is cut to it
    ``bfd_split``    as ``bfd``, but a sequence longer than a bin is split into several pieces
    ``ffd``          longest first, each into the first bin that holds it; over-long cut
    ``first_fit``    in order, each into the first bin that holds it; over-long cut
    ``knapsack``     fill one bin at a time with the longest remaining sequence that fits; over-long cut
    ``sequential``   in order, a new bin when the next one does not fit; over-long ones are left out
    ``wrapped``      all sequences end to end, sliced every ``capacity`` tokens
    ================ ================================================================================================

    Every kept token is in exactly one piece, no bin exceeds ``capacity``, and the result depends on nothing but the
    arguments. Raises DataError for lengths below 1, a capacity below 1 or an unknown strategy.
    """
    sizes = [int(length) for length in lengths]
    if capacity < 1:
        raise DataError(f"packing capacity is {capacity}; it must be at least 1 token")
    if sizes and min(sizes) < 1:
        at = sizes.index(min(sizes))
        raise DataError(f"sequence {at} has {sizes[at]} tokens; drop empty rows before packing")
    try:
        packer = PACKERS.get(strategy)
    except ValueError as error:
        raise DataError(str(error)) from None
    return packer(sizes, capacity)


def pack(lengths: Sequence[int], capacity: int, strategy: str = "bfd") -> list[list[int]]:
    """Indices of the sequences in each bin; see :func:`pack_pieces` for the strategies.

    With ``bfd_split`` and ``wrapped`` a sequence may be in several bins, with ``sequential`` an over-long one in none.
    """
    return [[piece.sequence for piece in pieces] for pieces in pack_pieces(lengths, capacity, strategy)]


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda index: -lengths[index])


@PACKERS.register("bfd", aliases=("best_fit_decreasing",))
def _best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[Piece]]:
    return _best_fit([Piece(index, 0, min(lengths[index], capacity)) for index in _longest_first(lengths)], capacity)


@PACKERS.register("bfd_split")
def _best_fit_split(lengths: list[int], capacity: int) -> list[list[Piece]]:
    pieces = [
        Piece(index, start, min(start + capacity, length))
        for index, length in enumerate(lengths) for start in range(0, length, capacity)
    ]
    return _best_fit(sorted(pieces, key=lambda piece: piece.start - piece.stop), capacity)


def _best_fit(pieces: Sequence[Piece], capacity: int) -> list[list[Piece]]:
    bins: list[list[Piece]] = []
    spaces: list[int] = []  # distinct free spaces, ascending
    with_space: dict[int, list[int]] = {}  # free space -> heap of bins

    def offer(space: int, number: int) -> None:
        if space == 0:
            return
        if space not in with_space:
            with_space[space] = []
            insort(spaces, space)
        heapq.heappush(with_space[space], number)

    for piece in pieces:
        size = piece.stop - piece.start
        at = bisect_left(spaces, size)
        if at == len(spaces):
            number, space = len(bins), capacity
            bins.append([])
        else:
            space = spaces[at]
            number = heapq.heappop(with_space[space])
            if not with_space[space]:
                del with_space[space], spaces[at]
        bins[number].append(piece)
        offer(space - size, number)
    return bins


@PACKERS.register("ffd", aliases=("first_fit_decreasing",))
def _first_fit_decreasing(lengths: list[int], capacity: int) -> list[list[Piece]]:
    return _first_fit(lengths, capacity, _longest_first(lengths))


@PACKERS.register("first_fit")
def _first_fit_in_order(lengths: list[int], capacity: int) -> list[list[Piece]]:
    return _first_fit(lengths, capacity, range(len(lengths)))


def _first_fit(lengths: Sequence[int], capacity: int, order: Sequence[int]) -> list[list[Piece]]:
    # A binary tree of the largest free space below each node finds the first bin that fits in O(log n).
    leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    free = [capacity] * (2 * leaves)
    bins: list[list[Piece]] = []
    for index in order:
        size = min(lengths[index], capacity)
        node = 1
        while node < leaves:
            node = 2 * node if free[2 * node] >= size else 2 * node + 1
        number = node - leaves
        if number == len(bins):
            bins.append([])
        bins[number].append(Piece(index, 0, size))
        free[node] -= size
        while node > 1:
            node //= 2
            free[node] = max(free[2 * node], free[2 * node + 1])
    return bins


@PACKERS.register("knapsack")
def _knapsack(lengths: list[int], capacity: int) -> list[list[Piece]]:
    waiting = sorted((min(length, capacity), -index) for index, length in enumerate(lengths))
    bins: list[list[Piece]] = []
    while waiting:
        space, pieces = capacity, []
        while (at := bisect_right(waiting, (space, 1)) - 1) >= 0:
            size, index = waiting.pop(at)
            pieces.append(Piece(-index, 0, size))
            space -= size
        bins.append(pieces)
    return bins


@PACKERS.register("sequential")
def _sequential(lengths: list[int], capacity: int) -> list[list[Piece]]:
    bins: list[list[Piece]] = []
    space = 0
    for index, length in enumerate(lengths):
        if length > capacity:
            continue
        if length > space:
            bins.append([])
            space = capacity
        bins[-1].append(Piece(index, 0, length))
        space -= length
    return bins


@PACKERS.register("wrapped")
def _wrapped(lengths: list[int], capacity: int) -> list[list[Piece]]:
    bins: list[list[Piece]] = []
    space = 0
    for index, length in enumerate(lengths):
        start = 0
        while start < length:
            if space == 0:
                bins.append([])
                space = capacity
            stop = min(length, start + space)
            bins[-1].append(Piece(index, start, stop))
            space -= stop - start
            start = stop
    return bins


# -- layouts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenLayout:
    """Tensors of one forward pass over ``B`` rows, and where each scored action is read off.

    ``R x T`` is the shape of the forward; ``N`` the number of scored actions (label not -100, never position 0),
    ordered by row and column.
    """

    kind: LayoutKind
    batch: int
    """Rows ``B`` of the batch (not of the tensors)."""
    input_ids: Tensor
    """``[R, T]`` int64."""
    position_ids: Tensor
    """``[R, T]`` int64 position of each token in its own row."""
    segment_ids: Tensor
    """``[R, T]`` int64: which run of tokens a position belongs to; 0 is padding."""
    parent_ids: Tensor
    """``[R, T]`` int64: the segment a position may attend to besides its own (the shared prompt), else its own."""
    source: Tensor
    """``[N]`` flat index into ``R * T`` of the position whose hidden state predicts the action."""
    token: Tensor
    """``[N]`` flat index into ``R * T`` of the action's own token (never inside a shared prompt)."""
    target: Tensor
    """``[N]`` int64 token of the action."""
    row: Tensor
    """``[N]`` row of the batch, in ``[0, B)``."""
    column: Tensor
    """``[N]`` index of the action in its row."""
    last: Tensor
    """``[B]`` flat index of the last token of each row."""
    width: int
    """Columns ``A`` of a scattered result (at least 1)."""
    needs_mask: bool
    """False when plain causal attention gives every scored position the right context."""
    longest: int
    """Positions of the longest row: a sliding window at least this wide never acts."""

    @property
    def tokens(self) -> int:
        """Positions of the forward pass, padding included."""
        return self.input_ids.numel()

    @cached_property
    def attention_mask(self) -> Tensor | None:
        """``[R, 1, T, T]`` bool, True where attention is allowed; None when plain causal attention suffices.

        Padding attends to itself, so that no softmax runs over nothing.
        """
        if not self.needs_mask:
            return None
        segments, parents = self.segment_ids, self.parent_ids
        length = segments.shape[1]
        own = segments[:, :, None] == segments[:, None, :]
        allowed = own | (parents[:, :, None] == segments[:, None, :])
        allowed &= torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
        allowed &= (segments != 0)[:, None, :]
        allowed |= torch.eye(length, dtype=torch.bool, device=segments.device)
        return allowed[:, None]

    def mask(self) -> Tensor:
        """``[B, A]`` bool: columns that hold an action."""
        return self.scatter(torch.ones_like(self.row, dtype=torch.bool))

    def scatter(self, values: Tensor) -> Tensor:
        """``[N, ...] -> [B, A, ...]``: values in their row and column, zero elsewhere; differentiable."""
        empty = torch.zeros(self.batch, self.width, *values.shape[1:], dtype=values.dtype, device=values.device)
        return empty.index_put((self.row.to(values.device), self.column.to(values.device)), values)

    def to(self, device: torch.device | str) -> TokenLayout:
        """This layout with its tensors on ``device``."""
        names = ("input_ids", "position_ids", "segment_ids", "parent_ids", "source", "token", "target", "row", "column",
                 "last")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


class ScoredRow(NamedTuple):
    """One row of a batch as arrays: its tokens, and which of them are scored."""

    ids: NDArray[np.int64]
    actions: NDArray[np.int64]
    """Positions of the scored tokens, ascending, never 0."""
    targets: NDArray[np.int64]
    """Labels at ``actions``."""

    @property
    def prompt(self) -> int:
        """Tokens before the first scored one."""
        return int(self.actions[0]) if len(self.actions) else len(self.ids)


def scored_rows(rows: Rows) -> list[ScoredRow]:
    """Read the ``input_ids`` and ``labels`` columns; raises DataError for rows that are empty or do not match."""
    result = []
    for number, (ids, labels) in enumerate(zip(rows["input_ids"], rows["labels"], strict=True)):
        tokens, wanted = np.asarray(ids, dtype=np.int64), np.asarray(labels, dtype=np.int64)
        if tokens.ndim != 1 or len(tokens) == 0 or tokens.shape != wanted.shape:
            raise DataError(f"row {number} has input_ids of shape {tokens.shape} and labels of shape {wanted.shape}; "
                            "both must be one non-empty list of token ids")
        actions = np.flatnonzero(wanted != IGNORED)
        actions = actions[actions > 0]
        result.append(ScoredRow(tokens, actions, wanted[actions]))
    return result


class _Tree(NamedTuple):
    """Rows laid out together: ``prefix`` tokens once, then the rest of every row."""

    prefix: int
    rows: tuple[int, ...]
    size: int


def layout_padded(rows: Rows, *, width: int = 1) -> TokenLayout:
    """One tensor row per row, padded on the right; ``width`` is the least number of columns of the scores."""
    scored = scored_rows(rows)
    trees = _single_trees(scored)
    return _assemble("padded", scored, [[tree] for tree in trees], width)


def layout_packed(rows: Rows, capacity: int | None = None, *, width: int = 1) -> TokenLayout:
    """Rows behind each other in tensor rows of ``capacity`` tokens (default, and at least: the longest row)."""
    scored = scored_rows(rows)
    return _assemble("packed", scored, _binned(_single_trees(scored), capacity), width)


def layout_shared_prefix(
    rows: Rows, capacity: int | None = None, *, branches: int | None = None, width: int = 1,
) -> TokenLayout:
    """Rows with the same tokens before their first action share one copy of them.

    ``branches`` is the largest number of rows that share a copy (default: all that can). Rows without an action are
    all prompt; equal ones among them are computed once.
    """
    scored = scored_rows(rows)
    return _assemble("shared_prefix", scored, _binned(_shared_trees(scored, branches), capacity), width)


def choose_layout(
    rows: Rows, mode: LayoutMode = "auto", *, masks: bool = True, pairs_per_token: float = PAIRS_PER_TOKEN,
    width: int = 1,
) -> TokenLayout:
    """The layout of ``mode``, or with "auto" the cheapest one allowed.

    The cost of a layout is ``tokens + attended pairs / pairs_per_token``; a masked layout pays for all ``T^2`` pairs of
    a tensor row, a padded one for the causal half. ``masks=False`` says that the model cannot take an explicit mask:
    only ``padded`` is left.
    """
    if not masks or mode == "padded":
        return layout_padded(rows, width=width)
    scored = scored_rows(rows)
    singles = _single_trees(scored)
    plans: list[_Plan] = []
    if mode == "auto":
        plans.append(_plan("padded", [[tree] for tree in singles], pairs_per_token))
    if mode in ("auto", "packed"):
        plans += [_plan("packed", bins, pairs_per_token) for bins in _candidate_bins(singles)]
    if mode in ("auto", "shared_prefix"):
        branches = max((len(tree.rows) for tree in _shared_trees(scored, None)), default=1)
        while branches > 1 or not plans:
            trees = _shared_trees(scored, branches)
            plans += [_plan("shared_prefix", bins, pairs_per_token) for bins in _candidate_bins(trees)]
            branches //= 2
    best = min(plans, key=lambda plan: plan.cost)
    return _assemble(best.kind, scored, best.bins, width)


class _Plan(NamedTuple):
    cost: float
    kind: LayoutKind
    bins: list[list[_Tree]]


def _plan(kind: LayoutKind, bins: list[list[_Tree]], pairs_per_token: float) -> _Plan:
    height, length = _shape(bins)
    pairs = height * length**2
    if not _needs_mask(bins):
        pairs //= 2
    elif pairs > _MAX_MASK_ENTRIES:
        return _Plan(float("inf"), kind, bins)
    return _Plan(height * length + pairs / pairs_per_token, kind, bins)


def _shape(bins: list[list[_Tree]]) -> tuple[int, int]:
    return len(bins), max((sum(tree.size for tree in trees) for trees in bins), default=0)


def _needs_mask(bins: list[list[_Tree]]) -> bool:
    return any(len(trees) > 1 or len(trees[0].rows) > 1 for trees in bins)


def _single_trees(scored: Sequence[ScoredRow]) -> list[_Tree]:
    return [_Tree(0, (number,), len(row.ids)) for number, row in enumerate(scored)]


def _shared_trees(scored: Sequence[ScoredRow], branches: int | None) -> list[_Tree]:
    by_prompt: dict[bytes, list[int]] = {}
    for number, row in enumerate(scored):
        by_prompt.setdefault(row.ids[: row.prompt].tobytes(), []).append(number)
    trees = []
    for members in by_prompt.values():
        step = branches or len(members)
        for start in range(0, len(members), step):
            part = tuple(members[start : start + step])
            prefix = scored[part[0]].prompt if len(part) > 1 else 0
            trees.append(_Tree(prefix, part, prefix + sum(len(scored[number].ids) - prefix for number in part)))
    return trees


def _binned(trees: Sequence[_Tree], capacity: int | None = None) -> list[list[_Tree]]:
    largest = max((tree.size for tree in trees), default=1)
    bins = pack([tree.size for tree in trees], max(capacity or 0, largest))
    return [[trees[index] for index in indices] for indices in bins]


def _candidate_bins(trees: Sequence[_Tree]) -> list[list[list[_Tree]]]:
    largest = max((tree.size for tree in trees), default=1)
    return [_binned(trees, factor * largest) for factor in (1, 2, 4)]


def _assemble(kind: LayoutKind, scored: Sequence[ScoredRow], bins: list[list[_Tree]], width: int) -> TokenLayout:
    """Write the trees of every bin into the tensors and note where each action is predicted."""
    height, length = _shape(bins)
    needs_mask = _needs_mask(bins)
    ids, positions, segments, parents = (np.zeros((height, length), dtype=np.int64) for _ in range(4))
    # Without a mask the padding is simply the row going on: consecutive positions are what a causal model expects.
    if not needs_mask:
        positions += np.arange(length)
    sources: list[NDArray[np.int64]] = [np.zeros(0, dtype=np.int64)] * len(scored)
    tokens: list[NDArray[np.int64]] = list(sources)
    last = np.zeros(len(scored), dtype=np.int64)

    def write(at: int, start: int, tokens: NDArray[np.int64], first: int, segment: int, parent: int) -> int:
        stop = start + len(tokens)
        ids[at, start:stop], positions[at, start:stop] = tokens, np.arange(first, first + len(tokens))
        segments[at, start:stop], parents[at, start:stop] = segment, parent
        return stop

    for at, trees in enumerate(bins):
        start = segment = 0
        for tree in trees:
            segment += 1
            base, root, prefix = start, segment, tree.prefix
            if prefix:
                start = write(at, start, scored[tree.rows[0]].ids[:prefix], 0, root, root)
            for number in tree.rows:
                row = scored[number]
                segment += bool(prefix)
                before = row.actions - 1  # the position that predicts each action, counted in its own row
                offset = np.where(before < prefix, base, start - prefix)
                sources[number] = at * length + offset + before
                tokens[number] = at * length + start - prefix + row.actions
                after = write(at, start, row.ids[prefix:], prefix, segment, root)
                last[number] = at * length + (after - 1 if after > start else base + prefix - 1)
                start = after
    counts = [len(row.actions) for row in scored]
    empty = np.zeros(0, dtype=np.int64)
    return TokenLayout(
        kind, len(scored), torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(segments),
        torch.from_numpy(parents),
        source=torch.from_numpy(np.concatenate([empty, *sources])), token=torch.from_numpy(np.concatenate([empty, *tokens])),
        target=torch.from_numpy(np.concatenate([empty, *(row.targets for row in scored)])),
        row=torch.from_numpy(np.repeat(np.arange(len(scored)), counts)),
        column=torch.from_numpy(np.concatenate([empty, *(np.arange(count) for count in counts)])),
        last=torch.from_numpy(last),
        width=max(width, 1, *counts), needs_mask=needs_mask,
        longest=max((len(row.ids) for row in scored), default=0),
    )
