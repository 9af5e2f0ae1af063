"""Figures: images with labels, shown in a notebook or saved.

    from ddpm.tools.figures import labelled_grid, save_grid

    rows = [images / 2 + 0.5, flip.view(images) / 2 + 0.5]  # two batches [3, 3, 128, 128]
    labels = {"row_labels": ["a light bulb", "a pear"], "column_labels": ["seed 1", "seed 2", "seed 3"]}
    labelled_grid(rows, **labels)  # at the end of a notebook's cell: shows itself
    save_grid("anagrams.png", rows, **labels, seed=1)

A PNG's metadata say how it was made: its labels, the seed, versions, and the command line if it was a script.
"""

import io
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ddpm.tools.files import write_atomically
from ddpm.tools.labels import DPI, FONT, SPACE, largest, readable, text_size, wrapped

MARGIN, GAP, LABEL_WIDTH = 15, 4, 300  # pixels: around a grid, between its images, of a row's label
Rows = Sequence[Sequence[Tensor]]


def labelled_grid(
    rows: Rows,
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    title: str = "",
    zoom: int | None = None,
) -> Image.Image:
    """Images as one image with labels, which a notebook shows.

    rows: of each row its images [C, H, W] in [0, 1], all of one size, C = 1 or 3; a batch [N, C, H, W] is a row
    zoom: how many pixels of the figure a pixel of an image gets, in width and height; by default as many as keep the
        image within 96 pixels
    Labels are wrapped, those of columns to the images' width; where one is larger still, the images move apart.
    Raises ValueError when there are no images, or of several sizes, or with values below -0.1, or another number
        of labels than rows or columns.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(grid_figure(rows, row_labels, column_labels, title, zoom))
    canvas.draw()
    return Image.fromarray(numpy.asarray(canvas.buffer_rgba())).convert("RGB")


def save_grid(
    path: str | Path,
    rows: Rows,
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    title: str = "",
    zoom: int | None = None,
    seed: int | None = None,
):
    """Write `labelled_grid` as a PNG, with its labels and its making in the metadata."""
    figure = grid_figure(rows, row_labels, column_labels, title, zoom)
    save_figure(path, figure, seed, [title, *row_labels, *column_labels])


def grid_figure(rows: Rows, row_labels: Sequence[str], column_labels: Sequence[str], title: str, zoom: int | None):
    """The matplotlib figure of `labelled_grid`."""
    from matplotlib.figure import Figure

    h, w = size_of_all(rows)
    num_columns = max(len(row) for row in rows)
    check_labels("row", row_labels, len(rows))
    check_labels("column", column_labels, num_columns)
    zoom = max(1, 96 // w) if zoom is None else zoom
    h, w = h * zoom, w * zoom
    row_labels = [wrapped(label, LABEL_WIDTH) for label in row_labels]
    column_labels = [wrapped(label, w) for label in column_labels]
    (beside, tallest), (widest, above) = largest(row_labels), largest(column_labels)
    row_h, column_w = max(h, tallest) + GAP, max(w, widest) + GAP
    grid_h, grid_w = row_h * len(rows), column_w * num_columns
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
    return figure


def size_of_all(rows: Rows) -> tuple[int, int]:
    """Of images [C, H, W] their H and W. Raises ValueError for what is no grid of images in [0, 1]."""
    shapes = sorted({tuple(image.shape) for row in rows for image in row})
    if len({shape[-2:] for shape in shapes}) != 1 or any(len(shape) != 3 or shape[0] not in (1, 3) for shape in shapes):
        found = ", ".join(str(list(shape)) for shape in shapes) or "none"
        raise ValueError(f"a grid has rows of images [1 or 3, H, W] of one size, not {found}")
    if min(image.min().item() for row in rows for image in row) < -0.1:
        raise ValueError("images are in [0, 1]: give x / 2 + 0.5, and clamp what is noisy")
    return shapes[0][-2:]


def check_labels(kind: str, labels: Sequence[str], count: int):
    """Raises ValueError unless there are none, or one for each row or column."""
    if labels and len(labels) != count:
        raise ValueError(f"give no {kind} labels, or one for each of the {count} {kind}s, not {len(labels)}")


def save_table(
    path: str | Path,
    rows: Rows,
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    title: str = "",
    seed: int | None = None,
):
    """Write images [3, H, W] in [-1, 1], on any device, as `save_grid` does, and each as `save_cells` does."""
    rows = [[(image.detach().float().cpu() / 2 + 0.5).clamp(0, 1) for image in row] for row in rows]
    labels = {"row_labels": row_labels, "column_labels": column_labels, "seed": seed}
    save_cells(path, rows, **labels)
    save_grid(path, rows, **labels, title=title, zoom=max(1, 128 // rows[0][0].shape[-1]))


def save_cells(
    path: str | Path,
    rows: Rows,
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    seed: int | None = None,
):
    """Write images [3, H, W] in [0, 1], each as PATH_ROW_COLUMN.png, with its row's and its column's label in it."""
    path = Path(path)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            labels = [*row_labels[i : i + 1], *column_labels[j : j + 1]]
            save_image(path.with_stem(f"{path.stem}_{i}_{j}"), image, seed=seed, labels=labels)


def save_image(
    path: str | Path,
    image: Tensor,
    *,
    seed: int | None = None,
    labels: Sequence[str] = (),
    metadata: Mapping[str, str] | None = None,
):
    """Write one image [3, H, W] in [0, 1] as a PNG, pixel for pixel, with its making and `metadata` in the metadata."""
    described, buffer = PngInfo(), io.BytesIO()
    for key, value in {**(metadata or {}), **making(seed, labels)}.items():
        described.add_itxt(key, value)
    Image.fromarray(to_bytes(image)).save(buffer, format="png", pnginfo=described)
    write_atomically(path, buffer.getvalue())


def save_loss_curve(
    path: str | Path, losses: Sequence[float], steps_per_epoch: int, title: str, seed: int | None = None
):
    """Write the training loss of every step, on a logarithmic axis, with its running mean over 100 steps."""
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


def save_curves(
    path: str | Path,
    panels: Sequence[tuple[dict[str, dict | float], dict]],
    seed: int | None = None,
    title: str = "",
    columns: int | None = None,
):
    """Write plots side by side; of each, its curves by label, and what matplotlib's axes.set takes, such as xlabel.

    A curve is {x: y}, or a number: a level.
    columns: how many plots are in a row, all when None
    """
    from matplotlib.figure import Figure

    columns = columns or len(panels)
    rows = len(panels) // columns
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows), dpi=DPI, layout="constrained")
    for axes, (curves, options) in zip(figure.subplots(rows, columns, squeeze=False).flat, panels, strict=True):
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


def save_figure(path: str | Path, figure, seed: int | None = None, labels: Sequence[str] = ()):
    """Write a matplotlib figure as a PNG with its metadata, atomically."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=figure.dpi, metadata=making(seed, labels))
    write_atomically(path, buffer.getvalue())


def making(seed: int | None, labels: Sequence[str] = ()) -> dict[str, str]:
    """What a PNG says of its making: its labels, the versions, a script's command line, and a seed if there is one."""
    described = {"Description": "\n".join(filter(None, labels))} if any(labels) else {}
    described["Software"] = f"torch {torch.__version__}, python {platform.python_version()}"
    if not hasattr(sys, "ps1"):  # which a notebook has, as every interactive Python; its command line says nothing
        described["Command"] = shlex.join(["python", *sys.argv])
    return described if seed is None else described | {"Seed": str(seed)}


def to_bytes(image: Tensor) -> numpy.ndarray:
    """An image [3, H, W] in [0, 1], cut off beyond these -> an array [H, W, 3] of bytes."""
    return (image.detach().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
