"""Views and components: that each does what it says, and that what cannot make an anagram or a hybrid is refused."""

import pytest
import torch
from torchvision.transforms.v2.functional import gaussian_blur

from ddpm.components import (
    DECOMPOSITIONS,
    Component,
    check_components,
    grey_colour,
    low_high_pass,
    low_pass,
    motion_blur,
    three_bands,
)
from ddpm.views import (
    VIEWS,
    View,
    _jigsaw_pieces,
    check_view,
    inner_circle,
    jigsaw,
    patches,
    permutation,
    pixels,
    skew,
)

MADE = {
    **{name: make() for name, make in VIEWS.items()},
    "patches of 2": patches(2),
    "patches of 8": patches(8, seed=5),
    "jigsaw of 8": jigsaw(8, seed=3),
    "jigsaw with another seed": jigsaw(seed=1),
    "a quarter of a circle": inner_circle(1),
    "three quarters of a circle": inner_circle(3),
    "half a skew": skew(0.5),
    "a skew to the left": skew(-2.0),
    "other pixels": pixels(seed=9),
}


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def image(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32)[None, None]


def upscaled(x, scale=4):
    return x.repeat_interleave(scale, -1).repeat_interleave(scale, -2)


@pytest.mark.parametrize("side", [32, 64, 256])
@pytest.mark.parametrize("name", sorted(MADE))
def test_every_view_makes_anagrams(name, side):
    if side == 32 and "pixels" in name:
        pytest.skip("32 pixels cannot be cut into 64")
    check_view(MADE[name], (3, side, side))
    x = noise(2, 3, side, side)
    seen = MADE[name].view(x)
    assert torch.equal(MADE[name].inverse(seen), x)  # they move pixels and change signs, no more
    assert torch.equal(MADE[name].view(MADE[name].inverse(x)), x)
    assert torch.equal(seen.abs().flatten().sort()[0], x.abs().flatten().sort()[0])
    assert torch.equal(seen, x) == (name == "identity")
    assert torch.equal(MADE[name].view(x[:1, :1]), seen[:1, :1])  # every image and channel in the same way


@pytest.mark.parametrize("name", sorted(MADE))
def test_the_inverse_of_a_variance_moves_it_and_keeps_its_sign(name):
    v = noise(1, 3, 64, 64).abs()
    found = MADE[name].inverse_variance(v)
    assert (found >= 0).all()
    assert torch.equal(found, MADE[name].inverse(v).abs())
    assert torch.equal(MADE[name].inverse_variance(-v), -found)


def half_negative(x):
    """The negative of the left half, upside down: its own inverse."""
    return torch.cat([-x[..., :32].flip(-2), x[..., 32:]], dim=-1)


@pytest.mark.parametrize(
    ("view", "moves"),
    [
        (lambda x: -x, lambda x: x),
        (half_negative, lambda x: torch.cat([x[..., :32].flip(-2), x[..., 32:]], dim=-1)),
    ],
)
def test_views_by_hand_keep_the_sign_of_a_variance(view, moves):
    by_hand, v = View("by hand", view, view), noise(2, 3, 64, 64)
    check_view(by_hand)
    assert torch.equal(by_hand.inverse_variance(torch.ones_like(v)), torch.ones_like(v))
    assert torch.equal(by_hand.inverse_variance(v), moves(v))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("identity", [[1, 2, 3], [4, 5, 6], [7, 8, 9]]),
        ("vertical_flip", [[7, 8, 9], [4, 5, 6], [1, 2, 3]]),
        ("horizontal_flip", [[3, 2, 1], [6, 5, 4], [9, 8, 7]]),
        ("rotate_90", [[3, 6, 9], [2, 5, 8], [1, 4, 7]]),
        ("rotate_180", [[9, 8, 7], [6, 5, 4], [3, 2, 1]]),
        ("negate", [[-1, -2, -3], [-4, -5, -6], [-7, -8, -9]]),
        ("skew", [[1, 2, 3], [6, 4, 5], [8, 9, 7]]),
    ],
)
def test_views_of_a_small_image(name, expected):
    assert torch.equal(VIEWS[name]().view(image([1, 2, 3], [4, 5, 6], [7, 8, 9])), image(*expected))


def test_a_permutation_shows_at_each_place_the_pixel_of_another():
    view = permutation("by hand", lambda h, w: torch.tensor([[1, 2], [3, 0]]))
    assert torch.equal(view.view(image([10, 11], [12, 13])), image([11, 12], [13, 10]))
    assert torch.equal(view.inverse(image([11, 12], [13, 10])), image([10, 11], [12, 13]))


def test_half_a_skew_shifts_the_last_rows_by_half_a_width():
    x = image(*[[1, 2, 3, 4]] * 4)
    assert torch.equal(skew(0.5).view(x), image([1, 2, 3, 4], [1, 2, 3, 4], [4, 1, 2, 3], [4, 1, 2, 3]))
    assert torch.equal(skew(1.0).view(x), image([1, 2, 3, 4], [4, 1, 2, 3], [3, 4, 1, 2], [2, 3, 4, 1]))


def test_patches_stay_whole():
    """Each patch of the view is a patch of the image, upright; and each of those is seen once."""

    def cut(x):
        return [part for row in x[0].split(4, dim=-2) for part in row.split(4, dim=-1)]

    x = noise(1, 3, 16, 16)
    seen = cut(patches(4, seed=2).view(x))
    found = [[torch.equal(part, other) for other in cut(x)].index(True) for part in seen]
    assert sorted(found) == list(range(16))
    assert found != list(range(16))
    assert not torch.equal(patches(4, seed=3).view(x), patches(4, seed=2).view(x))
    assert torch.equal(patches(4, seed=2).view(x), patches(4, seed=2).view(x))


def test_pixels_scatter_a_disc():
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    disc = ((y - 32) ** 2 + (x - 32) ** 2 < 200).float()[None, None]
    quarters = [part.mean().item() for half in pixels().view(disc)[0, 0].chunk(4) for part in half.chunk(4, -1)]
    assert max(quarters) < 2 * disc.mean() < disc[..., 24:40, 24:40].mean()


def test_the_inner_circle_turns_the_disc_and_leaves_the_corners():
    x = torch.arange(64.0 * 64).view(1, 1, 64, 64)
    for quarters in (1, 2):
        seen = inner_circle(quarters).view(x)
        assert torch.equal(seen[..., 16:48, 16:48], x[..., 16:48, 16:48].rot90(quarters, (-2, -1)))
        for rows in (slice(0, 9), slice(55, 64)):
            for columns in (slice(0, 9), slice(55, 64)):
                assert torch.equal(seen[..., rows, columns], x[..., rows, columns])
    assert torch.equal(inner_circle(4).view(x), x)
    assert seen[0, 0, 0, 32] == x[0, 0, 63, 31]  # the disc touches the four sides: their middles turn


def test_hinged_squares_turn_by_a_quarter_their_neighbours_the_other_way():
    x = noise(1, 3, 16, 16)
    seen = VIEWS["square_hinge"]().view(x)
    for i in range(4):
        for j in range(4):
            place = (..., slice(4 * i, 4 * i + 4), slice(4 * j, 4 * j + 4))
            assert torch.equal(seen[place], x[place].rot90(1 if (i + j) % 2 else -1, (-2, -1)))
    hinge = VIEWS["square_hinge"]().view(
        image([1, 2, 3, 4], [5, 6, 7, 8], [0, 0, 0, 0], [0, 0, 0, 9]).repeat(1, 1, 2, 2)
    )
    assert torch.equal(hinge[..., :2, :4], image([5, 1, 4, 8], [6, 2, 3, 7]))  # a clockwise turn, and one back


@pytest.mark.parametrize("grid", [4, 8])
@pytest.mark.parametrize("side", [64, 256])
def test_inner_jigsaw_pieces_of_one_kind_have_one_shape(side, grid):
    """So that they fit each other's places, either way up; with their knobs all are as large as their squares."""
    pieces, size = _jigsaw_pieces(side, grid), side // grid
    shapes = {0: set(), 1: set()}
    for i in range(1, grid - 1):
        for j in range(1, grid - 1):
            y, x = torch.nonzero(pieces == i * grid + j, as_tuple=True)
            shape = frozenset(zip((y - i * size).tolist(), (x - j * size).tolist(), strict=True))
            assert shape == {(size - 1 - y, size - 1 - x) for y, x in shape}
            shapes[(i + j) % 2].add(shape)
    (even,), (odd,) = shapes.values()
    assert even != odd
    assert {(x, y) for y, x in even} == odd
    assert len(even) == size**2  # two knobs out, two in
    assert min(y for y, _ in even) < 0 < size <= max(y for y, _ in even)


def test_a_jigsaw_moves_inner_pieces_whole_and_leaves_the_border():
    """The piece that each pixel of the view comes from: all of one, for all pixels of a place."""
    pieces = _jigsaw_pieces(64, 4)
    view, moved = jigsaw(seed=4), 0
    seen = view.view(pieces[None, None].float())[0, 0].long()
    places = view.view(torch.arange(64.0 * 64).view(1, 1, 64, 64))[0, 0].long()
    for k in range(16):
        (source,) = seen[pieces == k].unique().tolist()
        i, j = divmod(k, 4)
        if i in (0, 3) or j in (0, 3):
            assert source == k
            assert torch.equal(places[pieces == k], torch.nonzero((pieces == k).flatten())[:, 0])
        else:
            assert sum(divmod(source, 4)) % 2 == (i + j) % 2
            moved += source != k
    assert moved in (0, 2, 4)
    assert any(
        not torch.equal(jigsaw(seed=s).view(pieces[None, None]), jigsaw(seed=t).view(pieces[None, None]))
        for s, t in ((0, 1), (1, 2), (2, 3))
    )


RESIZABLE = sorted(set(MADE) - {name for name in MADE if any(word in name for word in ("jigsaw", "circle", "skew"))})


@pytest.mark.parametrize("name", RESIZABLE)
def test_views_look_the_same_at_both_resolutions(name):
    x = noise(1, 3, 64, 64)
    assert torch.equal(MADE[name].view(upscaled(x)), upscaled(MADE[name].view(x)))


@pytest.mark.parametrize("name", sorted(set(MADE) - set(RESIZABLE)))
def test_views_with_curves_look_nearly_the_same_at_both_resolutions(name):
    """All but the pixels where a curve or a slope is finer with more of them."""
    x = noise(1, 1, 64, 64)
    moved = MADE[name].view(upscaled(x)) != upscaled(MADE[name].view(x))
    assert moved.float().mean() < (0.9 if "skew" in name else 0.1)


# ---- what is refused


def blur(x):
    return gaussian_blur(x, [5, 5], [1.0, 1.0])


def crop(x):
    return x[..., 1:, :]


@pytest.mark.parametrize(
    ("view", "inverse", "reason"),
    [
        (blur, lambda x: x, "its inverse does not undo it"),
        (blur, blur, "its inverse does not undo it"),
        (lambda x: 2 * x, lambda x: x / 2, "not orthogonal: noise of standard deviation 1 is seen with 2"),
        (lambda x: x / 2, lambda x: 2 * x, "not orthogonal: noise of standard deviation 1 is seen with 0.5"),
        (lambda x: x + x.roll(1, -1), lambda x: x, "its inverse does not undo it"),
        (lambda x: x.rot90(1, (-2, -1)), lambda x: x.rot90(1, (-2, -1)), "its inverse does not undo it, by up to"),
        (lambda x: x.roll(1, -1), lambda x: x, "its inverse does not undo it"),
        (lambda x: x**3, lambda x: x.sign() * x.abs() ** (1 / 3), "it is not linear"),
        (lambda x: x + 1, lambda x: x - 1, "it is not linear"),
        (torch.abs, lambda x: x, "it is not linear"),
        (crop, lambda x: x, r"it turns images of \[3, 64, 64\] into \[3, 63, 64\]"),
        (lambda x: upscaled(x, 2), lambda x: x[..., ::2, ::2], r"into \[3, 128, 128\]"),
    ],
)
def test_other_maps_are_refused_and_it_is_said_why(view, inverse, reason):
    with pytest.raises(ValueError, match=f"the view 'strange' cannot make an anagram: .*{reason}"):
        check_view(View("strange", view, inverse))


def test_maps_that_invert_but_correlate_noise_are_refused():
    """The inverse may be exact, and the noise of standard deviation 1: an anagram needs its pixels independent too."""

    def shear(x, sign=1):  # one half of the channels is added to the other
        return torch.cat([x[..., :32], x[..., 32:] + sign * x[..., :32]], dim=-1)

    def uneven(x, gain=2**0.5):  # half the pixels twice as strong in variance, half as weak as keeps the mean
        return torch.cat([x[..., :32] * gain, x[..., 32:] * (2 - gain**2) ** 0.5], dim=-1)

    with pytest.raises(ValueError, match="not orthogonal"):
        check_view(View("shear", shear, lambda x: shear(x, -1)))
    with pytest.raises(ValueError, match="not orthogonal"):
        check_view(
            View(
                "uneven",
                lambda x: uneven(x, 1.2),
                lambda x: torch.cat([x[..., :32] / 1.2, x[..., 32:] / 0.56**0.5], dim=-1),
            )
        )


def colours(rotation):
    def turned(by):
        return lambda x: torch.einsum("ij,bjhw->bihw", by, x)

    return View("colours", turned(rotation), turned(rotation.T))


def test_a_mixing_orthogonal_map_is_accepted_where_no_variance_is_learned():
    """Not only permutations: a rotation of colours, which would take a v in [-1, 1] out of it."""
    mixing = colours(torch.linalg.qr(noise(3, 3))[0])
    grey = torch.full((3,), 3**-0.5)
    hues = colours(2 * torch.outer(grey, grey) - torch.eye(3))  # half a turn about grey: what is grey stays
    for view in (mixing, hues):
        check_view(view, learned_variance=False)
        with pytest.raises(ValueError, match="it mixes pixels, so a learned variance has no way back"):
            check_view(view)
    swapped = colours(torch.tensor([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]]))
    check_view(swapped)
    v = noise(1, 3, 8, 8)
    assert torch.equal(swapped.inverse_variance(v), v[:, [1, 0, 2]])


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("rotate_90", (64, 32), "square images, not 64 × 32"),
        ("inner_circle", (64, 32), "not in 64 × 32"),
        ("jigsaw", (64, 32), "not 64 × 32"),
        ("jigsaw", (66, 66), "not 66 × 66"),
        ("square_hinge", (64, 32), "not 64 × 32"),
        ("square_hinge", (66, 66), "4 of them divide, not 66 × 66"),
        ("patches", (64, 30), "of 64 × 30 pixels cannot be cut into 4 × 4 patches"),
        ("patches", (30, 64), "of 30 × 64 pixels cannot be cut into 4 × 4 patches"),
        ("pixels", (32, 32), "cannot be cut into 64 × 64 patches"),
    ],
)
def test_images_that_do_not_fit_a_view_are_refused(name, shape, reason):
    with pytest.raises(ValueError, match=reason):
        VIEWS[name]().view(torch.zeros(1, 3, *shape))
    if name != "rotate_90":
        with pytest.raises(ValueError, match=reason):
            VIEWS[name]().inverse(torch.zeros(1, 3, *shape))


def test_a_jigsaw_of_less_than_4_pieces_has_no_inner_ones():
    with pytest.raises(ValueError, match="3 ≥ 4"):
        jigsaw(3).view(torch.zeros(1, 3, 63, 63))


@pytest.mark.parametrize("name", ["vertical_flip", "horizontal_flip", "rotate_180", "negate", "skew", "patches"])
def test_views_of_wide_images(name):
    check_view(VIEWS[name](), (3, 32, 64))


# ---- components


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 28, 28), (3, 64, 64), (3, 32, 64)])
@pytest.mark.parametrize("name", sorted(DECOMPOSITIONS))
def test_every_decomposition_sums_to_the_image(name, shape):
    check_components(DECOMPOSITIONS[name](), shape, tolerance=1e-4)
    x = noise(2, *shape)
    for component in DECOMPOSITIONS[name]():
        assert component.of(x).shape == x.shape
        part = component.of(x).std()
        assert part < 1.05
        assert part > 1e-3 or (name == "grey_colour" and shape[0] == 1)


@pytest.mark.parametrize("name", sorted(DECOMPOSITIONS))
def test_every_decomposition_sums_to_a_large_image(name):
    """Of one image: `check_components` takes four pairs of them, and a blur as wide as 256 pixels ask is slow."""
    x, components = noise(1, 3, 256, 256), DECOMPOSITIONS[name]()
    torch.testing.assert_close(sum(component.of(x) for component in components), x, atol=1e-4, rtol=0)


def test_parts_that_do_not_sum_to_the_image_or_are_not_linear_are_refused():
    low, high = low_high_pass()
    with pytest.raises(ValueError, match=r"components low pass, low pass do not sum to the image: .* off by up to"):
        check_components([low, low])
    with pytest.raises(ValueError, match="components low pass do not sum"):
        check_components([low])
    with pytest.raises(ValueError, match="do not sum"):
        check_components([low, Component("half", lambda x: (x - low_pass(x)) / 2)])
    for bent in (lambda x: x.clamp(0), lambda x: x.square(), lambda x: x + 0.1):
        with pytest.raises(ValueError, match="the component 'bent' is not linear"):
            check_components([Component("bent", bent), Component("rest", lambda x, bent=bent: x - bent(x))])
    check_components([low, high])


@pytest.mark.parametrize("side", [16, 64, 128])
def test_a_low_pass_keeps_constants_and_a_high_pass_kills_them(side):
    x = torch.full((1, 3, side, side), 0.7)
    for parts in (low_high_pass(), three_bands(), motion_blur()):
        torch.testing.assert_close(parts[0].of(x), x)
        for part in parts[1:]:
            assert part.of(x).abs().max() < 1e-5


def stripes(period, side=64):
    return torch.cos(2 * torch.pi * (torch.arange(side) + 0.5) / period).expand(1, 3, side, side)


def test_a_low_pass_is_a_gaussian_of_its_width():
    """Stripes of frequency f come through by exp(-2 (π f σ)²), away from the edges."""
    for sigma, period in ((2.0, 16), (2.0, 8), (1.0, 8), (4.0, 32)):
        gain = (low_pass(stripes(period), sigma) / stripes(period))[..., 24:40, 24:40].mean().item()
        assert gain == pytest.approx(torch.tensor(-2 * (torch.pi * sigma / period) ** 2).exp().item(), abs=0.01)


def test_a_low_pass_looks_the_same_at_both_resolutions():
    coarse, fine = low_pass(stripes(16)), low_pass(stripes(64, 256))
    assert fine.max() == pytest.approx(coarse.max().item(), abs=0.02)


def test_three_bands_are_in_order_of_smoothness():
    x = noise(4, 3, 64, 64)
    parts = [band.of(x) for band in three_bands()]
    rough = [((part[..., 1:] - part[..., :-1]).std() / part.std()).item() for part in parts]
    assert rough == sorted(rough)
    for k, period in enumerate((64, 12, 3)):  # and each has the stripes that are its own
        strength = [band.of(stripes(period)).std().item() for band in three_bands()]
        assert max(strength) == strength[k]


def test_grey_is_one_channel_for_all_and_colour_has_no_mean():
    x, (grey, colour) = noise(2, 3, 8, 8), grey_colour()
    assert torch.equal(grey.of(x)[:, 0], grey.of(x)[:, 2])
    torch.testing.assert_close(grey.of(x)[:, :1], x.mean(1, keepdim=True))
    assert colour.of(x).mean(1).abs().max() < 1e-6
    torch.testing.assert_close(grey.of(grey.of(x)), grey.of(x))  # a projection


def test_motion_blurs_sideways_alone():
    moving, _ = motion_blur()
    upright = stripes(8)
    assert moving.of(upright)[..., 20:44].abs().max() < 0.1
    torch.testing.assert_close(moving.of(upright.mT), upright.mT)
