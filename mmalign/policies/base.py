"""What a policy is to the rest of the library: something that scores, samples, encodes or decodes.

Four protocols, and the two records that pass between them. Nothing above this floor knows whether an action is a
token, an image code or a denoising step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mmalign.config import Options
from mmalign.core.logprobs import ActionScores
from mmalign.data.columns import PreparationReport as PreparationReport
from mmalign.data.rows import Rows


@dataclass(frozen=True)
class Draw:
    """The random part of a score that policy, reference and both samples of a pair must share.

    For diffusion: ``timesteps[B]`` and ``noise[B, ...]``. Text has none (``Scorer.draw`` returns None).
    """

    timesteps: Tensor
    noise: Tensor

    def take(self, indices: Tensor | Sequence[int]) -> Draw:
        """The draws of the rows at ``indices``."""
        index = torch.as_tensor(indices, dtype=torch.long, device=self.timesteps.device)
        return Draw(self.timesteps[index], self.noise[index])

    def repeat(self, blocks: int) -> Draw:
        """The same draws for ``blocks`` stacked blocks of rows (chosen, rejected, ...)."""
        return Draw(self.timesteps.repeat(blocks), self.noise.repeat(blocks, *[1] * (self.noise.dim() - 1)))


class TextSampling(Options):
    """How completions are drawn from a language model."""

    max_new_tokens: int = 256
    """Longest completion, in tokens; a longer one ends with ``finish_reason`` "length"."""
    temperature: float = 1.0
    """Softmax temperature; 0 takes the most likely token."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all (needed for unbiased policy gradients)."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with this much probability; 1 keeps all."""
    min_new_tokens: int = 0
    """Completions cannot end before this many tokens."""
    stop: list[str] = []
    """Extra strings that end a completion (kept in it)."""
    rows_per_forward: int = 64
    """Rows decoded together; bounds the memory of the key-value cache."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse values without a meaning."""
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or positive, not {self.temperature}")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"top_k must be >= 0 and top_p in (0, 1], not {self.top_k} and {self.top_p}")

    @property
    def truncated(self) -> bool:
        """Whether the sampled distribution is not the model's own at this temperature."""
        return self.top_k > 0 or self.top_p < 1


class DiffusionSampling(Options):
    """How images are drawn from a diffusion model."""

    steps: int = 20
    """Denoising steps."""
    guidance_scale: float = 5.0
    """Classifier-free guidance ``null + g (cond - null)``; 1 uses the conditional prediction only."""
    eta: float = 1.0
    """Noise of a DDIM step (1 = ancestral, 0 = deterministic: no density, so no policy gradient)."""
    noise_level: float = 0.7
    """Noise of a flow-matching SDE step (Flow-GRPO's a); 0 is the deterministic ODE."""
    noise_rule: Literal["flow_grpo", "dance"] = "flow_grpo"
    """Standard deviation of a flow SDE: a sqrt(sigma/(1-sigma)) or the constant a."""
    height: int | None = None
    """Image height in pixels; null takes the model's own."""
    width: int | None = None
    """Image width in pixels; null takes the model's own."""
    same_initial_noise: bool = False
    """Start all samples of a prompt from one latent."""
    dims: Literal["mean", "sum"] = "mean"
    """Log-prob of a step: mean over latent entries (as all published code does) or their sum (the density)."""
    rows_per_forward: int = 64
    """Images denoised together."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse values without a meaning."""
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")
        if self.eta < 0 or self.noise_level < 0:
            raise ValueError("eta and noise_level cannot be negative")


@dataclass
class Rollout:
    """Samples of a policy with what is needed to reward them, score them again and learn from them.

    Rows are group-major (prompt 0 sample 0, prompt 0 sample 1, ..., prompt 1 sample 0). ``rows`` are the policy's own
    scorer inputs, one entry per sample; ``old_logp[B, A]`` and ``mask[B, A]`` follow the columns of
    ``Scorer.log_probs(rows)``.
    """

    prompts: list[Any]
    """Prompt of each row: text, message list, or caption."""
    samples: list[Any]
    """Decoded sample of each row: text, message list, PIL image or list of views."""
    group: Tensor
    """``[B]`` int64: index of the prompt in the call that drew the rollout."""
    rows: Rows
    """Inputs of ``Scorer.log_probs`` for these samples."""
    mask: Tensor
    """``[B, A]`` bool: which actions the policy chose."""
    old_logp: Tensor
    """``[B, A]`` float32 log-probs of the distribution that was sampled from."""
    columns: dict[str, list[Any]] = field(default_factory=dict)
    """Further data columns, one value per row (``answer``, ``id``, ...)."""
    finish_reason: list[str] = field(default_factory=list)
    """"stop" or "length" per row (text); empty for images."""
    rewards: Tensor | None = None
    """``[B, R]`` float32, NaN where a reward did not apply."""
    reward_names: tuple[str, ...] = ()
    """Names of the R rewards."""
    ref_logp: Tensor | None = None
    """``[B, A]`` log-probs under the reference model."""
    values: Tensor | None = None
    """``[B, A]`` predictions of a value head."""
    weight_version: int = 0
    """Optimiser updates the policy had seen when it sampled."""
    logprob_mode: str = "processed"
    """"processed": of the sampled distribution (after temperature and truncation); "raw": of the model."""
    temperature: float = 1.0
    """Temperature the samples were drawn at, and must be scored at."""
    dims: str = "mean"
    """Diffusion: how a step's log-prob reduces the latent entries."""

    def __len__(self) -> int:
        return len(self.samples)

    def take(self, indices: Tensor | Sequence[int]) -> Rollout:
        """The rows at ``indices``."""
        index = torch.as_tensor(indices, dtype=torch.long)
        at = index.tolist()

        def pick(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[index.to(values.device)]

        return replace(
            self, prompts=[self.prompts[i] for i in at], samples=[self.samples[i] for i in at],
            group=self.group[index], rows=self.rows.take(index), mask=self.mask[index.to(self.mask.device)],
            old_logp=self.old_logp[index.to(self.old_logp.device)],
            columns={name: [values[i] for i in at] for name, values in self.columns.items()},
            finish_reason=[self.finish_reason[i] for i in at] if self.finish_reason else [],
            rewards=pick(self.rewards), ref_logp=pick(self.ref_logp), values=pick(self.values),
        )

    @staticmethod
    def concat(parts: Sequence[Rollout]) -> Rollout:
        """Several rollouts as one; groups are renumbered so that they stay distinct, action axes are padded."""
        first = parts[0]
        width = max(part.mask.shape[1] for part in parts)
        groups, offset = [], 0
        for part in parts:
            groups.append(part.group + offset)
            offset += int(part.group.max()) + 1 if len(part) else 0

        def stack(tensors: list[Tensor | None]) -> Tensor | None:
            present = [t for t in tensors if t is not None]
            if len(present) != len(tensors):
                return None
            return torch.cat([nn.functional.pad(t, (0, width - t.shape[1])) for t in present])

        rewards = [part.rewards for part in parts]
        mask, old_logp = stack([part.mask for part in parts]), stack([part.old_logp for part in parts])
        assert mask is not None
        assert old_logp is not None
        return replace(
            first, prompts=[p for part in parts for p in part.prompts],
            samples=[s for part in parts for s in part.samples], group=torch.cat(groups),
            rows=Rows.concat([part.rows for part in parts]), mask=mask, old_logp=old_logp,
            columns={name: [v for part in parts for v in part.columns[name]] for name in first.columns},
            finish_reason=[r for part in parts for r in part.finish_reason],
            rewards=None if any(r is None for r in rewards) else torch.cat([r for r in rewards if r is not None]),
            ref_logp=stack([part.ref_logp for part in parts]), values=stack([part.values for part in parts]),
        )


@runtime_checkable
class Scorer(Protocol):
    """Something that gives log-probs of samples (and of nothing else: no sampling, no training)."""

    def action_mask(self, rows: Rows) -> Tensor:
        """``[B, A]`` bool: the actions :meth:`log_probs` would score, known without a forward pass."""
        ...

    def draw(self, rows: Rows, generator: torch.Generator) -> Draw | None:
        """Shared randomness for scoring ``rows``; None when scores are deterministic."""
        ...

    def log_probs(
        self, rows: Rows, *, draw: Draw | None = None, temperature: float = 1.0, want: Iterable[str] = (),
    ) -> ActionScores:
        """``[B, A]`` float32 log-probs, column a = the row's a-th action, whatever the padding or packing inside."""
        ...


@runtime_checkable
class Sampler(Protocol):
    """Something that draws ``n`` samples for each prompt."""

    def sample(self, prompts: Sequence[Any], n: int, sampling: Any, generator: torch.Generator) -> Rollout:
        """A group-major rollout of ``len(prompts) * n`` rows, log-probs of the sampling distribution included."""
        ...


@runtime_checkable
class Encoder(Protocol):
    """A two-tower model (CLIP)."""

    logit_scale: Tensor

    def encode_image(self, images: Any) -> Tensor:
        """``[B, D]`` normalised image embeddings."""
        ...

    def encode_text(self, texts: Any) -> Tensor:
        """``[B, D]`` normalised text embeddings."""
        ...


@runtime_checkable
class Decoder(Protocol):
    """A decoding method that changes how a policy is sampled, never its weights (best-of-n, ARGS, ...)."""

    def generate(self, policy: Policy, prompts: Sequence[Any], sampling: Any, generator: torch.Generator) -> Rollout:
        """One sample per prompt."""
        ...


class Policy(Scorer, Sampler, Protocol):
    """A trainable model behind its adapter: scores, samples, prepares data for itself and saves itself."""

    modality: str
    """"text", "diffusion", ...: which sampling options and rewards apply."""

    @property
    def module(self) -> nn.Module:
        """The network that is trained (what optimisers, accelerate and tuning modes see)."""
        ...

    def replace_module(self, module: nn.Module) -> None:
        """Use ``module`` instead (after PEFT injected an adapter or accelerate wrapped it)."""
        ...

    def unfold(self, rollout: Rollout, *, fraction: float, generator: torch.Generator) -> Rows:
        """Training rows of a rollout that already carries ``advantages`` in its columns.

        Text: one row per completion. Diffusion: one row per (sample, denoising step), a random ``fraction`` of the
        steps, so that one forward never holds more than ``examples_per_forward`` network evaluations. Columns
        ``old_logp[N, A]``, ``advantages[N]``, ``group[N]`` (and ``ref_logp[N, A]`` when known) are included.
        """
        ...

    def prepare_dataset(
        self, examples: Sequence[Mapping[str, Any]], *, fields: tuple[str, ...] = (),
    ) -> tuple[Sequence[Mapping[str, Any]], PreparationReport]:
        """Check a whole data set before training, drop and count rows that cannot be used, tokenise where cheap.

        ``fields`` () = one sample per row (prompt + completion, messages, text, image); ("chosen", "rejected") = pairs.
        Raises DataError for missing columns or when no row is left.
        """
        ...

    def check_prompts(self, prompts: Sequence[Any]) -> None:
        """Raise DataError for a prompt that could not be sampled from, before any work starts."""
        ...

    def encode_rows(self, examples: Sequence[Mapping[str, Any]]) -> Rows:
        """Scorer inputs of prepared examples: what :meth:`action_mask` and :meth:`log_probs` take."""
        ...

    def identity(self) -> str:
        """Hash of the weights: changes whenever a score could."""
        ...

    def save_pretrained(self, folder: Path) -> None:
        """Write the model in its Hugging Face format (adapter folder when an adapter is trained)."""
        ...


class Stateful(Protocol):
    """A participant of a checkpoint: tensors go to safetensors, everything else to JSON."""

    def state_dict(self) -> dict[str, Any]:
        """State as nested dictionaries and lists of tensors and JSON values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        ...
