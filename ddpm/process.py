"""The forward process and one step of the reverse process.

Everything here is a function of tensors and a `Schedule`; nothing knows about a model. Sampler arithmetic is done in
the dtype of `x_t` (float32 in all our samplers) with coefficients computed in float64.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm.schedule import Schedule

VARIANCES = ("beta", "beta_tilde", "learned_range")
Threshold = Callable[[Tensor], Tensor]  # x̂_0 -> x̂_0, such as `dynamic_threshold`


def add_noise(x_0: Tensor, eps: Tensor, t: int | Tensor, schedule: Schedule) -> Tensor:
    """The forward process, x_t = √ᾱ_t x_0 + √(1-ᾱ_t) eps.

    x_0, eps: [B, C, H, W]; t: an int, or an integer tensor [B] with a timestep for each image; -1 is the clean image
    Returns x_t [B, C, H, W]. Source: DDPM eq. 4, arXiv 2006.11239.
    """
    if isinstance(t, Tensor):
        # roots in float64 on the CPU, before the cast: MPS has no float64; the first is that of t = -1
        alphas_cumprod = torch.cat([torch.ones(1, dtype=torch.float64), schedule.alphas_cumprod])
        signal, noise = (
            root.to(x_0.dtype).to(x_0.device)[t + 1].view(-1, 1, 1, 1)
            for root in (alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt())
        )
    else:
        alpha_cumprod = schedule.alpha_cumprod(t)
        signal, noise = math.sqrt(alpha_cumprod), math.sqrt(1 - alpha_cumprod)
    return signal * x_0 + noise * eps


def predict_x0(x_t: Tensor, eps: Tensor, t: int, schedule: Schedule) -> Tensor:
    """The estimate of the clean image, x̂_0 = (x_t - √(1-ᾱ_t) eps) / √ᾱ_t. Source: DDPM eq. 15, arXiv 2006.11239."""
    alpha_cumprod = schedule.alpha_cumprod(t)
    return (x_t - math.sqrt(1 - alpha_cumprod) * eps) / math.sqrt(alpha_cumprod)


def predict_eps(x_t: Tensor, x_0: Tensor, t: int, schedule: Schedule) -> Tensor:
    """The noise that leads from x̂_0 to x_t, eps = (x_t - √ᾱ_t x̂_0) / √(1-ᾱ_t): `predict_x0` solved for eps."""
    alpha_cumprod = schedule.alpha_cumprod(t)
    return (x_t - math.sqrt(alpha_cumprod) * x_0) / math.sqrt(1 - alpha_cumprod)


def static_threshold(x_0: Tensor) -> Tensor:
    """Clip to [-1, 1]. Source: Imagen §2.3, arXiv 2205.11487."""
    return x_0.clamp(-1, 1)


def dynamic_threshold(x_0: Tensor, percentile: float = 0.95, maximum: float = 1.5) -> Tensor:
    """Clip each image [B, C, H, W] to its own s, the percentile of |x_0| kept in [1, maximum], and divide by s.

    IF uses maximum 1.5 in stage 1 and 1.0 (the static threshold) in stage 2.
    Source: Imagen §2.3, arXiv 2205.11487.
    """
    s = torch.quantile(x_0.abs().flatten(1), percentile, dim=1).clamp(1, maximum).view(-1, 1, 1, 1)
    return x_0.clamp(-s, s) / s


class Prediction(NamedTuple):
    """What a step knows besides x_t.

    x_0:    x̂_0 [B, C, H, W], thresholded
    v:      [B, C, H, W] in [-1, 1], what the model says of the variance; None when it learned none
    before: the timestep and x̂_0 of the step before this one; None in the first step
    """

    x_0: Tensor
    v: Tensor | None = None
    before: tuple[int, Tensor] | None = None


def ddpm_step(
    x_t: Tensor,
    predicted: Prediction,
    t: int,
    t_prev: int,
    schedule: Schedule,
    noise: Tensor,
    *,
    variance: str = "beta",
) -> Tensor:
    """Sample x_{t'} given x_t, for any earlier t' = t_prev: one step of the (strided) reverse process.

    x_t:       the noisy image [B, C, H, W]
    predicted: what the model makes of it
    t, t_prev: timesteps, 0 ≤ t_prev < t; `denoise_along` takes the last step, to x̂_0 itself
    noise:     z [B, C, H, W] from N(0, I)
    variance:  "beta" or "beta_tilde", the two fixed choices of DDPM §3.2, or "learned_range": interpolated between
        them by the model's v

    Returns x_{t'}. Raises ValueError when the timesteps are out of order or outside the schedule, or when a learned
    variance has no v. Source: DDPM eq. 7, arXiv 2006.11239; Improved DDPM eq. 15, arXiv 2102.09672.
    """
    _check_order(t, t_prev)
    x_0, v, _ = predicted
    if variance not in VARIANCES:
        raise ValueError(f"variance must be one of {', '.join(VARIANCES)}, not {variance!r}")
    if variance == "learned_range" and v is None:
        raise ValueError('variance="learned_range" needs v')
    alpha_cumprod, alpha_cumprod_prev = schedule.alpha_cumprod(t), schedule.alpha_cumprod(t_prev)
    alpha = alpha_cumprod / alpha_cumprod_prev  # the ratio to t', not to t - 1: steps may be skipped
    beta = 1 - alpha

    mean = (
        math.sqrt(alpha_cumprod_prev) * beta / (1 - alpha_cumprod) * x_0
        + math.sqrt(alpha) * (1 - alpha_cumprod_prev) / (1 - alpha_cumprod) * x_t
    )
    beta_tilde = max((1 - alpha_cumprod_prev) / (1 - alpha_cumprod) * beta, 1e-20)
    if variance == "learned_range":
        frac = (v + 1) / 2
        sigma = torch.exp(0.5 * (frac * math.log(beta) + (1 - frac) * math.log(beta_tilde)))
    else:
        sigma = math.sqrt(beta if variance == "beta" else beta_tilde)
    return mean + sigma * noise


def ddim_step(
    x_t: Tensor,
    predicted: Prediction,
    t: int,
    t_prev: int,
    schedule: Schedule,
    noise: Tensor,
    *,
    eta: float = 0.0,
) -> Tensor:
    """One DDIM step to any earlier t' = t_prev: towards x̂_0, then out again in the direction of eps.

    eta: how much fresh noise; 0 is deterministic, 1 is `ddpm_step` with variance "beta_tilde"
    The rest as in `ddpm_step`; eps is what leads from x̂_0, thresholded, to x_t.
    Returns x_{t'}. Raises ValueError when the timesteps are out of order or outside the schedule.
    Source: DDIM eq. 12 and 16, arXiv 2010.02502.
    """
    _check_order(t, t_prev)
    alpha_cumprod, alpha_cumprod_prev = schedule.alpha_cumprod(t), schedule.alpha_cumprod(t_prev)
    eps = predict_eps(x_t, predicted.x_0, t, schedule)
    beta_tilde = (1 - alpha_cumprod_prev) / (1 - alpha_cumprod) * (1 - alpha_cumprod / alpha_cumprod_prev)
    sigma = eta * math.sqrt(beta_tilde)
    x_prev = math.sqrt(alpha_cumprod_prev) * predicted.x_0 + math.sqrt(1 - alpha_cumprod_prev - sigma**2) * eps
    return x_prev + sigma * noise if eta else x_prev


def dpm_solver_step(
    x_t: Tensor,
    predicted: Prediction,
    t: int,
    t_prev: int,
    schedule: Schedule,
    noise: Tensor,
    *,
    eta: float = 0.0,
) -> Tensor:
    """One step of DPM-Solver++(2M) to any earlier t' = t_prev: second order, one evaluation a step.

    predicted: with the x̂_0 of the step before this one; without, the step is of first order
    eta: how much fresh noise; 0 is deterministic, 1 is SDE-DPM-Solver++(2M), which corrects more of the model's errors
    The rest as in `ddpm_step`.
    Returns x_{t'}. Raises ValueError when the timesteps are out of order or outside the schedule.
    Source: DPM-Solver++ Algorithm 2 and its section on diffusion SDEs, arXiv 2211.01095.
    """
    _check_order(t, t_prev)

    def log_snr(t: int) -> float:  # the paper's λ_t = log(√ᾱ_t / √(1-ᾱ_t))
        alpha_cumprod = schedule.alpha_cumprod(t)
        return 0.5 * math.log(alpha_cumprod / (1 - alpha_cumprod))

    h = log_snr(t_prev) - log_snr(t)
    D = predicted.x_0
    if predicted.before is not None:
        t_before, x_0_before = predicted.before
        r = (log_snr(t) - log_snr(t_before)) / h
        D = (1 + 1 / (2 * r)) * predicted.x_0 - 1 / (2 * r) * x_0_before
    alpha_cumprod, alpha_cumprod_prev = schedule.alpha_cumprod(t), schedule.alpha_cumprod(t_prev)
    shrunk = math.sqrt((1 - alpha_cumprod_prev) / (1 - alpha_cumprod)) * math.exp(-eta * h) * x_t
    x_prev = shrunk - math.sqrt(alpha_cumprod_prev) * math.expm1(-(1 + eta) * h) * D
    sigma = math.sqrt(-(1 - alpha_cumprod_prev) * math.expm1(-2 * eta * h))
    return x_prev + sigma * noise if eta else x_prev


def _check_order(t: int, t_prev: int):
    if not 0 <= t_prev < t:
        raise ValueError(f"a reverse step goes to an earlier timestep, not from {t} to {t_prev}")
