"""scripts/train_lora.py: what it learns from, that it stops, goes on and writes files that load; and bad input."""

import os
import signal
import sys

import pytest
import torch
import train_lora
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from ifmodel import UNet, UNetConfig
from ifmodel.lora import ATTENTION, RESNETS, add_lora, read_lora
from ifmodel.stage import SCHEDULE
from ifmodel.unet import Text
from tests.ifmodel.test_ifmodel import STAGE_1, STAGE_2, pair
from tests.ifmodel.test_text import model_folder  # noqa: F401
from tests.scripts.test_generate import cascade, own_cache  # noqa: F401

WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three images of a red star, of other sizes."""
    folder = tmp_path_factory.mktemp("images")
    for k in range(3):
        image = Image.new("RGBA", (40 + 10 * k, 50))
        ImageDraw.Draw(image).regular_polygon((20, 25, 15 - k), 5, fill="red")
        image.save(folder / f"{k}.png")
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture
def options(cascade, images, tmp_path):  # noqa: F811
    few = ["--steps", 4, "--batch-size", 2, "--rank", 2, "--device", "cpu", "--dtype", "float32"]
    named = ["--model", cascade[0] / "stage_1", "--images", images, "--prompt", "a photo of a zwx dog"]
    return [*named, *few, "--out", tmp_path / "lora"]


@pytest.fixture(autouse=True)
def short_row(monkeypatch):
    """Images of the row in two steps rather than 50."""
    draw = train_lora.Cascade.draw
    monkeypatch.setattr(train_lora.Cascade, "draw", lambda *given, num_steps, **rest: draw(*given, **rest, num_steps=2))


def test_it_writes_a_lora_that_generate_draws_with(run_script, options, tmp_path):
    status, _, err = run_script("train_lora", *options)
    assert status == 0, err
    lora = read_lora(tmp_path / "lora")
    model = options[1]
    assert lora.base == str(model) and not lora.text_encoder
    assert all(update.up.any() for update in lora.unet.values())  # all of them have learned
    assert {name.rpartition(".")[2] for name in lora.unet} >= {"to_q", "add_k_proj", "conv1", "time_emb_proj"}
    assert Image.open(tmp_path / "lora" / "row.png").text["Description"].startswith("a photo of a zwx dog\nbefore")
    more = ["--model", model, "--prompt", "a photo of a zwx dog", "--steps", 2, "--device", "cpu", "--dtype", "float32"]
    for name, lora in (("plain", []), ("lora", ["--lora", tmp_path / "lora"])):
        status, _, err = run_script("generate", *more, *lora, "--out", tmp_path / f"{name}.png")
        assert status == 0, err
    assert Image.open(tmp_path / "plain.png").tobytes() != Image.open(tmp_path / "lora.png").tobytes()


def test_stopped_it_saves_and_goes_on_to_the_same_weights(monkeypatch, run_script, options, tmp_path):
    options = [*options[:-2], "--class-prompt", "a photo of a dog", "--class-images", 2, "--layers", "attention"]
    status, _, err = run_script("train_lora", *options, "--out", tmp_path / "whole")
    assert status == 0, err

    out, calls, loss = ["--out", tmp_path / "parts"], [], train_lora.ddpm_loss

    def interrupted(*given):
        calls.append(given)
        if len(calls) == 3:  # of two a step
            os.kill(os.getpid(), signal.SIGINT)
        return loss(*given)

    monkeypatch.setattr(train_lora, "ddpm_loss", interrupted)
    monkeypatch.setattr(sys, "argv", ["train_lora.py", *map(str, [*options, *out])])
    with pytest.raises(SystemExit) as stopped:
        train_lora.main()
    assert stopped.value.code == 130 and len(calls) == 4
    assert not (tmp_path / "parts" / "row.png").exists()
    half = load_file(tmp_path / "parts" / WEIGHTS)
    status, _, err = run_script("train_lora", *options, *out, "--resume")
    assert status == 0, err
    whole, parts = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not all(torch.equal(whole[name], half[name]) for name in whole)


@pytest.mark.parametrize("config", [STAGE_1, STAGE_2], ids=["stage 1", "stage 2"])
def test_the_loss_falls_and_the_variance_has_no_part_in_it(config):
    unet = pair(config, torch.float32)[0]
    x_0, embeds = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 77, 24)
    upscaling = (8, 100) if config is STAGE_2 else None

    def loss() -> torch.Tensor:
        return train_lora.eps_loss(unet, x_0, embeds, torch.Generator().manual_seed(0), upscaling)

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
    train_lora.eps_loss(unet, x_0, torch.randn(40, 77, 24), torch.Generator().manual_seed(0), (4, 600))
    x_t, noise_level = seen[0]
    assert x_t.shape == (40, 6, 16, 16)
    assert 0 <= noise_level.min() < 100 and 500 < noise_level.max() < 600
    upscaled = torch.nn.functional.interpolate(x_0[:, :, ::4, ::4], (16, 16), mode="bilinear", align_corners=True)
    alphas_cumprod = SCHEDULE.alphas_cumprod[noise_level].float().view(-1, 1, 1, 1)
    noise = (x_t[:, 3:] - alphas_cumprod.sqrt() * upscaled) / (1 - alphas_cumprod).sqrt()
    assert abs(noise.std(dim=(1, 2, 3)) - 1).max() < 0.15
    assert abs(noise.mean()) < 0.02


def test_bad_input_is_one_line_and_leaves_nothing(refused, options, cascade, images, tmp_path):  # noqa: F811
    def line(*more) -> str:
        return refused("train_lora", *options, *more)

    broken, empty = tmp_path / "broken", tmp_path / "empty"
    for folder in (broken, empty):
        folder.mkdir()
    (broken / "dog.jpg").write_bytes(b"no image")
    assert f"no folder at {tmp_path / 'none'}" in line("--images", tmp_path / "none")
    assert "has no images (.png" in line("--images", empty)
    assert "dog.jpg is no image" in line("--images", broken)
    assert "a rank of 500 is above the width of down_blocks" in line("--rank", 500)
    assert "there is no run in" in line("--resume")
    assert "at most 1000, not 1001" in line("--upscaler", cascade[0] / "stage_2", "--max-noise-level", 1001)
    assert "is a stage-1 model, not a stage-2 one" in line("--upscaler", cascade[0] / "stage_1")
    assert not (tmp_path / "lora").exists()


def test_a_run_is_neither_overwritten_nor_continued_by_another(run_script, refused, options, cascade):  # noqa: F811
    options = [*options, "--upscaler", cascade[0] / "stage_2", "--steps", 1]
    status, _, err = run_script("train_lora", *options)
    assert status == 0, err
    assert "add --resume to go on" in refused("train_lora", *options)
    assert "another recipe prompt: a photo of a zwx dog, not a cat" in refused(
        "train_lora", *options, "--resume", "--prompt", "a cat"
    )
    assert "another recipe class_prompt: [], not ['a dog']" in refused(
        "train_lora", *options, "--resume", "--class-prompt", "a dog"
    )
    status, out, err = run_script("train_lora", *options, "--resume")  # with nothing left to do
    assert status == 0 and "trained" in out, err
