"""Schedules read from diffusers schedulers, and the Gaussian of a sampler step."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from mmalign.errors import CheckpointError, ConfigError
from mmalign.policies.base import DiffusionSampling
from mmalign.policies.diffusion_steps import DDIMSchedule, FlowSchedule, build_schedule

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (4, 8, 8)


def latents(seed: int, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_a_step_is_the_one_of_diffusers(prediction: str, eta: float, spacing: str) -> None:
    peer = DDIMScheduler(**BETAS, prediction_type=prediction, clip_sample=False, set_alpha_to_one=False,
                         steps_offset=1, timestep_spacing=spacing)
    schedule = build_schedule(peer)
    steps = schedule.steps(DiffusionSampling(steps=20, eta=eta), SHAPE)
    peer.set_timesteps(20)
    assert steps.time.tolist() == peer.timesteps.tolist()
    x, pred, noise = latents(0), latents(1), latents(2)
    for index, timestep in enumerate(peer.timesteps):
        mean, std = schedule.transition(x, pred, steps.numbers(index))
        expected = peer.step(pred, timestep, x, eta=eta, variance_noise=noise if eta else None).prev_sample
        torch.testing.assert_close(mean + std.view(-1, 1, 1, 1) * noise, expected, rtol=1e-5, atol=2e-5)


def test_the_worked_example_of_stable_diffusion() -> None:
    schedule = build_schedule(DDIMScheduler(**BETAS, steps_offset=1, set_alpha_to_one=False))
    assert float(schedule.noise.table[0]) == pytest.approx(0.99915, abs=1e-5)
    assert float(schedule.noise.table[301]) == pytest.approx(0.588819, abs=1e-5)
    assert float(schedule.noise.table[999]) == pytest.approx(0.0046601, abs=1e-6)
    steps = schedule.steps(DiffusionSampling(steps=50, eta=1.0), SHAPE)
    at = steps.time.tolist().index(301.0)
    assert float(schedule.std(steps.numbers(at))) == pytest.approx(0.222552, abs=1e-5)


def test_a_step_leads_to_the_next_timestep_of_the_list() -> None:
    # 1000 / 7 is no integer: diffusers would step to t - 142, which no later step starts from.
    schedule = build_schedule(DDIMScheduler(**BETAS, timestep_spacing="trailing", set_alpha_to_one=False))
    steps = schedule.steps(DiffusionSampling(steps=7), SHAPE)
    assert torch.equal(steps.next_level[:-1], steps.level[1:])
    assert float(steps.next_level[-1]) == float(schedule.noise.table[0])


@pytest.mark.parametrize("to_one", [True, False])
def test_the_last_step_is_deterministic_exactly_when_it_ends_at_one(to_one: bool) -> None:
    schedule = build_schedule(DDIMScheduler(**BETAS, set_alpha_to_one=to_one, steps_offset=1))
    std = schedule.std(schedule.steps(DiffusionSampling(steps=10), SHAPE).columns(1))[0]
    assert bool((std[:-1] > 0).all())
    assert bool(std[-1] > 0) is not to_one


def test_clipping_is_off_and_the_pipelines_scheduler_stays_as_it_is() -> None:
    source = DDIMScheduler(**BETAS, clip_sample=True, set_alpha_to_one=False, steps_offset=1)
    schedule = build_schedule(source)
    assert source.config.clip_sample
    assert isinstance(schedule, DDIMSchedule)
    x, steps = 5 * latents(0), schedule.steps(DiffusionSampling(steps=10), SHAPE)
    pred = latents(1).requires_grad_()
    mean, _ = schedule.transition(x, pred, steps.numbers(9))
    mean.sum().backward()
    assert pred.grad is not None
    assert bool((pred.grad != 0).all())


@pytest.mark.parametrize("kind", [
    DDPMScheduler, PNDMScheduler, LMSDiscreteScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler,
])
def test_every_variance_preserving_scheduler_keeps_its_betas(kind: type) -> None:
    source = kind(**BETAS, prediction_type="v_prediction")
    schedule = build_schedule(source)
    assert schedule.prediction == "v_prediction"
    torch.testing.assert_close(schedule.noise.table, source.alphas_cumprod.float(), rtol=1e-6, atol=1e-7)


def test_zero_terminal_snr_needs_another_prediction_than_epsilon() -> None:
    with pytest.raises(CheckpointError, match="rescale_betas_zero_snr"):
        build_schedule(DDIMScheduler(**BETAS, rescale_betas_zero_snr=True, prediction_type="epsilon"))
    schedule = build_schedule(DDIMScheduler(
        **BETAS, rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"))
    steps = schedule.steps(DiffusionSampling(steps=5), SHAPE)
    assert float(steps.level[0]) == pytest.approx(0, abs=1e-9)
    mean, std = schedule.transition(latents(0), latents(1), steps.numbers(0))
    assert bool(torch.isfinite(mean).all())
    assert bool((std > 0).all())


@pytest.mark.parametrize(("scheduler", "reason"), [
    (LCMScheduler(), "distilled"),
    (EDMEulerScheduler(), "EDM"),
    (DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), "FlowMatchEuler"),
])
def test_other_schedulers_are_refused_with_the_reason(scheduler: object, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        build_schedule(scheduler)


def test_more_steps_than_timesteps_are_refused() -> None:
    schedule = build_schedule(DDIMScheduler(num_train_timesteps=10, set_alpha_to_one=False))
    with pytest.raises(ConfigError, match=r"sampling\.steps"):
        schedule.steps(DiffusionSampling(steps=11), SHAPE)


def test_a_flow_step_without_noise_is_the_euler_step_of_diffusers() -> None:
    peer = FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule = build_schedule(peer)
    steps = schedule.steps(DiffusionSampling(steps=12, noise_level=0.0), SHAPE)
    peer.set_timesteps(12)
    torch.testing.assert_close(steps.time, peer.timesteps)
    x, pred = latents(0), latents(1)
    for index, timestep in enumerate(peer.timesteps):
        mean, std = schedule.transition(x, pred, steps.numbers(index))
        torch.testing.assert_close(mean, peer.step(pred, timestep, x).prev_sample, rtol=1e-5, atol=1e-5)
        assert float(std.max()) == 0


def test_flow_timesteps_are_those_of_the_scheduler() -> None:
    peer = FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule = build_schedule(peer)
    index = torch.tensor([0, 17, 999])
    torch.testing.assert_close(schedule.network_time(index), peer.timesteps[index].float())
    torch.testing.assert_close(schedule.noise.table, peer.sigmas[:1000])


@pytest.mark.parametrize("rule", ["flow_grpo", "dance"])
def test_flow_noise_follows_its_rule(rule: str) -> None:
    schedule = build_schedule(FlowMatchEulerDiscreteScheduler(shift=3.0))
    steps = schedule.steps(DiffusionSampling(steps=6, noise_level=0.7, noise_rule=rule), SHAPE)
    std = schedule.std(steps.columns(3))
    assert std.shape == (3, 6)
    assert bool((std > 0).all())
    sigma = steps.level.clone()
    if rule == "dance":
        scale = torch.full_like(sigma, 0.7)
    else:
        below = torch.where(sigma >= 1, sigma[1], sigma)
        scale = 0.7 * (sigma / (1 - below)).sqrt()
    torch.testing.assert_close(std[0], scale * (sigma - steps.next_level).sqrt())


def test_dynamic_shifting_depends_on_the_size() -> None:
    schedule = build_schedule(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    assert isinstance(schedule, FlowSchedule)
    small = schedule.steps(DiffusionSampling(steps=4), (16, 32, 32), patch=2)
    large = schedule.steps(DiffusionSampling(steps=4), (16, 128, 128), patch=2)
    assert bool((large.level[1:] > small.level[1:]).all())


def test_one_flow_step_from_pure_noise_has_no_flow_grpo_noise() -> None:
    schedule = build_schedule(FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ConfigError, match=r"sampling\.steps"):
        schedule.steps(DiffusionSampling(steps=1), SHAPE)
    assert len(schedule.steps(DiffusionSampling(steps=1, noise_level=0.0), SHAPE)) == 1


def test_training_timesteps_are_uniform_or_logit_normal() -> None:
    generator = torch.Generator().manual_seed(0)
    uniform = build_schedule(DDIMScheduler(**BETAS))
    drawn = torch.tensor([uniform.draw_timestep(generator) for _ in range(4000)]).double()
    assert drawn.min() >= 0
    assert drawn.max() <= 999
    assert abs(float(drawn.mean()) - 499.5) < 5 * 288.7 / 4000**0.5
    flow = build_schedule(FlowMatchEulerDiscreteScheduler())
    drawn = torch.tensor([flow.draw_timestep(generator) for _ in range(4000)]).double()
    logit = torch.logit((drawn + 0.5) / 1000)
    assert abs(float(logit.mean())) < 5 / 4000**0.5
    assert float(logit.std()) == pytest.approx(1, abs=0.05)
