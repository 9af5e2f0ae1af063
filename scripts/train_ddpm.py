"""Train a DDPM on MNIST: time-conditioned (B4) or time- and class-conditioned (B5).

    python scripts/train_ddpm.py --condition class

Writes to out/ddpm_class: weights.safetensors, state.safetensors (for --resume), log.csv, loss.png, and
samples after epochs 5 and 20. Ctrl-C saves and stops; --resume goes on and ends with the same weights,
bit for bit, as an uninterrupted run on the same CPU with as many threads.
"""

from functools import partial

from shared.options import parser, run
from shared.training import add_digits_options, save_samples, train_digits

from ddpm.losses import ddpm_loss
from ddpm.mnist import ClassUNet, TimeUNet, sample_digits
from ddpm.mnist.checkpoint import build
from ddpm.mnist.training import DDPM, drop_classes
from ddpm.schedule import linear_schedule, linspace_timesteps


def main():
    options = parser(__doc__, "--condition time|class ")
    help = "what it sees besides x_t: t, or t and the digit"
    options.add_argument("--condition", required=True, choices=["time", "class"], help=help)
    options.add_argument("--sample-steps", type=int, help="timesteps that the samples visit (default: all 300)")
    add_digits_options(options, DDPM, width=64, sample_epochs=[5, 20], out="out/ddpm_{condition}")
    args = options.parse_args()
    by_class, schedule = args.condition == "class", linear_schedule()
    if args.sample_steps is not None:
        linspace_timesteps(schedule.num_timesteps, args.sample_steps)  # refuses a wrong number now, not epochs later
    kind = ClassUNet if by_class else TimeUNet
    new_model = partial(build, kind, width=args.width, num_timesteps=schedule.num_timesteps)

    def loss_of(model, x_0, labels, generator):
        conditioning = (drop_classes(labels, generator),) if by_class else ()
        return ddpm_loss(model, x_0, conditioning, schedule, generator)

    def draw(model, epoch: int):
        options = {"schedule": schedule, "num_steps": args.sample_steps}
        save_samples(args, epoch, partial(sample_digits, model, **options))

    train_digits(args, DDPM, new_model, loss_of, f"DDPM, {args.condition}-conditioned", draw)


if __name__ == "__main__":
    run(main)
