"""Images that the scripts read, from files or drawings of our own, which have names; and figures that they write."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from ddpm.tools import images
from ddpm.tools.figures import save_table

# What tiny-if would call our drawings: "a high quality photo", of anything, is too little for it
DRAWING_PROMPTS = {"village": "a snowy mountain village", "rocket": "a rocket ship", "face": "a man wearing a hat"}
DRAWINGS = {name: Path(__file__).parent / "drawings" / f"{name}.png" for name in DRAWING_PROMPTS}


def read_image(source: str | Path, size: tuple[int, int]) -> Tensor:
    """`ddpm.tools.images.read_image` of a file, or of one of DRAWINGS by its name."""
    return images.read_image(find_image(source), size)


def read_mask(mask: str, size: tuple[int, int], image: str | Path) -> Tensor:
    """`ddpm.tools.images.read_mask` for such an image."""
    return images.read_mask(mask, size, find_image(image))


def find_image(source: str | Path) -> Path:
    """Where an image is. Raises FileNotFoundError when there is none."""
    source = DRAWINGS.get(str(source), source)
    images.check_there(source, f"; drawings of our own are {', '.join(DRAWINGS)}")
    return Path(source)


def write_table(args: Namespace, rows: Sequence[Sequence[Tensor]], **labels):
    """The figure of a script, see `save_table`, as --out, and a line that says so."""
    save_table(args.out, rows, **labels, seed=args.seed)
    print(args.out)


def write_animations(args: Namespace, drawn: Sequence[Tensor], move: Callable[[Tensor], tuple[list, list[int]]]):
    """The first image of each batch in [-1, 1] as move(image in [0, 1]) -> frames, times: OUT_0.gif, OUT_1.gif, …"""
    from ddpm.tools.animation import save_gif  # here, since torchvision takes long to import

    for i, batch in enumerate(drawn):
        frames, times = move(batch[0] / 2 + 0.5)
        gif = args.out.with_stem(f"{args.out.stem}_{i}").with_suffix(".gif")
        save_gif(gif, frames, times)
        print(gif)
