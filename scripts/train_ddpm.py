"""Train a DDPM on MNIST: time-conditioned (B4) or time- and class-conditioned (B5).

    python scripts/train_ddpm.py --condition class

Writes to out/ddpm_class: weights.safetensors, state.safetensors (for --resume), log.csv, loss.png, and
samples after epochs 5 and 20. Ctrl-C saves and stops; --resume goes on and ends with the same weights,
bit for bit, as an uninterrupted run on the same CPU with as many threads.
"""

from pathlib import Path

from shared.figures import save_grid, save_loss_curve
from shared.options import add_training_options, end_training, parser, run, start_training

from ddpm.losses import ddpm_loss
from ddpm.mnist import ClassUNet, TimeUNet, sample_digits
from ddpm.mnist.checkpoint import build
from ddpm.mnist.training import DDPM, drop_classes, fit
from ddpm.schedule import linear_schedule, linspace_timesteps


def main():
    options = parser(__doc__)
    options.add_argument(
        "--condition", required=True, choices=["time", "class"], help="what it sees beside x_t: t, or t and the digit"
    )
    options.add_argument("--out", type=Path, help="folder for the run (default: out/ddpm_time or out/ddpm_class)")
    options.add_argument("--sample-steps", type=int, help="timesteps that the samples visit (default: all 300)")
    add_training_options(options, DDPM, width=64, sample_epochs=[5, 20])
    args = options.parse_args()
    by_class = args.condition == "class"
    args.out = args.out or Path("out") / f"ddpm_{args.condition}"

    schedule = linear_schedule()
    if args.sample_steps is not None:
        linspace_timesteps(schedule.num_timesteps, args.sample_steps)  # refuses a wrong number now, not epochs later
    recipe, images, labels, dtype = start_training(args, DDPM)
    kind = ClassUNet if by_class else TimeUNet
    model = build(kind, width=args.width, num_timesteps=schedule.num_timesteps)

    def loss_of(model, x_0, labels, generator):
        conditioning = (drop_classes(labels, generator),) if by_class else ()
        return ddpm_loss(model, x_0, conditioning, schedule, generator)

    def draw(epoch: int, losses: list[float]):
        save_loss_curve(
            args.out / "loss.png", losses, len(losses) // epoch, f"DDPM, {args.condition}-conditioned", args.seed
        )
        if epoch in (*args.sample_epochs, args.epochs):
            labels = list(range(10)) * 4 if by_class else None
            seeds = [args.seed + (k // 10 if by_class else k) for k in range(40)]  # a row of digits shares its noise
            samples = sample_digits(model.eval(), labels, seeds, schedule, num_steps=args.sample_steps)
            names = [str(digit) for digit in range(10)] if by_class else []
            title = f"after epoch {epoch}" + (", γ = 5" if by_class else "")
            path = args.out / f"samples_epoch{epoch:02d}.png"
            save_grid(path, samples.split(10), column_labels=names, title=title, seed=args.seed)

    options = {"dtype": dtype, "resume": args.resume, "start": args.start, "after_epoch": draw}
    end_training(args, fit(model, loss_of, images, labels, recipe, args.out, **options))


if __name__ == "__main__":
    run(main)
