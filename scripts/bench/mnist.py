"""How fast training and sampling are, against the plain recipe on the same work.

    python scripts/bench/mnist.py --data data

Training: the plain recipe (DataLoader over torchvision's MNIST with ToTensor, float32, contiguous, Adam) and
ours (digits in memory, channels_last, fused Adam, bfloat16 where the hardware has it, --compile) take turns in
this process, a few steps each, with the same initial weights, digits, timesteps and noise. Prints the median
images/s of both, the ratio and both losses. Sampling: a guided step of 100 digits by the UNet as it is written, and
with what `sample_digits` does (BatchNorm folded, the encoder once for both halves of guidance), in turns; and the share
of the time that is spent outside convolutions. --sampling: the latter alone.
"""

import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))  # where shared/ is
from shared.options import SEED, add_device_options, parser, pick_device, pick_dtype, positive, run
from shared.timing import operators

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor
from tqdm import tqdm

from ddpm.losses import ddpm_loss
from ddpm.mnist import ClassUNet, load_model
from ddpm.mnist.data import load_mnist
from ddpm.mnist.sampling import encoded_once, one_hot
from ddpm.mnist.training import DDPM, drop_classes, train
from ddpm.mnist.unet import IMAGE_SIZE, folded
from ddpm.runs import step_seed
from ddpm.sampling import guided, noise_source
from ddpm.schedule import linear_schedule, linspace_timesteps

SCHEDULE = linear_schedule()


def loss_of(model, x_0, labels, generator):
    return ddpm_loss(model, x_0, (drop_classes(labels, generator),), SCHEDULE, generator)


def plain_recipe(root: Path, order: torch.Tensor, device: torch.device, batch_size: int):
    """The loop that most tutorials print; yields the loss after each step."""
    torch.manual_seed(SEED)
    model = ClassUNet().to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=DDPM.learning_rate)
    loader = DataLoader(MNIST(root, train=True, transform=ToTensor()), batch_size, sampler=order.tolist())
    generator = torch.Generator(device)
    for step, (x_0, labels) in enumerate(loader):
        generator.manual_seed(step_seed(SEED, step))  # the noise that `train` draws
        loss = loss_of(model, x_0.to(device), labels.to(device), generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def our_recipe(root: Path, device: torch.device, batch_size: int, dtype: torch.dtype, compiled: bool):
    """What the training scripts do."""
    torch.manual_seed(SEED)
    model = ClassUNet().to(device, memory_format=torch.channels_last)
    if compiled:
        model.compile()
    optimizer = torch.optim.Adam(model.parameters(), lr=DDPM.learning_rate, fused=device.type != "mps")
    images, labels = (tensor.to(device) for tensor in load_mnist(root))
    recipe = replace(DDPM, batch_size=batch_size, seed=SEED)
    for _, loss in train(model, optimizer, loss_of, images, labels, recipe, dtype=dtype):
        yield loss.item()


def main():
    options = parser(__doc__)
    options.add_argument("--data", type=Path, default=Path("data"), help="folder holding MNIST/raw (default: data)")
    options.add_argument("--rounds", type=positive, default=8, help="turns that each side takes (default: 8)")
    options.add_argument("--steps", type=positive, default=5, help="training steps in a turn (default: 5)")
    options.add_argument("--batch-size", type=positive, default=DDPM.batch_size)
    options.add_argument("--compile", action="store_true", help="torch.compile ours")
    options.add_argument("--sampling", action="store_true", help="time the sampling alone")
    options.add_argument("--sample-digits", type=positive, default=100, help="digits to sample (default: 100)")
    add_device_options(options)
    args = options.parse_args()
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    if not args.sampling:
        bench_training(args, device, dtype)
    bench_sampling(device, dtype, args.sample_digits, args.rounds)


def bench_training(args: Namespace, device: torch.device, dtype: torch.dtype):
    """The plain recipe and ours in turns."""
    images, _ = load_mnist(args.data)
    if (args.rounds + 1) * args.steps * args.batch_size > len(images):
        raise ValueError(f"{args.rounds} rounds of {args.steps} steps need more than the {len(images)} training digits")

    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))  # that of `train`, epoch 1
    sides = {
        "plain": plain_recipe(args.data, order, device, args.batch_size),
        "ours": our_recipe(args.data, device, args.batch_size, dtype, args.compile),
    }
    rates, losses = {name: [] for name in sides}, {name: [] for name in sides}
    for turn in tqdm(range(args.rounds + 1), desc="rounds, the first to warm up", leave=False):
        for name, side in sides.items():
            started = time.perf_counter()
            losses[name] += [next(side) for _ in range(args.steps)]
            if turn > 0:
                rates[name].append(args.steps * args.batch_size / (time.perf_counter() - started))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    ours = f"{str(dtype).removeprefix('torch.')}{', compiled' * args.compile}"
    print(f"training a ClassUNet, batch {args.batch_size}, {device.type} ({where}), ours in {ours}")
    for name, values in rates.items():
        final = sum(losses[name][-args.steps :]) / args.steps
        spread = f"{min(values):.1f} to {max(values):.1f}"
        print(f"  {name:5}  {median(values):8.1f} images/s ({spread}), loss {final:.5f} at step {len(losses[name])}")
    pairs = [b / a for a, b in zip(rates["plain"], rates["ours"], strict=True)]
    print(f"  ratio  {median(pairs):8.2f} (median over {len(pairs)} pairs, {min(pairs):.2f} to {max(pairs):.2f})")


def bench_sampling(device: torch.device, dtype: torch.dtype, count: int, rounds: int):
    """A guided step of digits, as the UNet is written and as `sample_digits` does it, in turns."""
    model = load_model("ddpm_class", device=device)
    c = one_hot([k % 10 for k in range(count)], device)
    x_t = noise_source(range(count), (1, IMAGE_SIZE, IMAGE_SIZE), device)()
    sides = {"written": model, "ours": encoded_once(folded(model), count)}
    estimates = {name: guided(side, c, torch.zeros_like(c), 5.0) for name, side in sides.items()}
    timesteps = linspace_timesteps(SCHEDULE.num_timesteps, rounds + 1)
    times, difference = {name: [] for name in sides}, 0.0
    print(f"sampling with a ClassUNet, {device.type}, {str(dtype).removeprefix('torch.')}")
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for t in tqdm(timesteps, desc="sampling steps, the first to warm up", leave=False):
            eps = {}
            for name, estimate in estimates.items():
                started = time.perf_counter()
                eps[name] = estimate(x_t, t)[0].cpu()
                times[name].append(time.perf_counter() - started)
            difference = max(difference, (eps["ours"] - eps["written"]).abs().max().item())
        for name, seconds in times.items():
            print(f"  {name:8} {median(seconds[1:]):.3f} s a step of {count} digits, γ = 5")
        pairs = [a / b for a, b in zip(times["written"][1:], times["ours"][1:], strict=True)]
        spread = f"median over {len(pairs)} pairs, {min(pairs):.2f} to {max(pairs):.2f}"
        print(f"  ratio    {median(pairs):.2f} ({spread}); eps differ by {difference:.1e}")
        show_profile(device, lambda: estimates["ours"](x_t, 0))


def show_profile(device: torch.device, step: Callable):
    """The share of a step's time beside the convolutions."""
    outside = {name: share for name, share in operators(step, device).items() if "conv" not in name}
    if not outside:
        return  # the profiler does not see it
    largest = list(outside)[:5]
    print(f"  outside convolutions: {sum(outside.values()):.0%} of the time, most of it in")
    print("  " + ", ".join(f"{name} {outside[name]:.0%}" for name in largest))


if __name__ == "__main__":
    run(main)
