"""What is measured in an exam, here of artists that draw by a rule, by a judge that reads colours."""

import pytest
import torch
import torch.nn.functional as F

from ifmodel import Cascade
from ifmodel.tiny.data import CaptionedImages
from ifmodel.tiny.exam import Exam
from ifmodel.tiny.measures import aliases, memory, named, taught, variety
from ifmodel.tiny.styles import STYLES

PHRASES = [["a dog", "a puppy"], ["a pear"], ["an owl"]]


def colours() -> CaptionedImages:
    """Three things in six styles: red is the thing, green the style."""
    rows = [(thing, style) for thing in range(3) for style in range(6)]
    images = torch.tensor([[50 * thing, 50 * style, 0, 255] for thing, style in rows], dtype=torch.uint8)
    names, (things, styles) = ["dog", "pear", "owl"], torch.tensor(rows).T
    images = images[:, :, None, None].expand(-1, -1, 32, 32)
    return CaptionedImages(images, things, styles, names, PHRASES, [[]] * 3, [""] * 18)


class Reader:
    def __call__(self, x):
        thing, style = ((x[:, :2].mean((2, 3)) + 1) / 2 * 255 / 50).round().long().unbind(1)
        return 20.0 * F.one_hot(thing, 6), 20.0 * F.one_hot(style, 6)

    def features(self, x):
        return x.mean((2, 3)) + 2


class Artist(Exam):
    """Draws what it is asked for."""

    def draw(self, name, jobs, guidance_scale, sampler=None):
        prompts = [prompt for job in jobs for prompt in job.recipe]
        return self.drawings(self.data, [self.row(prompt) for prompt in prompts])

    def row(self, prompt):
        thing = next(k for k, phrases in enumerate(PHRASES) if prompt.endswith(tuple(phrases)))
        starts = [style.templates[0].format("") for style in STYLES.values()]
        return self.data.rows(thing, next(k for k, start in enumerate(starts) if prompt.startswith(start)))[0]


class Dull(Artist):
    """Draws dogs."""

    def row(self, prompt):
        return 0


def exam(artist=Artist) -> Exam:
    return artist(Cascade("tiny-if/I"), Reader(), colours())


def test_who_draws_what_is_asked_for_passes():
    assert [named(exam(), 2.0, count=30)[kind] for kind in ("plain", "styled", "named")] == [1, 1, 1]
    assert aliases(exam(), 2.0) == {style: {"right": 1, "missed": []} for style in ("photo", "oil")}


def test_who_draws_the_same_always_does_not():
    shares = named(exam(Dull), 2.0, count=30)
    assert shares["plain"] == pytest.approx(1 / 3, abs=0.1) and shares["styled"] == 0 < shares["named"] < 0.5
    assert variety(exam(Dull), 2.0, count=3)["samples"] == 0
    assert memory(exam(), 2.0, count=12)["samples"] == pytest.approx(0, abs=1e-6)  # which copies drawings


def test_what_was_taught_and_forgotten():
    class Learned(Artist):
        def row(self, prompt):
            return super().row(prompt.replace("a zwx", "an owl"))

    measures = taught(exam(Dull), exam(Learned), "owl", "a photo of a zwx", 2.0, count=12, samples=2)
    assert measures["with"] == {"owl": 1, "others": 1, "others, but owl": 0}
    assert measures["without"]["owl"] == 0 < measures["without"]["others"] < 1


def test_a_cascade_with_stage_2_is_refused():
    with pytest.raises(ValueError, match="what stage 1 draws"):
        Exam(Cascade("tiny-if"), Reader(), colours())
