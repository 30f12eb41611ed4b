"""Trying a reward on three samples before a run depends on it (``mmalign check REWARD``)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmalign.errors import ConfigError, RewardError
from mmalign.rewards.base import RewardSet
from mmalign.rewards.inputs import NOT_COLUMNS
from mmalign.rewards.text import completion_text

_PROMPTS = ("What is 2 + 3?", "What is 2 + 3?", "What is 7 - 4?")
_COMPLETIONS = ("<think>2 + 3 = 5</think>\n<answer>5</answer>", "The answer is 6.", "")
_ANSWERS = ("5", "5", "3")
_CAPTIONS = ("a red circle on the left", "two blue squares", "a green star")


@dataclass
class RewardCheck:
    """What :func:`check_reward` found."""

    name: str
    """Display name of the reward."""
    form: str
    """Form of the samples it worked on: "given", "text", "messages" or "images"."""
    values: list[float | None]
    """Its value on each sample."""
    seconds: float
    """Time of the first call."""
    asks: tuple[str, ...]
    """Keywords its signature names."""
    problems: list[str] = field(default_factory=list)
    """What would stop a run."""
    warnings: list[str] = field(default_factory=list)
    """What a run would survive but should be known."""

    @property
    def ok(self) -> bool:
        """Whether a run could use the reward."""
        return not self.problems

    def __str__(self) -> str:
        values = ", ".join("None" if v is None else f"{v:.4g}" for v in self.values) or "no value"
        lines = [f"{'ok' if self.ok else 'FAILED'}  reward {self.name}: {values} on {self.form} samples, {self.seconds:.3f} s"]
        lines += [f"  problem: {text}" for text in self.problems] + [f"  note: {text}" for text in self.warnings]
        return "\n".join(lines)


def check_reward(
    reward: Any, samples: Sequence[Mapping[str, Any]] | None = None, *, config_folder: Path | None = None,
) -> RewardCheck:
    """Call ``reward`` on the first three ``samples`` and say what would go wrong in a run.

    ``reward`` is a name, options, or a callable. ``samples`` are data rows; their ``completion``, ``answer`` or
    ``gold`` stands in for what a policy would produce. Without samples, three arithmetic questions are tried as text and
    as messages (one completion is empty, as happens early in training), then three pictures of the shapes asset, the
    last of which does not fit its caption.
    Never raises for a failing reward; ConfigError for one that cannot be found.
    """
    rewards = RewardSet([reward], config_folder=config_folder)
    bound, name = rewards.rewards[0], rewards.names[0]
    asks = (*bound.asked.required, *bound.asked.optional)
    trials = _given(samples) if samples else _stand_ins()
    problems: list[str] = []
    silent: RewardCheck | None = None
    try:
        for form, (prompts, completions, columns) in trials.items():
            started = time.perf_counter()
            try:
                values = rewards.score_samples(prompts, completions, **columns)[:, 0]
            except (RewardError, ConfigError) as error:
                problems.append(str(error) if samples else f"{form} samples: {error}")
                continue
            seconds = time.perf_counter() - started
            warnings = _observe(rewards, prompts, completions, columns, values)
            listed = [None if v != v else v for v in values.tolist()]
            found = RewardCheck(name, form, listed, seconds, asks, [], warnings)
            if any(value is not None for value in listed):
                return found
            silent = silent or found  # it does not apply to this form; another one may suit it
    finally:
        rewards.close()
    if silent is not None:
        return silent
    return RewardCheck(name, "given" if samples else "any", [], 0.0, asks, problems)


def _observe(
    rewards: RewardSet, prompts: list[Any], completions: list[Any], columns: dict[str, list[Any]], values: torch.Tensor,
) -> list[str]:
    warnings = []
    if values.isnan().all():
        warnings.append("None for every sample: it would never apply to data like these")
    elif len(values) > 1 and bool((values == values[0]).all()):
        warnings.append("the same value for every sample; a group without spread teaches a policy nothing")
    try:
        again = rewards.score_samples(prompts, completions, **columns)[:, 0]
        if not torch.equal(values.nan_to_num(-1e30), again.nan_to_num(-1e30)):
            warnings.append("a second call gave other values: it is not deterministic, so a run cannot be repeated")
            return warnings
        alone = torch.stack([
            rewards.score_samples([p], [c], **{n: [v[i]] for n, v in columns.items()})[0, 0]
            for i, (p, c) in enumerate(zip(prompts, completions, strict=True))
        ])
        if not torch.allclose(values, alone, atol=1e-4, rtol=1e-4, equal_nan=True):
            warnings.append("a sample scored alone gets another value than in the batch: do not cache this reward")
    except RewardError as error:
        warnings.append(f"works on the batch, but not again or not on a single sample: {error}")
    return warnings


Trial = tuple[list[Any], list[Any], dict[str, list[Any]]]


def _given(samples: Sequence[Mapping[str, Any]]) -> dict[str, Trial]:
    rows = [dict(row) for row in samples[:3]]
    names = [n for n in rows[0] if all(n in row for row in rows)]
    source = next((n for n in ("completion", "gold", "answer", "chosen", "image") if n in names), None)
    if "prompt" not in names or source is None:
        raise ConfigError(
            f"a reward needs a prompt and a completion to be tried on; the rows have {', '.join(names)}. Rows with "
            "prompt and one of completion, gold, answer, chosen or image are needed"
        )
    columns = {n: [row[n] for row in rows] for n in names if n not in NOT_COLUMNS}
    if "completion_ids" not in columns and isinstance(rows[0][source], (str, list)):
        # No tokenizer is known here; a token per character is what length rewards need to be tried.
        columns["completion_ids"] = [list(range(len(completion_text(row[source])))) for row in rows]
    return {"given": ([row["prompt"] for row in rows], [row[source] for row in rows], columns)}


def _stand_ins() -> dict[str, Trial]:
    columns: dict[str, list[Any]] = {
        "answer": list(_ANSWERS), "completion_ids": [list(range(len(text))) for text in _COMPLETIONS],
    }
    messages = [[{"role": "user", "content": text}] for text in _PROMPTS]
    replies = [[{"role": "assistant", "content": text}] for text in _COMPLETIONS]
    trials: dict[str, Trial] = {
        "text": (list(_PROMPTS), list(_COMPLETIONS), columns), "messages": (list(messages), list(replies), columns),
    }
    from mmalign.data.shapes import render, sample_scene

    generator = torch.Generator().manual_seed(0)
    shown = (*_CAPTIONS[:2], _CAPTIONS[0])  # the third picture is not what its caption says
    pictures = [render(sample_scene(generator, caption), 32) for caption in shown]
    trials["images"] = (list(_CAPTIONS), list(pictures), {})
    return trials
