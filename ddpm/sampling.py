"""The sampling algorithms. Each is one function; one loop denoises.

What they share is an *estimate* of the noise in x_t, `estimate(x_t, t) -> (eps, v)`: `ddpm.estimates` makes one from a
model or from several, and what users need of it may be imported from here, too. The loop, `denoise_along`, consumes the
estimate, one *step* after another: `ddpm_step`, `ddim_step`, `dpm_solver_step`, or one of your own,
`step(x_t, predicted, t, t_prev, schedule, noise) -> x_prev`.
"""

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ddpm.components import Component, gaussian_blur
from ddpm.estimates import (  # noqa: F401
    ALWAYS,
    Estimate,
    Guider,
    Model,
    alternates,
    anagram,
    classifier_free,
    compose,
    guided,
    hybrid,
    projected,
    rescaled,
    split_output,
    unguided,
)
from ddpm.process import Prediction, Threshold, add_noise, ddpm_step, predict_x0
from ddpm.schedule import CLEAN, Schedule

Step = Callable[[Tensor, Prediction, int, int, Schedule, Tensor], Tensor]  # options are bound with functools.partial
Noise = Callable[[], Tensor]  # a fresh z [B, C, H, W] at each call, see `noise_source`
MAX_STEPS = 1_000_000  # of one image
Callback = Callable[[int, int, Tensor, Tensor], None]  # (step, t, x_t, x̂_0), after each step


def noise_source(seeds: Sequence[int], shape: Sequence[int], device: str | torch.device = "cpu") -> Noise:
    """Gaussian noise [len(seeds), *shape], fresh at each call, every image from a generator of its own.

    So an image depends on its own seed and not on the others of the batch. The generators live on the CPU:
    the same seed gives the same noise on every device. Raises ValueError as `whole_seeds` does.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in whole_seeds(seeds)]
    return lambda: torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators]).to(device)


def whole_seeds(seeds: Sequence[int]) -> list[int]:
    """Seeds as a list, of a range, a tensor or an array, too.

    Raises ValueError for others than whole numbers from 0 to 2^32 - 1, of which torch's generators keep all bits.
    """
    try:
        whole = [operator.index(seed) for seed in seeds]
    except TypeError:
        wanted = "seeds must be a list of whole numbers, of one for each image, such as [1, 2]"
        raise ValueError(f"{wanted}, not {seeds!r:.40}") from None
    for seed in whole:
        if not 0 <= seed < 2**32:
            raise ValueError(f"a seed must be from 0 to 2^32 - 1, not {seed}")
    return whole


def classical_denoise(x_t: Tensor, t: int, schedule: Schedule) -> Tensor:
    """Denoise x_t [B, C, H, W] without a model: the mean x_t / √ᾱ_t, blurred more the more noise there is.

    The Gaussian's σ is 2 ((1-ᾱ_t) / ᾱ_t)^0.35 pixels of a 64-pixel image: over 46 images and eight t, within about
    10 % of the σ of least squared error. Returns an estimate of x_0 [B, C, H, W].
    """
    alpha_cumprod, side = schedule.alpha_cumprod(t), min(x_t.shape[-2:])
    sigma = 2 * ((1 - alpha_cumprod) / alpha_cumprod) ** 0.35 * side / 64
    if sigma == 0:
        return x_t
    return gaussian_blur(x_t / math.sqrt(alpha_cumprod), sigma, math.ceil(3 * sigma))


@torch.no_grad()
def one_step_denoise(estimate: Estimate, x_t: Tensor, t: int, schedule: Schedule) -> Tensor:
    """The model's estimate x̂_0 of the clean image in x_t [B, C, H, W], in one go.

    It is the mean of all images that x_t may have come from, so it blurs as t grows.
    Source: DDPM eq. 15, arXiv 2006.11239.
    """
    return predict_x0(x_t, estimate(x_t, t)[0], t, schedule)


@torch.no_grad()
def denoise_along(
    path: Iterable[tuple[int, int]],
    estimate: Estimate,
    x_t: Tensor,
    schedule: Schedule,
    *,
    noise: Noise,
    step: Step = ddpm_step,
    threshold: Threshold | None = None,
    correct_x0: Callable[[Tensor, int], Tensor] | None = None,
    correct: Callable[[Tensor, int], Tensor] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """The loop of every algorithm: from x_t [B, C, H, W] along a path of steps (t, t') to the clean image, t' = -1.

    noise(): a fresh z for each step, see `noise_source`
    step: `ddpm_step`, `ddim_step`, `dpm_solver_step` or another, its options bound by functools.partial
    threshold: applied to x̂_0, such as `dynamic_threshold`
    correct_x0(x̂_0, t): replaces the thresholded x̂_0 before the step, as restoration does
    correct(x_{t'}, t'): replaces the result of the step, as inpainting does
    callback(step, t, x_t, x̂_0): after each step, with the x_t it started from, see `Trajectory`
    Where the path goes up, t' > t, x_t is noised back, as RePaint does. Source: DDPM Algorithm 2, arXiv 2006.11239.
    """
    before = None
    for i, (t, t_prev) in enumerate(path):
        if t_prev > t:
            alpha = schedule.alpha_cumprod(t_prev) / schedule.alpha_cumprod(t)
            x_t, before = math.sqrt(alpha) * x_t + math.sqrt(1 - alpha) * noise(), None
            continue
        eps, v = estimate(x_t, t)
        x_0 = predict_x0(x_t, eps, t, schedule)
        x_0 = x_0 if threshold is None else threshold(x_0)
        x_0 = x_0 if correct_x0 is None else correct_x0(x_0, t)
        x_prev = x_0 if t_prev == CLEAN else step(x_t, Prediction(x_0, v, before), t, t_prev, schedule, noise())
        if callback is not None:
            callback(i, t, x_t, x_0)
        x_t = x_prev if correct is None else correct(x_prev, t_prev)
        before = None if alternates(estimate) else (t, x_0)
    check_finite("the image", x_t)
    return x_t


def check_finite(where: str, *tensors: Tensor):
    """Raises ValueError, saying where, when one of the tensors is not finite."""
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise ValueError(f"{where}: not finite any more; try float32 (--dtype), or less guidance")


def iterative_denoise(
    estimate: Estimate, x_t: Tensor, timesteps: Sequence[int], schedule: Schedule, *, noise: Noise, **loop
) -> Tensor:
    """Denoise x_t [B, C, H, W] from timesteps[0] through the list and on to the clean image, which is returned.

    `sample` starts it from pure noise, `sdedit` from an image
    timesteps: strictly falling
    noise, loop: as in `denoise_along`, such as step, threshold and callback
    """
    check_falling(timesteps)
    path = itertools.pairwise([*timesteps, CLEAN])
    return denoise_along(path, estimate, x_t, schedule, noise=noise, **loop)


def check_falling(timesteps: Sequence[int]):
    """Raises ValueError unless there are some, and they fall strictly: a rising path would silently noise the image."""
    if not len(timesteps):
        raise ValueError("there are no timesteps to visit")
    if any(t_prev >= t for t, t_prev in itertools.pairwise(timesteps)):
        raise ValueError("timesteps must fall strictly, from the noisiest on")


def sample(estimate: Estimate, timesteps: Sequence[int], schedule: Schedule, *, noise: Noise, **loop) -> Tensor:
    """Images from pure noise, denoised from the first of the timesteps, which should be the noisiest."""
    return iterative_denoise(estimate, noise(), timesteps, schedule, noise=noise, **loop)


class Trajectory(list):
    """A callback that records [(step, t, x_t, x̂_0), …], tensors on the CPU; every n-th step if asked."""

    def __init__(self, every: int = 1):
        super().__init__()
        self.every = every

    def __call__(self, step: int, t: int, x_t: Tensor, x_0: Tensor):
        if step % self.every == 0:
            self.append((step, t, x_t.cpu(), x_0.cpu()))


def sdedit(
    estimate: Estimate,
    x_0: Tensor,
    i_start: int,
    timesteps: Sequence[int],
    schedule: Schedule,
    *,
    noise: Noise,
    **loop,
) -> Tensor:
    """Image to image: noise x_0 [B, C, H, W] to timesteps[i_start] and denoise it from there.

    i_start: 0 keeps least of the image, len(timesteps) - 1 nearly all of it
    The rest as in `iterative_denoise`. With i_start = N - int(N · strength) this is diffusers' IFImg2ImgPipeline.
    Raises ValueError when i_start is not in the list, or x_0 not of the noise's size.
    Source: SDEdit Algorithm 1, arXiv 2108.01073.
    """
    if not 0 <= i_start < len(timesteps):
        raise ValueError(f"i_start must be from 0 to {len(timesteps) - 1}, the last index of the steps, not {i_start}")
    timesteps, eps = timesteps[i_start:], noise()
    check_sizes(eps, x_0=x_0)
    x_t = add_noise(x_0, eps, timesteps[0], schedule)
    return iterative_denoise(estimate, x_t, timesteps, schedule, noise=noise, **loop)


def inpaint(
    estimate: Estimate,
    x_orig: Tensor,
    mask: Tensor,
    timesteps: Sequence[int],
    schedule: Schedule,
    *,
    noise: Noise,
    jump_length: int = 1,
    num_resamples: int = 1,
    **loop,
) -> Tensor:
    """Fill the hole where mask [B or 1, 1, H, W] is 1; where it is 0, the pixels of x_orig [B, C, H, W] stay.

    After every step the known pixels are those of x_orig, noised to the timestep just reached.
    jump_length, num_resamples: RePaint's j and r. Each j steps are taken r times in all, noising x_t back in between,
        so that the new part comes to agree with the known one
    The rest as in `iterative_denoise`; at its end the known pixels are exactly those of x_orig.
    Not diffusers' IFInpaintingPipeline, which shows the model the known pixels without any noise at every step; where
    nothing is known, the two agree. RePaint's Algorithm 1 prints the variance 1-ᾱ in line 5 where the
    standard deviation √(1-ᾱ) is meant.
    Raises ValueError when x_orig or mask is not of the noise's size. Source: RePaint Algorithm 1, arXiv 2201.09865.
    """
    x_t = noise()
    check_sizes(x_t, x_orig=x_orig, mask=mask)

    def put_back(x_prev: Tensor, t_prev: int) -> Tensor:
        return torch.where(mask > 0, x_prev, noised_to(x_orig, t_prev, schedule, noise))

    path = resampling_path(timesteps, jump_length, num_resamples)
    return denoise_along(path, estimate, x_t, schedule, noise=noise, correct=put_back, **loop)


def check_sizes(x_t: Tensor, **images: Tensor):
    """Raises ValueError for an image or a mask that does not fit what is sampled, x_t [B, C, H, W]."""
    for name, image in images.items():
        if not isinstance(image, Tensor):
            raise ValueError(f"{name} must be a tensor [B, C, H, W], not {type(image).__name__}")
        (h, w), wanted = image.shape[-2:], x_t.shape[-2:]
        if (h, w) != wanted:
            raise ValueError(f"{name} is {h} × {w} (height × width), but what is sampled {wanted[0]} × {wanted[1]}")
        sides = (image.shape[-3::-1], x_t.shape[-3::-1])
        for what, own, allowed in zip(("channels", "images"), *sides, strict=False):
            if own != allowed and (own != 1 or (what == "channels" and name != "mask")):
                raise ValueError(f"{name} has {own} {what}, but what is sampled {allowed}")


def noised_to(x_orig: Tensor, t: int, schedule: Schedule, noise: Noise) -> Tensor:
    """A known image as it would be at timestep t, itself at t = -1."""
    return x_orig if t == CLEAN else add_noise(x_orig, noise(), t, schedule)


def resampling_path(timesteps: Sequence[int], jump_length: int, num_resamples: int) -> Iterator[tuple[int, int]]:
    """The steps (t, t') of `inpaint`: down the list and, num_resamples - 1 times for every jump_length, up again."""
    if jump_length < 1 or num_resamples < 1:
        raise ValueError(f"jump_length and num_resamples must be at least 1, not {jump_length} and {num_resamples}")
    if len(timesteps) * num_resamples > MAX_STEPS:
        raise ValueError(f"{num_resamples} times {len(timesteps)} steps are too many, at most {MAX_STEPS}")
    check_falling(timesteps)
    stops = [*timesteps, CLEAN]
    for first in range(0, len(timesteps), jump_length):
        last = min(first + jump_length, len(timesteps))
        if stops[last] == CLEAN:  # the clean image is not noised again, but the timestep before it may be
            last -= 1
        for resample in range(num_resamples if last > first else 0):
            if resample > 0:
                yield stops[last], stops[first]
            yield from itertools.pairwise(stops[first : last + 1])
    yield stops[-2], CLEAN


def inpaint_component(
    estimate: Estimate,
    x_orig: Tensor,
    keep: Component,
    timesteps: Sequence[int],
    schedule: Schedule,
    *,
    noise: Noise,
    **loop,
) -> Tensor:
    """Keep one component of an image x_orig [B, C, H, W], such as its greys or its low pass, and make up the others.

    After every step, the component of x_t is that of x_orig noised to the timestep just reached. For a projection,
    such as the greys, the result's component is exactly that of x_orig; for a blur it is near.
    The rest as in `iterative_denoise`. Raises as `inpaint` does. Source: Factorized Diffusion §3.5, arXiv 2404.11615.
    """
    x_t = noise()
    check_sizes(x_t, x_orig=x_orig)

    def put_back(x_prev: Tensor, t_prev: int) -> Tensor:
        return x_prev + keep.of(noised_to(x_orig, t_prev, schedule, noise) - x_prev)

    return iterative_denoise(estimate, x_t, timesteps, schedule, noise=noise, correct=put_back, **loop)
