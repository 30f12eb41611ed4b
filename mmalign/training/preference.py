"""The preference objective: any row of the pair-loss table, on any policy that scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmalign.core.logprobs import ActionScores, sequence_log_prob
from mmalign.core.preference import PREFERENCE_LOSSES, PreferenceLoss
from mmalign.core.reduce import count
from mmalign.core.supervised import SUPERVISED_LOSSES
from mmalign.data.rows import Rows
from mmalign.errors import ConfigError
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
    supervised_terms,
    supervised_wants,
)


class Preference(PolicyObjective):
    """Weighted pair losses on (chosen, rejected), and supervised terms ``on`` one of a row's samples.

    Scores of text are sums (or means, where the loss's row says so) of token log-probs; scores of a diffusion policy
    are ``-scale * denoising error`` at a timestep and noise shared by chosen, rejected and reference. The losses are
    the same functions either way.
    """

    coupling: Coupling = "none"

    def __init__(self, policy: Policy, losses: Sequence[LossTerm], *, reference: Scorer | None = None) -> None:
        self.policy, self.losses, self.reference = policy, list(losses), reference
        self.pairs: list[tuple[LossTerm, PreferenceLoss]] = []
        self.supervised: list[LossTerm] = []
        for term in self.losses:
            if term.name in PREFERENCE_LOSSES:
                self.pairs.append((term, PREFERENCE_LOSSES.get(term.name)))
            elif term.name in SUPERVISED_LOSSES:
                self.supervised.append(term)
            else:
                PREFERENCE_LOSSES.get(term.name)  # raises, naming the nearest
        for term, row in self.pairs:
            if row.coupling == "update":
                self.coupling = "update"
            if row.reference and reference is None:
                raise ConfigError(f"loss {term.name!r} compares with a reference; set reference.kind (not none), or use a "
                                  "reference-free loss (simpo, cpo, slic, odds_ratio)")
        self.needs_reference = any(row.reference for _, row in self.pairs)
        self.fields = tuple(dict.fromkeys(
            [field for _, row in self.pairs for field in ("chosen", "rejected", "gold", "generated")
             if any(name.removeprefix("ref_").startswith(f"{field}_") for name in row.inputs)]
            + [term.on or "chosen" for term in self.supervised]
        ))

    def sample_rows(self, rows: Rows) -> Rows:
        """The chosen sample: its shape decides the shared noise."""
        return rows.field(self.fields[0])

    def counts(self, update: UpdateBatch) -> dict[str, float]:
        """Pairs, and tokens of the supervised samples."""
        rows = update.parts[self.part]
        counts = {term.name: float(len(rows)) for term, _ in self.pairs}
        for term in self.supervised:
            field = term.on or "chosen"
            counts[_supervised_name(term)] = count(self.policy.action_mask(rows.field(field)), how=term.reduction)
        return counts

    def loss(self, micro: UpdateBatch, shared: dict[str, Any], state: TrainState) -> tuple[list[Term], Metrics]:
        """Terms of one micro-batch: one forward over all samples, and one of the reference."""
        rows = micro.parts[self.part]
        draw = micro.draws.get(self.part)
        scores = self._scores(self.policy, rows, draw, want=supervised_wants(self.supervised))
        reference = self._reference_scores(rows, draw) if self.needs_reference else {}
        terms: list[Term] = []
        metrics: Metrics = {}
        keep = torch.ones(len(rows), dtype=torch.bool, device=next(iter(scores.values())).logp.device)
        for term, row in self.pairs:
            inputs = self._inputs(row, scores, reference, rows)
            values = row.function(**{name: inputs[name] for name in row.inputs}, **term.arguments)
            terms.append(Term(term.name, values, keep, "seq_mean_token_mean", term.weight))
            if not metrics:
                metrics = self._metrics(term, row, scores, reference)
        for term in self.supervised:
            field = term.on or "chosen"
            terms += supervised_terms([_renamed(term, field)], scores[field])
        return terms, metrics

    def _scores(self, scorer: Scorer, rows: Rows, draw: Draw | None, want: Sequence[str] = ()) -> dict[str, ActionScores]:
        blocks = Rows.concat([rows.field(field) for field in self.fields])
        joint = scorer.log_probs(blocks, draw=draw.repeat(len(self.fields)) if draw is not None else None, want=want)
        size = len(rows)
        return {field: joint.take(slice(i * size, (i + 1) * size)) for i, field in enumerate(self.fields)}

    def _reference_scores(self, rows: Rows, draw: Draw | None) -> dict[str, ActionScores]:
        assert self.reference is not None
        with torch.no_grad():
            return self._scores(self.reference, rows, draw)

    def _inputs(
        self, row: PreferenceLoss, scores: dict[str, ActionScores], reference: dict[str, ActionScores], rows: Rows,
    ) -> dict[str, Tensor]:
        inputs: dict[str, Tensor] = {}
        for field, score in scores.items():
            value, _ = sequence_log_prob(score.logp, score.mask, reduce=row.logratio)
            inputs[f"{field}_logp"] = value
            if reference:
                base, _ = sequence_log_prob(reference[field].logp, reference[field].mask, reduce=row.logratio)
                inputs[f"ref_{field}_logp"] = base
                inputs[f"{field}_logratio"] = value - base
            else:
                inputs[f"{field}_logratio"] = value
        device = next(iter(inputs.values())).device
        for name in row.inputs:
            if name not in inputs:
                if name not in rows:
                    raise ConfigError(f"loss {row.name!r} needs the data column {name!r}; columns are {', '.join(rows.columns)}")
                inputs[name] = torch.as_tensor(rows[name], dtype=torch.float32, device=device)
        return inputs

    def _metrics(
        self, term: LossTerm, row: PreferenceLoss, scores: dict[str, ActionScores], reference: dict[str, ActionScores],
    ) -> Metrics:
        with torch.no_grad():
            beta = float(term.arguments.get("beta", row.default_beta))
            sums = {f: sequence_log_prob(s.logp, s.mask, reduce=row.logratio)[0] for f, s in scores.items()}
            bases = {f: sequence_log_prob(s.logp, s.mask, reduce=row.logratio)[0] for f, s in reference.items()}
            ratios = {f: beta * (value - bases[f]) if bases else beta * value for f, value in sums.items()}
            metrics: Metrics = {f"logp/{field}": Mean.of(value) for field, value in sums.items()}
            metrics |= {f"rewards/{field}": Mean.of(value) for field, value in ratios.items()}
            if "chosen" in ratios and "rejected" in ratios:
                margin = ratios["chosen"] - ratios["rejected"]
                metrics |= {"rewards/margin": Mean.of(margin), "accuracy": Mean.of((margin > 0).float())}
        return metrics


def _supervised_name(term: LossTerm) -> str:
    return f"{term.name}_{term.on or 'chosen'}"


def _renamed(term: LossTerm, field: str) -> LossTerm:
    return LossTerm(term.name, term.arguments, term.weight, term.reduction, field)
