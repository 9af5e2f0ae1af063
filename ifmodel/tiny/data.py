"""Captioned drawings as training data: many of each thing, shown in another way and called another name each time.

`load_captioned` makes them of a folder; a step draws some of them with `draw_images`.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ifmodel.tiny.styles import STYLES

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

    def caption(self, row: int, generator: torch.Generator, background: str = "", named: bool = True) -> str:
        """One of the captions that fit a drawing; named: whether it names the thing.

        background: of which colour it is, said in half of those that do
        """
        style, thing = list(STYLES.values())[int(self.styles[row])], int(self.things[row])
        if not named:
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
    data: CaptionedImages, size: int, count: int, generator: torch.Generator, variety: float | Tensor = 1.0
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
    data: CaptionedImages,
    size: int,
    count: int,
    generator: torch.Generator,
    variety: float = 1.0,
    unnamed: float = 0.1,
) -> tuple[Tensor, list[str]]:
    """Images as of `draw_rows`, each with a caption.

    unnamed: the share of captions that name no thing, such as "a photo"; these drawings are shown without variety,
        since what fits any of them is hard enough to learn
    """
    named = torch.rand(count, generator=generator) >= unnamed
    images, rows, backgrounds = draw_rows(data, size, count, generator, variety * named)
    described = zip(rows, backgrounds, named.tolist(), strict=True)
    return images, [data.caption(row, generator, ground, named) for row, ground, named in described]


def show(
    data: CaptionedImages, rows: Sequence[int], size: int, generator: torch.Generator, variety: float | Tensor = 1.0
) -> tuple[Tensor, list[str]]:
    """Drawings as images [B, 3, size, size] in [-1, 1], placed, sized, turned, mirrored and coloured at random.

    variety: 0 shows each as it is, on white; 1 scales down to 0.6, turns by up to 15° and puts half of them on colours;
        a number for all, or one for each, [B]
    Also returns what the background of each is called, "" where it is white or has no name.
    """
    count, source = len(rows), data.images.shape[-1]
    uniform = torch.rand((10, count), generator=generator)
    variety = torch.as_tensor(variety).expand(count)
    scale = 1 - 0.4 * variety * uniform[0]
    angle = math.radians(15) * variety * (uniform[1] + uniform[2] - 1)
    mirrored = torch.where(uniform[3] < 0.5 * variety.clamp(max=1), -1.0, 1.0)
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
    data: CaptionedImages, rows: Sequence[int], size: int, generator: torch.Generator, variety: Tensor
) -> tuple[Tensor, list[str]]:
    """[B, 3, size, size] in [0, 1], half of them white with a variety of 1, [B], the others tints or gradients."""
    styles, tints = list(STYLES.values()), torch.tensor(list(TINTS.values()))
    ramp = torch.linspace(0, 1, size).view(1, size, 1)
    grounds, names = [], []
    for row, variety_of_row in zip(rows, variety.tolist(), strict=True):
        kind, first, second = torch.rand(3, generator=generator).tolist()
        style, name, ground = styles[int(data.styles[row])], "", torch.ones(3, 1, 1)
        if style.ground is not None and style.filter is not None:
            ground = torch.tensor(style.ground).view(3, 1, 1)
        elif kind < 0.35 * variety_of_row:
            k = int(first * len(TINTS))
            ground, name = tints[k].view(3, 1, 1), list(TINTS)[k]
        elif kind < 0.5 * variety_of_row:
            top, bottom = (tints[int(part * len(TINTS))].view(3, 1, 1) for part in (first, second))
            ground = top + ramp * (bottom - top)
        grounds.append(ground.expand(3, size, size))
        names.append(name)
    return torch.stack(grounds), names
