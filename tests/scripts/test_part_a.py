"""The scripts of Part A, end to end on a small random cascade, and what they refuse."""

from functools import partial
from itertools import combinations

import numpy
import pytest
import torch
from PIL import Image

from ddpm.process import ddim_step, dpm_solver_step
from ddpm.sampling import iterative_denoise, noise_source
from ifmodel import load_unet
from ifmodel.stage import LEARNED, SCHEDULE, STAGE_1_THRESHOLD, spaced_timesteps, stage_1
from ifmodel.t5 import embed_each, embed_prompts
from shared.images import read_image, read_mask
from tests.ifmodel.test_t5 import model_folder  # noqa: F401
from tests.scripts.test_generate import cascade  # noqa: F401

PROMPTS = ["a rocket ship", "a photo of a dog"]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setitem(embed_each.__kwdefaults__, "cache", cache)


@pytest.fixture
def model(cascade):  # noqa: F811
    return ["--model", cascade[0] / "stage_1", "--dtype", "float32", "--device", "cpu", "--steps", 3]


@pytest.fixture
def upscaler(cascade):  # noqa: F811
    return ["--upscaler", cascade[0] / "stage_2", "--upscaler-steps", 2]


@pytest.fixture
def photo(tmp_path):
    """An image with something in each quarter, of an odd size."""
    x = torch.linspace(0, 255, 50)
    pixels = torch.stack([x.expand(40, 50), x[:40, None].expand(40, 50), torch.full((40, 50), 90.0)], -1)
    Image.fromarray(pixels.byte().numpy()).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def read(path) -> numpy.ndarray:
    with Image.open(path) as image:
        assert {"Command", "Seed", "Software"} <= set(image.text)
        return numpy.asarray(image.convert("RGB")).astype(int)


def draw(run_script, tmp_path, name, *options, cells: list[str], size: int = 16):
    """Run a script and look at its table and its cells; returns the cells."""
    out = tmp_path / "out" / f"{name}.png"
    status, printed, err = run_script(name, *options, "--out", out)
    assert status == 0, err
    assert str(out) in printed
    assert read(out).std() > 10
    found = {path.stem.removeprefix(f"{name}_"): read(path) for path in out.parent.glob(f"{name}_*.png")}
    assert sorted(cell for cell in found if cell[0].isdigit()) == sorted(cells)
    assert all(found[cell].shape == (size, size, 3) for cell in cells)
    return found


@pytest.fixture
def labels(run_script, monkeypatch, tmp_path):
    """labels("name", "--option", value, …) -> the labels of the rows in the script's table."""

    def run(*arguments) -> list[str]:
        told = {}
        with monkeypatch.context() as patched:
            see = "shared.images.save_table"
            patched.setattr(see, lambda path, rows, **options: told.update(options, rows=rows))
            status, _, err = run_script(*arguments, "--out", tmp_path / "out.png")
        assert status == 0, err
        assert len(told["rows"]) == len(told["row_labels"])
        return told["row_labels"]

    return run


def table(rows: int, columns: int) -> list[str]:
    return [f"{i}_{j}" for i in range(rows) for j in range(columns)]


def test_a0_prompts_by_steps(run_script, tmp_path, model):
    cells = draw(run_script, tmp_path, "generate", *model[:-2], "--steps-grid", 2, 3, cells=table(2, 3))
    run_script("generate", *model, "--prompt", "a rocket ship", "--out", tmp_path / "alone.png")
    assert abs(cells["1_2"] - read(tmp_path / "alone.png")).max() <= 1


def test_a0_a_sampler_visits_its_own_timesteps(run_script, tmp_path, model):
    how = [*model[:-2], "--prompt", "a rocket ship", "--sampler", "dpm++"]
    cells = draw(run_script, tmp_path, "generate", *how, "--steps-grid", 4, 5, cells=table(2, 1))
    run_script("generate", *how, "--steps", 5, "--out", tmp_path / "alone.png")
    assert abs(cells["1_0"] - read(tmp_path / "alone.png")).max() <= 1


def test_a1_forward_process_grows_noisier(run_script, tmp_path, photo):
    options = ["--image", photo, "--size", 16]
    cells = draw(run_script, tmp_path, "forward_process", *options, cells=table(1, 8))
    with Image.open(photo) as image:
        original = numpy.asarray(image.crop((5, 0, 45, 40)).resize((16, 16), Image.Resampling.LANCZOS)).astype(int)
    distance = [abs(cells[f"0_{k}"] - original).mean() for k in range(8)]
    assert distance[0] < 5 and distance == sorted(distance)


def test_a2_the_blur_is_nearer_than_the_noise(run_script, tmp_path, photo):
    options = ["--image", photo, "--size", 64, "--timesteps", 0, 250, 500]
    cells = draw(run_script, tmp_path, "classical_denoise", *options, cells=table(2, 3), size=64)
    clean = cells["0_0"]
    for column in (1, 2):
        assert abs(cells[f"1_{column}"] - clean).mean() < abs(cells[f"0_{column}"] - clean).mean()


def test_a3_one_step(run_script, tmp_path, model, photo):
    options = [*model[:-2], "--image", photo, "--timesteps", 0, 500]
    cells = draw(run_script, tmp_path, "one_step_denoise", *options, cells=table(2, 2))
    assert abs(cells["1_0"] - cells["0_0"]).mean() < 5 < abs(cells["1_1"] - cells["0_1"]).mean()


def test_a4_frames_and_the_comparison(run_script, tmp_path, model, photo):
    options = [*model[:-2], "--stride", 90, "--image", photo, "--i-start", 4, "--every", 3]
    cells = draw(run_script, tmp_path, "iterative_denoise", *options, cells=table(1, 4))  # 3 frames of 8, the result
    assert len([cell for cell in cells if cell.startswith("compared_")]) == 5
    assert (cells["compared_0_4"] == cells["0_3"]).all()
    assert (cells["compared_0_1"] == cells["0_0"]).all()
    steps = sorted(cell for cell in cells if cell.startswith("steps_"))
    assert steps == [f"steps_{row}_{step}" for row in range(2) for step in range(8)]
    assert (cells["steps_0_3"] == cells["0_1"]).all() and (cells["steps_1_7"] == cells["0_3"]).all()


def test_a5_a6_without_and_with_guidance(run_script, tmp_path, model):
    cells = draw(run_script, tmp_path, "sample", *model, "--num-images", 2, cells=table(2, 2))
    assert abs(cells["0_0"] - cells["1_0"]).max() > 1
    again = draw(run_script, tmp_path / "b", "sample", *model, "--num-images", 2, "--guidance", 1, cells=table(2, 2))
    assert (again["0_0"] == cells["0_0"]).all() and (again["1_1"] == cells["0_1"]).all()


def test_guidance_in_an_interval(run_script, tmp_path, model):
    """In none of the timesteps it is γ = 1, in all of them it is guidance."""
    for name, interval in (("none", [998, 999]), ("all", [0, 999]), ("some", [300, 999])):
        options = [*model, "--num-images", 1, "--guidance-interval", *interval]
        cells = draw(run_script, tmp_path / name, "sample", *options, cells=table(2, 1))
        unlike = abs(cells["0_0"] - cells["1_0"]).max()
        if name == "none":
            assert unlike == 0
            continue
        assert unlike > 1
    run_script("sample", *model, "--num-images", 1, "--out", tmp_path / "plain.png")
    assert (read(tmp_path / "plain_1_0.png") == read(tmp_path / "all" / "out" / "sample_1_0.png")).all()
    assert abs(read(tmp_path / "plain_1_0.png") - cells["1_0"]).max() > 0


STEPS = {
    "ddpm": LEARNED,
    "ddim": ddim_step,
    "ddim with noise": partial(ddim_step, eta=1.0),
    "dpm++": dpm_solver_step,
    "dpm++ with noise": partial(dpm_solver_step, eta=1.0),
}


def test_every_sampler_takes_its_own_steps(run_script, tmp_path, model, cascade):  # noqa: F811
    """The script's image is that of `iterative_denoise` with the step meant, and of no other."""
    folder, prompt = cascade[0] / "stage_1", "a high quality photo"
    unet, embeds = load_unet(folder), embed_prompts(folder, [prompt, ""])
    estimate, drawn = stage_1(unet, embeds[prompt][None], embeds[""][None], 3.0), {}
    for name, step in STEPS.items():
        sampler, _, noisy = name.partition(" ")
        options = [*model, "--num-images", 1, "--guidance", 3, "--seed", 5]
        options += ["--sampler", sampler, "--eta", 1 if noisy else 0]
        cells = draw(run_script, tmp_path / name, "sample", *options, cells=table(2, 1))
        noise = noise_source([5], (3, 16, 16))
        timesteps = spaced_timesteps(sampler, 3, 1.0 if noisy else 0.0)
        loop = {"step": step, "threshold": STAGE_1_THRESHOLD}
        x = iterative_denoise(estimate, noise(), timesteps, SCHEDULE, noise=noise, **loop)
        drawn[name] = (x[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy() * 255
        assert abs(cells["1_0"] - drawn[name]).max() <= 1, name
    for one, other in combinations(drawn, 2):
        assert abs(drawn[one] - drawn[other]).max() > 10, (one, other)


@pytest.mark.parametrize("upscaled", [False, True])
def test_a7_a8_later_starts_stay_nearer(run_script, tmp_path, model, upscaler, photo, upscaled):
    options = [*model[:-2], "--steps", 10, "--image", photo, "--i-start", 0, 9, "--guidance", 2]
    options += [*upscaler] if upscaled else [option for prompt in PROMPTS for option in ("--prompt", prompt)]
    rows, size = (1, 32) if upscaled else (2, 16)
    cells = draw(run_script, tmp_path, "sdedit", *options, cells=table(rows, 3), size=size)
    if not upscaled:
        assert abs(cells["0_1"] - cells["0_2"]).mean() < abs(cells["0_0"] - cells["0_2"]).mean() / 2
        assert abs(cells["0_0"] - cells["1_0"]).max() > 1


@pytest.mark.parametrize("upscaled", [False, True])
def test_a9_known_pixels_are_the_images_own(run_script, tmp_path, model, upscaler, photo, upscaled):
    options = [*model, "--image", photo, "--mask", "rectangle:0.5,0,1,0.5", "--jump-length", 1, "--resamples", 2]
    options, size = (options + upscaler, 32) if upscaled else (options, 16)
    cells = draw(run_script, tmp_path, "inpaint", *options, cells=table(1, 4), size=size)
    half = size // 2
    hole = numpy.zeros((size, size), bool)
    hole[half:, :half] = True
    assert (cells["0_1"][hole] == 255).all() and (cells["0_1"][~hole] == 0).all()
    assert (cells["0_3"][~hole] == cells["0_0"][~hole]).all()
    assert abs(cells["0_3"][hole] - cells["0_0"][hole]).max() > 10


def test_a9_images_are_filled_together_as_alone(run_script, tmp_path, model, photo):
    """Each with its own prompt and mask, whatever the batches."""
    masks = {photo: "rectangle:0.5,0,1,0.5", "face": "circle:0.5,0.5,0.3", "rocket": "rectangle:0,0,0.5,1"}
    asked = [("--image", image, "--mask", mask, "--prompt", f"in {mask}") for image, mask in masks.items()]
    together = [option for one in asked for option in one]
    cells = draw(run_script, tmp_path, "inpaint", *model, *together, "--batch-size", 2, cells=table(3, 4))
    for k, one in enumerate(asked):
        (tmp_path / str(k)).mkdir()
        alone = draw(run_script, tmp_path / str(k), "inpaint", *model, *one, cells=table(1, 4))
        assert abs(cells[f"{k}_3"] - alone["0_3"]).max() <= 1


def test_a9_masks_say_how_they_were_read(run_script, tmp_path, model, photo):
    grey = numpy.zeros((40, 40), numpy.uint8)
    grey[:20], grey[20:30] = 255, 100
    Image.fromarray(grey).save(tmp_path / "mask.png")
    options = [*model, "--image", photo, "--mask", tmp_path / "mask.png", "--out", tmp_path / "out.png"]
    with pytest.warns(UserWarning) as notes:
        assert run_script("inpaint", *options)[0] == 0
    told = {str(note.message).partition("mask.png ")[2] for note in notes}
    laid = "is 40 × 40 and the image 40 × 50 (height × width): its centre is laid over the image's"
    assert {"has greys: what is lighter than half is the hole", laid} <= told
    mask = read(tmp_path / "out_0_1.png")
    assert (mask[:8] == 255).all() and (mask[8:] == 0).all()


def blob(height: int, width: int) -> numpy.ndarray:
    """A mask [H, W] of bool with an ellipse right of the middle and above it."""
    y, x = numpy.mgrid[:height, :width]
    return ((y - 0.4 * height) / (0.3 * height)) ** 2 + ((x - 0.6 * width) / (0.2 * width)) ** 2 < 1


@pytest.mark.parametrize("size", [(100, 160), (160, 100), (90, 90)])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_mask_lies_where_it_was_painted(tmp_path, recwarn, size, suffix):
    """An image that is its own mask: what is light in it is what the mask says."""
    path = tmp_path / f"photo.{suffix}"
    painted = Image.fromarray(blob(*size)).resize((10 * size[1], 10 * size[0]), Image.Resampling.NEAREST)
    painted.convert("L").save(path, quality=100)
    for target in ((32, 32), (24, 32)):
        mask = read_mask(str(path), target, path)
        assert mask.shape == (1, 1, *target)
        assert (mask == (read_image(path, target)[:, :1] > 0)).float().mean() > 0.98
    assert not [note for note in recwarn if "resized" in str(note.message) or "laid" in str(note.message)]


def test_a_turned_photo_has_a_turned_mask(tmp_path, recwarn):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by a quarter
    upright = Image.fromarray(blob(100, 160))
    upright.save(tmp_path / "mask.png")
    upright.transpose(Image.Transpose.ROTATE_90).convert("L").save(tmp_path / "photo.png", exif=exif)
    mask = read_mask(str(tmp_path / "mask.png"), (32, 32), tmp_path / "photo.png")
    assert (mask == (read_image(tmp_path / "photo.png", (32, 32))[:, :1] > 0)).float().mean() > 0.98
    assert not recwarn.list


def test_a_smaller_mask_is_resized(tmp_path):
    Image.new("L", (160, 100)).save(tmp_path / "photo.png")
    Image.fromarray(blob(50, 80)).save(tmp_path / "mask.png")
    with pytest.warns(UserWarning, match=r"is 50 × 80 and the image 100 × 160 \(height × width\): it is resized"):
        mask = read_mask(str(tmp_path / "mask.png"), (50, 50), tmp_path / "photo.png")
    assert (mask[0, 0].bool().numpy() == blob(50, 80)[:, 15:65]).all()


def test_masks_of_any_mode_are_read(tmp_path, recwarn):
    hole = blob(20, 20)
    grey = numpy.where(hole, 255, 0).astype(numpy.uint8)
    rgb = Image.fromarray(grey).convert("RGB")
    opaque = rgb.convert("RGBA")
    files = {
        "bits.png": Image.fromarray(hole),
        "grey.png": Image.fromarray(grey),
        "palette.png": rgb.convert("P"),
        "opaque.png": opaque,
        "sixteen.png": Image.fromarray(numpy.where(hole, 65535, 0).astype(numpy.uint16)),
        "sixteen.pgm": Image.fromarray(numpy.where(hole, 65535, 0).astype(numpy.uint16)),
        "float.tiff": Image.fromarray(hole.astype(numpy.float32)),
    }
    for name, image in files.items():
        image.save(tmp_path / name)
        mask = read_mask(str(tmp_path / name), (20, 20), tmp_path / name)
        assert (mask[0, 0].bool().numpy() == hole).all(), name
    assert not recwarn.list


def test_masks_with_transparency_say_what_decided(tmp_path):
    hole, photo = blob(20, 20), numpy.full((20, 20, 3), (240, 120, 30), numpy.uint8)
    photo[:5] = 255
    erased = Image.fromarray(numpy.dstack([photo, numpy.where(hole, 0, 255).astype(numpy.uint8)]))
    white = Image.fromarray(numpy.dstack([numpy.full_like(photo, 255), numpy.where(hole, 255, 0).astype(numpy.uint8)]))
    for image, what in ((erased, "transparent"), (white, "painted white")):
        image.save(tmp_path / "mask.png")
        with pytest.warns(UserWarning, match=f"mask.png is read from transparency: what is {what} is the hole"):
            mask = read_mask(str(tmp_path / "mask.png"), (20, 20), tmp_path / "mask.png")
        assert (mask[0, 0].bool().numpy() == hole).all()


@pytest.mark.parametrize("upscaled", [False, True])
def test_a10_every_row_is_a_view_of_the_image(run_script, tmp_path, model, upscaler, upscaled):
    options = [*model, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--num-images", 2, "--animate"]
    options, size = (options + upscaler, 32) if upscaled else (options, 16)
    cells = draw(run_script, tmp_path, "visual_anagram", *options, cells=table(2, 2), size=size)
    assert (cells["0_1"][::-1] == cells["1_1"]).all()
    with Image.open(tmp_path / "out" / "visual_anagram_0.gif") as animation:
        assert animation.n_frames > 20 and animation.size == (256, 256)


def test_a10_three_views(run_script, tmp_path, model):
    options = [*model, "--num-images", 1, "--reduction", "alternate"]
    for view, prompt in zip(("identity", "negate", "jigsaw"), [*PROMPTS, "a hat"], strict=True):
        options += ["--view", view, "--prompt", prompt]
    cells = draw(run_script, tmp_path, "visual_anagram", *options, cells=table(3, 1))
    assert abs(255 - cells["0_0"] - cells["1_0"]).max() <= 1


def test_a10_weights_and_rectified(run_script, tmp_path, model):
    options, drawn = [*model, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--num-images", 1], {}
    for name, more in {
        "plain": [],
        "weighed": ["--weight", 3, "--weight", 1],
        "rectified": ["--reduction", "rectified", "--view", "identity", "--view", "square_hinge"],
    }.items():
        cells = draw(run_script, tmp_path / name, "visual_anagram", *options, *more, cells=table(2, 1))
        drawn[name] = cells["0_0"].tobytes()
    assert len(set(drawn.values())) == 3


@pytest.mark.parametrize("upscaled", [False, True])
def test_restored_images_fit_what_is_seen(run_script, tmp_path, model, upscaler, photo, upscaled):
    options, size = (model + upscaler, 32) if upscaled else (model, 16)
    options = [*options, "--image", photo, "--prompt", PROMPTS[0], "--factor", 2, "--mask", "rectangle:0,0,0.5,0.5"]
    cells = draw(run_script, tmp_path, "restore", *options, cells=table(4, 4), size=size)
    colour, small, filled, everything = ([cells[f"{row}_{k}"] / 255 for k in range(4)] for row in range(4))
    known = numpy.ones((size, size), bool)
    known[: size // 2, : size // 2] = False

    def boxes(x):
        return x.reshape(size // 2, 2, size // 2, 2, 3).mean((1, 3)).repeat(2, 0).repeat(2, 1)

    def clipped(x):  # where the image had no room, what is saved fits less well
        return ((x <= 0) | (x >= 1)).any(-1)

    for (seen, _, restored, original), lost in (
        (colour, lambda x: x.mean(-1, keepdims=True).repeat(3, -1)),
        (small, boxes),
        (filled, lambda x: x),
        (everything, lambda x: boxes(x).mean(-1, keepdims=True).repeat(3, -1)),
    ):
        where = known if seen is filled[0] or seen is everything[0] else known | True
        where = where & (boxes(clipped(restored)[..., None].repeat(3, -1).astype(float))[..., 0] == 0)
        assert where.any()
        assert abs(lost(original) - seen)[where].max() < 0.01
        assert abs(lost(restored) - seen)[where].max() < 0.01
        assert abs(restored - original).max() > 0.05


def test_noise_makes_a_restoration_that_fits_less(run_script, tmp_path, model, photo):
    options = [*model, "--image", photo, "--task", "fill", "--prompt", PROMPTS[0]]
    exact, noisy = (
        draw(run_script, tmp_path / str(std), "restore", *options, "--noise", std, cells=table(1, 4))
        for std in (0, 0.5)
    )
    assert abs(exact["0_2"] - exact["0_0"])[:, 0].max() <= 1
    assert abs(noisy["0_2"] - noisy["0_0"])[:, 0].max() > 5
    assert (noisy["0_3"] == exact["0_3"]).all()


def test_a_hybrid_of_a_larger_sigma_leaves_more_to_the_near_prompt(run_script, tmp_path, model):
    options = [*model, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--num-images", 1]
    contrast = {}
    for sigma in (None, 2, 4):
        more = [] if sigma is None else ["--sigma", sigma]
        cells = draw(run_script, tmp_path / str(sigma), "hybrid_image", *options, *more, cells=table(3, 1))
        contrast[sigma] = cells["2_0"].std()
    assert contrast[None] == contrast[2] < contrast[4]


def test_prompts_for_each_image(run_script, tmp_path, model):
    """Several prompts are rows of their own in A5 and A6, and one for each image in A9."""
    two = ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1]]
    both = draw(run_script, tmp_path / "both", "sample", *model, *two, "--num-images", 1, cells=table(4, 1))
    second = draw(run_script, tmp_path / "one", "sample", *model, *two[2:], "--num-images", 1, cells=table(2, 1))
    assert all(abs(both[f"{row + 2}_0"] - second[f"{row}_0"]).max() <= 1 for row in (0, 1))
    images = ["--image", "face", "--image", "face"]
    cells = draw(run_script, tmp_path / "hole", "inpaint", *model, *images, *two, cells=table(2, 4))
    one = draw(run_script, tmp_path / "only", "inpaint", *model, *images[:2], *two[2:], cells=table(1, 4))
    assert abs(cells["1_3"] - one["0_3"]).max() <= 1 < abs(cells["0_3"] - one["0_3"]).max()


@pytest.mark.parametrize(("script", "rows"), [("visual_anagram", 2), ("hybrid_image", 3)])
def test_several_pairs_are_several_images(run_script, tmp_path, model, script, rows):
    """Each as if it had been asked for alone."""
    quick = ["--num-images", 1, "--animate"]
    asked = [part for prompt in (PROMPTS[0], PROMPTS[1], PROMPTS[1], PROMPTS[0]) for part in ("--prompt", prompt)]
    both = draw(run_script, tmp_path / "both", script, *model, *quick, *asked, cells=table(2 * rows, 1))
    second = draw(run_script, tmp_path / "one", script, *model, *quick, *asked[4:], cells=table(rows, 1))
    for row in range(rows):
        assert abs(both[f"{rows + row}_0"] - second[f"{row}_0"]).max() <= 1
    assert abs(both["0_0"] - second["0_0"]).max() > 10
    assert (tmp_path / "both" / "out" / f"{script}_1.gif").is_file()


@pytest.mark.parametrize("components", ["low_high_pass", "grey_colour"])
def test_a11_hybrids(run_script, tmp_path, model, upscaler, components):
    options = [*model, *upscaler, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--num-images", 1]
    options += ["--components", components, "--animate"]
    cells = draw(run_script, tmp_path, "hybrid_image", *options, cells=table(3, 1), size=32)
    parts = cells["1_0"] + cells["2_0"] - 127.5  # the second one has no mean and is shown around grey
    inside = (cells["2_0"] % 255 > 0) & (cells["0_0"] % 255 > 0)
    assert abs(parts - cells["0_0"])[inside].max() <= 1.5
    if components == "low_high_pass":
        assert numpy.diff(cells["1_0"], axis=1).std() < numpy.diff(cells["0_0"], axis=1).std() / 2
    else:
        assert abs(cells["1_0"] - cells["1_0"].mean(-1, keepdims=True)).max() < 1
    with Image.open(tmp_path / "out" / "hybrid_image_0.gif") as animation:
        assert animation.n_frames > 20


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        (["low_high_pass"], ["near view: b", "far view, low pass: a", "high pass: b"]),
        (["three_bands"], ["image", "coarse: a", "middle: b", "fine: c"]),
        (["grey_colour"], ["image", "grey: a", "colour: b"]),
        (["motion_blur"], ["image", "moving: a", "still: b"]),
        (["three_bands", "--keep"], ["image", "coarse: photo.png", "middle: a", "fine: a"]),
        (["low_high_pass", "--keep"], ["near view: a", "far view, low pass: photo.png", "high pass: a"]),
    ],
)
def test_a11_rows_say_which_component_they_are(labels, model, photo, options, rows):
    prompts = "a" if "--keep" in options else "abc"[: len(rows) - 1]
    options = [*options, photo] if "--keep" in options else options
    options = ["--components", *options, *(option for prompt in prompts for option in ("--prompt", prompt))]
    found = labels("hybrid_image", *model, "--num-images", 1, *options)
    assert [label.replace("\n", " ") for label in found] == rows


def test_a7_rows_of_several_images_are_told_apart(labels, model):
    options = [*model, "--i-start", 1]
    assert labels("sdedit", *options, "--image", "face", "--prompt", "a") == ["a"]
    told = [f"{image}:\n{prompt}" for image in ("face", "rocket") for prompt in "ab"]
    assert labels("sdedit", *options, "--image", "face", "--image", "rocket", "--prompt", "a", "--prompt", "b") == told


def test_a11_keeping_the_greys_of_an_image(run_script, tmp_path, model, photo):
    options = [*model, "--keep", photo, "--components", "grey_colour", "--prompt", PROMPTS[0], "--num-images", 1]
    cells = draw(run_script, tmp_path, "hybrid_image", *options, cells=table(3, 1))
    draw(run_script, tmp_path / "b", "forward_process", "--image", photo, "--size", 16, "--timesteps", 0, cells=["0_0"])
    # compared where no channel was clipped
    kept = (cells["0_0"].min(-1) > 0) & (cells["0_0"].max(-1) < 255)
    with Image.open(photo) as image:
        original = numpy.asarray(image.crop((5, 0, 45, 40)).resize((16, 16), Image.Resampling.LANCZOS)).astype(int)
    assert kept.any()
    assert abs(cells["0_0"].mean(-1) - original.mean(-1))[kept].max() <= 1.1


def test_images_of_any_mode_are_read(run_script, tmp_path):
    x = numpy.linspace(0, 1, 64)[None].repeat(48, 0)
    rgb = Image.fromarray((x[..., None] * [255, 255, 255]).astype(numpy.uint8))
    clear = rgb.convert("RGBA")
    clear.putalpha(0)
    turned = rgb.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by a quarter
    files = {
        "rgb.png": rgb,
        "grey.png": rgb.convert("L"),
        "palette.png": rgb.convert("P"),
        "cmyk.jpg": rgb.convert("CMYK"),
        "sixteen.png": Image.fromarray((x * 65535).astype(numpy.uint16)),
    }
    read_as = {}
    for name, image in files.items():
        image.save(tmp_path / name)
    turned.save(tmp_path / "turned.png", exif=exif)
    clear.save(tmp_path / "clear.png")
    for name in [*files, "turned.png", "clear.png"]:
        options = ["--image", tmp_path / name, "--size", 16, "--timesteps", 0, "--out", tmp_path / "out" / "a.png"]
        status, _, err = run_script("forward_process", *options)
        assert status == 0, err
        read_as[name] = read(tmp_path / "out" / "a_0_0.png")
    for name in [*files, "turned.png"]:
        assert abs(read_as[name] - read_as["rgb.png"]).mean() < 6, name
    assert read_as["clear.png"].mean() > 245  # transparent: white


def test_what_is_refused(refused, tmp_path, model, photo, capsys):
    out = ["--out", tmp_path / "refused.png"]

    def said(name, *options):
        line = refused(name, *options, *out)
        assert not out[1].exists()
        return line

    (tmp_path / "text.png").write_text("not an image")
    assert "is no image" in said("forward_process", "--image", tmp_path / "text.png")
    assert "no image at" in said("forward_process", "--image", tmp_path / "nowhere.png")
    for address in ("http://a.org/a.png", "https://a.org/a.png"):
        told = f"{address} is an address: download it first, and give the file"
        for script, option in (("sdedit", "--image"), ("inpaint", "--mask"), ("hybrid_image", "--keep")):
            assert told in said(script, *model, option, address, *["--prompt", "x"])
    assert "must be from 0 to 999, not 1000" in said("forward_process", "--timesteps", 1000)
    assert "--i-start must be from 0 to 2, not 3" in said("sdedit", *model, "--image", photo, "--i-start", 3)
    assert "a circle is 3 numbers" in said("inpaint", *model, "--image", photo, "--mask", "circle:1,2")
    forms = "no image at rectangel:0,0,1,1; a mask is a file, rectangle:TOP,LEFT,BOTTOM,RIGHT or circle:Y,X,RADIUS"
    assert forms in said("inpaint", *model, "--image", photo, "--mask", "rectangel:0,0,1,1")
    assert "--keep takes one --prompt: what the rest shows" in said("hybrid_image", *model, "--keep", photo)
    views = [option for name in ("identity", "negate", "rotate_90") for option in ("--view", name)]
    assert "give a --prompt for each of the 3 views" in said("visual_anagram", *model, *views)
    assert "TOP above BOTTOM" in said("inpaint", *model, "--image", photo, "--mask", "rectangle:0,0,0,0")
    assert "one for each of the 1 images, not 2" in said(
        "inpaint", *model, "--image", photo, "--mask", "circle:0,0,1", "--mask", "circle:0,0,1"
    )
    two = ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1]]
    assert "give a --prompt for each --view" in said("visual_anagram", *model, "--prompt", "one")
    assert "each of the 2 views a weight above 0, not 1, 0" in said(
        "visual_anagram", *model, *two, "--weight", 1, "--weight", 0
    )
    assert "alternate asks one view a step" in said(
        "visual_anagram", *model, *two, "--weight", 1, "--weight", 2, "--reduction", "alternate"
    )
    assert "16 × 16 pixels has no boxes of 3 × 3" in said("restore", *model, "--image", photo, "--factor", 3)
    assert "--noise must not be below 0, it is -1" in said("restore", *model, "--image", photo, "--noise", -1)
    assert "one for each of the 1 images, not 2" in said("restore", *model, "--image", photo, *two)
    line = said("visual_anagram", *model, *two, "--size", 16, 24, "--view", "identity", "--view", "rotate_90")
    assert "needs square images, not 16 × 24" in line
    line = said("visual_anagram", *model, *two, "--size", 16, 24, "--view", "identity", "--view", "pixels")
    assert "16 × 24 pixels cannot be cut into 16 × 16 patches" in line
    assert "give 3 --prompt for the components coarse, middle, fine, not 2" in said(
        "hybrid_image", *model, *two, "--components", "three_bands"
    )
    assert "--sigma is of --components low_high_pass, not of grey_colour" in said(
        "hybrid_image", *model, *two, "--components", "grey_colour", "--sigma", 3
    )
    assert "'0' is not above 0" in said("hybrid_image", *model, *two, "--sigma", 0)
    three = [*two, "--prompt", "a hat", "--image", photo, "--image", photo]
    assert "give one --prompt, or one for each of the 2 images, not 3" in said("inpaint", *model, *three)
    assert "'nan' is not a finite number" in said("sample", *model, "--guidance", "nan")
    assert "neither a number of steps nor one of fast27" in said("sample", *model[:-2], "--steps", "smart26")
    assert "not allowed with argument" in said("sample", *model, "--stride", 10)
    assert "unrecognized arguments: --upscaler x" in said("one_step_denoise", *model[:-2], "--upscaler", "x")


def test_images_masks_and_views_are_refused_before_t5_runs(refused, tmp_path, model, monkeypatch):
    def never(*_, **__):
        raise AssertionError("T5 was asked")

    monkeypatch.setattr("ifmodel.prompts.embed_each", never)
    out = ["--out", tmp_path / "new" / "out.png"]
    assert "no image at" in refused("sdedit", *model, "--image", tmp_path / "nowhere.png", *out)
    assert "no image at" in refused("inpaint", *model, "--mask", tmp_path / "nowhere.png", *out)
    odd = ["--size", 16, 24, "--view", "identity", "--view", "rotate_90"]
    assert "square" in refused("visual_anagram", *model, *odd, *out)
    assert "leave --steps" in refused("generate", *model, "--steps-grid", 2, *out)
    assert "4000000000" in refused("sample", *model, "--seed", 2**63, *out)
    assert not (tmp_path / "new").exists()


def test_what_would_be_taken_silently_is_refused(refused, tmp_path, model):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "own.png")
    out, own = ["--out", tmp_path / "out.png"], tmp_path / "own.png"
    assert "--eta is of ddim and dpm++" in refused("sample", *model, "--eta", 0.5, *out)
    assert "--upscaler is empty" in refused("sample", *model, "--upscaler", "", *out)
    for timestep in (-1, 1000):
        for command in (["forward_process"], ["one_step_denoise", *model[:-2]]):
            assert f"from 0 to 999, not {timestep}" in refused(*command, "--timesteps", timestep, *out)
    before = own.read_bytes()
    for script, options in (
        ("sdedit", model),
        ("inpaint", model),
        ("one_step_denoise", model[:-2]),
        ("forward_process", []),
    ):
        assert "would overwrite --image" in refused(script, *options, "--image", own, "--out", own)
    assert "would overwrite --keep" in refused("hybrid_image", *model, "--keep", own, "--prompt", "x", "--out", own)
    assert own.read_bytes() == before


def test_fewer_steps_than_the_default_starts(run_script, tmp_path, model, photo):
    draw(run_script, tmp_path, "sdedit", *model[:-1], 4, "--image", photo, cells=table(1, 3))  # 1, 3, the original
    draw(run_script, tmp_path, "iterative_denoise", *model, "--image", photo, cells=table(1, 2))


def test_pixels_are_those_of_stage_1(run_script, tmp_path, model, upscaler):
    options = [*model, *upscaler, "--num-images", 1, "--view", "identity", "--view", "pixels"]
    options += ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1]]
    cells = draw(run_script, tmp_path, "visual_anagram", *options, cells=table(2, 1), size=32)
    blocks = [cell.reshape(16, 2, 16, 2, 3).swapaxes(1, 2).reshape(256, -1) for cell in cells.values()]
    assert sorted(map(tuple, blocks[0])) == sorted(map(tuple, blocks[1])) and (blocks[0] != blocks[1]).any()
