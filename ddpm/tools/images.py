"""Images of any size and mode, as people have them, and masks of what is to be made new in them."""

import re
import warnings
from pathlib import Path

import numpy
import torch
from PIL import ExifTags, Image, ImageChops, ImageOps
from torch import Tensor

from ddpm.tools.files import reading
from ddpm.tools.memory import check_memory


def read_image(path: str | Path, size: tuple[int, int]) -> Tensor:
    """An image as [1, 3, H, W] in [-1, 1]: upright, on white where transparent, its centre cut to shape and resized.

    path: a file that PIL reads. Raises FileNotFoundError when there is none, ValueError when it is no image.
    """
    image = load_image(path, size)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image = ImageOps.fit(image, size[::-1], Image.Resampling.LANCZOS)
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1)[None] / 127.5 - 1


def read_mask(source: str, size: tuple[int, int], image: str | Path) -> Tensor:
    """A mask [1, 1, H, W] for an image, 1 where new content goes and 0 where the image stays.

    source: a file, white for the hole, cut to shape and resized as `read_image` does with the image;
        "rectangle:TOP,LEFT,BOTTOM,RIGHT" or "circle:Y,X,RADIUS" in fractions of the height and the width of what is
        cut out (the radius: of the shorter side)
    image: the image's own file
    Warns of a file with greys or transparency, or of another size than the image. Raises FileNotFoundError
    for a file that is not there or a shape that is neither, ValueError for what cannot be read, and for a mask with no
    hole or nothing but one.
    """
    shape = re.fullmatch(r"(rectangle|circle):(.*)", source, re.IGNORECASE)
    if not shape:
        check_there(source, "; a mask is a file, rectangle:TOP,LEFT,BOTTOM,RIGHT or circle:Y,X,RADIUS")
    mask = mask_of_shape(shape[1].lower(), shape[2], size) if shape else mask_of_file(source, size, image)
    if mask.all() or not mask.any():
        hint = "its numbers are fractions, from 0 to 1" if shape else "white is the hole"
        raise ValueError(f"the mask {source} {'is all hole' if mask.all() else 'has no hole'}: {hint}")
    return mask.float()[None, None]


def mask_of_file(path: str | Path, size: tuple[int, int], image: str | Path) -> Tensor:
    """The hole that a file shows, [H, W] of bool; warns of what has more than one reading.

    In a file with transparency, white paint is the hole, on a transparent layer or on black; where what is seen is
    neither, it is what was erased.
    """
    drawn, notes = load_image(path, size), []
    hole = drawn.convert("L")
    if drawn.mode == "RGBA":
        alpha = drawn.getchannel("A")
        seen = numpy.asarray(drawn.convert("RGB"))[numpy.asarray(alpha) > 127]
        white, black = (seen >= 240).all(1), (seen < 16).all(1)
        painted = white.any() and (white | black).mean() > 0.95  # but for soft edges
        if alpha.getextrema()[0] <= 127:  # else all is seen, and only the colours count
            hole = ImageChops.multiply(hole, alpha) if painted else ImageOps.invert(alpha)
            kind = "painted white" if painted else "transparent"
            notes.append(f"is read from transparency: what is {kind} is the hole")
    if (largest := hole.getextrema()[1]) < 128:
        raise ValueError(f"the mask {path} has no hole: its largest value is {largest}, and white is 255")
    if any(hole.histogram()[6:250]):
        notes.append("has greys: what is lighter than half is the hole")
    (h, w), (image_h, image_w) = size_of(path), size_of(image)
    if (h, w) != (image_h, image_w):
        how = "it is resized" if h * image_w == w * image_h else "its centre is laid over the image's"
        notes.append(f"is {h} × {w} and the image {image_h} × {image_w} (height × width): {how}")
    for note in notes:
        warnings.warn(f"the mask {path} {note}", stacklevel=2)  # once, however often it is read
    return torch.from_numpy(numpy.array(ImageOps.fit(hole, size[::-1], Image.Resampling.BOX)) > 127)


def mask_of_shape(kind: str, numbers: str, size: tuple[int, int]) -> Tensor:
    """The hole [H, W] of bool that a rectangle or a circle of so many fractions makes."""
    h, w = size
    count = {"rectangle": 4, "circle": 3}[kind]
    try:
        fractions = [float(part) for part in numbers.split(",")]
    except ValueError:
        fractions = []
    if len(fractions) != count:
        raise ValueError(f"a {kind} is {count} numbers with commas between them, not {numbers!r}")
    y, x = torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")
    if kind == "rectangle":
        top, left, bottom, right = fractions
        if not (top < bottom and left < right):
            order = "TOP,LEFT,BOTTOM,RIGHT, TOP above BOTTOM and LEFT left of RIGHT"
            raise ValueError(f"a rectangle is {order}, not {numbers}")
        return (y >= top) & (y < bottom) & (x >= left) & (x < right)
    centre_y, centre_x, radius = fractions
    if not radius > 0:
        raise ValueError(f"a circle has a radius above 0, not {radius:g}")
    return ((y - centre_y) * h) ** 2 + ((x - centre_x) * w) ** 2 < (radius * min(h, w)) ** 2


def check_there(source: str | Path, others: str = ""):
    """Raises FileNotFoundError when there is no such file; others: what else may be given, for the message."""
    if re.match("https?:/", str(source)):
        raise FileNotFoundError(f"{source} is an address: download it first, and give the file")
    if not Path(source).is_file():
        raise FileNotFoundError(f"no image at {source}{others}")


def load_image(path: str | Path, size: tuple[int, int]) -> Image.Image:
    """PIL's image of a file, in RGB or RGBA, and large enough to be resized. Raises as `read_image` does."""
    check_there(path)
    return eight_bits(open_image(path, (4 * size[0], 4 * size[1])), path)


def size_of(path: str | Path) -> tuple[int, int]:
    """The height and width of an upright image, all of it: a large JPEG is not read at its full size."""
    with Image.open(path) as image:
        on_its_side = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return image.size if on_its_side else image.size[::-1]


def open_image(path: str | Path, least: tuple[int, int]) -> Image.Image:
    """PIL's image of a file, upright; a large JPEG is read at a fraction of its size, not below `least`, (h, w).

    Raises ValueError when it is no image, or has more pixels than the memory holds.
    """
    Image.MAX_IMAGE_PIXELS = None  # the memory is asked instead
    with reading(path, "image that Pillow reads"):
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
