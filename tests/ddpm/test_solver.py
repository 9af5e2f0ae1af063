"""DPM-Solver++'s timesteps: nearly even in log SNR, and nearer to the converged image than diffusers' own spacings."""

import itertools
import math
from functools import partial

import pytest
import torch
from solvers import DIFFUSERS, converged_timesteps, theirs

from ddpm.convergence import NoisePath
from ddpm.process import dynamic_threshold
from ddpm.schedule import cosine_schedule, linear_schedule, log_snr_timesteps
from ifmodel.stage import SCHEDULE, spaced_timesteps
from shared.images import read_image
from tests.conftest import DATA


@pytest.mark.parametrize("scale", [None, 3.0])
@pytest.mark.parametrize("schedule", [cosine_schedule(), linear_schedule()])
def test_any_number_of_steps_is_that_many_falling_timesteps(schedule, scale):
    for num_steps in (1, 2, 5, 20, 100, schedule.num_timesteps):
        timesteps = log_snr_timesteps(schedule, num_steps, scale=scale)
        assert len(timesteps) == num_steps
        assert all(t > t_prev for t, t_prev in itertools.pairwise(timesteps))
        assert 0 <= timesteps[-1] <= timesteps[0] < schedule.num_timesteps


def test_steps_are_even_in_log_snr():
    log_snr = torch.logit(SCHEDULE.alphas_cumprod)[log_snr_timesteps(SCHEDULE, 8)]
    lengths = log_snr.diff()
    assert lengths.max() < 1.15 * lengths.min()


def test_without_noise_they_are_longer_at_both_ends():
    lengths = torch.logit(SCHEDULE.alphas_cumprod)[spaced_timesteps("dpm++", 8)].diff()
    assert lengths[0] > 1.15 * lengths[3] and lengths[-1] > 1.15 * lengths[3]


class Mixture:
    """The exact guided estimate of images that are those of the tests' emoji, each blurred by N(0, s² I)."""

    def __init__(self, count: int = 4, s: float = 0.4, guidance_scale: float = 4.0):
        paths = sorted((DATA / "emoji").glob("*.png"))
        self.images = torch.cat([read_image(path, (8, 8)) for path in paths]).flatten(1)
        self.wanted, self.s, self.guidance_scale = self.images[:count], s, guidance_scale

    def __call__(self, x_t: torch.Tensor, t: int) -> tuple[torch.Tensor, None]:
        alpha_cumprod = SCHEDULE.alpha_cumprod(t)
        signal, variance = math.sqrt(alpha_cumprod), alpha_cumprod * self.s**2 + 1 - alpha_cumprod
        flat = x_t.flatten(1)
        distances = (flat[:, None] - signal * self.images).square().sum(2)
        mean = torch.softmax(-distances / (2 * variance), dim=1) @ self.images
        eps_u, eps_c = (math.sqrt(1 - alpha_cumprod) * (flat - signal * m) / variance for m in (mean, self.wanted))
        return (eps_u + self.guidance_scale * (eps_c - eps_u)).view(x_t.shape), None


@pytest.mark.parametrize("s", [0.4, 0.15])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_it_is_nearer_to_the_converged_image_than_diffusers_settings(eta, s):
    """Than each of them over several numbers of steps, on an exact model and along one path of noise."""
    estimate, path = Mixture(s=s), NoisePath(SCHEDULE, [1, 2, 3, 4], (3, 8, 8))
    threshold = partial(dynamic_threshold, percentile=0.95, maximum=1.5)

    def image(timesteps: list[int]) -> torch.Tensor:
        return path.solve(estimate, timesteps, threshold=threshold, eta=eta)

    def log_distances(draw) -> torch.Tensor:
        images = torch.stack([draw(num_steps) for num_steps in (4, 5, 6, 8, 10, 15, 20)])
        return (images - converged).square().flatten(1).mean(1).log() / 2

    converged = image(converged_timesteps(eta))
    if not eta:
        assert (image(list(range(999, -1, -1))) - converged).abs().max() < 1e-3
    near = log_distances(lambda num_steps: image(spaced_timesteps("dpm++", num_steps, eta)))
    for name, setting in DIFFUSERS.items():
        far = log_distances(lambda n, setting=setting: theirs(estimate, path, n, setting, threshold, eta))
        assert (near - far).mean() < 0, name
        assert eta == 0 or (near - far).max() < 0.1, name  # "lu lambdas" is 9 % nearer with 20 steps, s = 0.15
