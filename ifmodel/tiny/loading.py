"""A folder of captioned images, loaded as training data: which of them, their captions, and each in its styles.

The folder has the "imagefolder" layout of Hugging Face datasets: images, and metadata.jsonl with a line for each,
{"file_name": …, "text": its short name, "tags": [more words], "artist": who drew it}; tags and artist may be left out.
An artist's drawings have the style of that artist (`STYLES`), and filters make other styles of them.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from ddpm.tools.files import parse_json, read_small
from ddpm.tools.images import eight_bits, open_image
from ifmodel.tiny.captions import ALIASES, plainly, with_article
from ifmodel.tiny.data import CaptionedImages
from ifmodel.tiny.styles import STYLES, Style

HELD_OUT_ARTIST = "twemoji"


def load_captioned(
    folder: str | Path,
    size: int,
    names: Sequence[str] | None = None,
    part: str = "all",
    finer: int = 1,
    quiet: bool = False,
) -> CaptionedImages:
    """A folder of images with metadata.jsonl, for training at size × size, each in every style that it has.

    names: the short names to take, in this order; None takes all
    part: "all", or "train" or "held out", see `held_out`
    finer: kept this many times larger, so that turning and shrinking loses little
    quiet: no progress bar, otherwise shown for a hundred images or more
    Raises FileNotFoundError when the folder or its images are not there, ValueError when a line is broken, a
    caption is missing, an image is too small, or a name is not in the folder; each in one line that names it.
    """
    folder = Path(folder)
    names, rows = select_rows(folder, names, part)
    number = {plainly(name): k for k, name in enumerate(names)}
    images, things, styles, files = [], [], [], []
    tags: list[list[str]] = [[] for _ in names]
    with tqdm(rows, desc="images", unit="image", leave=False, disable=quiet or len(rows) < 100) as bar:
        for row in bar:
            for style, image in styled(folder / row["file_name"], size, row.get("artist"), finer):
                images.append(image)
                styles.append(style)
                things.append(number[plainly(row["text"])])
                files.append(row["file_name"])
            mine = tags[number[plainly(row["text"])]]
            mine += [tag for tag in row["tags"] if tag not in mine]
    phrases = [[with_article(name), *ALIASES.get(plainly(name), ())] for name in names]
    return CaptionedImages(torch.stack(images), torch.tensor(things), torch.tensor(styles), names, phrases, tags, files)


def select_rows(folder: Path, names: Sequence[str] | None, part: str) -> tuple[list[str], list[dict]]:
    """The lines of a folder's metadata.jsonl for these things and this part, and the things that it has."""
    rows = read_metadata(folder)
    if part != "all":
        rows = [row for row, held in zip(rows, held_out(rows), strict=True) if held == (part == "held out")]
    known = {plainly(row["text"]) for row in rows}
    if names is None:
        names = list(dict.fromkeys(row["text"] for row in rows))
    elif part != "all":
        names = [name for name in names if plainly(name) in known]
    if unknown := [name for name in names if plainly(name) not in known]:
        raise ValueError(f"{folder} has no {', '.join(unknown[:5])}{', …' if len(unknown) > 5 else ''}")
    wanted = {plainly(name) for name in names}
    rows = [row for row in rows if plainly(row["text"]) in wanted]
    if not rows:
        raise ValueError(f"{folder} has no images of this part: {part}")
    missing = [row["file_name"] for row in rows if not (folder / row["file_name"]).is_file()]
    if missing:
        more = ", …" if len(missing) > 5 else ""
        raise FileNotFoundError(f"{folder} lacks {len(missing)} images: {', '.join(missing[:5])}{more}")
    return list(names), rows


def held_out(rows: Sequence[dict]) -> list[bool]:
    """Which lines of a metadata.jsonl are never trained on, so that generalisation can be measured.

    One artist's drawings of every third thing, and one in twenty of all images by a hash of its file name.
    """
    thirds = set(sorted({row["text"] for row in rows})[::3])

    def is_held(row: dict) -> bool:
        digest = hashlib.sha256(row["file_name"].encode()).digest()
        return digest[0] * 20 < 256 or (row.get("artist") == HELD_OUT_ARTIST and row["text"] in thirds)

    return [is_held(row) for row in rows]


def read_metadata(folder: str | Path) -> list[dict]:
    """The lines of a folder's metadata.jsonl. Raises as `load_captioned` does."""
    path = Path(folder) / "metadata.jsonl"
    if not path.is_file():
        line = '{"file_name": "a.png", "text": "a circle"}'
        raise FileNotFoundError(f"{folder} has no metadata.jsonl: it needs a line for each image, such as {line}")
    try:
        lines = read_small(path).decode("utf-8-sig").split("\n")  # splitlines would cut captions at U+2028
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8, at byte {error.start}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, path)
            row["tags"] = row.get("tags") or []  # null is none
            fits = isinstance(row["file_name"], str) and isinstance(row["text"], str) and row["text"].strip()
            fits = fits and isinstance(row["tags"], list) and all(isinstance(tag, str) for tag in row["tags"])
        except (ValueError, KeyError, TypeError, AttributeError):
            fits = False
        if not fits:
            layout = '{"file_name": …, "text": a caption, "tags": [words]}, of which tags may be left out'
            raise ValueError(f"{path}, line {number} is not {layout}: {line[:60]!r}")
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # which no tokenizer takes
            fault = "has half of a character, a surrogate such as \\ud800 alone: write the whole one"
            raise ValueError(f"{path}, line {number} {fault}: {line[:60]!r}") from None
        if Path(row["file_name"]).is_absolute() or ".." in Path(row["file_name"]).parts:
            raise ValueError(f"{path}, line {number} names {row['file_name']!r}, which is not in the folder")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no captions")
    return rows


def styled(path: Path, size: int, artist: str | None, finer: int = 1) -> list[tuple[int, Tensor]]:
    """An image in each of its styles: (the style's number, [4, S, S] uint8, colours times alpha, alpha).

    Raises ValueError when it is no image or too small.
    """
    least = max(256, size * finer)
    image = eight_bits(open_image(path, (least, least)), path).convert("RGBA")
    if min(image.size) < size:
        raise ValueError(f"{path} is too small: {image.size[0]} × {image.size[1]}, for training at {size} × {size}")
    size *= finer
    side = min(least, *image.size)  # the filters are slow, and nothing finer is seen
    image = ImageOps.fit(image, (side, side), Image.Resampling.BOX)
    plain = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    found = []
    for number, style in enumerate(STYLES.values()):
        if is_native(style, number, artist):
            drawn = image
        elif style.filter is not None and (artist is None or artist in style.artists):
            drawn = style.filter(plain).convert("RGBA")
        else:
            continue
        premultiplied = ImageOps.fit(drawn.convert("RGBa"), (size, size), Image.Resampling.BOX)
        found.append((number, torch.from_numpy(numpy.array(premultiplied)).permute(2, 0, 1)))
    if not found:
        raise ValueError(f"{path} is by {artist}, whose style is not known: leave the artist out")
    return found


def is_native(style: Style, number: int, artist: str | None) -> bool:
    """Whether an artist's drawings have this style as they are; without an artist they have the first."""
    if artist is None:
        return number == 0
    return artist in style.artists and style.ground is None
