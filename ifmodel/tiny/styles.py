"""The styles in which tiny-if draws, and the filters that make some of them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

SHADED = ("noto", "fluent-emoji", "emojione")
FLAT = ("noto-v1", "twemoji", "fluent-emoji-flat", "fxemoji")


@dataclass(frozen=True)
class Style:
    """How a style is asked for, and where its images come from.

    templates: captions, {} stands for the thing
    anything: captions that name no thing
    artists: whose drawings have this style as they are; with a filter, to whose drawings it is applied
    weight: how often it is drawn in training, relative to the others
    ground: the colour around a filtered image, as white paper becomes, RGB in [0, 1]; None where it may be any
    """

    templates: tuple[str, ...]
    anything: tuple[str, ...]
    artists: tuple[str, ...]
    weight: float
    filter: Callable[[Image.Image], Image.Image] | None = None
    ground: tuple[float, float, float] | None = None


def oil(plain: Image.Image) -> Image.Image:
    """Broad strokes in warm, strong colours on an ochre ground."""
    width = max(3, min(plain.size) // 20) | 1
    strokes = ImageEnhance.Color(plain.filter(ImageFilter.ModeFilter(width))).enhance(1.4)
    ground = numpy.array([214, 178, 118], dtype=numpy.float32)
    pixels = numpy.asarray(strokes, dtype=numpy.float32)
    generator = numpy.random.default_rng(0)
    canvas = generator.normal(0, 7, (pixels.shape[0] // 4, pixels.shape[1] // 4, 1)).repeat(4, 0).repeat(4, 1)
    canvas = numpy.pad(canvas, [(0, pixels.shape[0] - canvas.shape[0]), (0, pixels.shape[1] - canvas.shape[1]), (0, 0)])
    return Image.fromarray((pixels / 255 * (0.45 * ground + 0.55 * 255) + canvas).clip(0, 255).astype(numpy.uint8))


def lithograph(plain: Image.Image) -> Image.Image:
    """Black ink on grey paper: outlines, and four tones of which the darker ones are hatched."""
    grey = numpy.asarray(ImageOps.autocontrast(plain.convert("L")), dtype=numpy.float32) / 255
    h, w = grey.shape
    y, x = numpy.mgrid[:h, :w]
    period = max(2, min(h, w) // 16)
    tones = numpy.floor(grey * 3.999) / 3
    hatched = numpy.where((tones < 0.9) & ((x + y) % period < period / 3), tones * 0.4, tones)
    outlines = numpy.asarray(sketch(plain).convert("L"), dtype=numpy.float32) / 255
    paper = 30 + 175 * hatched * outlines
    return Image.fromarray(paper.astype(numpy.uint8)).convert("RGB")


def sketch(plain: Image.Image) -> Image.Image:
    """Pencil outlines on white: what a blur of the greys takes away."""
    grey = numpy.asarray(plain.convert("L"), dtype=numpy.float32)
    radius = min(plain.size) / 40
    blurred = numpy.asarray(plain.convert("L").filter(ImageFilter.GaussianBlur(radius)), dtype=numpy.float32)
    lines = 255 - (3.0 * abs(grey - blurred)).clip(0, 225)
    return Image.fromarray(lines.astype(numpy.uint8)).convert("RGB")


# The first is that of an image without an artist, to which every filter is applied, too.
STYLES = {
    "photo": Style(
        ("a photo of {}", "{}", "a high quality photo of {}"), ("a high quality photo", "a photo"), SHADED, 0.35
    ),
    "drawing": Style(("a drawing of {}",), ("a drawing",), FLAT, 0.2),
    "oil": Style(("an oil painting of {}",), ("an oil painting",), SHADED + FLAT, 0.15, oil, (0.925, 0.863, 0.758)),
    "lithograph": Style(("a lithograph of {}",), ("a lithograph",), ("emojione-monotone",), 0.1, lithograph),
    "woodcut": Style(("a woodcut of {}",), ("a woodcut",), ("fluent-emoji-high-contrast",), 0.1),
    "sketch": Style(("a sketch of {}",), ("a sketch",), SHADED + FLAT, 0.1, sketch, (1.0, 1.0, 1.0)),
}
