"""Rows to learn translation and correction from: prompts, completions, and what follows a correction.

The four tasks of LogicLLaMA (Yang et al. 2023, arXiv 2305.15541): ``translation`` (T1: sentence to formula), ``correction`` (T2:
sentence and another model's formula to the formula), ``steps`` (T3: corrections in words, then the formula, learned from
perturbed formulas) and ``loop`` (T4: the same prompts without a target, for reinforcement learning).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mmalign.config import Options
from mmalign.core.seeding import derive_seed
from mmalign.errors import DataError
from mmalign.logic.equivalence import MAX_LITERALS
from mmalign.logic.formula import Formula, atoms, to_text
from mmalign.logic.parser import FormulaError, parse, try_parse
from mmalign.logic.perturbation import KINDS, NO_CHANGES, Vocabulary, draw_edit_count, perturb

Task = Literal["translation", "correction", "steps", "loop"]
TASKS: tuple[Task, ...] = ("translation", "correction", "steps", "loop")

COLUMNS: dict[str, tuple[str, ...]] = {
    "nl": ("nl", "NL", "sentence"), "gold": ("gold", "FOL", "fol"),
    "predicted": ("predicted", "Pred FOL", "Pred_FOL", "pred_fol"),
}
"""Our column -> the names it may have; MALLS writes NL, FOL and Pred FOL."""

FORMULA_MARK = "### FOL:"
"""Line after which a completion writes its formula."""

INSTRUCTIONS: dict[Task, str] = {
    "translation": "Translate the sentence into first-order logic.",
    "correction": "Correct the formula so that it says what the sentence says.",
    "steps": "Say what must change in the formula, then write it.",
    "loop": "Say what must change in the formula, then write it.",
}


class PerturbationOptions(Options):
    """Noise on formulas, from which corrections are learned."""

    most: int = 10
    """Edits of a formula, at most; their number is uniform in 1 .. most for formulas that are changed."""
    unchanged: float = 0.2
    """Share of formulas that are left as they are."""
    corrected: int = 3
    """Corrections that a target holds, at most; those before them stand in the prompt."""
    kinds: dict[str, float] = {}
    """Weights of the kinds of edit (change_predicate, insert_term, ...); empty: all alike."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse values without a meaning."""
        if self.most < 1 or self.corrected < 0 or not 0 <= self.unchanged <= 1:
            raise ValueError(f"most must be at least 1, corrected at least 0 and unchanged in [0, 1], not {self.most}, "
                             f"{self.corrected} and {self.unchanged}")
        for kind, weight in self.kinds.items():
            if kind not in KINDS or weight < 0:
                raise ValueError(f"kinds.{kind}: {weight}; kinds are {', '.join(KINDS)}, weights are not negative")
        if self.kinds and not any(self.kinds.values()):
            raise ValueError("kinds: every weight is 0, so no edit is possible")


class TaskOptions(Options):
    """What rows are made into."""

    task: Task = "steps"
    """translation (T1), correction (T2), steps (T3) or loop (T4)."""
    perturbation: PerturbationOptions = PerturbationOptions()
    """Noise of task steps."""
    per_row: int = 1
    """steps: perturbed formulas of every row."""
    ascii: bool = False
    """Write formulas in ASCII (``forall x (P(x) -> ~Q(x))``), which needs fewer tokens where symbols are several bytes."""
    instruction: str | None = None
    """First line of prompts; null takes the task's own, an empty text leaves the section out."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse values without a meaning."""
        if self.per_row < 1:
            raise ValueError(f"per_row must be at least 1, not {self.per_row}")


@dataclass(frozen=True)
class Pair:
    """A sentence, its formula, and perhaps what another model wrote for it."""

    nl: str
    gold: Formula
    predicted: str | None


def read_pair(row: Mapping[str, Any], position: int, *, predicted: bool = False, max_literals: int | None = None) -> Pair:
    """The pair in a row under any of the names in ``COLUMNS``.

    Raises DataError naming the row for a missing column, and for a gold formula that does not parse or has more than
    ``max_literals`` atoms.
    """
    found: dict[str, str] = {}
    for ours, theirs in COLUMNS.items():
        name = next((name for name in theirs if isinstance(row.get(name), str)), None)
        if name is not None:
            found[ours] = row[name]
        elif ours != "predicted" or predicted:
            raise DataError(f"{_row(row, position)} has no text in a column {' or '.join(theirs)}; columns are "
                            f"{', '.join(row)}. Map yours with data.columns")
    return Pair(found["nl"], parse_gold(found["gold"], row, position, max_literals=max_literals), found.get("predicted"))


def parse_gold(text: str, row: Mapping[str, Any], position: int, *, max_literals: int | None = None) -> Formula:
    """The gold formula of a row; raises DataError naming the row when it does not parse or has too many atoms."""
    try:
        formula = parse(text)
    except FormulaError as error:
        raise DataError(f"{_row(row, position)}: the gold formula does not parse: {error}. Mend or drop the row") from None
    if max_literals is not None and len(atoms(formula)) > max_literals:
        raise DataError(f"{_row(row, position)}: the gold formula has {len(atoms(formula))} different atoms, more than "
                        f"max_literals = {max_literals}; drop the row")
    return formula


def _row(row: Mapping[str, Any], position: int) -> str:
    return f"data: row {position}" + (f" (id {row['id']!r})" if "id" in row else "")


def make_prompt(
    task: Task, nl: str, *, predicted: str | None = None, previous: Sequence[str] = (), instruction: str | None = None,
) -> str:
    """The prompt of a task; corrections made before stand in it, one a line."""
    head = INSTRUCTIONS[task] if instruction is None else instruction
    sections = [f"### Instruction:\n{head}"] if head else []
    sections.append(f"### NL:\n{nl}")
    if task == "translation":
        return "\n\n".join([*sections, f"{FORMULA_MARK}\n"])
    sections.append(f"{FORMULA_MARK}\n{predicted}")
    if task == "correction":
        return "\n\n".join([*sections, "### Correct FOL:\n"])
    sections.append("### Previous corrections:\n" + ("\n".join(previous) or "None."))
    return "\n\n".join([*sections, "### Comments:\n"])


def make_answer(corrections: Sequence[str], formula: str) -> str:
    """The completion of the tasks with comments."""
    return "\n".join(corrections or [NO_CHANGES]) + f"\n\n{FORMULA_MARK}\n{formula}"


@dataclass(frozen=True)
class Answer:
    """A completion taken apart."""

    corrections: tuple[str, ...]
    formula: str
    """Text after the mark; empty when there is none."""
    finished: bool
    """Says that no changes are needed, or cannot be followed by anything: it writes no correction or no formula."""


def read_answer(completion: str) -> Answer:
    """What a completion of the tasks with comments says."""
    comments, mark, rest = completion.partition(FORMULA_MARK)
    lines = tuple(line.strip() for line in comments.splitlines() if line.strip())
    formula = rest.split("###")[0].strip()
    done = not mark or not lines or any(line.casefold().startswith(NO_CHANGES.rstrip(".").casefold()) for line in lines)
    return Answer(lines, formula, done)


def following_row(row: Mapping[str, Any], completion: str) -> dict[str, Any] | None:
    """The row of the next generation: the corrections of ``completion`` join the previous ones; None when it was the last."""
    answer = read_answer(completion)
    if answer.finished:
        return None
    previous = [*row["previous"], *answer.corrections]
    prompt = make_prompt("loop", row["nl"], predicted=row["predicted"], previous=previous, instruction=row["instruction"])
    return {**row, "prompt": prompt, "previous": previous}


def task_rows(
    rows: Sequence[Mapping[str, Any]], options: TaskOptions, *, seed: int, first: int = 0, vocabulary: Vocabulary | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of a task: ``id, prompt, gold, nl`` and, by task, ``completion``, ``predicted``, ``previous``, ``instruction``.

    ``first`` is the position of ``rows[0]`` in the data: a row's noise depends on its position and the seed alone. Raises
    DataError naming the row for missing columns, and for a gold formula that does not parse.
    """
    task = options.task
    for position, row in enumerate(rows, start=first):
        pair = read_pair(row, position, predicted=task in ("correction", "loop"),
                         max_literals=MAX_LITERALS if task == "loop" else None)  # loops are rewarded by truth tables
        gold = to_text(pair.gold, ascii=options.ascii)
        base = {"id": str(row.get("id", position)), "nl": pair.nl, "gold": gold}
        predicted = _rewritten(pair.predicted or "", options.ascii)
        if task == "translation":
            prompt = make_prompt(task, pair.nl, instruction=options.instruction)
            yield {**base, "prompt": prompt, "completion": gold}
        elif task == "correction":
            prompt = make_prompt(task, pair.nl, predicted=predicted, instruction=options.instruction)
            yield {**base, "predicted": predicted, "prompt": prompt, "completion": gold}
        elif task == "loop":
            prompt = make_prompt(task, pair.nl, predicted=predicted, instruction=options.instruction)
            yield {**base, "predicted": predicted, "prompt": prompt, "previous": [], "instruction": options.instruction}
        else:
            for copy in range(options.per_row):
                noise = random.Random(derive_seed(seed, "perturbation", position, copy))
                suffix = f"-{copy}" if options.per_row > 1 else ""
                yield {**base, "id": base["id"] + suffix, **_steps(pair, noise, options, vocabulary)}


def _steps(pair: Pair, noise: random.Random, options: TaskOptions, vocabulary: Vocabulary | None) -> dict[str, Any]:
    wanted = options.perturbation
    count = draw_edit_count(noise, most=wanted.most, unchanged=wanted.unchanged)
    made = perturb(pair.gold, count, noise, vocabulary=vocabulary, weights=wanted.kinds or None)
    corrections = made.corrections()
    target = noise.randint(0, min(wanted.corrected, len(corrections)))
    split = len(corrections) - target
    previous, left = corrections[:split], corrections[split:]
    predicted = to_text(made.formula, ascii=options.ascii)
    return {"predicted": predicted,
            "prompt": make_prompt("steps", pair.nl, predicted=predicted, previous=previous, instruction=options.instruction),
            "completion": make_answer(left, to_text(pair.gold, ascii=options.ascii))}


def _rewritten(text: str, ascii: bool) -> str:
    """A predicted formula in the spelling asked for; text that is no formula stays as it is."""
    formula = try_parse(text)
    return text.strip() if formula is None else to_text(formula, ascii=ascii)


def vocabulary_of(rows: Iterable[Mapping[str, Any]]) -> Vocabulary:
    """Names in the gold formulas of some rows, for noise that looks like the corpus."""
    return Vocabulary.of([read_pair(row, position).gold for position, row in enumerate(rows)])
