"""Labels of figures: in lines as wide as there is room, in fonts that have their characters."""

import math
import warnings
from collections.abc import Sequence
from functools import cache

DPI = 150
FONT = {"fontsize": 9, "parse_math": False}  # in which "$5" is no formula
LONGEST_LABEL = 600  # characters, of any prompt; the PNG's metadata has all of it
SPACE = 8  # pixels between labels and images


def wrapped(text: str, width: int) -> str:
    """A label in lines of at most `width` pixels, or of a single word; "x = 1" stays together. Its end may be cut."""
    text = text if len(text) <= LONGEST_LABEL else f"{text[:LONGEST_LABEL]}…"
    lines: list[str] = []
    for line in text.replace(" = ", "\u00a0=\u00a0").splitlines():
        first, *words = line.split(" ")
        lines.append(first)
        for word in words:
            if text_size(f"{lines[-1]} {word}")[0] <= width:
                lines[-1] += f" {word}"
            else:
                lines.append(word)
    return "\n".join(lines)


@cache
def text_size(text: str) -> tuple[int, int]:
    """The width and the height in pixels of a label and the space around it; no label takes none."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not text:
        return 0, 0
    figure = Figure(dpi=DPI)
    FigureCanvasAgg(figure)  # gives it what measures
    text, fonts = readable(text)
    box = figure.text(0, 0, text, **FONT, family=fonts).get_window_extent()
    return math.ceil(box.width) + SPACE, math.ceil(box.height) + SPACE


@cache
def readable(text: str) -> tuple[str, list[str]]:
    """A label, and the fonts of this machine that have its characters; those that none has become �, with a warning."""
    from matplotlib.font_manager import FontProperties, findfont, fontManager

    fonts = ["sans-serif"]
    missing = {char for char in text if not char.isspace()} - characters(findfont(FontProperties(family=fonts)))
    for font in fontManager.ttflist if missing else ():
        # the last resort has a box for everything
        plain = (font.style, font.weight) == ("normal", 400) and "Last Resort" not in font.name
        if plain and missing & characters(font.fname):
            fonts.append(font.name)
            missing -= characters(font.fname)
    if missing:
        warn_of_missing()
    return "".join("\ufffd" if char in missing else char for char in text), fonts


@cache
def characters(font: str) -> frozenset[str]:
    """Those that a font's file draws; none for one that matplotlib cannot read, such as coloured emoji."""
    from matplotlib.font_manager import get_font

    try:
        return frozenset(map(chr, get_font(font).get_charmap()))
    except (OSError, RuntimeError):
        return frozenset()


@cache
def warn_of_missing():
    """Once, however many labels need it."""
    warnings.warn("labels have characters that no font here has, shown as �: the PNG's metadata has them", stacklevel=3)


def largest(labels: Sequence[str]) -> tuple[int, int]:
    """The width of the widest label and the height of the tallest."""
    sizes = [text_size(label) for label in labels]
    return max((w for w, _ in sizes), default=0), max((h for _, h in sizes), default=0)
