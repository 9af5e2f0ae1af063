"""What the scripts share: options, devices, one-line errors, labelled figures."""

import argparse
import io
import math
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ddpm.data import load_mnist
from ddpm.files import write_atomically
from ddpm.training import Recipe
from ifmodel import UNet, load_unet

SEED = 20040805
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong with an option in one line; the usage is in --help."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose --help is the script's docstring."""
    return OneLineParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_device_options(options: argparse.ArgumentParser, dtypes: Sequence[str] = ("float32", "bfloat16")):
    options.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    options.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", *dtypes],
        help="auto: bfloat16 where the hardware has it, else float32",
    )


def add_training_options(options: argparse.ArgumentParser, recipe: Recipe, width: int, sample_epochs: Sequence[int]):
    """The options of both training scripts; `recipe` gives the defaults."""
    options.add_argument(
        "--data",
        type=Path,
        default=Path("data"),
        help="folder holding MNIST/raw; downloaded there when absent (default: data)",
    )
    options.add_argument("--resume", action="store_true", help="go on with the run in --out")
    options.add_argument("--start", type=Path, metavar="FILE", help="go on from weights whose training state is lost")
    options.add_argument("--epochs", type=positive, default=recipe.epochs, help=f"default: {recipe.epochs}")
    options.add_argument("--batch-size", type=positive, default=recipe.batch_size, help=f"default: {recipe.batch_size}")
    options.add_argument("--width", type=positive, default=width, help=f"D, the UNet's hidden width (default: {width})")
    options.add_argument("--limit", type=positive, help="train on the first digits only")
    options.add_argument(
        "--sample-epochs",
        type=positive,
        nargs="*",
        default=sample_epochs,
        help="draw samples after these epochs and after the last",
    )
    options.add_argument("--seed", type=int, default=SEED, help=f"default: {SEED}")
    add_device_options(options)


def start_training(args: argparse.Namespace, recipe: Recipe) -> tuple[Recipe, Tensor, Tensor, torch.dtype]:
    """From the training options: the recipe, the training digits and labels on the device, and the dtype."""
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    check_writable(args.out / "state.safetensors")
    images, labels = load_mnist(args.data, "train", args.limit)
    recipe = replace(recipe, epochs=args.epochs, batch_size=args.batch_size, seed=args.seed)
    torch.manual_seed(args.seed)  # the model that the script builds next starts from it
    return recipe, images.to(device), labels.to(device), dtype


def end_training(args: argparse.Namespace, complete: bool):
    """Say where the weights are, or how to go on; a stopped run ends with status 130, as Ctrl-C does."""
    if complete:
        print(f"trained: {args.out / 'weights.safetensors'}")
    else:
        print(
            f"stopped and saved: go on with the same command and --resume (the run is in {args.out})", file=sys.stderr
        )
        sys.exit(130)


def load_stage(source: str, stage: int, dtype: torch.dtype, device: torch.device) -> UNet:
    """A stage's UNet: half precision from the fp16 files where there are some, full precision from the others.

    Raises ValueError when the model is of the other stage.
    """
    variants = [None, "fp16"] if dtype == torch.float32 else ["fp16", None]
    for variant in variants:
        try:
            unet = load_unet(source, dtype, device, variant)
            break
        except FileNotFoundError:
            if variant == variants[-1]:
                raise
    if dtype == torch.float32 and variant == "fp16":
        print(f"{source} has its weights in float16 alone: computing with them in float32", file=sys.stderr)
    found = 2 if unet.config.class_embed_type else 1
    if found != stage:
        option = {1: "--model", 2: "--upscaler"}[found]
        raise ValueError(f"{source} is a stage-{found} model, not a stage-{stage} one: give it as {option}")
    return unet


@contextmanager
def progress(steps: int, description: str) -> Iterator[Callable[[int, int, Tensor, Tensor], None]]:
    """A progress bar; gives the callback that moves it and refuses the first x̂_0 that is not finite."""
    with tqdm(total=steps, desc=description, unit="step") as bar:

        def callback(step: int, t: int, x_t: Tensor, x_0: Tensor):
            bar.update()
            if not x_0.isfinite().all():
                where = f"{description}, step {step} (t = {t})"
                raise ValueError(f"{where}: the picture is no longer finite; try --dtype float32, or less --guidance")

        yield callback


def save_image(path: Path, picture: Tensor, seed: int):
    """Write one picture [3, H, W] in [0, 1] as it is, pixel for pixel, with its making in the metadata."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    metadata, buffer = PngInfo(), io.BytesIO()
    for key, value in figure_metadata(seed).items():
        metadata.add_itxt(key, value)
    Image.fromarray(pixels).save(buffer, format="png", pnginfo=metadata)
    write_atomically(path, buffer.getvalue())


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    value = int(text) if text.lstrip("-").isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def number(text: str) -> float:
    """An argparse type: a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def pick_device(name: str) -> torch.device:
    """--device to a device that is there. Raises ValueError otherwise."""
    there = ["cpu"]
    if torch.cuda.is_available():
        there = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count())), "cpu"]
    elif torch.backends.mps.is_available():
        there = ["mps", "cpu"]
    if name == "auto":
        return torch.device(there[0])
    if name not in there:
        raise ValueError(f"device {name!r} is not on this machine: choose from auto, {', '.join(there)}")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """--dtype to a dtype; auto is bfloat16 only where it is native, since emulated bfloat16 is many times slower."""
    if name == "float16" and device.type == "cpu":
        raise ValueError("float16 is for GPUs: on the CPU, use --dtype float32, or bfloat16 where it is native")
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if native else torch.float32


def run(main: Callable[[], None]):
    """Run a script: what the user can mend is told in one line, with exit status 2."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        message = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.filename else str(error)
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)


def check_writable(path: Path, suffix: str | None = None):
    """Refuse an output file early: before the work, not after it. Raises ValueError."""
    if suffix is not None and path.suffix != suffix:
        raise ValueError(f"{path} must end in {suffix}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ValueError(
            f"cannot write in {path.parent} ({error.strerror}): choose another place for {path.name}"
        ) from None


def figure_metadata(seed: int) -> dict[str, str]:
    """What a PNG says of its making: the command line, the seed and the versions."""
    return {
        "Software": f"torch {torch.__version__}, python {platform.python_version()}",
        "Command": " ".join(["python", *sys.argv]),
        "Seed": str(seed),
    }


def save_grid(
    path: Path,
    rows: Sequence[Sequence[Tensor]],
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    title: str = "",
    zoom: int = 3,
    gap: int = 4,
    seed: int = SEED,
):
    """Write pictures [C, H, W] in [0, 1], all of one size, as a labelled grid, one list a row.

    zoom: how many pixels of the figure a pixel of a picture gets, each way; gap: pixels between pictures
    """
    from matplotlib.figure import Figure

    _, h, w = rows[0][0].shape
    cell_h, cell_w, columns = h * zoom + gap, w * zoom + gap, max(len(row) for row in rows)
    canvas = torch.ones(len(rows) * cell_h - gap, columns * cell_w - gap, 3)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            pixels = picture.cpu().clamp(0, 1).permute(1, 2, 0).repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
            canvas[i * cell_h : i * cell_h + h * zoom, j * cell_w : j * cell_w + w * zoom] = pixels

    dpi, letter = 150, 13  # of the figure's pixels; letter: the width of one at the font size below
    left = 20 + letter * max([len(label) for label in row_labels], default=0)
    top = 20 + 40 * bool(title) + 30 * bool(column_labels)
    height, width = top + canvas.shape[0] + 15, max(left + canvas.shape[1] + 15, letter * len(title) + 30)
    figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi)
    figure.figimage(canvas.numpy(), left, 15)

    def write(x: float, y: float, text: str, **where):
        figure.text(x / width, 1 - y / height, text, fontsize=9, **where)

    for i, label in enumerate(row_labels):
        write(left - 10, top + i * cell_h + h * zoom / 2, label, ha="right", va="center")
    for j, label in enumerate(column_labels):
        write(left + j * cell_w + w * zoom / 2, top - 8, label, ha="center", va="bottom")
    if title:
        write(left, 12, title, ha="left", va="top")
    save_figure(path, figure, seed)


def save_loss_curve(path: Path, losses: Sequence[float], steps_per_epoch: int, title: str, seed: int):
    """Write the training loss of every step, on a logarithmic axis, with its running mean over 100 steps."""
    import numpy
    from matplotlib.figure import Figure

    steps = numpy.asarray(losses)
    window = min(100, len(losses))
    mean = numpy.convolve(steps, numpy.full(window, 1 / window), mode="valid")
    figure = Figure(figsize=(6.4, 3.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(numpy.arange(1, len(steps) + 1) / steps_per_epoch, steps, color="0.8", linewidth=0.6, label="each step")
    axes.plot(numpy.arange(window, len(steps) + 1) / steps_per_epoch, mean, color="C0", label=f"mean of {window} steps")
    axes.set(xlabel="epoch", ylabel="loss (mean squared error)", yscale="log", title=title)
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    save_figure(path, figure, seed)


def save_figure(path: Path, figure, seed: int):
    """Write a matplotlib figure as a PNG with its metadata, atomically."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=figure.dpi, metadata=figure_metadata(seed))
    write_atomically(path, buffer.getvalue())
