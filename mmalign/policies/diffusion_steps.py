"""The noise schedule of a loaded pipeline: training timesteps, sampler steps, and one step's Gaussian.

Two kinds. Variance preserving models (Stable Diffusion 1, 2, XL) step with DDIM and noise eta (Song et al. 2020, arXiv
2010.02502); flow-matching models (SD3) step with the SDE that has the flow's marginals (Liu et al. 2025, arXiv
2505.05470, and Xue et al. 2025, arXiv 2505.07818). The pipeline's own scheduler is read, never changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmalign.core.denoising import (
    DDIMStep,
    FlowStep,
    NoiseSchedule,
    ddim_std,
    ddim_transition,
    flow_noise_scale,
    flow_sde_transition,
)
from mmalign.errors import CheckpointError, ConfigError
from mmalign.policies.base import DiffusionSampling

STEP_COLUMNS = ("step_time", "step_level", "step_next_level", "step_noise")
"""The numbers of one sampler step, as columns of rollout rows (``[B, S]``) and of training rows (``[N]``)."""

_VP_SCHEDULERS = frozenset({
    "DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "PNDMScheduler",
    "LMSDiscreteScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler", "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler",
})
"""Samplers of variance preserving models; all describe the same training schedule and convert to DDIM."""


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
    """eta (DDIM), or the noise scale of the SDE (flow)."""

    def __len__(self) -> int:
        return len(self.time)

    def numbers(self, step: int) -> dict[str, Tensor]:
        """The scalars of one step under the names of :data:`STEP_COLUMNS`."""
        return {name: values[step] for name, values in self._named().items()}

    def columns(self, rows: int) -> dict[str, Tensor]:
        """All steps as columns ``[rows, S]`` of a rollout."""
        return {name: values.expand(rows, -1).clone() for name, values in self._named().items()}

    def _named(self) -> dict[str, Tensor]:
        return dict(zip(STEP_COLUMNS, (self.time, self.level, self.next_level, self.noise), strict=True))


class DiffusionSchedule:
    """What both kinds share; made by :func:`build_schedule`."""

    prediction: str
    """What the network predicts: epsilon, v_prediction, sample or flow_prediction."""
    noise: NoiseSchedule
    """The training schedule, indexed by a draw's timesteps."""

    def draw_timestep(self, generator: torch.Generator) -> int:
        """One training timestep: an index into the schedule."""
        raise NotImplementedError

    def network_time(self, timesteps: Tensor) -> Tensor:
        """``[B]`` float32: what the network is told at the training timesteps ``[B]``."""
        raise NotImplementedError

    def steps(self, sampling: DiffusionSampling, shape: tuple[int, ...], patch: int = 1) -> Steps:
        """The sampler steps for latents of ``shape`` (C, h, w) seen in patches of side ``patch``."""
        raise NotImplementedError

    def std(self, numbers: Mapping[str, Tensor]) -> Tensor:
        """Standard deviation of steps with the given :data:`STEP_COLUMNS`, any shape; 0 = deterministic, no density."""
        raise NotImplementedError

    def transition(self, x: Tensor, pred: Tensor, numbers: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean ``[B, ...]`` and standard deviation ``[B]`` of the latents after a step, float32.

        ``x`` and ``pred`` are the latents before it and the (guided) prediction at them; ``numbers`` holds
        :data:`STEP_COLUMNS`, scalars or ``[B]``.
        """
        raise NotImplementedError

    def _check_steps(self, steps: int) -> None:
        if steps > len(self.noise):
            raise ConfigError(f"sampling.steps: {steps} steps, but the model knows {len(self.noise)} timesteps; use fewer")


class DDIMSchedule(DiffusionSchedule):
    """A variance preserving model sampled by DDIM, whatever sampler its folder names."""

    def __init__(self, scheduler: Any) -> None:
        from diffusers import DDIMScheduler

        try:
            # Clipping x0 would make the mean of a step flat in the network's output.
            self.scheduler: Any = DDIMScheduler.from_config(scheduler.config, clip_sample=False, thresholding=False)
        except NotImplementedError as error:
            raise CheckpointError(f"scheduler: {type(scheduler).__name__} cannot be read as a DDIM schedule ({error})") from None
        self.prediction = str(self.scheduler.config.prediction_type)
        if self.prediction not in ("epsilon", "v_prediction", "sample"):
            raise CheckpointError(f"scheduler.prediction_type: {self.prediction!r} is unknown; allowed: epsilon, "
                                  "v_prediction, sample")
        alpha_bar = self.scheduler.alphas_cumprod.float()
        if float(alpha_bar[-1]) <= 1e-12 and self.prediction == "epsilon":
            raise CheckpointError("scheduler.rescale_betas_zero_snr: with zero terminal SNR a prediction of epsilon says "
                                  "nothing about the image at the last timestep; set it to false in "
                                  "scheduler/scheduler_config.json, or use a v_prediction model")
        self.noise = NoiseSchedule(alpha_bar=alpha_bar)

    def draw_timestep(self, generator: torch.Generator) -> int:
        """Uniform over the training timesteps."""
        return int(torch.randint(len(self.noise), (), generator=generator, device=generator.device))

    def network_time(self, timesteps: Tensor) -> Tensor:
        """The timestep itself."""
        return timesteps.float()

    def steps(self, sampling: DiffusionSampling, shape: tuple[int, ...], patch: int = 1) -> Steps:
        """Timesteps as the scheduler spaces them; each leads to the next entry, the last to ``final_alpha_cumprod``.

        diffusers steps to ``t - T // S`` instead of the next entry; the two agree when S divides T.
        """
        self._check_steps(sampling.steps)
        self.scheduler.set_timesteps(sampling.steps)
        timesteps = self.scheduler.timesteps
        level = self.noise.table[timesteps]
        next_level = torch.cat([level[1:], self.scheduler.final_alpha_cumprod.float().view(1)])
        return Steps(timesteps.float(), level, next_level, torch.full_like(level, sampling.eta))

    def std(self, numbers: Mapping[str, Tensor]) -> Tensor:
        """``eta sqrt((1 - a') / (1 - a)) sqrt(1 - a / a')``."""
        step = DDIMStep(numbers["step_level"], numbers["step_next_level"])
        return ddim_std(step, eta=numbers["step_noise"]).float()

    def transition(self, x: Tensor, pred: Tensor, numbers: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """A DDIM step of the model's own prediction type."""
        step = DDIMStep(numbers["step_level"], numbers["step_next_level"])
        return ddim_transition(x, pred, step, eta=numbers["step_noise"], prediction=self.prediction)


class FlowSchedule(DiffusionSchedule):
    """A flow-matching model: an Euler step of the ODE, or of the SDE with the same marginals."""

    prediction = "flow_prediction"

    def __init__(self, scheduler: Any) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        if scheduler.config.get("invert_sigmas"):
            raise CheckpointError("scheduler.invert_sigmas: a flow that runs from 0 to 1 is not supported")
        self.scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
        self.noise = NoiseSchedule(sigma=self.scheduler.sigmas.float())

    def draw_timestep(self, generator: torch.Generator) -> int:
        """Logit-normal(0, 1) over the training timesteps (Esser et al. 2024, arXiv 2403.03206)."""
        normal = torch.randn((), generator=generator, device=generator.device)
        return min(int(torch.sigmoid(normal) * len(self.noise)), len(self.noise) - 1)

    def network_time(self, timesteps: Tensor) -> Tensor:
        """``1000 sigma`` (times the configured number of training timesteps)."""
        table = self.noise.table.to(timesteps.device)
        return table[timesteps.long()] * self.scheduler.config.num_train_timesteps

    def steps(self, sampling: DiffusionSampling, shape: tuple[int, ...], patch: int = 1) -> Steps:
        """The scheduler's sigmas, down to 0; noise by ``sampling.noise_rule`` and ``noise_level``."""
        self._check_steps(sampling.steps)
        options = {}
        if self.scheduler.config.get("use_dynamic_shifting"):
            options["mu"] = self._shift((shape[-2] // patch) * (shape[-1] // patch))
        self.scheduler.set_timesteps(sampling.steps, **options)
        sigmas = self.scheduler.sigmas.float()
        below_one = [value for value in sigmas.tolist() if 0 < value < 1]
        if sampling.noise_level and sampling.noise_rule == "flow_grpo" and not below_one:
            raise ConfigError("sampling.steps: the flow_grpo noise rule is infinite in a single step from pure noise; use at "
                              "least 2 steps, or noise_rule: dance")
        noise = flow_noise_scale(
            sigmas[:-1], noise_level=sampling.noise_level, rule=sampling.noise_rule,
            sigma_max=max(below_one, default=0.5),
        )
        return Steps(self.scheduler.timesteps.float(), sigmas[:-1], sigmas[1:], noise)

    def _shift(self, tokens: int) -> float:
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

        config = self.scheduler.config
        return float(calculate_shift(
            tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift))

    def std(self, numbers: Mapping[str, Tensor]) -> Tensor:
        """``s sqrt(sigma - sigma')``."""
        gap = (numbers["step_level"] - numbers["step_next_level"]).clamp(min=0)
        return (numbers["step_noise"] * gap.sqrt()).float()

    def transition(self, x: Tensor, pred: Tensor, numbers: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """An Euler-Maruyama step."""
        step = FlowStep(numbers["step_level"], numbers["step_next_level"])
        return flow_sde_transition(x, pred, step, noise_scale=numbers["step_noise"])


def build_schedule(scheduler: Any) -> DiffusionSchedule:
    """The schedule that ``scheduler`` (a loaded diffusers scheduler) describes.

    Raises CheckpointError, with the reason, for a scheduler that is neither of the two kinds.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if name == "FlowMatchEulerDiscreteScheduler":
        return FlowSchedule(scheduler)
    if name in _VP_SCHEDULERS:
        if config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
            raise CheckpointError(f"scheduler: {name} is configured for a flow-matching model (use_flow_sigmas); put a "
                                  "FlowMatchEulerDiscreteScheduler in the folder's scheduler/scheduler_config.json")
        return DDIMSchedule(scheduler)
    reasons = {
        "LCMScheduler": "it samples a consistency-distilled model, whose steps have no Gaussian of the base diffusion",
        "TCDScheduler": "it samples a trajectory-distilled model, whose steps have no Gaussian of the base diffusion",
        "EDMEulerScheduler": "EDM models are trained on sigmas without a variance preserving timestep table",
        "EDMDPMSolverMultistepScheduler": "EDM models are trained on sigmas without a variance preserving timestep table",
    }
    reason = reasons.get(name, "it is neither variance preserving nor a flow-matching Euler scheduler")
    raise CheckpointError(f"scheduler: {name} is not supported: {reason}. Supported: FlowMatchEulerDiscreteScheduler, "
                          f"{', '.join(sorted(_VP_SCHEDULERS))}")
