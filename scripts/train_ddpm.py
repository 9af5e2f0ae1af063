"""Train a DDPM on MNIST: time-conditioned (B4) or time- and class-conditioned (B5).

    python scripts/train_ddpm.py --condition class

Writes to out/ddpm_class: weights.safetensors, state.safetensors (for --resume), log.csv, loss.png, and
samples after epochs 5 and 20. Ctrl-C saves and stops; --resume goes on and ends with the same weights,
bit for bit, as an uninterrupted run on the same machine with as many threads.
"""

from dataclasses import replace
from pathlib import Path

import torch
from common import SEED, add_device_options, check_writable, parser, pick_device, pick_dtype, positive, run, save_grid, save_loss_curve

from ddpm.data import load_mnist
from ddpm.mnist import ClassUNet, TimeUNet, sample_digits
from ddpm.schedule import linear_schedule
from ddpm.training import DDPM, ddpm_loss, drop_classes, fit


def main():
    options = parser(__doc__)
    options.add_argument("--condition", required=True, choices=["time", "class"], help="what the model is told: t, or t and the digit")
    options.add_argument("--data", type=Path, default=Path("data"), help="folder holding MNIST/raw; downloaded there when absent (default: data)")
    options.add_argument("--out", type=Path, help="folder for the run (default: out/ddpm_time or out/ddpm_class)")
    options.add_argument("--resume", action="store_true", help="go on with the run in --out")
    options.add_argument("--epochs", type=positive, default=DDPM.epochs)
    options.add_argument("--batch-size", type=positive, default=DDPM.batch_size)
    options.add_argument("--width", type=positive, default=64, help="D, the UNet's hidden width")
    options.add_argument("--limit", type=positive, help="train on the first digits only")
    options.add_argument("--sample-epochs", type=positive, nargs="*", default=[5, 20], help="draw samples after these epochs")
    options.add_argument("--seed", type=int, default=SEED)
    add_device_options(options)
    args = options.parse_args()

    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    out = args.out or Path("out") / f"ddpm_{args.condition}"
    check_writable(out / "state.safetensors")
    images, labels = (tensor.to(device) for tensor in load_mnist(args.data, "train", args.limit))
    recipe = replace(DDPM, epochs=args.epochs, batch_size=args.batch_size, seed=args.seed)
    schedule = linear_schedule()
    torch.manual_seed(args.seed)
    model = (ClassUNet if args.condition == "class" else TimeUNet)(args.width, schedule.num_timesteps)

    def loss_of(model, x_0, labels, generator):
        conditioning = (drop_classes(labels, generator),) if args.condition == "class" else ()
        return ddpm_loss(model, x_0, conditioning, schedule, generator)

    def draw(epoch: int, losses: list[float]):
        steps_per_epoch = len(losses) // epoch
        save_loss_curve(out / "loss.png", losses, steps_per_epoch, f"DDPM, {args.condition}-conditioned", args.seed)
        if epoch in args.sample_epochs:
            digits = range(10) if args.condition == "class" else [None]
            columns = 4 if args.condition == "class" else 10
            labels = [digit for digit in digits for _ in range(columns)]
            seeds = [args.seed + k for _ in digits for k in range(columns)]
            samples = sample_digits(model.eval(), labels, seeds, schedule)
            rows = [samples[i : i + columns] for i in range(0, len(samples), columns)]
            names = [str(digit) for digit in digits] if args.condition == "class" else []
            save_grid(out / f"samples_epoch{epoch:02d}.png", rows, row_labels=names, title=f"after epoch {epoch}", seed=args.seed)

    complete = fit(model, loss_of, images, labels, recipe, out, dtype=dtype, resume=args.resume, after_epoch=draw)
    print(f"trained: {out / 'weights.safetensors'}" if complete else f"stopped; go on with --resume --out {out}")


if __name__ == "__main__":
    run(main)
