"""Flow matching where the velocity is known: a Gaussian mixture in closed form; and beside diffusers' scheduler."""

import itertools
import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from ddpm.flow import (
    as_estimate,
    as_velocity,
    euler_step,
    flow_loss,
    flow_time,
    flow_times,
    heun_step,
    integrate,
    interpolate,
    straight_schedule,
    velocity_of,
)
from ddpm.process import ddim_step
from ddpm.sampling import noise_source, sample, sdedit
from ddpm.schedule import CLEAN, linear_schedule

MEANS, SIGMA = torch.tensor([-2.0, 0.5, 1.5], dtype=torch.float64), 0.3
X_0 = noise_source([3], (1, 8, 8))().double()


def mixture_velocity(x_t: torch.Tensor, t: float) -> torch.Tensor:
    """E[x_1 - x_0 | x_t] for x_1 from Σ N(m_k, σ²)/3, in closed form: each pixel by itself."""
    variance = (1 - t) ** 2 + (t * SIGMA) ** 2
    means = MEANS.view(-1, *[1] * x_t.dim())
    weight = torch.softmax(-((x_t - t * means) ** 2) / (2 * variance), dim=0)
    # of one component: both x_1 and x_0 are jointly Gaussian with x_t
    slope = (t * SIGMA**2 - (1 - t)) / variance
    return (weight * (means + slope * (x_t - t * means))).sum(0)


def error(step, num_steps: int) -> float:
    exact = integrate(mixture_velocity, X_0, flow_times(2000), step=heun_step)
    return (integrate(mixture_velocity, X_0, flow_times(num_steps), step=step) - exact).abs().mean().item()


def test_the_mixtures_velocity_is_the_mean_of_x1_minus_x0():
    g = torch.Generator().manual_seed(0)
    x_1 = MEANS[torch.randint(3, (2_000_000,), generator=g)] + SIGMA * torch.randn(2_000_000, generator=g).double()
    x_0, t = torch.randn(2_000_000, generator=g).double(), 0.6
    x_t = (1 - t) * x_0 + t * x_1
    near = (x_t - 0.4).abs() < 0.02
    assert (x_1 - x_0)[near].mean() == pytest.approx(mixture_velocity(torch.tensor([0.4]), t).item(), abs=0.02)


@pytest.mark.parametrize(("step", "order"), [(euler_step, 1), (heun_step, 2)])
def test_the_order_of_a_step(step, order):
    assert math.log2(error(step, 80) / error(step, 160)) == pytest.approx(order, abs=0.15)


def test_the_flow_ends_in_the_mixture():
    x_1 = integrate(mixture_velocity, noise_source([0], (1, 200, 200))().double(), flow_times(100), step=heun_step)
    nearest = (x_1[..., None] - MEANS).abs().min(-1)
    assert torch.bincount(nearest.indices.flatten()) / 40_000 == pytest.approx([1 / 3] * 3, abs=0.02)
    assert nearest.values.square().mean().sqrt() == pytest.approx(SIGMA, abs=0.02)


def test_times_end_at_1_with_a_shorter_step_if_need_be():
    assert flow_times(4) == [0, 0.25, 0.5, 0.75, 1]
    assert flow_times(4, start=0.4) == pytest.approx([0.4, 0.65, 0.9, 1])
    for num_steps in range(1, 400):
        assert len(flow_times(num_steps)) == num_steps + 1
    for wrong in (0, 1.0), (4, 1.0), (4, -0.1):
        with pytest.raises(ValueError, match="a flow takes at least 1 step"):
            flow_times(*wrong)


def test_euler_is_diffusers_step_by_step():
    """Their σ = 1 - t counts the noise, their model's output is x_0 - x_1 = -u."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1 - t for t in flow_times(7)[:-1]])
    theirs, ours = X_0, []
    integrate(mixture_velocity, X_0, flow_times(7), callback=lambda i, t, x_t: ours.append(x_t))
    for timestep, x_t in zip(scheduler.timesteps, ours, strict=True):
        torch.testing.assert_close(x_t, theirs, atol=1e-5, rtol=1e-5)
        u = mixture_velocity(theirs, 1 - timestep.item() / 1000)
        theirs = scheduler.step(-u, timestep, theirs, return_dict=False)[0]
    torch.testing.assert_close(integrate(mixture_velocity, X_0, flow_times(7)), theirs, atol=1e-5, rtol=1e-5)


def through_ddim(num_steps: int) -> torch.Tensor:
    """DDIM on ᾱ = t² / (t² + (1-t)²), with the velocity as eps."""
    schedule = straight_schedule(num_steps)
    estimate = as_estimate(mixture_velocity, schedule)
    return sample(estimate, range(num_steps)[::-1], schedule, noise=lambda: X_0, step=ddim_step)


def test_ddim_and_euler_meet_in_the_limit():
    exact = integrate(mixture_velocity, X_0, flow_times(2000), step=heun_step)
    distances = [(through_ddim(n) - exact).abs().mean() for n in (100, 200, 400)]
    assert distances[2] < 0.01
    for coarse, fine in itertools.pairwise(distances):
        assert coarse / fine == pytest.approx(2, abs=0.25)


@pytest.mark.parametrize("schedule", [straight_schedule(1000), linear_schedule()])
def test_eps_of_a_velocity_and_back(schedule):
    estimate = as_estimate(mixture_velocity, schedule)
    velocity = as_velocity(estimate, schedule)
    for timestep in (0, 7, 150, 299):
        t = flow_time(schedule.alpha_cumprod(timestep))
        torch.testing.assert_close(velocity(X_0, t), mixture_velocity(X_0, t), atol=1e-4, rtol=1e-4)


def test_on_one_sample_eps_is_the_noise():
    """Where the data is one point, every algorithm must find it, and eps is what was added."""
    x_1 = torch.full_like(X_0, 0.7)
    schedule = linear_schedule()
    estimate = as_estimate(lambda x_t, t: (x_1 - x_t) / (1 - t), schedule)
    for timestep in (10, 299):
        alpha_cumprod = schedule.alpha_cumprod(timestep)
        x_t = math.sqrt(alpha_cumprod) * x_1 + math.sqrt(1 - alpha_cumprod) * X_0
        torch.testing.assert_close(estimate(x_t, timestep)[0], X_0)
    edited = sdedit(estimate, X_0.clamp(0, 1), 2, [299, 200, 100, 0], schedule, noise=lambda: X_0)
    torch.testing.assert_close(edited, x_1)


def test_the_straight_schedules_timesteps_are_even_on_the_path():
    schedule = straight_schedule(99)
    times = [flow_time(schedule.alpha_cumprod(k)) for k in range(CLEAN, 99)]
    assert times == pytest.approx([1 - k / 100 for k in range(100)])


def test_a_ddpm_as_a_velocity_starts_at_its_noisiest_timestep():
    schedule = linear_schedule()
    velocity = as_velocity(lambda x, timestep: (torch.full_like(x, timestep), None), schedule)
    t = flow_time(schedule.alpha_cumprod(299))
    torch.testing.assert_close(velocity(X_0, 0.0), (X_0 - 299) / t)


def test_loss_is_zero_for_the_true_velocity_and_the_targets_square_for_none():
    x_1 = noise_source([1], (1, 32, 32))().repeat(500, 1, 1, 1)

    def oracle(x_t, t):
        return (x_1 - x_t) / (1 - t.view(-1, 1, 1, 1))

    def loss(model):
        return flow_loss(model, x_1, (), torch.Generator().manual_seed(0))

    assert loss(oracle) < 1e-4
    assert loss(lambda x_t, t: torch.zeros_like(x_t)) == pytest.approx(1 + x_1.square().mean().item(), rel=0.01)


def test_the_path_goes_from_noise_to_data():
    x_0, x_1 = torch.zeros(3, 1, 2, 2), torch.ones(3, 1, 2, 2)
    assert interpolate(x_0, x_1, torch.tensor([0.0, 0.3, 1.0])).mean((1, 2, 3)).tolist() == pytest.approx([0, 0.3, 1])


def test_guidance_is_that_of_the_velocities():
    c = torch.ones(1, 1)
    model = lambda x_t, t, c: x_t * t + c.view(-1, 1, 1, 1)  # noqa: E731
    for scale in (0.0, 1.0, 5.0):
        torch.testing.assert_close(velocity_of(model, c, scale)(X_0.float(), 0.5), X_0.float() * 0.5 + scale)
