"""Rewards on formulas: ranges, the mixture, what is refused before a run, and undecided questions."""

from __future__ import annotations

from typing import Any

import pytest

from mmalign.errors import ConfigError, DataError, RewardError
from mmalign.rewards.base import RewardSet
from mmalign.rewards.logic import check_gold, fol_bleu, fol_equivalence, fol_mixture, fol_verdict, formula_text
from mmalign.rewards.registry import RewardOptions

GOLD = "∀x (Dog(x) → Barks(x))"
WIDE = " ∧ ".join(f"P{i}" for i in range(13))


def score(function: Any, completion: Any, gold: Any = GOLD, **options: Any) -> float | None:
    return function([""], [completion], [gold], **options)[0]


@pytest.mark.parametrize("function", [fol_equivalence, fol_bleu, fol_mixture, fol_verdict])
def test_gold_gets_one_and_what_does_not_parse_gets_nothing(function: Any) -> None:
    assert score(function, GOLD) == pytest.approx(1)
    for completion in ("", "no formula (", "Dog(x", "### FOL:\n", "∀x (Dog(x) → Barks(x)) ### FOL:"):
        assert score(function, completion) == 0
    assert score(function, GOLD, None) is None
    message = {"role": "assistant", "content": f"Negate P.\n\n### FOL:\n{GOLD}\n### Comments: x"}
    assert score(function, [message]) == pytest.approx(1)


def test_the_last_formula_counts() -> None:
    assert formula_text(f"### FOL:\nP\n### FOL:\n{GOLD}") == GOLD
    assert formula_text(f"  {GOLD} ") == GOLD


def test_the_mixture_is_seven_to_three() -> None:
    predicted = "∃x (Dog(x) ∧ Barks(x))"
    le, bleu = score(fol_equivalence, predicted), score(fol_bleu, predicted)
    assert le == 0.5
    assert bleu is not None
    assert 0 < bleu < 1
    assert score(fol_mixture, predicted) == pytest.approx(0.7 * le + 0.3 * bleu)
    assert score(fol_mixture, predicted, omega=1.0) == le
    with pytest.raises(RewardError, match="omega"):
        score(fol_mixture, predicted, omega=1.5)


def test_quantifier_errors_are_seen_by_bleu_the_penalty_and_the_verdict() -> None:
    gold, predicted = "∀x P(x)", "∃x P(x)"
    assert score(fol_equivalence, predicted, gold) == 1
    assert score(fol_bleu, predicted, gold) == pytest.approx(0.7598, abs=1e-4)
    assert score(fol_equivalence, predicted, gold, quantifier_penalty=True) == 0
    assert score(fol_verdict, predicted, gold) == 0


def test_equivalent_formulas_get_one_from_the_verdict_whatever_their_form() -> None:
    pytest.importorskip("z3")
    assert score(fol_verdict, "¬∃y (Dog(y) ∧ ¬Barks(y))") == 1
    assert score(fol_verdict, "¬∃y (Dogs(y) ∧ ¬Bark(y))") == 0
    assert score(fol_verdict, "¬∃y (Dogs(y) ∧ ¬Bark(y))", symbols="nearest") == 1
    with pytest.raises(RewardError, match="symbols"):
        score(fol_verdict, GOLD, symbols="any")


def test_undecided_questions_have_a_value_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmalign.logic import verdict
    from mmalign.rewards import logic

    logic._verdict.cache_clear()
    monkeypatch.setattr(logic, "decide", lambda gold, found, **options: verdict.decide(gold, found, solver=False))
    gold, predicted = "∀x (P(x) ∧ Q(x))", "(∀x P(x)) ∧ ∀x Q(x)"
    logged: list[tuple[str, float]] = []
    assert score(fol_verdict, predicted, gold) is None
    assert score(fol_verdict, predicted, gold, unknown=0.5, log_metric=lambda name, value: logged.append((name, value))) == 0.5
    assert logged == [("fol_verdict/unknown", 1.0)]
    logic._verdict.cache_clear()


def test_predictions_with_too_many_literals_get_nothing_and_gold_is_refused() -> None:
    assert score(fol_equivalence, WIDE) == 0
    with pytest.raises(RewardError, match="max_literals"):
        score(fol_equivalence, "P", WIDE)
    assert score(fol_equivalence, "P ∧ Q", "P ∧ Q", max_literals=2) == 1


def test_compat_folds_what_the_published_tokeniser_folds() -> None:
    gold, predicted = "∀x DCUniverse(x)", "∀xdCUniverse(x)"
    assert score(fol_bleu, predicted, gold, compat=True) == 1
    assert score(fol_equivalence, "P → Q", "∀x P(x)", compat=True) == 0  # predicates without terms are not read


@pytest.mark.parametrize(("gold", "part"), [("Dog(", "row 1"), ("", "row 1"), (3, "row 1"), (WIDE, "max_literals")])
def test_gold_that_cannot_be_used_is_refused_before_a_run(gold: Any, part: str) -> None:
    rows = [{"id": "a", "gold": "P"}, {"id": "b", "gold": gold}, {"id": "c", "gold": None}]
    with pytest.raises(DataError, match=part):
        check_gold(rows)
    for name in ("fol_equivalence", "fol_bleu", "fol_mixture", "fol_verdict"):
        with pytest.raises(DataError, match=part):
            RewardSet([RewardOptions(name=name)]).check_rows(rows)
    check_gold(rows[::2])


def test_gold_that_cannot_be_used_stops_scoring_too() -> None:
    with pytest.raises(RewardError, match="no formula"):
        score(fol_equivalence, "P", "Dog(")


def test_names_and_options_in_a_configuration() -> None:
    values = RewardSet([RewardOptions(name="fol_le", quantifier_penalty=True), RewardOptions(name="fol_z3"),
                        RewardOptions(name="fol_mixture", omega=0.5)]).score_samples([""], ["∃x P(x)"], gold=["∀x P(x)"])
    assert values[0, :2].tolist() == [0.0, 0.0]
    assert float(values[0, 2]) == pytest.approx(0.5 + 0.5 * 0.7598, abs=1e-4)
    with pytest.raises(ConfigError, match="omga"):
        RewardSet([RewardOptions(name="fol_mixture", omga=0.5)])
