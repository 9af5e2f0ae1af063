"""Measure the MNIST models with an independent judge, a CNN trained on real digits.

    python scripts/evaluate/mnist.py --data data
    python scripts/evaluate/mnist.py --data data --samples 1000 --steps 50 --guidance 0 1 2 5

For each guidance: the share of samples that the judge reads as the digit asked for, and the Fréchet distance
(FID, on the judge's penultimate features) between the samples and as many real test digits. The floor is the
same distance for as many real training digits. A time-conditioned DDPM (--weights) is asked for no digit: its samples
have the distance alone. For the denoiser: the test error at every noise level of B1.

Writes report.json, guidance.png and the misread samples to --out. All samples are kept there too, a hundred to
a file: a stopped evaluation goes on where it was.
"""

import hashlib
import json
import sys
from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # where shared/ is
from ddpm.files import load_tensors, save_tensors, write_atomically
from ddpm.memory import check_memory
from ddpm.mnist import ClassUNet, TimeUNet, UNet, sample_digits
from ddpm.mnist.checkpoint import SHIPPED, load_model, save_weights
from ddpm.mnist.data import load_mnist
from ddpm.mnist.judge import Judge, examine, frechet_distance, train_judge
from ddpm.mnist.training import SIGMAS, noisy_digits
from ddpm.schedule import linear_schedule
from shared.figures import save_figure, save_grid
from shared.options import (
    SEED,
    add_device_options,
    check_writable,
    number,
    parser,
    pick_device,
    pick_dtype,
    positive,
    run,
    seed_number,
)

CHUNK = 100
JUDGE_EPOCHS = 6


def main():
    args = arguments()
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    check_writable(args.out / "report.json")
    check_memory(8 * 28**2 * args.samples, f"{args.samples} digits")
    ddpm, denoiser = load_model(args.weights, (ClassUNet, TimeUNet), device), load_model(args.denoiser, UNet, device)
    train_images, train_labels = (tensor.to(device) for tensor in load_mnist(args.data, "train"))
    test_images, test_labels = (tensor.to(device) for tensor in load_mnist(args.data, "test"))
    judge = get_judge(args, train_images, train_labels)

    read, real = examine(judge, test_images / 255)
    count = min(args.samples, len(test_images), len(train_images))
    _, train_features = examine(judge, train_images[:count] / 255)
    report = {
        "judge_accuracy": (read == test_labels.cpu()).double().mean().item(),
        "samples": args.samples,
        "steps": args.steps,
        "fid_floor": frechet_distance(train_features, real[:count]),
        "guidance": [],
    }
    print(f"judge: {report['judge_accuracy']:.2%} of the {len(test_images)} test digits")
    print(f"floor: FID {report['fid_floor']:.2f}, {count} real training digits against {count} test digits")
    labels, conditioned = torch.arange(args.samples) % 10, isinstance(ddpm, ClassUNet)
    for guidance in args.guidance if conditioned else [1.0]:
        images = sample_set(ddpm, guidance, args, device, dtype)
        read, features = examine(judge, images.to(device))
        right = read == labels
        fid = frechet_distance(features[:count], real[:count])
        if not conditioned:
            report["fid"] = fid
            print(f"without labels: FID {fid:.2f} ({count} samples)")
            break
        report["guidance"].append({"guidance": guidance, "confirmed": right.double().mean().item(), "fid": fid})
        print(f"γ = {guidance:g}: {right.double().mean():.2%} confirmed, FID {fid:.2f} ({count} samples)")
        misread = {str(digit): images[(labels == digit) & ~right][:15] for digit in range(10)}
        misread = {digit: pictures for digit, pictures in misread.items() if len(pictures)}
        if misread:
            title = f"γ = {guidance:g}: read as another digit than the row's"
            path = args.out / f"misread_g{guidance:g}.png"
            save_grid(path, list(misread.values()), row_labels=list(misread), title=title, seed=args.seed)

    print("denoiser, mean squared error on test digits (without it: σ²)")
    report["denoiser_mse"] = denoiser_errors(denoiser, test_images[: args.digits] / 255, args.seed)
    for sigma, error in report["denoiser_mse"].items():
        print(f"σ = {sigma}: {error:.5f} ({float(sigma) ** 2:.2f})")
    if conditioned:
        draw_guidance(args.out / "guidance.png", report, args.seed)
    write_atomically(args.out / "report.json", json.dumps(report, indent=2).encode())
    print(args.out / "report.json")


def arguments() -> Namespace:
    options = parser(__doc__)
    options.add_argument("--data", type=Path, default=Path("data"), help="folder holding MNIST/raw (default: data)")
    options.add_argument("--weights", type=Path, default=SHIPPED["ddpm_class"], help="a DDPM (default: the shipped B5)")
    options.add_argument("--denoiser", type=Path, default=SHIPPED["denoiser"], help="a one-step denoiser")
    options.add_argument("--train-judge", action="store_true", help="train the judge again, into --out, and use it")
    options.add_argument("--samples", type=positive, default=10_000, help="samples for each guidance (default: 10000)")
    options.add_argument("--guidance", type=number, nargs="+", default=[5.0], help="one or more γ (default: 5)")
    options.add_argument("--steps", type=positive, default=300, help="timesteps to visit (default: 300)")
    options.add_argument(
        "--digits", type=positive, default=10_000, help="test digits for the denoiser (default: 10000)"
    )
    options.add_argument("--seed", type=seed_number, default=SEED, help=f"that of sample 0 (default: {SEED})")
    options.add_argument("--out", type=Path, default=Path("out/evaluation"), help="default: out/evaluation")
    add_device_options(options)
    args = options.parse_args()
    if args.samples < 2:
        raise ValueError("--samples must be at least 2: one digit has no covariance")
    return args


def get_judge(args, images: Tensor, labels: Tensor) -> Judge:
    """The shipped judge, or one trained here, once, and kept in --out."""
    trained_here = args.out / "judge.safetensors"
    if args.train_judge or not SHIPPED["judge"].exists():
        if args.train_judge or not trained_here.exists():
            judge = train_judge(images, labels, epochs=JUDGE_EPOCHS, seed=args.seed)
            save_weights(trained_here, judge, {"digits": len(images), "epochs": JUDGE_EPOCHS})
        return load_model(trained_here, Judge, images.device)
    return load_model(SHIPPED["judge"], Judge, images.device)


def sample_set(model: TimeUNet, guidance: float, args, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Samples k = 0 … of the digits k mod 10 from seeds seed + k, made in chunks that are kept on disk."""
    weights = hashlib.sha256(args.weights.read_bytes()).hexdigest()[:12]
    dtype_name = str(dtype).removeprefix("torch.")
    folder = args.out / "samples" / f"{weights}_g{guidance:g}_s{args.steps}_{dtype_name}_{args.seed}"
    schedule, images = linear_schedule(model.num_timesteps), []
    for start in tqdm(range(0, args.samples, CHUNK), desc=f"γ = {guidance:g}", unit=f"{CHUNK} digits"):
        path = folder / f"{start:06d}.safetensors"
        if not path.exists():
            numbers = range(start, start + CHUNK)
            labels, seeds = [k % 10 for k in numbers], [args.seed + k for k in numbers]
            asked = labels if isinstance(model, ClassUNet) else None
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                chunk = sample_digits(model, asked, seeds, schedule, num_steps=args.steps, guidance_scale=guidance)
            save_tensors(path, {"images": chunk, "labels": torch.tensor(labels)}, {})
        images.append(load_tensors(path)[0]["images"])
    return torch.cat(images)[: args.samples]


@torch.no_grad()
def denoiser_errors(model: UNet, x: Tensor, seed: int) -> dict[str, float]:
    """The mean squared error to the clean digits x [N, 1, 28, 28] at every noise level of B1."""
    errors = {}
    for sigma in tqdm(SIGMAS, desc="denoiser", unit="σ", leave=False):
        noisy = noisy_digits(x, sigma, seed)
        squares = [(model(z) - clean).square().sum() for z, clean in zip(noisy.split(500), x.split(500), strict=True)]
        errors[str(sigma)] = (sum(squares) / x.numel()).item()
    return errors


def draw_guidance(path: Path, report: dict, seed: int):
    """FID and confirmed share against guidance."""
    from matplotlib.figure import Figure

    rows = sorted(report["guidance"], key=lambda row: row["guidance"])
    figure = Figure(figsize=(6.4, 3.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.plot([row["guidance"] for row in rows], [row["fid"] for row in rows], "o-", label="FID of samples")
    axes.axhline(report["fid_floor"], color="0.5", linestyle="--", label="FID of real training digits")
    axes.set(xlabel="guidance γ", ylabel="FID (judge's features)", ylim=(0, None))
    share = axes.twinx()
    share.plot(
        [row["guidance"] for row in rows],
        [100 * row["confirmed"] for row in rows],
        "s-",
        color="C1",
        label="read as asked",
    )
    share.set_ylabel("read as asked, %", color="C1")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"{report['samples']} samples, {report['steps']} steps", fontsize=10)
    save_figure(path, figure, seed)


if __name__ == "__main__":
    run(main)
