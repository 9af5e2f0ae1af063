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
as JSON; --growth draws what a picture costs as there are more of them, more steps and more pixels, beside it.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # where shared/ is
from ddpm.files import write_atomically
from ifmodel import UNet, UNetConfig, load_unet
from ifmodel.config import PUBLISHED, published_config
from ifmodel.cpu import PackedConv2d
from ifmodel.stage import generate, upscale
from ifmodel.text import load_embeds, save_embeds
from ifmodel.weights import SHIPPED
from shared.figures import save_figure
from shared.options import SEED, add_device_options, check_writable, parser, pick_device, pick_dtype, positive, run

try:
    import diffusers
except ImportError:
    diffusers = None

NUM_STEPS = 20
TINY = {"tiny": "tiny-if/I", "tiny-II": "tiny-if/II"}


def main():
    options = parser(__doc__)
    options.add_argument("--geometry", choices=[*TINY, *PUBLISHED], default="tiny", help="default: tiny")
    options.add_argument("--rounds", type=positive, default=10, help="turns of each side (default: 10)")
    options.add_argument("--size", type=positive, nargs=2, metavar=("H", "W"), help="default: the model's")
    options.add_argument("--batch-size", type=positive, default=1, help="pictures at a time (default: 1)")
    options.add_argument("--compile", action="store_true", help="also both sides with torch.compile")
    options.add_argument("--no-pack", action="store_true", help="also ours without ifmodel.cpu")
    options.add_argument("--cold", action="store_true", help="also whole processes, and their peak memory (stage 1)")
    options.add_argument("--growth", action="store_true", help="also ours with more pictures, steps and pixels")
    options.add_argument("--out", type=Path, default=Path("out/bench_if.json"), help="default: out/bench_if.json")
    add_device_options(options, ("float32", "bfloat16", "float16"))
    args = options.parse_args()
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device, float16=True)
    check_writable(args.out, ".json")
    torch.manual_seed(SEED)
    work = Work(args, device, dtype)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    report = {"geometry": args.geometry, "device": where, "dtype": short(dtype), "torch": torch.__version__}
    print(
        f"{args.geometry}, {args.batch_size} × 2 pictures of {work.size[0]} × {work.size[1]}, {short(dtype)}, {where}"
    )
    if diffusers is None:
        print("diffusers is not installed: ours alone")

    report["agreement"] = agreement(work)
    floor = report["floor"] = floor_of(work)
    told = f"{floor['gflop']:.1f} GFLOP at {floor['gflops']:.0f} GFLOP/s, {floor['gigabytes']:.3f} GB of weights"
    print(f"floor of a step: {1000 * floor['seconds']:.1f} ms ({told} at {floor['gigabytes_per_s']:.1f} GB/s)")
    report["layers"] = layers_alone(work, args.rounds, floor["seconds"])
    report["step"] = compare("a step of the UNet", step_sides(work), args.rounds, device, floor["seconds"])
    few, seconds = max(1, args.rounds // 3), NUM_STEPS * floor["seconds"]
    once = {"ours": lambda: work.ours.encode_text(work.embeds)}
    report["text"] = compare("the UNet's part of the prompt, once a picture", once, few, device)
    report["sample"] = compare(f"a sample of {NUM_STEPS} steps", sample_sides(work), few, device, seconds)
    report["load"] = compare("loading from a folder", load_sides(work), few, device)
    if args.cold and work.noise_level is None:
        report["cold"] = cold_starts(work, few)
    if args.growth:
        report["growth"] = growth(work, args.rounds)
        draw_growth(args.out.with_suffix(".png"), report["growth"], work)
    if device.type == "cuda":
        report["peak_memory"] = peak_memory(work)
    write_atomically(args.out, json.dumps(report, indent=2).encode())
    print(args.out)


class Work:
    """The same weights for both sides, and the inputs of a step."""

    def __init__(self, args: Namespace, device: torch.device, dtype: torch.dtype):
        self.args, self.device, self.dtype = args, device, dtype
        tiny = args.geometry in TINY
        self.folder = tempfile.TemporaryDirectory()
        root = SHIPPED[TINY[args.geometry]] if tiny else Path(self.folder.name)
        if not tiny:
            save_random(root, published_config(args.geometry), dtype)
        self.root = root
        self.config_dict = json.loads((root / "unet" / "config.json").read_text())
        self.ours = load_unet(root, dtype, device, pack=True)
        self.weights = load_unet(root, dtype, device).state_dict()
        self.config = self.ours.config
        self.size = tuple(args.size or [self.config.sample_size] * 2)
        generator = torch.Generator().manual_seed(SEED)
        shape, text_shape = (2 * args.batch_size, self.config.in_channels, *self.size), (2 * args.batch_size, 77)
        self.x_t = torch.randn(shape, generator=generator).to(device)
        self.embeds = torch.randn((*text_shape, self.config.encoder_hid_dim), generator=generator).to(device, dtype)
        self.noise_level = 50 if self.config.class_embed_type else None

    def theirs(self, dtype: torch.dtype, memory_format=torch.contiguous_format):
        """diffusers' UNet with the same weights."""
        unet = diffusers.UNet2DConditionModel.from_config(self.config_dict)
        unet.load_state_dict(self.weights)
        return unet.to(self.device, dtype).to(memory_format=memory_format).eval().requires_grad_(False)


def save_random(root: Path, config: dict, dtype: torch.dtype):
    """A folder with random weights for a config, in the layout of the Hub."""
    unet = UNet(UNetConfig.from_dict(config))
    (root / "unet").mkdir()
    (root / "unet" / "config.json").write_text(json.dumps(config))
    weights = {name: tensor.to(dtype) for name, tensor in unet.state_dict().items()}
    save_file(weights, root / "unet" / "diffusion_pytorch_model.safetensors")


def agreement(work: Work) -> dict[str, float]:
    """How far our output is from diffusers' in the same dtype, relative to its size. Raises ValueError if far."""
    if diffusers is None:
        return {}
    with torch.no_grad():
        ours = our_step(work)().float()
        theirs = their_step(work, work.theirs(work.dtype))().float()
    error = ((ours - theirs).norm() / theirs.norm()).item()
    print(f"outputs differ by {error:.1e} of their size")
    if not error < (1e-4 if work.dtype == torch.float32 else 5e-2):
        raise ValueError(f"the two sides do not compute the same: they differ by {error:.2g} of the output's size")
    return {"relative_error": error}


def our_step(work: Work, unet: Callable | None = None) -> Callable[[], Tensor]:
    text = work.ours.encode_text(work.embeds)
    unet = unet or work.ours
    return lambda: unet(work.x_t, 500, text, work.noise_level)


def their_step(work: Work, unet) -> Callable[[], Tensor]:
    x_t, embeds, level = work.x_t.to(unet.dtype), work.embeds.to(unet.dtype), work.noise_level
    labels = None if level is None else torch.full((len(x_t),), level, device=work.device)
    return lambda: unet(x_t, 500, embeds, class_labels=labels, return_dict=False)[0]


def step_sides(work: Work) -> dict[str, Callable]:
    sides = {"ours": our_step(work)}
    if diffusers is not None:
        documented = torch.float32 if work.device.type == "cpu" else work.dtype
        sides["diffusers, documented"] = their_step(work, work.theirs(documented))
        sides["diffusers, tuned"] = their_step(work, work.theirs(work.dtype, torch.channels_last))
    if work.args.no_pack:
        sides["ours, not packed"] = our_step(work, load_unet(work.root, work.dtype, work.device))
    if work.args.compile:
        sides["ours, compiled"] = our_step(work, torch.compile(load_unet(work.root, work.dtype, work.device)))
        if diffusers is not None:
            unet = work.theirs(work.dtype, torch.channels_last)
            sides["diffusers, compiled"] = their_step(work, torch.compile(unet))
    return sides


def sample_sides(work: Work) -> dict[str, Callable]:
    """--batch-size pictures from noise, prompts already embedded; text keys and values are part of our time."""
    embeds, null = (half.float() for half in work.embeds.chunk(2))
    seeds = list(range(SEED, SEED + work.args.batch_size))
    options = {"seeds": seeds, "num_steps": NUM_STEPS, "size": work.size, "guidance_scale": 4.0}
    small = work.x_t[: len(seeds), :3, ::4, ::4].clamp(-1, 1)  # stage 2's picture to enlarge
    if work.noise_level is None:
        sides = {"ours": lambda: generate(work.ours, embeds, null, **options)}
    else:
        sides = {"ours": lambda: upscale(work.ours, small, embeds, null, noise_level=work.noise_level, **options)}
    if diffusers is None:
        return sides

    def pipeline(unet) -> Callable:
        made = their_pipeline(unet)
        asked = {"prompt_embeds": embeds.to(unet.dtype), "negative_prompt_embeds": null.to(unet.dtype)}
        asked |= {"num_inference_steps": NUM_STEPS, "height": work.size[0], "width": work.size[1]}
        asked |= {"guidance_scale": 4.0, "output_type": "pt"}
        if work.noise_level is not None:
            asked |= {"image": small.to(unet.dtype), "noise_level": work.noise_level}
        return lambda: made(**asked, generator=[torch.Generator().manual_seed(seed) for seed in seeds])

    documented = torch.float32 if work.device.type == "cpu" else work.dtype
    sides["diffusers, documented"] = pipeline(work.theirs(documented))
    sides["diffusers, tuned"] = pipeline(work.theirs(work.dtype, torch.channels_last))
    return sides


def their_pipeline(unet):
    """diffusers' pipeline of either stage around a UNet, with IF's schedulers and without a text encoder."""
    parts = dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker"))
    parts |= {"unet": unet, "requires_safety_checker": False}
    cosine = {"beta_schedule": "squaredcos_cap_v2"}
    learned = {**cosine, "variance_type": "learned_range", "thresholding": True}
    if unet.config.class_embed_type is None:
        made = diffusers.IFPipeline(scheduler=diffusers.DDPMScheduler(**learned, sample_max_value=1.5), **parts)
    else:
        schedulers = {
            "scheduler": diffusers.DDPMScheduler(**learned, sample_max_value=1.0),
            "image_noising_scheduler": diffusers.DDPMScheduler(**cosine),
        }
        made = diffusers.IFSuperResolutionPipeline(**schedulers, **parts)
    made.set_progress_bar_config(disable=True)
    return made


def load_sides(work: Work) -> dict[str, Callable]:
    """From the folder to a model on the device that has touched all its weights."""

    def ours():
        unet = load_unet(work.root, work.dtype, work.device, pack=True)
        return sum(float(parameter.flatten()[::1024].float().sum()) for parameter in unet.parameters())

    def theirs():
        unet = diffusers.UNet2DConditionModel.from_pretrained(work.root, subfolder="unet", torch_dtype=work.dtype)
        unet = unet.to(work.device)
        return sum(float(parameter.detach().flatten()[::1024].float().sum()) for parameter in unet.parameters())

    def copy():
        for path in sorted((work.root / "unet").glob("*.safetensors")):
            path.read_bytes()

    return {"ours": ours, "a copy of the file": copy} | ({} if diffusers is None else {"diffusers, same dtype": theirs})


# Runs a script and then says how much memory this process had at most; rusage would count its parent's too.
MEASURED = """
import resource, runpy, sys
from pathlib import Path
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
status = Path("/proc/self/status")
lines = status.read_text().splitlines() if status.exists() else []
peak = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)
print(1024 * (peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
"""


def cold_starts(work: Work, rounds: int) -> dict[str, dict[str, float]]:
    """Processes that start from nothing, load, draw one picture and write it: seconds and peak memory of each side."""
    scripts, folder = Path(__file__).parents[1], Path(work.folder.name)
    embeds, out = folder / "embeds.safetensors", folder / "picture.png"
    save_embeds(embeds, {"something": work.embeds[0], "": work.embeds[-1]})
    ours = [scripts / "generate.py", "--model", work.root, "--upscaler", "none", "--embeds", embeds, "--out", out]
    ours += ["--prompt", "something", "--steps", NUM_STEPS, "--dtype", short(work.dtype), "--device", work.device]
    theirs = [__file__, "--their-picture", work.root, embeds, out, work.device]
    sides = {"ours": ours} if diffusers is None else {"ours": ours, "diffusers, documented": theirs}
    spent, environment = {name: [] for name in sides}, {**os.environ, "PYTHONPATH": str(scripts)}
    for _ in range(rounds):
        for name, command in sides.items():
            started = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", MEASURED, *map(str, command)], capture_output=True, text=True, env=environment
            )
            if done.returncode:
                raise ValueError(f"a process of {name} failed: {done.stderr[-200:]}")
            spent[name].append((time.perf_counter() - started, int(done.stdout.split()[-1])))
    rows = {}
    print(f"a process from its start to the PNG, {NUM_STEPS} steps, {rounds} rounds")
    for name, pairs in spent.items():
        seconds, memory = (median(values) for values in zip(*pairs, strict=True))
        rows[name] = {"seconds": seconds, "peak_bytes": memory}
        print(f"  {name:22} {seconds:6.1f} s, {memory / 1e9:.2f} GB at most")
    return rows


def draw_their_picture(root: str, embeds: str, out: str, device: str):
    """What diffusers' documentation does, but for the text encoder."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(
        root, subfolder="unet", torch_dtype=torch.float32 if device == "cpu" else torch.float16
    )
    prompts = {name: tensor[None].to(unet.dtype) for name, tensor in load_embeds(embeds).items()}
    asked = {"prompt_embeds": prompts["something"], "negative_prompt_embeds": prompts[""]}
    pictures = their_pipeline(unet.to(device))(**asked, num_inference_steps=NUM_STEPS, guidance_scale=4.0).images
    pictures[0].save(out)


def floor_of(work: Work) -> dict[str, float]:
    """The least time that a step could take on this machine, from what it reaches in the two simplest tasks."""
    plain = load_unet(work.root, work.dtype, work.device)  # the counter does not know packed ones
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        our_step(work, plain)()
    a, b = (torch.randn(2048, 2048, device=work.device, dtype=work.dtype) for _ in range(2))
    source = torch.randn(2**26, device=work.device)
    target = torch.empty_like(source)
    matmul = min(times_of({"matmul": lambda: a @ b}, 20, work.device)["matmul"])
    copy = min(times_of({"copy": lambda: target.copy_(source)}, 10, work.device)["copy"])
    flops, rate, bandwidth = counter.get_total_flops(), 2 * 2048**3 / matmul, 2 * source.nbytes / copy  # read, written
    size = sum(tensor.nbytes for tensor in work.weights.values())
    return {
        "gflop": flops / 1e9,
        "gflops": rate / 1e9,
        "gigabytes": size / 1e9,
        "gigabytes_per_s": bandwidth / 1e9,
        "seconds": max(flops / rate, size / bandwidth),
    }


@torch.no_grad()
def layers_alone(work: Work, rounds: int, floor: float) -> dict[str, float]:
    """Seconds of a step's convolutions and linear layers, one after another with nothing between them."""
    kinds = {"convolutions": (PackedConv2d, nn.Conv2d), "linear layers": (nn.Linear,)}
    calls = {name: [] for name in kinds}
    hooks = [
        module.register_forward_pre_hook(lambda layer, inputs, name=name: calls[name].append((layer, inputs[0])))
        for name, kind in kinds.items()
        for module in work.ours.modules()
        if isinstance(module, kind)
    ]
    our_step(work)()
    for hook in hooks:
        hook.remove()
    sides = {name: lambda name=name: [layer(x) for layer, x in calls[name]] for name in kinds}
    seconds = {name: median(times) for name, times in times_of(sides, rounds, work.device).items()}
    told = ", ".join(f"{name} {1000 * value:.1f} ms" for name, value in seconds.items())
    print(f"of a step, alone: {told}, together {sum(seconds.values()) / floor:.2f} × the floor")
    return seconds


@torch.no_grad()
def times_of(sides: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each side in each round, in turns; the first round warms up and does not count."""
    times = {name: [] for name in sides}
    for turn in tqdm(range(rounds + 1), desc="rounds", leave=False):
        for name, side in sides.items():
            synchronize(device)
            started = time.perf_counter()
            side()
            synchronize(device)
            if turn > 0:
                times[name].append(time.perf_counter() - started)
    return times


def synchronize(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare(what: str, sides: dict[str, Callable], rounds: int, device: torch.device, floor: float | None = None):
    """Print and return each side's median time and spread, how often it is ours, and how often the floor."""
    times = times_of(sides, rounds, device)
    print(f"{what}, {rounds} rounds")
    rows = {}
    for name, values in times.items():
        pairs = [other / own for other, own in zip(values, times["ours"], strict=True)]
        row = rows[name] = {"median": median(values), "min": min(values), "max": max(values)}
        row["times_ours"] = median(pairs)
        told = f"  {name:22} {1000 * row['median']:9.1f} ms ({1000 * row['min']:.1f} to {1000 * row['max']:.1f})"
        if floor is not None:
            row["times_floor"] = row["median"] / floor
            told += f", {row['times_floor']:.2f} × the floor"
        print(told + ("" if name == "ours" else f", {row['times_ours']:.2f} × ours"))
    gc.collect()
    return rows


@torch.no_grad()
def growth(work: Work, rounds: int) -> list[dict]:
    """Seconds of a step as pictures and pixels grow, and of a sample as its steps do."""
    rows, side, channels = [], work.size[0], work.config.in_channels
    cases = [(n, side) for n in (1, 2, 4, 8, 16)] + [(1, 2 * side), (1, 4 * side), (1, 8 * side)]
    for batch, size in cases:
        x_t = torch.randn(2 * batch, channels, size, size, device=work.device)
        unet = load_unet(work.root, work.dtype, work.device, pack=True)  # anew: it is packed for the first size it sees
        text = unet.encode_text(work.embeds[:1].expand(2 * batch, -1, -1))
        step = {"ours": lambda unet=unet, x_t=x_t, text=text: unet(x_t, 500, text, work.noise_level)}
        seconds = median(times_of(step, max(1, rounds // 3), work.device)["ours"])
        rows.append({"batch": batch, "size": size, "seconds_per_picture": seconds / batch})
        print(f"  {batch} pictures of {size} × {size}: {1000 * seconds / batch:.1f} ms a picture and step")
    if work.config.class_embed_type is None:
        embeds, null = work.embeds[:1].float(), work.embeds[-1:].float()
        for steps in (10, 20, 50, 100, 200):
            options = {"seeds": [SEED], "num_steps": steps, "size": work.size}
            drawn = {"ours": lambda options=options: generate(work.ours, embeds, null, **options)}
            seconds = median(times_of(drawn, max(1, rounds // 10), work.device)["ours"])
            rows.append({"steps": steps, "size": side, "seconds_per_picture": seconds})
            print(f"  a picture in {steps} steps: {1000 * seconds:.0f} ms, {1000 * seconds / steps:.1f} ms a step")
    return rows


def draw_growth(path: Path, rows: list[dict], work: Work):
    """What a picture costs as there are more of them, more steps, and more pixels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), dpi=150, layout="constrained")
    panels = {
        "batch": ("pictures at a time", "seconds of a step, each", lambda row: row["size"] == work.size[0]),
        "steps": ("steps", "seconds of a picture", lambda row: True),
        "size": ("height and width", "seconds of a step", lambda row: row.get("batch") == 1),
    }
    for axes, (key, (x, y, shown)) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        points = {row[key]: row["seconds_per_picture"] for row in rows if key in row and shown(row)}
        axes.plot(list(points), list(points.values()), "o-")
        axes.set(xlabel=x, ylabel=y, xscale="log", yscale="log")
        axes.set_xticks(list(points), [str(value) for value in points])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    save_figure(path, figure, SEED)


@torch.no_grad()
def peak_memory(work: Work) -> dict[str, float]:
    """Of a step on the GPU, beside the weights."""
    weights = sum(tensor.nbytes for tensor in work.weights.values())
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(work.device)
    torch.cuda.reset_peak_memory_stats(work.device)
    our_step(work)()
    more = torch.cuda.max_memory_allocated(work.device) - before
    print(f"peak memory of a step: weights {weights / 1e9:.2f} GB and {more / weights:.1%} more")
    return {"weights": weights, "more": more}


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    run(main if "--their-picture" not in sys.argv else lambda: draw_their_picture(*sys.argv[2:]))
