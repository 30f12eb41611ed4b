"""Trained reward models as rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mmalign.errors import ConfigError
from mmalign.rewards.registry import reward

if TYPE_CHECKING:
    from mmalign.policies.reward_lm import RewardPolicy


@reward("reward_model", aliases=("learned_reward",))
class RewardModel:
    """The score of a sequence classifier with one label: a model trained by the method ``reward_model``, or any other.

    Args:
        path: folder (full model or adapter), run output such as ``${stages.ranker.model}``, or hub id.
        rows_per_forward: samples scored together.
        max_length: longest prompt and completion in tokens, what is beyond is cut; null takes the model's window.
        chat: put plain text through the chat template, as one turn of the user and one of the assistant. Messages
            always go through it; plain text otherwise gets the end token, as in training.
        dtype: precision of the weights.
        device: where the model runs; null takes CUDA when there is one.
        adapter: adapter folder put on ``path``.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run Python code that comes with the model.

    The model is loaded at the first use and never learns.
    """

    def __init__(
        self, path: str, *, rows_per_forward: int = 16, max_length: int | None = None, chat: bool = False,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32", device: str | None = None, adapter: str | None = None,
        revision: str | None = None, trust_remote_code: bool = False,
    ) -> None:
        if rows_per_forward < 1:
            raise ConfigError(f"reward_model: rows_per_forward={rows_per_forward} must be at least 1")
        if max_length is not None and max_length < 2:
            raise ConfigError(f"reward_model: max_length={max_length} must be at least 2 tokens, or null")
        self.rows_per_forward, self.max_length, self.chat = rows_per_forward, max_length, chat
        self.options: dict[str, Any] = {
            "path": path, "dtype": dtype, "device": device, "adapter": adapter, "revision": revision,
            "trust_remote_code": trust_remote_code,
        }
        self._policy: RewardPolicy | None = None

    @property
    def policy(self) -> RewardPolicy:
        """The loaded model; loading waits for the first use, so that a configuration can be read without it."""
        if self._policy is None:
            from mmalign.data.chat import TextEncoding
            from mmalign.policies.loading import ModelOptions
            from mmalign.policies.reward_lm import RewardPolicy

            policy = RewardPolicy.from_options(
                ModelOptions(**self.options), encoding=TextEncoding(max_length=self.max_length), head="stored",
                rows_per_forward=self.rows_per_forward)
            policy.module.eval().requires_grad_(False)
            self._policy = policy
        return self._policy

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Tensor:
        """``[B]`` float32 scores."""
        from mmalign.data.rows import Rows

        policy = self.policy
        ids = [policy.encode_sample(*self._form(prompt, completion))
               for prompt, completion in zip(prompts, completions, strict=True)]
        # Rows of like length together: less padding. The scores return to their places.
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        with torch.no_grad():
            scores = policy.log_probs(Rows({"input_ids": [ids[i] for i in order]})).logp[:, 0]
        values = torch.empty(len(ids))
        values[order] = scores.cpu()
        return values

    def _form(self, prompt: Any, completion: Any) -> tuple[Any, Any]:
        if self.chat and isinstance(prompt, str) and isinstance(completion, str):
            return [{"role": "user", "content": prompt}], [{"role": "assistant", "content": completion}]
        if not isinstance(prompt, str) and isinstance(completion, str):
            return prompt, [{"role": "assistant", "content": completion}]
        return prompt, completion
