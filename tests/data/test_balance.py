"""Balanced sampling: the published weights, caps that hold, draws that match, and rows joined into chunks."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.data.balance import BalanceOptions, GroupSampler, balanced_groups, cap_epochs, group_rows
from mmalign.data.concatenation import ConcatenatedRows
from mmalign.data.languages import make_languages
from mmalign.data.mixture import mixture_weights
from mmalign.errors import ConfigError, DataError

SIZES = {"a": 1000, "b": 100, "c": 10, "d": 10}
NAMES = [name for name, size in SIZES.items() for _ in range(size)]


@pytest.mark.parametrize(("exponent", "expected"), [
    (1, [0.892857, 0.089286, 0.008929, 0.008929]), (0.5, [0.659532, 0.208562, 0.065953, 0.065953]),
    (0.3, [0.499110, 0.250148, 0.125371, 0.125371]), (0, [0.25] * 4),
])
def test_published_exponents(exponent, expected):
    assert mixture_weights(list(SIZES.values()), exponent=exponent) == pytest.approx(expected, abs=1e-6)
    table, _ = balanced_groups(NAMES, [7] * len(NAMES), BalanceOptions(exponent=exponent), draws=100)
    assert [group.share for group in table] == pytest.approx(expected, abs=1e-6)
    assert [group.weight for group in table] == pytest.approx(expected, abs=1e-6)  # equally long documents


def test_shares_of_tokens_are_not_shares_of_documents():
    lengths = [10] * 1000 + [100] * 100 + [10] * 10 + [1000] * 10
    by_tokens, _ = balanced_groups(NAMES, lengths, BalanceOptions(exponent=0), draws=100)
    assert [group.share for group in by_tokens] == pytest.approx([0.25] * 4)
    assert [g.weight for g in by_tokens] == pytest.approx([v / (0.1 + 0.01 + 0.1 + 0.001) for v in (0.1, 0.01, 0.1, 0.001)])
    by_rows, _ = balanced_groups(NAMES, lengths, BalanceOptions(exponent=0, count="rows"), draws=100)
    assert [group.weight for group in by_rows] == pytest.approx([0.25] * 4)


def test_draws_match_the_weights_and_resume_without_repeats():
    options = BalanceOptions(exponent=0.3)
    table, groups = balanced_groups(NAMES, [5] * len(NAMES), options, draws=1)
    weights = [group.weight for group in table]
    sampler = GroupSampler(groups, weights, seed=3)
    drawn = sampler.take(20000)
    counts = Counter(NAMES[row] for row in drawn)
    for name, weight in zip(SIZES, weights, strict=True):
        assert abs(counts[name] / 20000 - weight) < 4 * math.sqrt(weight * (1 - weight) / 20000)
    again = GroupSampler(groups, weights, seed=3)
    first = again.take(777)
    saved = json.loads(json.dumps(again.state_dict()))
    resumed = GroupSampler(groups, weights, seed=3)
    resumed.load_state_dict(saved)
    assert first + resumed.take(20000 - 777) == drawn
    assert GroupSampler(groups, weights, seed=4).take(100) != drawn[:100]
    rare = [row for row in drawn if NAMES[row] == "c"]
    assert all(sorted(rare[i : i + 10]) == sorted(groups["c"]) for i in range(0, len(rare) - 9, 10))


@settings(deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=2, max_size=6), st.floats(0.5, 20), st.integers(1, 5000), st.floats(0, 1))
def test_caps_hold_and_the_rest_keeps_its_proportions(sizes, cap, draws, exponent):
    weights = mixture_weights(sizes, exponent=exponent)
    if cap * sum(sizes) < draws * (1 - 1e-9):
        with pytest.raises(ConfigError, match="max_epochs"):
            cap_epochs(weights, sizes, draws, cap)
        return
    capped = cap_epochs(weights, sizes, draws, cap)
    assert sum(capped) == pytest.approx(1, abs=1e-6)
    assert all(w * draws <= cap * n * (1 + 1e-6) for w, n in zip(capped, sizes, strict=True))
    free = [i for i, n in enumerate(sizes) if capped[i] * draws < cap * n * (1 - 1e-6)]
    ratios = [capped[i] / weights[i] for i in free]
    assert not ratios or max(ratios) == pytest.approx(min(ratios), rel=1e-6)


def test_refusals():
    for arguments, message in [
        ({}, "exactly one of temperature, exponent and ratios"), ({"exponent": -0.1}, "exponent must be 0"),
        ({"ratios": {"a": 0.0}}, "positive sum"), ({"ratios": {"a": -1.0, "b": 2.0}}, "non-negative"),
        ({"exponent": 1, "max_epochs": 0}, "max_epochs must be positive"), ({"temperature": 0}, "temperature must be positive"),
    ]:
        with pytest.raises(ValueError, match=message):
            BalanceOptions(**arguments)
    with pytest.raises(ConfigError, match=r"mixture.ratios.xx: no row has language 'xx'"):
        balanced_groups(NAMES, [1] * len(NAMES), BalanceOptions(ratios={"xx": 1.0, "a": 1.0}), draws=1)
    with pytest.raises(ConfigError, match="give at most"):
        balanced_groups(NAMES, [1] * len(NAMES), BalanceOptions(exponent=1, max_epochs=1), draws=2000)
    for empty in (None, ""):
        with pytest.raises(DataError, match="row 1 has no 'language'"):
            group_rows(["a", empty], by="language")


def test_languages_that_are_not_named_are_left_out():
    table, groups = balanced_groups(NAMES, [1] * len(NAMES), BalanceOptions(ratios={"b": 3.0, "a": 1.0}), draws=10)
    assert [(group.name, group.share) for group in table] == [("b", 0.75), ("a", 0.25)]
    assert set(groups) == {"a", "b"}


def test_chunks_hold_every_token_once_and_one_group_each():
    rows = [{"id": str(i), "input_ids": list(range(100 * i, 100 * i + 5 + i % 4)), "language": "ab"[i % 2]} for i in range(9)]
    for row in rows:
        row["labels"] = [-100, *row["input_ids"][1:]]
    chunks = ConcatenatedRows(rows, 8, seed=1)
    assert sorted(t for c in chunks for t in c["input_ids"]) == sorted(t for r in rows for t in r["input_ids"])
    assert all(len(chunk["input_ids"]) == 8 for chunk in chunks[:-1])
    assert all(chunk["labels"][0] == -100 for chunk in chunks)
    for chunk in chunks:  # a document's first token is never a target
        assert all(label == token or label == -100 for token, label in zip(chunk["input_ids"], chunk["labels"], strict=True))
        assert all(label % 100 for label in chunk["labels"] if label != -100)
    assert [c["input_ids"] for c in ConcatenatedRows(rows, 8, seed=1)] == [c["input_ids"] for c in chunks]
    assert [c["input_ids"] for c in ConcatenatedRows(rows, 8, seed=2)] != [c["input_ids"] for c in chunks]
    grouped = ConcatenatedRows(rows, 8, seed=1, by="language")
    for chunk, name, length in zip(grouped, grouped.groups(), grouped.lengths(), strict=True):
        assert chunk["language"] == name
        assert length == len(chunk["input_ids"])
        assert {"ab"[(token // 100) % 2] for token in chunk["input_ids"]} == {name}


def test_languages_asset_is_parallel_unbalanced_and_disjoint():
    train, test = make_languages(), make_languages(split="test")
    assert Counter(row["language"] for row in train) == {"english": 1000, "german": 100, "french": 10, "spanish": 10}
    assert not {row["sentence"] for row in train} & {row["sentence"] for row in test}
    sentences = [[row["sentence"] for row in test if row["language"] == name] for name in ("english", "german", "french")]
    assert sentences[0] == sentences[1] == sentences[2]
    assert len({row["text"] for row in train}) == len(train)
    assert make_languages(4, form="messages")[0]["messages"][1]["content"] == make_languages(4)[0]["answer"]
    pair = make_languages(4, pairs=True)[0]
    assert pair["chosen"] != pair["rejected"]
    for arguments, message in [({"split": "dev"}, "train and test"), ({"sizes": {"dutch": 1}}, "not dutch"),
                               ({"sizes": {"german": 10**6}}, "sizes: 1 to"), ({"n": 10**6}, "data.limit"),
                               ({"form": "poem"}, "messages or text|text or messages")]:
        with pytest.raises(DataError, match=message):
            make_languages(**arguments)
