"""Noise on digits, and the one-step denoiser's answer, at every noise level of B1 and B3.

    python scripts/denoise_mnist.py

Writes out/b1_noising.png (z = x + σ eps, a row for each σ) and out/b3_denoised.png (the same noise levels,
noisy and denoised; the denoiser was trained at σ = 0.5 alone).
"""

from pathlib import Path

from shared.options import add_data_option, add_output_options, check_writable, parser, run

import torch

from ddpm.mnist import UNet, load_model
from ddpm.mnist.data import load_mnist, one_of_each
from ddpm.mnist.training import SIGMAS, noisy_digits
from ddpm.sampling import check_finite
from ddpm.tools.devices import pick_device
from ddpm.tools.figures import save_grid


def main():
    options = parser(__doc__)
    add_data_option(options)
    options.add_argument("--weights", type=Path, default=Path("denoiser"), help="default: the shipped denoiser")
    add_output_options(options, "out")
    options.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    args = options.parse_args()

    device = pick_device(args.device)
    check_writable(args.out / "b1_noising.png")
    model = load_model(args.weights, UNet, device)
    x, _ = one_of_each(*load_mnist(args.data, "test"))
    x = x.to(device)

    noisy = {sigma: noisy_digits(x, sigma, args.seed) for sigma in SIGMAS}
    with torch.no_grad():
        rows = [row for z in noisy.values() for row in (z, model(z))]
    check_finite("the denoised digits", *rows)
    rows = [row.clamp(0, 1) for row in rows]
    names = [f"σ = {sigma}" for sigma in SIGMAS]
    b1, b3 = args.out / "b1_noising.png", args.out / "b3_denoised.png"
    save_grid(b1, rows[::2], row_labels=names, title="z = x + σ eps", seed=args.seed)
    names = [label for name in names for label in (f"{name}, noisy", "denoised")]
    save_grid(b3, rows, row_labels=names, title="the denoiser, trained at σ = 0.5, at other σ", seed=args.seed)
    print(f"{b1}, {b3}")


if __name__ == "__main__":
    run(main)
