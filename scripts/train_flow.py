"""Train a flow on MNIST: time-conditioned (B6) or time- and class-conditioned (B7), as the newer Part B asks.

    python scripts/train_flow.py --condition class
    python scripts/train_flow.py --condition time --from-ddpm --limit 30000

Writes to out/flow_class: weights.safetensors, state.safetensors (for --resume), log.csv, loss.png, and
samples after epochs 1, 5 and 10. --from-ddpm begins with the shipped DDPM of that condition and takes a tenth of the
learning rate, which falls to 0.03 of that in 4 epochs: for those who cannot wait. Ctrl-C saves and stops.
"""

from functools import partial

from shared.options import parser, positive, run
from shared.training import add_digits_options, save_samples, train_digits

from ddpm.flow import flow_loss
from ddpm.mnist import ClassFlow, TimeFlow, load_model, sample_flow
from ddpm.mnist.checkpoint import build
from ddpm.mnist.training import FLOW, FLOW_FROM_DDPM, drop_classes, flow_from_ddpm


def main():
    options = parser(__doc__, "--condition time|class ")
    help = "what the model is told: t, or t and the digit"
    options.add_argument("--condition", required=True, choices=["time", "class"], help=help)
    options.add_argument("--sample-steps", type=positive, default=50, help="Euler steps of the samples (default: 50)")
    options.add_argument("--from-ddpm", action="store_true", help="begin with the shipped DDPM's weights")
    add_digits_options(options, FLOW, width=64, sample_epochs=[1, 5, 10], out="out/flow_{condition}")
    args = options.parse_args()
    by_class = args.condition == "class"
    if args.from_ddpm and args.width != 64:
        raise ValueError("--from-ddpm is for --width 64, that of the shipped DDPMs")

    def new_model() -> TimeFlow:
        if args.from_ddpm:
            return flow_from_ddpm(load_model(f"ddpm_{args.condition}"))
        return build(ClassFlow if by_class else TimeFlow, width=args.width)

    def loss_of(model, x_1, labels, generator):
        return flow_loss(model, x_1, (drop_classes(labels, generator),) if by_class else (), generator)

    def draw(model, epoch: int):
        save_samples(args, epoch, partial(sample_flow, model, num_steps=args.sample_steps))

    recipe = FLOW_FROM_DDPM if args.from_ddpm else FLOW
    train_digits(args, recipe, new_model, loss_of, f"flow, {args.condition}-conditioned", draw)


if __name__ == "__main__":
    run(main)
