"""Blurs as wide as they say, seeds that differ, and history that a solver may use."""

from functools import partial

import pytest
import torch

from ddpm.components import Component, low_pass
from ddpm.process import dpm_solver_step
from ddpm.sampling import anagram, hybrid, inpaint, noise_source, sample
from ddpm.schedule import cosine_schedule, linspace_timesteps
from ddpm.tools.runs import step_seed
from ddpm.views import identity, vertical_flip


@pytest.mark.parametrize("size", [32, 64, 128, 256])
@pytest.mark.parametrize("sigma", [2.0, 4.0, 8.0])
def test_a_blur_is_as_wide_as_it_says_at_every_size(size, sigma):
    """The standard deviation of a point, blurred, on a canvas that its edges do not reach."""
    point = torch.zeros(1, 1, size, size, dtype=torch.float64)
    point[..., size // 2, size // 2] = 1
    row = low_pass(point, sigma)[0, 0].sum(0)
    measured = ((torch.arange(size) - size // 2) ** 2 * row).sum().sqrt().item() * 64 / size
    assert measured == pytest.approx(sigma, rel=0.03)


def test_a_wide_blur_parts_an_image_alike_at_both_sizes():
    """σ = 16: a coarse pattern keeps the same share of its contrast at 32 and at 64 pixels."""

    def contrast(size: int) -> float:
        wave = torch.cos(torch.linspace(0, torch.pi, size, dtype=torch.float64)).expand(1, 1, size, size)
        return low_pass(wave, 16.0).std().item() / wave.std().item()

    assert contrast(32) == pytest.approx(contrast(64), rel=0.02)
    assert contrast(64) == pytest.approx(contrast(256), rel=0.03)


def test_seeds_beyond_32_bits_are_refused_since_they_would_draw_the_same():
    drawn = [torch.randn(4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1 + 2**32)]
    assert torch.equal(*drawn)  # torch's own, the reason
    with pytest.raises(ValueError, match="from 0 to"):
        noise_source([1 + 2**32], (4,))
    assert not torch.equal(noise_source([2**32 - 1], (4,))(), noise_source([2**31 - 1], (4,))())


def test_training_seeds_differ_where_only_high_bits_do():
    seeds = [step_seed(seed, step) for seed in (0, 256, 2**20, 20040805) for step in range(100)]
    assert len(set(seeds)) == 400
    assert all(seed < 2**32 for seed in seeds)


def test_a_multistep_solver_does_not_extrapolate_across_alternating_views():
    """Two views that want opposite images: with history each step would overshoot by the other's difference."""
    schedule = cosine_schedule()

    def wants(target: torch.Tensor):
        def estimate(x_t, t):
            alpha_cumprod = schedule.alpha_cumprod(t)
            return (x_t - alpha_cumprod**0.5 * target) / (1 - alpha_cumprod) ** 0.5, None

        return estimate

    target = torch.randn(1, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    estimate = anagram([wants(target), wants(target)], [identity(), vertical_flip()], "alternate")
    steps, histories = linspace_timesteps(1000, 10), []

    def step(x_t, predicted, *others):
        histories.append(predicted.before)
        return dpm_solver_step(x_t, predicted, *others)

    noise = noise_source([0], (3, 8, 8))
    sample(estimate, steps, schedule, noise=noise, step=step)
    assert histories == [None] * 9
    histories.clear()
    sample(hybrid([estimate], [Component("all", lambda x: x)]), steps, schedule, noise=noise, step=step)
    assert histories == [None] * 9  # nor where another estimate is made of it
    histories.clear()
    sample(wants(target), steps, schedule, noise=noise, step=partial(step))
    assert histories[0] is None and all(history is not None for history in histories[1:])


def test_rising_timesteps_and_none_are_refused_rather_than_noised():
    x_orig, mask, noise = torch.zeros(1, 3, 8, 8), torch.ones(1, 1, 8, 8), noise_source([0], (3, 8, 8))
    estimate = lambda x_t, t: (x_t, None)  # noqa: E731
    rising, none = "must fall strictly", "there are no timesteps to visit"
    for timesteps, told in ([0, 30, 60], rising), ([60, 60, 0], rising), ([60, 30, 40], rising), ([], none):
        with pytest.raises(ValueError, match=told):
            sample(estimate, timesteps, cosine_schedule(), noise=noise)
        with pytest.raises(ValueError, match=told):
            inpaint(estimate, x_orig, mask, timesteps, cosine_schedule(), noise=noise)
