"""The data of tiny-if: many drawings of a thing, each shown in another way every time."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image, ImageDraw

from ifmodel.tiny.captions import curated
from ifmodel.tiny.data import TINTS, draw_images, show, turn_hue
from ifmodel.tiny.loading import HELD_OUT_ARTIST, held_out, load_captioned
from ifmodel.tiny.styles import STYLES

ARTISTS = ["noto", "twemoji", "emojione-monotone", "fluent-emoji-high-contrast"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two things by four artists: a red block, and a blue one, in the lower right of a transparent square."""
    folder = tmp_path_factory.mktemp("drawn")
    rows = []
    for artist in ARTISTS:
        (folder / artist).mkdir()
        for name, colour in (("rocket", "red"), ("skull", "blue")):
            image = Image.new("RGBA", (64, 64))
            ImageDraw.Draw(image).rectangle((32, 32, 55, 55), fill=colour)
            image.save(folder / artist / f"{name}.png")
            rows.append({"file_name": f"{artist}/{name}.png", "text": name, "artist": artist})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_an_artist_has_a_style_and_filters_make_others(folder):
    data = load_captioned(folder, 32, ["rocket"])
    styles = [list(STYLES)[style] for style in data.styles]
    found = dict.fromkeys(file.split("/")[0] for file in data.files)
    assert list(found) == ARTISTS
    assert sorted(styles) == sorted(
        [*("photo", "oil", "sketch"), *("drawing", "oil", "sketch"), "lithograph", "woodcut"]
    )


@pytest.mark.parametrize(
    ("image_size", "size", "seen"),
    [((4000, 3000), 32, 256), ((3000, 200), 32, 200), ((64, 64), 32, 64), ((800, 600), 300, 600)],
)
def test_filters_which_are_slow_see_a_small_square(tmp_path, monkeypatch, image_size, size, seen):
    """Of 256 pixels, or of as many as are wanted, twice the size."""
    Image.effect_noise(image_size, 50).save(tmp_path / "photo.jpg")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "photo.jpg", "text": "snow"}')
    sizes = []

    def recorded(style):
        return style.filter and replace(style, filter=lambda plain: sizes.append(plain.size) or style.filter(plain))

    monkeypatch.setattr("ifmodel.tiny.loading.STYLES", {name: recorded(one) or one for name, one in STYLES.items()})
    data = load_captioned(tmp_path, size, finer=2)
    assert data.images.shape[2:] == (2 * size, 2 * size)
    assert sizes == [(seen, seen)] * 3


def test_without_variety_a_drawing_is_shown_as_it_is_on_white(folder):
    data = load_captioned(folder, 32, ["rocket"])
    x, backgrounds = show(data, [0], 32, torch.Generator().manual_seed(0), variety=0.0)
    assert backgrounds == [""]
    assert x[0, :, 22, 22].tolist() == pytest.approx([1, -1, -1], abs=0.02)  # red
    assert x[0, :, 5, 5].tolist() == [1, 1, 1]


def test_variety_moves_turns_and_colours_and_says_the_background(folder):
    data = load_captioned(folder, 32, ["rocket"])
    x, backgrounds = show(data, [0] * 200, 32, torch.Generator().manual_seed(0))
    assert len({tuple(image.flatten()[::7].tolist()) for image in x}) == 200
    assert 0.4 < (x[:, :, 0, 0] == 1).all(1).float().mean() < 0.6  # half on white
    for image, name in zip(x, backgrounds, strict=True):
        if name:
            assert image[:, 0, 0].tolist() == pytest.approx([2 * part - 1 for part in TINTS[name]], abs=0.02)
    assert (x[:, 0] - x[:, 1] > 0.5).flatten(1).any(1).all()  # there is always something red to see


def test_captions_say_thing_and_style_or_nothing(folder):
    data = load_captioned(folder, 32)
    x, captions = draw_images(data, 32, 400, torch.Generator().manual_seed(0))
    assert x.shape == (400, 3, 32, 32)
    anything = {phrase for style in STYLES.values() for phrase in style.anything}
    share = sum(caption in anything for caption in captions) / 400
    assert 0.03 < share < 0.15
    assert all(caption in anything or "rocket" in caption or "skull" in caption for caption in captions)
    assert any("a woodcut of a skull" in caption for caption in captions)
    assert any(caption.endswith("background") for caption in captions)


def test_what_names_no_thing_shows_drawings_as_they_are(folder):
    data = load_captioned(folder, 32)
    anything = {phrase for style in STYLES.values() for phrase in style.anything}
    for unnamed in (1, 0):
        x, captions = draw_images(data, 32, 60, torch.Generator().manual_seed(0), unnamed=unnamed)
        assert all((caption in anything) == unnamed for caption in captions)
        different = len({tuple(image.flatten()[::7].tolist()) for image in x})
        assert different <= len(data.files) < 60 if unnamed else different == 60


def test_held_out_drawings_are_never_trained_on(folder):
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    held = {row["file_name"] for row, out in zip(rows, held_out(rows), strict=True) if out}
    assert f"{HELD_OUT_ARTIST}/rocket.png" in held  # one artist's, of every third thing by name
    train, kept = (load_captioned(folder, 32, part=part) for part in ("train", "held out"))
    assert set(kept.files) == held
    assert not held & set(train.files)
    assert set(train.files) | held == {row["file_name"] for row in rows}


def test_hues_turn_and_greys_stay():
    colours = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.5]]).view(2, 3, 1, 1)
    turned = turn_hue(colours, torch.full((2,), 2 * torch.pi / 3)).flatten(1)
    torch.testing.assert_close(turned[1], torch.full((3,), 0.5))
    assert turned[0].max() > 0.99 and turned[0].argmax() != 0  # a third of the circle: another primary colour


def test_the_list_has_250_things():
    assert len(curated()) == len(set(curated())) == 250
