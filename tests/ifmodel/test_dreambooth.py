"""The loss of DreamBooth: eps alone, and what stage 2 sees beside it."""

from unittest.mock import patch

import pytest
import torch

from ifmodel import UNet, UNetConfig, dreambooth
from ifmodel.dreambooth import eps_loss
from ifmodel.lora import ATTENTION, RESNETS, add_lora
from ifmodel.stage import SCHEDULE
from ifmodel.unet import Text
from tests.ifmodel.test_unet import STAGE_1, STAGE_2, pair


@pytest.mark.parametrize("config", [STAGE_1, STAGE_2], ids=["stage 1", "stage 2"])
def test_the_loss_falls_and_the_variance_has_no_part_in_it(config):
    unet = pair(config, torch.float32)[0]
    x_0, embeds = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 77, 24)
    upscaling = (8, 100) if config is STAGE_2 else None

    def loss() -> torch.Tensor:
        return dreambooth.eps_loss(unet, x_0, embeds, torch.Generator().manual_seed(0), upscaling)

    loss().backward()
    eps, v = unet.conv_out.weight.grad.split(3)
    assert eps.any() and not v.any()
    layers = add_lora(unet, 4, (*ATTENTION, *RESNETS))
    optimizer = torch.optim.Adam([weight for layer in layers.values() for weight in layer.up.parameters()], lr=1e-2)
    before = loss().item()
    for _ in range(5):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.9 * before


def test_stage_2_sees_the_small_image_noised_to_the_level_that_it_is_told():
    seen = []

    class Recorder(UNet):
        def forward(self, x_t, t, text, noise_level=None):
            seen.append((x_t, noise_level))
            return super().forward(x_t, t, text, noise_level)

    unet = Recorder(UNetConfig.from_dict(STAGE_2))
    assert isinstance(unet.encode_text(torch.randn(1, 77, 24)), Text)
    x_0 = torch.rand(40, 3, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    dreambooth.eps_loss(unet, x_0, torch.randn(40, 77, 24), torch.Generator().manual_seed(0), (4, 600))
    x_t, noise_level = seen[0]
    assert x_t.shape == (40, 6, 16, 16)
    assert 0 <= noise_level.min() < 100 and 500 < noise_level.max() < 600
    upscaled = torch.nn.functional.interpolate(x_0[:, :, ::4, ::4], (16, 16), mode="bilinear", align_corners=True)
    alphas_cumprod = SCHEDULE.alphas_cumprod[noise_level].float().view(-1, 1, 1, 1)
    noise = (x_t[:, 3:] - alphas_cumprod.sqrt() * upscaled) / (1 - alphas_cumprod).sqrt()
    assert abs(noise.std(dim=(1, 2, 3)) - 1).max() < 0.15
    assert abs(noise.mean()) < 0.02


def test_what_must_stay_is_weighed_beside_the_new_thing():
    """Prior preservation: each set's loss is of its own images with its own prompt."""
    unet, seen = pair(STAGE_1, torch.float32)[0], []
    data = {"a zwx dog": torch.rand(3, 3, 16, 16), "a dog": -torch.rand(2, 3, 16, 16)}
    embeds = {prompt: torch.randn(77, 24) for prompt in data}

    def watched(unet, x_0, prompt_embeds, generator, upscaling):
        seen.append((x_0, prompt_embeds))
        return eps_loss(unet, x_0, prompt_embeds, generator, upscaling)

    def loss(*weights: float) -> float:
        sets = [(weight, {prompt: data[prompt]}) for weight, prompt in zip(weights, data, strict=False)]
        with patch.object(dreambooth, "eps_loss", watched), torch.no_grad():
            return dreambooth.dreambooth_loss(unet, sets, embeds, 2, torch.Generator().manual_seed(0)).item()

    new, both, more = loss(1.0), loss(1.0, 1.0), loss(1.0, 3.0)
    assert both - new > 0.1
    assert more - new == pytest.approx(3 * (both - new), rel=1e-4)
    for k, (x_0, prompt_embeds) in enumerate(seen[1:3]):
        prompt = list(data)[k]
        assert x_0.shape == (2, 3, 16, 16) and (x_0 > 0).all() == (prompt == "a zwx dog")
        assert torch.equal(prompt_embeds, embeds[prompt].expand(2, -1, -1))
