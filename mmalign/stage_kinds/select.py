"""The select stage: scored samples -> pairs, triples, the best of every prompt, or the best rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from mmalign.config import Options
from mmalign.core.seeding import derive_seed
from mmalign.core.selection import PAIRINGS, best_of_group, best_worst_pair, make_triples, rejection_passes, top_k_indices
from mmalign.data.loading import DataOptions, load_rows
from mmalign.errors import ConfigError, DataError
from mmalign.rewards.ranking import LanguageModelRanker, PairwiseRanker, pairwise_scores
from mmalign.stage_kinds.groups import Groups, write_by_group
from mmalign.stage_kinds.records import Chunk, NoRowsError, as_they_are, sample_column, sample_in, write_in_chunks
from mmalign.stages import StageContext, StageResult, stage

Row = dict[str, Any]


class RankerOptions(Options):
    """A pairwise ranking model."""

    path: str
    """Model trained by the method ``ranking_model``."""
    template: str | None = None
    """Text of a comparison, with ``{prompt}``, ``{first}``, ``{second}``; null takes the one stored with the model."""
    rows_per_forward: int = 16
    """Comparisons scored together."""
    symmetrize: bool = True
    """Average the log-odds over both orders of the two responses."""


class SelectOptions(Options):
    """Options of the select stage."""

    data: DataOptions
    """Rows with ``score`` (and ``group`` for all modes but top_k)."""
    mode: Literal["best_worst", "best", "top_k", "statistical_rejection", "triples"] = "best_worst"
    """best_worst: one (chosen, rejected) pair per prompt; best: the best sample per prompt; top_k: the k best rows;
    statistical_rejection: n samples per prompt accepted as RSO does, then paired; triples: (gold, chosen, rejected)."""
    k: int | None = None
    """Rows kept by top_k."""
    tie_break: str | None = None
    """best: column whose larger value decides between equal scores (``mean_logp`` of the stage generate); null: the first."""
    min_margin: float = 0.0
    """Pairs whose scores differ by no more than this are dropped (best_worst, triples)."""
    n: int | None = None
    """statistical_rejection: samples accepted of every prompt."""
    beta: float = 0.5
    """statistical_rejection: temperature of the target; 0 accepts the n best, .inf the first n."""
    pairing: Literal["first_round", "tournament"] = "first_round"
    """statistical_rejection: accepted samples are paired once (n/2 pairs), or winners go on (n - 1 pairs)."""
    label_by: str = "score"
    """statistical_rejection: column whose larger value wins a pair; not used with a ranker."""
    ranker: RankerOptions | None = None
    """statistical_rejection: the model that decides pairs, as published; null decides by ``label_by``."""
    deduplicate: bool = False
    """statistical_rejection: equal texts count as one candidate, as in the paper's printed algorithm. Wrong for short
    answers, whose frequency is their probability."""
    chosen_rank: int = 2
    """triples: place of the chosen response, the best being 1."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse values without a meaning."""
        if self.mode == "top_k" and (self.k is None or self.k < 1):
            raise ValueError(f"k: required by mode top_k, and at least 1, not {self.k}")
        if self.mode == "statistical_rejection" and (self.n is None or self.n < 2):
            raise ValueError(f"n: required by mode statistical_rejection, and at least 2 to make a pair, not {self.n}")
        if math.isnan(self.beta) or self.beta < 0:
            raise ValueError(f"beta must be 0, positive or .inf, not {self.beta}")
        if self.tie_break is not None and self.mode != "best":
            raise ValueError(f"tie_break: decides between equal scores in mode best, not {self.mode}; leave it out")
        if self.chosen_rank < 2:
            raise ValueError(f"chosen_rank must be at least 2 (1 is the gold response), not {self.chosen_rank}")


@dataclass
class Selector:
    """Turns the scored samples of one prompt into rows, and counts what it leaves out."""

    options: SelectOptions
    seed: int
    ranker: PairwiseRanker | None = None
    numbers: dict[str, float] = field(default_factory=dict)

    def count(self, name: str, value: float = 1.0) -> None:
        """Add to a number that is summed over the whole stage."""
        self.numbers[name] = self.numbers.get(name, 0.0) + value

    def select(self, rows: Sequence[Row]) -> list[Row]:
        """The rows that the samples of one prompt become."""
        scored = [row for row in rows if row["score"] is not None and not math.isnan(row["score"])]
        if len(scored) < len(rows):
            self.count("dropped/unscored", len(rows) - len(scored))
        for row in scored:
            if math.isinf(row["score"]):
                raise DataError(f"data.path: row {row.get('id')!r} has the score {row['score']}; scores are finite (null where "
                                "a reward does not apply)")
        if not scored:
            return []
        return _MODES[self.options.mode](self, scored, len(rows))

    def best(self, rows: Sequence[Row], given: int) -> list[Row]:
        """The best sample."""
        column = self.options.tie_break
        if column is not None:
            # Sorted by the second criterion first: among equal scores the earliest is then the largest in it.
            rows = sorted(rows, key=lambda row: -float(row[column]))
        return [dict(rows[int(best_of_group(_scores(rows), torch.zeros(len(rows), dtype=torch.long))[0])])]

    def best_worst(self, rows: Sequence[Row], given: int) -> list[Row]:
        """The best and the worst sample, unless they are as good as each other."""
        pairs = best_worst_pair(_scores(rows), torch.zeros(len(rows), dtype=torch.long)).tolist()
        return [_pair(rows[c], rows[r]) for c, r in pairs if rows[c]["score"] - rows[r]["score"] > self.options.min_margin]

    def triples(self, rows: Sequence[Row], given: int) -> list[Row]:
        """Gold, chosen and rejected by rank."""
        rank, name = self.options.chosen_rank, sample_column(rows[0])
        keys = [_key(sample_in(row, name)) for row in rows]
        if len(set(keys)) < max(3, rank + 1):
            self.count("dropped/few_distinct")
            return []
        triple = make_triples(keys, _scores(rows), rank)
        self.count("ties", triple.ties)
        gold, chosen, rejected = (rows[i] for i in triple[:3])
        if not chosen["score"] - rejected["score"] > self.options.min_margin:
            self.count("dropped/equal_scores")
            return []
        return [{**_pair(chosen, rejected), "gold": sample_in(gold, name), "gold_score": gold["score"]}]

    def statistical_rejection(self, rows: Sequence[Row], given: int) -> list[Row]:
        """Accept n samples, pair them, and label every pair."""
        options, group = self.options, rows[0].get("group")
        n = int(options.n or 0)
        if given < n:
            raise DataError(f"n: {n} samples are to be accepted, but group {group!r} has {given}; generate at least that many "
                            "completions_per_prompt, or lower n")
        name = sample_column(rows[0])
        if options.deduplicate:
            first: dict[Any, Row] = {}
            for row in rows:
                first.setdefault(_key(sample_in(row, name)), row)
            self.count("dropped/duplicates", len(rows) - len(first))
            rows = list(first.values())
        if len(rows) < n:
            self.count("short_groups")
        seed = derive_seed(self.seed, "selection", group) % 2**31
        draws = torch.Generator().manual_seed(seed)
        accepted = rejection_passes(_scores(rows), min(n, len(rows)), beta=options.beta, uniforms=draws)
        self._count_accepted(rows, accepted)
        passes = dict(accepted)
        played = PAIRINGS[options.pairing](list(passes), self._prefer(rows, name), generator=draws)
        possible = len(passes) // 2 if options.pairing == "first_round" else max(0, len(passes) - 1)
        self.count("dropped/undecided", possible - len(played))
        records = []
        for winner, loser in played:
            if _key(sample_in(rows[winner], name)) == _key(sample_in(rows[loser], name)):
                self.count("dropped/identical")
                continue
            record = _pair(rows[winner], rows[loser])
            record.setdefault("source", "sft_sample_rank" if math.isinf(options.beta) else "rso_sample_rank")
            records.append({**record, "id": f"{rows[winner]['id']}/{rows[loser]['id']}", "chosen_pass": passes[winner],
                            "rejected_pass": passes[loser], "selection_seed": seed})
        return records

    def _count_accepted(self, rows: Sequence[Row], accepted: Sequence[tuple[int, int]]) -> None:
        self.count("sum candidates", float(sum(row["score"] for row in rows)))
        self.count("candidates", len(rows))
        self.count("sum accepted", float(sum(rows[i]["score"] for i, _ in accepted)))
        self.count("accepted", len(accepted))
        self.count("first_pass", sum(number == 0 for _, number in accepted))

    def _prefer(self, rows: Sequence[Row], name: str) -> Callable[[Sequence[tuple[int, int]]], list[float]]:
        options, ranker = self.options, self.ranker

        def by_column(pairs: Sequence[tuple[int, int]]) -> list[float]:
            return [float(rows[a][options.label_by]) - float(rows[b][options.label_by]) for a, b in pairs]

        def by_ranker(pairs: Sequence[tuple[int, int]]) -> list[float]:
            assert ranker is not None
            assert options.ranker is not None
            values, clamped = pairwise_scores(
                ranker, [rows[a]["prompt"] for a, _ in pairs], [sample_in(rows[a], name) for a, _ in pairs],
                [sample_in(rows[b], name) for _, b in pairs], symmetrize=options.ranker.symmetrize)
            self.count("ranker/clamped", clamped)
            return [float(value) for value in values]

        return by_column if ranker is None else by_ranker


_MODES: dict[str, Callable[[Selector, Sequence[Row], int], list[Row]]] = {
    "best": Selector.best, "best_worst": Selector.best_worst, "triples": Selector.triples,
    "statistical_rejection": Selector.statistical_rejection,
}


@stage("select", options=SelectOptions, outputs=("data", "folder"))
def select(options: SelectOptions, context: StageContext) -> StageResult:
    """Turn scored samples into preference pairs, triples, best-of-n rows, or the k best rows."""
    rows = load_rows(options.data, seed=context.seed)
    _check_columns(rows[0], options)
    if options.mode == "top_k":
        return _top_k(options, rows, context)
    groups = Groups(rows)
    ranker = None
    if options.ranker is not None:
        ranker = LanguageModelRanker(options.ranker.path, template=options.ranker.template,
                                     rows_per_forward=options.ranker.rows_per_forward)

    def choose(items: list[dict[str, Any]], chunk: range) -> Chunk:
        selector = Selector(options, context.seed, ranker)
        records = [record for item in items for record in selector.select(item["rows"])]
        return records, selector.numbers

    try:
        data, numbers = write_by_group(context, groups, choose)
    except NoRowsError:
        raise DataError("data.path: no row is left: in every group all samples have the same score (or too few have one); "
                        "sample more completions_per_prompt, or use a reward that tells them apart") from None
    return StageResult({"data": str(data), "folder": str(context.folder)}, _metrics(numbers, len(groups)))


def _check_columns(row: Mapping[str, Any], options: SelectOptions) -> None:
    needed = ["score"] if options.mode == "top_k" else ["score", "group"]
    if options.mode == "statistical_rejection":
        needed += ["prompt"] if options.ranker is not None else [options.label_by]
    needed += [options.tie_break] if options.tie_break is not None else []
    missing = [name for name in needed if name not in row]
    if missing:
        raise DataError(f"data.path: the select stage needs the column {missing[0]!r}; run a score stage first. "
                        f"Columns are {', '.join(row)}")


def _top_k(options: SelectOptions, rows: Any, context: StageContext) -> StageResult:
    column = rows.with_format("numpy")["score"][:] if hasattr(rows, "with_format") else [row["score"] for row in rows]
    scores = torch.as_tensor(np.asarray(column, dtype=np.float64))
    known = int((~scores.isnan()).sum())
    if options.k is None or not known:
        raise ConfigError("k: no row has a score")
    kept = sorted(top_k_indices(scores.nan_to_num(nan=-math.inf), min(options.k, known)).tolist())
    chosen = rows.select(kept) if hasattr(rows, "select") else [rows[i] for i in kept]
    data, numbers = write_in_chunks(context, chosen, as_they_are)
    return StageResult({"data": str(data), "folder": str(context.folder)},
                       {"rows": numbers["rows"], "share": numbers["rows"] / len(rows)})


def _metrics(numbers: dict[str, float], groups: int) -> dict[str, float]:
    numbers = dict(numbers)
    metrics = {"rows": numbers["rows"], "share": numbers.pop("rows") / groups}
    for name, total in (("candidates", "sum candidates"), ("accepted", "sum accepted")):
        if total in numbers:
            metrics[f"score/{name}"] = numbers.pop(total) / max(numbers[name], 1.0)
    if "accepted" in numbers:
        metrics["first_pass_share"] = numbers.pop("first_pass") / max(numbers["accepted"], 1.0)
    return metrics | numbers


def _scores(rows: Sequence[Row]) -> torch.Tensor:
    return torch.tensor([row["score"] for row in rows], dtype=torch.float64)


def _key(sample: Any) -> Any:
    """What two samples are equal by: the text, the messages' content, the identity of anything else."""
    if isinstance(sample, str):
        return sample
    if isinstance(sample, list):
        return repr(sample)
    return sample.tobytes() if hasattr(sample, "tobytes") else id(sample)


def _pair(chosen: Mapping[str, Any], rejected: Mapping[str, Any]) -> dict[str, Any]:
    sample = sample_column(chosen)
    kept = {k: v for k, v in chosen.items() if k not in (sample, "score", "finish_reason") and not k.startswith("reward_")}
    return {**kept, "chosen": sample_in(chosen, sample), "rejected": sample_in(rejected, sample),
            "chosen_score": chosen["score"], "rejected_score": rejected["score"]}
