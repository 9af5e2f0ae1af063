"""Flow matching: a velocity carries noise to data along a straight path, x_t = (1-t) x_0 + t x_1.

As in the papers, t = 0 is noise and t = 1 is data, so x_0 is *noise* and x_1 an image here; everywhere else in `ddpm`,
x_0 is the image. A velocity is a function `velocity(x_t, t) -> u`, the expected x_1 - x_0. Velocity and eps are
interchangeable: `as_estimate` runs every algorithm of `sampling` on a flow, and `as_velocity` a flow's steps on a DDPM.
Source: Flow Matching, arXiv 2210.02747; Rectified Flow, arXiv 2209.03003.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.sampling import Estimate, guided, unguided
from ddpm.schedule import Schedule, check_whole

Velocity = Callable[[Tensor, float], Tensor]  # (x_t, t) -> u [B, C, H, W], t from 0, noise, to 1, data


def interpolate(x_0: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
    """The path, x_t = (1-t) x_0 + t x_1, for noise x_0 and data x_1 [B, C, H, W] and t [B] in [0, 1]."""
    t = t.view(-1, 1, 1, 1)
    return (1 - t) * x_0 + t * x_1


def flow_loss(model: nn.Module, x_1: Tensor, conditioning: tuple, generator: torch.Generator) -> Tensor:
    """‖(x_1 - x_0) - u_θ(x_t, t)‖² at t ~ U[0, 1], the mean over pixels, for data x_1 [B, C, H, W].

    conditioning: what the model takes after x_t and t, such as (c,) with c [B, 10].
    Source: Flow Matching eq. 23 with σ_min = 0, arXiv 2210.02747; Rectified Flow eq. 1, arXiv 2209.03003.
    """
    t = torch.rand(len(x_1), generator=generator, device=x_1.device)
    x_0 = torch.randn(x_1.shape, generator=generator, device=x_1.device)
    return F.mse_loss(model(interpolate(x_0, x_1, t), t, *conditioning).float(), x_1 - x_0)


def velocity_of(model: nn.Module, c: Tensor | None = None, guidance_scale: float = 1.0) -> Velocity:
    """The model's velocity; with conditioning c [B, …] guided against zeros, u = u_u + γ (u_c - u_u)."""
    estimate = unguided(model) if c is None else guided(model, c, torch.zeros_like(c), guidance_scale)
    return lambda x_t, t: estimate(x_t, t)[0]


def flow_times(num_steps: int, start: float = 0.0) -> list[float]:
    """start, start + 1/N, … and 1: steps of one length 1/N, the last one shortened if need be."""
    check_whole("num_steps", num_steps)
    if num_steps < 1 or not 0 <= start < 1:
        raise ValueError(f"a flow takes at least 1 step, from a t in [0, 1), not {num_steps} from {start}")
    count = math.ceil((1 - start) * num_steps - 1e-9)
    return [start + k / num_steps for k in range(count)] + [1.0]


def euler_step(velocity: Velocity, x_t: Tensor, t: float, t_next: float) -> Tensor:
    """x_{t'} = x_t + (t' - t) u(x_t, t): first order, one evaluation."""
    return x_t + (t_next - t) * velocity(x_t, t)


def heun_step(velocity: Velocity, x_t: Tensor, t: float, t_next: float) -> Tensor:
    """The mean of the velocities at both ends of an Euler step: second order, two evaluations."""
    u = velocity(x_t, t)
    u_next = velocity(x_t + (t_next - t) * u, t_next)
    return x_t + (t_next - t) * (u + u_next) / 2


@torch.no_grad()
def integrate(
    velocity: Velocity,
    x: Tensor,
    times: Sequence[float],
    *,
    step: Callable[[Velocity, Tensor, float, float], Tensor] = euler_step,
    callback: Callable[[int, float, Tensor], None] = lambda i, t, x_t: None,
) -> Tensor:
    """From x [B, C, H, W] at times[0], noise at t = 0, to times[-1], data at t = 1: dx = u(x, t) dt.

    callback(i, t, x_t): before each step.
    """
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        callback(i, t, x)
        x = step(velocity, x, t, t_next)
    return x


def flow_time(alpha_cumprod: float) -> float:
    """The t of the path that has a DDPM's signal to noise ratio: ᾱ = t² / (t² + (1-t)²)."""
    signal, noise = math.sqrt(alpha_cumprod), math.sqrt(1 - alpha_cumprod)
    return signal / (signal + noise)


def straight_schedule(num_timesteps: int = 1000) -> Schedule:
    """The `Schedule` whose timesteps, T-1 … 0 and -1, are evenly spaced on the path: t = 1/(T+1), …, and 1."""
    t = 1 - torch.arange(num_timesteps + 1, dtype=torch.float64) / (num_timesteps + 1)
    alphas_cumprod = t**2 / (t**2 + (1 - t) ** 2)
    return Schedule.from_betas(1 - alphas_cumprod[1:] / alphas_cumprod[:-1])


def as_estimate(velocity: Velocity, schedule: Schedule) -> Estimate:
    """A velocity as the eps that `sampling` takes, on any schedule.

    A DDPM's x = √ᾱ x_1 + √(1-ᾱ) eps, divided by √ᾱ + √(1-ᾱ), lies on the path, where eps = x_0 = x_t - t u.
    """

    def estimate(x: Tensor, timestep: int) -> tuple[Tensor, None]:
        alpha_cumprod = schedule.alpha_cumprod(timestep)
        x_t, t = x / (math.sqrt(alpha_cumprod) + math.sqrt(1 - alpha_cumprod)), flow_time(alpha_cumprod)
        return x_t - t * velocity(x_t, t), None

    return estimate


def as_velocity(estimate: Estimate, schedule: Schedule) -> Velocity:
    """The reverse: eps as a velocity, u = (x_t - eps) / t, at the timestep whose t on the path is nearest.

    It is exact at the times of the schedule, [flow_time(schedule.alpha_cumprod(k)) for k in timesteps]. Before the
    noisiest of them, x_t counts as being there, so that t = 0 may be asked for.
    """
    times = torch.tensor([flow_time(alpha_cumprod) for alpha_cumprod in schedule.alphas_cumprod.tolist()])

    def velocity(x_t: Tensor, t: float) -> Tensor:
        timestep = (times - t).abs().argmin().item()
        t = max(t, times[-1].item())
        eps, _ = estimate(x_t / math.hypot(t, 1 - t), timestep)
        return (x_t - eps) / t

    return velocity
