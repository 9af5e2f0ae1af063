"""The figures that the scripts write: pictures with labels, and with their making in the PNG's metadata."""

import io
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from common import SEED
from torch import Tensor

from ddpm.files import write_atomically


def figure_metadata(seed: int) -> dict[str, str]:
    """What a PNG says of its making: the command line, the seed and the versions."""
    return {
        "Software": f"torch {torch.__version__}, python {platform.python_version()}",
        "Command": shlex.join(["python", *sys.argv]),
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
        figure.text(x / width, 1 - y / height, text, fontsize=9, parse_math=False, **where)  # "$5" is no formula

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
