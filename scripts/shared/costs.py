"""What a step of bench/unet.py costs: the least that it could, its layers alone, memory, and how all of it grows.

`work` is that script's: a model, its inputs and a folder.
"""

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from shared.options import SEED
from shared.timing import SCRIPTS, run_measured, short

import torch

from ddpm.tools.figures import save_curves
from ddpm.tools.timing import in_turns
from ifmodel import UNet
from ifmodel.costs import layers_alone, least_time, peak_memory, weight_bytes
from ifmodel.stage import generate
from ifmodel.tiny.captions import curated, with_article

Lines = dict[str, dict[int, tuple[float, float]]]  # of a column of the figure, by name: seconds and GB for each x


def floor_of(work) -> dict[str, float]:
    """The least time that a step could take on this machine, see `least_time`."""
    plain = work.load()
    floor = least_time(plain, work.step(plain), work.dtype)
    compute = f"{floor['gflop']:.1f} GFLOP at {floor['gflops']:.0f} GFLOP/s"
    memory = f"{floor['gigabytes']:.3f} GB of weights at {floor['gigabytes_per_s']:.1f} GB/s"
    print(f"floor of a step: {1000 * floor['seconds']:.1f} ms ({compute}, {memory})")
    return floor


def layers_of(work, rounds: int, floor: float) -> dict[str, float]:
    """Seconds of a step's layers alone, see `layers_alone`."""
    seconds = layers_alone(work.ours, work.step(work.ours), rounds)
    each = ", ".join(f"{name} {1000 * value:.1f} ms" for name, value in seconds.items())
    print(f"of a step, alone: {each}, together {sum(seconds.values()) / floor:.2f} × the floor")
    return seconds


def memory_of(work, batches: Sequence[int] = (1, 2, 4, 8, 16)) -> dict[str, float]:
    """Bytes of the weights and, beside them, of a step with guidance on the GPU, see `peak_memory`."""
    found = {"weights": weight_bytes(work.ours)} | peak_memory(partial(step_of, work, work.ours), batches, work.device)
    each = ", ".join(f"{found[str(batch)] / 1e9:.2f} GB for {batch}" for batch in batches)
    print(f"peak memory of a step: weights {found['weights'] / 1e9:.2f} GB, and more for images at a time: {each}")
    return found


def step_of(work, unet: UNet, batch: int, size: tuple[int, int] | None = None) -> Callable:
    """A step with guidance of so many images."""
    x_t = torch.randn(2 * batch, unet.config.in_channels, *(size or work.size), device=work.device)
    text = unet.encode_text(work.embeds[:1].expand(2 * batch, -1, -1))
    return partial(unet, x_t, 500, text, work.noise_level)


@torch.no_grad()
def growth(work, rounds: int) -> dict[str, Lines]:
    """Seconds of a step as images and pixels grow, and of a sample as its steps do; beside them GB.

    On the CPU those of computing, of all threads together, which other processes on the same cores disturb little; of
    all rounds the least, since they disturb in one direction. The GB are what a process of its own takes at most.
    """
    side, embeds = work.size[0], work.save_embeds()
    clock = time.process_time if work.device.type == "cpu" else time.perf_counter

    def step(batch: int, size: int) -> Callable:
        unet = work.load(pack=True)  # again: it is packed for the first size it sees
        return step_of(work, unet, batch, (size, size))

    def sample(steps: int) -> Callable:
        options = {"seeds": [SEED], "num_steps": steps, "size": work.size}
        return partial(generate, work.ours, work.prompt[:1], work.null[:1], **options)

    def column(what: str, draws: dict[int, Callable], options: Callable[[int], list], rounds: int) -> Lines:
        """Seconds, and GB of generate.py with these options; they take turns, so that all are disturbed alike."""
        times, points = in_turns(draws, rounds, work.device, clock), {}
        for x in draws:
            seconds, gigabytes = min(times[x]), math.nan
            if work.noise_level is None:
                given = ["--model", work.root, "--embeds", embeds, "--prompt", "something", *options(x)]
                gigabytes = generating(work, *given)[1]
            points[x] = seconds, gigabytes
            print(f"  {what.format(x)}: {1000 * seconds:.1f} ms, {gigabytes:.2f} GB", flush=True)
        return {"": points}

    together, sizes = {n: step(n, side) for n in (1, 2, 4, 8, 16)}, {side * k: step(1, side * k) for k in (1, 2, 4, 8)}
    usual, one = ["--size", *work.size], ["--steps", 1]

    def at_a_time(n: int) -> list:
        return [*usual, *one, "--num-images", n, "--batch-size", n]

    grown = {"batch": column("{} images", together, at_a_time, 10 * rounds)}
    grown["size"] = column("an image {} pixels wide", sizes, lambda size: [*one, "--size", size, size], rounds)
    if work.noise_level is None:
        steps = {n: sample(n) for n in (10, 20, 50, 100, 200)}
        grown["steps"] = column("{} steps", steps, lambda n: [*usual, "--steps", n], rounds)
    if work.args.geometry == "tiny":
        grown["prompts"] = many_prompts(work, (1, 10, 100, 1000))
    return grown


def many_prompts(work, numbers: Sequence[int]) -> Lines:
    """One and two processes for so many prompts, T5 included, two steps of 16 × 16 each."""
    grown, names = {"one process": {}, "each of two": {}}, [with_article(name) for name in curated()]
    file = Path(work.folder.name) / "prompts.txt"
    for number in numbers:
        file.write_text("\n".join(f"a photo of {names[k % len(names)]}, number {k}" for k in range(number)))
        for processes, name in ((1, "one process"), (2, "each of two")):
            if processes == 2 and number <= 8:  # a batch, which two cannot share
                continue
            options = ["--prompts", file, "--steps", 2, "--size", 16, 16]
            grown[name][number] = seconds, gigabytes = generating(work, *options, processes=processes)
            print(f"  {number} prompts, {name}: {seconds:.1f} s of computing, {gigabytes:.2f} GB", flush=True)
    return grown


def generating(work, *options, processes: int = 1) -> tuple[float, float]:
    """Seconds of computing, since the processes may share cores, and GB of the one of generate.py that has more."""
    out = Path(tempfile.mkdtemp(dir=work.folder.name))  # its home too, with an empty cache: all prompts are new to it
    alike = ["--upscaler", "none", "--dtype", short(work.dtype), "--device", work.device]
    alike += ["--out", out / ("images" if "--prompts" in options else "image.png")]
    seconds, peak = run_measured(SCRIPTS / "generate.py", *options, *alike, processes=processes, home=out)
    return seconds, peak / 1e9


def draw_growth(path: Path, grown: dict[str, Lines]):
    """What an image costs as there are more of them, more steps, and more pixels; and what many prompts do."""
    labels = {
        "batch": ("images at a time", "seconds of a step"),
        "steps": ("steps", "seconds of an image"),
        "size": ("height and width", "seconds of a step"),
        "prompts": ("prompts, 2 steps of 16 × 16", "seconds"),
    }
    panels = []
    for row, other in enumerate(({"yscale": "log"}, {"ylabel": "GB of a process at most", "ylim": (0, None)})):
        for name, lines in grown.items():
            curves = {line: {x: point[row] for x, point in points.items()} for line, points in lines.items()}
            ticks = sorted({x for points in lines.values() for x in points})
            options = {"xscale": "log", "xticks": ticks, "xticklabels": [str(tick) for tick in ticks]}
            panels.append((curves, {**options, "xlabel": labels[name][0], "ylabel": labels[name][1], **other}))
    save_curves(path, panels, SEED, columns=len(grown))
