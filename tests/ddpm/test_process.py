"""The forward process and the reverse step: against diffusers, and against what Gaussians must do."""

import math
from functools import partial

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm.process import Prediction, add_noise, ddpm_step, dynamic_threshold, predict_x0, static_threshold
from ddpm.sampling import iterative_denoise
from ddpm.schedule import cosine_schedule, leading_timesteps, linear_schedule

SCHEDULES = {"linear": linear_schedule(300), "cosine": cosine_schedule(1000)}


def toy_model(x_t, t, channels):
    """Stands in for a trained model: the exact eps for data from N(0, 1), bent; v in [-1, 1] when channels is 6."""
    alpha_cumprod = cosine_schedule().alpha_cumprod(int(t))
    bend = 1.5 * math.sqrt(alpha_cumprod) * torch.sin(2 * x_t.roll(1, -1))
    eps = math.sqrt(1 - alpha_cumprod) * (x_t + bend)
    return torch.cat([eps, torch.sin(3 * x_t + t / 100)], dim=1)[:, :channels]


def diffusers_trajectory(scheduler, x_T, channels):
    """Every x_t that diffusers passes through, and its result; noise from seed 1."""
    x_t, generator, frames = x_T, torch.Generator().manual_seed(1), []
    for t in scheduler.timesteps:
        frames.append(x_t)
        x_t = scheduler.step(toy_model(x_t, t, channels), t, x_t, generator=generator).prev_sample
    return torch.stack([*frames, x_t])


def our_trajectory(x_T, channels, num_steps, variance, threshold):
    """The same with `iterative_denoise`."""
    generator, frames = torch.Generator().manual_seed(1), []

    def estimate(x_t, t):
        output = toy_model(x_t, t, channels)
        return output[:, :3], output[:, 3:] if channels == 6 else None

    x_0 = iterative_denoise(
        estimate,
        x_T,
        leading_timesteps(1000, num_steps),
        cosine_schedule(),
        noise=lambda: torch.randn(x_T.shape, generator=generator),
        step=partial(ddpm_step, variance=variance),
        threshold=threshold,
        callback=lambda step, t, x_t, x_0: frames.append(x_t),
    )
    return torch.stack([*frames, x_0])


@pytest.mark.parametrize("num_steps", [5, 27, 100, 1000])
@pytest.mark.parametrize(
    ("variance", "variance_type", "threshold"),
    [
        ("learned_range", "learned_range", partial(dynamic_threshold, maximum=1.5)),
        ("learned_range", "learned_range", partial(dynamic_threshold, maximum=1.0)),
        ("beta_tilde", "fixed_small", None),
        ("beta", "fixed_large", None),
    ],
)
def test_whole_trajectories_equal_diffusers(num_steps, variance, variance_type, threshold):
    scheduler = DDPMScheduler(
        1000,
        beta_schedule="squaredcos_cap_v2",
        variance_type=variance_type,
        clip_sample=False,
        thresholding=threshold is not None,
        dynamic_thresholding_ratio=0.95,
        sample_max_value=1.0 if threshold is None else threshold.keywords["maximum"],
    )
    scheduler.set_timesteps(num_steps)
    channels = 6 if variance == "learned_range" else 3
    x_T = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = our_trajectory(x_T, channels, num_steps, variance, threshold)

    # diffusers computes its coefficients in float32: 1 - ᾱ_0 = 4e-5 is off by 0.1 %, and so is the last step
    theirs = diffusers_trajectory(scheduler, x_T, channels)
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)

    scheduler.alphas_cumprod = cosine_schedule().alphas_cumprod  # its own arithmetic, in float64
    theirs = diffusers_trajectory(scheduler, x_T, channels)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_add_noise_equals_diffusers_for_one_t_and_for_a_batch():
    x_0, eps = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 17, 500, 999])
    theirs = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2").add_noise(x_0, eps, t)
    torch.testing.assert_close(add_noise(x_0, eps, t, cosine_schedule()), theirs, atol=1e-5, rtol=0)
    assert torch.equal(add_noise(x_0, eps, torch.full((4,), -1), cosine_schedule()), x_0)  # the clean image
    one_by_one = [add_noise(x_0[i : i + 1], eps[i : i + 1], int(t[i]), cosine_schedule()) for i in range(4)]
    torch.testing.assert_close(torch.cat(one_by_one), theirs, atol=1e-5, rtol=0)


def test_predict_x0_undoes_add_noise():
    x_0, eps = torch.randn(2, 1, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for t in (0, 100, 299):
        x_t = add_noise(x_0, eps, t, linear_schedule())
        torch.testing.assert_close(predict_x0(x_t, eps, t, linear_schedule()), x_0)


def test_thresholds():
    x_0 = torch.tensor([-3.0, -0.5, 0.0, 0.5, 3.0]).view(1, 1, 1, 5)
    assert static_threshold(x_0).flatten().tolist() == [-1, -0.5, 0, 0.5, 1]
    # the percentile is above the maximum: clip at 1.5, divide by it
    assert dynamic_threshold(x_0, 0.95, 1.5).flatten().tolist() == pytest.approx([-1, -1 / 3, 0, 1 / 3, 1])
    # an image within [-1, 1] stays as it is, whatever stands beside it in the batch
    pair = torch.cat([x_0 / 3, x_0])
    torch.testing.assert_close(dynamic_threshold(pair)[:1], x_0 / 3)


@st.composite
def steps(draw):
    """A schedule and two of its timesteps, t' < t, neither the clean image."""
    schedule = SCHEDULES[draw(st.sampled_from(sorted(SCHEDULES)))]
    t_prev = draw(st.integers(0, schedule.num_timesteps - 2))
    return schedule, draw(st.integers(t_prev + 1, schedule.num_timesteps - 1)), t_prev


def images(seed: int, count: int):
    return torch.randn(count, 1, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)
@given(steps(), st.integers(0, 1000))
def test_the_mean_for_a_perfect_eps_is_that_of_the_true_posterior(step, seed):
    """q(x_t' | x_t, x_0) from Bayes' rule: precisions add, means weigh by them."""
    schedule, t, t_prev = step
    x_0, eps = images(seed, 2)
    x_t = add_noise(x_0, eps, t, schedule)
    alpha_cumprod_prev = math.prod(1 - beta for beta in schedule.betas[: t_prev + 1].tolist())
    alpha = math.prod(1 - beta for beta in schedule.betas[t_prev + 1 : t + 1].tolist())
    prior, likelihood = 1 / (1 - alpha_cumprod_prev), alpha / (1 - alpha)
    expected = (prior * math.sqrt(alpha_cumprod_prev) * x_0 + likelihood * x_t / math.sqrt(alpha)) / (
        prior + likelihood
    )
    x_0_hat = predict_x0(x_t, eps, t, schedule)
    torch.testing.assert_close(x_0_hat, x_0, atol=1e-6, rtol=1e-6)
    x_prev = ddpm_step(x_t, Prediction(x_0_hat), t, t_prev, schedule, torch.zeros_like(x_t))
    torch.testing.assert_close(x_prev, expected, atol=1e-6, rtol=1e-6)


@settings(deadline=None)
@given(steps())
def test_a_perfect_step_keeps_the_marginal(step):
    """With β̃, eps and z together give x_t' the variance 1 - ᾱ_t' and the mean √ᾱ_t' x_0 of the forward process."""
    schedule, t, t_prev = step
    zero, one = torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, 1, dtype=torch.float64)

    def coefficient(x_0, eps, z):
        x_t = add_noise(x_0, eps, t, schedule)
        predicted = Prediction(predict_x0(x_t, eps, t, schedule))
        return ddpm_step(x_t, predicted, t, t_prev, schedule, z, variance="beta_tilde").item()

    alpha_cumprod_prev = schedule.alpha_cumprod(t_prev)
    assert coefficient(one, zero, zero) == pytest.approx(math.sqrt(alpha_cumprod_prev), rel=1e-6)
    variance = coefficient(zero, one, zero) ** 2 + coefficient(zero, zero, one) ** 2
    assert variance == pytest.approx(1 - alpha_cumprod_prev, rel=1e-6, abs=1e-9)


@settings(deadline=None)
@given(st.sampled_from(sorted(SCHEDULES)), st.data(), st.sampled_from(["beta", "beta_tilde", "learned_range"]))
def test_the_step_to_the_clean_image_returns_x0_without_noise(name, data, variance):
    """The papers' t' = 0, -1 here."""
    schedule = SCHEDULES[name]
    t = data.draw(st.integers(0, schedule.num_timesteps - 1))
    x_t, eps = images(t, 2)
    v = images(t + 1, 1)[0] if variance == "learned_range" else None
    options = {"noise": lambda: pytest.fail("noise was drawn"), "step": partial(ddpm_step, variance=variance)}
    x = iterative_denoise(lambda *_: (eps, v), x_t, [t], schedule, **options)
    assert torch.equal(x, predict_x0(x_t, eps, t, schedule))


@settings(deadline=None)
@given(steps(), st.floats(-1, 1))
def test_learned_range_lies_between_the_two_fixed_variances(step, v):
    schedule, t, t_prev = step
    zero, one = torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, 1, dtype=torch.float64)

    def sigma(variance, v=None):
        return ddpm_step(zero, Prediction(zero, v), t, t_prev, schedule, one, variance=variance).item()

    small, large = sigma("beta_tilde"), sigma("beta")
    assert small <= large
    expected = math.exp((1 - v) / 2 * math.log(small) + (1 + v) / 2 * math.log(large))
    assert sigma("learned_range", v * one) == pytest.approx(expected, rel=1e-9)


@given(st.integers(0, 299), st.integers(0, 299))
def test_timesteps_out_of_order_are_refused(t, later):
    later = max(t, later)
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match=f"not from {t} to {later}"):
        ddpm_step(x, Prediction(x), t, later, linear_schedule(), x)


def test_variance_and_v_must_go_together():
    x = torch.zeros(1, 1, 2, 2)

    def step(v=None, **variance):
        return ddpm_step(x, Prediction(x, v), 5, 3, linear_schedule(), x, **variance)

    with pytest.raises(ValueError, match="must be one of"):
        step(variance="gamma")
    with pytest.raises(ValueError, match="needs v"):
        step(variance="learned_range")
    for variance in ("beta", "beta_tilde"):  # which do not use it
        assert torch.equal(step(variance=variance, v=x), step(variance=variance))
