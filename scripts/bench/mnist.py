"""How fast training and sampling are, against the plain recipe on the same work.

    python scripts/bench/mnist.py --data data

Training: the plain recipe (DataLoader over torchvision's MNIST with ToTensor, float32, contiguous, Adam) and
ours (digits in memory, channels_last, fused Adam, bfloat16 where the hardware has it, --compile) take turns in
this process, a few steps each, with the same initial weights, digits, timesteps and noise. Prints the median
images/s of both, the ratio and both losses. Sampling: a guided step of 100 digits by the UNet as it is written, and
with what `sample_digits` does (BatchNorm folded, the encoder once for both halves of guidance), alternately; and the
share of the time that is spent outside convolutions. --sampling: the latter alone.
"""

import copy
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # where shared/ is
from shared.options import SEED, add_data_option, add_device_options, parser, pick, positive, run
from shared.timing import compare, race, short, where

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor

from ddpm.losses import ddpm_loss
from ddpm.mnist import ClassUNet, load_model
from ddpm.mnist.data import load_mnist
from ddpm.mnist.sampling import encoded_once, one_hot
from ddpm.mnist.training import DDPM, drop_classes, train
from ddpm.mnist.unet import IMAGE_SIZE, check_batch, folded
from ddpm.sampling import guided, noise_source
from ddpm.schedule import linear_schedule
from ddpm.tools.memory import keep_freed
from ddpm.tools.runs import step_seed
from ddpm.tools.timing import operators

SCHEDULE = linear_schedule()
TURN = 4  # steps of sampling


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
    add_data_option(options)
    options.add_argument("--rounds", type=positive, default=8, help="turns that each side takes (default: 8)")
    options.add_argument("--steps", type=positive, default=5, help="training steps in a turn (default: 5)")
    options.add_argument("--batch-size", type=positive, default=DDPM.batch_size)
    options.add_argument("--compile", action="store_true", help="torch.compile ours")
    options.add_argument("--sampling", action="store_true", help="time the sampling alone")
    options.add_argument("--sample-digits", type=positive, default=100, help="digits to sample (default: 100)")
    add_device_options(options)
    args = options.parse_args()
    device, dtype = pick(args)
    if not args.sampling:
        bench_training(args, device, dtype)
    bench_sampling(device, dtype, args.sample_digits, args.rounds)


def bench_training(args: Namespace, device: torch.device, dtype: torch.dtype):
    """The plain recipe and ours, alternately."""
    images, _ = load_mnist(args.data)
    if (args.rounds + 1) * args.steps * args.batch_size > len(images):
        raise ValueError(f"{args.rounds} rounds of {args.steps} steps need more than the {len(images)} training digits")

    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))  # that of `train`, epoch 1
    sides = {
        "ours": our_recipe(args.data, device, args.batch_size, dtype, args.compile),
        "plain": plain_recipe(args.data, order, device, args.batch_size),
    }
    ours = f"{short(dtype)}{', compiled' * args.compile}"
    print(f"training a ClassUNet, batch {args.batch_size}, {device.type} ({where(device)}), ours in {ours}")
    race(sides, args.rounds, args.steps, args.batch_size, device)


def several(step: Callable):
    for _ in range(TURN):
        step()


@torch.no_grad()
def bench_sampling(device: torch.device, dtype: torch.dtype, count: int, rounds: int):
    """Guided steps of digits, as `sample_digits` takes them and with the UNet as it is written, alternately."""
    model = load_model("ddpm_class", device=device)
    check_batch(model, 2 * count)
    c = one_hot([k % 10 for k in range(count)], device)
    x_t = noise_source(range(count), (1, IMAGE_SIZE, IMAGE_SIZE), device)()
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    models = {"ours": encoded_once(folded(model), count), "plain": plain, "plain, channels last": model}
    steps = {name: partial(guided(side, c, torch.zeros_like(c), 5.0), x_t, 150) for name, side in models.items()}
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        difference = (steps["ours"]()[0] - steps["plain"]()[0]).abs().max().item()
        print(f"sampling with a ClassUNet, {device.type}, {short(dtype)}; eps differ by {difference:.1e}")
        turns = {name: partial(several, step) for name, step in steps.items()}
        turns["ours"] = keep_freed()(turns["ours"])
        compare(f"{TURN} guided steps of {count} digits", turns, rounds, device)
        with keep_freed():
            steps["ours"]()
            shares = operators(steps["ours"], device)
        outside = {name: share for name, share in shares.items() if "conv" not in name}
    largest = ", ".join(f"{name} {share:.0%}" for name, share in list(outside.items())[:5])
    print(f"  outside convolutions: {sum(outside.values()):.0%} of the time, most of it in {largest}")


if __name__ == "__main__":
    run(main)
