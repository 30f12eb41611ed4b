"""Rows of the four tasks, the built-in corpus, and what follows a correction."""

from __future__ import annotations

from typing import Any

import pytest

from mmalign.config import parse as parse_options
from mmalign.data.assets import asset_rows
from mmalign.data.fol_corpus import SCHEMAS, make_fol_corpus, misread, split_of
from mmalign.errors import ConfigError, DataError
from mmalign.logic.equivalence import logical_equivalence
from mmalign.logic.parser import parse
from mmalign.logic.perturbation import NO_CHANGES
from mmalign.logic.tasks import (
    FORMULA_MARK,
    TaskOptions,
    following_row,
    make_answer,
    make_prompt,
    read_answer,
    read_pair,
    task_rows,
)
from mmalign.logic.verdict import decide

ROW = {"id": "a", "NL": "Every dog barks.", "FOL": "∀x (Dog(x) → Barks(x))", "Pred FOL": "∃x (Dog(x) ∧ Barks(x))"}


def rows(task: str, source: list[dict[str, Any]] | None = None, **options: Any) -> list[dict[str, Any]]:
    return list(task_rows(source or [ROW], parse_options(TaskOptions, {"task": task, **options}), seed=0))


def test_translation_and_correction() -> None:
    (row,) = rows("translation")
    assert row["completion"] == row["gold"] == ROW["FOL"]
    assert row["prompt"].endswith(f"### NL:\nEvery dog barks.\n\n{FORMULA_MARK}\n")
    (row,) = rows("correction", ascii=True, instruction="")
    assert row["prompt"] == "### NL:\nEvery dog barks.\n\n### FOL:\nexists x (Dog(x) & Barks(x))\n\n### Correct FOL:\n"
    assert row["completion"] == "forall x (Dog(x) -> Barks(x))"


def test_steps_split_the_corrections_between_prompt_and_target() -> None:
    made = rows("steps", [{**ROW, "id": str(i)} for i in range(300)])
    unchanged = 0
    for row in made:
        before = row["prompt"].partition("### Previous corrections:\n")[2].partition("\n\n### Comments")[0].splitlines()
        answer = read_answer(row["completion"])
        assert answer.formula == row["gold"]
        left = [] if answer.finished else list(answer.corrections)
        assert len(left) <= 3
        assert answer.finished == (answer.corrections == (NO_CHANGES,))
        total = (0 if before == ["None."] else len(before)) + len(left)
        assert total <= 10
        unchanged += total == 0
        assert parse(row["predicted"]) == parse(row["gold"]) or total
    assert 300 * 0.2 - 35 < unchanged < 300 * 0.2 + 35
    assert rows("steps", per_row=3)[2]["id"] == "a-2"


def test_noise_depends_on_the_position_alone() -> None:
    source = [{**ROW, "id": str(i)} for i in range(10)]
    whole = rows("steps", source)
    later = list(task_rows(source[6:], TaskOptions(task="steps"), seed=0, first=6))
    assert whole[6:] == later


def test_a_loop_goes_on_with_the_corrections_it_made() -> None:
    (row,) = rows("loop")
    assert row["previous"] == []
    assert row["prompt"] == make_prompt("steps", row["nl"], predicted=row["predicted"])
    second = following_row(row, make_answer(["Change the quantifier ∃x to ∀x."], "∀x (Dog(x) ∧ Barks(x))"))
    assert second is not None
    assert second["predicted"] == row["predicted"]
    third = following_row(second, make_answer(["Change the ∧ to →.", "Negate P."], "P"))
    assert third is not None
    assert third["previous"] == ["Change the quantifier ∃x to ∀x.", "Change the ∧ to →.", "Negate P."]
    assert "Change the quantifier ∃x to ∀x.\nChange the ∧ to →.\nNegate P.\n\n### Comments:" in third["prompt"]


@pytest.mark.parametrize("completion", [
    make_answer([], "P"), "no changes needed\n### FOL: P", "Change the predicate P to Q.", "### FOL:\nP", "", "Delete x. ### FO",
])
def test_a_loop_ends(completion: str) -> None:
    assert following_row(rows("loop")[0], completion) is None


def test_answers_are_read() -> None:
    answer = read_answer("Negate P.\n Delete Q. \n\n### FOL:\n P ∧ Q\n### Comments: more")
    assert answer.corrections == ("Negate P.", "Delete Q.")
    assert answer.formula == "P ∧ Q"


@pytest.mark.parametrize(("row", "parts"), [
    ({"id": "k", "NL": "a", "FOL": "P("}, ["row 3", "'k'", "does not parse", "character 2"]),
    ({"NL": "a", "FOL": ""}, ["row 3", "no formula"]),
    ({"NL": "a"}, ["row 3", "FOL"]),
    ({"FOL": "P"}, ["row 3", "NL"]),
    ({"NL": "a", "FOL": "P"}, ["row 3", "Pred FOL"]),
])
def test_rows_that_cannot_be_used_are_named(row: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        read_pair(row, 3, predicted="Pred FOL" in parts)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_gold_too_wide_for_a_truth_table_is_refused_where_it_would_be_rewarded() -> None:
    wide = {**ROW, "FOL": " ∧ ".join(f"P{i}" for i in range(13))}
    assert len(rows("steps", [wide])) == 1
    with pytest.raises(DataError, match=r"row 0.*max_literals = 12"):
        rows("loop", [wide])


def test_our_column_names_serve_too() -> None:
    pair = read_pair({"nl": "a", "gold": "P", "predicted": "Q"}, 0)
    assert (pair.nl, str(pair.gold), pair.predicted) == ("a", "P", "Q")


def test_a_prediction_need_not_be_a_formula() -> None:
    (row,) = rows("loop", [{**ROW, "Pred FOL": "no formula ("}], ascii=True)
    assert row["predicted"] == "no formula ("


@pytest.mark.parametrize(("tree", "key"), [
    ({"per_row": 0}, "per_row"), ({"perturbation": {"most": 0}}, "most"), ({"perturbation": {"unchanged": 1.5}}, "unchanged"),
    ({"perturbation": {"kinds": {"swap": 1}}}, "kinds.swap"), ({"perturbation": {"kinds": {"insert_term": 0}}}, "kinds"),
    ({"task": "T3"}, "task"),
])
def test_senseless_options_are_refused(tree: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        parse_options(TaskOptions, tree)


# -- the corpus --------------------------------------------------------------------------------------------------------------


def test_the_corpus_has_the_columns_of_malls_and_every_schema() -> None:
    made = make_fol_corpus(len(SCHEMAS) * 40)
    assert {"id", "NL", "FOL", "Pred FOL"} == set(made[0])
    assert len({row["NL"] for row in made}) == len(made)
    assert all(parse(row["FOL"]) and parse(row["Pred FOL"]) for row in made)
    wrong = [row for row in made if row["FOL"] != row["Pred FOL"]]
    assert 0.6 < len(wrong) / len(made) < 0.8
    assert make_fol_corpus(50) == make_fol_corpus(50)
    assert make_fol_corpus(50, errors=0.0)[7]["FOL"] == make_fol_corpus(50, errors=0.0)[7]["Pred FOL"]


def test_splits_share_no_sentence() -> None:
    train, test = make_fol_corpus(400, seed=1), make_fol_corpus(100, split="test", seed=2)
    assert not {row["NL"] for row in train} & {row["NL"] for row in test}
    assert {split_of(row["NL"][0].lower() + row["NL"][1:-1]) for row in test} == {"test"}


def test_misreadings_are_other_formulas_and_mostly_mean_something_else() -> None:
    import random

    chance = random.Random(0)
    formulas = [parse(row["FOL"]) for row in make_fol_corpus(200)]
    changed = [misread(formula, chance) for formula in formulas]
    assert all(a != b for a, b in zip(formulas, changed, strict=True))
    different = [decide(a, b, solver=False).answer == "different" for a, b in zip(formulas, changed, strict=True)]
    assert sum(different) > 190
    unseen = [logical_equivalence(a, b).score == 1 for a, b in zip(formulas, changed, strict=True)]
    assert 0 < sum(unseen) < 200  # a wrong word changes no truth table


@pytest.mark.parametrize(("arguments", "part"), [
    ({"split": "validation"}, "train and test"), ({"task": "T1"}, "task"), ({"errors": 2.0}, "errors"),
    ({"per_row": 2}, "per_row"),
    ({"task": "steps", "most": 3}, "most"), ({"n": 10_000_000, "split": "test"}, "fewer"),
])
def test_bad_requests_are_refused(arguments: dict[str, Any], part: str) -> None:
    if arguments.get("n"):
        arguments = {**arguments, "n": 40_000}
    with pytest.raises((DataError, ConfigError), match=part):
        make_fol_corpus(arguments.pop("n", 4), **arguments)


def test_asset_gives_rows_of_tasks() -> None:
    row = asset_rows("asset:fol", n=3, task="loop", ascii=True, instruction="")[0]
    assert {"prompt", "gold", "nl", "predicted", "previous", "instruction"} <= set(row)
