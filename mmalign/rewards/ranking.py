"""Pairwise rankers: which of two responses is better, and what that says about one against a baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from mmalign.errors import ConfigError, RewardError
from mmalign.rewards.registry import reward

if TYPE_CHECKING:
    from mmalign.policies.causal_lm import CausalLMPolicy

CLAMP = 1e-6
"""Probabilities are kept in [CLAMP, 1 - CLAMP], so that no log-odds is infinite."""


@runtime_checkable
class PairwiseRanker(Protocol):
    """Anything that says how likely the first of two responses is the better one."""

    def preference(self, prompts: Sequence[Any], first: Sequence[Any], second: Sequence[Any]) -> Tensor:
        """``[B]`` probabilities in (0, 1) that ``first`` is preferred."""
        ...


class LanguageModelRanker:
    """``rho(x, y1, y2)``: the probability that a language model answers "A" rather than "B" to a comparison.

    A model trained by the method ``ranking_model``. The probability is normalised over the two answers, each scored
    with its end token, so what else the model might say does not count.

    Args:
        path: model folder (full or adapter) or hub id.
        template: text of a comparison; null takes the one stored with the model, else that of RSO.
        rows_per_forward: comparisons scored together.
        dtype: precision of the weights.
        device: where the model runs; null takes CUDA when there is one.
    """

    def __init__(
        self, path: str, *, template: str | None = None, rows_per_forward: int = 16,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32", device: str | None = None,
    ) -> None:
        from mmalign.data.ranking import check_template

        if rows_per_forward < 1:
            raise ConfigError(f"ranker: rows_per_forward={rows_per_forward} must be at least 1")
        self.path, self.rows_per_forward, self.dtype, self.device = path, rows_per_forward, dtype, device
        self._template = None if template is None else check_template(template, key="ranker.template")
        self._policy: CausalLMPolicy | None = None

    @property
    def policy(self) -> CausalLMPolicy:
        """The loaded model; loading waits for the first use."""
        if self._policy is None:
            from mmalign.data.chat import TextEncoding
            from mmalign.policies.loading import ModelOptions, load_policy

            policy: Any = load_policy(ModelOptions(path=self.path, dtype=self.dtype, device=self.device),
                                      encoding=TextEncoding(max_length=None, truncation="drop"))
            if policy.modality != "text":
                raise ConfigError(f"ranker.path: {self.path} is a {policy.modality} model; a language model is needed")
            policy.module.eval().requires_grad_(False)
            self._policy = policy
        return self._policy

    @property
    def template(self) -> str:
        """Text of a comparison."""
        if self._template is None:
            from mmalign.data.ranking import RANKING_TEMPLATE
            from mmalign.policies.loading import resolve_model_path
            from mmalign.policies.provenance import read_provenance

            record = read_provenance(resolve_model_path(self.path, key="ranker.path")) or {}
            self._template = str(record.get("ranking_template") or RANKING_TEMPLATE)
        return self._template

    def preference(self, prompts: Sequence[Any], first: Sequence[Any], second: Sequence[Any]) -> Tensor:
        """``[B]`` float64 probabilities that ``first`` is preferred; RewardError for a comparison beyond the window."""
        return self.log_odds(prompts, first, second).sigmoid()

    def log_odds(self, prompts: Sequence[Any], first: Sequence[Any], second: Sequence[Any]) -> Tensor:
        """``[B]`` float64 ``log rho / (1 - rho)``, exact where the probability itself has rounded to 0 or 1."""
        from mmalign.data.ranking import ranking_text

        texts = [ranking_text(*each, template=self.template) for each in zip(prompts, first, second, strict=True)]
        parts = [self._log_odds(texts[i : i + self.rows_per_forward]) for i in range(0, len(texts), self.rows_per_forward)]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    def _log_odds(self, texts: Sequence[str]) -> Tensor:
        from mmalign.data.chat import Dropped, TextEncoder
        from mmalign.data.ranking import LABELS

        policy = self.policy
        encoder, rows = TextEncoder(policy.tokenizer, policy.encoding), []
        for text in texts:
            for label in LABELS:
                row = encoder.encode({"prompt": text, "completion": label})
                if isinstance(row, Dropped) or (policy.window is not None and len(row["input_ids"]) > policy.window):
                    raise RewardError(f"a comparison does not fit into the ranker's window of {policy.window} tokens: "
                                      f"{text[:60]!r}...")
                rows.append(row)
        with torch.no_grad():
            logp, _ = policy.log_probs(policy.encode_rows(rows)).sequence()
        pairs = logp.double().cpu().view(-1, len(LABELS))
        return pairs[:, 0] - pairs[:, 1]


def log_odds(ranker: PairwiseRanker, prompts: Sequence[Any], first: Sequence[Any], second: Sequence[Any]) -> tuple[Tensor, int]:
    """``(logit rho [B] float64, how many were clamped to [CLAMP, 1 - CLAMP])``.

    Raises RewardError for probabilities that are no numbers, or outside [0, 1].
    """
    exact = getattr(ranker, "log_odds", None)
    if exact is not None:
        values = torch.as_tensor(exact(prompts, first, second), dtype=torch.float64)
    else:
        rho = torch.as_tensor(ranker.preference(prompts, first, second), dtype=torch.float64)
        if not bool(((rho >= 0) & (rho <= 1)).all()):
            raise RewardError(f"the ranker gave {rho[~((rho >= 0) & (rho <= 1))][:4].tolist()}; probabilities lie in [0, 1]")
        values = rho.logit()
    if values.shape != (len(prompts),) or bool(values.isnan().any()):
        raise RewardError(f"the ranker gave values of shape {tuple(values.shape)} (NaN: {int(values.isnan().sum())}) for "
                          f"{len(prompts)} comparisons")
    limit = float(torch.tensor(1 - CLAMP, dtype=torch.float64).logit())
    outside = values.abs() > limit
    return values.clamp(-limit, limit), int(outside.sum())


def pairwise_scores(
    ranker: PairwiseRanker, prompts: Sequence[Any], first: Sequence[Any], second: Sequence[Any], *, symmetrize: bool = True,
) -> tuple[Tensor, int]:
    """``(r [B] float64, clamped)`` with ``r = logit rho(x, y1, y2)``, or ``(logit rho(y1, y2) - logit rho(y2, y1)) / 2``.

    Averaging both orders takes out a liking for one place: equal responses give exactly 0.
    """
    values, clamped = log_odds(ranker, prompts, first, second)
    if symmetrize:
        other, more = log_odds(ranker, prompts, second, first)
        values, clamped = (values - other) / 2, clamped + more
    return values, clamped


@reward("pairwise_ranker", needs=("baseline",))
class PairwiseRankerReward:
    """``logit rho(x, y, y_b)``: the log-odds that a ranker prefers the completion to the answer in column ``baseline``.

    The pointwise reward of RSO (Liu et al. 2023, arXiv 2309.06657, section 3.2), averaged over both orders. The
    probability is clamped to [1e-6, 1 - 1e-6]; how often is logged as ``pairwise_ranker/clamped``.

    Args:
        path: model of the method ``ranking_model`` (see :class:`LanguageModelRanker`).
        symmetrize: average over both orders.
        template: text of a comparison; null takes the one stored with the model.
        rows_per_forward: comparisons scored together.
        dtype: precision of the weights.
        device: where the model runs.
        ranker: a :class:`PairwiseRanker` object instead of ``path`` (from Python).
    """

    def __init__(
        self, path: str = "", *, symmetrize: bool = True, template: str | None = None, rows_per_forward: int = 16,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32", device: str | None = None,
        ranker: PairwiseRanker | None = None,
    ) -> None:
        if (ranker is None) != bool(path):
            raise ConfigError("pairwise_ranker: give path (a model trained by ranking_model), or from Python a ranker object")
        self.symmetrize = symmetrize
        self.ranker: PairwiseRanker = ranker or LanguageModelRanker(
            path, template=template, rows_per_forward=rows_per_forward, dtype=dtype, device=device)
        self.clamped = 0
        """Probabilities clamped so far."""

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], baseline: Sequence[Any],
        log_metric: Callable[[str, float], None] | None = None, **columns: Any,
    ) -> list[float | None]:
        """One value per completion; None where the baseline is None."""
        known = [i for i, answer in enumerate(baseline) if answer is not None]
        values, clamped = pairwise_scores(
            self.ranker, [prompts[i] for i in known], [completions[i] for i in known], [baseline[i] for i in known],
            symmetrize=self.symmetrize)
        self.clamped += clamped
        if log_metric is not None:
            log_metric("pairwise_ranker/clamped", float(clamped))
        result: list[float | None] = [None] * len(completions)
        for i, value in zip(known, values.tolist(), strict=True):
            result[i] = value
        return result
