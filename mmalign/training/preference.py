"""The preference objective: any row of the pair-loss table or any point loss, on any policy that scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import AliasChoices, Field
from torch import Tensor

from mmalign.config import Options
from mmalign.core.divergence import f_divergence_score
from mmalign.core.logprobs import ActionScores, paired_head_length, sequence_log_prob
from mmalign.core.preference import PREFERENCE_LOSSES, PreferenceLoss, pointwise_row, wpo_weights
from mmalign.core.reduce import count
from mmalign.core.supervised import SUPERVISED_LOSSES
from mmalign.data.rows import FIELDS, Rows
from mmalign.errors import ConfigError, DataError
from mmalign.policies.base import Draw, Policy, Scorer
from mmalign.training.objective import (
    Coupling,
    LossTerm,
    Mean,
    Metrics,
    PolicyObjective,
    Term,
    TrainState,
    UpdateBatch,
    sum_over_ranks,
    supervised_terms,
    supervised_wants,
)

SAMPLE = "sample"
"""The only sample of a row that holds one; the other names are those of :data:`mmalign.data.rows.FIELDS`."""


class PairOptions(Options):
    """What changes the scores or the weight of a pair, whatever its loss."""

    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = Field(
        default="reverse_kl", validation_alias=AliasChoices("divergence", "f_divergence_type"))
    """f-divergence of the constraint: log-ratios u become f'(exp u). Only for losses of the difference of log-ratios,
    in which the partition function cancels (Wang et al., 2023, arXiv 2309.16240)."""
    divergence_alpha: float = Field(
        default=0.5, validation_alias=AliasChoices("divergence_alpha", "f_alpha_divergence_coef"))
    """Order of the alpha divergence."""
    tail_weight: float = Field(default=1.0, validation_alias=AliasChoices("tail_weight", "ld_alpha"))
    """Weight of the tokens of the longer sample beyond the length of the shorter one (LD-DPO, Liu et al., 2024, arXiv
    2409.06411): 1 changes nothing, 0 drops them."""
    weights: Literal["none", "column", "wpo"] = "none"
    """Weight of a row: 1; the data column ``weight``; or the policy's own probability of its samples (WPO, Zhou et al.,
    2024, arXiv 2406.11827)."""
    margin: bool = False
    """Subtract the data column ``margin`` (in units of beta times the log-ratio) from every pair's margin."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse values without a meaning."""
        if not 0 <= self.tail_weight <= 1:
            raise ValueError(f"tail_weight must lie in [0, 1], not {self.tail_weight}")


def loss_row(term: LossTerm, *, unpaired: bool) -> PreferenceLoss | None:
    """The row of a term in the pair table, or among the point losses; None for a supervised term. Raises ValueError."""
    if term.name in SUPERVISED_LOSSES:
        return None
    return pointwise_row(term.name) if unpaired else PREFERENCE_LOSSES.get(term.name)


def sample_fields(losses: Sequence[LossTerm], *, unpaired: bool) -> tuple[str, ...]:
    """The samples of a row that the terms of non-zero weight read: chosen, rejected, ..., or :data:`SAMPLE`."""
    found: list[str] = []
    for term in losses:
        row = loss_row(term, unpaired=unpaired)
        if term.weight == 0:
            continue
        if row is None:
            found.append(term.on or (SAMPLE if unpaired else "chosen"))
        else:
            found += [field for field in (*FIELDS, SAMPLE)
                      if any(name.removeprefix("ref_").startswith(f"{field}_") for name in row.inputs)]
    order = [*FIELDS, SAMPLE]
    return tuple(sorted(dict.fromkeys(found), key=lambda field: order.index(field) if field in order else len(order)))


class Preference(PolicyObjective):
    """Weighted preference losses, and supervised terms ``on`` one of a row's samples.

    Scores of text are sums (or means, where the loss's row says so) of token log-probs; scores of a diffusion policy
    are ``-scale * denoising error`` at a timestep and noise shared by chosen, rejected and reference. The losses are
    the same functions either way.

    ``unpaired`` reads the names as point losses on rows with one sample and a ``label``. Statistics of the whole update
    (KTO's offset, BCO's running shift) are taken without gradient before it, ``rows_per_forward`` rows at a time. Terms
    of weight 0 are left out: neither they nor the samples that only they read are computed.
    """

    coupling: Coupling = "none"

    def __init__(
        self, policy: Policy, losses: Sequence[LossTerm], *, reference: Scorer | None = None,
        pairs: PairOptions | None = None, unpaired: bool = False, rows_per_forward: int | None = None,
    ) -> None:
        self.policy, self.reference, self.options = policy, reference, pairs or PairOptions()
        self.losses = [term for term in losses if term.weight != 0]
        self.rows_per_forward = rows_per_forward
        self.pairs: list[tuple[LossTerm, PreferenceLoss]] = []
        self.supervised: list[LossTerm] = []
        for term in self.losses:
            row = loss_row(term, unpaired=unpaired)
            if row is None:
                self.supervised.append(term)
            else:
                self.pairs.append((term, row))
        if not self.losses:
            raise ConfigError("losses: no term has a weight other than 0, so nothing would be learned")
        self._check(reference)
        self.needs_reference = any(row.reference for _, row in self.pairs)
        self.fields = sample_fields(self.losses, unpaired=unpaired)
        self.running: dict[str, tuple[float, float]] = {}
        """Sum and number of everything a running mean has seen, by term."""

    def _check(self, reference: Scorer | None) -> None:
        for term, row in self.pairs:
            if row.coupling == "update":
                self.coupling = "update"
            if row.reference and reference is None:
                raise ConfigError(f"loss {term.name!r} compares with a reference; set reference.kind (not none), or use a "
                                  "reference-free loss (simpo, cpo, slic, odds_ratio)")
            if self.options.divergence != "reverse_kl" and not (row.difference_only and row.reference):
                raise ConfigError(f"pairs.divergence: {self.options.divergence} needs a loss of the difference of log-ratios to "
                                  f"a reference, and {term.name!r} is not one; use reverse_kl")
            if self.options.margin and not (row.difference_only or "margin" in row.inputs):
                raise ConfigError(f"pairs.margin: loss {term.name!r} does not depend on the difference of two scores alone, so "
                                  "a margin has no place in it; set pairs.margin: false")
            if self.options.weights == "wpo" and row.coupling == "update":
                raise ConfigError(f"pairs.weights: loss {term.name!r} sorts the batch, so the weights of wpo would belong to "
                                  "other pairs; use weights: none")

    @property
    def prepared_fields(self) -> tuple[str, ...]:
        """The samples that data rows must hold, as ``prepare_dataset`` wants them."""
        return tuple(field for field in self.fields if field != SAMPLE)

    @property
    def columns(self) -> tuple[str, ...]:
        """Further data columns that the losses read."""
        read = [name for _, row in self.pairs for name in row.inputs if name in ("win_prob", "label", "teacher_logp", "margin")]
        read += ["margin"] * self.options.margin + ["weight"] * (self.options.weights == "column")
        return tuple(dict.fromkeys(read))

    def sample_rows(self, rows: Rows) -> Rows:
        """The first sample: its shape decides the shared noise."""
        return _samples(rows, self.fields[0])

    def blocks(self, rows: Rows, fields: Sequence[str] = ()) -> Rows:
        """The samples of all ``fields`` (default: all that the losses read), one block of rows after the other."""
        return Rows.concat([_samples(rows, field) for field in fields or self.fields])

    def counts(self, update: UpdateBatch) -> dict[str, float]:
        """Pairs, and tokens of the supervised samples."""
        rows = update.parts[self.part]
        counts = {term.name: float(len(rows)) for term, _ in self.pairs}
        for term in self.supervised:
            field = term.on or self.fields[0]
            counts[_supervised_name(term, field)] = count(self.policy.action_mask(_samples(rows, field)), how=term.reduction)
        return counts

    # -- statistics of the update ------------------------------------------------------------------------------------

    def prepare(self, update: UpdateBatch, state: TrainState) -> dict[str, Any]:
        """The shared draw, and the statistics that the losses ask for."""
        shared = super().prepare(update, state)
        for term, row in self.pairs:
            for name in row.prepared:
                value = self._offset(update) if name == "kl" else self._running_mean(term, row, update)
                shared[f"{name}/{term.name}"] = value
        return shared

    def _offset(self, update: UpdateBatch) -> float:
        """KTO's z: mean log-ratio of completions under the wrong prompt (over ranks), or of the rows where none can be built."""
        rows, draw = update.parts[self.part], update.draws.get(self.part)
        mismatched = getattr(self.policy, "mismatched_rows", None)
        if mismatched is not None:
            if len(rows) == 1:
                raise DataError("batch.examples_per_update: KTO pairs every prompt with the completion of another row, so an "
                                "update needs at least 2 rows per process")
            rows = mismatched(rows)
        total = torch.zeros(2, dtype=torch.float64)
        for part, noise in self._parts(rows, draw):
            ratios = self._ratios(part, noise, (SAMPLE,), "sum")[SAMPLE]
            total += torch.tensor([float(ratios.sum()), float(len(ratios))], dtype=torch.float64)
        total = sum_over_ranks(total)
        return max(0.0, float(total[0] / total[1].clamp(min=1)))

    def _running_mean(self, term: LossTerm, row: PreferenceLoss, update: UpdateBatch) -> float:
        """BCO's shift: the mean of ``beta u`` over everything seen, this update included."""
        beta = float(term.arguments.get("beta", row.default_beta))
        fields = tuple(field for field in self.fields if f"{field}_logratio" in row.inputs)
        seen = torch.zeros(2, dtype=torch.float64)
        for part, noise in self._parts(update.parts[self.part], update.draws.get(self.part)):
            for ratios in self._ratios(part, noise, fields, row.logratio).values():
                seen += torch.tensor([beta * float(ratios.sum()), float(len(ratios))], dtype=torch.float64)
        seen = sum_over_ranks(seen)
        before = self.running.get(term.name, (0.0, 0.0))
        total, number = before[0] + float(seen[0]), before[1] + float(seen[1])
        self.running[term.name] = (total, number)
        return total / max(number, 1.0)

    def _parts(self, rows: Rows, draw: Draw | None) -> Iterator[tuple[Rows, Draw | None]]:
        step = self.rows_per_forward or max(1, len(rows))
        for start in range(0, len(rows), step):
            index = torch.arange(start, min(start + step, len(rows)))
            yield rows.take(index), None if draw is None else draw.take(index)

    def _ratios(
        self, rows: Rows, draw: Draw | None, fields: Sequence[str], reduce: Literal["sum", "mean"],
    ) -> dict[str, Tensor]:
        with torch.no_grad():
            own = self._scores(self.policy, rows, draw, fields)
            base = self._scores(self.reference, rows, draw, fields) if self.reference is not None else {}
        ratios = {}
        for field, score in own.items():
            ratios[field] = sequence_log_prob(score.logp, score.mask, reduce=reduce)[0]
            if base:
                ratios[field] = ratios[field] - sequence_log_prob(base[field].logp, base[field].mask, reduce=reduce)[0]
        return ratios

    def state_dict(self) -> dict[str, Any]:
        """Running means."""
        return {"running": {name: list(pair) for name, pair in self.running.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.running = {name: (float(pair[0]), float(pair[1])) for name, pair in state.get("running", {}).items()}

    # -- the loss ----------------------------------------------------------------------------------------------------

    def loss(self, micro: UpdateBatch, shared: dict[str, Any], state: TrainState) -> tuple[list[Term], Metrics]:
        """Terms of one micro-batch: one forward over all samples, and one of the reference."""
        rows = micro.parts[self.part]
        draw = micro.draws.get(self.part)
        wants = supervised_wants(self.supervised) + (("sum_p2",) if self.options.weights == "wpo" else ())
        scores = self._scores(self.policy, rows, draw, self.fields, want=wants)
        reference: dict[str, ActionScores] = {}
        if self.needs_reference:
            assert self.reference is not None
            with torch.no_grad():
                reference = self._scores(self.reference, rows, draw, self.fields)
        device = next(iter(scores.values())).logp.device
        weight = self._row_weights(scores, rows, device)
        keep = torch.ones(len(rows), dtype=torch.bool, device=device)
        terms: list[Term] = []
        metrics: Metrics = {}
        for term, row in self.pairs:
            inputs = self._inputs(term, row, scores, reference, rows, shared)
            values = row.function(**{name: inputs[name] for name in row.inputs}, **term.arguments)
            if weight is not None:
                values = values * weight
            terms.append(Term(term.name, values, keep, "seq_mean_token_mean", term.weight))
            for name in row.prepared:
                metrics[name] = Mean(float(shared[f"{name}/{term.name}"]), 1.0)
            if len(terms) == 1:
                metrics |= self._metrics(term, row, scores, reference, rows)
        if weight is not None:
            metrics["row_weight"] = Mean.of(weight)
        for term in self.supervised:
            field = term.on or self.fields[0]
            entry = LossTerm(term.name, term.arguments, term.weight, term.reduction, None if field == SAMPLE else field)
            terms += supervised_terms([entry], scores[field])
        return terms, metrics

    def _scores(
        self, scorer: Scorer | None, rows: Rows, draw: Draw | None, fields: Sequence[str], want: Sequence[str] = (),
    ) -> dict[str, ActionScores]:
        assert scorer is not None
        blocks = self.blocks(rows, fields)
        joint = scorer.log_probs(blocks, draw=draw.repeat(len(fields)) if draw is not None else None, want=want)
        size = len(rows)
        return {field: joint.take(slice(i * size, (i + 1) * size)) for i, field in enumerate(fields)}

    def _sequence(self, scores: Mapping[str, ActionScores], field: str, reduce: Literal["sum", "mean"]) -> Tensor:
        score, options = scores[field], self.options
        if options.tail_weight == 1 or field not in ("chosen", "rejected"):
            return sequence_log_prob(score.logp, score.mask, reduce=reduce)[0]
        head = paired_head_length(scores["chosen"].mask, scores["rejected"].mask)
        return sequence_log_prob(score.logp, score.mask, reduce=reduce, tail_weight=options.tail_weight, head_length=head)[0]

    def _row_weights(self, scores: Mapping[str, ActionScores], rows: Rows, device: torch.device) -> Tensor | None:
        if self.options.weights == "none":
            return None
        if self.options.weights == "column":
            return self._column(rows, "weight", device, because="pairs.weights: column")
        judged = [field for field in self.fields if field in ("chosen", "rejected", SAMPLE)]
        return torch.stack([wpo_weights(scores[field]) for field in judged]).prod(0)

    def _column(self, rows: Rows, name: str, device: torch.device, *, because: str) -> Tensor:
        if name not in rows:
            raise ConfigError(f"{because} needs the data column {name!r}; columns are {', '.join(rows.columns)}")
        return torch.as_tensor(rows[name], dtype=torch.float32, device=device)

    def _inputs(
        self, term: LossTerm, row: PreferenceLoss, scores: dict[str, ActionScores], reference: dict[str, ActionScores],
        rows: Rows, shared: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        inputs: dict[str, Tensor] = {}
        for field in scores:
            value = self._sequence(scores, field, row.logratio)
            inputs[f"{field}_logp"] = inputs[f"{field}_logratio"] = value
            if row.reference and reference:
                base = self._sequence(reference, field, row.logratio)
                inputs[f"ref_{field}_logp"] = base
                inputs[f"{field}_logratio"] = self._divergence(value - base)
        device = next(iter(inputs.values())).device
        if self.options.margin and "margin" not in row.inputs:
            beta = float(term.arguments.get("beta", row.default_beta))
            upper = "chosen_logratio" if "chosen_logratio" in row.inputs else row.inputs[0]
            inputs[upper] = inputs[upper] - self._column(rows, "margin", device, because="pairs.margin") / beta
        for name in row.inputs:
            if name in row.prepared:
                inputs[name] = torch.full((len(rows),), float(shared[f"{name}/{term.name}"]), device=device)
            elif name not in inputs:
                inputs[name] = self._column(rows, name, device, because=f"loss {row.name!r}")
        return inputs

    def _divergence(self, logratio: Tensor) -> Tensor:
        if self.options.divergence == "reverse_kl":
            return logratio
        return f_divergence_score(logratio, kind=self.options.divergence, alpha=self.options.divergence_alpha)

    def _metrics(
        self, term: LossTerm, row: PreferenceLoss, scores: dict[str, ActionScores], reference: dict[str, ActionScores],
        rows: Rows,
    ) -> Metrics:
        with torch.no_grad():
            beta = float(term.arguments.get("beta", row.default_beta))
            sums = {field: self._sequence(scores, field, row.logratio) for field in scores}
            ratios = {
                field: beta * (value - self._sequence(reference, field, row.logratio)) if reference and row.reference
                else beta * value for field, value in sums.items()
            }
            metrics: Metrics = {f"logp/{field}": Mean.of(value) for field, value in sums.items()}
            if "label" in row.inputs:
                good = self._column(rows, "label", ratios[SAMPLE].device, because=f"loss {row.name!r}") > 0.5
                for name, mask in (("desirable", good), ("undesirable", ~good)):
                    metrics[f"rewards/{name}"] = Mean.of(ratios[SAMPLE], mask)
                return metrics
            metrics |= {f"rewards/{field}": Mean.of(value) for field, value in ratios.items()}
            if "chosen" in ratios and "rejected" in ratios:
                margin = ratios["chosen"] - ratios["rejected"]
                metrics |= {"rewards/margin": Mean.of(margin), "accuracy": Mean.of((margin > 0).float())}
                if term.arguments.get("gamma"):
                    metrics["margin_reached"] = Mean.of((margin > float(term.arguments["gamma"])).float())
        return metrics


def _samples(rows: Rows, field: str) -> Rows:
    return rows if field == SAMPLE else rows.field(field)


def _supervised_name(term: LossTerm, field: str) -> str:
    return term.name if field == SAMPLE else f"{term.name}_{field}"
