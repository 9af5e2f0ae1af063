"""One stage of the cascade: its estimate, its settings, and what its folder says of it.

A stage gives the algorithms of `ddpm` an estimate, a step and a threshold; `generate` and `upscale` sample with these
from pure noise. Stage 2 also sees the small image, upscaled and a little noised.
"""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm.estimates import ALWAYS, Estimate, Guider, classifier_free, guided
from ddpm.process import Threshold, add_noise, ddim_step, ddpm_step, dpm_solver_step, dynamic_threshold
from ddpm.sampling import Callback, Noise, Step, noise_source, sample
from ddpm.schedule import cosine_schedule, leading_timesteps, log_snr_timesteps
from ddpm.tools.memory import keep_freed
from ifmodel.config import UNetConfig
from ifmodel.scheduler import check_noising_scheduler, check_scheduler
from ifmodel.unet import Text, UNet
from ifmodel.vocabulary import load_vocabulary
from ifmodel.weights import SHIPPED, VARIANTS, find_weights, load_config, load_unet, read_json, stored_dtypes

SCHEDULER_CONFIG = "scheduler_config.json"
SCHEDULE = cosine_schedule(1000)
STAGE_1_THRESHOLD = partial(dynamic_threshold, maximum=1.5)
STAGE_2_THRESHOLD = partial(dynamic_threshold, maximum=1.0)
LEARNED: Step = partial(ddpm_step, variance="learned_range")
SAMPLERS: dict[str, Step] = {"ddpm": ddpm_step, "ddim": ddim_step, "dpm++": dpm_solver_step}  # yours is one line here

# How IF draws, by stage; a model with other defaults has them in its sampling_config.json
SETTINGS = {
    1: {"guidance_scale": 7.0, "num_steps": 100},
    2: {"guidance_scale": 4.0, "num_steps": 50, "noise_level": 250},
}


def stage_1(
    unet: UNet,
    prompt_embeds: Tensor,
    null_embeds: Tensor,
    guidance_scale: float = 7.0,
    interval: tuple[float, float] = ALWAYS,
    guider: Guider = classifier_free,
) -> Estimate:
    """The guided estimate of stage 1 for noisy images [N, 3, H, W].

    prompt_embeds: T5's output for the prompts, [N, 77, D_text]
    null_embeds: that for the null (or a negative) prompt, [1, 77, D_text], or one for each image
    guidance_scale, interval, guider: as in `guided`
    """
    text, null = encode_texts(unet, prompt_embeds, null_embeds)
    return guided(unet, text, null, guidance_scale, interval=interval, guider=guider)


def stage_2(
    unet: UNet,
    low_res: Tensor,
    prompt_embeds: Tensor,
    null_embeds: Tensor,
    guidance_scale: float = 4.0,
    noise_level: int = 250,
    guider: Guider = classifier_free,
) -> Estimate:
    """The guided estimate of stage 2 for noisy images [N, 3, H, W], given what it sees of the small ones.

    low_res: from `noised_upscaled`, [N, 3, H, W], with the same noise_level; the rest as in `stage_1`
    """

    def model(x_t: Tensor, t: int, text: Text) -> Tensor:
        seen = low_res.repeat(len(x_t) // len(low_res), 1, 1, 1)  # once, or for both halves of guidance
        return unet(torch.cat([x_t, seen], dim=1), t, text, noise_level)

    text, null = encode_texts(unet, prompt_embeds, null_embeds)
    return guided(model, text, null, guidance_scale, guider=guider)


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
    percentile, maximum, _ = check_scheduler(config, str(path))
    return partial(dynamic_threshold, percentile=percentile, maximum=maximum)


def stage_variance(source: str | Path, revision: str | None = None) -> str:
    """The variance of a model's `ddpm_step`, by its scheduler_config.json, or IF's when it has none.

    Raises as `stage_threshold` does.
    """
    path, config = read_json(source, "scheduler", SCHEDULER_CONFIG, revision)
    return "learned_range" if config is None else check_scheduler(config, str(path))[2]


def noised_upscaled(small: Tensor, size: tuple[int, int], noise_level: int, noise: Noise) -> Tensor:
    """What stage 2 sees of small images [N, 3, h, w]: upscaled to [N, 3, H, W] and noised, so that it adds detail.

    Source: Imagen §2.4, arXiv 2205.11487.
    """
    upscaled = F.interpolate(small, size, mode="bilinear", align_corners=True)
    return add_noise(upscaled, noise(), noise_level, SCHEDULE)


def seen_by_stage_2(small: Tensor, size: tuple[int, int], noise_level: int, noise: Noise) -> tuple[Tensor, Noise]:
    """`noised_upscaled`, and the noise for sampling; x_T comes first, before the small image's, as in IF."""
    x_T = noise()
    low_res = noised_upscaled(small, size, noise_level, noise)
    left = itertools.chain([x_T], iter(noise, None))
    return low_res, lambda: next(left)


@torch.no_grad()
def encode_texts(unet: UNet, prompt_embeds: Tensor, null_embeds: Tensor) -> tuple[Text, Text]:
    """The texts of N prompts, and N times that of the null prompt if it is but one, for `guided`."""
    text, null = unet.encode_text(prompt_embeds), unet.encode_text(null_embeds)
    return text, null if len(null) == len(text) else null[[0] * len(text)]


@keep_freed()
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
    variance: str = "learned_range",
    callback: Callback | None = None,
) -> Tensor:
    """Stage 1: prompts -> images [N, 3, H, W] in [-1, 1].

    prompt_embeds, null_embeds: as in `stage_1`
    seeds: [N]; an image depends on its own seed and prompt alone, up to the rounding of another batch size
    size: height and width, the model's own when None
    threshold, variance: of x̂_0 and of `ddpm_step`, IF's unless `stage_threshold` and `stage_variance` find others in
        the model's folder
    Source: Imagen §2, arXiv 2205.11487, with DeepFloyd IF's settings.
    """
    h, w = size or (unet.config.sample_size, unet.config.sample_size)
    noise = noise_source(seeds, (3, h, w), prompt_embeds.device)
    estimate = stage_1(unet, prompt_embeds, null_embeds, guidance_scale)
    loop = {"step": partial(ddpm_step, variance=variance), "threshold": threshold, "callback": callback}
    return sample(estimate, leading_timesteps(SCHEDULE.num_timesteps, num_steps), SCHEDULE, noise=noise, **loop)


@keep_freed()
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
    variance: str = "learned_range",
    callback: Callback | None = None,
) -> Tensor:
    """Stage 2: images [N, 3, h, w] in [-1, 1] and their prompts -> images [N, 3, H, W] in [-1, 1].

    noise_level: the timestep to which the upscaled small image is noised, also passed to the model
    The rest as in `generate`. Source: Imagen §2.4, arXiv 2205.11487, with DeepFloyd IF's settings.
    """
    h, w = size or (unet.config.sample_size, unet.config.sample_size)
    noise = noise_source(seeds, (3, h, w), prompt_embeds.device)
    low_res, noise = seen_by_stage_2(small, (h, w), noise_level, noise)
    estimate = stage_2(unet, low_res, prompt_embeds, null_embeds, guidance_scale, noise_level)
    loop = {"step": partial(ddpm_step, variance=variance), "threshold": threshold, "callback": callback}
    return sample(estimate, leading_timesteps(SCHEDULE.num_timesteps, num_steps), SCHEDULE, noise=noise, **loop)


@dataclass(frozen=True)
class StageFiles:
    """A model of the cascade as its small files describe it."""

    source: str
    revision: str | None
    config: UNetConfig
    threshold: Threshold
    variance: str
    settings: dict[str, float]
    vocabulary: dict | None  # what it can be asked for; None for anything

    def step(self, sampler: str | Step, eta: float) -> Step:
        """One of SAMPLERS for this model, or a step of one's own."""
        options = {"variance": self.variance} if sampler == "ddpm" else {"eta": eta} if eta else {}
        return partial(SAMPLERS.get(sampler, sampler), **options)


def spaced_timesteps(sampler: str | Step, num_steps: int, eta: float = 0.0) -> list[int]:
    """Which timesteps a sampler visits, noisiest first: DPM-Solver++ those of `log_snr_timesteps`, others IF's own.

    Chosen by their distance from the converged image, see scripts/evaluate/solvers.py.
    """
    if sampler == "dpm++":
        return log_snr_timesteps(SCHEDULE, num_steps, **({} if eta else {"scale": 3.0, "skipped": (1.0, 0.75)}))
    return leading_timesteps(SCHEDULE.num_timesteps, num_steps)


def check_stage(source: str, stage: int, revision: str | None = None) -> UNetConfig:
    """The config of a model. Raises ValueError when it is of the other stage."""
    config = load_config(source, revision)
    found = 2 if config.class_embed_type else 1
    if found != stage:
        option = {1: "--model", 2: "--upscaler"}[found]
        raise ValueError(f"{source} is a stage-{found} model, not a stage-{stage} one: give it as {option}")
    return config


def find_stage(source: str, stage: int, revision: str | None) -> StageFiles:
    """Stage 1 or 2 of a model, by its small files. Raises ValueError for what is not implemented, or is the other."""
    config, threshold = check_stage(source, stage, revision), stage_threshold(source, stage, revision)
    settings, vocabulary = stage_settings(source, stage, revision), load_vocabulary(source, revision)
    return StageFiles(source, revision, config, threshold, stage_variance(source, revision), settings, vocabulary)


def stage_settings(source: str, stage: int, revision: str | None = None) -> dict[str, float]:
    """SETTINGS, or those of the model's sampling_config.json. Raises ValueError for one that is not known."""
    path, own = read_json(source, "", "sampling_config.json", revision)
    for name, value in (own or {}).items():
        known = SETTINGS[stage].get(name)
        number = isinstance(value, (int, type(known))) and not isinstance(value, bool) and abs(value) <= 1e6
        if known is None or not number:
            raise ValueError(f"{path} has {name} = {value!r}: it may give numbers for {', '.join(SETTINGS[stage])}")
    return {**SETTINGS[stage], **(own or {})}


def find_variant(stage: StageFiles, dtype: torch.dtype) -> str | None:
    """Which of a stage's weights to read: those of the dtype where there are some, else others, see VARIANTS.

    They are downloaded if need be. Raises FileNotFoundError when there are none.
    """
    missing = None
    for variant in VARIANTS[dtype]:
        try:
            find_weights(stage.source, variant, stage.revision)
            return variant
        except FileNotFoundError as error:
            missing = missing or error
    raise missing


def load_stage(
    stage: StageFiles,
    variant: str | None,
    dtype: torch.dtype,
    device: torch.device,
    compiled: bool = False,
    pack: bool = True,
    room: int | None = None,
) -> UNet:
    """A stage's UNet; says so when float16 weights are computed with in float32. pack, room: as in `load_unet`."""
    stored = stored_dtypes(find_weights(stage.source, variant, stage.revision))
    if dtype == torch.float32 and torch.float16 in stored and stage.source not in SHIPPED:
        print(f"{stage.source} has its weights in float16: computing with them in float32", file=sys.stderr)
    unet = load_unet(stage.source, dtype, device, variant, stage.revision, pack=pack and not compiled, room=room)
    if compiled:
        unet.compile()
    return unet
