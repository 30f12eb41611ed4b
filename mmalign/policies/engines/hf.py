"""The in-process engine: decodes with the policy's own module, through the model's own forward.

A prompt is encoded once and its cache repeated for its ``n`` completions; the output head is applied to the last
position only; tokens are drawn by inverse CDF; rows that have ended leave the batch, and the batch ends with the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmalign.errors import ConfigError, DataError
from mmalign.policies.base import TextSampling
from mmalign.policies.engines.base import ENGINES, EngineHost, FinishReason, RolloutResult
from mmalign.policies.engines.cache import new_cache, select_rows
from mmalign.policies.engines.sampling import UniformStream, draw_tokens
from mmalign.policies.modules import evaluating, prompt_learning, unwrap

_COMPACT_BELOW = 0.75
"""Rows that have ended are dropped from the cache once no more than this share is left."""


@dataclass(frozen=True)
class _Job:
    """Some of the completions of one prompt."""

    prompt: int
    first: int
    copies: int


@ENGINES.register("hf")
class HFEngine:
    """Samples in this process with whatever transformers model the policy holds."""

    name = "hf"

    def __init__(self, host: EngineHost) -> None:
        self.host = host

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: TextSampling, generator: torch.Generator,
    ) -> list[RolloutResult]:
        """See :class:`~mmalign.policies.engines.base.RolloutEngine`.

        Completions are also limited by the model's window. Raises DataError for an empty prompt or one that leaves no
        room in the window.
        """
        self._check(prompts, n)
        uniforms = UniformStream(len(prompts) * n, generator)
        results: dict[int, RolloutResult] = {}
        inner = unwrap(self.host.scores.module)
        with evaluating(inner):
            for jobs in self._chunks(prompts, n, sampling.rows_per_forward):
                rows = torch.tensor([job.prompt * n + job.first + copy for job in jobs for copy in range(job.copies)])
                chunk = _Chunk(self.host, [list(prompts[job.prompt]) for job in jobs], [job.copies for job in jobs], sampling)
                for number, result in zip(rows.tolist(), chunk.run(rows, uniforms), strict=True):
                    results[number] = result
        return [results[number] for number in range(len(prompts) * n)]

    def _check(self, prompts: Sequence[Sequence[int]], n: int) -> None:
        if n < 1:
            raise ConfigError(f"completions per prompt must be at least 1, not {n}")
        window = self.host.window
        for number, prompt in enumerate(prompts):
            if not len(prompt):
                raise DataError(f"prompt {number} has no tokens; a model without a start token needs at least one")
            if window is not None and len(prompt) >= window:
                raise DataError(f"prompt {number} has {len(prompt)} tokens, which leaves no room for a completion in the "
                                f"model's window of {window}; shorten or drop it")

    def _chunks(self, prompts: Sequence[Sequence[int]], n: int, rows: int) -> list[list[_Job]]:
        """Prompts of similar length together, so that little is padded; equal length under prompt learning."""
        same_length = prompt_learning(self.host.scores.module) is not None
        chunks: list[list[_Job]] = []
        used = 0
        for prompt in sorted(range(len(prompts)), key=lambda index: len(prompts[index])):
            for first in range(0, n, rows):
                job = _Job(prompt, first, min(rows, n - first))
                previous = chunks[-1][-1] if chunks else None
                new = previous is None or used + job.copies > rows
                if new or (same_length and len(prompts[previous.prompt]) != len(prompts[prompt])):  # type: ignore[union-attr]
                    chunks.append([])
                    used = 0
                chunks[-1].append(job)
                used += job.copies
        return chunks


class _Chunk:
    """Rows decoded together."""

    def __init__(self, host: EngineHost, prompts: list[list[int]], copies: list[int], sampling: TextSampling) -> None:
        self.host, self.sampling = host, sampling
        self.prompts, self.copies = prompts, copies
        scores = host.scores
        self.model, self.module, self.device = scores.model, unwrap(scores.module), scores.device
        self.learning = prompt_learning(self.module)
        self.names = scores.forward_names
        known = [name for name in ("cache", "past_key_values") if name in self.names]  # the newer name first
        if not known:
            raise ConfigError(f"{type(self.model).__name__} takes no key-value cache, which the hf rollout engine needs")
        self.cache_name = known[0]
        self.cache: Any = None
        self.lengths = torch.tensor([len(prompt) for prompt in prompts])
        window = host.window or 10**9
        longest = int(self.lengths.max())
        self.limits = (window - self.lengths).clamp(max=sampling.max_new_tokens).repeat_interleave(torch.tensor(copies))
        self.span = longest + int(self.limits.max())
        self.ragged = bool((self.lengths != longest).any())
        # A 4D mask is taken as it is; a 2D one is expanded by the model at every step, windows included.
        self.expanded_masks = scores.takes_masks(self.span) if self.ragged else False
        self.stop_ids = torch.tensor(sorted(host.stop_ids), device=self.device)
        self.last_position = window - 1
        # A token holds at least one byte, so this many hold the longest stop string.
        self.stop_tail = max((len(text.encode()) for text in sampling.stop), default=0) + 4

    # -- forward passes --------------------------------------------------------------------------------------------

    def _prefill(self) -> Tensor:
        """``[Q, V]`` logits after each prompt; the cache then holds every prompt once."""
        longest = int(self.lengths.max())
        pads = longest - self.lengths
        ids = torch.zeros(len(self.prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(self.prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        visible = torch.arange(self.span) >= pads[:, None]
        inputs: dict[str, Any] = {"input_ids": ids.to(self.device)}
        if self.ragged:
            inputs["attention_mask"] = visible[:, :longest].to(self.device, torch.long)
        if self.learning is None:
            self.cache = inputs[self.cache_name] = new_cache(self.model.config)
            if "position_ids" in self.names:
                inputs["position_ids"] = (torch.arange(longest) - pads[:, None]).clamp(min=0).to(self.device)
        output = self._call(self.module, inputs)
        if self.learning is not None:  # peft builds the cache of a prefix itself
            self.cache = getattr(output, self.cache_name)
        repeats = torch.tensor(self.copies)
        self.visible = visible.repeat_interleave(repeats, 0).to(self.device)
        start = self.lengths + (self.learning.num_virtual_tokens if self.learning else 0)
        self.position = start.repeat_interleave(repeats)[:, None].to(self.device)
        self.length = longest
        return output.logits[:, -1]

    def _expand(self, logits: Tensor) -> Tensor:
        index = torch.arange(len(self.prompts)).repeat_interleave(torch.tensor(self.copies)).to(self.device)
        if len(index) != len(self.prompts):
            select_rows(self.cache, index)
        return logits[index].float()

    def _step(self, tokens: Tensor) -> Tensor:
        """``[R, V]`` logits after one more token per row."""
        inputs: dict[str, Any] = {"input_ids": tokens[:, None], self.cache_name: self.cache}
        if "position_ids" in self.names:
            inputs["position_ids"] = self.position
        self.length += 1
        if self.ragged:
            visible, scores = self.visible[:, : self.length], self.host.scores
            expanded = self.expanded_masks
            inputs["attention_mask"] = scores.attention_bias(visible[:, None, None]) if expanded else visible.long()
        output = self._call(self.module if self.learning is None else self.model, inputs)
        # Rows that have ended may still be in the batch; learned position tables end with the window.
        self.position = (self.position + 1).clamp(max=self.last_position)
        return output.logits[:, -1].float()

    def _call(self, module: Any, inputs: dict[str, Any]) -> Any:
        if "logits_to_keep" in self.names:
            inputs["logits_to_keep"] = 1
        return module(**inputs, use_cache=True)

    # -- the loop --------------------------------------------------------------------------------------------------

    def run(self, rows: Tensor, uniforms: UniformStream) -> list[RolloutResult]:
        """Decode; ``rows[R]`` are the numbers of the rows in the whole call."""
        sampling, count = self.sampling, len(rows)
        logits = self._expand(self._prefill())
        tokens_seen = torch.zeros(count, int(self.limits.max()), dtype=torch.long, device=self.device)
        logps = torch.zeros_like(tokens_seen, dtype=torch.float32)
        ends, stopped = self.limits.clone(), torch.zeros(count, dtype=torch.bool)
        at = torch.arange(count)  # rows still in the batch
        alive = torch.ones(count, dtype=torch.bool)
        for step in range(tokens_seen.shape[1]):
            if step < sampling.min_new_tokens:
                logits[:, self.stop_ids] = -torch.inf
            tokens, logp = draw_tokens(logits, uniforms.at(step)[rows[at]].to(self.device), sampling)
            where = at.to(self.device)
            tokens_seen[where, step], logps[where, step] = tokens, logp
            ended = torch.isin(tokens, self.stop_ids).cpu()
            if sampling.stop and step + 1 >= sampling.min_new_tokens:
                ended |= self._stopped_by_text(tokens_seen, at, alive & ~ended, step + 1)
            now = alive & ended
            ends[at[now]], stopped[at[now]] = step + 1, True
            alive &= ~ended & (ends[at] > step + 1)
            left = int(alive.sum())
            if not left:
                break
            if left <= _COMPACT_BELOW * len(at):
                tokens = tokens[self._compact(alive)]
                at, alive = at[alive], torch.ones(left, dtype=torch.bool)
            logits = self._step(tokens)
        return self._results(tokens_seen, logps, ends, stopped)

    def _compact(self, alive: Tensor) -> Tensor:
        index = alive.nonzero().flatten().to(self.device)
        select_rows(self.cache, index)
        self.position, self.visible = self.position[index], self.visible[index]
        return index

    def _stopped_by_text(self, tokens: Tensor, at: Tensor, open_rows: Tensor, size: int) -> Tensor:
        """Rows whose newest tokens complete a stop string."""
        found = torch.zeros(len(at), dtype=torch.bool)
        tail = tokens[:, max(0, size - self.stop_tail) : size].cpu()
        for row in open_rows.nonzero().flatten().tolist():
            text = self.host.tokenizer.decode(tail[at[row]].tolist(), skip_special_tokens=False)
            found[row] = any(stop in text for stop in self.sampling.stop)
        return found

    def _results(self, tokens: Tensor, logps: Tensor, ends: Tensor, stopped: Tensor) -> list[RolloutResult]:
        prompts = [prompt for prompt, copies in zip(self.prompts, self.copies, strict=True) for _ in range(copies)]
        results = []
        for row, (prompt, size) in enumerate(zip(prompts, ends.tolist(), strict=True)):
            reason: FinishReason = "stop" if stopped[row] else "length"
            results.append(RolloutResult(
                prompt, tokens[row, :size].tolist(), logps[row, :size].tolist(), reason, self.host.weight_version,
                "raw" if self.sampling.temperature == 0 else "processed",
            ))
        return results


