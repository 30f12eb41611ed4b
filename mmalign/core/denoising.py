"""Denoising maths: schedules and targets, the error as a log-likelihood surrogate, and sampler steps as Gaussians.

Variance preserving (VP) models: ``x_t = sqrt(a) x0 + sqrt(1 - a) e`` with ``a = alpha_bar_t`` (Ho et al. 2020, arXiv
2006.11239). Flow-matching models: ``x_s = (1 - s) x0 + s e`` with ``s = sigma`` (Lipman et al. 2022, arXiv 2210.02747).
Everything is float32 or better, whatever the model's dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction")
"""What a network may predict: the noise, the clean sample, ``v = sqrt(a) e - sqrt(1 - a) x0``, the velocity ``e - x0``."""

Dims = Literal["mean", "sum"]


def _spread(values: Tensor | float, like: Tensor) -> Tensor:
    """``[B]`` (or scalar) values shaped to broadcast over the inner dims of ``like[B, ...]``."""
    tensor = torch.as_tensor(values, device=like.device).to(_precise(like))
    return tensor.reshape(-1, *[1] * (like.dim() - 1)) if tensor.dim() else tensor


def _precise(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class NoiseSchedule:
    """Signal and noise levels of every training timestep, of a VP model (``alpha_bar[T]``) or a flow (``sigma[T]``).

    Raises ValueError unless exactly one is given, with values in [0, 1].
    """

    def __init__(self, *, alpha_bar: Tensor | None = None, sigma: Tensor | None = None) -> None:
        if (alpha_bar is None) == (sigma is None):
            raise ValueError("give exactly one of alpha_bar (variance preserving) and sigma (flow)")
        table = alpha_bar if alpha_bar is not None else sigma
        assert table is not None
        if table.dim() != 1 or bool(((table < 0) | (table > 1)).any()):
            raise ValueError(f"the table has shape {tuple(table.shape)}; [T] with values in [0, 1] is needed")
        self.is_flow = sigma is not None
        self.table = table.detach()
        precise = table.detach().double()
        self.signal = (1 - precise) if self.is_flow else precise.sqrt()
        self.noise = precise if self.is_flow else (1 - precise).sqrt()

    def __len__(self) -> int:
        return len(self.table)

    def levels(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise factors at timesteps ``t[B]``, shaped to broadcast over ``like``."""
        index = t.to(self.signal.device, torch.long)
        return _spread(self.signal[index], like), _spread(self.noise[index], like)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``signal x0 + noise_level noise`` at timesteps ``t[B]``, in the dtype of ``x0``."""
        signal, level = self.levels(t, x0)
        return (signal * x0 + level * noise).to(x0.dtype)

    def target(self, prediction: str, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What a network with ``prediction`` should output for ``add_noise(x0, noise, t)``, float32."""
        signal, level = self.levels(t, x0)
        x0, noise = x0.to(_precise(x0)), noise.to(_precise(x0))
        return _from_parts(x0, noise, signal, level, prediction)

    def convert(self, pred: Tensor, x: Tensor, t: Tensor, *, source: str, target: str) -> Tensor:
        """A prediction of kind ``source`` at noisy ``x`` and timesteps ``t[B]`` as kind ``target``, float32."""
        signal, level = self.levels(t, x)
        x0, noise = split_prediction(pred, x, signal, level, source)
        return _from_parts(x0, noise, signal, level, target)

    def signal_to_noise(self, t: Tensor) -> Tensor:
        """``(signal / noise)^2`` at ``t[B]``, float32."""
        index = t.to(self.signal.device, torch.long)
        return (self.signal[index] / self.noise[index].clamp(min=1e-12)).square().float()

    def min_snr_weights(self, t: Tensor, *, gamma: float = 5.0, prediction: str = "epsilon") -> Tensor:
        """Loss weights ``min(SNR, gamma)`` in x0 space, divided by what ``prediction``'s own space adds, ``[B]``.

        Hang et al. 2023, arXiv 2303.09556: / SNR for epsilon, / (SNR + 1) for v_prediction, 1 for sample.
        """
        if gamma <= 0:
            raise ValueError(f"gamma is {gamma}; it must be positive")
        snr = self.signal_to_noise(t)
        clipped = snr.clamp(max=gamma)
        if prediction == "epsilon":
            return clipped / snr.clamp(min=1e-12)
        if prediction == "v_prediction":
            return clipped / (snr + 1)
        if prediction == "sample":
            return clipped
        raise ValueError(f"prediction is {prediction!r}; min-SNR weights are defined for epsilon, v_prediction and sample")


def split_prediction(pred: Tensor, x: Tensor, signal: Tensor, level: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
    """``(x0, noise)`` implied by a prediction at noisy ``x = signal x0 + level noise``.

    Raises ValueError for an unknown kind. Divisions are by the factor that the kind leaves out, so epsilon needs
    ``signal > 0`` and sample needs ``level > 0``.
    """
    pred, x = pred.to(_precise(pred)), x.to(_precise(x))
    if prediction == "epsilon":
        return (x - level * pred) / signal, pred
    if prediction == "sample":
        return pred, (x - signal * pred) / level
    if prediction == "v_prediction":
        return signal * x - level * pred, level * x + signal * pred
    if prediction == "flow_prediction":
        return x - level * pred, x + (1 - level) * pred
    raise ValueError(f"prediction is {prediction!r}; allowed are {', '.join(PREDICTIONS)}")


def _from_parts(x0: Tensor, noise: Tensor, signal: Tensor, level: Tensor, prediction: str) -> Tensor:
    if prediction == "epsilon":
        return noise
    if prediction == "sample":
        return x0
    if prediction == "v_prediction":
        return signal * noise - level * x0
    if prediction == "flow_prediction":
        return noise - x0
    raise ValueError(f"prediction is {prediction!r}; allowed are {', '.join(PREDICTIONS)}")


def denoising_error(pred: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over all but the first dim, ``[B]`` float32: the surrogate of ``-log p`` of a sample."""
    if pred.shape != target.shape:
        raise ValueError(f"pred and target have shapes {tuple(pred.shape)} and {tuple(target.shape)}; they must be equal")
    return (pred.to(_precise(pred)) - target.to(_precise(target))).square().flatten(1).mean(1)


def denoising_logratio(error: Tensor, ref_error: Tensor | float, *, scale: float = 0.5) -> Tensor:
    """``-scale (error - ref_error)``, ``[B]``: a log-ratio for the preference losses.

    Scale 1/2 with the paper's beta is Diffusion-DPO as released (Wallace et al. 2023, arXiv 2311.12908, equation 14);
    1 is Diffusion-KTO (Li et al. 2024, arXiv 2404.04465). With ``ref_error`` 0 it is the score of one model.
    """
    return -scale * (error - ref_error)


@dataclass(frozen=True)
class DDIMStep:
    """Numbers of a VP sampler step: ``alpha_bar`` before and after it, scalars or ``[B]``."""

    alpha_bar: Tensor | float
    alpha_bar_next: Tensor | float


@dataclass(frozen=True)
class FlowStep:
    """Numbers of a flow sampler step: ``sigma`` before and after it, scalars or ``[B]``."""

    sigma: Tensor | float
    sigma_next: Tensor | float


def ddim_std(step: DDIMStep, *, eta: Tensor | float) -> Tensor:
    """``eta sqrt((1 - a') / (1 - a)) sqrt(1 - a / a')``, in float64, scalar or ``[B]``."""
    now, after = (torch.as_tensor(value).double() for value in (step.alpha_bar, step.alpha_bar_next))
    ratio = ((1 - after) / (1 - now).clamp(min=1e-20)).clamp(min=0).sqrt()
    return torch.as_tensor(eta).double() * ratio * (1 - now / after).clamp(min=0).sqrt()


def ddim_transition(
    x: Tensor, pred: Tensor, step: DDIMStep, *, eta: Tensor | float, prediction: str = "epsilon",
) -> tuple[Tensor, Tensor]:
    """Mean ``[B, ...]`` and standard deviation ``[B]`` of a DDIM step with noise ``eta``, float32.

    ``mean = sqrt(a') x0 + sqrt(1 - a' - sd^2) e`` with x0 and e implied by ``pred`` at ``x``. Song et al. 2020, arXiv
    2010.02502, equation 12. A standard deviation of 0 has no density.
    """
    now, after = (torch.as_tensor(value, device=x.device).double() for value in (step.alpha_bar, step.alpha_bar_next))
    x0, noise = split_prediction(pred, x, _spread(now.sqrt(), x), _spread((1 - now).sqrt(), x), prediction)
    std = ddim_std(DDIMStep(now, after), eta=torch.as_tensor(eta, device=x.device))
    direction = (1 - after - std.square()).clamp(min=0).sqrt()
    mean = _spread(after.sqrt(), x) * x0 + _spread(direction, x) * noise
    return mean, std.to(_precise(x)).expand(x.shape[0])


def flow_noise_scale(
    sigma: Tensor, *, noise_level: float, rule: Literal["flow_grpo", "dance"] = "flow_grpo", sigma_max: float,
) -> Tensor:
    """Noise scale of a flow SDE at ``sigma``.

    flow_grpo: ``a sqrt(sigma / (1 - sigma))``, with ``sigma_max`` in the denominator where sigma is 1 (Liu et al. 2025,
    arXiv 2505.05470); dance: the constant ``a`` (Xue et al. 2025, arXiv 2505.07818).
    """
    if noise_level < 0:
        raise ValueError(f"noise_level is {noise_level}; it must not be negative")
    if rule == "dance":
        return torch.full_like(sigma, noise_level)
    if rule != "flow_grpo":
        raise ValueError(f"rule is {rule!r}; allowed are flow_grpo and dance")
    if not 0 < sigma_max < 1:
        raise ValueError(f"sigma_max is {sigma_max}; it must lie in (0, 1): the largest sigma below 1 of the sampler")
    below = torch.where(sigma >= 1, torch.full_like(sigma, sigma_max), sigma)
    return noise_level * (sigma / (1 - below)).sqrt()


def flow_sde_transition(x: Tensor, velocity: Tensor, step: FlowStep, *, noise_scale: Tensor | float) -> tuple[Tensor, Tensor]:
    """Mean ``[B, ...]`` and standard deviation ``[B]`` of an Euler-Maruyama step that keeps the flow's marginals, float32.

    With ``d = sigma' - sigma < 0`` and noise scale s: ``mean = x (1 + s^2 d / (2 sigma)) + u (1 + s^2 (1 - sigma) /
    (2 sigma)) d``, ``sd = s sqrt(-d)``. Scale 0 is the Euler step of the ODE. Raises ValueError for a source sigma of 0.
    """
    sigma, after = (torch.as_tensor(value, device=x.device).double() for value in (step.sigma, step.sigma_next))
    if bool((sigma <= 0).any()):
        raise ValueError("sigma of a step's source must be positive; the flow has ended at 0")
    scale = torch.as_tensor(noise_scale, device=x.device).double()
    difference = after - sigma
    drift = scale.square() / (2 * sigma)
    precise = _precise(x)
    mean = (x.to(precise) * _spread(1 + drift * difference, x)
            + velocity.to(precise) * _spread((1 + drift * (1 - sigma)) * difference, x))
    std = scale * (-difference).clamp(min=0).sqrt()
    return mean, std.to(precise).expand(x.shape[0])


def gaussian_log_prob(sample: Tensor, mean: Tensor, std: Tensor, *, dims: Dims = "mean") -> Tensor:
    """``log N(sample; mean, std^2)`` per row, ``[B]`` float32: mean or sum over the entries of a row.

    Published diffusion policy-gradient code takes the mean, which is the D-th root of the density: its clip ranges are
    small for that reason. Raises ValueError for a standard deviation that is not positive.
    """
    if dims not in ("mean", "sum"):
        raise ValueError(f"dims is {dims!r}; allowed are mean and sum")
    precise = _precise(sample)
    std = _spread(std, sample)
    if bool((std <= 0).any()):
        raise ValueError("std must be positive: a deterministic step (eta or noise_level 0) has no density")
    entries = -(sample.to(precise) - mean.to(precise)).square() / (2 * std.square()) - std.log() - 0.5 * math.log(2 * math.pi)
    flat = entries.flatten(1)
    return flat.mean(1) if dims == "mean" else flat.sum(1)


def guided_prediction(null: Tensor, cond: Tensor, scale: Tensor | float) -> Tensor:
    """``null + scale (cond - null)``: classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598); 1 = conditional.

    ``scale`` is one number or one per row, ``[B]``.
    """
    return null + _spread(scale, null) * (cond - null)
