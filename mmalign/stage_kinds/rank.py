"""The rank stage: several samples that a row already holds -> the best and the worst of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmalign.config import Options
from mmalign.data.loading import DataOptions, load_rows
from mmalign.errors import DataError
from mmalign.rewards.base import RewardOptions, RewardSet, build_rewards
from mmalign.stage_kinds.records import JUDGED_PER_CHUNK, Chunk, write_in_chunks
from mmalign.stage_kinds.score import rollout_of
from mmalign.stages import StageContext, StageResult, stage


class RankOptions(Options):
    """Options of the rank stage."""

    data: DataOptions
    """Rows with ``prompt`` and the candidates' columns."""
    rewards: list[RewardOptions]
    """Rewards whose weighted sum orders the candidates: rules, reward models, pairwise rankers."""
    candidates: list[str] = ["chosen", "generated", "rejected"]
    """Columns to rank, a column ``completion`` being read as ``generated``. Equal scores keep this order, so that a tie
    leaves the pair of the data set as it was."""
    min_margin: float = 0.0
    """Rows whose best and worst differ by less than this are dropped."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse lists that cannot be ranked."""
        if len(set(self.candidates)) < 2 or len(set(self.candidates)) != len(self.candidates):
            raise ValueError(f"candidates must name at least two different columns, not {self.candidates}")


@stage("rank", options=RankOptions, outputs=("data", "folder"))
def rank(options: RankOptions, context: StageContext) -> StageResult:
    """Put the best of a row's samples into ``chosen`` and the worst into ``rejected``; ``generated`` stays."""
    rows = load_rows(options.data, seed=context.seed)
    rewards = build_rewards(options.rewards, config_folder=context.config_folder, dump_dir=context.folder / "rewards")

    def order(examples: list[dict[str, Any]], chunk: range) -> Chunk:
        examples = [_as_generated(row) for row in examples]
        scores = [_scores(examples, name, rewards) for name in options.candidates]
        records, numbers = [], {"indistinct": 0.0, "close": 0.0, "generated best": 0.0, "generated worst": 0.0}
        for i, row in enumerate(examples):
            ranked = rank_row(row, options.candidates, [column[i] for column in scores])
            if ranked is None:
                numbers["indistinct"] += 1
            elif ranked["chosen_score"] - ranked["rejected_score"] < options.min_margin:
                numbers["close"] += 1
            else:
                records.append(ranked)
                numbers["generated best"] += ranked["chosen_from"] == "generated"
                numbers["generated worst"] += ranked["rejected_from"] == "generated"
        return records, numbers

    data, numbers = write_in_chunks(context, rows, order, size=JUDGED_PER_CHUNK)
    kept = numbers["rows"]
    if numbers["indistinct"]:
        context.say(f"{int(numbers['indistinct'])} rows dropped: all their candidates are the same")
    metrics = {"rows": kept, "dropped/indistinct": numbers["indistinct"], "dropped/close": numbers["close"],
               "generated/best": numbers["generated best"] / kept, "generated/worst": numbers["generated worst"] / kept}
    return StageResult({"data": str(data), "folder": str(context.folder)}, metrics)


def _as_generated(row: Mapping[str, Any]) -> dict[str, Any]:
    if "completion" not in row or "generated" in row:
        return dict(row)
    return {("generated" if name == "completion" else name): value for name, value in row.items()}


def _scores(rows: Sequence[Mapping[str, Any]], name: str, rewards: RewardSet) -> list[float]:
    if name not in rows[0]:
        raise DataError(f"data.path: column {name!r} (candidates) is missing; columns are {', '.join(rows[0])}")
    candidates = [{**{k: v for k, v in row.items() if k not in ("completion", "group")}, "completion": row[name]} for row in rows]
    total = rewards.total(rewards.score(rollout_of(candidates)))
    if bool(total.isnan().any()):
        raise DataError(f"rewards: no score for {int(total.isnan().sum())} samples of column {name!r}; a ranking needs one of "
                        "every candidate")
    return [float(value) for value in total]


def rank_row(row: Mapping[str, Any], candidates: Sequence[str], scores: Sequence[float]) -> dict[str, Any] | None:
    """``row`` with its best candidate as ``chosen`` and its worst as ``rejected``; None when all candidates are the same.

    Equal scores: the earlier of ``candidates`` counts as the better one. Adds ``chosen_score``, ``rejected_score``,
    ``chosen_from`` and ``rejected_from``.
    """
    if all(row[name] == row[candidates[0]] for name in candidates[1:]):
        return None
    order = sorted(range(len(candidates)), key=lambda i: -scores[i])  # stable
    best, worst = order[0], order[-1]
    if row[candidates[best]] == row[candidates[worst]]:  # equal in text, so equal in score: any other would do as well
        worst = next(i for i in reversed(order) if row[candidates[i]] != row[candidates[best]])
        if scores[worst] > scores[best]:
            best, worst = worst, best
    return {**row, "chosen": row[candidates[best]], "rejected": row[candidates[worst]],
            "chosen_score": scores[best], "rejected_score": scores[worst],
            "chosen_from": candidates[best], "rejected_from": candidates[worst]}
