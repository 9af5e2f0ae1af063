"""`Cascade`: prompts in, images out, by any estimate and any loop; the same images as the scripts."""

import math
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy
import pytest
import torch
from PIL import Image

from ddpm.components import low_high_pass
from ddpm.process import ddim_step, ddpm_step
from ddpm.restoration import downscale, restore
from ddpm.sampling import anagram, compose, hybrid, inpaint, iterative_denoise, projected, rescaled, sdedit
from ddpm.schedule import leading_timesteps
from ddpm.views import identity, vertical_flip
from ifmodel import Cascade, cascade
from ifmodel.jobs import Stage
from ifmodel.options import warn_of_noise
from ifmodel.stage import SAMPLERS, SCHEDULE, load_stage

FEW = {"num_steps": 3, "upscaler_steps": 2}


@pytest.fixture(scope="module")
def tiny():
    return Cascade("tiny-if")


@pytest.fixture(scope="module")
def drawn(tiny):
    """Two prompts, a seed each."""
    return tiny.draw(["a photo of a dog", "a rocket ship"], seeds=[1, 2], **FEW)


def pixels(image: torch.Tensor) -> numpy.ndarray:
    return ((image / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def test_a_prompt_for_each_seed_gives_the_images_of_the_script(run_script, tmp_path, drawn):
    assert drawn.shape == (2, 3, 128, 128)
    options = ("--steps", 3, "--upscaler-steps", 2, "--dtype", "float32", "--device", "cpu")
    for prompt, seed, image in zip(["a photo of a dog", "a rocket ship"], [1, 2], drawn, strict=True):
        out = tmp_path / f"{seed}.png"
        status, _, err = run_script("generate", "--prompt", prompt, "--seed", seed, "--out", out, *options)
        assert status == 0, err
        difference = numpy.asarray(Image.open(out)).astype(int) - pixels(image)
        assert abs(difference).max() <= 1  # of 255: alone and side by side they are rounded differently


def test_one_prompt_serves_all_seeds_whatever_the_batches(tiny):
    together = tiny.draw("a photo of a dog", seeds=[1, 2, 3], **FEW)
    apart = tiny.draw("a photo of a dog", seeds=[1, 2, 3], batch_size=2, **FEW)
    torch.testing.assert_close(together, apart, atol=1e-3, rtol=0)
    assert not torch.allclose(together[0], together[1], atol=0.1)


def test_every_recipe_and_algorithm_goes_through_both_stages(tiny):
    x_0, mask = torch.zeros(1, 3, 32, 32), torch.zeros(1, 1, 32, 32)
    mask[..., 8:24, 8:24] = 1
    flip = vertical_flip()

    def illusion(stage: Stage):
        first = stage.estimate("a photo of a light bulb")
        return anagram([first, stage.estimate("a photo of a pear", view=flip)], [identity(), flip])

    def mixed(stage: Stage):
        return hybrid([stage.estimate("a photo of a deer"), stage.estimate("a photo of a giraffe")], low_high_pass())

    def both(stage: Stage):
        estimates = [
            stage.estimate("a photo of a dog", guider=guider) for guider in (rescaled(0.7), projected(SCHEDULE))
        ]
        return compose([*estimates, stage.estimate("")], [1.0, 0.5, -0.5])

    for recipe, algorithm in (
        ("a rocket ship", partial(sdedit, x_0=x_0, i_start=1)),
        ("a man wearing a hat", partial(inpaint, x_orig=x_0, mask=mask)),
        (illusion, cascade.sample),
        (mixed, cascade.sample),
        (both, cascade.sample),
    ):
        image = tiny.draw(recipe, algorithm, seeds=[1], **FEW)
        assert image.shape == (1, 3, 128, 128)
        assert image.isfinite().all()
    y = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    algorithms = [partial(restore, y=y, operator=downscale(n)) for n in (1, 4)]
    image = tiny.draw("a rocket ship", algorithms[0], seeds=[1], upscale=algorithms[1], **FEW)
    torch.testing.assert_close(torch.nn.functional.avg_pool2d(image, 4), y, atol=1e-5, rtol=0)


def test_a_view_of_the_recipe_turns_what_stage_2_sees(tiny, drawn):
    """Asked for in flipped views alone, the image is that of flipped noise, in both stages: it is another one."""
    flip = vertical_flip()

    def upside_down(stage: Stage):
        return anagram([stage.estimate("a photo of a dog", view=flip)], [flip])

    turned = tiny.draw(upside_down, seeds=[1], num_steps=20, upscaler_steps=5)
    upright = tiny.draw("a photo of a dog", seeds=[1], num_steps=20, upscaler_steps=5)
    small = torch.nn.functional.avg_pool2d
    # stage 2 keeps to the small image as it lies, and would not if it saw it the other way up
    alone = Cascade("tiny-if/I").draw(upside_down, seeds=[1], num_steps=20)
    assert (small(turned, 4) - alone).abs().mean() < 0.5 * (small(turned.flip(2), 4) - alone).abs().mean()
    assert not torch.allclose(turned, upright, atol=0.1)


def test_the_sampler_is_that_of_stage_1(tiny, monkeypatch):
    sides = []

    def watched_step(x_t, *rest):
        sides.append(x_t.shape[-1])
        return ddpm_step(x_t, *rest)

    monkeypatch.setitem(SAMPLERS, "watched", watched_step)
    assert tiny.draw("a photo of a dog", seeds=[1], sampler="watched", **FEW).shape[-1] == 128
    assert sides == [32, 32]  # the third step is to the clean image


def test_a_step_function_is_a_sampler():
    small = Cascade("tiny-if/I", size=(16, 16))
    few = {"seeds": [1], "num_steps": 3, "progress": False}
    by_name = small.draw("a photo of a dog", sampler="ddim", eta=0.5, **few)
    assert torch.equal(small.draw("a photo of a dog", sampler=partial(ddim_step, eta=0.5), **few), by_name)
    assert torch.equal(small.draw("a photo of a dog", sampler=ddim_step, eta=0.5, **few), by_name)
    assert not torch.equal(small.draw("a photo of a dog", sampler=ddim_step, **few), by_name)


def test_in_float16_the_schedule_and_thresholding_stay_in_float32(monkeypatch):
    """Only the UNet computes in it: everything between its steps is float32, as is the image."""
    seen = set()

    def watched_step(x_t, predicted, t, t_prev, schedule, noise):
        seen.update({x_t.dtype, predicted.x_0.dtype, predicted.v.dtype, noise.dtype})
        return ddpm_step(x_t, predicted, t, t_prev, schedule, noise, variance="learned_range")

    monkeypatch.setitem(SAMPLERS, "watched", watched_step)
    half, full = (Cascade("tiny-if/I", size=(16, 16), dtype=dtype) for dtype in (torch.float16, torch.float32))
    image = half.draw("a photo of a dog", seeds=[1], sampler="watched", num_steps=3)
    assert {parameter.dtype for parameter in half._unets[1].parameters()} == {torch.float16}
    assert seen == {torch.float32} and image.dtype == torch.float32
    assert (image - full.draw("a photo of a dog", seeds=[1], num_steps=3)).abs().mean() < 0.02


def test_both_stages_stay_in_memory_where_they_fit(tiny, drawn, monkeypatch):
    """Then a second call loads none; where they do not, one is freed for the other, for the same images."""
    assert tiny.keeps_all()
    loads = []

    def loading(files, *how, **options):
        loads.append(files.source)
        return load_stage(files, *how, **options)

    monkeypatch.setattr(cascade, "load_stage", loading)
    tiny.draw("a photo of a dog", seeds=[1], **FEW)
    assert loads == []
    monkeypatch.setattr(cascade, "free_memory", lambda device: 10_000_000)
    tight = Cascade("tiny-if")
    again = tight.draw(["a photo of a dog", "a rocket ship"], seeds=[1, 2], **FEW)
    assert loads == ["tiny-if/I", "tiny-if/II"] and list(tight._unets) == [2]
    assert torch.equal(again, drawn)


def test_embeddings_do_not_gather_in_memory():
    small = Cascade("tiny-if/I", size=(16, 16))
    assert list(small.prompts.cache(["a photo of a dog", "a hat"])) == ["a photo of a dog", "a hat"]
    assert not small.prompts._found
    for prompt in ("a photo of a dog", "a hat"):
        small.draw(prompt, seeds=[1], num_steps=1, progress=False)
        assert set(small.prompts._found) == {prompt, ""}


def test_the_model_may_be_stage_1_alone():
    assert Cascade("tiny-if/I").draw("a photo of a dog", seeds=[1], num_steps=2).shape == (1, 3, 32, 32)
    assert Cascade("tiny-if", upscaler="none").sizes == [(32, 32)]


def edit_of(x_0) -> dict:
    return {"recipe": "a dog", "algorithm": partial(sdedit, x_0=x_0, i_start=0), "seeds": [1]}


def test_images_must_have_the_channels_of_what_is_drawn(tiny):
    for channels in (1, 4):
        with pytest.raises(ValueError, match=f"x_0 has {channels} channels, but what is sampled 3"):
            tiny.draw(**edit_of(torch.zeros(1, channels, 32, 32)), **FEW)


def test_numbers_of_any_kind_are_seeds_timesteps_and_sizes(tiny, drawn):
    prompts = ["a photo of a dog", "a rocket ship"]
    for seeds in (torch.tensor([1, 2]), numpy.arange(1, 3), range(1, 3)):
        assert torch.equal(tiny.draw(prompts, seeds=seeds, negative_prompt=None, **FEW), drawn)
    timesteps = [torch.tensor([900, 500, 0]), numpy.array([900, 500, 0]), [900, 500, 0]]
    images = [tiny.draw("a dog", seeds=[1], timesteps=given, **FEW) for given in timesteps]
    assert torch.equal(images[0], images[2]) and torch.equal(images[1], images[2])
    assert Cascade("tiny-if", size=64).sizes == [(64, 64), (256, 256)]
    assert Cascade("tiny-if", device="auto", dtype="float32").dtype == torch.float32


def test_as_many_images_as_seeds_are_edited_each_on_its_own():
    tiny, x_0 = Cascade("tiny-if/I"), torch.rand(3, 3, 32, 32) * 2 - 1
    options = {"batch_size": 2, "num_steps": 4, "progress": False}
    images = tiny.draw("a dog", partial(sdedit, x_0=x_0, i_start=2), seeds=[1, 2, 3], **options)
    for k in range(3):
        alone = tiny.draw("a dog", partial(sdedit, x_0=x_0[k : k + 1], i_start=2), seeds=[k + 1], **options)
        torch.testing.assert_close(images[k : k + 1], alone, atol=1e-4, rtol=0)


def test_as_many_holes_as_seeds_are_filled_each_on_its_own():
    """In both stages, of which the second has images and masks of its own size, in batches that part them."""
    tiny, prompts = Cascade("tiny-if"), ["a dog", "a rocket ship", "a fox"]
    generator = torch.Generator().manual_seed(0)
    known = {32: torch.rand(3, 3, 32, 32, generator=generator) * 2 - 1, 128: torch.zeros(3, 3, 128, 128)}
    masks = {size: torch.zeros(3, 1, size, size) for size in known}
    for size, mask in masks.items():
        for k in range(3):
            mask[k, :, : size // 4 * (k + 1)] = 1

    def draw(rows: slice, batch_size: int):
        fill, upscale = (partial(inpaint, x_orig=known[size][rows], mask=masks[size][rows]) for size in known)
        given = {"seeds": [1, 2, 3][rows], "upscale": upscale, "batch_size": batch_size, "num_steps": 4}
        return tiny.draw(prompts[rows], fill, **given, upscaler_steps=4, progress=False)

    images = draw(slice(3), 2)
    for k in range(3):
        torch.testing.assert_close(images[k : k + 1], draw(slice(k, k + 1), 1), atol=1e-3, rtol=0)
        assert (images[k, :, 32 * (k + 1) :] == 0).all() and (images[k, :, : 32 * (k + 1)] != 0).any()


def test_a_mask_of_height_and_width_alone_is_for_all():
    tiny, x_orig, mask = Cascade("tiny-if/I"), torch.zeros(1, 3, 32, 32), torch.zeros(32, 32)
    mask[:8] = 1
    given = {"seeds": [1, 2, 3], "num_steps": 4, "batch_size": 2, "progress": False}
    images = [tiny.draw("a dog", partial(inpaint, x_orig=x_orig, mask=m), **given) for m in (mask, mask[None, None])]
    assert torch.equal(*images) and (images[0][:, :, 8:] == 0).all()


def test_it_draws_for_several_threads(tiny):
    """Each keeps its own prompts until its images are there, as a web server needs it."""
    prompts = ["a photo of a dog", "a rocket ship", "a photo of an owl"]
    with ThreadPoolExecutor(3) as pool:
        drawn = list(pool.map(lambda prompt: tiny.draw(prompt, seeds=[1], **FEW), prompts))
    for prompt, images in zip(prompts, drawn, strict=True):
        assert torch.equal(images, tiny.draw(prompt, seeds=[1], **FEW))


def test_it_warns_of_steps_that_leave_noise_and_not_of_negative_prompts(recwarn):
    tiny = Cascade("tiny-if/I")
    tiny.draw("a photo of a dog", seeds=[1], num_steps=4, negative_prompt="blurry, low quality", progress=False)
    late = {"timesteps": [600, 300, 0], "progress": False}  # of an image that is noised, few and late are right
    tiny.draw("a photo of a dog", partial(sdedit, x_0=torch.zeros(1, 3, 32, 32), i_start=0), seeds=[1], **late)
    x_t = torch.zeros(1, 3, 32, 32)
    tiny.draw(
        "a photo of a dog", lambda noise, **loop: iterative_denoise(x_t=x_t, noise=noise, **loop), seeds=[1], **late
    )
    assert not recwarn.list
    with pytest.warns(UserWarning, match="3 steps begin at t = 600"):
        tiny.draw("a photo of a dog", seeds=[1], **late)
    with pytest.warns(UserWarning, match="1 step begins at t = 0 of 1000, so noise will stay: take 4 to 333") as told:
        tiny.draw("a photo of a dog", seeds=[1], num_steps=1, progress=False)
    assert told[0].filename == __file__  # of the caller
    with pytest.warns(UserWarning, match="600 steps begin at t = 599"):
        warn_of_noise(1, leading_timesteps(1000, 600))


def test_bad_arguments_are_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr("ifmodel.stage.load_unet", lambda *_, **__: pytest.fail("a UNet was loaded"))
    tiny = Cascade("tiny-if")
    edit = edit_of(torch.zeros(1, 3, 32, 32))
    for told, arguments in (
        ("one for each of the 2 seeds, not 1", {"recipe": ["a dog"], "seeds": [1, 2]}),
        ("seeds must hold", {"recipe": "a dog", "seeds": []}),
        ("sampler must be one of", {"recipe": "a dog", "seeds": [1], "sampler": "euler"}),
        ("steps must be from 1 to 1000", {"recipe": "a dog", "seeds": [1], "num_steps": 1001}),
        ("takes no eta: bind", {"recipe": "a dog", "seeds": [1], "sampler": ddpm_step, "eta": 0.5}),
        *((r"seeds must be a list .*, not", {"recipe": "a dog", "seeds": seeds}) for seeds in (1, [1.5], ["1"], None)),
        ("a seed must be from 0", {"recipe": "a dog", "seeds": [-1]}),
        ("give a prompt", {"recipe": None, "seeds": [1]}),
        ("must return an estimate", {"recipe": lambda stage: None, "seeds": [1]}),
        (
            "views must be made first",
            {"recipe": lambda stage: anagram([stage.estimate("a")], [identity]), "seeds": [1]},
        ),
        *(("must be a whole number", {"recipe": "a", "seeds": [1], "num_steps": steps}) for steps in ("5", 1.5)),
        ("noise_level must be a whole number", {"recipe": "a", "seeds": [1], "noise_level": 1.5}),
        ("guidance_scale must be a finite number", {"recipe": "a", "seeds": [1], "guidance_scale": math.nan}),
        ("batch_size must be at least 1", {"recipe": "a", "seeds": [1], "batch_size": 0}),
        ("no timesteps to visit", {"recipe": "a", "seeds": [1], "timesteps": []}),
        ("must fall strictly", {"recipe": "a", "seeds": [1], "timesteps": [0, 10]}),
        ("timestep 1000 is outside", {"recipe": "a", "seeds": [1], "timesteps": [1000, 10]}),
        *(
            (r"x_0 must be a float tensor \[B, 3, H, W\] in \[-1, 1\]", edit_of(x_0))
            for x_0 in (
                numpy.zeros((1, 3, 32, 32)),
                torch.zeros(3, 32, 32),
                torch.zeros(1, 3, 32, 32).byte(),
                torch.full((1, 3, 32, 32), 255.0),
            )
        ),
        ("x_0 has 2 images for 1 seeds", edit_of(torch.zeros(2, 3, 32, 32))),
        ("mask has 2 images for 1 seeds", {**edit, "upscale": partial(inpaint, mask=torch.zeros(2, 1, 128, 128))}),
    ):
        with pytest.raises(ValueError, match=told):
            tiny.draw(**arguments)
    for name in ("schedule", "step"):
        for algorithms in (
            {"algorithm": partial(sdedit, **{name: None})},
            {"upscale": partial(sdedit, **{name: None})},
        ):
            with pytest.raises(ValueError, match=f"the cascade gives {name} to an algorithm itself"):
                tiny.draw("a dog", seeds=[1], **algorithms)
    for name, told in (("steps", " (did you mean num_steps?): there are num_steps, sampler"), ("x", ": there are")):
        with pytest.raises(TypeError, match=re.escape(f"draw has no option {name}{told}")):
            tiny.draw("a dog", seeds=[1], **{name: 3})
    with pytest.raises(
        TypeError, match=r"no option x_0: .*; bind the algorithm's own arguments with functools.partial"
    ):
        tiny.draw("a dog", sdedit, seeds=[1], x_0=torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="is a stage-2 model, not a stage-1 one"):
        Cascade("tiny-if/II")
