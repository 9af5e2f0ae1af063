"""README's Python and the notebook, run as they are printed."""

import json
import re

import pytest
import torch
from diffusers import UNet2DConditionModel

from ddpm.schedule import linear_schedule
from ddpm.views import check_view, vertical_flip
from ifmodel import Cascade
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def printed():
    section = README.split("## Your own")[1].split("\n## ")[0]
    blocks, names = python_blocks(section), {}
    assert len(blocks) == 3 and all(block.count("\n") <= 16 for block in blocks)
    for block in blocks:
        exec(block, names)
    return names


@pytest.fixture
def few_steps(monkeypatch):
    """Every drawing as it is printed, but in few steps."""
    draw = Cascade.draw
    few = {"num_steps": 6, "upscaler_steps": 2, "progress": False}
    monkeypatch.setattr(Cascade, "draw", lambda self, *asked, **options: draw(self, *asked, **options | few))


def test_the_first_python_draws_and_so_does_the_next(few_steps, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = python_blocks(README.split("## Your own")[0])
    names: dict = {}
    exec(first, names)
    assert names["images"].shape == (4, 3, 128, 128) and (tmp_path / "dogs.png").is_file()
    exec(second, names)
    assert names["bulb_or_pear"].shape == names["edited"].shape == (1, 3, 128, 128)
    assert names["digits"].shape == (4, 1, 28, 28)


def test_the_notebook_makes_an_anagram(few_steps):
    cells = json.loads((ROOT / "scripts" / "anagram.ipynb").read_text())["cells"]
    install, *others = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    printed = re.search(r"^REPOSITORY.*?(?=^```)", README, re.MULTILINE | re.DOTALL)[0]
    assert [line.strip() for line in install.splitlines()[-4:]] == printed.splitlines()
    names: dict = {}
    for source in [re.sub(r"(?m)^( *)[!%].*", r"\1raise AssertionError('it is installed')", install), *others]:
        exec(source, names)
    images = names["images"]
    assert images.shape == (4, 3, 128, 128) and not torch.allclose(images[0], images[1])
    assert torch.equal(names["both"][1], vertical_flip().view(images) / 2 + 0.5)


def test_an_anagram_with_any_unet_of_diffusers(printed):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 32), cross_attention_dim=16, attention_head_dim=8, layers_per_block=1,
        in_channels=3, out_channels=3, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    prompts, null = torch.randn(2, 1, 5, 16), torch.zeros(1, 5, 16)
    draw, betas = printed["rotation_anagram"], linear_schedule(1000).betas
    drawn, other = (draw(unet, betas, prompts[0], turned, null, 8) for turned in (prompts[1], prompts[0]))
    assert drawn.shape == (1, 3, 8, 8) and drawn.isfinite().all()
    assert not torch.allclose(drawn, other)


def test_the_view_is_one(printed):
    check_view(printed["shift"](0.25), (3, 8, 8))


def test_the_sampler_draws(printed):
    cascade, options = Cascade("tiny-if/I"), {"seeds": [1], "num_steps": 4, "progress": False}
    own = cascade.draw("a photo of a dog", sampler=printed["renoise_step"], **options)
    assert own.shape == (1, 3, 32, 32)
    assert not torch.allclose(own, cascade.draw("a photo of a dog", sampler="ddim", **options))
