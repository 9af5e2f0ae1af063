"""Train a flow on MNIST: time-conditioned (B6) or time- and class-conditioned (B7), as the newer Part B asks.

    python scripts/train_flow.py --condition class
    python scripts/train_flow.py --condition class --from-ddpm --limit 10000 --epochs 4

Writes to out/flow_class: weights.safetensors, state.safetensors (for --resume), log.csv, loss.png, and
samples after epochs 1, 5 and 10. --from-ddpm begins with the shipped class-conditioned DDPM, which is the same
network, and takes a tenth of the learning rate: for those who cannot wait. Ctrl-C saves and stops.
"""

from pathlib import Path

from shared.figures import save_grid, save_loss_curve
from shared.options import add_training_options, end_training, parser, positive, run, start_training

from ddpm.flow import flow_loss
from ddpm.mnist import ClassFlow, ClassUNet, TimeFlow, load_model, sample_flow
from ddpm.mnist.checkpoint import build
from ddpm.mnist.training import FLOW, FLOW_FROM_DDPM, drop_classes, fit, flow_from_ddpm


def main():
    options = parser(__doc__)
    options.add_argument(
        "--condition", required=True, choices=["time", "class"], help="what the model is told: t, or t and the digit"
    )
    options.add_argument("--out", type=Path, help="folder for the run (default: out/flow_time or out/flow_class)")
    options.add_argument("--sample-steps", type=positive, default=50, help="Euler steps of the samples (default: 50)")
    options.add_argument("--from-ddpm", action="store_true", help="begin with the shipped ddpm_class's weights")
    add_training_options(options, FLOW, width=64, sample_epochs=[1, 5, 10])
    args = options.parse_args()
    by_class = args.condition == "class"
    args.out = args.out or Path("out") / f"flow_{args.condition}"
    if args.from_ddpm and not (by_class and args.width == 64):
        raise ValueError("--from-ddpm is for --condition class and --width 64, the network of the shipped DDPM")

    recipe, images, labels, dtype = start_training(args, FLOW_FROM_DDPM if args.from_ddpm else FLOW)
    if args.from_ddpm:
        model = flow_from_ddpm(load_model("ddpm_class", ClassUNet))
    else:
        model = build(ClassFlow if by_class else TimeFlow, width=args.width)

    def loss_of(model, x_1, labels, generator):
        return flow_loss(model, x_1, (drop_classes(labels, generator),) if by_class else (), generator)

    def draw(epoch: int, losses: list[float]):
        title = f"flow, {args.condition}-conditioned"
        save_loss_curve(args.out / "loss.png", losses, len(losses) // epoch, title, args.seed)
        if epoch in (*args.sample_epochs, args.epochs):
            labels = list(range(10)) * 4 if by_class else None
            seeds = [args.seed + (k // 10 if by_class else k) for k in range(40)]  # a row of digits shares its noise
            samples = sample_flow(model.eval(), labels, seeds, num_steps=args.sample_steps)
            names = [str(digit) for digit in range(10)] if by_class else []
            title = f"after epoch {epoch}" + (", γ = 5" if by_class else "")
            path = args.out / f"samples_epoch{epoch:02d}.png"
            save_grid(path, samples.split(10), column_labels=names, title=title, seed=args.seed)

    options = {"dtype": dtype, "resume": args.resume, "start": args.start, "after_epoch": draw}
    end_training(args, fit(model, loss_of, images, labels, recipe, args.out, **options))


if __name__ == "__main__":
    run(main)
