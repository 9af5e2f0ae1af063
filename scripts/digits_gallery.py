"""The algorithms of Part A on digits, with the shipped class-conditioned DDPM, and how the judge reads the results.

    python scripts/digits_gallery.py --data data

Four figures in out/digits_gallery, each with a number of samples that the judge examines:
inpaint    the lower half of test digits, filled in as the digit that it was
sdedit     test digits 3, led towards an 8
anagram    a 6 that is a 9 when it is turned by 180°
hybrid     one digit from afar (low pass), another up close
Prints the share that the judge confirms, and writes it to measures.json.
"""

import json
from argparse import Namespace
from functools import partial
from pathlib import Path

from shared.options import add_common_options, add_data_option, check_writable, number, parser, pick, positive, run

import torch
from torch import Tensor
from tqdm import tqdm

from ddpm.components import low_high_pass, low_pass
from ddpm.figures import save_grid
from ddpm.files import write_atomically
from ddpm.mnist import ClassUNet
from ddpm.mnist.checkpoint import SHIPPED, load_model
from ddpm.mnist.data import load_mnist
from ddpm.mnist.judge import Judge, examine
from ddpm.mnist.sampling import one_hot
from ddpm.mnist.unet import check_batch
from ddpm.sampling import anagram, guided, hybrid, inpaint, noise_source, sample, sdedit
from ddpm.schedule import linear_schedule, linspace_timesteps
from ddpm.views import identity, rotate_180

SHOWN = 10  # of each experiment's samples
HYBRID_SIGMA = 3.0  # of the low pass, at 64 pixels


class Digits:
    """A class-conditioned DDPM, its schedule and its judge."""

    def __init__(self, args: Namespace):
        self.args, (self.device, self.dtype) = args, pick(args)
        self.model = load_model(args.weights, ClassUNet, self.device)
        self.judge = load_model(SHIPPED["judge"], Judge, self.device)
        self.schedule = linear_schedule(self.model.num_timesteps)
        self.timesteps = linspace_timesteps(self.schedule.num_timesteps, args.steps)
        if {"inpaint", "sdedit"} & set(args.only):
            images, self.labels = load_mnist(args.data, "test")
            self.real = images / 255

    def estimate(self, digits: Tensor):
        """The guided estimate for one digit each."""
        c = one_hot(digits.tolist(), self.device)
        return guided(self.noise_in, c, torch.zeros_like(c), self.args.guidance)

    def noise_in(self, x_t: Tensor, t: int, c: Tensor) -> Tensor:
        """The model's eps; it alone is computed in --dtype, the sampler's arithmetic in float32."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(x_t, t, c)

    def draw(self, name: str, algorithm, estimate, count: int, num_steps: int | None = None) -> Tensor:
        """`count` digits in [0, 1] by an algorithm of ddpm.sampling, one for each seed."""
        noise = noise_source(range(self.args.seed, self.args.seed + count), (1, 28, 28), self.device)
        with tqdm(total=num_steps or len(self.timesteps), desc=name, unit="step") as bar:
            options = {"timesteps": self.timesteps, "schedule": self.schedule, "noise": noise}
            return algorithm(estimate=estimate, **options, callback=lambda *_: bar.update()).clamp(0, 1)

    def read(self, images: Tensor) -> Tensor:
        """The digits that the judge reads."""
        return examine(self.judge, images.to(self.device))[0]


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
    digits = Digits(args)
    check_batch(digits.model, 2 * args.samples)  # all at once, and guided
    measures = {}
    for name in args.only:
        rows, title, measures[name] = EXPERIMENTS[name](digits)
        path = args.out / f"{name}.png"
        rows = {label: row[:SHOWN].cpu() for label, row in rows.items()}
        save_grid(path, list(rows.values()), row_labels=list(rows), title=title, seed=args.seed)
        print(f"{path}: " + ", ".join(f"{what} {share:.0%}" for what, share in measures[name].items()))
    described = {"steps": args.steps, "guidance": args.guidance, "samples": args.samples, "seed": args.seed}
    write_atomically(args.out / "measures.json", json.dumps({**described, **measures}, indent=1).encode())


def share(read: Tensor, asked: Tensor | int) -> float:
    """The share of digits that are read as they were asked for."""
    return (read == asked).double().mean().item()


def draw_inpaint(digits: Digits):
    """The lower half of test digits."""
    x, labels = (tensor[: digits.args.samples] for tensor in (digits.real, digits.labels))
    mask = torch.zeros(1, 1, 28, 28)
    mask[:, :, 14:] = 1
    filling = partial(inpaint, x_orig=x.to(digits.device), mask=mask.to(digits.device))
    filled = digits.draw("inpaint", filling, digits.estimate(labels), len(x))
    rows = {"original": x, "hole to fill": x * (1 - mask) + 0.5 * mask, "result": filled}
    return rows, "inpainting: the lower half", {"confirmed": share(digits.read(filled), labels)}


def draw_sdedit(digits: Digits):
    """Test digits 3, noised to half of the steps and led towards an 8."""
    x = digits.real[digits.labels == 3][: digits.args.samples]
    eights, i_start = torch.full((len(x),), 8), len(digits.timesteps) // 2
    editing = partial(sdedit, x_0=x.to(digits.device), i_start=i_start)
    edited = digits.draw("sdedit", editing, digits.estimate(eights), len(x), len(digits.timesteps) - i_start)
    near = (edited.cpu() - x).square().flatten(1).mean(1)
    others = (edited.cpu().roll(1, 0) - x).square().flatten(1).mean(1)
    kept = (near < others).double().mean().item()
    measures = {"read as 8": share(digits.read(edited), 8), "nearer to its own 3 than to another": kept}
    title = f"SDEdit: 3 towards 8, from t = {digits.timesteps[i_start]}"
    return {"a real 3": x, "result": edited}, title, measures


def draw_anagram(digits: Digits):
    """Upright a 6, turned by 180° a 9."""
    n, views = digits.args.samples, [identity(), rotate_180()]
    estimates = [digits.estimate(torch.full((n,), digit)) for digit in (6, 9)]
    drawn = digits.draw("anagram", sample, anagram(estimates, views), n)
    turned = views[1].view(drawn)
    upright, other = digits.read(drawn) == 6, digits.read(turned) == 9
    measures = {"6": share(upright, True), "9 when turned": share(other, True), "both": share(upright & other, True)}
    return {"upright": drawn, "turned": turned}, "anagrams: 6 and 9", measures


def draw_hybrid(digits: Digits):
    """Low pass: digits 0, 1, …; high pass: another digit for each."""
    n = digits.args.samples
    far = torch.arange(n) % 10
    near = (far + 1 + torch.arange(n) // 10 % 9) % 10
    estimates = [digits.estimate(digit) for digit in (far, near)]
    drawn = digits.draw("hybrid", sample, hybrid(estimates, low_high_pass(HYBRID_SIGMA)), n)
    low = low_pass(drawn, HYBRID_SIGMA)
    high = (drawn - low).relu()
    high = high / high.amax((1, 2, 3), keepdim=True)
    seen_far, seen_near = digits.read(low) == far, digits.read(high) == near
    measures = {"far": share(seen_far, True), "near": share(seen_near, True), "both": share(seen_far & seen_near, True)}
    rows = {"hybrid": drawn, "low pass": low, "high pass": high}
    return rows, "hybrids: one digit from afar, another up close", measures


EXPERIMENTS = {"inpaint": draw_inpaint, "sdedit": draw_sdedit, "anagram": draw_anagram, "hybrid": draw_hybrid}

if __name__ == "__main__":
    run(main)
