"""The noise schedule of a loaded pipeline: training timesteps, sampler steps, and one step's Gaussian.

Two kinds. Variance preserving models (Stable Diffusion 1, 2, XL) step with DDIM and noise eta (Song et al. 2021, arXiv
2010.02502); flow-matching models (SD3) step with the SDE that has the flow's marginals (Liu et al. 2025, arXiv
2505.05470, and Xue et al. 2025, arXiv 2505.07818). The pipeline's own scheduler is read, never changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mmalign.core.denoising import NoiseSchedule, ddim_transition, flow_sde_transition
from mmalign.errors import CheckpointError, ConfigError
from mmalign.policies.base import DiffusionSampling

STEP_COLUMNS = ("step_time", "step_level", "step_next_level", "step_noise")
"""The numbers of one sampler step, as columns of rollout rows (``[B, S]``) and of training rows (``[N]``)."""


@dataclass(frozen=True)
class Steps:
    """The numbers of ``S`` sampler steps, each ``[S]`` float32."""

    time: Tensor
    """What the network is told."""
    level: Tensor
    """alpha_bar (DDIM) or sigma (flow) of the latents before the step."""
    next_level: Tensor
    """The same after the step."""
    noise: Tensor
    """eta (DDIM), or the SDE's noise scale (flow)."""
    std: Tensor
    """Standard deviation of the step; 0 = deterministic, so not an action."""

    def __len__(self) -> int:
        return len(self.time)

    @property
    def stochastic(self) -> Tensor:
        """``[S]`` bool: the steps that have a density."""
        return self.std > 0

    def columns(self, rows: int) -> dict[str, Tensor]:
        """The steps as columns ``[rows, S]`` of a rollout."""
        values = (self.time, self.level, self.next_level, self.noise)
        return {name: value.expand(rows, -1).clone() for name, value in zip(STEP_COLUMNS, values, strict=True)}


class DiffusionSchedule:
    """What both kinds share; made by :func:`build_schedule`."""

    prediction: str
    """What the network predicts: epsilon, v_prediction, sample or flow_prediction."""
    noise: NoiseSchedule
    """The training schedule, indexed by draws' timesteps."""

    def draw_timestep(self, generator: torch.Generator) -> int:
        """One training timestep: an index into the schedule."""
        raise NotImplementedError

    def network_time(self, timesteps: Tensor) -> Tensor:
        """``[B]`` float32: what the network is told at the training timesteps ``[B]``."""
        raise NotImplementedError

    def steps(self, sampling: DiffusionSampling, shape: tuple[int, ...], patch: int) -> Steps:
        """The sampler steps for latents of ``shape`` (C, h, w)."""
        raise NotImplementedError

    def transition(self, x: Tensor, pred: Tensor, numbers: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean ``[B, ...]`` and standard deviation ``[B]`` of the latents after a step, float32.

        ``x`` and ``pred`` are the latents before it and the (guided) prediction; ``numbers`` holds :data:`STEP_COLUMNS`.
        """
        raise NotImplementedError


class DDIMSchedule(DiffusionSchedule):
    """A variance preserving model sampled by DDIM, whatever sampler its folder names."""

    def __init__(self, scheduler: Any) -> None:
        from diffusers import DDIMScheduler

        # Clipping x0 would make the mean of a step flat in the network's output.
        self.scheduler = DDIMScheduler.from_config(scheduler.config, clip_sample=False, thresholding=False)
        self.prediction = str(self.scheduler.config.prediction_type)
        if self.prediction not in ("epsilon", "v_prediction", "sample"):
            raise CheckpointError(f"scheduler.prediction_type {self.prediction!r} is unknown; allowed: epsilon, "
                                  "v_prediction, sample")
        alpha_bar = self.scheduler.alphas_cumprod.float()
        if float(alpha_bar[-1]) <= 1e-12 and self.prediction == "epsilon":
            raise CheckpointError("the scheduler has zero terminal SNR (rescale_betas_zero_snr) but the network predicts "
                                  "epsilon: at the last timestep the noise says nothing about the image. Set "
                                  "rescale_betas_zero_snr: false in scheduler/scheduler_config.json, or use a "
                                  "v_prediction model")
        self.noise = NoiseSchedule(alpha_bar=alpha_bar)
        self.alpha_bar = alpha_bar

    def draw_timestep(self, generator: torch.Generator) -> int:
        """Uniform over the training timesteps."""
        return int(torch.randint(len(self.alpha_bar), (), generator=generator, device=generator.device))

    def network_time(self, timesteps: Tensor) -> Tensor:
        """The timestep itself."""
        return timesteps.float()

    def steps(self, sampling: DiffusionSampling, shape: tuple[int, ...], patch: int) -> Steps:
        """Timesteps as the scheduler spaces them; each leads to the next entry, the last to ``final_alpha_cumprod``.

        diffusers steps to ``t - T // S`` instead of the next entry; the two agree when S divides T.
        """
        _check_steps(sampling.steps, len(self.alpha_bar))
        self.scheduler.set_timesteps(sampling.steps)
        timesteps = self.scheduler.timesteps
        level = self.alpha_bar[timesteps]
        next_level = torch.cat([level[1:], self.scheduler.final_alpha_cumprod.float().view(1)])
        noise = torch.full_like(level, sampling.eta)
        std = noise * ((1 - next_level) / (1 - level)).sqrt() * (1 - level / next_level).clamp(min=0).sqrt()
        return Steps(timesteps.float(), level, next_level, noise, std)
