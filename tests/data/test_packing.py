"""Packing strategies and token layouts: invariants, the textbook examples, and what a mask lets through."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.data.packing import (
    PACKERS,
    Piece,
    choose_layout,
    layout_packed,
    layout_padded,
    layout_shared_prefix,
    pack,
    pack_pieces,
)
from mmalign.data.rows import Rows
from mmalign.errors import DataError

LENGTHS = [9, 6, 4, 1, 1, 1]


def by_length(strategy: str) -> list[list[int]]:
    return [[LENGTHS[index] for index in bin_] for bin_ in pack(LENGTHS, 12, strategy)]


def test_best_fit_fills_the_fullest_bin() -> None:
    # 9 opens a bin (3 free), 6 and 4 open and share another (2 free): the ones go where least is free.
    assert by_length("bfd") == [[9, 1], [6, 4, 1, 1]]


@pytest.mark.parametrize("strategy", ["ffd", "knapsack"])
def test_first_fit_and_knapsack_fill_the_first_bin(strategy: str) -> None:
    assert by_length(strategy) == [[9, 1, 1, 1], [6, 4]]


def test_sequential_keeps_order_and_leaves_long_ones_out() -> None:
    assert pack([5, 6, 20, 7, 3], 12, "sequential") == [[0, 1], [3, 4]]


def test_wrapped_slices_the_stream() -> None:
    assert pack_pieces([5, 6, 4], 7, "wrapped") == [
        [Piece(0, 0, 5), Piece(1, 0, 2)], [Piece(1, 2, 6), Piece(2, 0, 3)], [Piece(2, 3, 4)],
    ]


def test_long_sequences_are_cut_or_split() -> None:
    assert pack_pieces([10, 3], 4, "bfd") == [[Piece(0, 0, 4)], [Piece(1, 0, 3)]]
    assert sorted(piece for bin_ in pack_pieces([10, 3], 4, "bfd_split") for piece in bin_) == [
        Piece(0, 0, 4), Piece(0, 4, 8), Piece(0, 8, 10), Piece(1, 0, 3),
    ]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 50), st.sampled_from(PACKERS.names()))
def test_every_kept_token_is_in_one_bin(lengths: list[int], capacity: int, strategy: str) -> None:
    bins = pack_pieces(lengths, capacity, strategy)
    assert bins == pack_pieces(lengths, capacity, strategy)
    assert all(0 < sum(piece.stop - piece.start for piece in bin_) <= capacity for bin_ in bins)
    seen = sorted((piece.sequence, token) for bin_ in bins for piece in bin_ for token in range(piece.start, piece.stop))
    kept = [
        (index, token) for index, length in enumerate(lengths)
        if not (strategy == "sequential" and length > capacity)
        for token in range(length if strategy in ("bfd_split", "wrapped") else min(length, capacity))
    ]
    assert seen == kept
    assert len(bins) >= math.ceil(len(kept) / capacity)


@pytest.mark.parametrize(("lengths", "capacity", "strategy", "message"), [
    ([3, 0], 4, "bfd", "sequence 1 has 0 tokens"), ([3], 0, "bfd", "capacity is 0"), ([3], 4, "best", "packing strategy"),
])
def test_refusals(lengths: list[int], capacity: int, strategy: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        pack(lengths, capacity, strategy)


# -- layouts -------------------------------------------------------------------------------------------------------


def rows_of(*pairs: tuple[list[int], int]) -> Rows:
    """Rows from (ids, number of prompt tokens)."""
    return Rows({
        "input_ids": [ids for ids, _ in pairs],
        "labels": [[-100] * prompt + ids[prompt:] for ids, prompt in pairs],
    })


GROUP = rows_of(([5, 6, 7, 11, 12], 3), ([5, 6, 7, 21], 3), ([8, 9, 31, 32], 2))


def test_shared_prefix_by_hand() -> None:
    layout = layout_shared_prefix(GROUP, 12)
    assert layout.input_ids.tolist() == [[5, 6, 7, 11, 12, 21, 8, 9, 31, 32]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2, 3]]
    # The first action of either completion is predicted by the last prompt token.
    assert layout.source.tolist() == [2, 3, 2, 7, 8]
    assert layout.target.tolist() == [11, 12, 21, 31, 32]
    assert layout.row.tolist() == [0, 0, 1, 2, 2]
    assert layout.column.tolist() == [0, 1, 0, 0, 1]
    assert layout.last.tolist() == [4, 5, 9]
    mask = layout.attention_mask
    assert mask is not None
    visible = {query: mask[0, 0, query].nonzero().flatten().tolist() for query in (4, 5, 9)}
    assert visible == {4: [0, 1, 2, 3, 4], 5: [0, 1, 2, 5], 9: [6, 7, 8, 9]}


def test_padded_needs_no_mask_and_goes_on_counting() -> None:
    layout = layout_padded(GROUP)
    assert layout.attention_mask is None
    assert layout.position_ids.tolist() == [list(range(5))] * 3
    assert layout.source.tolist() == [2, 3, 7, 11, 12]
    assert layout.mask().tolist() == [[True, True], [True, False], [True, True]]


def test_width_and_rows_without_actions() -> None:
    layout = layout_padded(rows_of(([1, 2], 2), ([3, 4, 5], 2)), width=4)
    assert layout.mask().tolist() == [[False] * 4, [True, False, False, False]]
    empty = layout_packed(rows_of(([1, 2], 2)))
    assert empty.mask().tolist() == [[False]]
    assert empty.source.shape == (0,)


def test_position_zero_is_never_an_action() -> None:
    rows = Rows({"input_ids": [[4, 5]], "labels": [[4, 5]]})
    assert layout_padded(rows).target.tolist() == [5]


def test_mismatched_rows_are_refused() -> None:
    with pytest.raises(DataError, match="row 1"):
        layout_padded(Rows({"input_ids": [[1], [1, 2]], "labels": [[1], [1]]}))


row_lists = st.lists(
    st.tuples(st.integers(0, 2), st.integers(1, 9), st.integers(0, 8)), min_size=1, max_size=9,
).map(lambda rows: rows_of(*[
    # Prompt number decides its tokens and length, so equal numbers share a prompt.
    ([100 * number + index for index in range(3 + number)] + [1000 * at + index for index in range(size)], 3 + number)
    for at, (number, _, size) in enumerate(rows)
]))


@settings(deadline=None, max_examples=50)
@given(row_lists, st.sampled_from(["padded", "packed", "shared"]), st.integers(1, 40))
def test_each_action_sees_its_own_row_and_nothing_else(rows: Rows, kind: str, capacity: int) -> None:
    layout = {
        "padded": lambda: layout_padded(rows), "packed": lambda: layout_packed(rows, capacity),
        "shared": lambda: layout_shared_prefix(rows, capacity, branches=1 + capacity % 4),
    }[kind]()
    length = layout.input_ids.shape[1]
    mask = layout.attention_mask
    flat_ids, flat_positions = layout.input_ids.flatten(), layout.position_ids.flatten()
    expected = [(r, a) for r, ids in enumerate(rows["input_ids"]) for a in range(sum(x != -100 for x in rows["labels"][r][1:]))]
    assert list(zip(layout.row.tolist(), layout.column.tolist(), strict=True)) == expected
    for source, target, row, column in zip(*(t.tolist() for t in (layout.source, layout.target, layout.row, layout.column)),
                                           strict=True):
        ids, labels = rows["input_ids"][row], rows["labels"][row]
        actions = [t for t in range(1, len(ids)) if labels[t] != -100]
        at = actions[column]
        assert target == ids[at]
        tensor_row, query = divmod(source, length)
        seen = list(range(query + 1)) if mask is None else mask[tensor_row, 0, query].nonzero().flatten().tolist()
        flat = [tensor_row * length + key for key in seen]
        assert flat_ids[flat].tolist() == ids[:at]
        assert flat_positions[flat].tolist() == list(range(at))
    for row, ids in enumerate(rows["input_ids"]):
        assert int(flat_ids[layout.last[row]]) == ids[-1]
        assert int(flat_positions[layout.last[row]]) == len(ids) - 1


@settings(deadline=None, max_examples=30)
@given(row_lists)
def test_auto_is_never_dearer_than_padding(rows: Rows) -> None:
    pairs = 1e9  # attention for free: only tokens count
    assert choose_layout(rows, pairs_per_token=pairs).tokens <= layout_padded(rows).tokens


def test_chooser() -> None:
    prompt = list(range(1, 60))
    group = rows_of(*[([*prompt, 100 + at, 101 + at], len(prompt)) for at in range(8)])
    shared = choose_layout(group)
    assert (shared.kind, shared.tokens) == ("shared_prefix", 59 + 8 * 2)
    assert choose_layout(group, masks=False).kind == "padded"
    ragged = rows_of(([*range(1, 100)], 2), *[([200 + at, 1, 2, 3], 1) for at in range(20)])
    assert choose_layout(ragged).kind == "packed"
    # When attention is what costs, long completions of a short prompt do not share one long row.
    long = rows_of(*[([1, 2, *range(100 * at, 100 * at + 50)], 2) for at in range(1, 9)])
    assert choose_layout(long, "shared_prefix", pairs_per_token=1e9).input_ids.shape[0] == 1
    assert choose_layout(long, "shared_prefix", pairs_per_token=1.0).input_ids.shape[0] > 1


def test_scatter_is_differentiable_and_zero_elsewhere() -> None:
    layout = layout_padded(GROUP)
    values = torch.arange(1.0, 6.0, requires_grad=True)
    scattered = layout.scatter(values)
    assert scattered.tolist() == [[1, 2], [3, 0], [4, 5]]
    (scattered * torch.tensor([[1.0, 10], [100, 7], [2, 3]])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1, 10, 100, 2, 3]
