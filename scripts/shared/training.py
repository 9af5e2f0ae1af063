"""What the scripts that train share: options, how a run begins and ends, and the training of digits."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from shared.options import add_common_options, add_data_option, check_writable, number, pick, positive

import torch
from torch import Tensor, nn

from ddpm.mnist.data import load_mnist
from ddpm.mnist.training import Recipe, fit
from ddpm.tools.figures import save_grid, save_loss_curve
from ddpm.tools.runs import STATE, check_folder


def add_run_options(options: ArgumentParser, out: str):
    """--out and --resume, --seed, --device and --dtype; {condition} in `out` stands for that option."""
    add_common_options(options, out)
    options.add_argument("--resume", action="store_true", help="go on with the run in --out")


def add_digits_options(options: ArgumentParser, recipe: Recipe, width: int, sample_epochs: Sequence[int], out: str):
    """The options of all trainings on MNIST; `recipe` is what the help names, that of `train_digits` decides."""
    add_run_options(options, out)
    add_data_option(options)
    options.add_argument("--start", type=Path, metavar="FILE", help="go on from weights whose training state is lost")
    options.add_argument("--epochs", type=positive, help=f"default: {recipe.epochs}")
    options.add_argument("--batch-size", type=positive, help=f"default: {recipe.batch_size}")
    help = f"of the learning rate over the whole run, 1 to keep it as it is (default: {recipe.decay:g})"
    options.add_argument("--decay", type=number, help=help)
    help = "use averaged weights, of which each step keeps so much, such as 0.999 (default: the last weights)"
    options.add_argument("--average", type=number, default=0.0, metavar="SHARE", help=help)
    options.add_argument("--width", type=positive, default=width, help=f"D, the UNet's hidden width (default: {width})")
    options.add_argument("--limit", type=positive, help="train on the first digits only")
    shown = "draw samples after these epochs and after the last"
    options.add_argument("--sample-epochs", type=positive, nargs="*", default=sample_epochs, help=shown)


def check_run(args: Namespace):
    """Refuse an --out that cannot be written to, or resumed from, before anything is made. Raises ValueError."""
    check_writable(args.out / STATE)
    check_folder(args.out, args.resume)


def end_training(args: Namespace, complete: bool, trained: str = "weights.safetensors"):
    """Say where the weights are, or how to go on; a stopped run ends with status 130, as Ctrl-C does."""
    if not complete:
        message = "stopped and saved: go on with the same command and --resume"
        print(f"{message} (the run is in {args.out})", file=sys.stderr)
        sys.exit(130)
    print(f"trained: {args.out / trained}")


def train_digits(
    args: Namespace,
    recipe: Recipe,
    new_model: Callable[[], nn.Module],
    loss_of: Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor],
    title: str,
    draw: Callable[[nn.Module, int], None],
):
    """Train on MNIST; loss.png is written after each epoch, and draw(model, epoch) is called after --sample-epochs."""
    args.out = Path(str(args.out).replace("{condition}", getattr(args, "condition", "")))
    chosen = {name: getattr(args, name) for name in ("epochs", "batch_size", "decay", "average", "seed")}
    recipe = replace(recipe, **{name: value for name, value in chosen.items() if value is not None})
    if not 0 < recipe.decay <= 1 or not 0 <= recipe.average < 1:
        given = f"{recipe.decay:g} and {recipe.average:g}"
        raise ValueError(f"--decay must be in (0, 1], --average in [0, 1), not {given}")
    device, dtype = pick(args)
    check_run(args)
    images, labels = (tensor.to(device) for tensor in load_mnist(args.data, "train", args.limit))
    torch.manual_seed(args.seed)

    def after_epoch(model: nn.Module, epoch: int, losses: list[float]):
        save_loss_curve(args.out / "loss.png", losses, len(losses) // epoch, title, args.seed)
        if epoch in (*args.sample_epochs, recipe.epochs):
            draw(model, epoch)

    options = {"dtype": dtype, "resume": args.resume, "start": args.start, "after_epoch": after_epoch}
    end_training(args, fit(new_model(), loss_of, images, labels, recipe, args.out, **options))


def save_samples(args: Namespace, epoch: int, sample: Callable[[list[int] | None, list[int]], Tensor]):
    """Forty samples as samples_epochNN.png; sample(labels, seeds) draws them, without labels if there is no class."""
    by_class = args.condition == "class"
    labels = list(range(10)) * 4 if by_class else None
    seeds = [args.seed + (k // 10 if by_class else k) for k in range(40)]  # a row of digits shares its noise
    names = [str(digit) for digit in range(10)] if by_class else []
    title, path = f"after epoch {epoch}" + ", γ = 5" * by_class, args.out / f"samples_epoch{epoch:02d}.png"
    save_grid(path, sample(labels, seeds).split(10), column_labels=names, title=title, seed=args.seed)
