"""A folder of images, as a notebook fills it."""

from functools import partial

import numpy
import pytest
from PIL import Image

from ddpm.process import ddim_step
from ifmodel import Cascade
from ifmodel.folder import draw_folder

PROMPTS = ["a photo of a dog", "a photo of an owl"]


def test_a_folder_is_gone_on_with_and_holds_images_of_one_kind(tmp_path):
    cascade, options = Cascade("tiny-if/I"), {"num_steps": 2, "progress": False}
    draw_folder(cascade, PROMPTS, str(tmp_path), seeds=[1, 2], batch_size=3, **options)
    paths = sorted(tmp_path.iterdir())
    assert [path.name for path in paths] == ["00000_0.png", "00000_1.png", "00001_0.png", "00001_1.png"]
    alone = cascade.draw(PROMPTS[1], seeds=[2], **options)[0] / 2 + 0.5
    expected = (alone.clamp(0, 1) * 255).permute(1, 2, 0).numpy()
    assert abs(numpy.asarray(Image.open(paths[3])) - expected).max() <= 1
    paths[3].unlink()
    times = [path.stat().st_mtime_ns for path in paths[:3]]
    draw_folder(cascade, PROMPTS, tmp_path, seeds=[1, 2], **options)
    assert [path.stat().st_mtime_ns for path in paths[:3]] == times
    assert abs(numpy.asarray(Image.open(paths[3])) - expected).max() <= 1
    for other in ({"guidance_scale": 3.0}, {"timesteps": [900, 300]}):
        with pytest.raises(ValueError, match="drawn with other options: name another folder"):
            draw_folder(cascade, PROMPTS, tmp_path, seeds=[1, 2], **options, **other)
    with pytest.raises(ValueError, match="drawn from another seed"):
        draw_folder(cascade, PROMPTS, tmp_path, seeds=[2, 1], **options)
    with pytest.raises(ValueError, match="nothing to draw: 0 prompts from 1 seeds"):
        draw_folder(cascade, [], tmp_path)
    with pytest.raises(ValueError, match="a list of 2000000000 images needs about 2,000"):
        draw_folder(cascade, PROMPTS[:2], tmp_path, seeds=range(10**9))
    with pytest.raises(TypeError, match="did you mean num_steps"):
        draw_folder(cascade, PROMPTS, tmp_path, num_step=2)


def test_a_step_of_ones_own_and_the_empty_prompt_are_known_again(tmp_path):
    """Not by the function's address, which is another in every process."""

    def made():
        def own_step(x_t, predicted, t, t_prev, schedule, noise):
            return predicted.x_0

        return own_step

    options = {"num_steps": 4, "progress": False}
    for step in (made(), made(), partial(made()), partial(made())):
        folder = tmp_path / type(step).__name__
        draw_folder(Cascade("tiny-if/I"), ["", "a dog"], folder, sampler=step, **options)
    with pytest.raises(ValueError, match="drawn with other options"):
        draw_folder(Cascade("tiny-if/I"), ["", "a dog"], folder, sampler=ddim_step, **options)
