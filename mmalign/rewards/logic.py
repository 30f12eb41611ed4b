"""Rewards on formulas of first-order logic: how equivalent a completion's formula is to the gold one, and how alike it reads.

The gold formula is the column ``gold``. A completion's formula is what follows the last line ``### FOL:``, or all of it. Text
that is no formula gives 0; a gold text that is none stops the run before it starts, or gives an error that shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

from mmalign.errors import DataError, RewardError
from mmalign.logic.equivalence import MAX_BINDINGS, MAX_LITERALS, TooManyLiterals, logical_equivalence
from mmalign.logic.formula import Formula, atoms
from mmalign.logic.parser import FormulaError, formula_tokens, parse, try_parse
from mmalign.logic.tasks import FORMULA_MARK
from mmalign.logic.verdict import Answer, decide, with_symbols_of
from mmalign.rewards.registry import reward
from mmalign.rewards.text import completion_text, nonempty
from mmalign.rewards.text_metrics import token_bleu

Symbols = Literal["exact", "nearest"]


def formula_text(completion: Any) -> str:
    """The part of a completion that writes its formula."""
    return completion_text(completion).rpartition(FORMULA_MARK)[2].split("###")[0].strip()


def equivalence_score(
    gold: str, predicted: str, *, max_literals: int = MAX_LITERALS, max_bindings: int = MAX_BINDINGS,
    quantifier_penalty: bool = False, compat: bool = False,
) -> float:
    """The LE score of two texts (:func:`mmalign.logic.equivalence.logical_equivalence`).

    0 for a prediction that does not parse or has more than ``max_literals`` atoms. Raises FormulaError or TooManyLiterals for a
    gold text of this kind.
    """
    return _equivalence(gold, predicted, max_literals, max_bindings, quantifier_penalty, compat)


@lru_cache(maxsize=16384)
def _equivalence(gold: str, predicted: str, max_literals: int, max_bindings: int, penalty: bool, compat: bool) -> float:
    wanted, found = parse(gold, compat=compat), try_parse(predicted, compat=compat)
    if len(atoms(wanted)) > max_literals:
        raise TooManyLiterals(f"the formula has {len(atoms(wanted))} different atoms, more than max_literals = {max_literals}")
    if found is None or len(atoms(found)) > max_literals:
        return 0.0
    return logical_equivalence(
        wanted, found, max_literals=max_literals, max_bindings=max_bindings, quantifier_penalty=penalty).score


def bleu_score(gold: str, predicted: str, *, compat: bool = False) -> float:
    """BLEU of the tokens of two formulas; 0 for a prediction that does not parse. Raises FormulaError where gold does not."""
    parse(gold, compat=compat)
    if try_parse(predicted, compat=compat) is None:
        return 0.0
    return token_bleu(formula_tokens(gold, compat=compat), formula_tokens(predicted, compat=compat))


@lru_cache(maxsize=16384)
def _verdict(gold: Formula, predicted: str, max_size: int, timeout_ms: int, rlimit: int, symbols: Symbols) -> Answer:
    found = try_parse(predicted)
    if found is None:
        return "different"
    if symbols == "nearest":
        found = with_symbols_of(gold, found)
    return decide(gold, found, max_size=max_size, timeout_ms=timeout_ms, rlimit=rlimit).answer


def _each(completions: Sequence[Any], gold: Sequence[Any], score: Callable[[str, str], float | None]) -> list[float | None]:
    """``score(gold, predicted)`` of every completion; None where there is no gold."""
    values: list[float | None] = []
    for completion, wanted in zip(completions, gold, strict=True):
        if wanted is None:
            values.append(None)
            continue
        try:
            values.append(score(nonempty(wanted), formula_text(completion)))
        except FormulaError as error:
            raise RewardError(f"gold {wanted!r:.200} is no formula: {error}") from None
        except TooManyLiterals as error:
            raise RewardError(f"gold {wanted!r:.200}: {error}") from None
    return values


@reward("fol_equivalence", aliases=("fol_le",), range=(0, 1), needs=("gold",))
def fol_equivalence(
    prompts: Sequence[Any], completions: Sequence[Any], gold: Sequence[Any], *, max_literals: int = MAX_LITERALS,
    max_bindings: int = MAX_BINDINGS, quantifier_penalty: bool = False, compat: bool = False, **columns: Any,
) -> list[float | None]:
    """Best share of equal truth-table rows over bindings of the literals, quantifiers ignored (LE); 0 where nothing parses.

    Yang et al. 2023, arXiv 2305.15541. ``quantifier_penalty`` multiplies by the share of quantifiers that agree; ``compat``
    reads formulas as the published parser does.
    """
    return _each(completions, gold, lambda wanted, found: equivalence_score(
        wanted, found, max_literals=max_literals, max_bindings=max_bindings, quantifier_penalty=quantifier_penalty,
        compat=compat))


@reward("fol_bleu", range=(0, 1), needs=("gold",))
def fol_bleu(
    prompts: Sequence[Any], completions: Sequence[Any], gold: Sequence[Any], *, compat: bool = False, **columns: Any,
) -> list[float | None]:
    """BLEU of the formula's tokens (symbols, brackets, commas, names), not smoothed; 0 where nothing parses."""
    return _each(completions, gold, lambda wanted, found: bleu_score(wanted, found, compat=compat))


@reward("fol_mixture", range=(0, 1), needs=("gold",))
def fol_mixture(
    prompts: Sequence[Any], completions: Sequence[Any], gold: Sequence[Any], *, omega: float = 0.7,
    max_literals: int = MAX_LITERALS, max_bindings: int = MAX_BINDINGS, quantifier_penalty: bool = False, compat: bool = False,
    **columns: Any,
) -> list[float | None]:
    """``omega LE + (1 - omega) BLEU``: the reward of LogicLLaMA's corrections (Yang et al. 2023, arXiv 2305.15541)."""
    if not 0 <= omega <= 1:
        raise RewardError(f"omega={omega} must be in [0, 1]")
    return _each(completions, gold, lambda wanted, found: omega * equivalence_score(
        wanted, found, max_literals=max_literals, max_bindings=max_bindings, quantifier_penalty=quantifier_penalty,
        compat=compat) + (1 - omega) * bleu_score(wanted, found, compat=compat))


@reward("fol_verdict", aliases=("fol_z3",), range=(0, 1), needs=("gold",))
def fol_verdict(
    prompts: Sequence[Any], completions: Sequence[Any], gold: Sequence[Any], *, unknown: float | None = None,
    symbols: Symbols = "exact", max_size: int = 3, timeout_ms: int = 2000, rlimit: int = 1_000_000, log_metric: Any = None,
    **columns: Any,
) -> list[float | None]:
    """1 where the formulas are equivalent, quantifiers included, 0 where a model tells them apart or nothing parses.

    Truth tables, finite models of up to ``max_size`` things, then z3 where it is installed (the extra ``logic``), limited in
    steps and in time. ``unknown`` is the value where none of them decides (null: the reward does not apply). ``symbols``:
    "nearest" takes a predicate or constant that gold lacks for the nearest one that it has.
    """
    if symbols not in ("exact", "nearest"):
        raise RewardError(f"symbols={symbols!r} is unknown; allowed: exact, nearest")
    values: dict[Answer, float | None] = {"equivalent": 1.0, "different": 0.0, "unknown": unknown}
    undecided = 0

    def score(wanted: str, found: str) -> float | None:
        nonlocal undecided
        answer = _verdict(parse(wanted), found, max_size, timeout_ms, rlimit, symbols)
        undecided += answer == "unknown"
        return values[answer]

    scores = _each(completions, gold, score)
    if log_metric is not None:
        log_metric("fol_verdict/unknown", undecided / max(1, len(scores)))
    return scores


def check_gold(rows: Sequence[Mapping[str, Any]], *, max_literals: int = MAX_LITERALS) -> None:
    """Raise DataError naming the first row whose ``gold`` is no formula, or has too many atoms for a truth table."""
    from mmalign.logic.tasks import parse_gold

    for position, row in enumerate(rows):
        text = row.get("gold")
        if text is None:
            continue
        if not isinstance(text, str):
            raise DataError(f"data: row {position}: gold is {text!r:.80}, not the text of a formula")
        parse_gold(text, row, position, max_literals=max_literals)


_FUNCTIONS: tuple[Any, ...] = (fol_equivalence, fol_bleu, fol_mixture, fol_verdict)
for _function in _FUNCTIONS:
    _function.check_rows = check_gold
