"""The cascade: text to a small image with stage 1, the small image to a larger one with stage 2.

Each stage gives the algorithms of `ddpm` an estimate and a step; `generate` and `upscale` sample with these from pure
noise. Stage 2 also sees the small image, upscaled and a little noised. `Cascade` does all of it: prompts in, images
out, along two axes, which estimate (a recipe) and which loop (an algorithm).
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ddpm.process import Threshold, add_noise, ddim_step, ddpm_step, dpm_solver_step, dynamic_threshold
from ddpm.sampling import ALWAYS, Callback, Estimate, Noise, Step, guided, iterative_denoise, noise_source, sample
from ddpm.schedule import cosine_schedule, leading_timesteps, linspace_timesteps, log_snr_timesteps
from ddpm.views import View
from ifmodel.config import UNetConfig, check_noising_scheduler, check_scheduler
from ifmodel.text import embed_prompts, load_embeds, normalised
from ifmodel.unet import Text, UNet
from ifmodel.weights import SHIPPED, VARIANTS, find_weights, load_config, load_unet, read_json, stored_dtypes

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
    percentile, maximum, _ = check_scheduler(config, str(path))
    return partial(dynamic_threshold, percentile=percentile, maximum=maximum)


def stage_variance(source: str | Path, revision: str | None = None) -> str:
    """The variance of a model's `ddpm_step`, by its scheduler_config.json, or IF's when it has none.

    Raises as `stage_threshold` does.
    """
    path, config = read_json(source, "scheduler", SCHEDULER_CONFIG, revision)
    return "learned_range" if config is None else check_scheduler(config, str(path))[2]


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
    variance: str = "learned_range",
    callback: Callback | None = None,
) -> Tensor:
    """Stage 1: prompts -> pictures [N, 3, H, W] in [-1, 1].

    prompt_embeds, null_embeds: as in `stage_1`
    seeds: [N]; a picture depends on its own seed and prompt alone, up to the rounding of another batch size
    size: height and width, the model's own when None
    threshold, variance: of x̂_0 and of `ddpm_step`, IF's unless `stage_threshold` and `stage_variance` find others in
        the model's folder
    Source: Imagen §2, arXiv 2205.11487, with DeepFloyd IF's settings.
    """
    h, w = size or (unet.config.sample_size, unet.config.sample_size)
    noise = noise_source(seeds, (3, h, w), prompt_embeds.device)
    estimate = stage_1(unet, prompt_embeds, null_embeds, guidance_scale)
    timesteps = leading_timesteps(SCHEDULE.num_timesteps, num_steps)
    step = partial(STAGE_1_STEP, threshold=threshold, variance=variance)
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
    variance: str = "learned_range",
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
    step = partial(STAGE_2_STEP, threshold=threshold, variance=variance)
    return iterative_denoise(estimate, x_T, timesteps, SCHEDULE, noise=noise, step=step, callback=callback)


SETTINGS = {"guidance": 7.0, "upscaler_steps": 50, "upscaler_guidance": 4.0, "noise_level": 250}  # IF's own
SMALL_SETTINGS = {"guidance": 4.0, "upscaler_steps": 20, "upscaler_guidance": 1.0, "noise_level": 50}
SAMPLERS: dict[str, Step] = {
    "ddpm": ddpm_step,
    "ddim": ddim_step,
    "dpm++": dpm_solver_step,
}


@dataclass(frozen=True)
class StageFiles:
    """A model of the cascade as its small files describe it."""

    source: str
    revision: str | None
    config: UNetConfig
    threshold: Threshold
    variance: str

    def step(self, sampler: str, eta: float) -> Step:
        """One of SAMPLERS for this model."""
        options = {"variance": self.variance} if sampler == "ddpm" else {"eta": eta}
        return partial(SAMPLERS[sampler], threshold=self.threshold, **options)


def spaced_timesteps(sampler: str, eta: float, num_steps: int) -> list[int]:
    """Which timesteps a sampler visits, noisiest first.

    IF's own spacing leaves out the noisiest ones; SDE-DPM-Solver++ does better with them, and without fresh noise
    DPM-Solver++ is nearest to the converged image with steps of one length in log SNR.
    """
    if sampler != "dpm++":
        return leading_timesteps(SCHEDULE.num_timesteps, num_steps)
    if eta:
        return linspace_timesteps(SCHEDULE.num_timesteps, num_steps)
    return log_snr_timesteps(SCHEDULE, num_steps)


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
    return StageFiles(source, revision, config, threshold, stage_variance(source, revision))


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
    stage: StageFiles, variant: str | None, dtype: torch.dtype, device: torch.device, compiled: bool = False
) -> UNet:
    """A stage's UNet, packed on the CPU unless compiled; says so when float16 weights are computed with in float32."""
    stored = stored_dtypes(find_weights(stage.source, variant, stage.revision))
    if dtype == torch.float32 and torch.float16 in stored and stage.source not in SHIPPED:
        print(f"{stage.source} has its weights in float16: computing with them in float32", file=sys.stderr)
    unet = load_unet(stage.source, dtype, device, variant, stage.revision, pack=not compiled)
    if compiled:
        unet.compile()
    return unet


def check_finite(where: str, *tensors: Tensor):
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise ValueError(f"{where}: not finite any more; try --dtype float32, or less --guidance")


def finite(estimate: Estimate, where: str) -> Estimate:
    """An estimate that stops when guidance has made it infinite, which thresholding would hide."""

    def checked(x_t: Tensor, t: int) -> tuple[Tensor, Tensor | None]:
        eps, v = estimate(x_t, t)
        check_finite(f"{where}, t = {t}, with guidance", eps)
        return eps, v

    return checked


@contextmanager
def watch(unet: UNet, steps: int, description: str) -> Iterator[Callback]:
    """A progress bar for a sampler, whose callback it gives.

    Stops at the first output of the UNet, and at the first picture that the callback is given, that is not finite.
    """
    step = [0]

    def check(module, inputs, output: Tensor):
        check_finite(f"{description}, step {step[0]} (t = {int(torch.as_tensor(inputs[1]).max())})", output)

    def callback(*given):
        check_finite(f"{description}, step {step[0]}", *(value for value in given if isinstance(value, Tensor)))
        step[0] += 1
        bar.update()

    hook = unet.register_forward_hook(check)
    try:
        with tqdm(total=steps, desc=description, unit="step") as bar:
            yield callback
    finally:
        hook.remove()


class Stage:
    """A stage at work on a batch of images: what a recipe builds its estimate from, the same recipe in both stages.

    number: 1 or 2; low_res: what stage 2 sees of the small images, [B, 3, H, W], None in stage 1
    """

    def __init__(self, cascade: "Cascade", number: int, count: int, guidance_scale: float, noise_level: int):
        self.number, self.low_res = number, None
        self._cascade, self._count, self._guidance_scale, self._noise_level = (
            cascade,
            count,
            guidance_scale,
            noise_level,
        )
        self.negative_prompt = ""

    def estimate(
        self, prompt: str | Sequence[str], *, view: View | None = None, guidance_scale: float | None = None
    ) -> Estimate:
        """The guided estimate of a prompt, or of one for each image of the batch.

        view: in which x_t is seen, so that stage 2 sees the small images in it, too
        guidance_scale: γ; that of `Cascade.draw` when None
        """
        prompts = [prompt] * self._count if isinstance(prompt, str) else list(prompt)
        cascade = self._cascade
        text, null = cascade.embedded(prompts), cascade.embedded([self.negative_prompt])
        scale = self._guidance_scale if guidance_scale is None or self.number == 2 else guidance_scale
        if self.number == 1:
            return finite(stage_1(cascade.unet, text, null, scale), "stage 1")
        low_res = self.low_res if view is None else view.view(self.low_res)
        return finite(stage_2(cascade.unet, low_res, text, null, scale, self._noise_level), "stage 2")


class _Prompts:
    """Stands in for a `Stage` to learn which prompts a recipe asks for, before anything is computed."""

    def __init__(self, number: int):
        self.number, self.low_res, self.asked = number, None, []

    def estimate(self, prompt: str | Sequence[str], **_) -> Estimate:
        self.asked += [prompt] if isinstance(prompt, str) else prompt
        return lambda x_t, t: (x_t, None)


class Cascade:
    """Text to images with both stages, one in memory at a time.

    cascade = Cascade("tiny-if")
    images = cascade.draw(["a photo of a dog", "a rocket ship"], seeds=[1, 2])  # [2, 3, 128, 128] in [-1, 1]
    """

    def __init__(
        self,
        model: str | Path = "tiny-if",
        *,
        upscaler: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        embeds: str | Path | None = None,
    ):
        """model: a stage-1 folder or Hub id, or "tiny-if", both stages of the small model that comes with the package.

        upscaler: a stage-2 folder or Hub id; None draws with stage 1 alone, "tiny-if" has its own
        embeds: a file of prompts with their embeddings, which spares T5, see `load_embeds`
        Downloads what is missing. Raises FileNotFoundError or ValueError, in one line, for what cannot work together.
        """
        if str(model) == "tiny-if":
            model, upscaler = "tiny-if/I", upscaler or "tiny-if/II"
        self.dtype, self.device, self.unet, self._loaded = dtype, torch.device(device), None, None
        sources = [str(model)] if upscaler is None else [str(model), str(upscaler)]
        self.embeds = load_embeds(embeds) if embeds else {}  # first, since the next line may download
        self.stages = [find_stage(source, number, None) for number, source in enumerate(sources, start=1)]
        small = self.stages[0].config.sample_size
        self.settings = SETTINGS if small >= 64 else SMALL_SETTINGS
        for stage in self.stages:
            for width in {tensor.shape[-1] for tensor in self.embeds.values()} - {stage.config.encoder_hid_dim}:
                wanted = f"{stage.source} takes those that are {stage.config.encoder_hid_dim} wide"
                raise ValueError(f"embeddings are {width} wide, of another text encoder: {wanted}")
        self._variants = [find_variant(stage, dtype) for stage in self.stages]

    @torch.no_grad()
    def draw(
        self,
        recipe: str | Sequence[str] | Callable[[Stage], Estimate],
        algorithm: Callable[..., Tensor] = sample,
        *,
        seeds: Sequence[int],
        timesteps: Sequence[int] | None = None,
        num_steps: int = 100,
        sampler: str = "ddpm",
        eta: float = 0.0,
        guidance_scale: float | None = None,
        negative_prompt: str = "",
        upscale: Callable[..., Tensor] = sample,
        upscaler_steps: int | None = None,
        upscaler_guidance_scale: float | None = None,
        noise_level: int | None = None,
        batch_size: int = 8,
    ) -> Tensor:
        """Images [len(seeds), 3, H, W] in [-1, 1] on the CPU, each from its own seed.

        recipe: a prompt for all, one for each seed, or a function that builds an `Estimate` from a `Stage`
        algorithm: takes estimate, timesteps, schedule, noise, step and callback by name, as `sample` does: bind the
            others' own arguments with functools.partial, such as partial(sdedit, x_0=x_0, i_start=10)
        timesteps: those of stage 1, noisiest first; num_steps of the sampler's own spacing when None
        sampler, eta: one of SAMPLERS; how much fresh noise ddim and dpm++ add
        guidance_scale, upscaler_steps, upscaler_guidance_scale, noise_level: the model's own when None
        upscale: the algorithm of stage 2
        Raises ValueError, before anything is computed, for arguments that do not fit.
        """
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, not {sampler!r}")
        seeds = list(seeds)
        if not seeds:
            raise ValueError("seeds must hold one for each image")
        prompts = recipe if not callable(recipe) else None
        if prompts is not None and not isinstance(prompts, str) and len(prompts) != len(seeds):
            raise ValueError(f"give one prompt, or one for each of the {len(seeds)} seeds, not {len(prompts)}")
        own = self.settings
        scales = [own["guidance"], own["upscaler_guidance"]]
        scales = [o if g is None else g for g, o in zip((guidance_scale, upscaler_guidance_scale), scales, strict=True)]
        noise_level = own["noise_level"] if noise_level is None else noise_level
        visited = [
            list(timesteps or spaced_timesteps(sampler, eta, num_steps)),
            leading_timesteps(SCHEDULE.num_timesteps, upscaler_steps or own["upscaler_steps"]),
        ]
        self._embed([*self._prompts_of(recipe), negative_prompt])

        batches = [list(range(k, min(k + batch_size, len(seeds)))) for k in range(0, len(seeds), batch_size)]
        images: list[Tensor] = []
        for number in range(1, len(self.stages) + 1):
            self._load(number)
            config, run = self.stages[number - 1].config, (algorithm, upscale)[number - 1]
            step = self.stages[number - 1].step(sampler, eta)
            shape, drawn = (3, config.sample_size, config.sample_size), []
            with watch(self.unet, len(visited[number - 1]) * len(batches), f"stage {number}") as callback:
                for k, rows in enumerate(batches):
                    noise = noise_source([seeds[row] for row in rows], shape, self.device)
                    stage = Stage(self, number, len(rows), scales[number - 1], noise_level)
                    stage.negative_prompt = negative_prompt
                    if number == 2:  # x_T is drawn before the noise of low_res, as IF does
                        x_T = [noise()]
                        stage.low_res = noised_upscaled(images[k], shape[1:], noise_level, noise)
                        noise = partial(lambda first, more: first.pop() if first else more(), x_T, noise)
                    if callable(recipe):
                        estimate = recipe(stage)
                    else:
                        estimate = stage.estimate(prompts if isinstance(prompts, str) else [prompts[r] for r in rows])
                    loop = {"timesteps": visited[number - 1], "schedule": SCHEDULE, "step": step, "callback": callback}
                    image = run(estimate=estimate, noise=noise, **loop)
                    check_finite(f"stage {number}, the image", image)
                    drawn.append(image)
            images = drawn
        return torch.cat(images).cpu()

    def _prompts_of(self, recipe) -> list[str]:
        if isinstance(recipe, str):
            return [recipe]
        if not callable(recipe):
            return list(recipe)
        asked = []
        for number in range(1, len(self.stages) + 1):
            recipe(prompts := _Prompts(number))
            asked += prompts.asked
        return asked

    def _embed(self, prompts: Sequence[str]):
        """Embed the prompts that are not known yet; T5 is freed again before a UNet is loaded."""
        unknown = [prompt for prompt in dict.fromkeys(prompts) if normalised(prompt) not in self.embeds]
        if unknown:
            self.unet, self._loaded = (self.unet, self._loaded) if self.device.type == "cpu" else (None, None)
            found = embed_prompts(self.stages[0].source, unknown, dtype=self.dtype, device=self.device)
            self.embeds |= {normalised(prompt): tensor for prompt, tensor in found.items()}

    def embedded(self, prompts: Sequence[str]) -> Tensor:
        """T5's output for prompts that were embedded before, [B, 77, D_text] on the device."""
        return torch.stack([self.embeds[normalised(prompt)].to(self.device, torch.float32) for prompt in prompts])

    def _load(self, number: int):
        if self._loaded != number:
            self.unet = None  # before the next one is loaded
            stage, variant = self.stages[number - 1], self._variants[number - 1]
            self.unet, self._loaded = load_stage(stage, variant, self.dtype, self.device), number
