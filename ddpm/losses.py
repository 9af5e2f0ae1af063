"""The losses that train a DDPM, whatever the model."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.process import add_noise
from ddpm.schedule import Schedule


def ddpm_loss(
    model: nn.Module, x_0: Tensor, conditioning: tuple, schedule: Schedule, generator: torch.Generator
) -> Tensor:
    """L_simple, ‖eps - eps_θ(x_t, t)‖² at a random t for each image, the mean over pixels.

    x_0: [B, C, H, W]; conditioning: what the model takes after x_t and t, such as (c,) with c [B, 10].
    Source: DDPM eq. 14, arXiv 2006.11239.
    """
    t = torch.randint(schedule.num_timesteps, (len(x_0),), generator=generator, device=x_0.device)
    eps = torch.randn(x_0.shape, generator=generator, device=x_0.device)
    x_t = add_noise(x_0, eps, t, schedule)
    return F.mse_loss(model(x_t, t, *conditioning).float(), eps)


def variational_bound(x_0: Tensor, x_t: Tensor, eps: Tensor, v: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """L_{t-1}, the KL divergence of p_θ(x_{t-1} | x_t) from q(x_{t-1} | x_t, x_0), in bits per dimension: [B].

    x_0, x_t, eps, v: [B, C, H, W]; eps is the model's and should be detached, so that this trains v alone; t: [B]
    It is 0 at t = 0, since the step to the clean image draws no noise and v is not used.
    Source: DDPM eq. 5 and 7, arXiv 2006.11239; the learned variance, Improved DDPM eq. 15 and 16, arXiv 2102.09672.
    """
    alphas_cumprod = schedule.alphas_cumprod
    alphas_cumprod_prev = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    beta_tilde = (1 - alphas_cumprod_prev) / (1 - alphas_cumprod) * schedule.betas
    beta_tilde[0] = beta_tilde[1]  # not 0, whose log is not finite
    # of x_0 in the mean of the posterior
    weight_x0 = alphas_cumprod_prev.sqrt() * schedule.betas / (1 - alphas_cumprod)

    def at_t(values: Tensor) -> Tensor:
        return values.to(x_t.dtype).to(x_t.device)[t].view(-1, 1, 1, 1)

    signal, noise = at_t(alphas_cumprod.sqrt()), at_t((1 - alphas_cumprod).sqrt())
    difference = at_t(weight_x0) * (x_0 - (x_t - noise * eps) / signal)
    log_beta_tilde, frac = at_t(beta_tilde.log()), (v + 1) / 2
    log_variance = frac * at_t(schedule.betas.log()) + (1 - frac) * log_beta_tilde
    ratio = (log_beta_tilde.exp() + difference**2) * torch.exp(-log_variance)
    kl = 0.5 * (log_variance - log_beta_tilde - 1 + ratio) / math.log(2)
    return kl.flatten(1).mean(1) * (t > 0)
