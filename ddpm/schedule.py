"""Noise schedules, and which of their timesteps a sampler visits.

Timesteps count from 0 as in diffusers and in IF's code: `t = 0` is the first, faintest noise, `t = T - 1`
the strongest, and `t = -1` the clean image, where alphas_cumprod is 1. (The papers count x_1 … x_T and
call the clean image x_0: their t is ours plus one.)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

CLEAN = -1  # the timestep of the clean image
MAX_TIMESTEPS = 1_000_000


@dataclass(frozen=True)
class Schedule:
    """The variances of the forward process, in float64 on the CPU.

    betas:          [T], the variance added at each timestep, in (0, 1)
    alphas_cumprod: [T], ᾱ_t = Π (1 - β_s), the share of the clean image's variance left at t
    """

    betas: Tensor
    alphas_cumprod: Tensor

    @classmethod
    def from_betas(cls, betas: Tensor | Sequence[float]) -> "Schedule":
        """The schedule of these variances [T] (DDPM §2), on the CPU.

        Raises ValueError unless all are in (0, 1). Source: arXiv 2006.11239.
        """
        betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu")
        if outside := [beta for beta in betas.tolist() if not 0 < beta < 1]:
            raise ValueError(f"betas must be above 0 and below 1, not {outside[0]:g}")
        return cls(betas, torch.cumprod(1 - betas, dim=0))

    @property
    def num_timesteps(self) -> int:
        """T, the number of noise levels the model was trained with."""
        return len(self.betas)

    def alpha_cumprod(self, t: int) -> float:
        """ᾱ_t as a float; 1 at t = -1, the clean image. Raises ValueError for any other t outside the schedule."""
        if not CLEAN <= t < self.num_timesteps:
            last = self.num_timesteps - 1
            raise ValueError(f"timestep {t} is outside this schedule: it has 0 … {last}, and -1 for the clean image")
        return 1.0 if t == CLEAN else self.alphas_cumprod[t].item()


def linear_schedule(num_timesteps: int = 300, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """β grows linearly from beta_start to beta_end. MNIST uses T = 300. Source: DDPM §4, arXiv 2006.11239."""
    check_num_timesteps(num_timesteps)
    return Schedule.from_betas(torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64))


def cosine_schedule(num_timesteps: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> Schedule:
    """ᾱ falls as a squared cosine; β is clipped at max_beta. IF uses T = 1000.

    Source: Improved DDPM eq. 17, arXiv 2102.09672.
    """
    check_num_timesteps(num_timesteps)
    t = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    f = torch.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2
    return Schedule.from_betas((1 - f[1:] / f[:-1]).clamp(max=max_beta))


def strided_timesteps(num_timesteps: int = 1000, stride: int = 30) -> list[int]:
    """Every stride-th timestep, noisiest first, down to 0: (1000, 30) -> [990, 960, …, 30, 0]."""
    check_num_timesteps(num_timesteps)
    if not 1 <= stride < num_timesteps:
        raise ValueError(f"stride must be from 1 to {num_timesteps - 1}, not {stride}")
    return list(range(0, num_timesteps, stride))[::-1]


def leading_timesteps(num_timesteps: int = 1000, num_steps: int = 100) -> list[int]:
    """IF's spacing: (0 … N-1) · (T // N), noisiest first: (1000, 100) -> [990, 980, …, 10, 0]."""
    _check_steps(num_steps, num_timesteps)
    return [i * (num_timesteps // num_steps) for i in range(num_steps)][::-1]


# How many timesteps IF's named lists visit in each of as many equal sections of the schedule, from t = 0 upwards.
NAMED_SECTIONS = {
    "fast27": (10, 10, 3, 2, 2),
    "smart27": (7, 4, 2, 1, 2, 4, 7),
    "smart50": (10, 6, 4, 3, 2, 2, 3, 4, 6, 10),
    "smart100": (1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 4, 4, 5, 5, 6, 7, 7, 8, 9, 10, 13),
    "smart185": (1, 1, 2, 2, 2, 3, 3, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20),
    "super27": (1, 1, 1, 1, 1, 1, 1, 2, 5, 13),
    "super40": (2, 2, 2, 2, 2, 2, 3, 4, 6, 15),
    "super100": (4, 4, 6, 6, 8, 8, 10, 10, 14, 30),
}


def named_timesteps(name: str, num_timesteps: int = 1000) -> list[int]:
    """One of IF's own lists, noisiest first: "smart50" has 50 timesteps, most of them at both ends.

    Raises ValueError for a name that is not in NAMED_SECTIONS.
    Source: github.com/deep-floyd/IF; each section is visited evenly from its first to its last timestep, as in
    Improved DDPM §4, arXiv 2102.09672.
    """
    if name not in NAMED_SECTIONS:
        raise ValueError(f"no timestep list is named {name!r}: choose from {', '.join(NAMED_SECTIONS)}")
    counts = NAMED_SECTIONS[name]
    if num_timesteps < max(counts) * len(counts):
        raise ValueError(f"{name} is for schedules of 1000 timesteps: {num_timesteps} are too few")
    timesteps, start = [], 0
    for section, count in enumerate(counts):
        size = num_timesteps // len(counts) + (section < num_timesteps % len(counts))
        stride, position = (size - 1) / max(count - 1, 1), 0.0
        for _ in range(count):
            timesteps.append(start + round(position))
            position += stride  # added up as in IF's code, since 49.5 and a little less are rounded apart
        start += size
    return timesteps[::-1]


def linspace_timesteps(num_timesteps: int = 300, num_steps: int = 300) -> list[int]:
    """N timesteps evenly from T - 1 to 0, noisiest first; any N starts from the strongest noise (MNIST)."""
    _check_steps(num_steps, num_timesteps)
    return torch.linspace(num_timesteps - 1, 0, num_steps, dtype=torch.float64).round().long().tolist()


def log_snr_timesteps(
    schedule: Schedule, num_steps: int, *, scale: float | None = None, skipped: tuple[float, float] = (1.5, 1.0)
) -> list[int]:
    """N timesteps at equal distances in λ_t = log(√ᾱ_t / √(1-ᾱ_t)), noisiest first: how DPM-Solver++ is spaced.

    The solver integrates over λ, half the logarithm of the signal-to-noise ratio, and its error grows with the length
    of a step in λ. So N steps do best when all are equally long there; in t they are not.

    The way from noise (λ = -5.1, where diffusers begins too) to an image (t = 0.01 T) is cut into steps of one length,
    N - 1 and those of `skipped`, and the timesteps nearest to the cuts are visited; of several cuts at one timestep,
    the last has it, and those before it the next noisier ones.

    scale: cut evenly in arctan(e^(-λ/scale)) instead, with longer steps towards both ends: ours, for solvers without
        noise
    skipped: steps left out at the noisy end, where x̂_0 is hardly more than the mean of all images (at most N - 1), and
        at the clean end, where it is the image already
    A schedule that ends before λ = -5.1 begins at its own end. scripts/evaluate/solvers.py measures the distance from
    the converged image, by which both were chosen. Raises ValueError for more steps than timesteps.
    Source: DPM-Solver §3.3 and appendix D, arXiv 2206.00927.
    """
    _check_steps(num_steps, schedule.num_timesteps)

    def position(log_snr: Tensor) -> Tensor:
        return log_snr if scale is None else -torch.exp(-log_snr / scale).atan()

    log_snr = torch.logit(schedule.alphas_cumprod, eps=1e-12) / 2
    ends = torch.stack([log_snr.new_tensor(-5.1), log_snr[schedule.num_timesteps // 100]])
    positions, (noise, clearest) = position(log_snr), position(ends).tolist()
    first, last = min(skipped[0], num_steps - 1), skipped[1]
    noisiest = max(positions[-1].item(), noise + first * (clearest - noise) / (num_steps - 1 + first + last))
    wanted = noisiest + torch.arange(num_steps) * (clearest - noisiest) / (num_steps - 1 + last)
    timesteps = (positions[None] - wanted[:, None]).abs().argmin(1).tolist()
    for k in range(num_steps - 2, -1, -1):  # no timestep twice
        timesteps[k] = max(timesteps[k], timesteps[k + 1] + 1)
    return [min(t, schedule.num_timesteps - 1 - k) for k, t in enumerate(timesteps)]


def check_num_timesteps(num_timesteps: int, least: int = 1):
    """Raises ValueError for a T that no schedule has."""
    if type(num_timesteps) is not int or not least <= num_timesteps <= MAX_TIMESTEPS:
        raise ValueError(f"a schedule needs from {least} to {MAX_TIMESTEPS} timesteps, not {num_timesteps!r}")


def check_whole(name: str, number: int):
    """Raises ValueError for what is no whole number."""
    if not isinstance(number, Integral):
        raise ValueError(f"{name} must be a whole number, not {number!r}")


def _check_steps(num_steps: int, num_timesteps: int):
    check_num_timesteps(num_timesteps)
    check_whole("num_steps", num_steps)
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"steps must be from 1 to {num_timesteps}, the timesteps of the schedule, not {num_steps}")
