"""Drawing digits with a `TimeUNet` or `ClassUNet`, and with a `TimeFlow` or `ClassFlow`."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm.flow import euler_step, flow_times, integrate, velocity_of
from ddpm.mnist.unet import IMAGE_SIZE, NUM_CLASSES, TimeFlow, TimeUNet
from ddpm.sampling import guided, iterative_denoise, noise_source, unguided
from ddpm.schedule import Schedule, linspace_timesteps


def sample_digits(
    model: TimeUNet,
    labels: Sequence[int] | None,
    seeds: Sequence[int],
    schedule: Schedule,
    *,
    num_steps: int | None = None,
    guidance_scale: float = 5.0,
    batch_size: int = 100,
    callback: Callable[[int, Tensor], None] = lambda done, x_t: None,
) -> Tensor:
    """Digits from pure noise: labels [N] and seeds [N] -> images [N, 1, 28, 28] in [0, 1], on the CPU (B4, B5).

    labels: the digits to draw with a `ClassUNet`; None for a `TimeUNet`
    num_steps: how many of the schedule's timesteps to visit, all of them when None
    guidance_scale: γ of `guided`; without labels there is nothing to guide
    callback(done, x_t): after each step: how many steps of how many digits are done, of N · num_steps in all, and
        the noisy digits of the batch before it
    Each image depends on its own seed and label alone, up to the rounding of another batch size.
    Raises ValueError when num_steps is not from 1 to T.

    Digits are in [0, 1] in training, too: after 300 linear steps ᾱ_T is still 0.048, so x_T keeps 22 % of the image. In
    [-1, 1], where digits have the mean -0.74, x_T would have the mean -0.16, 4.5 standard errors from the N(0, I) that
    sampling starts from; in [0, 1] it is 0.03, less than one.
    """
    device = next(model.parameters()).device
    timesteps = linspace_timesteps(schedule.num_timesteps, schedule.num_timesteps if num_steps is None else num_steps)
    images = []
    for start in range(0, len(seeds), batch_size):
        batch = slice(start, start + batch_size)
        noise = noise_source(seeds[batch], (1, IMAGE_SIZE, IMAGE_SIZE), device)
        if labels is None:
            estimate = unguided(model)
        else:
            c = one_hot(labels[batch], device)
            estimate = guided(model, c, torch.zeros_like(c), guidance_scale)

        def report(step: int, t: int, x_t: Tensor, _: Tensor, before: int = start * len(timesteps)):
            callback(before + (step + 1) * len(x_t), x_t)

        x_0 = iterative_denoise(estimate, noise(), timesteps, schedule, noise=noise, callback=report)
        images.append(x_0.clamp(0, 1).cpu())
    return torch.cat(images)


def sample_flow(
    model: TimeFlow,
    labels: Sequence[int] | None,
    seeds: Sequence[int],
    *,
    num_steps: int = 50,
    guidance_scale: float = 5.0,
    step: Callable = euler_step,
    batch_size: int = 100,
    callback: Callable[[int, Tensor], None] = lambda done, x_t: None,
) -> Tensor:
    """`sample_digits` for a flow, in steps of 1/num_steps from t = 0 to 1 (B6, B7).

    step: `euler_step`, or `heun_step` for two evaluations a step and second order
    """
    device = next(model.parameters()).device
    images = []
    for start in range(0, len(seeds), batch_size):
        batch = slice(start, start + batch_size)
        x_0 = noise_source(seeds[batch], (1, IMAGE_SIZE, IMAGE_SIZE), device)()
        c = None if labels is None else one_hot(labels[batch], device)

        def report(i: int, t: float, x_t: Tensor, before: int = start * num_steps):
            callback(before + (i + 1) * len(x_t), x_t)

        velocity = velocity_of(model, c, guidance_scale)
        x_1 = integrate(velocity, x_0, flow_times(num_steps), step=step, callback=report)
        images.append(x_1.clamp(0, 1).cpu())
    return torch.cat(images)


def one_hot(labels: Sequence[int], device: torch.device) -> Tensor:
    return F.one_hot(torch.tensor(labels), NUM_CLASSES).float().to(device)
