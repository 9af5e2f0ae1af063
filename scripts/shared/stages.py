"""What the scripts that run DeepFloyd IF share: their options, loading a stage, and drawing with both."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ddpm.sampling import ALWAYS, Callback, Estimate, Noise, Step, noise_source, sample
from ddpm.schedule import NAMED_SECTIONS, leading_timesteps, named_timesteps, strided_timesteps
from ifmodel.cascade import (
    SAMPLERS,
    SCHEDULE,
    SETTINGS,
    SMALL_SETTINGS,
    check_finite,
    find_stage,
    find_variant,
    finite,
    load_stage,
    noised_upscaled,
    spaced_timesteps,
    stage_1,
    stage_2,
    watch,
)
from ifmodel.text import embed_prompts, load_embeds, normalised
from ifmodel.weights import check_memory
from shared.options import (
    SEED,
    add_device_options,
    check_writable,
    number,
    pick_device,
    pick_dtype,
    positive,
    seed_number,
)

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


def add_cascade_options(options: ArgumentParser, out: str, *, stride: int | None = None, guidance: float | None = None):
    """The options of every script that runs IF.

    stride: visit every stride-th timestep unless --steps is given
    guidance: the default of --guidance, the model's when None
    """

    def by_model(name: str) -> str:
        return f"default: {SETTINGS[name]:g}; {SMALL_SETTINGS[name]:g} for models below 64 px, such as tiny-if"

    stage_1 = f"a stage-1 model: a folder, a Hub id, or {MODEL}, which is shipped (default)"
    options.add_argument("--model", default=MODEL, type=model_name, metavar="FOLDER_OR_HUB_ID", help=stage_1)
    options.add_argument("--revision", help="branch, tag or commit of a Hub model")
    options.add_argument("--null-prompt", "--negative-prompt", default="", metavar="TEXT", help='default: ""')
    options.add_argument("--embeds", type=Path, metavar="FILE", help="prompts with their embeddings; spares T5")
    visited = options.add_mutually_exclusive_group()
    default = "default: 100" if stride is None else "instead of --stride"
    visited.add_argument("--steps", type=steps_or_name, help=f"a number, or smart50 and its like ({default})")
    default = "instead of --steps" if stride is None else f"default: {stride}"
    visited.add_argument("--stride", type=positive, help=f"visit every so many timesteps ({default})")
    options.set_defaults(default_stride=stride)
    options.add_argument("--sampler", choices=SAMPLERS, default="ddpm", help="default: ddpm")
    options.add_argument("--eta", type=number, default=0.0, help="noise of ddim and dpm++, 0 to 1 (default: 0)")
    told = by_model("guidance") if guidance is None else f"default: {guidance:g}"
    options.add_argument("--guidance", type=number, default=guidance, help=f"γ ({told})")
    options.add_argument(
        "--guidance-interval",
        type=int,
        nargs=2,
        metavar=("FIRST", "LAST"),
        help="guided t (default: all)",
    )
    options.add_argument("--size", type=positive, nargs=2, metavar=("H", "W"), help="of stage 1 (default: the model's)")
    stage_2 = f"a stage-2 model, or none (default: {UPSCALER} with {MODEL}, none with others)"
    options.add_argument("--upscaler", metavar="FOLDER_OR_HUB_ID", help=stage_2)
    options.add_argument("--upscaler-revision", help="branch, tag or commit of a Hub model")
    options.add_argument("--upscaler-steps", type=positive, help=by_model("upscaler_steps"))
    options.add_argument("--upscaler-guidance", type=number, help=by_model("upscaler_guidance"))
    options.add_argument("--noise-level", type=int, help=f"0 to 999 ({by_model('noise_level')})")
    options.add_argument("--compile", action="store_true", help="torch.compile the UNets: for GPUs, and many pictures")
    options.add_argument("--batch-size", type=positive, default=8, help="pictures at a time (default: 8)")
    options.add_argument("--seed", type=seed_number, default=SEED, help=f"default: {SEED}")
    options.add_argument("--out", type=Path, default=Path(out), metavar="FILE.png", help=f"default: {out}")
    add_device_options(options, ("float32", "bfloat16", "float16"))


@dataclass(frozen=True)
class Cell:
    """Pictures of a figure that share everything but the seed.

    estimate_of(n, low_res): the estimate for n pictures, in stage 2 beside what it sees of the small ones, else None
    algorithm: takes estimate, timesteps, schedule, noise, step and callback by name, as `sample` does
    timesteps: those of stage 1, the options' when None
    num_steps: how many steps the algorithm takes, as many as there are timesteps when None
    upscale: the algorithm of stage 2
    """

    estimate_of: Callable[[int, Tensor | None], Estimate]
    seeds: Sequence[int]
    algorithm: Callable[..., Tensor] = sample
    timesteps: Sequence[int] | None = None
    num_steps: int | None = None
    upscale: Callable[..., Tensor] = sample


class Cascade:
    """Both stages as a script's options ask for them: checked, then T5 and one stage after the other, as needed."""

    def __init__(self, args: Namespace, prompts: Sequence[str] | None, single_stage: bool = False):
        """Refuses what can be refused before anything is computed. prompts: those of --embeds when None."""
        if single_stage and args.upscaler not in (None, "none"):
            raise ValueError("this figure is of stage 1 alone: leave --upscaler out")
        self.embeds = load_embeds(args.embeds) if args.embeds else {}  # first, since the next line may download
        found = find_stage(args.model, 1, args.revision)
        resolve_defaults(args, found.config.sample_size, single_stage)
        self.args, self.unet, self.stage = args, None, None
        self.device = pick_device(args.device)
        self.dtype = pick_dtype(args.dtype, self.device)
        check_writable(args.out, ".png")
        if not 0 <= args.noise_level < SCHEDULE.num_timesteps:
            raise ValueError(f"--noise-level must be from 0 to 999, not {args.noise_level}")
        if args.guidance_interval and args.guidance_interval[0] > args.guidance_interval[1]:
            first, last = args.guidance_interval
            raise ValueError(f"--guidance-interval begins at the smaller t: {last} {first}, not {first} {last}")
        if not 0 <= args.eta <= 1:
            raise ValueError(f"--eta must be from 0 to 1, not {args.eta:g}")
        self.timesteps = pick_timesteps(args)
        leading_timesteps(SCHEDULE.num_timesteps, args.upscaler_steps)
        self.stages = [found]
        self.size = tuple(args.size or [found.config.sample_size] * 2)
        self.final_size = self.size
        if args.upscaler:
            self.stages.append(find_stage(args.upscaler, 2, args.upscaler_revision))
            factor = self.stages[1].config.sample_size / found.config.sample_size
            self.final_size = tuple(round(side * factor) for side in self.size)
        self.check_sizes(1)
        self.check_embeds()
        self.prompts = list(
            prompts or [prompt for prompt in self.embeds if prompt not in ("", normalised(args.null_prompt))]
        )
        if not self.prompts:
            raise ValueError("there is nothing to draw: give --prompt, or --embeds with some prompts in it")
        self.check_known()
        self.variants = [find_variant(stage, self.dtype) for stage in self.stages]  # last, since it may download them

    def from_index(self, i_start: int) -> list[int]:
        """The timesteps from an index on. Raises ValueError when there is no such index."""
        if not 0 <= i_start < len(self.timesteps):
            raise ValueError(f"--i-start must be from 0 to {len(self.timesteps) - 1}, not {i_start}")
        return self.timesteps[i_start:]

    @property
    def step(self) -> Step:
        return self.stages[self.stage - 1].step(self.args.sampler, self.args.eta)

    def check_size(self, stage: int, batch_size: int):
        """Refuse a height or width that a stage cannot halve often enough, or that the memory cannot hold."""
        config, (h, w) = self.stages[stage - 1].config, (self.size, self.final_size)[stage - 1]
        multiple = config.size_multiple
        if h % multiple or w % multiple:
            raise ValueError(f"height and width must be multiples of {multiple}, not {h} × {w}")
        needed = config.activation_bytes(2 * batch_size, h, w, self.dtype.itemsize)  # guidance doubles the batch
        pictures = "a picture" if batch_size == 1 else f"a batch of {batch_size} pictures"
        check_memory(needed, f"{pictures} of {h} × {w}", self.device)

    def check_sizes(self, batch_size: int):
        """Both stages', before anything is computed."""
        for stage in range(1, len(self.stages) + 1):
            self.check_size(stage, batch_size)

    def check_embeds(self):
        """Refuse embeddings that one of the stages cannot take."""
        for stage in self.stages:
            for width in {tensor.shape[-1] for tensor in self.embeds.values()} - {stage.config.encoder_hid_dim}:
                wanted = f"{stage.source} takes those that are {stage.config.encoder_hid_dim} wide"
                raise ValueError(f"embeddings are {width} wide, of another text encoder: {wanted}")

    def check_known(self):
        """With --embeds, refuse prompts that are not in it and that no T5 is at hand for, before any download."""
        known = [*self.embeds]
        missing = [prompt for prompt in [*self.prompts, self.args.null_prompt] if normalised(prompt) not in known]
        if known and missing and Path(self.args.model).is_dir() and not (Path(self.args.model) / "tokenizer").is_dir():
            there = f"it has {', '.join(map(repr, known[:5]))}{', …' if len(known) > 5 else ''}"
            raise ValueError(f"{self.args.embeds} has no {missing[0]!r}, and {self.args.model} no T5: {there}")

    def load(self, stage: int, batch_size: int):
        """Stage 1 or 2 as `unet`, the other one freed; refuses what the memory cannot hold."""
        self.embed()
        if self.stage != stage:
            self.unet = None  # before the next one is loaded
            found, variant = self.stages[stage - 1], self.variants[stage - 1]
            self.unet, self.stage = load_stage(found, variant, self.dtype, self.device, self.args.compile), stage
        self.check_size(stage, batch_size)  # again, beside the weights

    def embed(self):
        """Embed the prompts that are not known yet; T5 is freed again before a UNet is loaded."""
        unknown = [prompt for prompt in [*self.prompts, self.args.null_prompt] if normalised(prompt) not in self.embeds]
        if unknown:
            t5 = {"dtype": self.dtype, "device": self.device, "revision": self.args.revision}
            found = embed_prompts(self.args.model, unknown, **t5)
            self.embeds |= {normalised(prompt): tensor for prompt, tensor in found.items()}
            self.check_embeds()

    def embedded(self, prompt: str, n: int = 1) -> Tensor:
        """A prompt's embeddings, n times: [n, 77, D_text] on the device."""
        return self.embeds[normalised(prompt)].to(self.device, torch.float32).expand(n, -1, -1)

    def estimate(
        self, prompt: str, n: int = 1, low_res: Tensor | None = None, guidance: float | None = None
    ) -> Estimate:
        """The guided estimate of a prompt for n pictures, of the stage that is loaded."""
        args, text, null = self.args, self.embedded(prompt, n), self.embedded(self.args.null_prompt)
        if self.stage == 1:
            scale = args.guidance if guidance is None else guidance
            estimate = stage_1(self.unet, text, null, scale, tuple(args.guidance_interval or ALWAYS))
        else:
            estimate = stage_2(self.unet, low_res, text, null, args.upscaler_guidance, args.noise_level)
        return finite(estimate, f"stage {self.stage}")

    def plain(self, prompt: str, guidance: float | None = None) -> Callable[[int, Tensor | None], Estimate]:
        """The `estimate_of` of a cell that draws one prompt."""
        return lambda n, low_res: self.estimate(prompt, n, low_res, guidance)

    def noise(self, seeds: Sequence[int]) -> Noise:
        """`noise_source` for pictures of stage 1."""
        return noise_source(seeds, (3, *self.size), self.device)

    def draw(self, cells: Sequence[Cell]) -> list[Tensor]:
        """Pictures [len(seeds), 3, H, W] in [-1, 1] of every cell, on the CPU, through stage 2 if there is one."""
        size = self.args.batch_size
        batches = [
            (cell, cell.seeds[start : start + size]) for cell in cells for start in range(0, len(cell.seeds), size)
        ]
        largest = max(len(seeds) for _, seeds in batches)
        self.check_sizes(largest)
        self.load(1, largest)
        counts = [cell.num_steps or len(cell.timesteps or self.timesteps) for cell, _ in batches]
        with watch(self.unet, sum(counts), "stage 1") as callback:
            pictures = [
                self._run(
                    cell.algorithm,
                    cell.estimate_of(len(seeds), None),
                    cell.timesteps or self.timesteps,
                    self.noise(seeds),
                    callback,
                )
                for cell, seeds in batches
            ]
        if self.args.upscaler:
            self.load(2, largest)
            with watch(self.unet, self.args.upscaler_steps * len(batches), "stage 2") as callback:
                pictures = [
                    self._upscale(cell, small, seeds, callback)
                    for small, (cell, seeds) in zip(pictures, batches, strict=True)
                ]
        return list(torch.cat(pictures).cpu().split([len(cell.seeds) for cell in cells]))

    def _run(self, algorithm, estimate: Estimate, timesteps: Sequence[int], noise: Noise, callback: Callback) -> Tensor:
        options = {"schedule": SCHEDULE, "noise": noise, "step": self.step, "callback": callback}
        picture = algorithm(estimate=estimate, timesteps=timesteps, **options)
        check_finite(f"stage {self.stage}, the picture", picture)
        return picture

    def _upscale(self, cell: Cell, small: Tensor, seeds: Sequence[int], callback: Callback) -> Tensor:
        noise = noise_source(seeds, (3, *self.final_size), self.device)
        x_T = [noise()]  # drawn before the noise of low_res, as IF does
        low_res = noised_upscaled(small, self.final_size, self.args.noise_level, noise)
        estimate = cell.estimate_of(len(seeds), low_res)
        timesteps = leading_timesteps(SCHEDULE.num_timesteps, self.args.upscaler_steps)
        return self._run(cell.upscale, estimate, timesteps, lambda: x_T.pop() if x_T else noise(), callback)


def resolve_defaults(args: Namespace, sample_size: int, single_stage: bool):
    """Fill in the options whose defaults depend on the model, or on the pixels that it draws."""
    args.upscaler = UPSCALER if args.upscaler == "tiny-if" else args.upscaler
    if args.upscaler == "none" or single_stage:
        args.upscaler = None
    elif args.upscaler is None and args.model == MODEL:
        args.upscaler = UPSCALER
    for name, value in (SETTINGS if sample_size >= 64 else SMALL_SETTINGS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def pick_timesteps(args: Namespace) -> list[int]:
    """Which timesteps --steps or --stride visit, noisiest first.

    IF's own spacing unless the sampler has another, see `spaced_timesteps`.
    """
    stride = args.stride or (args.default_stride if args.steps is None else None)
    if stride is not None:
        return strided_timesteps(SCHEDULE.num_timesteps, stride)
    steps = 100 if args.steps is None else args.steps
    if isinstance(steps, str):
        return named_timesteps(steps)
    return spaced_timesteps(args.sampler, args.eta, steps)
