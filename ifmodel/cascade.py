"""The cascade: text to a small picture with stage 1, the small picture to a larger one with stage 2.

Each stage gives the algorithms of `ddpm` an estimate and a step; `generate` and `upscale` sample with these from pure
noise. Stage 2 also sees the small picture, upscaled and a little noised.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm.process import Threshold, add_noise, ddpm_step, dynamic_threshold
from ddpm.sampling import ALWAYS, Callback, Estimate, Noise, Step, guided, iterative_denoise, noise_source
from ddpm.schedule import cosine_schedule, leading_timesteps
from ifmodel.config import check_noising_scheduler, check_scheduler
from ifmodel.unet import Text, UNet
from ifmodel.weights import read_json

SCHEDULER_CONFIG = "scheduler_config.json"
SCHEDULE = cosine_schedule(1000)
STAGE_1_THRESHOLD = partial(dynamic_threshold, maximum=1.5)
STAGE_2_THRESHOLD = partial(dynamic_threshold, maximum=1.0)
STAGE_1_STEP: Step = partial(ddpm_step, variance="learned_range", threshold=STAGE_1_THRESHOLD)
STAGE_2_STEP: Step = partial(ddpm_step, variance="learned_range", threshold=STAGE_2_THRESHOLD)


def stage_1(
    unet: UNet,
    prompt_embeds: Tensor,
    null_embeds: Tensor,
    guidance_scale: float = 7.0,
    interval: tuple[float, float] = ALWAYS,
) -> Estimate:
    """The guided estimate of stage 1 for noisy pictures [N, 3, H, W].

    prompt_embeds: T5's output for the prompts, [N, 77, D_text]
    null_embeds: that for the null (or a negative) prompt, [1, 77, D_text], or one for each picture
    guidance_scale, interval: as in `guided`
    """
    text, null = encode_texts(unet, prompt_embeds, null_embeds)
    return guided(unet, text, null, guidance_scale, interval=interval)


def stage_2(
    unet: UNet,
    low_res: Tensor,
    prompt_embeds: Tensor,
    null_embeds: Tensor,
    guidance_scale: float = 4.0,
    noise_level: int = 250,
) -> Estimate:
    """The guided estimate of stage 2 for noisy pictures [N, 3, H, W], beside what it sees of the small ones.

    low_res: from `noised_upscaled`, [N, 3, H, W], with the same noise_level; the rest as in `stage_1`
    """

    def model(x_t: Tensor, t: int, text: Text) -> Tensor:
        beside = low_res.repeat(len(x_t) // len(low_res), 1, 1, 1)  # once, or for both halves of guidance
        return unet(torch.cat([x_t, beside], dim=1), t, text, noise_level)

    text, null = encode_texts(unet, prompt_embeds, null_embeds)
    return guided(model, text, null, guidance_scale)


def stage_threshold(source: str | Path, stage: int, revision: str | None = None) -> Threshold:
    """How stage 1 or 2 of a model thresholds x̂_0: as its scheduler_config.json says, or as IF's when it has none.

    source, revision: as in `load_unet`
    Raises ValueError for a field, of stage 2's image_noising_scheduler too, with a value that is not implemented here.
    """
    if stage == 2:
        path, config = read_json(source, "image_noising_scheduler", SCHEDULER_CONFIG, revision)
        if config is not None:
            check_noising_scheduler(config, str(path))
    path, config = read_json(source, "scheduler", SCHEDULER_CONFIG, revision)
    if config is None:
        return STAGE_1_THRESHOLD if stage == 1 else STAGE_2_THRESHOLD
    percentile, maximum = check_scheduler(config, str(path))
    return partial(dynamic_threshold, percentile=percentile, maximum=maximum)


def noised_upscaled(small: Tensor, size: tuple[int, int], noise_level: int, noise: Noise) -> Tensor:
    """What stage 2 sees of small pictures [N, 3, h, w]: upscaled to [N, 3, H, W] and noised, so that it adds detail.

    Source: Imagen §2.4, arXiv 2205.11487.
    """
    upscaled = F.interpolate(small, size, mode="bilinear", align_corners=True)
    return add_noise(upscaled, noise(), noise_level, SCHEDULE)


@torch.no_grad()
def encode_texts(unet: UNet, prompt_embeds: Tensor, null_embeds: Tensor) -> tuple[Text, Text]:
    """The texts of N prompts, and N times that of the null prompt if it is but one, for `guided`."""
    text, null = unet.encode_text(prompt_embeds), unet.encode_text(null_embeds)
    return text, null if len(null) == len(text) else null[[0] * len(text)]


def generate(
    unet: UNet,
    prompt_embeds: Tensor,
    null_embeds: Tensor,
    *,
    seeds: Sequence[int],
    num_steps: int = 100,
    guidance_scale: float = 7.0,
    size: tuple[int, int] | None = None,
    threshold: Threshold = STAGE_1_THRESHOLD,
    callback: Callback | None = None,
) -> Tensor:
    """Stage 1: prompts -> pictures [N, 3, H, W] in [-1, 1].

    prompt_embeds, null_embeds: as in `stage_1`
    seeds: [N]; a picture depends on its own seed and prompt alone, up to the rounding of another batch size
    size: height and width, the model's own when None
    threshold: of x̂_0, IF's unless `stage_threshold` finds another in the model's folder
    Source: Imagen §2, arXiv 2205.11487, with DeepFloyd IF's settings.
    """
    h, w = size or (unet.config.sample_size, unet.config.sample_size)
    noise = noise_source(seeds, (3, h, w), prompt_embeds.device)
    estimate = stage_1(unet, prompt_embeds, null_embeds, guidance_scale)
    timesteps = leading_timesteps(SCHEDULE.num_timesteps, num_steps)
    step = partial(STAGE_1_STEP, threshold=threshold)
    return iterative_denoise(estimate, noise(), timesteps, SCHEDULE, noise=noise, step=step, callback=callback)


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
    threshold: Threshold = STAGE_2_THRESHOLD,
    callback: Callback | None = None,
) -> Tensor:
    """Stage 2: pictures [N, 3, h, w] in [-1, 1] and their prompts -> pictures [N, 3, H, W] in [-1, 1].

    noise_level: the timestep to which the upscaled small picture is noised; the model is told
    The rest as in `generate`. Source: Imagen §2.4, arXiv 2205.11487, with DeepFloyd IF's settings.
    """
    h, w = size or (unet.config.sample_size, unet.config.sample_size)
    noise = noise_source(seeds, (3, h, w), prompt_embeds.device)
    x_T = noise()
    low_res = noised_upscaled(small, (h, w), noise_level, noise)
    estimate = stage_2(unet, low_res, prompt_embeds, null_embeds, guidance_scale, noise_level)
    timesteps = leading_timesteps(SCHEDULE.num_timesteps, num_steps)
    step = partial(STAGE_2_STEP, threshold=threshold)
    return iterative_denoise(estimate, x_T, timesteps, SCHEDULE, noise=noise, step=step, callback=callback)
