"""Schedules, targets and sampler steps: identities, closed forms, and agreement with diffusers' samplers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from mmalign.core.denoising import (
    PREDICTIONS,
    DDIMStep,
    FlowStep,
    NoiseSchedule,
    ddim_transition,
    denoising_error,
    denoising_logratio,
    flow_noise_scale,
    flow_sde_transition,
    gaussian_log_prob,
    guided_prediction,
)

VP_PREDICTIONS = ("epsilon", "sample", "v_prediction")


def stable_diffusion() -> NoiseSchedule:
    """The scaled-linear schedule of Stable Diffusion 1."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return NoiseSchedule(alpha_bar=(1 - betas).cumprod(0))


def flow(steps: int = 1000) -> NoiseSchedule:
    """Linear sigmas, the last of them 1."""
    return NoiseSchedule(sigma=torch.arange(1, steps + 1, dtype=torch.float64) / steps)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_reference_values_of_the_stable_diffusion_schedule():
    table = stable_diffusion().table
    for t, value in ((0, 0.99915), (1, 0.998296), (301, 0.588819), (999, 0.0046601)):
        assert table[t].item() == pytest.approx(value, rel=1e-5)


SCHEDULES = {"vp": (stable_diffusion, VP_PREDICTIONS), "flow": (flow, ("flow_prediction", "epsilon", "sample"))}


@pytest.mark.parametrize("kind", list(SCHEDULES))
@settings(max_examples=40, deadline=None)
@given(data=st.data(), t=st.lists(st.integers(5, 990), min_size=3, max_size=3))
def test_conversions_agree_with_the_targets(kind, data, t):
    """Any kind of prediction, converted to any other, is what the other should have predicted."""
    make, kinds = SCHEDULES[kind]
    schedule, steps = make(), torch.tensor(t)
    source, target = data.draw(st.sampled_from(kinds)), data.draw(st.sampled_from(PREDICTIONS))
    x0, noise = normal(3, 2, 4), normal(3, 2, 4, seed=1)
    x = schedule.add_noise(x0, noise, steps)
    given_prediction = schedule.target(source, x0, noise, steps)
    converted = schedule.convert(given_prediction, x, steps, source=source, target=target)
    torch.testing.assert_close(converted, schedule.target(target, x0, noise, steps), rtol=1e-6, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(t=st.integers(5, 990))
def test_errors_in_the_spaces_differ_by_known_factors(t):
    steps, x0, noise = torch.tensor([t]), normal(1, 8), normal(1, 8, seed=1)
    guess = noise + 0.3 * normal(1, 8, seed=2)
    for schedule, target, factor in (
        (stable_diffusion(), "v_prediction", lambda s: 1 / s.table[t]),
        (stable_diffusion(), "sample", lambda s: (1 - s.table[t]) / s.table[t]),
        (flow(), "flow_prediction", lambda s: 1 / (1 - s.table[t]) ** 2),
    ):
        x = schedule.add_noise(x0, noise, steps)
        converted = schedule.convert(guess, x, steps, source="epsilon", target=target)
        error = denoising_error(converted, schedule.target(target, x0, noise, steps))
        torch.testing.assert_close(error, factor(schedule) * denoising_error(guess, noise))


def test_a_batch_may_mix_timesteps_and_keeps_its_dtype():
    schedule = stable_diffusion()
    x0, noise = (normal(2, 3, 4, 4, seed=seed, dtype=torch.float16) for seed in range(2))
    both = schedule.add_noise(x0, noise, torch.tensor([10, 900]))
    assert both.dtype == torch.float16
    for i, t in enumerate((10, 900)):
        assert torch.equal(both[i : i + 1], schedule.add_noise(x0[i : i + 1], noise[i : i + 1], torch.tensor([t])))


def test_signal_to_noise_and_min_snr_weights():
    schedule, t = stable_diffusion(), torch.tensor([0, 301, 999])
    snr = (schedule.table[t] / (1 - schedule.table[t])).float()
    torch.testing.assert_close(schedule.signal_to_noise(t), snr)
    torch.testing.assert_close(schedule.min_snr_weights(t), snr.clamp(max=5) / snr)
    torch.testing.assert_close(schedule.min_snr_weights(t, prediction="v_prediction"), snr.clamp(max=5) / (snr + 1))
    torch.testing.assert_close(schedule.min_snr_weights(t, prediction="sample"), snr.clamp(max=5))
    with pytest.raises(ValueError, match="prediction"):
        schedule.min_snr_weights(t, prediction="flow_prediction")


def test_schedule_refusals():
    for arguments in ({}, {"alpha_bar": torch.ones(2), "sigma": torch.ones(2)}, {"sigma": torch.tensor([1.5])}):
        with pytest.raises(ValueError, match=r"alpha_bar|\[0, 1\]"):
            NoiseSchedule(**arguments)
    with pytest.raises(ValueError, match="epsilon, sample"):
        stable_diffusion().target("noise", normal(1, 2), normal(1, 2), torch.tensor([3]))


class TestScores:
    def test_error_is_a_mean_per_row_in_float32(self):
        pred, target = normal(3, 2, 4, dtype=torch.float16), normal(3, 2, 4, seed=1, dtype=torch.float16)
        error = denoising_error(pred, target)
        assert error.dtype == torch.float32
        torch.testing.assert_close(error[1], (pred[1].float() - target[1].float()).square().mean())
        with pytest.raises(ValueError, match="shapes"):
            denoising_error(pred, target[:, :1])

    def test_logratio_is_zero_for_the_reference_and_half_the_gain(self):
        error = torch.tensor([1.0, 3.0])
        assert denoising_logratio(error, error).tolist() == [0.0, 0.0]
        assert denoising_logratio(error, torch.tensor([2.0, 2.0])).tolist() == [0.5, -0.5]
        assert denoising_logratio(error, 0.0, scale=1.0).tolist() == [-1.0, -3.0]

    def test_guidance(self):
        null, cond = normal(2, 3), normal(2, 3, seed=1)
        torch.testing.assert_close(guided_prediction(null, cond, 1.0), cond)
        torch.testing.assert_close(guided_prediction(null, cond, 0.0), null)
        torch.testing.assert_close(guided_prediction(null, cond, 3.0), 3 * cond - 2 * null)


class TestGaussianLogProb:
    def test_agrees_with_torch(self):
        sample, mean, std = normal(3, 2, 4), normal(3, 2, 4, seed=1), torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64)
        full = torch.distributions.Normal(mean, std[:, None, None]).log_prob(sample)
        torch.testing.assert_close(gaussian_log_prob(sample, mean, std, dims="sum"), full.sum((1, 2)))
        torch.testing.assert_close(gaussian_log_prob(sample, mean, std), full.mean((1, 2)))

    def test_gradients(self):
        sample = normal(2, 3)
        std = torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True)
        assert gradcheck(lambda m, s: gaussian_log_prob(sample, m, s), (normal(2, 3, seed=1).requires_grad_(), std))

    def test_deterministic_steps_have_no_density(self):
        with pytest.raises(ValueError, match="std must be positive"):
            gaussian_log_prob(normal(1, 2), normal(1, 2), torch.zeros(1))
        with pytest.raises(ValueError, match="dims"):
            gaussian_log_prob(normal(1, 2), normal(1, 2), torch.ones(1), dims="max")


class TestDDIM:
    def test_published_standard_deviation(self):
        table = stable_diffusion().table
        _, std = ddim_transition(normal(1, 2), normal(1, 2), DDIMStep(table[301], table[281]), eta=1.0)
        assert std.item() == pytest.approx(0.222552, abs=1e-6)

    def test_mixed_timesteps_equal_single_rows(self):
        table, x, pred = stable_diffusion().table, normal(3, 2, 4), normal(3, 2, 4, seed=1)
        now, after = torch.tensor([301, 21, 981]), torch.tensor([281, 1, 961])
        mean, std = ddim_transition(x, pred, DDIMStep(table[now], table[after]), eta=0.7)
        for i in range(3):
            one = ddim_transition(x[i : i + 1], pred[i : i + 1], DDIMStep(table[now[i]], table[after[i]]), eta=0.7)
            torch.testing.assert_close((mean[i : i + 1], std[i : i + 1]), one)

    def test_eta_zero_with_the_true_noise_is_the_next_noise_level(self):
        schedule, x0, noise = stable_diffusion(), normal(2, 5), normal(2, 5, seed=1)
        x = schedule.add_noise(x0, noise, torch.tensor([500, 500]))
        mean, std = ddim_transition(x, noise, DDIMStep(schedule.table[500], schedule.table[480]), eta=0.0)
        torch.testing.assert_close(mean, schedule.add_noise(x0, noise, torch.tensor([480, 480])))
        assert std.tolist() == [0.0, 0.0]

    def test_step_to_the_clean_sample_returns_x0_without_noise(self):
        table, x, pred = stable_diffusion().table, normal(2, 5), normal(2, 5, seed=1)
        mean, std = ddim_transition(x, pred, DDIMStep(table[1], 1.0), eta=1.0)
        torch.testing.assert_close(mean, (x - (1 - table[1]).sqrt() * pred) / table[1].sqrt())
        assert std.tolist() == [0.0, 0.0]

    def test_gradient_reaches_the_prediction(self):
        table, x = stable_diffusion().table, normal(2, 3)
        step = DDIMStep(table[301], table[281])
        for prediction in VP_PREDICTIONS:
            def mean(pred, kind=prediction):
                return ddim_transition(x, pred, step, eta=1.0, prediction=kind)[0]

            assert gradcheck(mean, (normal(2, 3, seed=1).requires_grad_(),))

    @pytest.mark.peer
    @pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
    @pytest.mark.parametrize("prediction", VP_PREDICTIONS)
    @pytest.mark.parametrize("to_one", [True, False])
    def test_agrees_with_diffusers_at_every_step(self, spacing, prediction, to_one):
        diffusers = pytest.importorskip("diffusers")
        scheduler = diffusers.DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, timestep_spacing=spacing,
            prediction_type=prediction, set_alpha_to_one=to_one, steps_offset=1 if spacing == "leading" else 0,
        )
        scheduler.set_timesteps(10)
        x, pred, noise = (normal(2, 3, 4, seed=seed, dtype=torch.float32) for seed in range(3))
        finals = 0
        for index, t in enumerate(scheduler.timesteps):
            before = t - 1000 // 10
            if spacing != "linspace" and index + 1 < len(scheduler.timesteps):
                assert scheduler.timesteps[index + 1] == before
            after = scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod
            step = DDIMStep(scheduler.alphas_cumprod[t], after)
            mean, std = ddim_transition(x, pred, step, eta=0.8, prediction=prediction)
            theirs = scheduler.step(pred, t, x, eta=0.8, variance_noise=noise).prev_sample
            torch.testing.assert_close(mean + std[:, None, None] * noise, theirs, rtol=2e-5, atol=2e-5)
            finals += int(before < 0)
        assert finals == 1


class TestFlow:
    def test_noise_scale_rules(self):
        sigma = torch.tensor([1.0, 0.5], dtype=torch.float64)
        scale = flow_noise_scale(sigma, noise_level=0.7, sigma_max=0.9)
        torch.testing.assert_close(scale, torch.tensor([0.7 * math.sqrt(1 / 0.1), 0.7], dtype=torch.float64))
        assert flow_noise_scale(sigma, noise_level=0.3, rule="dance", sigma_max=0.9).tolist() == [0.3, 0.3]
        for change in ({"noise_level": -1.0}, {"rule": "euler"}, {"sigma_max": 1.0}):
            with pytest.raises(ValueError, match=next(iter(change))):
                flow_noise_scale(sigma, **({"noise_level": 0.7, "sigma_max": 0.9} | change))

    def test_without_noise_it_is_the_euler_step(self):
        x, velocity = normal(2, 3), normal(2, 3, seed=1)
        mean, std = flow_sde_transition(x, velocity, FlowStep(0.6, 0.5), noise_scale=0.0)
        torch.testing.assert_close(mean, x - 0.1 * velocity)
        assert std.tolist() == [0.0, 0.0]

    def test_score_form_is_the_same_formula(self):
        """x + u d - s^2 score d / 2 with score = -(x - (1 - sigma) x0) / sigma^2."""
        x, velocity, s = normal(2, 3), normal(2, 3, seed=1), 0.3
        sigma, d = 0.6, -0.1
        score = -(x - (1 - sigma) * (x - sigma * velocity)) / sigma**2
        mean, std = flow_sde_transition(x, velocity, FlowStep(sigma, sigma + d), noise_scale=s)
        torch.testing.assert_close(mean, x + velocity * d - 0.5 * s**2 * score * d)
        torch.testing.assert_close(std, torch.full((2,), s * math.sqrt(0.1), dtype=torch.float64))

    @pytest.mark.parametrize("level", [0.0, 0.7])
    def test_marginals_are_preserved(self, level):
        """Data N(m, s^2) with the exact velocity: the samples of a fine solver have that mean and spread."""
        m, s, count, steps = 1.0, 0.4, 40000, 200
        generator = torch.Generator().manual_seed(0)
        sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        x = torch.randn(count, 1, generator=generator, dtype=torch.float64)
        for now, after in itertools.pairwise(sigmas):
            variance = (1 - now) ** 2 * s**2 + now**2
            centred = (x - (1 - now) * m) / variance
            velocity = now * centred - (m + (1 - now) * s**2 * centred)
            scale = flow_noise_scale(now, noise_level=level, sigma_max=float(sigmas[1]))
            mean, std = flow_sde_transition(x, velocity, FlowStep(now, after), noise_scale=scale)
            x = mean + std[:, None] * torch.randn(count, 1, generator=generator, dtype=torch.float64)
        assert x.mean().item() == pytest.approx(m, rel=0.01)
        assert x.std().item() == pytest.approx(s, rel=0.015)

    def test_gradient_and_mixed_steps(self):
        x, step = normal(2, 3), FlowStep(torch.tensor([0.9, 0.3]), torch.tensor([0.8, 0.0]))
        scale = torch.tensor([0.5, 0.2])
        velocity = normal(2, 3, seed=1).requires_grad_()
        assert gradcheck(lambda u: flow_sde_transition(x, u, step, noise_scale=scale)[0], (velocity,))
        mean, std = flow_sde_transition(x, velocity, step, noise_scale=scale)
        for i in range(2):
            alone = FlowStep(step.sigma[i], step.sigma_next[i])
            one = flow_sde_transition(x[i : i + 1], velocity[i : i + 1], alone, noise_scale=scale[i])
            torch.testing.assert_close((mean[i : i + 1], std[i : i + 1]), one)
        with pytest.raises(ValueError, match="sigma"):
            flow_sde_transition(x, velocity, FlowStep(0.0, 0.0), noise_scale=0.1)

    @pytest.mark.peer
    def test_agrees_with_diffusers_euler_at_every_step(self):
        diffusers = pytest.importorskip("diffusers")
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(8)
        x, velocity = normal(2, 3, 4, dtype=torch.float32), normal(2, 3, 4, seed=1, dtype=torch.float32)
        for index, t in enumerate(scheduler.timesteps):
            step = FlowStep(scheduler.sigmas[index], scheduler.sigmas[index + 1])
            mean, _ = flow_sde_transition(x, velocity, step, noise_scale=0.0)
            theirs = scheduler.step(velocity, t, x).prev_sample
            torch.testing.assert_close(mean, theirs, rtol=1e-5, atol=1e-6)
