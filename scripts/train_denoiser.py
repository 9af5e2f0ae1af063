"""Train the one-step denoiser on MNIST at σ = 0.5 (B2).

    python scripts/train_denoiser.py

Writes to out/denoiser: weights.safetensors, state.safetensors (for --resume), log.csv, loss.png, and test
digits clean, noisy and denoised after epochs 1 and 5. Ctrl-C saves and stops; --resume goes on and ends with
the same weights, bit for bit, as an uninterrupted run on the same CPU with as many threads.
"""

from functools import partial

from shared.figures import save_grid
from shared.options import parser, run
from shared.training import add_digits_options, train_digits

import torch

from ddpm.mnist import UNet
from ddpm.mnist.checkpoint import build
from ddpm.mnist.data import load_mnist
from ddpm.mnist.training import DENOISER, denoiser_loss, noisy_digits


def main():
    options = parser(__doc__)
    add_digits_options(options, DENOISER, width=128, sample_epochs=[1, 5], out="out/denoiser")
    args = options.parse_args()
    test_digits = load_mnist(args.data, "test", limit=10)[0] / 255

    def loss_of(model, x_0, labels, generator):
        return denoiser_loss(model, x_0, generator)

    @torch.no_grad()
    def draw(model, epoch: int):
        noisy = noisy_digits(test_digits, 0.5, args.seed)
        rows = [test_digits, noisy, model(noisy.to(next(model.parameters()).device)).cpu()]
        title, path = f"test digits, σ = 0.5, after epoch {epoch}", args.out / f"denoised_epoch{epoch:02d}.png"
        save_grid(path, rows, row_labels=["clean", "noisy", "denoised"], title=title, seed=args.seed)

    train_digits(args, DENOISER, partial(build, UNet, width=args.width), loss_of, "one-step denoiser, σ = 0.5", draw)


if __name__ == "__main__":
    run(main)
