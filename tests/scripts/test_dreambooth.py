"""scripts/train_lora.py: what it learns from, that it stops, goes on and writes files that load; and bad input."""

import os
import shutil
import signal
import sys

import pytest
import torch
import train_lora
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from ifmodel import Cascade, dreambooth
from ifmodel.jobs import Job
from ifmodel.lora import place_lora
from ifmodel.lora_files import read_lora
from ifmodel.weights import load_config
from shared.options import SEED
from tests.ifmodel.test_t5 import model_folder  # noqa: F401
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
    """Images of the row in few steps."""
    draw, few = train_lora.Cascade.draw, {"num_steps": 2, "upscaler_steps": 1}
    monkeypatch.setattr(train_lora.Cascade, "draw", lambda *given, num_steps, **rest: draw(*given, **rest, **few))


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


def test_a_notebook_teaches_what_the_script_does(run_script, options, images, tmp_path):
    status, _, err = run_script("train_lora", *options)
    assert status == 0, err
    model = str(options[1])
    recipe = dreambooth.Recipe("a photo of a zwx dog", model=model, steps=4, batch_size=2, rank=2, seed=SEED)
    shown, own = dreambooth.read_folder(images, Cascade(model).sizes[0][0]), tmp_path / "own"
    assert dreambooth.teach(shown, recipe, own) and dreambooth.teach(shown, recipe, own, resume=True)
    with pytest.raises(ValueError, match="there is a run in"):
        dreambooth.teach(shown, recipe, own)
    script, notebook = (load_file(folder / WEIGHTS) for folder in (tmp_path / "lora", own))
    assert script.keys() == notebook.keys() and all(torch.equal(script[name], notebook[name]) for name in script)


def test_no_warning_says_that_what_it_learned_is_unknown(run_script, options, tmp_path, recwarn):
    model = shutil.copytree(options[1], tmp_path / "model")
    (model / "vocabulary.json").write_text('{"things": {"a hat": {"aliases": [], "tags": []}}, "anything": []}')
    options = [*options, "--model", model, "--steps", 1, "--class-prompt", "a cat", "--class-images", 1]
    status, _, err = run_script("train_lora", *options)
    assert status == 0, err
    told = [str(warning.message) for warning in recwarn if "does not know" in str(warning.message)]
    assert len(told) == 1 and "'a cat'" in told[0]


def test_stopped_it_saves_and_goes_on_to_the_same_weights(monkeypatch, run_script, options, tmp_path):
    options = [*options[:-2], "--class-prompt", "a photo of a dog", "--class-images", 2, "--layers", "attention"]
    status, _, err = run_script("train_lora", *options, "--out", tmp_path / "whole")
    assert status == 0, err
    kept = load_file(tmp_path / "whole" / "class_images.safetensors")
    sampler = {"sampler": "dpm++", "eta": 1.0, "num_steps": 20}
    (untrained,) = Cascade(options[1]).draw_all([Job("a photo of a dog", [SEED, SEED + 1])], **sampler)
    assert list(kept) == ["a photo of a dog"] and torch.equal(kept["a photo of a dog"], untrained)

    out, calls, loss = ["--out", tmp_path / "parts"], [], dreambooth.ddpm_loss

    def interrupted(*given):
        calls.append(given)
        if len(calls) == 3:  # of two a step
            os.kill(os.getpid(), signal.SIGINT)
        return loss(*given)

    monkeypatch.setattr(dreambooth, "ddpm_loss", interrupted)
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


def test_a_run_is_neither_overwritten_nor_continued_by_another(
    run_script,
    refused,
    options,
    cascade,  # noqa: F811
    tmp_path,
):
    options = [*options, "--upscaler", cascade[0] / "stage_2", "--steps", 1]
    status, _, err = run_script("train_lora", *options)
    assert status == 0, err
    configs = [load_config(cascade[0] / stage) for stage in ("stage_1", "stage_2")]
    assert place_lora(read_lora(tmp_path / "lora"), configs) == 2
    assert "add --resume to go on" in refused("train_lora", *options)
    assert "another recipe prompt: a photo of a zwx dog, not a cat" in refused(
        "train_lora", *options, "--resume", "--prompt", "a cat"
    )
    assert "another recipe class_prompt: [], not ['a dog']" in refused(
        "train_lora", *options, "--resume", "--class-prompt", "a dog"
    )
