"""The sampling algorithms. Each is one function; one loop denoises.

What they share is an *estimate*, `estimate(x_t, t) -> (eps, v)`: a model's view of the noise in x_t, with
v = None where the variance is not learned. Guidance makes one from a model; the loop consumes it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ddpm.process import ddpm_step
from ddpm.schedule import CLEAN, Schedule

Model = Callable[..., Tensor]  # (x_t, t, conditioning) -> eps, or eps and v side by side
Estimate = Callable[[Tensor, int], tuple[Tensor, Tensor | None]]


def split_output(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """A model's output [B, C or 2C, H, W] -> (eps [B, C, H, W], v of the same shape or None), in float32."""
    output = output.float()
    return (output, None) if output.shape[1] == channels else tuple(output.split(channels, dim=1))


def unguided(model: Model, *conditioning) -> Estimate:
    """The model's own estimate, given its conditioning (none for an unconditional model)."""
    return lambda x_t, t: split_output(model(x_t, t, *conditioning), x_t.shape[1])


def guided(model: Model, c, null, guidance_scale: float) -> Estimate:
    """Classifier-free guidance, eps = eps_u + γ (eps_c - eps_u), both halves in one batched forward pass.

    c, null: the conditioning of B images and that of the null prompt: tensors [B, …], or objects of a class that
        has a `cat` of its own
    guidance_scale: γ, 0 is unconditional, 1 conditional; v comes from the conditional half
    Source: classifier-free guidance eq. 6 with γ = 1 + w, arXiv 2207.12598.
    """
    if guidance_scale == 1:
        return unguided(model, c)
    if guidance_scale == 0:
        return unguided(model, null)
    both = getattr(type(c), "cat", torch.cat)([null, c])

    def estimate(x_t: Tensor, t: int) -> tuple[Tensor, Tensor | None]:
        eps, v = split_output(model(torch.cat([x_t, x_t]), t, both), x_t.shape[1])
        eps_u, eps_c = eps.chunk(2)
        return eps_u + guidance_scale * (eps_c - eps_u), None if v is None else v.chunk(2)[1]

    return estimate


def noise_source(
    seeds: Sequence[int], shape: Sequence[int], device: str | torch.device = "cpu"
) -> Callable[[], Tensor]:
    """Gaussian noise [len(seeds), *shape], fresh at each call, every image from a generator of its own.

    So an image depends on its own seed and not on those drawn beside it. The generators live on the CPU:
    the same seed gives the same noise on every device.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda: torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators]).to(device)


@torch.no_grad()
def iterative_denoise(
    estimate: Estimate,
    x_t: Tensor,
    timesteps: Sequence[int],
    schedule: Schedule,
    *,
    noise: Callable[[], Tensor],
    variance: str = "beta",
    threshold: Callable[[Tensor], Tensor] | None = None,
    callback: Callable[[int, int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Denoise x_t [B, C, H, W] from timesteps[0] through the list and on to the clean image, which is returned.

    timesteps: strictly falling; noise(): a fresh z for each step, see `noise_source`
    variance, threshold: as in `ddpm_step`
    callback(step, t, x_t, x̂_0): after each step, with the x_t it started from
    Source: DDPM Algorithm 2, arXiv 2006.11239.
    """
    for step, (t, t_prev) in enumerate(zip(timesteps, [*timesteps[1:], CLEAN], strict=True)):
        eps, v = estimate(x_t, t)
        z = noise() if t_prev != CLEAN else None
        x_prev, x_0 = ddpm_step(x_t, eps, t, t_prev, schedule, noise=z, variance=variance, v=v, threshold=threshold)
        if callback is not None:
            callback(step, t, x_t, x_0)
        x_t = x_prev
    return x_t
