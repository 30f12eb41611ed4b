"""Pairwise ranking models: a language model that reads two responses and says which is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from mmalign.core.seeding import derive_seed
from mmalign.data.columns import require_columns, split_implicit_prompt
from mmalign.data.ranking import LABELS, RANKING_TEMPLATE, check_template, ranking_text
from mmalign.methods.registry import method
from mmalign.methods.training import BuildContext, TrainingParts, describe
from mmalign.training.experience import DatasetExperience
from mmalign.training.objective import Supervised
from mmalign.training.options import TrainOptions
from text_llm.preference.reward_model import RewardEncoding


class RankingModelOptions(TrainOptions):
    """Options of pairwise ranking models."""

    pair_fields: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
    """Samples that every data row holds, for checks before a run."""
    template: str = RANKING_TEMPLATE
    """Text of a comparison, with ``{prompt}``, ``{first}`` and ``{second}``; it is stored with the model."""
    order: Literal["random", "both"] = "random"
    """Which response comes first: a fair coin per row, or both orders of every row (twice the rows)."""
    encoding: RewardEncoding = RewardEncoding()
    """Tokenisation, masks and truncation. A comparison that is cut loses its second response, so those are dropped."""

    def model_post_init(self, context: object, /) -> None:
        """Refuse values without a meaning."""
        super().model_post_init(context)
        check_template(self.template)


def comparisons(
    rows: Sequence[Mapping[str, Any]], *, seed: int, template: str = RANKING_TEMPLATE, order: str = "random",
) -> Any:
    """Rows with ``prompt``, ``chosen``, ``rejected`` as rows to be learned: the comparison, and ``" A"`` or ``" B"``.

    The coin of a row depends on ``seed`` and its place alone. Rows whose responses are equal are left out. A
    ``datasets.Dataset`` stays on disk. Raises DataError when a column is missing.
    """
    names = list(getattr(rows, "column_names", None) or rows[0])
    require_columns(names, ("chosen", "rejected"), purpose="a ranking model")

    def one(row: Mapping[str, Any], flip: bool) -> dict[str, Any]:
        first, second = (row["rejected"], row["chosen"]) if flip else (row["chosen"], row["rejected"])
        text = ranking_text(row["prompt"], first, second, template=template)
        return {"prompt": text, "completion": LABELS[int(flip)], "id": f"{row.get('id', '')}-{'ba' if flip else 'ab'}"}

    def several(batch: Mapping[str, Sequence[Any]], places: Sequence[int]) -> dict[str, list[Any]]:
        made: dict[str, list[Any]] = {"prompt": [], "completion": [], "id": []}
        for at, place in enumerate(places):
            row = split_implicit_prompt({name: batch[name][at] for name in batch}, ("chosen", "rejected"))
            if row["chosen"] == row["rejected"]:
                continue
            coin = bool(derive_seed(seed, "ranking", "flip", place) & 1)
            flips = (False, True) if order == "both" else (coin,)
            for flip in flips:
                for name, value in one(row, flip).items():
                    made[name].append(value)
        return made

    if hasattr(rows, "map"):
        return rows.map(several, with_indices=True, batched=True, remove_columns=names, desc="writing comparisons")
    made = several({name: [row.get(name) for row in rows] for name in names}, range(len(rows)))
    return [dict(zip(made, values, strict=True)) for values in zip(*made.values(), strict=True)]


@method("ranking_model", options=RankingModelOptions, modality="text", paper="Liu et al., 2023, arXiv 2309.06657",
        aliases=("pairwise_ranking",))
def ranking_model(options: RankingModelOptions, context: BuildContext) -> TrainingParts:
    """A language model that reads a prompt with two responses and answers which is better."""
    policy = context.policy(options.model, encoding=options.encoding)
    pairs = context.rows(options.data)
    rows = comparisons(pairs, seed=context.seed, template=options.template, order=options.order)
    equal = len(pairs) - len(rows) // (2 if options.order == "both" else 1)
    if equal:
        context.say(f"data: {equal} of {len(pairs)} rows dropped (chosen and rejected are identical)")
    examples, report = policy.prepare_dataset(rows)
    context.say(describe(report))
    experience = DatasetExperience(policy, examples, context.shape, seed=context.seed, rank=context.state.rank)
    return TrainingParts(policy, Supervised(policy), experience, rows=len(examples),
                         provenance={"ranking_template": options.template})
