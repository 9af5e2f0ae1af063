"""Views for visual anagrams: ways to look at an image that rearrange its pixels or change their sign.

A view must be an orthogonal linear map. Then independent Gaussian noise, looked at in that way, is again independent
Gaussian noise, which is what a diffusion model was trained to see; and its inverse is its transpose. `check_view`
refuses everything else. Where a model learns its variance v as well, as IF does, a view may only permute pixels and
flip signs, as all of VIEWS do, so that v can be mapped back. Views take images [B, C, H, W] whose sides divide evenly,
and look the same at 64 and at 256 pixels, so that both stages of a cascade can use one.
Source: Visual Anagrams §3.3, arXiv 2311.17919.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]  # [B, C, H, W] -> [B, C, H, W]


@dataclass(frozen=True)
class View:
    """A way to look at an image, and the way back."""

    name: str
    view: Map
    inverse: Map

    def inverse_variance(self, v: Tensor) -> Tensor:
        """The way back for v, the model's interpolation of variances: its pixels move, their signs stay.

        For views that only permute pixels and flip signs: the inverse of an image of ones has the signs.
        """
        return self.inverse(torch.ones_like(v)) * self.inverse(v)


def permutation(name: str, order_of: Callable[[int, int], Tensor]) -> View:
    """A view that permutes pixels: order_of(H, W) says which pixel, of 0 … H·W - 1, is shown at each place."""

    def move(x: Tensor, inverse: bool) -> Tensor:
        order = order_of(*x.shape[-2:]).flatten()
        order = order.argsort() if inverse else order
        return x.flatten(-2)[..., order.to(x.device)].view(x.shape)

    return View(name, lambda x: move(x, False), lambda x: move(x, True))


def identity() -> View:
    """The image as it is."""
    return View("identity", lambda x: x, lambda x: x)


def vertical_flip() -> View:
    """Flipped top to bottom."""
    return View("vertical_flip", lambda x: x.flip(-2), lambda x: x.flip(-2))


def horizontal_flip() -> View:
    """Flipped left to right."""
    return View("horizontal_flip", lambda x: x.flip(-1), lambda x: x.flip(-1))


def rotate_90() -> View:
    """A quarter turn counter-clockwise; for square images."""
    return View("rotate_90", lambda x: torch.rot90(square(x), 1, (-2, -1)), lambda x: torch.rot90(x, -1, (-2, -1)))


def rotate_180() -> View:
    """Half a turn."""
    return View("rotate_180", lambda x: torch.rot90(x, 2, (-2, -1)), lambda x: torch.rot90(x, 2, (-2, -1)))


def negate() -> View:
    """The photographic negative."""
    return View("negate", lambda x: -x, lambda x: -x)


def patches(grid: int = 4, seed: int = 0) -> View:
    """The image cut into grid × grid squares, shuffled."""

    def order_of(h: int, w: int) -> Tensor:
        if h % grid or w % grid:
            raise ValueError(f"an image of {h} × {w} pixels cannot be cut into {grid} × {grid} patches")
        patch_of = torch.randperm(grid * grid, generator=torch.Generator().manual_seed(seed))
        cut = torch.arange(h * w).view(grid, h // grid, grid, w // grid).transpose(1, 2).flatten(0, 1)
        return cut[patch_of].view(grid, grid, h // grid, w // grid).transpose(1, 2).reshape(h, w)

    return permutation("patches", order_of)


def pixels(side: int = 64, seed: int = 0) -> View:
    """The pixels of a side × side image, shuffled; of one that is four times as large, its 4 × 4 patches."""
    return replace(patches(side, seed), name="pixels")


def jigsaw(grid: int = 4, seed: int = 0) -> View:
    """A puzzle of grid × grid pieces with knobs: the inner ones change places and turn by half, the others stay.

    Pieces are of two kinds, like the squares of a chessboard: with knobs out above and below and in at the sides, and
    the other way round. A piece fits wherever one of its kind was, either way up.
    """

    def order_of(h: int, w: int) -> Tensor:
        if h != w or h % grid or grid < 4:
            raise ValueError(f"a jigsaw needs a square image that {grid} ≥ 4 pieces divide, not {h} × {w}")
        side, order, piece_of = h // grid, torch.arange(h * w).view(h, w), _jigsaw_pieces(h, grid)
        generator = torch.Generator().manual_seed(seed)
        inner = [(i, j) for i in range(1, grid - 1) for j in range(1, grid - 1)]
        for kind in (0, 1):
            places = [place for place in inner if sum(place) % 2 == kind]
            sources = torch.randperm(len(places), generator=generator).tolist()
            turns = torch.randint(2, (len(places),), generator=generator).tolist()
            for (i, j), source, turned in zip(places, sources, turns, strict=True):
                y, x = torch.nonzero(piece_of == i * grid + j, as_tuple=True)
                y_in, x_in = y - i * side, x - j * side  # within the piece, knobs beyond it
                if turned:
                    y_in, x_in = side - 1 - y_in, side - 1 - x_in
                from_i, from_j = places[source]
                order[y, x] = (y_in + from_i * side) * w + x_in + from_j * side
        return order

    return permutation("jigsaw", order_of)


def _jigsaw_pieces(h: int, grid: int) -> Tensor:
    """[h, h], which piece each pixel belongs to: a square, with the knobs that are its own and without the others'."""
    side = h // grid
    centre = torch.arange(h) + 0.5
    y, x = torch.meshgrid(centre, centre, indexing="ij")
    piece = (y // side).long() * grid + (x // side).long()
    for i in range(grid):
        for j in range(grid):
            for di, dj in ((-1, 0), (1, 0)) if (i + j) % 2 == 0 else ((0, -1), (0, 1)):
                if any(0 < a < grid - 1 and 0 < b < grid - 1 for a, b in ((i, j), (i + di, j + dj))):
                    knob_y, knob_x = (i + (1 + di) / 2) * side, (j + (1 + dj) / 2) * side
                    piece[(y - knob_y) ** 2 + (x - knob_x) ** 2 < (side / 5) ** 2] = i * grid + j
    return piece


def inner_circle(quarters: int = 2) -> View:
    """The largest disc in a square image, turned by so many quarters; the corners stay."""

    def order_of(h: int, w: int) -> Tensor:
        if h != w:
            raise ValueError(f"this view turns a disc in a square image, not in {h} × {w}")
        order = torch.arange(h * w).view(h, w)
        centre = torch.arange(h) - (h - 1) / 2
        inside = centre[:, None] ** 2 + centre[None] ** 2 < (h / 2) ** 2
        return torch.where(inside, torch.rot90(order, quarters), order)

    return permutation("inner_circle", order_of)


def square_hinge(grid: int = 4) -> View:
    """grid × grid squares, hinged at their corners: each makes a quarter turn, its neighbours the other way."""

    def order_of(h: int, w: int) -> Tensor:
        if h != w or h % grid:
            raise ValueError(f"hinged squares need a square image that {grid} of them divide, not {h} × {w}")
        side, order = h // grid, torch.arange(h * w).view(h, w)
        for i in range(grid):
            for j in range(grid):
                place = slice(i * side, (i + 1) * side), slice(j * side, (j + 1) * side)
                order[place] = torch.rot90(order[place], 1 if (i + j) % 2 else -1)
        return order

    return permutation("square_hinge", order_of)


def skew(turns: float = 1.0) -> View:
    """Each row rolled to the right a little more than the one above, by `turns` widths in all."""

    def order_of(h: int, w: int) -> Tensor:
        shift = (torch.arange(h) * turns * w / h).long()
        return torch.arange(h)[:, None] * w + (torch.arange(w)[None] - shift[:, None]) % w

    return permutation("skew", order_of)


VIEWS: dict[str, Callable[[], View]] = {
    "identity": identity,
    "vertical_flip": vertical_flip,
    "horizontal_flip": horizontal_flip,
    "rotate_90": rotate_90,
    "rotate_180": rotate_180,
    "negate": negate,
    "pixels": pixels,
    "patches": patches,
    "jigsaw": jigsaw,
    "inner_circle": inner_circle,
    "square_hinge": square_hinge,
    "skew": skew,
}


def square(x: Tensor) -> Tensor:
    """x itself. Raises ValueError when its height and width differ."""
    if x.shape[-2] != x.shape[-1]:
        raise ValueError(f"this view needs square images, not {x.shape[-2]} × {x.shape[-1]}")
    return x


def check_view(
    view: View, shape: tuple[int, ...] = (3, 64, 64), tolerance: float = 1e-4, *, learned_variance: bool = True
):
    """Refuse a view of images [C, H, W] that is not linear, does not invert, or changes the statistics of noise.

    A linear map is orthogonal exactly when its inverse is its transpose, ⟨view(x), y⟩ = ⟨x, view⁻¹(y)⟩: this is
    tried on random x and y.
    learned_variance: whether it is for a model that learns v; then a view that mixes pixels is refused too
    Raises ValueError that says what is wrong.
    """
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 8, *shape, generator=generator)
    seen = view.view(x)
    named = f"the view {view.name!r} cannot make an anagram:"
    if seen.shape != x.shape:
        raise ValueError(f"{named} it turns images of {list(x.shape[1:])} into {list(seen.shape[1:])}")
    if (view.view(x + 2 * y) - seen - 2 * view.view(y)).abs().max() > tolerance * 10:
        raise ValueError(f"{named} it is not linear, so the view of a noisy image is not a view plus noise")
    error = (view.inverse(seen) - x).abs().max().item()
    if error > tolerance * 10:
        raise ValueError(f"{named} its inverse does not undo it, by up to {error:.2g} for images of {list(shape)}")
    difference = (seen * y).flatten(1).sum(1) - (x * view.inverse(y)).flatten(1).sum(1)
    if difference.abs().max() > tolerance * 10 * x[0].numel() ** 0.5:
        raise ValueError(
            f"{named} it is not orthogonal: noise of standard deviation 1 is seen with {seen.std().item():.2g}, or "
            "with its pixels correlated, and the model was trained on independent noise"
        )
    moved = seen.abs().flatten(1).sort()[0] - x.abs().flatten(1).sort()[0]
    if learned_variance and moved.abs().max() > tolerance * 10:
        raise ValueError(
            f"{named} it mixes pixels, so a learned variance has no way back: for models that learn none, "
            "check it with learned_variance=False"
        )
