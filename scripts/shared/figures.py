"""The figures that the scripts write: images with labels, and with their making in the PNG's metadata."""

import io
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from shared.labels import DPI, FONT, SPACE, largest, readable, text_size, wrapped
from shared.options import SEED

import torch
from torch import Tensor

from ddpm.files import write_atomically

MARGIN, GAP, LABEL_WIDTH = 15, 4, 300  # pixels: around a grid, between its images, of a row's label


def figure_metadata(seed: int, labels: Sequence[str] = (), settings: str = "") -> dict[str, str]:
    """What a PNG says of its making: its labels, the command line, the seed, the versions, and settings if any."""
    described = {"Settings": settings} if settings else {}
    described |= {"Description": "\n".join(filter(None, labels))} if any(labels) else {}
    return described | {
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
    seed: int = SEED,
):
    """Write images [C, H, W] in [0, 1], all of one size, as a labelled grid, one list a row.

    zoom: how many pixels of the figure a pixel of an image gets, in width and height
    Labels are wrapped, those of columns to the images' width; where one is larger still, the images move apart.
    """
    from matplotlib.figure import Figure

    labels = [title, *row_labels, *column_labels]
    h, w = (side * zoom for side in rows[0][0].shape[-2:])
    row_labels = [wrapped(label, LABEL_WIDTH) for label in row_labels]
    column_labels = [wrapped(label, w) for label in column_labels]
    (beside, tallest), (widest, above) = largest(row_labels), largest(column_labels)
    row_h, column_w = max(h, tallest) + GAP, max(w, widest) + GAP
    grid_h, grid_w = row_h * len(rows), column_w * max(len(row) for row in rows)
    title = wrapped(title, max(grid_w, LABEL_WIDTH))
    title_w, title_h = text_size(title)
    top, left = MARGIN + title_h + (SPACE if title else 0) + above, MARGIN + beside
    height, width = top + grid_h + MARGIN, left + max(grid_w, title_w) + MARGIN
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)

    def write(x: float, y: float, text: str, **where):
        text, fonts = readable(text)
        figure.text(x / width, 1 - y / height, text, **FONT, family=fonts, **where)

    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            pixels = to_bytes(image.expand(3, -1, -1)).repeat(zoom, 0).repeat(zoom, 1)
            x, y = left + j * column_w + (column_w - w) // 2, top + i * row_h + (row_h - h) // 2
            figure.figimage(pixels, x, height - y - h)
    for i, label in enumerate(row_labels):
        write(left - SPACE, top + (i + 0.5) * row_h, label, ha="right", va="center")
    for j, label in enumerate(column_labels):
        write(left + (j + 0.5) * column_w, top - SPACE, label, ha="center", va="bottom")
    write(left, MARGIN, title, ha="left", va="top")
    save_figure(path, figure, seed, labels)


def save_table(
    path: Path,
    rows: Sequence[Sequence[Tensor]],
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    title: str = "",
    seed: int = SEED,
):
    """Write images [3, H, W] in [-1, 1] as a labelled grid, and each as a file, as `save_cells` does; say where."""
    rows = [[image.detach().float().cpu() / 2 + 0.5 for image in row] for row in rows]
    labels = {"row_labels": row_labels, "column_labels": column_labels, "seed": seed}
    save_cells(path, rows, **labels)
    save_grid(path, rows, **labels, title=title, zoom=max(1, 128 // rows[0][0].shape[-1]))
    print(path)


def save_cells(
    path: Path,
    rows: Sequence[Sequence[Tensor]],
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    seed: int,
):
    """Write images [3, H, W] in [0, 1], each as PATH_ROW_COLUMN.png, with its row's and its column's label in it."""
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            labels = [*row_labels[i : i + 1], *column_labels[j : j + 1]]
            save_image(path.with_stem(f"{path.stem}_{i}_{j}"), image, seed, labels)


def save_gif(path: Path, frames: Sequence[Tensor], milliseconds: Sequence[int]):
    """Write images [3, H, W] in [0, 1] as an animation that repeats, each shown for so long."""
    from PIL import Image

    images = [Image.fromarray(to_bytes(frame)) for frame in frames]
    buffer = io.BytesIO()
    rest = {"append_images": images[1:], "duration": list(milliseconds), "loop": 0}
    images[0].save(buffer, format="gif", save_all=True, **rest)
    write_atomically(path, buffer.getvalue())
    print(path)


def save_loss_curve(path: Path, losses: Sequence[float], steps_per_epoch: int, title: str, seed: int):
    """Write the training loss of every step, on a logarithmic axis, with its running mean over 100 steps."""
    import numpy
    from matplotlib.figure import Figure

    steps = numpy.asarray(losses)
    window = min(100, len(losses))
    mean = numpy.convolve(steps, numpy.full(window, 1 / window), mode="valid")
    figure = Figure(figsize=(6.4, 3.6), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(numpy.arange(1, len(steps) + 1) / steps_per_epoch, steps, color="0.8", linewidth=0.6, label="each step")
    axes.plot(numpy.arange(window, len(steps) + 1) / steps_per_epoch, mean, color="C0", label=f"mean of {window} steps")
    axes.set(xlabel="epoch", ylabel="loss (mean squared error)", yscale="log", title=title)
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    save_figure(path, figure, seed)


def save_curves(path: Path, panels: Sequence[tuple[dict[str, dict | float], dict]], seed: int, title: str = ""):
    """Write plots side by side; of each, its curves by label, and what matplotlib's axes.set takes, such as xlabel.

    A curve is {x: y}, or a number: a level.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(panels), 3.4), dpi=DPI, layout="constrained")
    for axes, (curves, options) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for label, curve in curves.items():
            if isinstance(curve, dict):
                axes.plot(list(curve), list(curve.values()), "o-", label=label)
            else:
                axes.axhline(curve, color="0.5", linestyle=":", label=label)
        axes.set(**options)
        axes.xaxis.minorticks_off()
        axes.grid(alpha=0.3)
        if any(curves):
            axes.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    save_figure(path, figure, seed)


def save_figure(path: Path, figure, seed: int, labels: Sequence[str] = ()):
    """Write a matplotlib figure as a PNG with its metadata, atomically."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=figure.dpi, metadata=figure_metadata(seed, labels))
    write_atomically(path, buffer.getvalue())


def save_image(path: Path, image: Tensor, seed: int, labels: Sequence[str] = (), settings: str = ""):
    """Write one image [3, H, W] in [0, 1] as it is, pixel for pixel, with its making in the metadata."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    metadata, buffer = PngInfo(), io.BytesIO()
    for key, value in figure_metadata(seed, labels, settings).items():
        metadata.add_itxt(key, value)
    Image.fromarray(to_bytes(image)).save(buffer, format="png", pnginfo=metadata)
    write_atomically(path, buffer.getvalue())


def to_bytes(image: Tensor):
    """An image [3, H, W] in [0, 1] -> an array [H, W, 3] of bytes."""
    return (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
