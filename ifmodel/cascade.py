"""The cascade: text to a small picture with stage 1, the small picture to a larger one with stage 2.

Both are `iterative_denoise` with guidance; stage 2 also sees the small picture, upscaled and a little noised.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm.process import add_noise, dynamic_threshold
from ddpm.sampling import guided, iterative_denoise, noise_source
from ddpm.schedule import cosine_schedule, leading_timesteps
from ifmodel.unet import Text, UNet

Callback = Callable[[int, int, Tensor, Tensor], None]
SCHEDULE = cosine_schedule(1000)


def encode_texts(unet: UNet, prompt_embeds: Tensor, null_embeds: Tensor) -> tuple[Text, Text]:
    """The texts of N prompts, and N times that of the null prompt if it is but one, for `guided`."""
    text, null = unet.encode_text(prompt_embeds), unet.encode_text(null_embeds)
    return text, null if len(null) == len(text) else null[[0] * len(text)]


@torch.no_grad()
def generate(
    unet: UNet,
    prompt_embeds: Tensor,
    null_embeds: Tensor,
    *,
    seeds: Sequence[int],
    num_steps: int = 100,
    guidance_scale: float = 7.0,
    size: tuple[int, int] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Stage 1: prompts -> pictures [N, 3, H, W] in [-1, 1].

    prompt_embeds: T5's output for the prompts, [N, 77, D_text]
    null_embeds: that for the null (or a negative) prompt, [1, 77, D_text], or one for each picture
    seeds: [N]; a picture depends on its own seed and prompt alone, up to the rounding of another batch size
    size: height and width, the model's own when None
    Source: Imagen §2, arXiv 2205.11487, with DeepFloyd IF's settings.
    """
    h, w = size or (unet.config.sample_size, unet.config.sample_size)
    noise = noise_source(seeds, (3, h, w), prompt_embeds.device)
    text, null = encode_texts(unet, prompt_embeds, null_embeds)
    return iterative_denoise(
        guided(unet, text, null, guidance_scale),
        noise(),
        leading_timesteps(SCHEDULE.num_timesteps, num_steps),
        SCHEDULE,
        noise=noise,
        variance="learned_range",
        threshold=partial(dynamic_threshold, maximum=1.5),
        callback=callback,
    )


@torch.no_grad()
def upscale(
    unet: UNet,
    small: Tensor,
    prompt_embeds: Tensor,
    null_embeds: Tensor,
    *,
    seeds: Sequence[int],
    num_steps: int = 50,
    guidance_scale: float = 4.0,
    noise_level: int = 250,
    size: tuple[int, int] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Stage 2: pictures [N, 3, h, w] in [-1, 1] and their prompts -> pictures [N, 3, H, W] in [-1, 1].

    noise_level: the timestep to which the upscaled small picture is noised; the model is told
    The rest as in `generate`. Source: Imagen §2.4, arXiv 2205.11487, with DeepFloyd IF's settings.
    """
    h, w = size or (unet.config.sample_size, unet.config.sample_size)
    noise = noise_source(seeds, (3, h, w), prompt_embeds.device)
    x_T = noise()
    upscaled = F.interpolate(small, (h, w), mode="bilinear", align_corners=True)
    low_res = add_noise(upscaled, noise(), noise_level, SCHEDULE)

    def model(x_t: Tensor, t: int, text: Text) -> Tensor:
        beside = low_res.repeat(len(x_t) // len(low_res), 1, 1, 1)  # once, or for both halves of guidance
        return unet(torch.cat([x_t, beside], dim=1), t, text, noise_level)

    text, null = encode_texts(unet, prompt_embeds, null_embeds)
    return iterative_denoise(
        guided(model, text, null, guidance_scale),
        x_T,
        leading_timesteps(SCHEDULE.num_timesteps, num_steps),
        SCHEDULE,
        noise=noise,
        variance="learned_range",
        threshold=partial(dynamic_threshold, maximum=1.0),
        callback=callback,
    )
