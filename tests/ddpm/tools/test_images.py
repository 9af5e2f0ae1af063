"""Images and masks as people have them: values of other ranges, transparency, more pixels than fit."""

import numpy
import pytest
import torch
from PIL import Image, ImageDraw

from ddpm.tools.files import load_tensors
from ddpm.tools.images import read_image, read_mask
from ifmodel.dreambooth import read_folder
from ifmodel.tiny.loading import load_captioned

RAMP = numpy.linspace(0, 1, 256).reshape(16, 16)
RANGES = {
    "16 bits": (RAMP * 65535, numpy.uint16, None),
    "12 bits in 16": (RAMP * 4095, numpy.uint16, "4095 is white"),
    "8 bits in 16": (RAMP * 255, numpy.uint16, "255 is white"),
    "8 bits in 32": (RAMP * 255, numpy.int32, "255 is white"),
    "floats from 0 to 1": (RAMP, numpy.float32, None),
    "floats from -1 to 1": (RAMP * 2 - 1, numpy.float32, "-1 is black and 1 is white"),
    "floats from 0 to 255": (RAMP * 255, numpy.float32, None),
}


@pytest.mark.parametrize("name", RANGES)
def test_every_range_is_the_same_image(tmp_path, recwarn, name):
    values, dtype, told = RANGES[name]
    Image.fromarray((values.round() if dtype != numpy.float32 else values).astype(dtype)).save(tmp_path / "ramp.tiff")
    found = read_image(tmp_path / "ramp.tiff", (16, 16))
    torch.testing.assert_close(found[0, 1].numpy(), (RAMP * 2 - 1).astype(numpy.float32), atol=0.01, rtol=0)
    messages = [str(warning.message) for warning in recwarn.list]
    assert [told in message for message in messages] == ([True] if told else [])


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (numpy.where(RAMP > 0.5, numpy.nan, RAMP).astype(numpy.float32), "from nan to nan"),
        (numpy.where(RAMP > 0.5, numpy.inf, RAMP).astype(numpy.float32), "from 0 to inf"),
        ((RAMP * 8 - 4).astype(numpy.float32), "from -4 to 4"),
        ((RAMP * 100_000).astype(numpy.int32), "from 0 to 100000"),
        ((RAMP * 100 - 50).astype(numpy.int32), "from -50 to 50"),
    ],
)
def test_values_of_no_range_are_refused(tmp_path, values, told):
    Image.fromarray(values).save(tmp_path / "odd.tiff")
    for read in (read_image, lambda path, size: read_mask(str(path), size, path)):
        with pytest.raises(ValueError, match=rf"odd\.tiff has values {told}: save it with 8 bits"):
            read(tmp_path / "odd.tiff", (16, 16))


def disc(soft: bool = False) -> Image.Image:
    """A white disc on black, 64 × 64; soft: drawn larger and shrunk, so that its edge has greys."""
    side = 512 if soft else 64
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).ellipse([side // 4, side // 4, side * 3 // 4, side * 3 // 4], fill=255)
    return mask.resize((64, 64), Image.Resampling.BOX)


def alphas() -> dict[str, Image.Image]:
    few, corners = Image.new("L", (64, 64), 255), Image.new("L", (64, 64))
    few.paste(0, (3, 3, 6, 6))
    ImageDraw.Draw(corners).rounded_rectangle((0, 0, 63, 63), 12, fill=255)
    return {"few": few, "corners": corners, "254": Image.new("L", (64, 64), 254)}


@pytest.mark.filterwarnings("ignore:the mask")
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("under", [0, 255])
@pytest.mark.parametrize("alpha", alphas())
def test_a_white_disc_is_the_hole_whatever_else_is_transparent(tmp_path, alpha, under, soft):
    """under: what colour lies below what is transparent."""
    mask, alpha = disc(soft), alphas()[alpha]
    grey = Image.composite(mask, Image.new("L", mask.size, under), alpha.point(lambda a: 255 * (a > 0)))
    Image.merge("RGBA", [grey, grey, grey, alpha]).save(tmp_path / "mask.png")
    found = read_mask(str(tmp_path / "mask.png"), (64, 64), tmp_path / "mask.png")
    assert (found[0, 0].bool().numpy() == (numpy.asarray(mask) > 127)).all()


@pytest.mark.filterwarnings("ignore:the mask")
@pytest.mark.parametrize("colour", ["photo", "black"])
def test_what_was_erased_is_the_hole_where_the_colours_are_no_mask(tmp_path, colour):
    noise = numpy.random.default_rng(0).integers(0, 256, (64, 64, 3)) * (colour == "photo")
    pixels = numpy.dstack([noise, 255 - numpy.asarray(disc())]).astype(numpy.uint8)
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    found = read_mask(str(tmp_path / "mask.png"), (64, 64), tmp_path / "mask.png")
    assert (found[0, 0].bool().numpy() == (numpy.asarray(disc()) > 127)).all()


def test_pixels_are_bounded_by_memory(tmp_path, monkeypatch):
    """Of images that a script is given, and of those that a training reads."""
    Image.new("RGB", (300, 200)).save(tmp_path / "large.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "large.png", "text": "nothing"}')
    monkeypatch.setattr("ddpm.tools.memory.free_memory", lambda device: 16 * 300 * 200 - 1)
    for read in (lambda: read_image(tmp_path / "large.png", (16, 16)), lambda: load_captioned(tmp_path, 16)):
        with pytest.raises(ValueError, match="reading 300 × 200 pixels needs about"):
            read()
    monkeypatch.setattr("ddpm.tools.memory.free_memory", lambda device: 16 * 300 * 200)
    read_image(tmp_path / "large.png", (16, 16))


def test_a_training_reads_every_range_too(tmp_path):
    Image.fromarray((RAMP * 65535).astype(numpy.uint16)).save(tmp_path / "ramp.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "ramp.png", "text": "a ramp"}')
    data = load_captioned(tmp_path, 16)
    torch.testing.assert_close(data.images[0, 0].numpy(), (RAMP * 255).round().astype(numpy.uint8), atol=1, rtol=0)


def test_a_folder_of_a_phone_says_what_is_left_out(tmp_path, recwarn):
    """Its .heic, of which Pillow knows nothing; and not what macOS and its like leave beside each file."""
    for name in ("IMG_1.HEIC", "._IMG_2.JPG", ".DS_Store"):
        (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    Image.new("RGB", (9, 9), "red").save(tmp_path / "IMG_2.JPG")
    assert read_folder(tmp_path, 8).shape == (1, 3, 8, 8)
    assert [str(warning.message) for warning in recwarn.list] == [f"{tmp_path}: IMG_1.HEIC is left out"]
    with pytest.raises(ValueError, match="HEIC is no image that Pillow reads"):
        read_image(tmp_path / "IMG_1.HEIC", (8, 8))


def test_a_pointer_of_git_lfs_is_called_one(tmp_path):
    path = tmp_path / "dog.png"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    for read in (lambda: read_image(path, (8, 8)), lambda: load_tensors(path)):
        with pytest.raises(ValueError, match="it only names the file for Git LFS: run `git lfs pull`"):
            read()


def test_a_mask_of_a_segmentation_says_that_white_is_255(tmp_path):
    Image.fromarray((RAMP > 0.5).astype(numpy.uint8)).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=r"mask\.png has no hole: its largest value is 1, and white is 255"):
        read_mask(str(tmp_path / "mask.png"), (16, 16), tmp_path / "mask.png")


def test_shapes_are_named_in_any_case():
    for name in ("circle:.5,.5,.2", "rectangle:0.1,0,1,1"):
        assert torch.equal(read_mask(name.title(), (16, 16), ""), read_mask(name, (16, 16), ""))
