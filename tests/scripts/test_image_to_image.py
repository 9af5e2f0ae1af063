"""SDEdit and inpainting against diffusers' image-to-image pipelines, on a small random cascade."""

from functools import partial

import pytest
import torch
from diffusers import DDPMScheduler, IFImg2ImgPipeline, IFInpaintingPipeline

from ddpm.process import add_noise
from ddpm.sampling import inpaint, sdedit
from ddpm.schedule import leading_timesteps
from ifmodel import load_unet
from ifmodel.stage import LEARNED, SCHEDULE, STAGE_1_THRESHOLD, stage_1
from tests.ifmodel.test_t5 import model_folder  # noqa: F401
from tests.scripts.test_generate import cascade  # noqa: F401

STEPS, GUIDANCE = 10, 6.0

LOOP = {"step": LEARNED, "threshold": STAGE_1_THRESHOLD}


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pair(cascade):  # noqa: F811
    """diffusers' two pipelines, an image each for two prompts, their embeddings, and our estimate for them."""
    folder, pipeline, _ = cascade
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    scheduler.alphas_cumprod = SCHEDULE.alphas_cumprod  # in float64, so that it is its arithmetic we compare with
    parts = {**pipeline.components, "scheduler": scheduler, "requires_safety_checker": False}
    pipelines = [kind(**parts) for kind in (IFImg2ImgPipeline, IFInpaintingPipeline)]
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
    embeds, null = random(2, 77, 24, seed=1), random(1, 77, 24, seed=2)
    image = random(2, 3, 16, 16, seed=3).clamp(-1, 1)
    estimate = stage_1(load_unet(folder / "stage_1"), embeds, null, GUIDANCE)

    def call(pipeline, seed, **options):
        return pipeline(
            image=image,
            prompt_embeds=embeds,
            negative_prompt_embeds=null.expand(2, -1, -1),
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
            **options,
        ).images

    return [partial(call, pipeline) for pipeline in pipelines], image, estimate


def drawing(seed):
    """Noise for two images from one generator, as diffusers draws it."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(2, 3, 16, 16, generator=generator)


@pytest.mark.parametrize("strength", [1.0, 0.75, 0.3, 0.1])
def test_sdedit_is_diffusers_image_to_image(pair, strength):
    (image_to_image, _), image, estimate = pair
    theirs = image_to_image(4, strength=strength)
    timesteps, i_start = leading_timesteps(1000, STEPS), STEPS - int(STEPS * strength)
    ours = sdedit(estimate, image, i_start, timesteps, SCHEDULE, noise=drawing(4), **LOOP)
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    if i_start < STEPS - 1:  # neighbouring starts are other images, so the comparison can tell
        other = sdedit(
            estimate,
            image,
            i_start + 1,
            timesteps,
            SCHEDULE,
            noise=drawing(4),
            step=LEARNED,
            threshold=STAGE_1_THRESHOLD,
        )
        assert (other - theirs).abs().max() > 1e-2


def as_diffusers_draws(image, timesteps, seed):
    """Noise for `inpaint`: x_T is the noised image; the known pixels, which diffusers leaves alone, get none."""
    draw = drawing(seed)
    yield add_noise(image, draw(), timesteps[0], SCHEDULE)
    while True:
        yield draw()
        yield torch.zeros_like(image)


def test_inpainting_is_diffusers_where_nothing_is_known(pair):
    (_, inpainting), image, estimate = pair
    mask, timesteps = torch.ones(1, 1, 16, 16), leading_timesteps(1000, STEPS)
    theirs = inpainting(5, mask_image=mask, strength=1.0)
    noise = as_diffusers_draws(image, timesteps, 5)
    ours = inpaint(
        estimate,
        image,
        mask,
        timesteps,
        SCHEDULE,
        noise=lambda: next(noise),
        step=LEARNED,
        threshold=STAGE_1_THRESHOLD,
    )
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_diffusers_inpainting_shows_the_model_known_pixels_without_noise_and_ours_with(pair):
    """Both end with the known pixels; but in between, only ours have the noise that the timestep says."""
    (_, inpainting), image, estimate = pair
    mask, timesteps = torch.zeros(1, 1, 16, 16), leading_timesteps(1000, STEPS)
    mask[..., 8:] = 1
    seen, ours_seen = [], []
    theirs = inpainting(5, mask_image=mask, strength=1.0, callback=lambda i, t, x: seen.append(x))
    noise = drawing(5)
    ours = inpaint(
        estimate,
        image,
        mask,
        timesteps,
        SCHEDULE,
        noise=noise,
        step=LEARNED,
        threshold=STAGE_1_THRESHOLD,
        callback=lambda i, t, x_t, x_0: ours_seen.append(x_t),
    )
    assert len(seen) == len(ours_seen) == STEPS
    for x in seen:
        assert torch.equal(x[..., :8], image[..., :8])
    for t, x in zip(timesteps[1:-1], ours_seen[1:-1], strict=True):
        deviation = (x - SCHEDULE.alpha_cumprod(t) ** 0.5 * image)[..., :8].std().item()
        assert deviation == pytest.approx((1 - SCHEDULE.alpha_cumprod(t)) ** 0.5, rel=0.12)
    assert torch.equal(ours[..., :8], image[..., :8])
    assert torch.equal(theirs[..., :8], image[..., :8])
    assert (ours - theirs)[..., 8:].abs().mean() > 0.05
