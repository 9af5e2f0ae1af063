"""A folder of images for a file of prompts: each is written when it is ready, and a stopped run can go on."""

import itertools
import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.processes import rank, share
from shared.stages import open_cascade, settings_of

import torch
from PIL import Image
from tqdm import tqdm

from ddpm.figures import save_image
from ifmodel import Cascade
from ifmodel.embeds import read_prompts
from ifmodel.jobs import Job, parse_prompt

# Options that are not among an image's settings: what each image has of its own, and what changes none
FREE = {"prompts", "num_images", "seed", "out", "visited"}
FREE |= {"embeds", "batch_size", "device", "dtype", "compile", "low_memory"}


@dataclass(frozen=True)
class Wanted:
    """An image to draw, and where."""

    path: Path
    prompt: str
    seed: int


def draw_folder(args: Namespace):
    """Draw --num-images of every line of --prompts into the folder --out, but for those that are there.

    What is in memory does not grow with them: prompts are embedded into the cache, then batches go through both stages
    one after another, or, where only one stage fits, sixteen at a time. Under torchrun every process draws its share.
    """
    if args.out.suffix == ".png":
        raise ValueError(f"--prompts fills a folder with images: --out names it, and {args.out} would be a file")
    wanted = wanted_images(args, read_prompts(args.prompts))
    cascade = open_cascade(args, out=wanted[0].path)
    batches = [wanted[k : k + args.batch_size] for k in range(0, len(wanted), args.batch_size)]
    mine = share(batches, f"batches of up to {args.batch_size} images: make them smaller with --batch-size")
    settings = described(args)
    left = [[image for image in batch if not is_there(image, settings)] for batch in mine]
    left = [batch for batch in left if batch]
    jobs = (job for batch in left for job in jobs_of(batch, args))
    prompts = dict.fromkeys(prompt for job in jobs for prompt in job.prompts())
    prompts = [args.null_prompt, *prompts] if left else []
    for _ in tqdm(cascade.embed_each(prompts), "prompts", len(prompts), unit="prompt", disable=rank() > 0 or not left):
        pass
    done = sum(map(len, mine)) - sum(map(len, left))
    with tqdm(total=done + sum(map(len, left)), initial=done, unit="image", disable=rank() > 0) as bar:
        at_once = 1
        while left:
            draw_batches(cascade, left[:at_once], args, settings)
            bar.update(sum(map(len, left[:at_once])))
            left = left[at_once:]
            at_once = 1 if cascade.keeps_all() else 16
    if rank() == 0:
        print(args.out)


def draw_batches(cascade: Cascade, batches: Sequence[Sequence[Wanted]], args: Namespace, settings: str):
    """Draw some images through both stages and write them."""
    jobs = [job for batch in batches for job in jobs_of(batch, args)]
    images = torch.cat(cascade.draw_all(jobs, **settings_of(args), progress=False))
    for one, image in zip(itertools.chain(*batches), images, strict=True):
        save_image(one.path, image / 2 + 0.5, seed=one.seed, labels=[one.prompt], metadata={"Settings": settings})


def jobs_of(batch: Sequence[Wanted], args: Namespace) -> list[Job]:
    """A batch in its order: prompts without weights that follow each other are drawn together, each other by itself."""

    def composition(image: Wanted) -> str | None:
        return image.prompt if callable(parse_prompt(image.prompt, args.null_prompt)) else None

    jobs = []
    for composed, images in itertools.groupby(batch, composition):
        prompts, seeds = zip(*((image.prompt, image.seed) for image in images), strict=True)
        recipes = [parse_prompt(prompt, args.null_prompt) for prompt in prompts]
        jobs.append(Job(recipes[0] if composed else recipes, seeds, timesteps=args.visited))
    return jobs


def wanted_images(args: Namespace, prompts: Sequence[str]) -> list[Wanted]:
    """LINE.png for every prompt, or LINE_NUMBER.png where there are several of each."""
    if not prompts:
        raise ValueError(f"{args.prompts} is empty: it must have a prompt on each line")
    names = [""] if args.num_images == 1 else [f"_{k}" for k in range(args.num_images)]
    return [
        Wanted(args.out / f"{i:05}{name}.png", prompt, args.seed + k)
        for i, prompt in enumerate(prompts)
        for k, name in enumerate(names)
    ]


def described(args: Namespace) -> str:
    """The options that an image depends on, besides its prompt and seed."""
    return json.dumps({k: v for k, v in vars(args).items() if k not in FREE}, default=str, sort_keys=True)


def is_there(wanted: Wanted, settings: str) -> bool:
    """Whether an image was drawn before. Raises ValueError when it is another one than is wanted now."""
    if not wanted.path.exists():
        return False
    try:
        with Image.open(wanted.path) as image:
            found = getattr(image, "text", {})
    except OSError:
        found = {}
    now = {"Description": wanted.prompt, "Seed": str(wanted.seed), "Settings": settings}
    for key, value in now.items():
        if found.get(key) != value:
            what = {"Description": "of another prompt", "Seed": "from another seed", "Settings": "with other options"}
            raise ValueError(f"{wanted.path} is there, drawn {what[key]}: name another folder with --out")
    return True
