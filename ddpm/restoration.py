"""Restoration of degraded images by a model that was never trained for it.

An image x was seen through a linear operator, y = A x: without colours, with a hole, smaller, or all of these. Any
x̂_0 can be corrected to match y without changing what y does not determine, x̂_0 - A⁺ (A x̂_0 - y), and `restore` does so
at every step. Operators take images [B, C, H, W] whose sides divide evenly. Source: DDNM, arXiv 2212.00490.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm.sampling import Estimate, Noise, denoise_along, noise_source, resampling_path
from ddpm.schedule import Schedule


@dataclass(frozen=True)
class Operator:
    """What an image is seen through: linear, and with a pseudo-inverse.

    of:      A, images x [B, C, H, W] -> what is seen of them, y
    inverse: A⁺, y -> the smallest x with A x = y
    gain:    the factor s by which A changes the length of what it does not lose, ||A x|| = s ||A⁺A x||
    """

    name: str
    of: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    gain: float = 1.0


def grey(channels: int = 3) -> Operator:
    """Colours lost: the mean of the channels, [B, 1, H, W]."""
    back = lambda y: y.expand(-1, channels, -1, -1)  # noqa: E731
    return Operator("grey", lambda x: x.mean(1, keepdim=True), back, 1 / math.sqrt(channels))


def hole(mask: Tensor) -> Operator:
    """All lost where the mask [B or 1, 1, H, W] is 1, as in `inpaint`: 0 is seen there."""
    known = mask <= 0
    return Operator("hole", lambda x: torch.where(known, x, 0), lambda y: torch.where(known, y, 0))


def downscale(n: int) -> Operator:
    """Details lost: the means of n × n pixels, [B, C, H/n, W/n]. Raises ValueError for an n that does not divide."""
    if n < 1:
        raise ValueError(f"downscaling is by 1 or more, not {n}")

    def of(x: Tensor) -> Tensor:
        if x.shape[-2] % n or x.shape[-1] % n:
            raise ValueError(f"an image of {x.shape[-2]} × {x.shape[-1]} pixels has no boxes of {n} × {n}")
        return F.avg_pool2d(x, n)

    return Operator(f"1/{n}", of, lambda y: y.repeat_interleave(n, -1).repeat_interleave(n, -2), 1 / n)


def chain(*operators: Operator) -> Operator:
    """One operator after another, A = A_k … A_1, with A⁺ = A_1⁺ … A_k⁺ where that is one: see `check_operator`."""

    def of(x: Tensor) -> Tensor:
        for operator in operators:
            x = operator.of(x)
        return x

    def inverse(y: Tensor) -> Tensor:
        for operator in reversed(operators):
            y = operator.inverse(y)
        return y

    name, gain = ", ".join(operator.name for operator in operators), math.prod(operator.gain for operator in operators)
    return Operator(name, of, inverse, gain)


def restore(
    estimate: Estimate,
    y: Tensor,
    operator: Operator,
    timesteps: Sequence[int],
    schedule: Schedule,
    *,
    noise: Noise,
    noise_std: float = 0.0,
    jump_length: int = 1,
    num_resamples: int = 1,
    **loop,
) -> Tensor:
    """An image x_0 with A x_0 = y; the model fills in what y leaves open. At each step, x̂_0 ← x̂_0 - λ A⁺ (A x̂_0 - y).

    y: what was seen, operator.of(x) + noise_std · noise
    noise_std: σ_y. λ = r² / (r² + (σ_y / s)²), with s the gain and r² = 1-ᾱ_t the variance of x_0 given x_t where
        images have variance 1: 1 without noise, then the result fits y exactly, and else the share of y in the
        posterior mean. (DDNM's own λ is 1 wherever a step's fresh noise is larger than y's; with short steps
        that is nearly always, and all of y's noise stays in the image.)
    jump_length, num_resamples: the paper's time travel, as in `inpaint`; the rest as in `iterative_denoise`
    Raises ValueError for a noise_std below 0, and when y is not what the operator makes of an image of this size.
    Source: DDNM Algorithm 1 and 2, arXiv 2212.00490; λ: ΠGDM, openreview.net/forum?id=9_gsMA8MRKQ.
    """
    if noise_std < 0:
        raise ValueError(f"noise_std must not be below 0, it is {noise_std:g}")
    x_T = noise()
    if (shape := operator.of(x_T).shape[1:]) != y.shape[1:]:
        maps = f"the operator {operator.name!r} maps images of {list(x_T.shape[1:])} to {list(shape)}"
        raise ValueError(f"{maps}, but y is {list(y.shape[1:])}")
    seen = operator.inverse(y)

    def fit(x_0: Tensor, t: int) -> Tensor:
        variance = 1 - schedule.alpha_cumprod(t)
        weight = variance / (variance + (noise_std / operator.gain) ** 2)
        return x_0 - weight * operator.inverse(operator.of(x_0)) + weight * seen  # so ordered, known pixels are exact

    path = resampling_path(timesteps, jump_length, num_resamples)
    return denoise_along(path, estimate, x_T, schedule, noise=noise, correct_x0=fit, **loop)


@dataclass(frozen=True)
class Degradation:
    """How images [B, 3, S, S] are degraded: without colours, smaller, with a hole, noisy; and how to restore them.

    grey: whether the colours are lost; n: the means of n × n pixels are left
    mask: the hole, [1, 1, S/n, S/n], or None; noise_std: of what is seen

    y = degradation.degrade(x, seed=1)
    cascade.draw(prompt, degradation.restorer(y, (32, 32)), upscale=degradation.restorer(y, (128, 128)), seeds=[1])
    """

    grey: bool = False
    n: int = 1
    mask: Tensor | None = None
    noise_std: float = 0.0

    def operator(self, n: int | None = None, mask: Tensor | None = None) -> Operator:
        """A; with another n and mask that of another stage."""
        n, mask = n or self.n, self.mask if mask is None else mask
        return chain(*[grey()] * self.grey, downscale(n), *([] if mask is None else [hole(mask)]))

    def degrade(self, x: Tensor, seed: int) -> Tensor:
        """What is seen of images x, y [B, 1 or 3, S/n, S/n]; of the hole nothing, not even noise."""
        y = self.operator().of(x)
        y = y + self.noise_std * noise_source(range(seed, seed + len(y)), y.shape[1:], y.device)()
        return y if self.mask is None else hole(self.mask).of(y)

    def restorer(self, y: Tensor, size: Sequence[int], **options) -> Callable[..., Tensor]:
        """`restore` for a stage that draws images of this size (h, w), which may be smaller than y."""
        h = size[0]
        if h >= y.shape[-2]:
            return partial(restore, y=y, operator=self.operator(h // y.shape[-2]), noise_std=self.noise_std, **options)
        r = y.shape[-2] // h  # the means of what is seen are seen of the smaller image, where no hole touches them
        mask = None if self.mask is None else F.max_pool2d(self.mask, r)
        options |= {"operator": self.operator(1, mask), "noise_std": self.noise_std / r}
        return partial(restore, y=F.avg_pool2d(y, r), **options)

    def baseline(self, y: Tensor, size: Sequence[int]) -> Tensor:
        """Bicubic, in grey if colours are lost, and grey in the hole: what the restoration should be better than."""
        return F.interpolate(y, tuple(size), mode="bicubic").clamp(-1, 1).expand(-1, 3, -1, -1)


def psnr(x: Tensor, original: Tensor) -> Tensor:
    """The peak signal-to-noise ratio in dB, [B], of images [B, C, H, W], clipped to [-1, 1] as the originals are."""
    mse = (x.clamp(-1, 1) - original).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / mse.clamp(min=1e-12))


def check_operator(operator: Operator, shape: tuple[int, ...] = (3, 64, 64), tolerance: float = 1e-4):
    """Refuse an operator on images [C, H, W] whose inverse is not its pseudo-inverse, or that has not one gain.

    A⁺ is one when A A⁺ A = A, and A⁺A, which keeps what y tells, is orthogonal: ⟨A⁺A x, z⟩ = ⟨x, A⁺A z⟩. Both are tried
    on random x and z. Raises ValueError that says what is wrong.
    """
    x, z = torch.randn(2, 4, *shape, generator=torch.Generator().manual_seed(0))
    named = f"the operator {operator.name!r} cannot be undone on images of {list(shape)}:"
    y, of_z = operator.of(x), operator.of(z)
    if (operator.of(x + 2 * z) - y - 2 * of_z).abs().max() > 10 * tolerance:
        raise ValueError(f"{named} it is not linear")
    kept, kept_z = operator.inverse(y), operator.inverse(of_z)
    if kept.shape != x.shape or (operator.of(kept) - y).abs().max() > 10 * tolerance:
        raise ValueError(f"{named} its inverse is not a pseudo-inverse, A A⁺ A is not A")
    difference = (kept * z).flatten(1).sum(1) - (x * kept_z).flatten(1).sum(1)
    if difference.abs().max() > 10 * tolerance * x[0].numel() ** 0.5:
        raise ValueError(f"{named} its inverse is not a pseudo-inverse, A⁺A is not symmetric")
    gain = y.flatten(1).norm(dim=1) / kept.flatten(1).norm(dim=1)
    if (gain / operator.gain - 1).abs().max() > 10 * tolerance:
        raise ValueError(f"{named} its gain is {gain.mean().item():.4g}, or several, not {operator.gain:.4g}")
