"""Train the one-step denoiser on MNIST at σ = 0.5 (B2).

    python scripts/train_denoiser.py

Writes to out/denoiser: weights.safetensors, state.safetensors (for --resume), log.csv, loss.png, and test
digits clean, noisy and denoised after epochs 1 and 5. Ctrl-C saves and stops; --resume goes on and ends with
the same weights, bit for bit, as an uninterrupted run on the same CPU with as many threads.
"""

from pathlib import Path

from shared.figures import save_grid, save_loss_curve
from shared.options import add_training_options, end_training, parser, run, start_training

import torch

from ddpm.mnist import UNet
from ddpm.mnist.checkpoint import build
from ddpm.mnist.data import load_mnist
from ddpm.mnist.training import DENOISER, denoiser_loss, fit, noisy_digits


def main():
    options = parser(__doc__)
    options.add_argument(
        "--out", type=Path, default=Path("out/denoiser"), help="folder for the run (default: out/denoiser)"
    )
    add_training_options(options, DENOISER, width=128, sample_epochs=[1, 5])
    args = options.parse_args()

    recipe, images, labels, dtype = start_training(args, DENOISER)
    model = build(UNet, width=args.width)
    test_digits = load_mnist(args.data, "test", limit=10)[0].to(images.device) / 255

    def draw(epoch: int, losses: list[float]):
        save_loss_curve(args.out / "loss.png", losses, len(losses) // epoch, "one-step denoiser, σ = 0.5", args.seed)
        if epoch in (*args.sample_epochs, args.epochs):
            noisy = noisy_digits(test_digits, 0.5, args.seed)
            with torch.no_grad():
                rows = [test_digits, noisy, model.eval()(noisy)]
            title = f"test digits, σ = 0.5, after epoch {epoch}"
            path = args.out / f"denoised_epoch{epoch:02d}.png"
            save_grid(path, rows, row_labels=["clean", "noisy", "denoised"], title=title, seed=args.seed)

    def loss_of(model, x_0, labels, generator):
        return denoiser_loss(model, x_0, generator)

    options = {"dtype": dtype, "resume": args.resume, "start": args.start, "after_epoch": draw}
    end_training(args, fit(model, loss_of, images, labels, recipe, args.out, **options))


if __name__ == "__main__":
    run(main)
