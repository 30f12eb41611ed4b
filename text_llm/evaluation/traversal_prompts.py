"""Prompts that ask about a code of a hierarchy, and what an answer says. The wording is ours."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Literal

from mmalign.core.seeding import derive_seed
from mmalign.data.code_trees import CodeTree, TreeItem
from mmalign.errors import ConfigError
from mmalign.rewards.text import read_path

Ask = Literal["meaning", "code", "top"]
Order = Literal["down", "up"]

_CHOICE = "What does the {tree} code {code} mean?\n{options}\n"
_TOP = "Which {top_level} of {tree} does the code {code} belong to?\n"
_BREAKDOWN = "as one line 'Path: code > code > code'"
TEMPLATES: dict[Ask, dict[str, str]] = {
    "meaning": {
        "qa": _CHOICE + "Reply with the letter of the right option only, as 'Answer: X'.",
        "cot": _CHOICE + "Think step by step. Then finish with the letter of the right option, as 'Answer: X'.",
        "structured": _CHOICE + "First write the breakdown of the code {code} from the top level downwards ({levels}) "
        + _BREAKDOWN + ". Then go through the options one at a time and rule out those that do not belong to the last code of "
        "the path. Then finish with the letter of the right option, as 'Answer: X'.",
        "shuffled": _CHOICE + "First write the breakdown of the code {decoy} in the order {shuffled_levels} "
        + _BREAKDOWN + ". Then go through the options one at a time and rule out those that do not belong to the last code of "
        "the path. Then finish with the letter of the right option, as 'Answer: X'.",
    },
    "code": {
        "qa": "Which {tree} code means: {description}?\nReply with the code only, as 'Path: code'.",
        "cot": "Which {tree} code means: {description}?\nThink step by step. Then finish with the code, as 'Path: code'.",
        "structured": "Which {tree} code means: {description}?\nGo from the top level downwards ({levels}) and write every code "
        "on the way " + _BREAKDOWN + ", which ends with the code asked for.",
        "shuffled": "Which {tree} code means: {description}?\nGo through {shuffled_levels} in this order and write every code "
        "on the way " + _BREAKDOWN + ", which ends with the code asked for.",
    },
    "top": {
        "qa": _TOP + "Reply with the code of the {top_level} only, as 'Path: code'.",
        "cot": _TOP + "Think step by step. Then finish with the code of the {top_level}, as 'Path: code'.",
        "structured": _TOP + "Write every code on the way to {code} from the top level downwards ({levels}) " + _BREAKDOWN + ".",
        "shuffled": _TOP + "Write every code on the way to {decoy} in the order {shuffled_levels} " + _BREAKDOWN + ".",
    },
}
"""Templates by what is asked and by prompt: plain question, chain of thought, structured, and the structured control, which
asks for as long a breakdown of the wrong thing."""

FIELDS = ("code", "description", "options", "levels", "shuffled_levels", "decoy", "tree", "top_level")


@dataclass(frozen=True)
class Reading:
    """What a completion says."""

    correct: bool
    path: list[str]
    """From the top down; empty when none is written."""


def check_template(name: str, template: str) -> None:
    """Raise ConfigError for a template with unknown fields."""
    try:
        fields = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise ConfigError(f"templates.{name}: {error}; a literal brace is written twice") from None
    for field in fields:
        if field not in FIELDS:
            raise ConfigError(f"templates.{name}: unknown field {{{field}}}; fields are {', '.join(FIELDS)}")


def letters(count: int) -> str:
    """The letters of ``count`` options."""
    return "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:count]


def question(item: TreeItem, tree: CodeTree, template: str, *, seed: int = 0) -> str:
    """The text of a question; the decoy (a code under another top, as deep if possible) depends on code and seed alone."""
    rng = random.Random(derive_seed(seed, "traversal", item.code))
    names = [tree.level(depth) for depth in range(len(item.path))]
    shuffled = rng.sample(names, len(names))
    if shuffled == names:
        shuffled = names[::-1]
    return template.format(
        code=item.code, description=tree.descriptions[item.code], tree=tree.name.replace("_", "-"), top_level=tree.level(0),
        options="\n".join(f"{letter}. {tree.descriptions[code]}"
                          for letter, code in zip(letters(len(item.options)), item.options, strict=True)),
        levels=", ".join(names), shuffled_levels=", ".join(shuffled),
        decoy=_decoy(item, tree, rng) if "{decoy}" in template else "",
    )


def _decoy(item: TreeItem, tree: CodeTree, rng: random.Random) -> str:
    others = [code for code in rng.sample(tree.leaves, min(64, len(tree.leaves))) if tree.path(code)[0] != item.path[0]]
    alike = [code for code in others if len(tree.path(code)) == len(item.path)]
    return (alike or others or [code for code in tree.leaves if code != item.code])[0]


_LETTER = re.compile(r"answer\s*(?:is)?\s*[:=]?\s*\(?\**([A-Z])\b", re.IGNORECASE)
_ALONE = re.compile(r"^\W*([A-Z])\W*$")


def read_answer(text: str, item: TreeItem, *, ask: Ask, order: Order = "down") -> Reading:
    """Whether a completion is right, and the path it writes.

    ``meaning``: the letter after the last "Answer:", or a letter that is all there is. ``code`` and ``top``: the last and
    the first code of the path; a text of one word is a path of one code.
    """
    path = read_path(text)
    if not path and len(text.split()) == 1:
        path = read_path(f"Path: {text}")
    if order == "up":
        path = path[::-1]
    if ask == "code":
        return Reading(bool(path) and path[-1] == item.code, path)
    if ask == "top":
        return Reading(bool(path) and path[0] == item.path[0], path)
    found = _LETTER.findall(text) or _ALONE.findall(text.strip())
    letter = found[-1].upper() if found else ""
    return Reading(letter == letters(len(item.options))[item.answer], path)


def templates_for(ask: Ask, prompts: Sequence[str], own: Mapping[str, str]) -> dict[str, str]:
    """The template of every prompt; raises ConfigError for names without one."""
    for name, template in own.items():
        check_template(name, template)
    known = {**TEMPLATES[ask], **own}
    for name in prompts:
        if name not in known:
            raise ConfigError(f"prompts: {name!r} is unknown; allowed are {', '.join(known)}; templates.{name} defines a new one")
    return {name: known[name] for name in prompts}
