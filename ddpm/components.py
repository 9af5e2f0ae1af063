"""Decompositions for hybrid images: linear maps of an image that sum to the image.

Each is a list of components, such as [low pass, high pass]; `check_components` refuses a list that does not sum to
the identity. Widths are in pixels of a 64-pixel image and grow with it, so that both stages of a cascade can use
one. Source: Factorized Diffusion §3.3, arXiv 2404.11615.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SIGMA = 2.0  # of the low pass of a hybrid


@dataclass(frozen=True)
class Component:
    """A part of an image: of(x), linear in x, [B, C, H, W] -> [B, C, H, W]."""

    name: str
    of: Callable[[Tensor], Tensor]


def gaussian_blur(x: Tensor, sigma: float, radius: int) -> Tensor:
    """torchvision's blur of x [B, C, H, W], along one side and then the other; edges are reflected.

    The kernel has 2 · radius + 1 pixels a side.
    """
    from torchvision.transforms.v2.functional import gaussian_blur  # here, since torchvision takes long to import

    radius = min(radius, min(x.shape[-2:]) - 1)  # reflection padding needs radius < side
    along_x = gaussian_blur(x, [2 * radius + 1, 1], [sigma] * 2)
    return gaussian_blur(along_x, [1, 2 * radius + 1], [sigma] * 2)


def low_pass(x: Tensor, sigma: float = SIGMA, kernel_size: int = 33) -> Tensor:
    """A Gaussian blur of x [B, C, H, W]; sigma and kernel_size are those at 64 pixels.

    The kernel reaches at least 3σ to each side, so that every image size is blurred alike.
    """
    scale = min(x.shape[-2:]) / 64
    radius = max(kernel_size // 2 * max(scale, 1), math.ceil(3 * sigma * scale))
    return gaussian_blur(x, sigma * scale, round(radius))


def low_high_pass(sigma: float = SIGMA) -> list[Component]:
    """What is seen from afar, and what is seen up close. Source: Hybrid Images, SIGGRAPH 2006."""
    return [
        Component("low pass", lambda x: low_pass(x, sigma)),
        Component("high pass", lambda x: x - low_pass(x, sigma)),
    ]


def three_bands(sigma_coarse: float = 4.0, sigma_fine: float = 1.0) -> list[Component]:
    """Coarse, middle and fine: three images at three distances."""
    return [
        Component("coarse", lambda x: low_pass(x, sigma_coarse)),
        Component("middle", lambda x: low_pass(x, sigma_fine) - low_pass(x, sigma_coarse)),
        Component("fine", lambda x: x - low_pass(x, sigma_fine)),
    ]


def grey_colour() -> list[Component]:
    """The mean of the channels, seen in dim light, and the colours."""
    return [
        Component("grey", lambda x: x.mean(1, keepdim=True).expand_as(x)),
        Component("colour", lambda x: x - x.mean(1, keepdim=True)),
    ]


def motion_blur(length: int = 17) -> list[Component]:
    """What is left when the image moves sideways, over `length` pixels, and the rest."""

    def blur(x: Tensor) -> Tensor:
        radius = min(round(length // 2 * x.shape[-1] / 64), x.shape[-1] - 1)
        return F.avg_pool2d(F.pad(x, (radius, radius, 0, 0), mode="reflect"), (1, 2 * radius + 1), stride=1)

    return [Component("moving", blur), Component("still", lambda x: x - blur(x))]


DECOMPOSITIONS: dict[str, Callable[[], list[Component]]] = {
    "low_high_pass": low_high_pass,
    "three_bands": three_bands,
    "grey_colour": grey_colour,
    "motion_blur": motion_blur,
}


def check_components(components: Sequence[Component], shape: tuple[int, ...] = (3, 64, 64), tolerance: float = 1e-3):
    """Refuse components of images [C, H, W] that are not linear or do not sum to the image. Raises ValueError."""
    x, y = torch.randn(2, 4, *shape, generator=torch.Generator().manual_seed(0))
    for component in components:
        if (component.of(x + 2 * y) - component.of(x) - 2 * component.of(y)).abs().max() > tolerance:
            raise ValueError(f"the component {component.name!r} is not linear")
    error = (sum(component.of(x) for component in components) - x).abs().max().item()
    if error > tolerance:
        names = ", ".join(component.name for component in components)
        raise ValueError(f"the components {names} do not sum to the image: they are off by up to {error:.2g}")
