"""Sampling a diffusion policy step by step, with the log-prob of every step, and cutting rollouts into training rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmalign.core.denoising import gaussian_log_prob
from mmalign.core.selection import kept_count
from mmalign.data.rows import Rows
from mmalign.errors import ConfigError, DataError
from mmalign.policies.base import DiffusionSampling, Rollout
from mmalign.policies.diffusion_steps import STEP_COLUMNS, Steps
from mmalign.policies.modules import evaluating

if TYPE_CHECKING:
    from mmalign.policies.diffusion import DiffusionPolicy


class RowNoise:
    """One generator per sample, seeded from the caller's in row order, so that chunking cannot change a sample.

    With ``shared_start`` the first latents of a prompt's samples come from one generator per prompt.
    """

    def __init__(self, prompts: int, n: int, generator: torch.Generator, *, shared_start: bool) -> None:
        seeds = torch.randint(2**62, (prompts, n + 1), generator=generator, device=generator.device).tolist()
        self.rows = [torch.Generator().manual_seed(seed) for group in seeds for seed in group[1:]]
        self.starts = [torch.Generator().manual_seed(group[0]) for group in seeds for _ in range(n)]
        self.shared_start = shared_start

    def start(self, chunk: range, shape: tuple[int, ...]) -> Tensor:
        """Initial latents ``[len(chunk), *shape]`` of rows ``chunk``."""
        return self._draw(self.starts if self.shared_start else self.rows, chunk, shape)

    def step(self, chunk: range, shape: tuple[int, ...]) -> Tensor:
        """Noise of the next step of rows ``chunk``."""
        return self._draw(self.rows, chunk, shape)

    @staticmethod
    def _draw(generators: Sequence[torch.Generator], chunk: range, shape: tuple[int, ...]) -> Tensor:
        return torch.stack([torch.randn(shape, generator=generators[row]) for row in chunk])


def sample_rollout(
    policy: DiffusionPolicy, prompts: Sequence[Any], n: int, sampling: DiffusionSampling, generator: torch.Generator,
) -> Rollout:
    """See :meth:`mmalign.policies.diffusion.DiffusionPolicy.sample`."""
    if n < 1 or not prompts:
        raise ConfigError(f"sampling needs at least one prompt and one sample of each, not {len(prompts)} and {n}")
    policy.check_prompts(prompts)
    texts = list(prompts)
    shape = policy.latent_shape(sampling.height, sampling.width)
    steps = policy.schedule.steps(sampling, shape, policy.codec.patch)
    stochastic = policy.schedule.std(steps.columns(1))[0] > 0
    noise = RowNoise(len(texts), n, generator, shared_start=sampling.same_initial_noise)
    repeated = [text for text in texts for _ in range(n)]
    chunks = [range(a, min(a + sampling.rows_per_forward, len(repeated)))
              for a in range(0, len(repeated), sampling.rows_per_forward)]
    with torch.no_grad(), evaluating(policy.module):
        parts = [_sample_chunk(policy, repeated, chunk, noise, shape, steps, stochastic, sampling) for chunk in chunks]
    trajectory, logp = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    images = policy.codec.images(trajectory[:, -1].float(), policy.device)
    rows: dict[str, Any] = {"prompt": repeated, **policy.size_condition(len(repeated), shape)}
    if bool(stochastic.any()):
        rows |= {
            "trajectory": trajectory, **steps.columns(len(repeated)),
            "guidance_scale": torch.full((len(repeated),), sampling.guidance_scale),
            "dims": [sampling.dims] * len(repeated),
        }
        mask = stochastic.expand(len(repeated), -1).clone()
    else:
        rows["latents"] = trajectory[:, -1].float()
        mask, logp = torch.zeros(len(repeated), 1, dtype=torch.bool), torch.zeros(len(repeated), 1)
    group = torch.arange(len(texts)).repeat_interleave(n)
    return Rollout(repeated, images, group, Rows(rows), mask, logp, dims=sampling.dims)


def _sample_chunk(
    policy: DiffusionPolicy, prompts: list[str], chunk: range, noise: RowNoise, shape: tuple[int, ...], steps: Steps,
    stochastic: Tensor, sampling: DiffusionSampling,
) -> tuple[Tensor, Tensor]:
    """Trajectory ``[b, S + 1, ...]`` (only its end when no step is stochastic) and log-probs ``[b, S]``, on the CPU."""
    device, dtype = policy.device, policy.denoiser.dtype
    cond = policy.conditions([prompts[row] for row in chunk]) | policy.size_condition(len(chunk), shape)
    x = noise.start(chunk, shape).to(device, dtype)
    path, logp = [x], torch.zeros(len(chunk), len(steps), device=device)
    scored = bool(stochastic.any())
    for step in range(len(steps)):
        numbers = {name: value.to(device) for name, value in steps.numbers(step).items()}
        pred = policy.denoiser.predict(
            x, numbers["step_time"].expand(len(chunk)), cond, guidance_scale=sampling.guidance_scale)
        mean, std = policy.schedule.transition(x.float(), pred, numbers)
        if stochastic[step]:
            action = mean + std.view(-1, *[1] * len(shape)) * noise.step(chunk, shape).to(device)
            x = action.to(dtype)  # the stored action is the scored one: cast first
            logp[:, step] = gaussian_log_prob(x.float(), mean, std, dims=sampling.dims)
        else:
            x = mean.to(dtype)
        if not scored:
            path.clear()
        path.append(x)
    return torch.stack(path, 1).cpu(), logp.cpu()


def unfold_rollout(rollout: Rollout, *, fraction: float, generator: torch.Generator) -> Rows:
    """See :meth:`mmalign.policies.diffusion.DiffusionPolicy.unfold`."""
    if "trajectory" not in rollout.rows:
        raise ConfigError("sampling.eta (noise_level for flow models): a deterministic rollout has no density and cannot be "
                          "trained on by policy gradient; use a positive value, or a likelihood-free method")
    if "advantages" not in rollout.columns:
        raise DataError("the rollout has no advantages column yet")
    if not 0 < fraction <= 1:
        raise ConfigError(f"batch.action_fraction: must be in (0, 1], not {fraction}")
    sample, step = _chosen_steps(rollout.mask, fraction, generator)
    trajectory, at = rollout.rows["trajectory"], list(zip(sample.tolist(), step.tolist(), strict=True))
    columns: dict[str, Any] = {
        # Views: a copy of every latent for each of its two steps would double the memory of a rollout.
        "latents": [trajectory[i, s] for i, s in at],
        "next_latents": [trajectory[i, s + 1] for i, s in at],
        "step_index": step,
        **{name: rollout.rows[name][sample, step] for name in STEP_COLUMNS},
    }
    skipped = {"trajectory", *STEP_COLUMNS}
    shared = rollout.rows.without(skipped).take(sample)
    columns |= {name: shared[name] for name in shared}
    at_sample = sample.tolist()
    columns |= {
        name: torch.tensor([values[i] for i in at_sample]) for name, values in rollout.columns.items()
        if all(isinstance(value, (bool, int, float)) for value in values)
    }
    columns |= {
        "old_logp": rollout.old_logp[sample, step, None], "group": rollout.group[sample],
        "advantages": _advantages(rollout.columns["advantages"], at),
    }
    if rollout.ref_logp is not None:
        columns["ref_logp"] = rollout.ref_logp[sample, step, None]
    return Rows(columns)


def _chosen_steps(mask: Tensor, fraction: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sample and step of every training row: a random, shuffled share of each sample's actions."""
    samples, steps = [], []
    for row in range(len(mask)):
        actions = mask[row].nonzero().flatten().cpu()
        if not len(actions):
            continue
        order = torch.randperm(len(actions), generator=generator, device=generator.device).cpu()
        chosen = actions[order[: kept_count(len(actions), fraction)]]
        samples.append(torch.full_like(chosen, row))
        steps.append(chosen)
    if not samples:
        return torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    return torch.cat(samples), torch.cat(steps)


def _advantages(values: Sequence[Any], at: Sequence[tuple[int, int]]) -> Tensor:
    """``[N]`` float32 from one advantage per sample, or from one per step of each sample."""
    tensors = [torch.as_tensor(value, dtype=torch.float32) for value in values]
    return torch.stack([tensors[i][s] if tensors[i].dim() else tensors[i] for i, s in at]) if at else torch.zeros(0)


def clean_rows(rollout: Rollout) -> Rows:
    """Data rows of the sampled images (their final latents, float32), for losses that add fresh noise to them."""
    rows = rollout.rows
    if "trajectory" not in rows:
        return rows
    kept = rows.without({"trajectory", "guidance_scale", "dims", *STEP_COLUMNS})
    return kept.with_columns(latents=rows["trajectory"][:, -1].float())
