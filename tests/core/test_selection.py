"""Selection by score, majority votes, and seeds."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.core.seeding import derive_seed, generator
from mmalign.core.selection import best_of_group, best_worst_pair, kept_count, majority_vote, top_k_indices


@pytest.mark.parametrize(
    ("n", "fraction", "kept"),
    [(30, 0.1, 3), (10, 0.29, 2), (10, 0.0, 0), (10, 0.01, 1), (0, 0.5, 0), (7, 1.0, 7), (100, 0.29, 29)],
)
def test_kept_count(n, fraction, kept):
    assert kept_count(n, fraction) == kept


@settings(max_examples=40, deadline=None)
@given(scores=st.lists(st.integers(0, 3), min_size=1, max_size=12), data=st.data())
def test_top_k_is_exact_and_breaks_ties_by_index(scores, data):
    k = data.draw(st.integers(0, len(scores)))
    expected = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]
    assert top_k_indices(torch.tensor(scores, dtype=torch.float32), k).tolist() == expected


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=12))
def test_best_and_pairs_of_groups(rows):
    group, scores = torch.tensor([g for g, _ in rows]), torch.tensor([float(s) for _, s in rows])
    members = {g: [i for i, (other, _) in enumerate(rows) if other == g] for g, _ in rows}
    best = {g: max(m, key=lambda i: (rows[i][1], -i)) for g, m in members.items()}
    worst = {g: min(m, key=lambda i: (rows[i][1], i)) for g, m in members.items()}
    assert best_of_group(scores, group).tolist() == list(best.values())
    pairs = [[best[g], worst[g]] for g in members if rows[best[g]][1] > rows[worst[g]][1]]
    assert best_worst_pair(scores, group).tolist() == pairs


def test_majority_vote():
    assert majority_vote(["a", "b", "a", None, None, None]) == ("a", [0, 2])
    assert majority_vote(["a", "b", "a"], min_agree=3) == (None, [])
    assert majority_vote(["a", "b"]) == (None, [])
    assert majority_vote([None, None]) == (None, [])


def test_refusals():
    for n, fraction in ((-1, 0.5), (3, 1.5)):
        with pytest.raises(ValueError, match="fraction"):
            kept_count(n, fraction)
    with pytest.raises(ValueError, match="k is 4"):
        top_k_indices(torch.zeros(3), 4)
    with pytest.raises(ValueError, match="NaN"):
        top_k_indices(torch.tensor([float("nan"), 1.0]), 1)
    with pytest.raises(ValueError, match="min_agree"):
        majority_vote(["a"], min_agree=0)


def test_seeds_are_stable_across_processes_and_distinct():
    code = "from mmalign.core.seeding import derive_seed; print(derive_seed(7, 'sft', 'data', 3))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "5"})
    assert int(other.stdout) == derive_seed(7, "sft", "data", 3)
    names = [(), ("a",), ("a", "b"), ("ab",), ("a", ""), ("", "a")]
    assert len({derive_seed(seed, *n) for seed in (0, 1) for n in names}) == 2 * len(names)


def test_generators_do_not_share_a_stream():
    one, again, other = (torch.rand(4, generator=generator(0, name)) for name in ("data", "data", "noise"))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
