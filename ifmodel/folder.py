"""A folder of images for many prompts: each is written when it is ready, and a stopped run can go on."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from ddpm.tools.distributed import rank, share
from ddpm.tools.figures import save_image
from ddpm.tools.memory import check_memory
from ifmodel.cascade import Cascade
from ifmodel.jobs import Job, parse_prompt
from ifmodel.options import check_options


@dataclass(frozen=True)
class Wanted:
    """An image to draw, and where."""

    path: Path
    prompt: str
    seed: int


def draw_folder(
    cascade: Cascade,
    prompts: Sequence[str],
    folder: str | Path,
    *,
    seeds: Sequence[int] = (0,),
    timesteps: Sequence[int] | None = None,
    batch_size: int = 8,
    progress: bool = True,
    **options,
):
    """Draw every prompt from every seed, as 00000.png, 00001.png, …, or for several seeds 00000_0.png, 00000_1.png, ….

        draw_folder(Cascade("tiny-if"), ["a photo of a dog", "a lion AND a sunflower :0.5"], "many", num_steps=20)

    prompts: without weights or with, see `parse_prompt`
    timesteps: those of stage 1, see `Job`; options: further ones of `Cascade.draw_all`
    Images that are there stay: after a stop, the same call draws what is missing. What is in memory does not grow with
    their number: prompts are embedded into the cache, then batches go through both stages one after another, or, where
    only one stage fits, sixteen at a time. Under torchrun every process draws its share of the batches.
    Raises ValueError for an image that is there of another prompt, seed or setting, else as `Cascade.draw` does.
    """
    check_options(options, cascade.draw_all)
    wanted = wanted_images(Path(folder), prompts, seeds)
    batches = [wanted[k : k + batch_size] for k in range(0, len(wanted), batch_size)]
    mine = share(batches, f"batches of up to {batch_size} images: make them smaller with --batch-size")
    settings, null = described(cascade, timesteps, options), options.get("negative_prompt", "")
    missing = [[image for image in batch if not is_there(image, settings)] for batch in mine]
    left = [(batch, jobs_of(batch, timesteps, null)) for batch in missing if batch]
    asked = dict.fromkeys(prompt for _, jobs in left for job in jobs for prompt in job.prompts())
    asked, hidden = [null, *asked] if left else [], rank() > 0 or not progress
    for _ in tqdm(cascade.prompts.cache(asked), "prompts", len(asked), unit="prompt", disable=hidden or not left):
        pass
    total, at_once, options = sum(map(len, mine)), 1, {**options, "batch_size": batch_size, "progress": False}
    with tqdm(total=total, initial=total - sum(map(len, missing)), unit="image", disable=hidden) as bar:
        while left:
            draw_batches(cascade, left[:at_once], options, settings)
            bar.update(sum(len(batch) for batch, _ in left[:at_once]))
            left = left[at_once:]
            at_once = 1 if cascade.keeps_all() else 16


def wanted_images(folder: Path, prompts: Sequence[str], seeds: Sequence[int]) -> list[Wanted]:
    """Every prompt from every seed. Raises ValueError when there are none, or more than the memory holds a list of."""
    if not len(prompts) or not len(seeds):
        raise ValueError(f"there is nothing to draw: {len(prompts)} prompts from {len(seeds)} seeds")
    count = len(prompts) * len(seeds)
    check_memory(1000 * count, f"a list of {count} images")  # and of their jobs
    names = [""] if len(seeds) == 1 else [f"_{k}" for k in range(len(seeds))]
    return [
        Wanted(folder / f"{i:05}{name}.png", prompt, seed)
        for i, prompt in enumerate(prompts)
        for name, seed in zip(names, seeds, strict=True)
    ]


def jobs_of(batch: Sequence[Wanted], timesteps: Sequence[int] | None, null: str) -> list[Job]:
    """A batch in its order: prompts without weights that follow each other are drawn together, each other by itself."""

    def composition(image: Wanted) -> str | None:
        return image.prompt if callable(parse_prompt(image.prompt, null)) else None

    jobs = []
    for composed, images in itertools.groupby(batch, composition):
        prompts, seeds = zip(*((image.prompt, image.seed) for image in images), strict=True)
        recipes = [parse_prompt(prompt, null) for prompt in prompts]
        jobs.append(Job(recipes[0] if composed else recipes, seeds, timesteps=timesteps))
    return jobs


def draw_batches(cascade: Cascade, batches: Sequence[tuple[list[Wanted], list[Job]]], options: dict, settings: str):
    """Draw some batches through both stages and write their images."""
    images = torch.cat(cascade.draw_all([job for _, jobs in batches for job in jobs], **options))
    for wanted, image in zip((one for batch, _ in batches for one in batch), images, strict=True):
        labels, metadata = [wanted.prompt], {"Settings": settings}
        save_image(wanted.path, image / 2 + 0.5, seed=wanted.seed, labels=labels, metadata=metadata)


def described(cascade: Cascade, timesteps: Sequence[int] | None, options: dict) -> str:
    """What an image depends on besides its prompt and seed; of weights, where they are from."""
    settings = {
        "models": [[files.source, files.revision] for files in cascade.stages],
        "loras": [[lora.source, scale] for lora, scale, _ in cascade.loras],
        "size": cascade.sizes[0],
        "timesteps": timesteps,
        **options,
    }
    return json.dumps(settings, default=name_of, sort_keys=True)


def name_of(value):
    """What JSON has no form for, the same in every process: a function by its name, since its address changes."""
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    return getattr(value, "__qualname__", None) or str(value)


def is_there(wanted: Wanted, settings: str) -> bool:
    """Whether an image was drawn before. Raises ValueError when it is another one than is wanted now."""
    if not wanted.path.exists():
        return False
    try:
        with Image.open(wanted.path) as image:
            found = getattr(image, "text", {})
    except OSError:
        found = {}
    now = {"Description": wanted.prompt or None, "Seed": str(wanted.seed), "Settings": settings}
    for key, value in now.items():
        if found.get(key) != value:
            what = {"Description": "of another prompt", "Seed": "from another seed", "Settings": "with other options"}
            raise ValueError(f"{wanted.path} is there, drawn {what[key]}: name another folder")
    return True
