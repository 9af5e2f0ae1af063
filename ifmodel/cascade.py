"""The cascade: text to a small image with stage 1, the small image to a larger one with stage 2.

It draws jobs (see `jobs`): checks them before anything is computed, embeds their prompts, and loads the UNets, one at a
time where both do not fit into memory.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ddpm.estimates import ALWAYS
from ddpm.sampling import Callback, Step, noise_source, sample
from ddpm.schedule import leading_timesteps
from ddpm.tools.devices import pick_device, pick_dtype
from ddpm.tools.memory import check_memory, free_memory, keep_freed
from ifmodel.embeds import load_embeds
from ifmodel.jobs import Job, Recipe, Stage
from ifmodel.lora import merge_lora, place_lora
from ifmodel.lora_files import read_lora
from ifmodel.offload import check_accelerate
from ifmodel.options import as_number, check_options, check_settings, warn_of_noise
from ifmodel.prompts import Prompts
from ifmodel.stage import (
    SCHEDULE,
    SETTINGS,
    find_stage,
    find_variant,
    load_stage,
    seen_by_stage_2,
    spaced_timesteps,
)
from ifmodel.unet import UNet
from ifmodel.weights import find_weights, stored_dtypes


class Cascade:
    """Text to images with both stages, one in memory at a time where both do not fit.

    cascade = Cascade("tiny-if")
    images = cascade.draw(["a photo of a dog", "a rocket ship"], seeds=[1, 2])  # [2, 3, 128, 128] in [-1, 1]
    """

    def __init__(
        self,
        model: str | Path = "tiny-if",
        *,
        upscaler: str | Path | None = None,
        revision: str | None = None,
        upscaler_revision: str | None = None,
        embeds: str | Path | None = None,
        size: tuple[int, int] | None = None,
        dtype: str | torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        compiled: bool = False,
        lora: str | Path | Sequence[str | Path] = (),
        lora_scale: float | Sequence[float] = 1.0,
        low_memory: bool = False,
    ):
        """model: a stage-1 folder or Hub id, or "tiny-if", both stages of the small model that comes with the package.

        upscaler: a stage-2 folder or Hub id; None or "none" draws with stage 1 alone, but "tiny-if" has its own
            unless this is "none"
        revision, upscaler_revision: branch, tag or commit of a Hub model
        embeds: a file of prompts with their embeddings, which spares T5, see `load_embeds`
        size: height and width of stage 1's images, the model's own when None
        dtype, device: also by their names, of which "auto" is the fastest here, see `pick_dtype` and `pick_device`
        compiled: torch.compile the UNets
        lora, lora_scale: files, folders or Hub ids of LoRAs, see `load_lora`, and one strength, or one for each. A LoRA
            is merged into the stage that it fits, and into T5 if it has something for it. LoRAs are trained on eps
            alone, which makes the learned variance unreliable: ddpm then takes the fixed β̃ (fixed_small)
        low_memory: weights of T5 and the UNets that do not fit into the device's memory are read from their files,
            layer by layer, at each use; the images stay the same, see `offload`. On the CPU, T5's always are
        Raises FileNotFoundError or ValueError, in one line, for what cannot work together; the weights are not
        looked for until they are needed.
        """
        if str(model) == "tiny-if":
            model, upscaler = "tiny-if/I", upscaler or "tiny-if/II"
        upscaler = "tiny-if/II" if str(upscaler) == "tiny-if" else upscaler
        if low_memory:
            check_accelerate()
            if compiled:
                raise ValueError("what is read layer by layer cannot be compiled: leave --compile or --low-memory")
        self.device = pick_device(device) if isinstance(device, str) else device
        self.dtype = pick_dtype(dtype, self.device, float16=True) if isinstance(dtype, str) else dtype
        self.compiled, self.low_memory = compiled, low_memory
        known = load_embeds(embeds) if embeds else {}  # first, since the next lines may download
        self._unets: dict[int, UNet] = {}  # by the number of their stage
        self._lock = threading.RLock()  # of these and of the prompts, for a server that draws from several threads
        self.stages = [find_stage(str(model), 1, revision)]
        if upscaler not in (None, "none"):
            self.stages.append(find_stage(str(upscaler), 2, upscaler_revision))
        self.loras = self._place_loras([lora] if isinstance(lora, str | Path) else lora, lora_scale)
        if embeds and any(lora.text_encoder for lora, _, _ in self.loras):
            raise ValueError(f"a LoRA changes T5, and {embeds} is of T5 without it: leave that out")
        t5 = {"dtype": self.dtype, "device": self.device, "low_memory": low_memory}
        t5["loras"] = [(lora, scale) for lora, scale, _ in self.loras]
        self.prompts = Prompts(self.stages, known, self._before_t5, **t5)
        small = self.stages[0].config.sample_size
        size = (size, size) if isinstance(size, int) else tuple(size or (small, small))
        self.sizes = [tuple(round(side * stage.config.sample_size / small) for side in size) for stage in self.stages]
        self._check_sizes(1)

    def draw(
        self,
        recipe: Recipe,
        algorithm: Callable[..., Tensor] = sample,
        *,
        seeds: Sequence[int],
        timesteps: Sequence[int] | None = None,
        upscale: Callable[..., Tensor] = sample,
        **options,
    ) -> Tensor:
        """Images [len(seeds), 3, H, W] in [-1, 1] on the CPU, each from its own seed: one `Job` of `draw_all`.

        recipe: a prompt, a list with one for each seed, or a function of a `Stage`; `parse_prompt` makes one of "a dog
            AND a hat"
        algorithm, timesteps, upscale: see `Job`; fewer than four steps leave noise
        seeds: numbers from 0 to 2^32 - 1, one for each image
        options: those of `draw_all`. Most wanted are num_steps (1 to 1000) and guidance_scale (γ, 1 for none) of stage
            1, upscaler_steps and upscaler_guidance_scale of stage 2, noise_level (0 to 999), sampler ("ddpm", "ddim",
            "dpm++" or a step function), eta (0 to 1), negative_prompt, batch_size and progress
        Raises TypeError for an option that there is not, and as `draw_all` does.
        """
        check_options(options, self.draw_all, algorithm)
        return self.draw_all([Job(recipe, seeds, algorithm, timesteps, upscale)], **options)[0]

    @torch.no_grad()
    def draw_all(
        self,
        jobs: Sequence[Job],
        *,
        num_steps: int | None = None,
        sampler: str | Step = "ddpm",
        eta: float = 0.0,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] = ALWAYS,
        negative_prompt: str = "",
        upscaler_steps: int | None = None,
        upscaler_guidance_scale: float | None = None,
        noise_level: int | None = None,
        batch_size: int = 8,
        progress: bool = True,
    ) -> list[Tensor]:
        """Images [len(seeds), 3, H, W] in [-1, 1] of every job, on the CPU: all of stage 1, then all of stage 2.

        sampler, eta: of stage 1, one of SAMPLERS, or a step function with its options bound, which visits IF's own
            timesteps; how much fresh noise ddim and dpm++ add. Stage 2 samples with ddpm, of which few steps come
            closest to the original, see weights.md
        guidance_interval: the first and last t with guidance in stage 1
        num_steps, guidance_scale, upscaler_steps, upscaler_guidance_scale, noise_level: the model's own when None
        An image depends on its own seed and prompt alone, up to the rounding of another batch size.
        Raises ValueError, before anything is computed, for what does not fit.
        """
        settings = self._settings(
            {"num_steps": num_steps, "guidance_scale": guidance_scale},
            {"num_steps": upscaler_steps, "guidance_scale": upscaler_guidance_scale, "noise_level": noise_level},
        )
        noise_level, negative_prompt = settings[2]["noise_level"], negative_prompt or ""
        check_settings(sampler, eta, guidance_interval, noise_level)
        timesteps = {
            1: spaced_timesteps(sampler, settings[1]["num_steps"], eta),
            2: leading_timesteps(SCHEDULE.num_timesteps, settings[2]["num_steps"]),
        }
        begun = [(1, job.timesteps or timesteps[1]) for job in jobs if job.from_noise()]
        for number, path in [*begun, (2, timesteps[2])]:
            if number <= len(self.stages):
                warn_of_noise(number, path)
        prompts = [*dict.fromkeys(prompt for job in jobs for prompt in job.prompts())]
        self.prompts.check(prompts, negative_prompt)
        batches = self._batches(jobs, batch_size)

        images: list[Tensor | None] = [None] * len(batches)
        with self._lock:
            self.prompts.embed([*prompts, negative_prompt])
            for number, files in enumerate(self.stages, start=1):
                asked = settings[number]["guidance_scale"], guidance_interval, negative_prompt, noise_level
                loop = {"threshold": files.threshold, "timesteps": timesteps[number]}
                loop["step"] = files.step(sampler, eta) if number == 1 else files.step("ddpm", 0.0)
                images = self._draw_stage(number, batches, images, asked, progress, loop)
        return list(torch.cat(images).cpu().split([len(job.seeds) for job in jobs]))

    def _batches(self, jobs: Sequence[Job], batch_size: int) -> list[Job]:
        """The jobs in batches, once all weights are there and the memory holds the images, and a batch at work."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        count, (h, w) = sum(len(job.seeds) for job in jobs), self.sizes[-1]
        check_memory(2 * 3 * 4 * count * h * w, f"{count} images of {h} × {w}")
        batches = [batch for job in jobs for batch in job.batches(batch_size)]
        self._check_sizes(max(len(batch.seeds) for batch in batches))
        for files in self.stages:
            find_variant(files, self.dtype)  # all of a download, before anything is computed
        return batches

    def _draw_stage(
        self,
        number: int,
        batches: Sequence[Job],
        small: Sequence[Tensor | None],
        asked: tuple,
        progress: bool,
        loop: dict,
    ) -> list[Tensor]:
        """Every batch by one stage. small: the images of stage 1, None in stage 1; asked: the rest of `Stage`."""
        largest = max(len(batch.seeds) for batch in batches)
        unet = self._load(number, largest)
        self._check_sizes(largest, [number])  # again, now that the weights are there
        own = [loop | ({"timesteps": batch.timesteps} if number == 1 and batch.timesteps else {}) for batch in batches]
        steps = [batch.num_steps if number == 1 else None for batch in batches]
        total = sum(count or len(loop["timesteps"]) for count, loop in zip(steps, own, strict=True))
        drawn = []
        with keep_freed(), progress_bar(total, f"stage {number}", progress) as callback:
            for batch, low, loop in zip(batches, small, own, strict=True):
                stage = Stage(number, unet, self.prompts, len(batch.seeds), *asked)
                drawn.append(self._draw(batch, stage, low, callback=callback, **loop))
        return drawn

    def _draw(self, batch: Job, stage: Stage, small: Tensor | None, **loop) -> Tensor:
        """A batch of images, in stage 2 from the small ones; loop: further arguments of the algorithm."""
        size = self.sizes[stage.number - 1]
        noise = noise_source(batch.seeds, (3, *size), self.device)
        if stage.number == 2:
            stage.low_res, noise = seen_by_stage_2(small, size, stage.noise_level, noise)
        algorithm = batch.algorithm if stage.number == 1 else batch.upscale
        return algorithm(estimate=batch.estimate(stage), schedule=SCHEDULE, noise=noise, **loop)

    def _settings(self, *given: dict[str, float | None]) -> dict[int, dict[str, float]]:
        """Those of stage 1 and 2: what is given, else the model's own, else IF's."""
        theirs = SETTINGS | {number: files.settings for number, files in enumerate(self.stages, start=1)}
        chosen = [{name: as_number(name, value) for name, value in own.items() if value is not None} for own in given]
        return {number: theirs[number] | chosen[number - 1] for number in theirs}

    def _check_sizes(self, batch_size: int, stages: Sequence[int] = (1, 2)):
        """Refuse a height or width that a stage cannot halve often enough, or that the memory cannot hold."""
        for number in stages[: len(self.stages)]:
            config, (h, w) = self.stages[number - 1].config, self.sizes[number - 1]
            multiple = config.size_multiple
            if h % multiple or w % multiple or min(h, w) < 1:
                raise ValueError(f"height and width must be multiples of {multiple}, not {h} × {w}")
            needed = config.activation_bytes(2 * batch_size, h, w, self.dtype.itemsize)  # guidance doubles the batch
            images = "an image" if batch_size == 1 else f"a batch of {batch_size} images"
            check_memory(needed, f"{images} of {h} × {w}", self.device)

    def _place_loras(self, sources: Sequence[str | Path], scales: float | Sequence[float]) -> list[tuple]:
        """Each LoRA, its scale and the number of its stage, whose variance is a fixed one from now on."""
        scales = [scales] * len(sources) if isinstance(scales, int | float) else list(scales)
        if len(scales) != len(sources):
            raise ValueError(f"give one LoRA scale, or one for each of the {len(sources)} LoRAs, not {len(scales)}")
        placed = []
        for source, scale in zip(sources, scales, strict=True):
            lora = read_lora(source)
            number = place_lora(lora, [files.config for files in self.stages])
            self.stages[number - 1] = replace(self.stages[number - 1], variance="beta_tilde")
            placed.append((lora, scale, number))
        return placed

    def _before_t5(self):
        """It is not in a GPU's memory together with a UNet."""
        if self.device.type != "cpu":
            self._unets.clear()

    def keeps_all(self) -> bool:
        """Whether all stages are in memory together, so that the next call loads none of them."""
        return len(self._unets) == len(self.stages)

    def _load(self, number: int, batch_size: int) -> UNet:
        """Stage 1 or 2; the other is freed first where both and a batch do not fit."""
        if number not in self._unets:
            files = self.stages[number - 1]
            variant = find_variant(files, self.dtype)
            weights, working = self._needed(number, variant, batch_size)
            if self._unets and weights + working > self._free():
                self._unets.clear()
            how = {"compiled": self.compiled, "pack": not self.low_memory}
            if self.low_memory and weights + working > self._free():
                how["room"] = max(0, self._free() - working) if self.device.type == "cuda" else 0
            unet = load_stage(files, variant, self.dtype, self.device, **how)
            for lora, scale, fitting in self.loras:
                if fitting == number:
                    merge_lora(unet, lora, scale)
            self._unets[number] = unet
        return self._unets[number]

    def _free(self) -> float:
        free = free_memory(self.device)
        return math.inf if free is None else free

    def _needed(self, number: int, variant: str | None, batch_size: int) -> tuple[int, int]:
        """Bytes that a stage's weights take, and a batch of its images, with some to spare."""
        files = self.stages[number - 1]
        paths = find_weights(files.source, variant, files.revision)
        stored = max(dtype.itemsize for dtype in stored_dtypes(paths))
        weights = sum(path.stat().st_size for path in paths) * self.dtype.itemsize // stored
        if self.device.type == "cpu" and not self.low_memory:
            weights *= 2  # packed, a copy
        return weights, 2 * files.config.activation_bytes(2 * batch_size, *self.sizes[number - 1], self.dtype.itemsize)


@contextmanager
def progress_bar(steps: int, description: str, shown: bool = True) -> Iterator[Callback]:
    """A progress bar for a sampler, whose callback it gives."""
    with tqdm(total=steps, desc=description, unit="step", disable=not shown) as bar:
        yield lambda *_: bar.update()
        bar.total = bar.n  # an algorithm may take fewer steps than there are timesteps
