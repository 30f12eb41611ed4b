"""The built-in models and data sets, by name: ``asset:NAME`` wherever a configuration takes a model or a data path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmalign.core.registry import Registry
from mmalign.errors import AssetError

PREFIX = "asset:"

Kind = Literal["model", "data"]


@dataclass(frozen=True)
class Asset:
    """One built-in model or data set."""

    name: str
    kind: Kind
    description: str
    size: str
    """What a first use downloads, or "built" / "packaged"."""
    provide: Callable[..., Any]
    """Model: ``() -> Path``. Data: ``(n, *, split, seed, **arguments) -> rows``."""


_ASSETS: Registry[Asset] = Registry("asset")


def asset(name: str, *, kind: Kind, description: str, size: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator that registers a built-in asset: a function giving a model's folder, or a data set's rows.

    A model function takes nothing and returns a Path; a data function takes ``n`` (None = all) and the keywords
    ``split``, ``seed`` and its own.
    """

    def store(function: Callable[..., Any]) -> Callable[..., Any]:
        _ASSETS.register(name)(Asset(name, kind, description, size, function))
        return function

    return store


def is_asset(path: str) -> bool:
    """Whether ``path`` is written as ``asset:NAME``."""
    return path.startswith(PREFIX)


def list_assets() -> list[Asset]:
    """Every built-in asset, models first, by name."""
    return sorted((_ASSETS.get(name) for name in _ASSETS), key=lambda entry: (entry.kind != "model", entry.name))


def _find(name: str, kind: Kind) -> Asset:
    try:
        entry = _ASSETS.get(name.removeprefix(PREFIX))
    except ValueError as error:
        raise AssetError(str(error)) from None
    if entry.kind != kind:
        other = "data set: use it as data.path" if entry.kind == "data" else "model: use it as a model path"
        raise AssetError(f"the asset {entry.name!r} is a {other}")
    return entry


def asset_path(name: str) -> Path:
    """The folder of a built-in model, in Hugging Face format; fetched or built on first use (``$MMALIGN_CACHE``).

    ``name`` with or without ``asset:``. Raises AssetError for unknown names and when fetching fails.
    """
    path = _find(name, "model").provide()
    assert isinstance(path, Path)
    return path


def fetch_asset(name: str) -> str:
    """Fetch or build an asset now; what it is afterwards, in a few words (a model's folder, a data set's first rows)."""
    try:
        entry = _ASSETS.get(name.removeprefix(PREFIX))
    except ValueError as error:
        raise AssetError(str(error)) from None
    if entry.kind == "model":
        return str(asset_path(entry.name))
    row = asset_rows(entry.name, n=1)[0]
    return f"rows with the columns {', '.join(row)}"


def asset_rows(
    name: str, *, split: str = "train", n: int | None = None, seed: int = 0, **arguments: Any,
) -> list[dict[str, Any]]:
    """Rows of a built-in data set: ``n`` of them (None = all, or the asset's own default), the same for one seed.

    ``arguments`` are the asset's own (``levels`` of arithmetic, ``vendor`` of emoji, ...). Raises AssetError for
    unknown names and arguments.
    """
    import inspect

    provide = _find(name, "data").provide
    allowed = [key for key in inspect.signature(provide).parameters if key not in ("n", "split", "seed")]
    for key in arguments:
        if key not in allowed:
            raise AssetError(f"the asset {name!r} has no argument {key!r}; it has {', '.join(allowed) or 'none'}")
    rows: list[dict[str, Any]] = provide(n, split=split, seed=seed, **arguments)
    return rows


@asset("smollm2", kind="model", description="SmolLM2-135M-Instruct in float32: a real small chat model (Apache-2.0)",
       size="93 MB download, 540 MB on disk")
def _smollm2() -> Path:
    from mmalign.data.fetch import cached_folder
    from mmalign.data.smollm2 import build_smollm2

    return cached_folder("smollm2-135m-instruct-v1", build_smollm2)


@asset("tiny_llama", kind="model", size="built, 0.5 MB",
       description="a random two-layer Llama with a ChatML byte tokenizer: for tests and trials")
def _tiny_llama() -> Path:
    from mmalign.data.fetch import cached_folder
    from mmalign.data.tiny_llama import build_tiny_llama

    return cached_folder("tiny-llama-v1", build_tiny_llama)


@asset("shapes_base", kind="model", description="a tiny text-to-image diffusion pipeline trained on the shapes data",
       size="packaged")
def _shapes_base() -> Path:
    from mmalign.data.shapes import shapes_base_path

    return Path(shapes_base_path())


@asset("shapes", kind="data", description="captioned pictures of coloured shapes, 168 captions, truth known exactly",
       size="built")
def _shapes(n: int | None, *, split: str, seed: int, size: int = 32, pairs: bool = False) -> list[dict[str, Any]]:
    from mmalign.data.shapes import make_shapes

    rows = make_shapes(512 if n is None else n, size, seed, split=split)
    if pairs:  # the right picture against that of another caption, half a pass further on
        others = rows[len(rows) // 2 :] + rows[: len(rows) // 2]
        return [
            {**{key: value for key, value in row.items() if key != "image"}, "chosen": row["image"], "rejected": other["image"]}
            for row, other in zip(rows, others, strict=True) if row["prompt"] != other["prompt"]
        ]
    return [{**{key: value for key, value in row.items() if key != "image"}, "images": [row["image"]]} for row in rows]


@asset("arithmetic", kind="data", description="graded arithmetic with exact answers, five levels, messages or text",
       size="built")
def _arithmetic(
    n: int | None, *, split: str, seed: int, levels: list[int] | None = None,
    form: Literal["messages", "text"] = "messages", worked: bool = False, pairs: bool = False,
    triples: bool = False,
) -> list[dict[str, Any]]:
    from mmalign.data.arithmetic import LEVELS, make_arithmetic

    return make_arithmetic(512 if n is None else n, split=split, seed=seed, levels=LEVELS if levels is None else levels,
                           form=form, worked=worked, pairs=pairs, triples=triples)


@asset("word_programs", kind="data", description="word problems with a reference program, and equivalent programs",
       size="built")
def _word_programs(
    n: int | None, *, split: str, seed: int, form: Literal["text", "messages"] = "text", largest: int = 20, stories: int = 4,
    short: bool = False, varied: bool = False,
) -> list[dict[str, Any]]:
    from mmalign.data.word_programs import make_word_programs

    return make_word_programs(512 if n is None else n, split=split, seed=seed, form=form, largest=largest, stories=stories,
                              short=short, varied=varied)


@asset("languages", kind="data", description="one story in four languages of very different sizes, parallel sentences",
       size="built")
def _languages(
    n: int | None, *, split: str, seed: int, sizes: dict[str, int] | None = None,
    form: Literal["text", "messages"] = "text", pairs: bool = False,
) -> list[dict[str, Any]]:
    from mmalign.data.languages import make_languages

    return make_languages(n, split=split, seed=seed, sizes=sizes, form=form, pairs=pairs)


@asset("frozen_lake", kind="data", description="maps of ice and holes as text, with a shortest path, pairs or pictures",
       size="built")
def _frozen_lake(
    n: int | None, *, split: str, seed: int, size: int = 4, holes: int = 3, pairs: bool = False, images: bool = False,
) -> list[dict[str, Any]]:
    from mmalign.data.frozen_lake import make_frozen_lake

    return make_frozen_lake(512 if n is None else n, split=split, seed=seed, size=size, holes=holes, pairs=pairs, images=images)


@asset("general_points", kind="data", description="the card game 24: four cards, a formula that makes 24, exact solutions",
       size="built")
def _general_points(
    n: int | None, *, split: str, seed: int, faces: Literal["ten", "rank"] = "ten", goal: int = 24, cards: int = 4,
    highest: str = "K", form: Literal["messages", "text"] = "messages",
) -> list[dict[str, Any]]:
    from mmalign.data.general_points import make_general_points

    return make_general_points(n, split=split, seed=seed, faces=faces, goal=goal, cards=cards, highest=highest, form=form)


@asset("code_tree", kind="data", description="parents, paths, descriptions in a hierarchy of codes (objects, synthetic, ICD-10)",
       size="built; ICD-10 in the packages of the extra hierarchy")
def _code_tree(
    n: int | None, *, split: str, seed: int, tree: str = "objects", kind: str | list[str] = "edges",
    root: str | None = None, branching: int | None = None, depth: int | None = None,
) -> list[dict[str, Any]]:
    from mmalign.data.code_trees import make_tree_rows

    own = {key: value for key, value in (("branching", branching), ("depth", depth)) if value is not None}
    return make_tree_rows(n, seed=seed, tree=tree, kind=kind, root=root, **own)


@asset("short_tasks", kind="data", description="five short tasks with a reward type each (tags, spans, lists, German, code), "
       "and a general set", size="built")
def _short_tasks(
    n: int | None, *, split: str, seed: int, source: str = "domain", shares: dict[str, float] | None = None,
    form: str = "text",
) -> list[dict[str, Any]]:
    from mmalign.data.short_tasks import make_short_tasks

    return make_short_tasks(n, split=split, seed=seed, source=source, shares=shares, form=form)


@asset("digits", kind="data", description="1797 hand-written digits with their class (needs scikit-learn)",
       size="inside scikit-learn")
def _digits(n: int | None, *, split: str, seed: int, size: int = 32) -> list[dict[str, Any]]:
    from mmalign.data.digits import load_digits

    return load_digits(n, split=split, seed=seed, size=size)


@asset("emoji", kind="data", description="about 1900 emoji pictures with names and categories (needs npm)",
       size="75 MB download")
def _emoji(n: int | None, *, split: str, seed: int, vendor: str = "google", size: int = 64,
           categories: list[str] | None = None) -> list[dict[str, Any]]:
    from mmalign.data.emoji import load_emoji

    return load_emoji(n, split=split, seed=seed, vendor=vendor, size=size, categories=categories)


@asset("fol", kind="data", description="sentences and their first-order logic, with a careless translator's formulas",
       size="built")
def _fol(
    n: int | None, *, split: str, seed: int, errors: float = 0.7, task: str | None = None,
    perturbation: dict[str, Any] | None = None, per_row: int | None = None, ascii: bool | None = None,
    instruction: str | None = None,
) -> list[dict[str, Any]]:
    from mmalign.data.fol_corpus import make_fol_corpus

    given = {"perturbation": perturbation, "per_row": per_row, "ascii": ascii, "instruction": instruction}
    options = {key: value for key, value in given.items() if value is not None}
    return make_fol_corpus(512 if n is None else n, split=split, seed=seed, errors=errors, task=task, **options)
