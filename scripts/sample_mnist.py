"""Sample digits from pure noise with the shipped class-conditioned DDPM (B5), another one, or a flow (B7).

    python scripts/sample_mnist.py
    python scripts/sample_mnist.py --per-class 10 --guidance 2 --steps 20 --sampler dpm++ --out out/fast.png
    python scripts/sample_mnist.py --weights flow_class
    python scripts/sample_mnist.py --weights ddpm_time  # the shipped time-conditioned one (B4)

Columns are the digits 0 to 9; row k starts from seed + k, the same noise for every digit. A sample depends on
its own seed and label alone, so drawing more of them changes none.
"""

from argparse import Namespace
from pathlib import Path

from shared.options import (
    add_common_options,
    check_not_overwritten,
    check_writable,
    number,
    parser,
    pick,
    positive,
    run,
)

import torch
from torch import Tensor
from tqdm import tqdm

from ddpm.mnist import ClassFlow, ClassUNet, TimeFlow, TimeUNet
from ddpm.mnist.checkpoint import load_model, weights_file
from ddpm.mnist.sampling import FLOW_SAMPLERS, SAMPLERS, pick_sampling
from ddpm.tools.animation import save_gif
from ddpm.tools.figures import save_cells, save_grid
from ddpm.tools.files import save_tensors
from ddpm.tools.memory import check_memory

MAX_ROWS = 40  # more are sampled and saved, but not shown


def arguments() -> Namespace:
    options = parser(__doc__)
    options.add_argument("--weights", type=Path, default=Path("ddpm_class"), help="default: ddpm_class, shipped")
    options.add_argument("--per-class", type=positive, default=4, metavar="N", help="of each digit (default: 4)")
    options.add_argument("--guidance", type=number, metavar="G", help="γ, 1 for none (default: 5)")
    options.add_argument("--steps", type=int, metavar="N", help="default: all 300 timesteps; with a flow, 50")
    samplers = [*SAMPLERS, *FLOW_SAMPLERS]
    options.add_argument("--sampler", choices=samplers, help="default: ddpm; with a flow euler (or heun)")
    options.add_argument("--eta", type=number, default=0.0, help="how much fresh noise ddim and dpm++ add (default: 0)")
    help = "also how they came to be, at most 100: --out as a .gif, and its frames"
    options.add_argument("--animate", action="store_true", help=help)
    options.add_argument("--save", type=Path, metavar="FILE.safetensors", help="images [N, 1, 28, 28], labels [N]")
    add_common_options(options, "out/digits.png", dtype="float32")  # so that every machine draws the same digits
    return options.parse_args()


def main():
    args = arguments()
    device, dtype = pick(args)
    check_writable(args.out, ".png")
    if args.save:
        check_writable(args.save, ".safetensors")
        read = Namespace(save=args.save, weights=weights_file(args.weights))  # of a run's folder, the file
        check_not_overwritten(read, "save", ["weights"])
    model = load_model(args.weights, (ClassUNet, TimeUNet, ClassFlow, TimeFlow), device)
    steps, draw = pick_sampling(model, args.steps, args.sampler, args.eta)
    by_class = isinstance(model, (ClassUNet, ClassFlow))
    if args.guidance is not None and not by_class:
        raise ValueError(f"--guidance needs a model with classes, and {args.weights} has none: leave it out")
    args.guidance = 5.0 if args.guidance is None else args.guidance
    if args.animate and args.per_class > 10:
        raise ValueError("--animate shows at most 100 digits: --per-class 10 or less")
    check_memory(80 * 28**2 * args.per_class, f"ten times {args.per_class} digits")
    labels = [digit for digit in range(10) for _ in range(args.per_class)]
    # without classes, digits differ by their noise alone
    seeds = [args.seed + (k % args.per_class if by_class else k) for k in range(len(labels))]

    total, frames, every = len(labels) * steps, [], max(1, steps // 20)

    def report(done: int, x_t: Tensor):
        bar.update(done - bar.n)
        if args.animate and (done // len(labels) - 1) % every == 0:
            frames.append(x_t.float().cpu().clamp(0, 1))

    with (
        tqdm(total=total, unit="step", unit_scale=True, desc=f"{len(labels)} digits, {steps} steps") as bar,
        torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
    ):
        asked = labels if by_class else None
        images = draw(model, asked, seeds, guidance_scale=args.guidance, callback=report)

    title = f"γ = {args.guidance:g}, " * by_class + f"{steps} steps, seed {args.seed}"
    if args.per_class > MAX_ROWS:
        title += f", the first {MAX_ROWS} of {args.per_class}"
    if args.animate:
        shown = [tiled(x, args.per_class) for x in [*frames, images]]
        gif = args.out.with_suffix(".gif")
        save_gif(gif, shown, [80] * len(frames) + [3000])
        print(gif)
        names = [*(f"after {k * every} steps" for k in range(len(frames))), f"after {steps} steps"]
        save_cells(args.out.with_stem(f"{args.out.stem}_steps"), [shown], column_labels=names, seed=args.seed)
    rows = images.view(10, args.per_class, *images.shape[1:]).transpose(0, 1)[:MAX_ROWS]
    names = [str(digit) for digit in range(10)] if by_class else []
    save_grid(args.out, rows, column_labels=names, title=title, seed=args.seed)
    print(args.out)
    if args.save:
        saved = {"images": images, "labels": torch.tensor(labels) if by_class else torch.full((len(labels),), -1)}
        described = {"seed": args.seed, "guidance_scale": args.guidance, "steps": steps, "weights": args.weights.name}
        save_tensors(args.save, saved, described)
        print(args.save)


def tiled(x: Tensor, rows: int) -> Tensor:
    """Digits [10 · rows, 1, 28, 28] -> one image [3, H, W], two pixels for one, a column for each of ten."""
    from torchvision.utils import make_grid

    grid = make_grid(x.view(10, rows, *x.shape[1:]).transpose(0, 1).flatten(0, 1), nrow=10, padding=2, pad_value=1.0)
    grid = (grid * 15).round() / 15  # few greys make a small file
    return grid.repeat_interleave(2, -2).repeat_interleave(2, -1)


if __name__ == "__main__":
    run(main)
