"""Animations: an image that turns from one view to the next, and one that recedes and returns."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import InterpolationMode, rotate

from ddpm.tools.figures import to_bytes
from ddpm.tools.files import write_atomically
from ddpm.views import View

FRAMES = 24


def enlarged(image: Tensor, least: int = 256) -> Tensor:
    """An image [3, H, W] with at least so many pixels a side, each a square."""
    zoom = math.ceil(least / min(image.shape[-2:]))
    return image.repeat_interleave(zoom, -2).repeat_interleave(zoom, -1)


def turn(image: Tensor, views: Sequence[View]) -> tuple[list[Tensor], list[int]]:
    """From [3, H, W] in [0, 1]: frames that go through the views and back, and each one's milliseconds."""
    frames: list[Tensor] = []
    times: list[int] = []
    for before, after in zip(views, [*views[1:], views[0]], strict=True):
        start, end = (shown(view, image) for view in (before, after))
        frames.append(enlarged(start))
        times.append(1500)
        for k in range(1, FRAMES):
            s = 0.5 - 0.5 * math.cos(math.pi * k / FRAMES)  # slow at both ends
            frames.append(between(before, after, enlarged(start), enlarged(end), s))
            times.append(40)
    return frames, times


def shown(view: View, image: Tensor) -> Tensor:
    """A view of an image in [0, 1]; the view is of images in [-1, 1]."""
    return view.view(image[None] * 2 - 1)[0] / 2 + 0.5


def between(before: View, after: View, start: Tensor, end: Tensor, s: float) -> Tensor:
    """The way from one view to another at s in [0, 1]: a turn, a flip, or, between other views, a dissolve."""
    names = {before.name, after.name}
    if names in ({"identity", "rotate_180"}, {"identity", "rotate_90"}):
        angle = 180 if "rotate_180" in names else 90
        angle = angle * s if after.name != "identity" else -angle * s
        return rotate(start, angle, InterpolationMode.BILINEAR, fill=[1.0])
    if names in ({"identity", "vertical_flip"}, {"identity", "horizontal_flip"}):
        width = math.cos(math.pi * s)  # as a card is seen that turns over
        image, axis = (start if width > 0 else end), (1 if "vertical_flip" in names else 2)
        size = list(image.shape[1:])
        full, size[axis - 1] = size[axis - 1], max(1, round(abs(width) * size[axis - 1]))
        card = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
        frame = torch.ones_like(image)
        frame.narrow(axis, (full - size[axis - 1]) // 2, size[axis - 1]).copy_(card)
        return frame
    return (1 - s) * start + s * end


def recede(image: Tensor) -> tuple[list[Tensor], list[int]]:
    """From [3, H, W] in [0, 1]: frames that shrink it to an eighth, as when one steps back, and let it grow again."""
    large = enlarged(image)
    frames: list[Tensor] = []
    h, w = large.shape[1:]
    for k in [*range(FRAMES + 1), *range(FRAMES - 1, 0, -1)]:
        scale = 8 ** -(k / FRAMES)
        height, width = max(1, round(h * scale)), max(1, round(w * scale))
        frame = torch.ones_like(large)
        top, left = (h - height) // 2, (w - width) // 2
        frame[:, top : top + height, left : left + width] = F.interpolate(
            large[None], (height, width), mode="bilinear", antialias=True
        )[0]
        frames.append(frame)
    return frames, [1500 if k in (0, FRAMES) else 60 for k in range(len(frames))]


def save_gif(path: str | Path, frames: Sequence[Tensor], milliseconds: Sequence[int]):
    """Write images [3, H, W] in [0, 1] as an animation that repeats, each shown for so long."""
    images = [Image.fromarray(to_bytes(frame)) for frame in frames]
    buffer = io.BytesIO()
    rest = {"append_images": images[1:], "duration": list(milliseconds), "loop": 0}
    images[0].save(buffer, format="gif", save_all=True, **rest)
    write_atomically(path, buffer.getvalue())
