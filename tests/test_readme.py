"""What README says of models, views and samplers of one's own, run as it is printed there."""

import re

import pytest
import torch
from diffusers import UNet2DConditionModel

from ddpm.process import ddim_step
from ddpm.schedule import linear_schedule
from ddpm.views import check_view
from ifmodel import Cascade
from ifmodel.stage import SAMPLERS
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def printed():
    section = (ROOT / "README.md").read_text().split("## Your own")[1].split("\n## ")[0]
    blocks, names = re.findall(r"```python\n(.*?)```", section, re.DOTALL), {}
    assert len(blocks) == 3 and all(block.count("\n") <= 16 for block in blocks)
    registered = dict(SAMPLERS)
    for block in blocks:
        exec(block, names)
    yield names
    SAMPLERS.clear()
    SAMPLERS.update(registered)


def test_an_anagram_with_any_unet_of_diffusers(printed):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 32), cross_attention_dim=16, attention_head_dim=8, layers_per_block=1,
        in_channels=3, out_channels=3, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    prompts, null = torch.randn(2, 1, 5, 16), torch.zeros(1, 5, 16)
    drawn = printed["turned"](unet, linear_schedule(1000).betas, [prompts[0], prompts[1]], null, 8)
    other = printed["turned"](unet, linear_schedule(1000).betas, [prompts[0], prompts[0]], null, 8)
    assert drawn.shape == (1, 3, 8, 8) and drawn.isfinite().all()
    assert not torch.allclose(drawn, other)


def test_the_view_is_one(printed):
    check_view(printed["shift"](3), (3, 8, 8))


def test_the_sampler_is_found_by_its_name(printed):
    cascade, options = Cascade("tiny-if/I"), {"seeds": [1], "num_steps": 4, "progress": False}
    own = cascade.draw("a photo of a dog", sampler="halfway", **options)
    assert own.shape == (1, 3, 32, 32)
    assert not torch.allclose(own, cascade.draw("a photo of a dog", sampler="ddim", **options))
    assert SAMPLERS["ddim"] is ddim_step
