"""Training a small IF: its data, its losses, resuming, two processes, and the folders it writes."""

import errno
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from functools import partial

import numpy
import pytest
import torch
import torch.nn.functional as F
import train_if
from diffusers import IFPipeline, IFSuperResolutionPipeline
from PIL import Image, ImageDraw

from ddpm.process import predict_eps
from ddpm.tools.files import load_tensors, save_tensors
from ifmodel import UNet, UNetConfig
from ifmodel.stage import SCHEDULE
from ifmodel.t5 import Tokenizer, embed_each
from ifmodel.tiny import export, losses, models, stages, training
from ifmodel.tiny.captions import ALIASES, curated, with_article
from ifmodel.tiny.data import draw_images, show
from ifmodel.tiny.loading import load_captioned
from ifmodel.tiny.styles import STYLES
from tests.conftest import ROOT

COLOURS = ["red", "lime", "blue", "black", "orange", "purple"]
SMALL = ["--widths", 32, 32, "--text-dim", 32, "--batch-size", 4, "--dtype", "float32", "--device", "cpu"]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setitem(embed_each.__kwdefaults__, "cache", cache)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six images, each of another colour and shape, and what they are called."""
    folder = tmp_path_factory.mktemp("images")
    lines = []
    for k, colour in enumerate(COLOURS):
        image = Image.new("RGBA", (64, 64))
        ImageDraw.Draw(image).regular_polygon((32, 32, 24), 3 + k, fill=colour)
        image.save(folder / f"{k}.png")
        lines.append(json.dumps({"file_name": f"{k}.png", "text": f"{colour} shape", "tags": ["polygon"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def data(folder):
    return load_captioned(folder, 16)


@pytest.fixture(scope="module")
def tokenizer(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    models.train_tokenizer(data.all_captions(), folder)
    return Tokenizer(folder)


def small_model(tokenizer, config):
    torch.manual_seed(0)
    unet = UNet(UNetConfig.from_dict(config))
    models.zero_init(unet)
    return models.TextToImage(models.build_encoder(tokenizer.vocab_size, 32), unet)


def stage_1_options(folder, out, steps, *more):
    return ["--data", folder, "--out", out, "--size", 16, "--text-steps", 2, "--steps", steps, *SMALL, *more]


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """Both stages after a few steps, by the script, in processes of their own."""
    out = tmp_path_factory.mktemp("trained")
    script = [sys.executable, ROOT / "scripts" / "train_if.py"]
    stage_1 = stage_1_options(folder, out / "1", 3, "--every", 3)
    stage_2 = ["--data", folder, "--out", out / "2", "--stage-2-of", out / "1" / "model", "--size", 32, "--crop", 16]
    stage_2 += ["--redrawn", 0.5]
    for options in (stage_1, [*stage_2, "--steps", 3, "--every", 3, *SMALL]):
        subprocess.run([str(part) for part in script + options], check=True, capture_output=True)
    return out


def test_a_drawing_without_an_artist_has_the_first_style_and_every_filter(data):
    assert [list(STYLES)[style] for style in data.styles[:4]] == ["photo", "oil", "lithograph", "sketch"]
    photo, oil, _, sketch = show(data, [0, 1, 2, 3], 16, torch.Generator(), variety=0.0)[0]
    assert photo[:, 0, 0].tolist() == [1, 1, 1]  # what was transparent
    assert photo[0, 8, 8] > 0.6 > -0.6 > photo[2, 8, 8]  # red
    assert oil[2, 0, 0] < 0.9  # on a coloured ground
    assert sketch.std(0).max() < 0.02  # grey


def test_the_list_has_every_prompt_of_the_assignment():
    phrases = {phrase for name in curated() for phrase in (with_article(name), *ALIASES.get(name, ()))}
    for wanted in ("a rocket ship", "a snowy mountain village", "people around a campfire", "an old man", "a dog"):
        assert wanted in phrases
    for wanted in ("a man wearing a hat", "a skull", "waterfalls", "the amalfi coast", "a hipster barista"):
        assert wanted in phrases
    assert len(curated()) == len(set(curated())) > 200


def test_captions_said_in_full_get_no_article():
    for caption in ("A red bird on a branch", "THE sea", "two dogs on grass", "3 men", "My grandmother in 1950"):
        assert with_article(caption) == caption
    for caption in ("Paris at night in the rain", "dogs playing in the grass", "glasses", "books on a shelf"):
        assert with_article(caption) == caption
    # names of the emoji folder that are not of the list
    for name in (
        "a face with tears of joy",
        "an anxious face with sweat",
        "a 1st place medal",
        "a sad but relieved face",
    ):
        assert with_article(name.split(maxsplit=1)[1]) == name


@pytest.mark.parametrize("article", ["a", "an"])
def test_an_article_is_of_how_a_name_sounds(article):
    names = {
        "a": "unicorn; United States map; used car; utensil; ukulele; UFO; euro banknote; ewe; one-way sign; house; bus"
        "; Bus; rhinoceros; dress; night with stars; smiling face with sunglasses",
        "an": "umbrella; unidentified object; unimpressed face; ear; onion; hourglass done; honest man; urn; utter"
        "; octopus",
    }[article]
    for name in names.split("; "):
        assert with_article(name) == f"{article} {name}"


def test_images_lie_as_their_exif_says(tmp_path):
    image = Image.new("RGB", (32, 16), "blue")
    image.paste("red", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[274] = 6  # turned by 90° to the left: its left is the top
    image.save(tmp_path / "turned.png", exif=exif)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "turned.png", "text": "flag"}')
    top, bottom = load_captioned(tmp_path, 16).images[0, :3].float()[:, [0, -1]].mean(2).T.tolist()
    assert top == [255, 0, 0] and bottom == [0, 0, 255]


def test_a_bar_shows_how_many_of_many_images_are_loaded(folder, tmp_path, capsys):
    other = copied(folder, tmp_path)
    for count, quiet, shown in ((99, False, False), (100, True, False), (100, False, True)):
        (other / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "shape"}\n' * count)
        load_captioned(other, 4, quiet=quiet)
        assert ("images: " in capsys.readouterr().err) == shown


def test_the_log_measures_on_what_is_held_out(monkeypatch, folder, tmp_path):
    """Twemoji's drawings of every third thing are never trained on."""
    other, seen = copied(folder, tmp_path), {}
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    drawn = [{**row, "artist": artist} for row in rows for artist in ("noto", "twemoji")]
    (other / "metadata.jsonl").write_text("\n".join(map(json.dumps, drawn)))

    def train_stage(stage, data, watched, *rest, **options):
        seen.update(data=data, watched=watched)
        return True

    monkeypatch.setattr(train_if, "train_stage", train_stage)
    for more in ([], ["--hold-out"]):
        out = tmp_path / str(len(more))
        options = [str(x) for x in stage_1_options(other, out, 1, "--text-steps", 1, *more)]
        monkeypatch.setattr("sys.argv", ["train_if.py", *options])
        train_if.main()
        data, watched = seen["data"], seen["watched"]
        if not more:
            assert data is watched and len(data.files) == 6 * 6  # three styles by each of two artists
    drawn = [
        {part.names[thing] for thing, style in zip(part.things, part.styles, strict=True) if style == 1}
        for part in (data, watched)
    ]
    assert not drawn[0] & drawn[1] and len(drawn[1]) >= 2  # twemoji's alone have this style


def test_text_and_images_find_each_other(data, tokenizer):
    torch.manual_seed(0)
    contrast = models.ContrastiveText(models.build_encoder(tokenizer.vocab_size, 32), dim=16)
    optimizer = torch.optim.AdamW(contrast.parameters(), lr=1e-3)
    found = []
    for step in range(200):
        batch = losses.draw_batch(data, tokenizer, 6, 16, torch.Generator().manual_seed(step), drop=0, variety=0)
        similarities = contrast(batch.x_0, batch.tokens, batch.mask)
        found.append((similarities.argmax(1) == torch.arange(6)).float().mean().item())
        optimizer.zero_grad()
        models.contrastive_loss(similarities).backward()
        optimizer.step()
    assert sum(found[-20:]) / 20 > 0.8 > 0.3 > sum(found[:5]) / 5  # by chance, one in six


def test_a_tenth_of_the_captions_is_dropped(data, tokenizer):
    batch = losses.draw_batch(data, tokenizer, 3000, 16, torch.Generator().manual_seed(0))
    dropped = batch.mask.sum(1) == 1
    assert 0.08 < dropped.float().mean() < 0.12
    assert (batch.tokens[dropped][:, 0] == 1).all()


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_reach_every_parameter(data, tokenizer, stage):
    config = (export.stage_1_config if stage == 1 else export.stage_2_config)(16, [32, 32], 1, 32)
    model = small_model(tokenizer, config)
    with torch.no_grad():
        for parameter in model.unet.parameters():  # `zero_init` starts branches at zero, where gradients stop
            parameter.add_(0.01 * torch.randn_like(parameter))
    batch = losses.draw_batch(data, tokenizer, 4, 16, torch.Generator().manual_seed(0), drop=0)
    options = {} if stage == 1 else {"small": 8, "crop": 8}
    loss_of = losses.stage_1_loss if stage == 1 else losses.stage_2_loss
    loss = loss_of(model, batch, torch.Generator().manual_seed(0), **options)
    assert loss.shape == (4,)
    loss.mean().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


def test_the_variance_alone_learns_from_the_bound(data, tokenizer):
    """The bound must not pull at eps: its gradient there is stopped, as Improved DDPM does."""
    generator = torch.Generator().manual_seed(0)
    x_0, eps = torch.rand(2, 3, 8, 8, generator=generator) * 2 - 1, torch.randn(2, 3, 8, 8, generator=generator)
    t = torch.tensor([10, 500])
    x_t = losses.add_noise(x_0, eps, t, losses.SCHEDULE)
    output = torch.cat([eps, torch.zeros_like(eps)], 1).requires_grad_()
    losses.hybrid_loss(output, x_0, x_t, eps, t).sum().backward()
    eps_grad, v_grad = output.grad.chunk(2, dim=1)
    assert not eps_grad.any() and v_grad.any()


def test_the_noise_of_stage_2_has_a_brightness_of_its_own(monkeypatch, data, tokenizer):
    """Else a model reads an image's brightness off the mean of the noisiest x_t, where sampling begins without any."""
    seen = []
    monkeypatch.setattr(losses, "hybrid_loss", lambda output, x_0, x_t, eps, t, most: seen.append(eps) or eps.mean())
    model = small_model(tokenizer, export.stage_2_config(16, [32, 32], 1, 32))
    for k in range(20):
        batch = losses.draw_batch(data, tokenizer, 6, 16, torch.Generator().manual_seed(k), drop=0)
        losses.stage_2_loss(model, batch, torch.Generator().manual_seed(k), small=8, crop=16, offset=0.5)
    eps = torch.cat(seen)
    assert eps.shape == (120, 3, 16, 16)
    assert 0.4 < eps.mean((2, 3)).std() < 0.6  # without it 1/16
    assert 0.95 < (eps - eps.mean((2, 3), keepdim=True)).std() < 1.05


def test_a_crop_of_what_stage_2_sees_lies_where_its_image_does(data):
    """The small image is upscaled whole, so a crop of both is of the same place."""
    x_0 = draw_images(data, 16, 6, torch.Generator().manual_seed(0), variety=0.0)[0]
    low_res = losses.small_noised(x_0, 8, 0, torch.Generator().manual_seed(0))
    crops = losses.cropped(torch.cat([x_0, low_res], 1), 8, torch.Generator().manual_seed(1))
    image, seen = crops.chunk(2, dim=1)
    assert (image - seen).square().mean() < 0.25 * (image - seen.roll(1, 0)).square().mean()


def test_stage_2_sees_what_stage_1_draws(monkeypatch, data, tokenizer):
    """The first of the small images are drawn by stage 1, the others are the drawings' own."""
    model = small_model(tokenizer, export.stage_2_config(16, [32, 32], 1, 32))
    stage_1 = small_model(tokenizer, export.stage_1_config(8, [32, 32], 1, 32)).unet
    batch = losses.draw_batch(data, tokenizer, 6, 16, torch.Generator().manual_seed(0), drop=0)
    x = F.avg_pool2d(batch.x_0, 2)
    again = losses.redrawn(model, stage_1, batch, 3, torch.Generator().manual_seed(1), x)
    assert torch.equal(again[3:], x[3:])
    assert again.shape == x.shape and again.isfinite().all()
    assert (again[:3] - x[:3]).square().mean() > 0.01

    def exact(x_t, t, text):
        return torch.cat([predict_eps(x_t, x[:3], t, SCHEDULE), torch.zeros_like(x_t)], 1)

    exact.encode_text = stage_1.encode_text
    again = losses.redrawn(model, exact, batch, 3, torch.Generator().manual_seed(1), x)
    torch.testing.assert_close(again, x)  # a stage 1 that knows the image draws it again


def test_the_gap_is_zero_for_a_model_that_does_not_listen(data, tokenizer):
    model = small_model(tokenizer, export.stage_1_config(16, [32, 32], 1, 32))  # says zero
    batch = losses.draw_batch(data, tokenizer, 6, 16, torch.Generator().manual_seed(0), drop=0)
    gap = losses.caption_loss_gap(model, batch)
    assert gap["right"] == gap["others"] == gap["none"]


def test_resume_ends_with_the_same_weights(run_script, folder, tmp_path, monkeypatch):
    status, _, err = run_script("train_if", *stage_1_options(folder, tmp_path / "whole", 4))
    assert status == 0, err
    draw, calls = training.draw_batch, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 2 + 1 + 2:  # two batches for the text, the held one, the second step
            signal.raise_signal(signal.SIGINT)
        return draw(*arguments, **options)

    monkeypatch.setattr(training, "draw_batch", interrupted)
    options = stage_1_options(folder, tmp_path / "parts", 4)
    assert run_script("train_if", *options)[0] == 130
    monkeypatch.setattr(training, "draw_batch", draw)
    assert len(load_tensors(tmp_path / "parts" / "state.safetensors")[0]["losses"]) == 2
    status, _, err = run_script("train_if", *options, "--resume")
    assert status == 0, err
    whole, parts = (load_tensors(tmp_path / name / "state.safetensors")[0] for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_batches_drawn_ahead_are_the_same(data, tokenizer):
    recipe = training.Recipe(16, 5, 4, 1e-3, 1, 4, 1.0, "", "", "float32")
    batches = training.Batches(data, tokenizer, recipe)
    pairs = list(zip(batches.ahead(2, 0), batches.ahead(2, 1), strict=True))
    assert len(pairs) == 3
    assert all(torch.equal(here.x_0, there.x_0) and torch.equal(here.tokens, there.tokens) for here, there in pairs)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_outlive_a_stop(folder, tmp_path, number):
    """A terminal's Ctrl-C and `timeout` send their signal to them, too."""
    options = stage_1_options(folder, tmp_path / "out", 100_000, "--workers", 1)
    command = [str(part) for part in (sys.executable, ROOT / "scripts" / "train_if.py", *options)]
    handled = partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # ignored by tests in the background
    pipe = {"stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, preexec_fn=handled, **pipe) as process:
        next(line for line in process.stderr if line.startswith("loss"))
        os.killpg(process.pid, number)
        rest = process.stderr.read()
    assert process.returncode == 130, rest[-1000:]
    assert "stopped and saved" in rest and "Traceback" not in rest
    assert len(load_tensors(tmp_path / "out" / "state.safetensors")[0]["losses"]) > 0


def test_a_stop_while_the_text_encoder_is_trained_saves_nothing(run_script, folder, tmp_path, monkeypatch):
    """It says so, and the same command starts again."""
    draw = training.draw_batch

    def interrupted(*arguments, **options):
        signal.raise_signal(signal.SIGINT)
        return draw(*arguments, **options)

    monkeypatch.setattr(training, "draw_batch", interrupted)
    options = stage_1_options(folder, tmp_path / "out", 1)
    status, _, err = run_script("train_if", *options)
    assert status == 130
    assert "the text encoder was trained, before the UNet: nothing is saved, start again" in err
    assert not (tmp_path / "out" / "state.safetensors").exists()
    monkeypatch.setattr(training, "draw_batch", draw)
    status, _, err = run_script("train_if", *options)
    assert status == 0, err
    assert "text, " in err  # its bar


def test_the_first_process_alone_has_a_bar_of_the_text(data, tokenizer, capsys, monkeypatch):
    recipe = training.Recipe(16, 1, 4, 1e-3, 1, 4, 1.0, "", "", "float32")
    for rank in (0, 1):
        monkeypatch.setattr(training, "rank", lambda rank=rank: rank)
        encoder = models.build_encoder(tokenizer.vocab_size, 32)
        assert training.train_text(encoder, data, tokenizer, recipe, torch.device("cpu"))
        assert ("text" in capsys.readouterr().err) == (rank == 0)


def test_resume_notices_other_data(run_script, refused, folder, trained, tmp_path):
    """Another pixel, another tag, for stage 2 another tokenizer; another dtype gives a warning."""
    other, out = copied(folder, tmp_path), tmp_path / "1"
    shutil.copytree(trained / "1", out)
    options = stage_1_options(other, out, 4, "--resume", "--every", 1)
    image = (other / "0.png").read_bytes()
    (other / "0.png").write_bytes((other / "1.png").read_bytes())
    assert "another recipe data: " in refused("train_if", *options)
    (other / "0.png").write_bytes(image)
    lines = (other / "metadata.jsonl").read_text()
    (other / "metadata.jsonl").write_text(lines.replace("polygon", "triangle", 1))
    assert "another recipe data: " in refused("train_if", *options)
    (other / "metadata.jsonl").write_text(lines)
    with pytest.warns(UserWarning, match="the run was in float32 and goes on in bfloat16"):
        assert run_script("train_if", *options, "--dtype", "bfloat16")[0] == 0

    shutil.copytree(trained / "1" / "model", tmp_path / "model")
    models.train_tokenizer(["other words"] * 9, tmp_path / "model" / "tokenizer", 20)
    options = ["--data", folder, "--out", trained / "2", "--stage-2-of", tmp_path / "model", "--size", 32, "--crop", 16]
    told = refused("train_if", *options, "--steps", 4, *SMALL, "--resume")
    assert "another recipe tokenizer: " in told and "data" not in told.split("another")[1]


@pytest.mark.parametrize("damage", ["no average", "losses", "log", "seconds", "model"])
def test_a_state_that_is_damaged_is_refused_in_a_line(refused, folder, trained, tmp_path, damage):
    out = tmp_path / "1"
    shutil.copytree(trained / "1", out)
    tensors, metadata = load_tensors(out / "state.safetensors")
    if damage == "no average":
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("average.unet.conv_in")}
    elif damage in tensors or damage == "model":
        del tensors["model.unet.conv_in.weight" if damage == "model" else damage]
    else:
        metadata[damage] = "x"
    save_tensors(out / "state.safetensors", tensors, metadata)
    told = refused("train_if", *stage_1_options(folder, out, 4, "--resume"))
    missing = {"no average": "2 missing (average.unet.conv_in", "model": "1 missing (model.unet.conv_in.weight)"}
    assert missing.get(damage, "is damaged: it does not say how far the run came") in told


def test_a_run_that_is_done_writes_its_model_again(run_script, folder, trained, tmp_path):
    out = tmp_path / "1"
    shutil.copytree(trained / "1", out)
    shutil.rmtree(out / "model")
    status, _, err = run_script("train_if", *stage_1_options(folder, out, 3, "--resume"))
    assert status == 0, err
    name = "model/unet/diffusion_pytorch_model.safetensors"
    assert (out / name).read_bytes() == (trained / "1" / name).read_bytes()


def test_more_steps_go_on_with_a_run_that_is_complete(run_script, folder, trained, tmp_path):
    shutil.copytree(trained / "1", tmp_path / "longer")
    status, _, err = run_script("train_if", *stage_1_options(folder, tmp_path / "longer", 4, "--resume", "--every", 1))
    assert status == 0, err
    steps = [row.split(",")[0] for row in (tmp_path / "longer" / "log.csv").read_text().splitlines()[1:]]
    assert steps == ["3", "4"]


def test_start_goes_on_from_the_weights_of_a_stage(run_script, refused, folder, trained, tmp_path):
    """With no learning rate to speak of, what is saved is what was loaded."""
    model = trained / "1" / "model"
    nearly_still = ["--lr", 1e-12, "--every", 1]
    options = stage_1_options(folder, tmp_path / "1", 1, "--start", model, *nearly_still)
    status, _, err = run_script("train_if", *options)
    assert status == 0, err
    stage_2 = ["--data", folder, "--stage-2-of", model, "--size", 32, "--crop", 16, *SMALL, "--steps", 1]
    options = [*stage_2, "--out", tmp_path / "2", "--start", trained / "2" / "model", *nearly_still]
    status, _, err = run_script("train_if", *options)
    assert status == 0, err
    for stage in ("1", "2"):
        before, after = (path / stage / "model" / "unet" for path in (trained, tmp_path))
        name = "diffusion_pytorch_model.safetensors"
        assert (before / "config.json").read_text() == (after / "config.json").read_text()
        one, other = load_tensors(before / name)[0], load_tensors(after / name)[0]
        assert all(torch.allclose(one[key], other[key], atol=1e-3) for key in one)
    assert (tmp_path / "1" / "tokenizer" / "spiece.model").read_bytes() == (
        trained / "1" / "tokenizer" / "spiece.model"
    ).read_bytes()

    told = refused("train_if", *stage_1_options(folder, tmp_path / "3", 1, "--start", model, "--layers", 2))
    assert "has layers_per_block = (1, 1), the options of this run say (2, 2)" in told


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_text_encoder_to_start_from_is_refused_in_a_line(refused, folder, trained, tmp_path, damage):
    model = shutil.copytree(trained / "1" / "model", tmp_path / "model")
    weights = model / "text_encoder" / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        shutil.rmtree(weights.parent)
    assert "is no T5 encoder" in refused("train_if", *stage_1_options(folder, tmp_path / "1", 1, "--start", model))
    stage_2 = ["--data", folder, "--stage-2-of", model, "--size", 32, "--crop", 16, *SMALL, "--steps", 1]
    assert "is no T5 encoder" in refused("train_if", *stage_2, "--out", tmp_path / "2")


def test_a_file_in_the_way_of_the_model_costs_no_steps(run_script, refused, folder, tmp_path):
    (tmp_path / "model").write_text("in the way")
    assert "model" in refused("train_if", *stage_1_options(folder, tmp_path, 1))
    (tmp_path / "model").unlink()
    resume = ["--resume"] if (tmp_path / "state.safetensors").exists() else []
    status, _, err = run_script("train_if", *stage_1_options(folder, tmp_path, 1, *resume))
    assert status == 0, err
    assert (tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors").is_file()


def test_new_text_keeps_the_unet_alone(run_script, refused, folder, trained, tmp_path):
    model = trained / "1" / "model"
    new = ["--start", model, "--new-text", "--lr", 1e-12, "--seed", 7]
    status, _, err = run_script("train_if", *stage_1_options(folder, tmp_path, 1, *new))
    assert status == 0, err

    def change(part: str, name: str) -> float:
        one, other = (load_tensors(path / part / name)[0] for path in (model, tmp_path / "model"))
        return max((one[key] - other[key]).abs().max().item() for key in one)

    assert change("unet", "diffusion_pytorch_model.safetensors") < 1e-3
    assert change("text_encoder", "model.safetensors") > 0.1
    assert "goes with --start" in refused("train_if", *stage_1_options(folder, tmp_path / "2", 1, "--new-text"))


def test_a_batch_that_does_not_divide_is_refused(refused, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    told = refused("train_if", *stage_1_options(folder, tmp_path / "out", 1))
    assert "--batch-size 4 does not divide among 3 processes" in told


def test_two_processes_are_as_good_as_one(folder, tmp_path):
    """torchrun with two processes on the CPU: the loss curve of one process with the same global batch."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    curves = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
        script = [
            ROOT / "scripts" / "train_if.py",
            *stage_1_options(folder, out, 2, "--every", 1, "--lr", 0.2),
        ]  # 4e-4 after the warm-up
        command = [str(part) for part in [sys.executable, *launch, *script]]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        rows = (out / "log.csv").read_text().splitlines()[1:]
        curves.append([float(row.split(",")[1]) for row in rows])
    assert len(curves[0]) == 2
    assert curves[0] == pytest.approx(curves[1], abs=2e-5)
    assert abs(curves[0][0] - curves[0][1]) > 1e-3


def test_generate_draws_with_both_stages_as_diffusers_does(run_script, trained, tmp_path):
    """diffusers loads the folders that were written, and its images are ours."""
    prompt, out = "a red shape", tmp_path / "out.png"
    options = ["--model", trained / "1" / "model", "--upscaler", trained / "2" / "model", "--prompt", prompt]
    options += ["--steps", 4, "--guidance", 3, "--upscaler-steps", 3, "--upscaler-guidance", 2, "--noise-level", 50]
    status, _, err = run_script("generate", *options, "--dtype", "float32", "--device", "cpu", "--out", out)
    assert status == 0, err
    with Image.open(out) as image:
        found = numpy.asarray(image).astype(int)

    stage_1 = IFPipeline.from_pretrained(trained / "1" / "model", torch_dtype=torch.float32)
    shared = {"tokenizer": stage_1.tokenizer, "text_encoder": stage_1.text_encoder}
    stage_2 = IFSuperResolutionPipeline.from_pretrained(trained / "2" / "model", **shared)

    def call(pipeline, **options):
        generator = torch.Generator().manual_seed(20040805)
        return pipeline(prompt=prompt, generator=generator, clean_caption=False, **options).images

    small = call(stage_1, num_inference_steps=4, guidance_scale=3.0, output_type="pt")
    large = call(stage_2, image=small, num_inference_steps=3, guidance_scale=2.0, noise_level=50)
    expected = numpy.asarray(large[0]).astype(int)
    assert found.shape == expected.shape == (32, 32, 3)
    assert expected.std() > 10
    assert abs(found - expected).max() <= 1


def test_the_sheets_and_logs(trained):
    for stage, columns in (("1", "step,loss,right,others,none,alike"), ("2", "step,loss,stage_2,bicubic")):
        header, row = (trained / stage / "log.csv").read_text().splitlines()
        assert header == columns
        assert row.startswith("3,") and len(row.split(",")) == len(columns.split(","))
        with Image.open(trained / stage / "samples.png") as image:
            assert numpy.asarray(image.convert("L")).std() > 10
            assert stage == "2" or "a lime shape" in image.text["Description"]


def test_the_sheet_has_things_and_styles_of_the_data(data, tmp_path):
    styles = ["a photo of {}", "an oil painting of {}", "a lithograph of {}", "a sketch of {}"]
    assert stages.sheet_prompts(data) == (styles, [with_article(f"{colour} shape") for colour in COLOURS])
    Image.new("RGB", (16, 16)).save(tmp_path / "0.png")
    for names, things in ((curated(), stages.SHEET_THINGS), ("bcdfghjkl", [f"a {k}" for k in "bcdfghj"])):
        rows = [{"file_name": "0.png", "text": name, "artist": "fluent-emoji-high-contrast"} for name in names]
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        assert stages.sheet_prompts(load_captioned(tmp_path, 4)) == (["a woodcut of {}"], things)


def test_the_last_step_is_logged_and_drawn_too(run_script, folder, tmp_path):
    """After 3 of every 2 steps, and after 3 of every 500; a row has the mean loss since the one before."""
    for every, steps in ((2, ["2", "3"]), (500, ["3"])):
        out = tmp_path / str(every)
        status, _, err = run_script("train_if", *stage_1_options(folder, out, 3, "--every", every))
        assert status == 0, err
        rows = [row.split(",") for row in (out / "log.csv").read_text().splitlines()[1:]]
        assert [row[0] for row in rows] == steps
        losses = load_tensors(out / "state.safetensors")[0]["losses"]
        assert float(rows[-1][1]) == pytest.approx(losses[2 if every == 2 else 0 :].mean().item(), abs=1e-5)
        assert (out / "samples.png").is_file()


def copied(folder, tmp_path):
    other = tmp_path / "copy"
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    return other


def test_bad_folders_are_refused(refused, folder, tmp_path):
    other = copied(folder, tmp_path)

    def told(*more):
        return refused("train_if", *stage_1_options(other, tmp_path / "out", 2, *more))

    good = (other / "metadata.jsonl").read_text()
    (other / "metadata.jsonl").write_text(good + '\n{"file_name": "0.png"')
    assert "line 7" in told()
    (other / "metadata.jsonl").write_text(good + '\n{"file_name": "0.png", "text": " "}')
    assert "line 7" in told() and "caption" in told()
    for tags in ("5", "[1, 2]", '"words"'):
        (other / "metadata.jsonl").write_text(f'{{"file_name": "0.png", "text": "a shape", "tags": {tags}}}')
        assert "line 1" in told() and "tags" in told()
    (other / "metadata.jsonl").write_text("5")
    assert "line 1" in told()
    (other / "metadata.jsonl").write_bytes(b'{"file_name": "0.png", "text": "\xff"}')
    assert "metadata.jsonl is not UTF-8" in told()
    for row in (
        '{"file_name": "0.png", "text": "\\ud800"}',
        '{"file_name": "0.png", "text": "x", "tags": ["\\ud800"]}',
    ):
        (other / "metadata.jsonl").write_text(f"{good}\n{row}")
        assert "line 7 has half of a character" in told()
    (other / "metadata.jsonl").write_text("")
    assert "no captions" in told()
    (other / "metadata.jsonl").unlink()
    line = told().partition("has no metadata.jsonl: it needs a line for each image, such as ")[2]
    (other / "metadata.jsonl").write_text(line)
    assert "lacks 1 images: a.png" in told()  # it is a line that can be read
    (other / "metadata.jsonl").write_text(good)
    assert "too small: 64 × 64" in told("--size", 128)
    assert "has no snow capped mountain" in told("--curated")
    assert "--variety must be from 0 to 1, but is 2" in told("--variety", 2)
    (other / "3.png").write_bytes(b"no image")
    assert "3.png is no image" in told()
    (other / "3.png").unlink()
    assert "lacks 1 images: 3.png" in told()
    assert not (tmp_path / "out" / "state.safetensors").exists()


def test_captions_may_hold_any_character_and_the_file_a_mark(folder, tmp_path):
    """A byte-order mark, as some editors write it; carriage returns; a line separator within a string."""
    rows = ['{"file_name": "0.png", "text": "one\u2028line"}', '{"file_name": "1.png", "text": "\\ud83d\\ude00 é"}']
    (copied(folder, tmp_path) / "metadata.jsonl").write_bytes("\r\n".join(["\ufeff" + rows[0], rows[1], ""]).encode())
    assert load_captioned(tmp_path / "copy", 16).names == ["one\u2028line", "\U0001f600 é"]


def test_a_full_disk_leaves_no_tokenizer(refused, folder, tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    told = refused("train_if", *stage_1_options(folder, tmp_path / "out", 1))
    assert f"No space left on device, not written: {tmp_path / 'out' / 'tokenizer' / 'spiece.model'}" in told
    assert not list((tmp_path / "out" / "tokenizer").iterdir())


def test_bad_runs_are_refused(refused, folder, trained, tmp_path):
    assert "no run" in refused("train_if", *stage_1_options(folder, tmp_path / "none", 2, "--resume"))
    assert "--resume" in refused("train_if", *stage_1_options(folder, trained / "1", 3))
    fewer = stage_1_options(folder, trained / "1", 2, "--resume")
    assert "3 steps done, more than the 2" in refused("train_if", *fewer)
    assert "another recipe learning_rate" in refused(
        "train_if", *stage_1_options(folder, trained / "1", 4, "--resume", "--lr", 1)
    )
    stage_2 = ["--data", folder, "--out", tmp_path / "2", "--stage-2-of", trained / "1" / "model", *SMALL]
    assert "multiple of stage 1's 16" in refused("train_if", *stage_2, "--size", 24, "--crop", 8)
    stage_2[5] = tmp_path / "none"
    assert str(tmp_path / "none") in refused("train_if", *stage_2, "--size", 32, "--crop", 16)


@pytest.mark.parametrize(
    "options, told",
    [
        (["--size", 17], "--size must be a multiple of 2 for a UNet of 2 levels, but is 17"),
        (["--workers", 100_000], "--workers 100000 are more than this machine's"),
        (["--lr", -1], "'-1' is not above 0"),
        (["--lr", "nan"], "'nan' is not a finite number"),
        (["--unnamed", 2], "--unnamed must be from 0 to 1, but is 2"),
        (["--redrawn", 0.5], "--redrawn is for stage 2: it goes with --stage-2-of"),
        (["--text-steps", -3], "--text-steps must be from 0 to 1000000"),
        (["--stage-2-of", "tiny-if", "--crop", 17], "--crop must be a multiple of 2 for a UNet of 2 levels, but is 17"),
        (["--stage-2-of", "tiny-if", "--size", 48], "--size 48 must be a multiple of stage 1's 32"),
        (["--stage-2-of", "tiny-if/II"], "--stage-2-of tiny-if/II is a stage-2 model, not a stage-1 one"),
        (["--start", "tiny-if/II"], "--start tiny-if/II is a stage-2 model, not a stage-1 one"),
        (
            ["--stage-2-of", "tiny-if", "--start", "tiny-if/I"],
            "--start tiny-if/I is a stage-1 model, not a stage-2 one",
        ),
        (["--start", "tiny-if"], "--start tiny-if/I has block_out_channels = (64, 96, 192)"),
        (["--stage-2-of", "tiny-if", "--start", "tiny-if"], "--start tiny-if/II has block_out_channels = (32, 48, 64,"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(refused, tmp_path, options, told):
    start = ["--data", tmp_path / "not looked at", "--out", tmp_path / "out", *SMALL]
    assert told in refused("train_if", *start, *options)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_the_checkpoint_before(refused, folder, tmp_path, monkeypatch):
    out = tmp_path / "run"
    fsync = os.fsync
    draw, calls = training.draw_batch, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 2 + 1 + 1:
            signal.raise_signal(signal.SIGINT)
        return draw(*arguments, **options)

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(training, "draw_batch", interrupted)
    script = ROOT / "scripts" / "train_if.py"
    options = stage_1_options(folder, out, 3)
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, options)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(script), run_name="__main__")
    assert stopped.value.code == 130
    before = (out / "state.safetensors").read_bytes()
    monkeypatch.setattr(training, "draw_batch", draw)
    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device, not written" in refused("train_if", *options, "--resume")
    monkeypatch.setattr(os, "fsync", fsync)
    assert (out / "state.safetensors").read_bytes() == before
    assert not list(out.glob(".*"))
