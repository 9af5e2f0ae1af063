"""The schedules against diffusers, and the lists of timesteps as they are documented."""

from itertools import pairwise

import pytest
import torch
from diffusers import DDPMScheduler

from ddpm.schedule import (
    Schedule,
    cosine_schedule,
    leading_timesteps,
    linear_schedule,
    linspace_timesteps,
    strided_timesteps,
)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (linear_schedule(300, 1e-4, 0.02), DDPMScheduler(300, 1e-4, 0.02, "linear")),
        (linear_schedule(1000, 1e-4, 0.02), DDPMScheduler(1000, 1e-4, 0.02, "linear")),
        (cosine_schedule(1000), DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2")),
        (cosine_schedule(300), DDPMScheduler(300, beta_schedule="squaredcos_cap_v2")),
    ],
)
def test_schedules_equal_diffusers(ours, theirs):
    assert ours.alphas_cumprod.dtype == torch.float64
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.betas.float(), theirs.betas, atol=1e-6, rtol=0)


def test_the_defaults_are_mnist_and_if():
    assert linear_schedule().num_timesteps == 300
    assert linear_schedule().betas[[0, -1]].tolist() == pytest.approx([1e-4, 0.02])
    assert cosine_schedule().num_timesteps == 1000
    assert cosine_schedule().betas.max() == 0.999


def test_betas_are_a_tensor_an_array_or_a_list():
    expected = linear_schedule(10).betas
    for betas in (expected, expected.numpy(), expected.tolist()):
        assert torch.equal(Schedule.from_betas(betas).betas, expected)


@pytest.mark.parametrize("beta", [0.0, 1.0, 1.5, -0.1, float("nan")])
def test_betas_that_are_no_variances_are_refused(beta):
    with pytest.raises(ValueError, match=f"must be above 0 and below 1, not {beta:g}"):
        Schedule.from_betas([0.1, beta])


def test_alpha_cumprod_is_one_at_the_clean_image_and_refused_outside():
    schedule = linear_schedule()
    assert schedule.alpha_cumprod(-1) == 1
    assert schedule.alpha_cumprod(0) == pytest.approx(1 - 1e-4)
    for t in (-2, 300):
        with pytest.raises(ValueError, match="outside this schedule"):
            schedule.alpha_cumprod(t)


def test_strided_timesteps_of_part_a():
    timesteps = strided_timesteps(1000, stride=30)
    assert timesteps[:3] == [990, 960, 930]
    assert timesteps[-2:] == [30, 0]
    assert len(timesteps) == 34


@pytest.mark.parametrize("num_steps", [1, 2, 7, 27, 50, 100, 999, 1000])
def test_leading_timesteps_equal_diffusers(num_steps):
    scheduler = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2", timestep_spacing="leading")
    scheduler.set_timesteps(num_steps)
    assert leading_timesteps(1000, num_steps) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("num_steps", [2, 7, 50, 199, 200, 299, 300])
def test_linspace_timesteps_fall_strictly_from_the_last_to_zero(num_steps):
    timesteps = linspace_timesteps(300, num_steps)
    assert (timesteps[0], timesteps[-1], len(timesteps)) == (299, 0, num_steps)
    assert all(a > b for a, b in pairwise(timesteps))


def test_impossible_lists_are_refused():
    for steps in (0, -1, 301):
        for spacing in (leading_timesteps, linspace_timesteps):
            with pytest.raises(ValueError, match=f"from 1 to 300.* not {steps}"):
                spacing(300, steps)
    for stride in (0, 1000):
        with pytest.raises(ValueError, match="stride"):
            strided_timesteps(1000, stride)
    for schedule in (linear_schedule, cosine_schedule):
        with pytest.raises(ValueError, match="needs from 1 to"):
            schedule(0)
