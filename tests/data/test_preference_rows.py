"""Rankings into pairs, pairs into labelled samples, completions under other prompts."""

from __future__ import annotations

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from mmalign.data.loading import DataOptions, load_rows, part_range
from mmalign.data.preference import pairs_of_rankings, rename_absent, rotate_completions, unpair
from mmalign.data.rows import Rows
from mmalign.errors import DataError

RANKING = [{"id": "a", "prompt": "p", "responses": ["x", "y", "z"], "scores": [0.1, 0.9, 0.5]},
           {"id": "b", "prompt": "q", "responses": ["u", "v"], "scores": [1.0, 1.0]}]


@pytest.mark.parametrize("kind", [list, Dataset.from_list])
@pytest.mark.parametrize(("mode", "pairs"), [
    ("best_worst", [("y", "x")]), ("adjacent", [("y", "z"), ("z", "x")]), ("best_rest", [("y", "z"), ("y", "x")]),
    ("all", [("y", "z"), ("y", "x"), ("z", "x")]),
])
def test_pairs_of_rankings(kind, mode, pairs):
    made = pairs_of_rankings(kind(RANKING), mode)
    assert [(row["chosen"], row["rejected"]) for row in made] == pairs  # the tie of row b makes none
    assert len({row["id"] for row in made}) == len(pairs)
    assert all(row["chosen_score"] > row["rejected_score"] for row in made)


def test_rankings_of_unequal_lists_are_refused():
    for row in ({**RANKING[0], "scores": [1.0]}, {**RANKING[0], "responses": ["x"], "scores": [1.0]}):
        with pytest.raises(DataError, match="responses"):
            pairs_of_rankings([row])
    with pytest.raises(DataError, match="scores"):
        pairs_of_rankings([{"prompt": "p", "responses": ["a", "b"]}])


@pytest.mark.parametrize("kind", [list, Dataset.from_list])
def test_pairs_come_apart_into_labelled_samples(kind):
    rows = unpair(kind([{"id": "1", "prompt": "p", "chosen": "good", "rejected": "bad"}]))
    assert [(r["prompt"], r["completion"], r["label"], r["id"]) for r in rows] == [
        ("p", "good", True, "1+"), ("p", "bad", False, "1-")]
    labelled = kind([{"prompt": "p", "completion": "c", "label": True}])
    assert unpair(labelled) is labelled
    with pytest.raises(DataError, match="label"):
        unpair(kind([{"prompt": "p", "completion": "c"}]))


def test_prompts_in_common_are_split_off_before_pairs_come_apart():
    rows = unpair([{"chosen": "Say hello please", "rejected": "Say hello never"}])
    assert [row["prompt"] + row["completion"] for row in rows] == ["Say hello please", "Say hello never"]


def test_columns_are_renamed_only_where_ours_is_absent():
    assert rename_absent([{"reference": "g"}], {"reference": "gold"}) == [{"gold": "g"}]
    assert rename_absent([{"reference": "g", "gold": "h"}], {"reference": "gold"}) == [{"reference": "g", "gold": "h"}]
    assert rename_absent(Dataset.from_list([{"reference": "g"}]), {"reference": "gold"}).column_names == ["gold"]


rows_of_tokens = st.lists(st.tuples(st.lists(st.integers(1, 50), min_size=1, max_size=5),
                                    st.lists(st.integers(1, 50), min_size=1, max_size=5)), min_size=2, max_size=6)


@given(rows_of_tokens)
def test_rotation_pairs_every_prompt_with_the_completion_before_it(parts):
    rows = Rows({"input_ids": [p + c for p, c in parts], "labels": [[-100] * len(p) + c for p, c in parts]})
    rotated = rotate_completions(rows)
    for i, (prompt, _) in enumerate(parts):
        other = parts[i - 1][1]
        assert rotated["input_ids"][i] == prompt + other
        assert rotated["labels"][i] == [-100] * len(prompt) + other
    short = rotate_completions(rows, max_length=4)
    for ids, labels in zip(short["input_ids"], short["labels"], strict=True):
        assert len(ids) == len(labels)
        assert labels[-1] != -100


@given(st.integers(0, 200), st.integers(1, 9))
def test_parts_cover_all_rows_once(rows, parts):
    ranges = [part_range(f"{k}/{parts}", rows) for k in range(1, parts + 1)]
    assert [i for part in ranges for i in part] == list(range(rows))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


def test_parts_of_data_sets(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "p{i}", "completion": "c"}}\n' for i in range(5)))
    whole = [row["prompt"] for row in load_rows(DataOptions(path=str(path)))]
    found = [row["prompt"] for k in (1, 2) for row in load_rows(DataOptions(path=str(path), part=f"{k}/2"))]
    assert found == whole
    assert len(load_rows(DataOptions(path="asset:arithmetic", limit=9, part="3/3"))) == 3
    for wrong in ("0/2", "3/2", "half"):
        with pytest.raises(ValueError, match="part"):
            DataOptions(path=str(path), part=wrong)
    with pytest.raises(DataError, match=r"data\.part"):
        load_rows(DataOptions(path=str(path), limit=1, part="1/2"))
