"""How fast IF is here and in diffusers, on the same work: weights, inputs, dtype and threads are the same.

    python scripts/bench/unet.py --geometry tiny
    python scripts/bench/unet.py --geometry IF-I-M --rounds 5
    python scripts/bench/unet.py --geometry IF-I-XL --device cuda --dtype float16

The sides take turns in this process, and their outputs are compared before anything is timed. "documented" is
diffusers as its documentation runs it (float32 on the CPU, --dtype on a GPU), "tuned" is diffusers with our dtype and
memory format, "compiled" (with --compile) is that with torch.compile. Timed: a step of the UNet, with the two halves
of guidance, and its convolutions and linear layers alone; the prompt's part, once; a whole sample of 20 steps; loading
from a folder, beside a copy of its file; and with --cold processes of their own, from nothing to a PNG, with their peak
memory. Each time is also given as a multiple of the floor: the step's FLOPs, as torch counts them, at the rate of a
2048 × 2048 matrix product, or the weights' bytes at the rate at which a copy reads and writes, whichever is longer.
Published geometries have random weights. Without diffusers, ours is timed alone. Prints a table and writes it to --out
as JSON; --growth draws, beside it, what time and memory an image takes as there are more of them, more steps and more
pixels, and for tiny what 1 to 1,000 prompts take of one and of two processes.
"""

import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))  # where shared/ is
from shared.costs import draw_growth, floor_of, growth, layers_of, memory_of
from shared.options import SEED, Size, add_device_options, check_writable, parser, pick, positive, run
from shared.timing import SCRIPTS, compare, run_measured, short, where

import torch

from ddpm.tools.files import write_json
from ddpm.tools.memory import check_memory
from ddpm.tools.timing import in_turns
from ifmodel import UNet, load_unet
from ifmodel.config import PUBLISHED, published_config
from ifmodel.costs import save_random
from ifmodel.embeds import load_embeds, save_embeds
from ifmodel.stage import generate, upscale
from ifmodel.weights import SHIPPED

try:
    import diffusers
except ImportError:
    diffusers = None

NUM_STEPS, GUIDANCE_SCALE = 20, 4.0
TINY = {"tiny": "tiny-if/I", "tiny-II": "tiny-if/II"}


def arguments() -> Namespace:
    options = parser(__doc__)
    options.add_argument("--geometry", choices=[*TINY, *PUBLISHED], default="tiny", help="default: tiny")
    options.add_argument("--rounds", type=positive, default=10, help="turns of each side (default: 10)")
    options.add_argument("--size", type=positive, action=Size, help="default: the model's")
    options.add_argument("--batch-size", type=positive, default=1, help="images at a time (default: 1)")
    options.add_argument("--compile", action="store_true", help="also both sides with torch.compile")
    options.add_argument("--cold", action="store_true", help="also whole processes, and their peak memory (stage 1)")
    options.add_argument("--growth", action="store_true", help="also ours with more images, steps and pixels")
    options.add_argument("--out", type=Path, default=Path("out/bench_if.json"), help="default: out/bench_if.json")
    add_device_options(options, float16=True)
    args = options.parse_args()
    check_writable(args.out, ".json")
    return args


def main():
    args = arguments()
    device, dtype = pick(args, float16=True)
    torch.manual_seed(SEED)
    work = Work(args, device, dtype)
    report = {"geometry": args.geometry, "device": where(device), "dtype": short(dtype), "torch": torch.__version__}
    h, w = work.size
    print(f"{args.geometry}, {args.batch_size} × 2 images of {h} × {w}, {short(dtype)}, {report['device']}")
    if diffusers is None:
        print("diffusers is not installed: ours alone")

    sides = sides_of(work)
    report["agreement"] = agreement(sides, dtype)
    report["floor"] = floor_of(work)
    floor, few = report["floor"]["seconds"], max(1, args.rounds // 3)
    report["layers"] = layers_of(work, args.rounds, floor)
    steps, samples = ({name: side[k] for name, side in sides.items()} for k in range(2))
    report["step"] = compare("a step of the UNet", steps, args.rounds, device, floor)
    encode = {"ours": lambda: work.ours.encode_text(work.embeds)}
    report["text"] = compare("the UNet's part of the prompt, once an image", encode, few, device)
    report["sample"] = compare(f"a sample of {NUM_STEPS} steps", samples, few, device, NUM_STEPS * floor)
    report["load"] = compare("loading from a folder", load_sides(work), few, device)
    if args.cold and work.noise_level is None:
        report["cold"] = cold_starts(work, few)
    if args.growth:
        report["growth"] = growth(work, args.rounds)
        draw_growth(args.out.with_suffix(".png"), report["growth"])
    if device.type == "cuda":
        report["peak_memory"] = memory_of(work)
    write_json(args.out, report)
    print(args.out)


class Work:
    """The same weights for both sides, and the inputs of a step and of a sample."""

    def __init__(self, args: Namespace, device: torch.device, dtype: torch.dtype):
        self.args, self.device, self.dtype = args, device, dtype
        self.folder = tempfile.TemporaryDirectory()
        if args.geometry in TINY:
            self.root = SHIPPED[TINY[args.geometry]]
        else:
            self.root = Path(self.folder.name)
            save_random(self.root, published_config(args.geometry), dtype, device)
        self.ours = self.load(pack=True)
        config, batch, generator = self.ours.config, args.batch_size, torch.Generator().manual_seed(SEED)
        self.size = tuple(args.size or [config.sample_size] * 2)
        what = f"a step of {batch} × 2 images of {' × '.join(map(str, self.size))}"
        check_memory(config.activation_bytes(2 * batch, *self.size, dtype.itemsize), what, device)
        self.noise_level = 50 if config.class_embed_type else None
        self.x_t = torch.randn((2 * batch, config.in_channels, *self.size), generator=generator).to(device)
        embeds = torch.randn((2 * batch, 77, config.encoder_hid_dim), generator=generator)
        self.embeds = embeds.to(device, dtype)
        self.prompt, self.null = (half.float() for half in self.embeds.chunk(2))
        self.seeds = list(range(SEED, SEED + batch))
        self.small = self.x_t[:batch, :3, ::4, ::4].clamp(-1, 1)  # stage 2's image to enlarge

    def load(self, pack: bool = False) -> UNet:
        return load_unet(self.root, self.dtype, self.device, pack=pack)

    def step(self, unet: Callable) -> Callable:
        """A step of our UNet, with the two halves of guidance."""
        text = self.ours.encode_text(self.embeds)
        return lambda: unet(self.x_t, 500, text, self.noise_level)

    def save_embeds(self) -> Path:
        """A file for --embeds, in which a prompt is called "something"."""
        path = Path(self.folder.name) / "embeds.safetensors"
        save_embeds(path, {"something": self.embeds[0], "": self.embeds[-1]})
        return path

    def theirs(self, dtype: torch.dtype, memory_format=torch.contiguous_format):
        """diffusers' UNet with the same weights."""
        unet = diffusers.UNet2DConditionModel.from_pretrained(self.root, subfolder="unet", torch_dtype=dtype)
        return unet.to(self.device).to(memory_format=memory_format).requires_grad_(False)


def sides_of(work: Work) -> dict[str, tuple[Callable, Callable]]:
    """A step and a sample of each side."""
    sides = {"ours": our_side(work, work.ours)}
    if work.args.compile:
        sides["ours, compiled"] = our_side(work, torch.compile(work.load()))
        if work.device.type == "cuda":
            sides["ours, CUDA graphs"] = our_side(work, torch.compile(work.load(), mode="reduce-overhead"))
    if diffusers is not None:
        documented = torch.float32 if work.device.type == "cpu" else work.dtype
        tuned = partial(work.theirs, work.dtype, torch.channels_last)
        sides["diffusers, documented"] = their_side(work, work.theirs(documented))
        sides["diffusers, tuned"] = their_side(work, tuned())
        if work.args.compile:
            sides["diffusers, compiled"] = their_side(work, torch.compile(tuned()))
    return sides


def our_side(work: Work, unet: Callable) -> tuple[Callable, Callable]:
    """A step of our UNet, and --batch-size images from noise, for which the text's keys and values are computed."""
    options = {"seeds": work.seeds, "num_steps": NUM_STEPS, "size": work.size, "guidance_scale": GUIDANCE_SCALE}
    if work.noise_level is None:
        draw = partial(generate, unet, work.prompt, work.null, **options)
    else:
        draw = partial(upscale, unet, work.small, work.prompt, work.null, noise_level=work.noise_level, **options)
    return work.step(unet), draw


def their_side(work: Work, unet: Callable) -> tuple[Callable, Callable]:
    """The same with diffusers' UNet, and its pipeline."""
    x_t, embeds, level = work.x_t.to(unet.dtype), work.embeds.to(unet.dtype), work.noise_level
    labels = None if level is None else torch.full((len(x_t),), level, device=work.device)
    options = {"prompt_embeds": work.prompt.to(unet.dtype), "negative_prompt_embeds": work.null.to(unet.dtype)}
    options |= {"num_inference_steps": NUM_STEPS, "height": work.size[0], "width": work.size[1]}
    options |= {"guidance_scale": GUIDANCE_SCALE, "output_type": "pt"}
    if level is not None:
        options |= {"image": work.small.to(unet.dtype), "noise_level": level}
    pipeline = their_pipeline(unet)

    def draw():
        return pipeline(**options, generator=[torch.Generator().manual_seed(seed) for seed in work.seeds])

    return lambda: unet(x_t, 500, embeds, class_labels=labels, return_dict=False)[0], draw


def their_pipeline(unet):
    """diffusers' pipeline of either stage around a UNet, with IF's schedulers and without a text encoder."""
    parts = dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker"))
    parts |= {"unet": unet, "requires_safety_checker": False}
    cosine = partial(diffusers.DDPMScheduler, beta_schedule="squaredcos_cap_v2")
    learned = partial(cosine, variance_type="learned_range", thresholding=True)
    if unet.config.class_embed_type is None:
        pipeline = diffusers.IFPipeline(scheduler=learned(sample_max_value=1.5), **parts)
    else:
        schedulers = {"scheduler": learned(sample_max_value=1.0), "image_noising_scheduler": cosine()}
        pipeline = diffusers.IFSuperResolutionPipeline(**schedulers, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def agreement(sides: dict[str, tuple[Callable, Callable]], dtype: torch.dtype) -> dict[str, float]:
    """How far our step is from diffusers' in the same dtype, relative to its size. Raises ValueError if far."""
    if diffusers is None:
        return {}
    ours, theirs = (sides[name][0]().float() for name in ("ours", "diffusers, tuned"))
    error = ((ours - theirs).norm() / theirs.norm()).item()
    print(f"outputs differ by {error:.1e} of their size")
    if not error < (1e-4 if dtype == torch.float32 else 5e-2):
        raise ValueError(f"the two sides do not compute the same: they differ by {error:.2g} of the output's size")
    return {"relative_error": error}


def load_sides(work: Work) -> dict[str, Callable]:
    """From the folder to a model on the device that has touched all its weights."""

    def touched(load: Callable) -> Callable:
        return lambda: sum(float(weights.flatten()[::1024].float().sum()) for weights in load().parameters())

    def copy():
        for path in sorted((work.root / "unet").glob("*.safetensors")):
            path.read_bytes()

    sides = {"ours": touched(partial(work.load, pack=True)), "a copy of the file": copy}
    return sides if diffusers is None else sides | {"diffusers, same dtype": touched(partial(work.theirs, work.dtype))}


def cold_starts(work: Work, rounds: int) -> dict[str, dict[str, float]]:
    """Processes that start from nothing, load, draw one image and write it: seconds and peak memory of each side."""
    embeds, out = work.save_embeds(), Path(work.folder.name) / "image.png"
    ours = ["--model", work.root, "--upscaler", "none", "--embeds", embeds, "--out", out, "--prompt", "something"]
    ours += ["--steps", NUM_STEPS, "--dtype", short(work.dtype), "--device", work.device]
    sides = {"ours": [SCRIPTS / "generate.py", *ours]}
    if diffusers is not None:
        sides["diffusers, documented"] = [Path(__file__), "--their-image", work.root, embeds, out, work.device]
    memory = {name: [] for name in sides}

    def start(name: str):
        memory[name].append(run_measured(*sides[name])[1])

    times = in_turns({name: partial(start, name) for name in sides}, rounds, work.device)
    print(f"a process from its start to the PNG, {NUM_STEPS} steps, {rounds} rounds")
    rows = {name: {"seconds": median(times[name]), "peak_bytes": median(memory[name])} for name in sides}
    for name, row in rows.items():
        print(f"  {name:22} {row['seconds']:6.1f} s, {row['peak_bytes'] / 1e9:.2f} GB at most")
    return rows


def draw_their_image(root: str, embeds: str, out: str, device: str):
    """What diffusers' documentation does, but for the text encoder."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    unet = diffusers.UNet2DConditionModel.from_pretrained(root, subfolder="unet", torch_dtype=dtype).to(device)
    prompt, null = (load_embeds(embeds)[name][None].to(dtype) for name in ("something", ""))
    options = {"num_inference_steps": NUM_STEPS, "guidance_scale": GUIDANCE_SCALE}
    their_pipeline(unet)(prompt_embeds=prompt, negative_prompt_embeds=null, **options).images[0].save(out)


if __name__ == "__main__":
    run(main if "--their-image" not in sys.argv else lambda: draw_their_image(*sys.argv[2:]))
