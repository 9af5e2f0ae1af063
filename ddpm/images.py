"""Images of any size and mode, as people have them."""

import warnings
from pathlib import Path

import numpy
from PIL import Image, ImageOps

from ddpm.files import reading
from ddpm.memory import check_memory


def open_image(path: str | Path, least: tuple[int, int]) -> Image.Image:
    """PIL's image of a file, upright; a large JPEG is read at a fraction of its size, not below `least`, (h, w).

    Raises ValueError when it is no image, or has more pixels than the memory holds.
    """
    Image.MAX_IMAGE_PIXELS = None  # the memory is asked instead
    with reading(path, "image"):
        image = Image.open(path)
        image.draft("RGB", least[::-1])
        (w, h), copies = image.size, 40 if image.mode.startswith(("I", "F")) else 16  # bytes a pixel, of all copies
        check_memory(copies * w * h, f"reading {w} × {h} pixels")
        image.load()
        return ImageOps.exif_transpose(image)


def eight_bits(image: Image.Image, path: str | Path) -> Image.Image:
    """An image of any mode as RGB, or as RGBA when some of it is transparent.

    White is 65535 in integers of more than 8 bits, or 4095 or 255 where none is larger; in floating point it is 1, or
    the largest value beyond 1, and black is 0, or -1 where there are negative values. Warns of all but the first.
    Raises ValueError for values of no such range, or that are no numbers.
    """
    if image.mode.startswith(("I", "F")):  # PIL's own conversion would clip them
        pixels = numpy.asarray(image, dtype=numpy.float64)
        least, most = pixels.min(), pixels.max()  # NaN if one is
        whole, signed = image.mode.startswith("I"), least < -0.1  # a little below 0 is a resampled edge
        low, high = (0, 65535) if whole else (-1.1, 1.1) if signed else (-0.1, 1e30)
        if not low <= least <= most <= high:
            raise ValueError(f"{path} has values from {least:g} to {most:g}: save it with 8 bits, or with 16")
        white = next(white for white in (255, 4095, 65535) if most <= white) if whole else max(most, 1)
        if whole and 0 < most <= 4095:
            warnings.warn(f"{path}: no value is above {most:g}, so {white} is white, not 65535", stacklevel=3)
        if signed:
            warnings.warn(f"{path} has values down to {least:g}: -1 is black and 1 is white", stacklevel=3)
            pixels, white = (pixels + 1) / 2, 1
        image = Image.fromarray((pixels.clip(0, white) / white * 255).round().astype(numpy.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] < 255:
            return image
    return image.convert("RGB")
