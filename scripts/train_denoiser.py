"""Train the one-step denoiser on MNIST at σ = 0.5 (B2), or on pure noise.

    python scripts/train_denoiser.py
    python scripts/train_denoiser.py --pure-noise --out out/pure_noise

Writes to out/denoiser: weights.safetensors, state.safetensors (for --resume), log.csv, loss.png, and test
digits clean, noisy and denoised after epochs 1 and 5. From pure noise the best answer is the mean digit, which is drawn
below the model's. Ctrl-C saves and stops; --resume goes on and ends with the same weights, bit for bit, as an
uninterrupted run on the same CPU with as many threads.
"""

from functools import partial

from shared.options import parser, run
from shared.training import add_digits_options, train_digits

import torch

from ddpm.mnist import UNet
from ddpm.mnist.checkpoint import build
from ddpm.mnist.data import load_mnist
from ddpm.mnist.training import DENOISER, denoiser_loss, noisy_digits, pure_noise_loss
from ddpm.tools.figures import save_grid


def main():
    options = parser(__doc__)
    help = "the input is noise alone, z = eps, as a newer edition asks"
    options.add_argument("--pure-noise", action="store_true", help=help)
    add_digits_options(options, DENOISER, width=128, sample_epochs=[1, 5], out="out/denoiser")
    args = options.parse_args()
    test_digits = load_mnist(args.data, "test", limit=10)[0] / 255

    def loss_of(model, x_0, labels, generator):
        return (pure_noise_loss if args.pure_noise else denoiser_loss)(model, x_0, generator)

    @torch.no_grad()
    def draw(model, epoch: int):
        z = noisy_digits(test_digits, 0.5, args.seed)
        if args.pure_noise:
            z = noisy_digits(torch.zeros_like(z), 1.0, args.seed)
        answers = model(z.to(next(model.parameters()).device)).cpu()
        rows, row_labels = [test_digits, z, answers], ["clean", "noisy", "denoised"]
        title = f"test digits, σ = 0.5, after epoch {epoch}"
        if args.pure_noise:
            mean_digit = load_mnist(args.data, "train", args.limit)[0].float().mean(0, keepdim=True) / 255
            rows, row_labels = [z, answers, mean_digit.expand_as(z)], ["noise", "the model's answer", "the mean digit"]
            rms = (answers - mean_digit).square().mean().sqrt()
            title = f"pure noise, after epoch {epoch}: {rms:.4f} RMS from the mean digit"
        path = args.out / f"denoised_epoch{epoch:02d}.png"
        save_grid(path, [row.clamp(0, 1) for row in rows], row_labels=row_labels, title=title, seed=args.seed)

    title = "denoiser, pure noise" if args.pure_noise else "one-step denoiser, σ = 0.5"
    train_digits(args, DENOISER, partial(build, UNet, width=args.width), loss_of, title, draw)


if __name__ == "__main__":
    run(main)
