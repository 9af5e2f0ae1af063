"""DPM-Solver++'s timesteps: even in log SNR, and nearer to the converged image than diffusers' own spacings."""

import itertools
from functools import partial

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from ddpm.process import dpm_solver_step, dynamic_threshold
from ddpm.sampling import noise_source, sample
from ddpm.schedule import cosine_schedule, linear_schedule, log_snr_timesteps
from ifmodel import load_unet
from ifmodel.stage import SCHEDULE, stage_1
from ifmodel.text import embed_prompts


@pytest.mark.parametrize("schedule", [cosine_schedule(), linear_schedule()])
def test_any_number_of_steps_is_that_many_falling_timesteps(schedule):
    for num_steps in (1, 2, 5, 20, 100, schedule.num_timesteps):
        timesteps = log_snr_timesteps(schedule, num_steps)
        assert len(timesteps) == num_steps
        assert all(t > t_prev for t, t_prev in itertools.pairwise(timesteps))
        assert 0 <= timesteps[-1] <= timesteps[0] < schedule.num_timesteps


def test_steps_are_even_in_log_snr():
    log_snr = torch.logit(SCHEDULE.alphas_cumprod)[log_snr_timesteps(SCHEDULE, 8)]
    lengths = log_snr.diff()
    assert lengths.max() < 1.15 * lengths.min()


@torch.no_grad()
def test_it_is_nearer_to_the_converged_image_than_diffusers_spacings():
    unet = load_unet("tiny-if/I", pack=True)
    embeds = embed_prompts("tiny-if/I", ["a photo of a dog", "a rocket ship", ""])
    prompts = torch.stack([embeds["a photo of a dog"], embeds["a rocket ship"]])
    estimate = stage_1(unet, prompts, embeds[""][None], 4.0)
    x_T = noise_source([1, 2], (3, 32, 32))()
    loop = {"step": dpm_solver_step, "threshold": partial(dynamic_threshold, maximum=1.5)}

    def ours(num_steps: int) -> torch.Tensor:
        return sample(estimate, log_snr_timesteps(SCHEDULE, num_steps), SCHEDULE, noise=lambda: x_T, **loop)

    def theirs(num_steps: int, spacing: str) -> torch.Tensor:
        scheduler = DPMSolverMultistepScheduler(
            beta_schedule="squaredcos_cap_v2",
            thresholding=True,
            dynamic_thresholding_ratio=0.95,
            sample_max_value=1.5,
            timestep_spacing=spacing,
            lambda_min_clipped=-5.1,
        )
        scheduler.set_timesteps(num_steps)
        x_t = x_T
        for t in scheduler.timesteps:
            x_t = scheduler.step(estimate(x_t, int(t))[0], t, x_t).prev_sample
        return x_t

    converged = ours(60)

    def distance(image: torch.Tensor) -> float:
        return (image - converged).square().mean().sqrt().item()

    best = min(distance(theirs(8, spacing)) for spacing in ("linspace", "leading", "trailing"))
    assert distance(ours(8)) < 0.8 * best
