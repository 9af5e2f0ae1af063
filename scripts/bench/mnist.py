"""How fast training and sampling are, against the plain recipe on the same work.

    python scripts/bench/mnist.py --data data

Training: the plain recipe (DataLoader over torchvision's MNIST with ToTensor, float32, contiguous, Adam) and
ours (digits in memory, channels_last, fused Adam, bfloat16 where the hardware has it, --compile) take turns in
this process, a few steps each, with the same initial weights, digits, timesteps and noise. Prints the median
images/s of both, the ratio and both losses. Sampling: seconds for 100 digits with guidance, and the share
of the time that is spent outside convolutions.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # where shared/ is
from ddpm.losses import ddpm_loss
from ddpm.mnist import ClassUNet, sample_digits
from ddpm.mnist.data import load_mnist
from ddpm.mnist.training import DDPM, drop_classes, step_seed, train
from ddpm.schedule import linear_schedule, linspace_timesteps
from shared.options import SEED, add_device_options, parser, pick_device, pick_dtype, positive, run

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
    options.add_argument("--sample-steps", type=positive, default=300, help="timesteps of the sampling (default: 300)")
    options.add_argument("--sample-digits", type=positive, default=100, help="digits to sample (default: 100)")
    add_device_options(options)
    args = options.parse_args()
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    linspace_timesteps(SCHEDULE.num_timesteps, args.sample_steps)  # refuses a wrong number now, not at the end
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
    bench_sampling(device, args.sample_digits, args.sample_steps)


def bench_sampling(device: torch.device, count: int, steps: int):
    """Guided digits in float32, all in one batch, and a profile of three steps of it."""
    model = ClassUNet().to(device, memory_format=torch.channels_last).eval()
    labels, seeds = [k % 10 for k in range(count)], range(count)
    sample_digits(model, labels, seeds, SCHEDULE, num_steps=1)
    started = time.perf_counter()
    with tqdm(total=count * steps, desc="sampling", leave=False) as bar:
        sample_digits(
            model, labels, seeds, SCHEDULE, num_steps=steps, callback=lambda done, _: bar.update(done - bar.n)
        )
    print(f"sampling {count} digits, {steps} steps, γ = 5, float32: {time.perf_counter() - started:.1f} s")

    if device.type == "mps":
        return  # the profiler does not see it
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as profiled:
        sample_digits(model, labels, seeds, SCHEDULE, num_steps=3)
    times = {
        event.key: event.self_device_time_total if cuda else event.self_cpu_time_total
        for event in profiled.key_averages()
        if event.device_type == DeviceType.CPU  # operators; kernels are listed a second time
    }
    total, outside = sum(times.values()), {name: t for name, t in times.items() if "conv" not in name}
    largest = sorted(outside, key=outside.get, reverse=True)[:5]
    print(f"  outside convolutions: {sum(outside.values()) / total:.0%} of the time, most of it in")
    print("  " + ", ".join(f"{name} {outside[name] / total:.0%}" for name in largest))


if __name__ == "__main__":
    run(main)
