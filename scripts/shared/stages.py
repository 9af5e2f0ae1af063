"""What the scripts that run DeepFloyd IF share: their options, and the cascade that these ask for."""

import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from pathlib import Path

from shared.options import (
    Size,
    add_device_options,
    add_low_memory_option,
    add_output_options,
    check_not_overwritten,
    check_writable,
    number,
    pick,
    positive,
)

import torch
from torch import Tensor

from ddpm.estimates import ALWAYS
from ddpm.schedule import NAMED_SECTIONS, named_timesteps, strided_timesteps
from ddpm.tools.distributed import gathered, num_processes, rank, share
from ifmodel import Cascade
from ifmodel.embeds import normalised
from ifmodel.jobs import Job
from ifmodel.stage import SAMPLERS, SCHEDULE, SETTINGS, spaced_timesteps, stage_settings

MODEL, UPSCALER = "tiny-if/I", "tiny-if/II"  # what is used when no --model is given


def steps_or_name(text: str) -> int | str:
    """An argparse type: a number of timesteps, or the name of one of IF's lists."""
    if text in NAMED_SECTIONS:
        return text
    try:
        return positive(text)
    except ArgumentTypeError:
        names = ", ".join(NAMED_SECTIONS)
        raise ArgumentTypeError(f"{text!r} is neither a number of steps nor one of {names}") from None


def model_name(text: str) -> str:
    """An argparse type: a stage-1 model; tiny-if is short for its first stage."""
    return MODEL if text == "tiny-if" else text


def grouped(prompts: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """Prompts, so many at a time; the last may be fewer."""
    return [tuple(prompts[k : k + size]) for k in range(0, len(prompts), size)]


def add_model_options(options: ArgumentParser, *, stages: int = 2):
    """Which models draw, and what spares T5; stages: 1 leaves stage 2 out."""
    stage_1 = f"a stage-1 model: a folder, a Hub id, or {MODEL}, which is shipped (default)"
    options.add_argument("--model", default=MODEL, type=model_name, metavar="FOLDER_OR_HUB_ID", help=stage_1)
    options.add_argument("--revision", help="branch, tag or commit of a Hub model")
    if stages == 2:
        stage_2 = f"a stage-2 model, or none (default: {UPSCALER} with {MODEL}, none with others)"
        options.add_argument("--upscaler", metavar="FOLDER_OR_HUB_ID", help=stage_2)
        options.add_argument("--upscaler-revision", help="branch, tag or commit of a Hub model")
    else:
        options.set_defaults(upscaler="none", upscaler_revision=None)
    options.add_argument("--embeds", type=Path, metavar="FILE", help="prompts with their embeddings; spares T5")


def add_cascade_options(
    options: ArgumentParser,
    out: str,
    *,
    stride: int | None = None,
    guidance: float | None = None,
    stages: int = 2,
    stepwise: bool = True,
    batched: bool = True,
):
    """The options of every script that runs IF, in groups below the script's own.

    stride: visit every stride-th timestep unless --steps is given
    guidance: the default of --guidance, the model's when None
    stages: 1 for figures of stage 1 alone, which one process draws
    stepwise, batched: whether it takes steps, and draws several images at a time
    """

    def by_model(stage: int, name: str) -> str:
        theirs, own = SETTINGS[stage][name], stage_settings((MODEL, UPSCALER)[stage - 1], stage)[name]
        return f"default: {theirs:g}; {own:g} with tiny-if"

    titles = ("how it is drawn", "output", "model", "device and memory")
    how, output, model, device = (options.add_argument_group(title) for title in titles)
    default = by_model(1, "guidance_scale") if guidance is None else f"default: {guidance:g}"
    how.add_argument("--guidance", type=number, default=guidance, help=f"γ ({default})")
    options.set_defaults(stages=stages, default_stride=stride, steps=None, stride=None, sampler="ddpm", eta=0.0)
    if stepwise:
        visited = how.add_mutually_exclusive_group()
        default = by_model(1, "num_steps") if stride is None else "instead of --stride"
        visited.add_argument("--steps", type=steps_or_name, help=f"a number, or smart50 and its like ({default})")
        default = "instead of --steps" if stride is None else f"default: {stride}"
        visited.add_argument("--stride", type=positive, help=f"visit every so many timesteps ({default})")
        how.add_argument("--sampler", choices=SAMPLERS, default="ddpm", help="of stage 1 (default: ddpm)")
        how.add_argument("--eta", type=number, default=0.0, help="noise of ddim and dpm++, 0 to 1 (default: 0)")
    how.add_argument("--null-prompt", "--negative-prompt", default="", metavar="TEXT", help='default: ""')
    ends = {"nargs": 2, "metavar": ("FIRST", "LAST")}
    how.add_argument("--guidance-interval", type=int, help="guided t (default: all)", **ends)
    size = "of stage 1: height and width, or one number for both (default: the model's)"
    how.add_argument("--size", type=positive, action=Size, help=size)
    options.set_defaults(upscaler_steps=None, upscaler_guidance=None, noise_level=None)
    if stages == 2:
        how.add_argument("--upscaler-steps", type=positive, help=by_model(2, "num_steps"))
        how.add_argument("--upscaler-guidance", type=number, help=by_model(2, "guidance_scale"))
        how.add_argument("--noise-level", type=int, help=f"0 to 999 ({by_model(2, 'noise_level')})")
    add_output_options(output, out)
    add_model_options(model, stages=stages)
    lora = "a LoRA: a file, a folder or a Hub id; may be given several times"
    model.add_argument("--lora", action="append", default=[], metavar="FILE_OR_HUB_ID", help=lora)
    scale = "how strong it is, for all of --lora or given once for each (default: 1)"
    model.add_argument("--lora-scale", action="append", type=number, metavar="SCALE", help=scale)
    add_device_options(device, float16=True)
    options.set_defaults(batch_size=1)
    if batched:
        device.add_argument("--batch-size", type=positive, default=8, help="images at a time (default: 8)")
    device.add_argument("--compile", action="store_true", help="torch.compile the UNets: for GPUs, and many images")
    add_low_memory_option(device)


def open_cascade(args: Namespace, out: Path | None = None) -> Cascade:
    """The cascade of the options, whose prompts, sizes and files are checked; `args.visited`: see `pick_timesteps`.

    out: the first file that is written, where it is not --out
    """
    if args.stages == 1 and num_processes() > 1:
        raise ValueError("this figure is drawn by one process: run it without torchrun")
    if args.upscaler == "":
        raise ValueError("--upscaler is empty: name a stage-2 model, or none")
    if args.eta and args.sampler == "ddpm":
        raise ValueError("--eta is of ddim and dpm++: ddpm has the variance that its model learned")
    if args.lora_scale and not args.lora:
        raise ValueError("--lora-scale is of --lora: give that, too")
    scales = args.lora_scale or [1.0]
    check_not_overwritten(args)
    upscaler = UPSCALER if args.upscaler is None and args.model == MODEL else args.upscaler
    check_writable(out or args.out, ".png")
    args.visited = pick_timesteps(args)
    device, dtype = pick(args, float16=True)
    return Cascade(
        args.model,
        upscaler=upscaler,
        revision=args.revision,
        upscaler_revision=args.upscaler_revision,
        embeds=args.embeds,
        size=args.size,
        dtype=dtype,
        device=device,
        compiled=args.compile,
        lora=args.lora,
        lora_scale=scales[0] if len(scales) == 1 else scales,
        low_memory=args.low_memory,
    )


def draw(cascade: Cascade, jobs: Sequence[Job], args: Namespace) -> list[Tensor]:
    """The images of every job; under torchrun every process draws its share of the batches, and the first goes on."""
    batches = [batch for job in jobs for batch in job.batches(args.batch_size)]
    mine = share(batches, f"batches of up to {args.batch_size} images: make them smaller with --batch-size")
    drawn = cascade.draw_all(mine, **settings_of(args), progress=rank() == 0)
    images = torch.cat(gathered(drawn, [(len(batch.seeds), 3, *cascade.sizes[-1]) for batch in batches]))
    if rank() > 0:
        sys.exit(0)
    return list(images.split([len(job.seeds) for job in jobs]))


def settings_of(args: Namespace) -> dict:
    """What `Cascade.draw` and `draw_all` take of the options; timesteps are the job's own."""
    return {
        "sampler": args.sampler,
        "eta": args.eta,
        "guidance_scale": args.guidance,
        "guidance_interval": tuple(args.guidance_interval or ALWAYS),
        "negative_prompt": args.null_prompt,
        "upscaler_steps": args.upscaler_steps,
        "upscaler_guidance_scale": args.upscaler_guidance,
        "noise_level": args.noise_level,
        "batch_size": args.batch_size,
    }


def prompts_of(args: Namespace, cascade: Cascade, default: Sequence[str]) -> list[str]:
    """Those of --prompt, or all of --embeds, or the script's own. Raises ValueError when there are none."""
    own = [prompt for prompt in cascade.prompts.embeds if prompt not in ("", normalised(args.null_prompt))]
    prompts = args.prompt or (own if args.embeds else list(default))
    if not prompts:
        raise ValueError("there is nothing to draw: give --prompt, or --embeds with some prompts in it")
    return prompts


def from_index(timesteps: Sequence[int], i_start: int) -> list[int]:
    """The timesteps from an index on. Raises ValueError when there is no such index."""
    if not 0 <= i_start < len(timesteps):
        raise ValueError(f"--i-start must be from 0 to {len(timesteps) - 1}, not {i_start}")
    return timesteps[i_start:]


def pick_timesteps(args: Namespace) -> list[int] | None:
    """Which timesteps --steps or --stride visit, noisiest first; None where the number of steps is left to the model.

    IF's own spacing unless the sampler has another, see `spaced_timesteps`.
    """
    stride = args.stride or (args.default_stride if args.steps is None else None)
    if stride is not None:
        return strided_timesteps(SCHEDULE.num_timesteps, stride)
    if args.steps is None:
        return None
    if isinstance(args.steps, str):
        return named_timesteps(args.steps)
    return spaced_timesteps(args.sampler, args.steps, args.eta)
