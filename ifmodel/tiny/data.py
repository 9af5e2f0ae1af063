"""A folder of captioned images as training data: many drawings of each thing, freshly augmented each time.

The folder has the "imagefolder" layout of Hugging Face datasets: images, and metadata.jsonl with a line for each,
{"file_name": …, "text": its short name, "tags": [more words], "artist": who drew it}; tags and artist may be left out.
An artist's drawings have the style of that artist (`STYLES`), and filters make other styles of them.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from ddpm.files import parse_json, read_small
from ddpm.images import eight_bits, open_image
from ifmodel.tiny.captions import ALIASES, plainly, with_article
from ifmodel.tiny.styles import STYLES, Style

# Backgrounds other than white, and what they are called: RGB in [0, 1].
TINTS = {
    "blue": (0.72, 0.86, 0.98),
    "green": (0.76, 0.92, 0.76),
    "yellow": (0.99, 0.95, 0.70),
    "pink": (0.99, 0.82, 0.87),
    "orange": (0.99, 0.86, 0.68),
    "purple": (0.87, 0.81, 0.96),
    "grey": (0.82, 0.83, 0.85),
    "brown": (0.85, 0.76, 0.66),
}


@dataclass(frozen=True)
class CaptionedImages:
    """Drawings in their styles, and what each may be called.

    images: [M, 4, S, S] uint8, red, green and blue times alpha, and alpha: transparent where nothing is drawn
    things, styles: [M], the name and the style of each, as numbers
    names: [N], the short names of the things
    phrases: [N], what fits into a style's captions: the name with its article, and its aliases
    tags: [N], more words for each
    files: [M], from which file each is
    """

    images: Tensor
    things: Tensor
    styles: Tensor
    names: list[str]
    phrases: list[list[str]]
    tags: list[list[str]]
    files: list[str]

    def rows(self, thing: int, style: int) -> list[int]:
        """The drawings of a thing in a style."""
        return ((self.things == thing) & (self.styles == style)).nonzero().flatten().tolist()

    def fingerprint(self) -> str:
        """A short hash of the names, captions and pixels."""
        digest = hashlib.sha256(json.dumps([self.names, self.phrases, self.tags, self.files]).encode())
        digest.update(self.images.contiguous().numpy())
        return digest.hexdigest()[:12]

    def vocabulary(self) -> dict:
        """What a model that was trained on these can be asked for, see `ifmodel.vocabulary`."""
        named = zip(self.phrases, self.tags, strict=True)
        things = {phrases[0]: {"aliases": phrases[1:], "tags": tags} for phrases, tags in named}
        return {"things": things, "anything": [phrase for style in STYLES.values() for phrase in style.anything]}

    def caption(self, row: int, generator: torch.Generator, background: str = "") -> str:
        """One of the captions that fit a drawing; in a tenth one that names no thing.

        background: of which colour it is, said in half of the captions
        """
        style, thing = list(STYLES.values())[int(self.styles[row])], int(self.things[row])
        if torch.rand(1, generator=generator) < 0.1:
            return pick(style.anything, generator)
        phrases = self.phrases[thing]
        # an alias as often as the name
        phrase = phrases[0] if torch.rand(1, generator=generator) < 0.5 else pick(phrases, generator)
        if self.tags[thing] and torch.rand(1, generator=generator) < 0.05:
            phrase = f"{phrase}, {pick(self.tags[thing], generator)}"
        caption = pick(style.templates, generator).format(phrase)
        said = background and torch.rand(1, generator=generator) < 0.5
        return f"{caption} on a {background} background" if said else caption

    def all_captions(self) -> list[str]:
        """Every caption without tags, and a line of tags for each thing: what a tokenizer is trained on."""
        templates = [template for style in STYLES.values() for template in style.templates]
        said = [template.format(phrase) for phrases in self.phrases for phrase in phrases for template in templates]
        said += [phrase for style in STYLES.values() for phrase in style.anything]
        said += [f"on a {colour} background" for colour in TINTS]
        return [*said, *(", ".join(tags) for tags in self.tags if tags)]


def pick(choices: Sequence, generator: torch.Generator):
    """One of several, uniformly."""
    return choices[int(torch.randint(len(choices), (1,), generator=generator))]


def draw_rows(
    data: CaptionedImages, size: int, count: int, generator: torch.Generator, variety: float = 1.0
) -> tuple[Tensor, list[int], list[str]]:
    """Images [count, 3, size, size] in [-1, 1] of different things if there are enough, their rows and backgrounds.

    Style and artist are drawn at random, and so is how a drawing is shown, see `show`.
    """
    total = len(data.names)
    things = torch.cat([torch.randperm(total, generator=generator) for _ in range(-(-count // total))])[:count]
    weights = torch.tensor([style.weight for style in STYLES.values()])
    rows = []
    for thing in things.tolist():
        mine = (data.things == thing).nonzero().flatten()
        counts = torch.bincount(data.styles[mine], minlength=len(STYLES))
        share = (weights / counts.clamp(min=1))[data.styles[mine]]  # a style's weight, shared among its drawings
        rows.append(mine[torch.multinomial(share, 1, generator=generator)].item())
    images, backgrounds = show(data, rows, size, generator, variety)
    return images, rows, backgrounds


def draw_images(
    data: CaptionedImages, size: int, count: int, generator: torch.Generator, variety: float = 1.0
) -> tuple[Tensor, list[str]]:
    """Images as of `draw_rows`, each with a caption."""
    images, rows, backgrounds = draw_rows(data, size, count, generator, variety)
    return images, [data.caption(row, generator, ground) for row, ground in zip(rows, backgrounds, strict=True)]


def show(
    data: CaptionedImages, rows: Sequence[int], size: int, generator: torch.Generator, variety: float = 1.0
) -> tuple[Tensor, list[str]]:
    """Drawings as images [B, 3, size, size] in [-1, 1], placed, sized, turned, mirrored and coloured at random.

    variety: 0 shows each as it is, on white; 1 scales down to 0.6, turns by up to 15° and puts half of them on colours
    Also returns what the background of each is called, "" where it is white or has no name.
    """
    count, source = len(rows), data.images.shape[-1]
    uniform = torch.rand((10, count), generator=generator)
    scale = 1 - 0.4 * variety * uniform[0]
    angle = math.radians(15) * variety * (uniform[1] + uniform[2] - 1)
    mirrored = torch.where(uniform[3] < 0.5 * min(variety, 1), -1.0, 1.0)
    shift = (1 - scale) * (2 * uniform[4:6] - 1)  # [2, B]; so the whole drawing stays inside
    cos, sin = angle.cos() / scale, angle.sin() / scale
    inverse = torch.stack([torch.stack([mirrored * cos, mirrored * sin]), torch.stack([-sin, cos])])  # [2, 2, B]
    offset = -(inverse * shift).sum(1)
    theta = torch.cat([inverse, offset[:, None]], dim=1).permute(2, 0, 1)

    x = data.images[rows].float() / 255
    drawn = max(source, size)  # sampled finely, then averaged
    grid = F.affine_grid(theta, [count, 4, drawn, drawn], align_corners=False)
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    x = F.interpolate(x, (size, size), mode="area") if drawn != size else x
    colours, alpha = x[:, :3], x[:, 3:]
    colours = turn_hue(colours, variety * 0.25 * (uniform[6] + uniform[7] - 1))
    ground, names = backgrounds(data, rows, size, generator, variety)
    return (colours + (1 - alpha) * ground).clamp(0, 1) * 2 - 1, names


def turn_hue(colours: Tensor, angle: Tensor) -> Tensor:
    """Colours [B, 3, H, W] turned about the grey axis by an angle [B] in radians; greys stay."""
    third, sine = (1 - angle.cos()) / 3, angle.sin() / math.sqrt(3)
    a, b, c = angle.cos() + third, third - sine, third + sine
    matrix = torch.stack([torch.stack([a, b, c]), torch.stack([c, a, b]), torch.stack([b, c, a])]).permute(2, 0, 1)
    return torch.einsum("bij,bjhw->bihw", matrix, colours).clamp(0, 1)


def backgrounds(
    data: CaptionedImages, rows: Sequence[int], size: int, generator: torch.Generator, variety: float
) -> tuple[Tensor, list[str]]:
    """[B, 3, size, size] in [0, 1], half of them white, the others tints or gradients."""
    styles, tints = list(STYLES.values()), torch.tensor(list(TINTS.values()))
    ramp = torch.linspace(0, 1, size).view(1, size, 1)
    grounds, names = [], []
    for row in rows:
        kind, first, second = torch.rand(3, generator=generator).tolist()
        style, name, ground = styles[int(data.styles[row])], "", torch.ones(3, 1, 1)
        if style.ground is not None and style.filter is not None:
            ground = torch.tensor(style.ground).view(3, 1, 1)
        elif kind < 0.35 * variety:
            k = int(first * len(TINTS))
            ground, name = tints[k].view(3, 1, 1), list(TINTS)[k]
        elif kind < 0.5 * variety:
            top, bottom = (tints[int(part * len(TINTS))].view(3, 1, 1) for part in (first, second))
            ground = top + ramp * (bottom - top)
        grounds.append(ground.expand(3, size, size))
        names.append(name)
    return torch.stack(grounds), names


def held_out(rows: Sequence[dict]) -> list[bool]:
    """Which lines of a metadata.jsonl are never trained on, so that generalisation can be measured.

    One artist's drawings of every third thing, and one in twenty of all images by a hash of its file name.
    """
    thirds = set(sorted({row["text"] for row in rows})[::3])

    def is_held(row: dict) -> bool:
        digest = hashlib.sha256(row["file_name"].encode()).digest()
        return digest[0] * 20 < 256 or (row.get("artist") == HELD_OUT_ARTIST and row["text"] in thirds)

    return [is_held(row) for row in rows]


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
