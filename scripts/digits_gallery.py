"""The algorithms of Part A on digits, with the shipped class-conditioned DDPM, and how the judge reads the results.

    python scripts/digits_gallery.py --data data

Four figures in out/digits_gallery, each with a number of samples that the judge examines:
inpaint    the lower half of test digits, filled in as the digit that it was
sdedit     test digits 3, led towards an 8
anagram    a 6 that is a 9 when it is turned by 180°
hybrid     one digit from afar (low pass), another up close
Prints the share that the judge confirms, and writes it to measures.json.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from shared.options import add_common_options, add_data_option, check_writable, number, parser, pick, positive, run

import torch
from torch import Tensor

from ddpm.components import low_high_pass, low_pass
from ddpm.mnist import SHIPPED, ClassUNet, load_model
from ddpm.mnist.data import load_mnist
from ddpm.mnist.judge import Judge, examine
from ddpm.mnist.sampling import GuidedDigits
from ddpm.mnist.unet import check_batch
from ddpm.sampling import anagram, hybrid, inpaint, sdedit
from ddpm.tools.figures import save_grid
from ddpm.tools.files import write_json
from ddpm.views import identity, rotate_180

SHOWN = 10  # of each experiment's samples
HYBRID_SIGMA = 3.0  # of the low pass, at 64 pixels

Reader = Callable[[Tensor], Tensor]  # digits [N, 1, 28, 28] in [0, 1] -> those that the judge reads, [N]
Drawn = tuple[dict[str, Tensor], str, dict[str, float]]  # rows of images by label, a title, and measures


def main():
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=EXPERIMENTS, help="(default: all)")
    add_data_option(options)
    options.add_argument("--weights", type=Path, default=SHIPPED["ddpm_class"], help="(default: the shipped one)")
    options.add_argument("--samples", type=positive, default=100, help="of each experiment (default: 100)")
    options.add_argument("--steps", type=positive, default=100, help="timesteps to visit (default: 100)")
    options.add_argument("--guidance", type=number, default=5.0, help="γ (default: 5)")
    add_common_options(options, "out/digits_gallery")
    args = options.parse_args()
    check_writable(args.out / "measures.json")
    device, dtype = pick(args)
    model, judge = load_model(args.weights, ClassUNet, device), load_model("judge", Judge, device)
    digits = GuidedDigits(model, num_steps=args.steps, guidance_scale=args.guidance, dtype=dtype)
    test = load_mnist(args.data, "test") if {"inpaint", "sdedit"} & set(args.only) else None
    check_batch(model, 2 * args.samples)  # all at once, and guided
    seeds, measures = range(args.seed, args.seed + args.samples), {}

    def read(images: Tensor) -> Tensor:
        return examine(judge, images.to(device))[0]

    for name in args.only:
        rows, title, measures[name] = EXPERIMENTS[name](digits, seeds, read, test)
        path = args.out / f"{name}.png"
        shown = [row[:SHOWN] for row in rows.values()]
        save_grid(path, shown, row_labels=list(rows), title=title, seed=args.seed)
        print(f"{path}: " + ", ".join(f"{what} {share:.0%}" for what, share in measures[name].items()))
    described = {"steps": args.steps, "guidance": args.guidance, "samples": args.samples, "seed": args.seed}
    write_json(args.out / "measures.json", {**described, **measures})


def share(read: Tensor, asked: Tensor | int) -> float:
    """The share of digits that are read as they were asked for."""
    return (read == asked).double().mean().item()


def draw_inpaint(digits: GuidedDigits, seeds: Sequence[int], read: Reader, test: tuple[Tensor, Tensor]) -> Drawn:
    """The lower half of test digits."""
    x, labels = test[0][: len(seeds)] / 255, test[1][: len(seeds)]
    mask = torch.zeros(1, 1, 28, 28)
    mask[:, :, 14:] = 1
    filling = partial(inpaint, x_orig=x.to(digits.device), mask=mask.to(digits.device))
    filled = digits.draw(digits.estimate(labels.tolist()), seeds[: len(x)], filling, description="inpaint")
    rows = {"original": x, "hole to fill": x * (1 - mask) + 0.5 * mask, "result": filled}
    return rows, "inpainting: the lower half", {"confirmed": share(read(filled), labels)}


def draw_sdedit(digits: GuidedDigits, seeds: Sequence[int], read: Reader, test: tuple[Tensor, Tensor]) -> Drawn:
    """Test digits 3, noised to half of the steps and led towards an 8."""
    x = test[0][test[1] == 3][: len(seeds)] / 255
    i_start = len(digits.timesteps) // 2
    editing = partial(sdedit, x_0=x.to(digits.device), i_start=i_start)
    shown = {"num_steps": len(digits.timesteps) - i_start, "description": "sdedit"}
    edited = digits.draw(digits.estimate([8] * len(x)), seeds[: len(x)], editing, **shown)
    near, others = ((image - x).square().flatten(1).mean(1) for image in (edited, edited.roll(1, 0)))
    kept = (near < others).double().mean().item()
    measures = {"read as 8": share(read(edited), 8), "nearer to its own 3 than to another": kept}
    title = f"SDEdit: 3 towards 8, from t = {digits.timesteps[i_start]}"
    return {"a real 3": x, "result": edited}, title, measures


def draw_anagram(digits: GuidedDigits, seeds: Sequence[int], read: Reader, _) -> Drawn:
    """Upright a 6, turned by 180° a 9."""
    views = [identity(), rotate_180()]
    estimates = [digits.estimate([digit] * len(seeds)) for digit in (6, 9)]
    drawn = digits.draw(anagram(estimates, views), seeds, description="anagram")
    turned = views[1].view(drawn)
    upright, other = read(drawn) == 6, read(turned) == 9
    measures = {"6": share(upright, True), "9 when turned": share(other, True), "both": share(upright & other, True)}
    return {"upright": drawn, "turned": turned}, "anagrams: 6 and 9", measures


def draw_hybrid(digits: GuidedDigits, seeds: Sequence[int], read: Reader, _) -> Drawn:
    """Low pass: digits 0, 1, …; high pass: another digit for each."""
    k = torch.arange(len(seeds))
    far = k % 10
    near = (far + 1 + k // 10 % 9) % 10
    estimates = [digits.estimate(digit.tolist()) for digit in (far, near)]
    drawn = digits.draw(hybrid(estimates, low_high_pass(HYBRID_SIGMA)), seeds, description="hybrid")
    low = low_pass(drawn, HYBRID_SIGMA)
    high = (drawn - low).relu()
    high = high / high.amax((1, 2, 3), keepdim=True)
    seen_far, seen_near = read(low) == far, read(high) == near
    measures = {"far": share(seen_far, True), "near": share(seen_near, True), "both": share(seen_far & seen_near, True)}
    rows = {"hybrid": drawn, "low pass": low, "high pass": high}
    return rows, "hybrids: one digit from afar, another up close", measures


EXPERIMENTS = {"inpaint": draw_inpaint, "sdedit": draw_sdedit, "anagram": draw_anagram, "hybrid": draw_hybrid}

if __name__ == "__main__":
    run(main)
