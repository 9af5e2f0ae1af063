"""What is measured of images with a judge; here one that reads thing and style from an image's first pixel."""

import pytest
import torch
import torch.nn.functional as F

from ifmodel.tiny.judge import both_found, fidelity, found, nearest, saturation, some_thing


class Reader:
    """Red is the thing, green the style, and blue how sure it is."""

    def __call__(self, x):
        thing, style, sure = x[:, :, 0, 0].unbind(1)
        return F.one_hot(thing.long(), 4) * sure[:, None], F.one_hot(style.long(), 3).float()

    def features(self, x):
        return x.flatten(1)


def images(things, styles=(0,), sure=(20,)):
    count = len(things)
    pixels = [things, list(styles) * (count // len(styles)), list(sure) * (count // len(sure))]
    return torch.tensor(pixels, dtype=torch.float32).T[:, :, None, None].expand(-1, -1, 2, 2)


def test_what_was_asked_for_is_found_plainly_and_in_its_style():
    x = images([0, 1, 2, 3, 3, 3], styles=[0, 0, 1, 2, 1, 1])
    shares = found(Reader(), x, torch.tensor([0, 2, 2, 3, 3, 0]), torch.tensor([0, 0, 1, 1, 1, 1]))
    styles = {"photo": {"thing": 0.5, "style": 1.0}, "drawing": {"thing": 0.75, "style": 0.75}}
    # of the last four: one of another style, one thing
    assert shares == {"plain": 0.5, "styled": 0.5, "named": 0.75, "by style": styles}


def test_some_thing_is_what_the_judge_is_sure_of():
    x = images([0, 1, 1, 2], sure=[20, 20, 20, 0.5])
    assert some_thing(Reader(), x) == {"some thing": 0.75, "different things": 2}


def test_both_things_of_an_illusion_are_found_in_their_own_ways():
    """Two pairs, two tries of each."""
    seen = images([0, 0, 2, 1]), images([1, 3, 3, 3])
    first, second = both_found(Reader(), seen, [(0, 1), (2, 3)])
    assert first.tolist() == [[True, True], [True, False]] and second.tolist() == [[True, False], [True, True]]


def test_fidelity_is_psnr_and_the_angle_between_features():
    original = torch.zeros(2, 3, 1, 1)
    original[:, 0] = 0.5
    assert fidelity(Reader(), original, original)["feature distance"] == 0
    other = original.roll(1, 1)  # at a right angle; the mean square of the difference is 1/6
    assert fidelity(Reader(), other, original) == pytest.approx({"PSNR": 13.8, "feature distance": 1}, abs=0.01)


def test_the_nearest_is_by_angle_not_by_distance():
    distance, which = nearest(torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.tensor([[0.0, 1.0], [9.0, 9.0]]))
    assert which.tolist() == [1, 0] and distance.tolist() == pytest.approx([1 - 0.5**0.5, 0])


def test_saturation_is_the_distance_between_channels():
    assert saturation(torch.full((2, 3, 4, 4), 0.3)) == 0
    assert saturation(torch.tensor([1.0, -1.0, 0.0]).view(1, 3, 1, 1)) == 1
