"""The figures that the scripts write: pictures with labels, and with their making in the PNG's metadata."""

import io
import platform
import shlex
import sys
import textwrap
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
    Labels are wrapped: those of columns to the pictures' width.
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
    row_labels = [textwrap.fill(label, 30) for label in row_labels]
    column_labels = [textwrap.fill(label, max(cell_w // letter, 4)) for label in column_labels]
    left = 20 + letter * max([len(line) for label in row_labels for line in label.splitlines()], default=0)
    top = 20 + 40 * bool(title) + 30 * max([len(label.splitlines()) for label in column_labels], default=0)
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


def save_table(
    path: Path,
    rows: Sequence[Sequence[Tensor]],
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    title: str = "",
    seed: int = SEED,
):
    """Write pictures [3, H, W] in [-1, 1] as a labelled grid, and each beside it, PATH_ROW_COLUMN.png; say where."""
    rows = [[picture.detach().float().cpu() / 2 + 0.5 for picture in row] for row in rows]
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            save_image(path.with_stem(f"{path.stem}_{i}_{j}"), picture, seed)
    zoom = max(1, 128 // rows[0][0].shape[-1])
    labels = {"row_labels": row_labels, "column_labels": column_labels}
    save_grid(path, rows, **labels, title=title, zoom=zoom, seed=seed)
    print(path)


def save_gif(path: Path, frames: Sequence[Tensor], milliseconds: Sequence[int]):
    """Write pictures [3, H, W] in [0, 1] as an animation that repeats, each shown for so long."""
    from PIL import Image

    pictures = [Image.fromarray(to_bytes(frame)) for frame in frames]
    buffer = io.BytesIO()
    rest = {"append_images": pictures[1:], "duration": list(milliseconds), "loop": 0}
    pictures[0].save(buffer, format="gif", save_all=True, **rest)
    write_atomically(path, buffer.getvalue())
    print(path)


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

    metadata, buffer = PngInfo(), io.BytesIO()
    for key, value in figure_metadata(seed).items():
        metadata.add_itxt(key, value)
    Image.fromarray(to_bytes(picture)).save(buffer, format="png", pnginfo=metadata)
    write_atomically(path, buffer.getvalue())


def to_bytes(picture: Tensor):
    """A picture [3, H, W] in [0, 1] -> an array [H, W, 3] of bytes."""
    return (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
