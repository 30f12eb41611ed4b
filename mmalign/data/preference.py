"""Preference rows of other shapes: rankings into pairs, pairs into single labelled rows, completions under other prompts.

===========  ========================================================================================================
pair         ``prompt``, ``chosen``, ``rejected`` (and ``gold`` for triples, ``generated`` for the policy's own answer)
point        ``prompt``, ``completion``, ``label`` (true: desirable)
ranking      ``prompt``, ``responses`` (a list), ``scores`` (one number each, higher is better)
===========  ========================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

from mmalign.data.columns import split_implicit_prompt
from mmalign.data.encoding import IGNORED
from mmalign.data.rows import Rows
from mmalign.errors import DataError

Examples = Sequence[Mapping[str, Any]]
RankingPairs = Literal["best_worst", "adjacent", "best_rest", "all"]


def column_names(examples: Examples) -> list[str]:
    """Column names of a ``datasets.Dataset`` or a list of rows."""
    names = getattr(examples, "column_names", None)
    return list(names) if names is not None else list(examples[0])


def rename_absent(examples: Examples, aliases: Mapping[str, str]) -> Examples:
    """Columns under the names of ``aliases`` (theirs -> ours), each only where the column it means is absent."""
    names = column_names(examples)
    plan = {theirs: ours for theirs, ours in aliases.items() if theirs in names and ours not in names}
    if not plan:
        return examples
    if hasattr(examples, "rename_columns"):
        renamed: Examples = examples.rename_columns(plan)
        return renamed
    return [{plan.get(name, name): value for name, value in row.items()} for row in examples]


def expand(examples: Examples, function: Callable[[Mapping[str, Any]], list[dict[str, Any]]]) -> Examples:
    """Every row replaced by the rows that ``function`` makes of it; a ``datasets.Dataset`` is mapped on disk."""
    if not hasattr(examples, "map"):
        return [row for example in examples for row in function(example)]

    def batch(columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        made = [row for values in zip(*columns.values(), strict=True)
                for row in function(dict(zip(columns, values, strict=True)))]
        return {name: [row[name] for row in made] for name in made[0]} if made else {}

    mapped: Examples = examples.map(batch, batched=True, batch_size=100, remove_columns=examples.column_names,  # type: ignore[attr-defined]
                                    desc="preference rows")
    return mapped


def unpair(examples: Examples) -> Examples:
    """Two labelled rows of every pair: (completion = chosen, label true) and (completion = rejected, label false).

    Ids get the suffixes ``+`` and ``-``. Rows that already hold ``completion`` and ``label`` are returned as they are.
    Raises DataError when neither shape is there.
    """
    names = column_names(examples)
    if "label" in names and ("completion" in names or "input_ids" in names or "messages" in names):
        return examples
    if not {"chosen", "rejected"} <= set(names):
        raise DataError("data: unpaired preference rows need the columns completion and label (true or false), or chosen and "
                        f"rejected to be taken apart; columns are {', '.join(names)}. Map yours with data.columns")

    def split(row: Mapping[str, Any]) -> list[dict[str, Any]]:
        whole = split_implicit_prompt(row, ("chosen", "rejected"))
        kept = {name: value for name, value in whole.items() if name not in ("chosen", "rejected")}
        return [{**kept, "completion": whole[side], "label": side == "chosen",
                 **({"id": f"{kept['id']}{sign}"} if "id" in kept else {})}
                for side, sign in (("chosen", "+"), ("rejected", "-"))]

    return expand(examples, split)


def pairs_of_rankings(examples: Examples, mode: RankingPairs = "best_worst") -> Examples:
    """Pairs of rows that hold a list of ``responses`` with ``scores``; other rows are returned as they are.

    best_worst: one pair; adjacent: every neighbour in the order; best_rest: the best against every other; all: every
    pair. Responses of equal score make no pair. Raises DataError for lists of different length or of fewer than two.
    """
    names = column_names(examples)
    if "responses" not in names:
        return examples
    if "scores" not in names:
        raise DataError(f"data: rankings need the column scores beside responses; columns are {', '.join(names)}")

    def pairs(row: Mapping[str, Any]) -> list[dict[str, Any]]:
        responses, scores = list(row["responses"]), [float(score) for score in row["scores"]]
        if len(responses) != len(scores) or len(responses) < 2:
            raise DataError(f"row {row.get('id', '?')}: {len(responses)} responses and {len(scores)} scores; as many of both "
                            "and at least two are needed")
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        chains = {"best_worst": [(order[0], order[-1])], "adjacent": list(pairwise(order)),
                  "best_rest": [(order[0], i) for i in order[1:]],
                  "all": [(a, b) for at, a in enumerate(order) for b in order[at + 1:]]}
        kept = {name: value for name, value in row.items() if name not in ("responses", "scores")}
        return [{**kept, "chosen": responses[a], "rejected": responses[b], "chosen_score": scores[a],
                 "rejected_score": scores[b], **({"id": f"{kept['id']}-{number}"} if "id" in kept else {})}
                for number, (a, b) in enumerate(chains[mode]) if scores[a] > scores[b]]

    return expand(examples, pairs)


def rotate_completions(rows: Rows, *, max_length: int | None = None) -> Rows:
    """Token rows with every prompt followed by the completion of the row before it (the first: of the last).

    A prompt ends where the first label begins. Rows are cut to ``max_length``, which leaves the prompt and at least one
    token of the completion. Ethayarajh et al., 2024, arXiv 2402.01306, section 4.1 (the mismatched pairs of z).
    """
    ids: list[list[int]] = [list(row) for row in rows["input_ids"]]
    labels: list[list[int]] = [list(row) for row in rows["labels"]]
    starts = [next(i for i, label in enumerate(row) if label != IGNORED) for row in labels]
    made_ids, made_labels = [], []
    for i, start in enumerate(starts):
        other = i - 1  # of row 0: the last one
        limit = max_length if max_length is not None else start + len(ids[other])
        new_ids = (ids[i][:start] + ids[other][starts[other]:])[:max(limit, start + 1)]
        new_labels = ([IGNORED] * start + labels[other][starts[other]:])[:len(new_ids)]
        made_ids.append(new_ids)
        made_labels.append(new_labels)
    return Rows({"input_ids": made_ids, "labels": made_labels})
