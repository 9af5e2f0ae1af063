"""The styles in which tiny-if draws, and the filters that make some of them."""

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from ifmodel.tiny.captions import lithograph, oil, sketch

SHADED = ("noto", "fluent-emoji", "emojione")
FLAT = ("noto-v1", "twemoji", "fluent-emoji-flat", "fxemoji")


@dataclass(frozen=True)
class Style:
    """How a style is asked for, and where its images come from.

    templates: captions, {} stands for the thing
    anything: captions that name no thing
    artists: whose drawings have this style as they are; with a filter, to whose drawings it is applied
    weight: how often it is drawn in training, beside the others
    ground: the colour around a filtered image, as white paper becomes, RGB in [0, 1]; None where it may be any
    """

    templates: tuple[str, ...]
    anything: tuple[str, ...]
    artists: tuple[str, ...]
    weight: float
    filter: Callable[[Image.Image], Image.Image] | None = None
    ground: tuple[float, float, float] | None = None


# The first is that of an image without an artist, to which every filter is applied, too.
STYLES = {
    "photo": Style(
        ("a photo of {}", "{}", "a high quality photo of {}"), ("a high quality photo", "a photo"), SHADED, 0.4
    ),
    "drawing": Style(("a drawing of {}",), ("a drawing",), FLAT, 0.2),
    "oil": Style(("an oil painting of {}",), ("an oil painting",), SHADED + FLAT, 0.15, oil, (0.925, 0.863, 0.758)),
    "lithograph": Style(("a lithograph of {}",), ("a lithograph",), ("emojione-monotone",), 0.1, lithograph),
    "woodcut": Style(("a woodcut of {}",), ("a woodcut",), ("fluent-emoji-high-contrast",), 0.05),
    "sketch": Style(("a sketch of {}",), ("a sketch",), SHADED + FLAT, 0.1, sketch, (1.0, 1.0, 1.0)),
}
