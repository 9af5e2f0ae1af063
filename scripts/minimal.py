"""Prompt to 128 × 128 image in one file: the schedule, guidance, learned variance, thresholding and both stages.

    python scripts/minimal.py "a photo of a dog" dog.png

Equations: DDPM (arXiv 2006.11239), Improved DDPM (2102.09672), guidance (2207.12598), Imagen (2205.11487).
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.utils import save_image

from ifmodel import load_unet
from ifmodel.t5 import embed_prompts

# ᾱ_t of the cosine schedule, with no β above 0.999 (Improved DDPM eq. 17)
f = torch.cos((torch.linspace(0, 1, 1001, dtype=torch.float64) + 0.008) / 1.008 * math.pi / 2) ** 2
betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
alphas_cumprod = (1 - betas).cumprod(0)


def sample(model, text, null, guidance_scale, timesteps, max_threshold, x_t, noise):
    """Denoise x_t through the timesteps; model(x_t, t, text) is eps and v, concatenated."""
    for t, t_prev in zip(timesteps, [*timesteps[1:], -1], strict=True):
        # classifier-free guidance, eq. 6: eps_u + γ (eps_c - eps_u); v is that of the conditional pass
        eps, v = model(x_t, t, text).chunk(2, dim=1)
        if guidance_scale != 1:
            eps_u, _ = model(x_t, t, null).chunk(2, dim=1)
            eps = eps_u + guidance_scale * (eps - eps_u)

        # x̂_0 (DDPM eq. 15), dynamically thresholded (Imagen §2.3)
        a_bar, a_bar_prev = alphas_cumprod[t].item(), alphas_cumprod[t_prev].item() if t_prev >= 0 else 1.0
        x_0 = (x_t - math.sqrt(1 - a_bar) * eps) / math.sqrt(a_bar)
        s = x_0.abs().flatten(1).quantile(0.95, dim=1).clamp(1, max_threshold).view(-1, 1, 1, 1)
        x_0 = x_0.clamp(-s, s) / s
        if t_prev < 0:
            return x_0

        # the mean of q(x_t' | x_t, x̂_0), DDPM eq. 7, with the ratio of ᾱ to t', since steps are skipped
        alpha, beta = a_bar / a_bar_prev, 1 - a_bar / a_bar_prev
        mean = math.sqrt(a_bar_prev) * beta * x_0 + math.sqrt(alpha) * (1 - a_bar_prev) * x_t
        mean = mean / (1 - a_bar)

        # the variance, between β̃ and β as the model says (Improved DDPM eq. 15)
        beta_tilde = max((1 - a_bar_prev) / (1 - a_bar) * beta, 1e-20)
        frac = (v + 1) / 2
        log_variance = frac * math.log(beta) + (1 - frac) * math.log(beta_tilde)
        x_t = mean + (0.5 * log_variance).exp() * noise()


@torch.no_grad()
def main(prompt: str, path: str, seed: int = 0, steps: int = 50, upscaler_steps: int = 6, noise_level: int = 50):
    embeds = embed_prompts("tiny-if/I", [prompt, ""])

    def stage(name, size, steps, guidance_scale, max_threshold, small=None):
        unet, generator = load_unet(name), torch.Generator().manual_seed(seed)

        def noise():
            return torch.randn(1, 3, size, size, generator=generator)

        x_T, low_res, level = noise(), None, ()
        if small is not None:  # stage 2 sees stage 1's image, upscaled and noised, and the noise level (§2.4)
            a_bar, level = alphas_cumprod[noise_level].item(), (noise_level,)
            low_res = F.interpolate(small, (size, size), mode="bilinear", align_corners=True)
            low_res = math.sqrt(a_bar) * low_res + math.sqrt(1 - a_bar) * noise()

        def model(x_t, t, text):
            return unet(x_t if low_res is None else torch.cat([x_t, low_res], dim=1), t, text, *level)

        text, null = (unet.encode_text(embeds[p][None]) for p in (prompt, ""))
        timesteps = [1000 // steps * k for k in range(steps)][::-1]
        return sample(model, text, null, guidance_scale, timesteps, max_threshold, x_T, noise)

    small = stage("tiny-if/I", 32, steps, 2.0, 1.5)
    image = stage("tiny-if/II", 128, upscaler_steps, 1.0, 1.0, small)
    save_image(image / 2 + 0.5, path)


if __name__ == "__main__":
    if sys.argv[1:] in (["--help"], ["-h"]):
        sys.exit(print(__doc__))
    if len(sys.argv) != 3:
        sys.exit('usage: python scripts/minimal.py "a photo of a dog" dog.png')
    if not sys.argv[2].endswith(".png") or not Path(sys.argv[2]).parent.is_dir():
        sys.exit(f"{sys.argv[2]} must be a .png in a folder that is there")
    main(*sys.argv[1:])
