"""What is measured of digits with a judge; here one that takes the brightest of ten pixels for the digit."""

import pytest
import torch
from torch import nn

from ddpm.mnist.judge import measure_samples
from ddpm.mnist.training import denoiser_error


class Reader(nn.Module):
    last = nn.Identity()

    def features(self, x):
        return x.flatten(1)[:, :10]


def test_samples_are_confirmed_as_asked_and_near_to_themselves():
    images = torch.rand(40, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    digits = images.flatten(1)[:, :10].argmax(1)
    asked, real = digits.clone(), images.flatten(1)[:, :10].double()
    asked[:10] = (asked[:10] + 1) % 10
    measures, read = measure_samples(Reader(), images, asked, real)
    assert torch.equal(read, digits) and measures["confirmed"] == 0.75
    assert measures["fid"] == pytest.approx(0, abs=1e-6)
    shifted, _ = measure_samples(Reader(), images, None, real[:20] + 1)  # of as many images, ten features moved by 1
    alike, _ = measure_samples(Reader(), images, None, real[:20])
    assert shifted.keys() == {"fid"} and shifted["fid"] == pytest.approx(10 + alike["fid"], abs=1e-6)


def test_the_error_of_doing_nothing_is_sigma_squared():
    x = torch.rand(600, 1, 28, 28, generator=torch.Generator().manual_seed(0))  # more than a batch
    assert denoiser_error(nn.Identity(), x, 0.5, seed=1) == pytest.approx(0.25, rel=0.01)
    assert denoiser_error(torch.zeros_like, x, 0.5, seed=1) == pytest.approx(x.square().mean().item())
