"""The images that the scripts read: files, and three drawings of our own, which have names."""

from pathlib import Path

from torch import Tensor

from ddpm import images

# What tiny-if would call our drawings: "a high quality photo", of anything, is too little for it
DRAWING_PROMPTS = {"village": "a snowy mountain village", "rocket": "a rocket ship", "face": "a man wearing a hat"}
DRAWINGS = {name: Path(__file__).parent / "drawings" / f"{name}.png" for name in DRAWING_PROMPTS}


def read_image(source: str | Path, size: tuple[int, int]) -> Tensor:
    """`ddpm.images.read_image` of a file, or of one of DRAWINGS by its name."""
    return images.read_image(find_image(source), size)


def read_mask(mask: str, size: tuple[int, int], image: str | Path) -> Tensor:
    """`ddpm.images.read_mask` for such an image."""
    return images.read_mask(mask, size, find_image(image))


def find_image(source: str | Path) -> Path:
    """Where an image is. Raises FileNotFoundError when there is none."""
    path = DRAWINGS.get(str(source), Path(source))
    if not path.is_file():
        raise FileNotFoundError(f"no image at {path}; drawings of our own are {', '.join(DRAWINGS)}")
    return path
