"""scripts/generate.py and scripts/embed_prompts.py on a small random cascade that diffusers saved."""

import json
import shutil

import numpy
import pytest
import torch
from diffusers import DDPMScheduler, IFPipeline, IFSuperResolutionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel, T5Tokenizer

from ifmodel import Cascade
from ifmodel.embeds import load_embeds, save_embeds
from ifmodel.t5 import embed_each
from tests.ifmodel.test_t5 import model_folder  # noqa: F401
from tests.ifmodel.test_unet import SCHEDULER, STAGE_1, STAGE_2, pair

PROMPT = "an oil painting of a snowy mountain village"
NEGATIVE = "a rocket ship"


@pytest.fixture(scope="module")
def cascade(model_folder, tmp_path_factory):  # noqa: F811
    """Two folders as diffusers saves them, stage 1 and stage 2, and the two pipelines that saved them."""
    folder = tmp_path_factory.mktemp("cascade")
    parts = {
        "tokenizer": T5Tokenizer.from_pretrained(model_folder / "tokenizer"),
        "text_encoder": T5EncoderModel.from_pretrained(model_folder / "text_encoder"),
        **dict.fromkeys(("safety_checker", "feature_extractor", "watermarker")),
        "requires_safety_checker": False,
    }
    stage_1 = IFPipeline(
        unet=pair(STAGE_1, torch.float32)[1], scheduler=DDPMScheduler(**SCHEDULER, sample_max_value=1.5), **parts
    )
    stage_2 = IFSuperResolutionPipeline(
        unet=pair({**STAGE_2, "sample_size": 32}, torch.float32)[1],
        scheduler=DDPMScheduler(**SCHEDULER, sample_max_value=1.0),
        image_noising_scheduler=DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2"),
        **parts,
    )
    for pipeline, name in ((stage_1, "stage_1"), (stage_2, "stage_2")):
        pipeline.save_pretrained(folder / name)
        pipeline.set_progress_bar_config(disable=True)
    return folder, stage_1, stage_2


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    cache = tmp_path / "cache"
    monkeypatch.setitem(embed_each.__kwdefaults__, "cache", cache)


def pixels(path) -> numpy.ndarray:
    with Image.open(path) as image:
        assert "generate.py" in image.text["Command"]
        return numpy.asarray(image).astype(int)


@pytest.mark.parametrize("upscaled", [False, True])
def test_the_image_is_diffusers_image(run_script, cascade, tmp_path, upscaled):
    """Same folder, prompt, seed, steps, guidance and noise level: within 1 of 255 in every pixel."""
    folder, stage_1, stage_2 = cascade
    out = tmp_path / "out.png"
    options = ["--model", folder / "stage_1", "--prompt", PROMPT, "--steps", 5, "--guidance", 6, "--seed", 7]
    options += ["--negative-prompt", NEGATIVE]
    if upscaled:
        options += ["--upscaler", folder / "stage_2", "--upscaler-steps", 4, "--upscaler-guidance", 3]
        options += ["--noise-level", 120]
    status, printed, err = run_script("generate", *options, "--dtype", "float32", "--device", "cpu", "--out", out)
    assert status == 0, err
    assert printed.strip() == str(out)

    def call(pipeline, **options):
        options |= {"prompt": PROMPT, "negative_prompt": NEGATIVE, "clean_caption": False}
        return pipeline(generator=torch.Generator().manual_seed(7), **options)

    image = call(stage_1, num_inference_steps=5, guidance_scale=6.0, output_type="pt" if upscaled else "pil").images
    if upscaled:
        image = call(stage_2, image=image, num_inference_steps=4, guidance_scale=3.0, noise_level=120).images
    found, expected = pixels(out), numpy.asarray(image[0]).astype(int)
    assert found.shape == expected.shape == ((32, 32, 3) if upscaled else (16, 16, 3))
    assert expected.std() > 10
    assert abs(found - expected).max() <= 1


def test_thresholding_is_what_the_scheduler_says(run_script, cascade, tmp_path):
    """With another sample_max_value and ratio in both stages' files, the image is diffusers' with these."""
    folder, stage_1, stage_2 = cascade
    said = {"sample_max_value": 3.0, "dynamic_thresholding_ratio": 0.8}
    for name in ("stage_1", "stage_2"):
        path = shutil.copytree(folder / name, tmp_path / name) / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | said))
    pipelines = [IFPipeline(**stage_1.components, requires_safety_checker=False)]
    pipelines += [IFSuperResolutionPipeline(**stage_2.components, requires_safety_checker=False)]
    options = {"prompt": PROMPT, "num_inference_steps": 3, "guidance_scale": 6.0, "output_type": "pt"}
    image = {}
    for pipeline in pipelines:
        pipeline.scheduler = DDPMScheduler(**{**SCHEDULER, **said})
        pipeline.set_progress_bar_config(disable=True)
        image = {"image": pipeline(**options, **image, generator=torch.Generator().manual_seed(7)).images}
    expected = (image["image"][0] * 127.5 + 127.5).permute(1, 2, 0).clamp(0, 255).numpy()

    options = ["--prompt", PROMPT, "--steps", 3, "--upscaler-steps", 3, "--guidance", 6, "--upscaler-guidance", 6]
    options += ["--noise-level", 250, "--seed", 7, "--dtype", "float32", "--device", "cpu"]
    for root in (tmp_path, folder):
        models = ["--model", root / "stage_1", "--upscaler", root / "stage_2"]
        status, _, err = run_script("generate", *options, *models, "--out", tmp_path / f"{root.name}.png")
        assert status == 0, err
    assert abs(pixels(tmp_path / f"{tmp_path.name}.png") - expected).max() <= 1.01
    assert abs(pixels(tmp_path / f"{folder.name}.png") - expected).max() > 10


def test_a_grid_and_each_image_beside_it(run_script, cascade, tmp_path):
    folder, _, _ = cascade
    options = ["--model", folder / "stage_1", "--steps", 3, "--dtype", "float32", "--prompt", PROMPT]
    status, _, err = run_script(
        "generate",
        *options,
        "--prompt",
        "a rocket ship",
        "--num-images",
        3,
        "--batch-size",
        4,
        "--out",
        tmp_path / "g.png",
    )
    assert status == 0, err
    assert pixels(tmp_path / "g.png").shape[1] > 3 * 128
    assert len(list(tmp_path.glob("g_*_*.png"))) == 6
    run_script("generate", *options, "--seed", 20040807, "--out", tmp_path / "alone.png")
    assert abs(pixels(tmp_path / "alone.png") - pixels(tmp_path / "g_0_2.png")).max() <= 1
    assert abs(pixels(tmp_path / "g_0_0.png") - pixels(tmp_path / "g_1_0.png")).max() > 10


def test_without_options_the_image_is_the_cascades(run_script, cascade, tmp_path):
    """The steps, the guidance and what is of stage 2 are the model's own, of the files that came with it."""
    source = {name: shutil.copytree(cascade[0] / name, tmp_path / name) for name in ("stage_1", "stage_2")}
    own = {"stage_1": {"num_steps": 7, "guidance_scale": 2.0}, "stage_2": {"num_steps": 4, "noise_level": 90}}
    for name, settings in own.items():
        (source[name] / "sampling_config.json").write_text(json.dumps(settings))
    options = ["--model", source["stage_1"], "--upscaler", source["stage_2"], "--prompt", PROMPT, "--seed", 7]
    out = ["--dtype", "float32", "--device", "cpu", "--out", tmp_path / "out.png"]
    status, _, err = run_script("generate", *options, *out)
    assert status == 0, err
    drawn = Cascade(source["stage_1"], upscaler=source["stage_2"]).draw(PROMPT, seeds=[7])
    expected = ((drawn[0] + 1) * 127.5).permute(1, 2, 0).numpy()
    assert abs(pixels(tmp_path / "out.png") - expected).max() <= 1
    status, shown, _ = run_script("generate", "--help")
    assert "(default: 100; 50 with tiny-if)" in " ".join(shown.split())


def test_another_size_through_both_stages(run_script, cascade, tmp_path):
    folder, _, _ = cascade
    options = ["--model", folder / "stage_1", "--upscaler", folder / "stage_2", "--steps", 2, "--upscaler-steps", 2]
    options += ["--prompt", PROMPT, "--dtype", "float32", "--size", 8, 20, "--out", tmp_path / "wide.png"]
    status, _, err = run_script("generate", *options)
    assert status == 0, err
    assert pixels(tmp_path / "wide.png").shape == (16, 40, 3)
    status, _, err = run_script("generate", *options, "--size", 8)
    assert status == 0, err
    assert pixels(tmp_path / "wide.png").shape == (16, 16, 3)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"])
def test_half_precision_alone_is_computed_in_float32_and_said(run_script, cascade, tmp_path, name):
    """The tensors tell, not the file's name."""
    folder, *_ = cascade
    model = shutil.copytree(folder / "stage_1", tmp_path / "model")
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    half = {name: tensor.half() for name, tensor in load_file(weights).items()}
    weights.unlink()
    save_file(half, weights.with_name(name))
    options = ["--prompt", PROMPT, "--steps", 2, "--dtype", "float32", "--device", "cpu"]
    status, _, err = run_script("generate", *options, "--model", model, "--out", tmp_path / "half.png")
    assert status == 0, err
    assert err.count(f"{model} has its weights in float16: computing with them in float32") == 1
    status, _, err = run_script("generate", *options, "--model", folder / "stage_1", "--out", tmp_path / "full.png")
    assert "float16" not in err
    assert abs(pixels(tmp_path / "half.png") - pixels(tmp_path / "full.png")).max() <= 5


def test_embeds_spare_t5(run_script, cascade, tmp_path, monkeypatch):
    folder, _, _ = cascade
    embeds = tmp_path / "embeds.safetensors"
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n\na photo of a dog\n")
    common = ("--model", folder / "stage_1", "--dtype", "float32")
    status, printed, err = run_script("embed_prompts", *common, "--prompts", tmp_path / "prompts.txt", "--out", embeds)
    assert status == 0, err
    assert "3 prompts, 24 wide, float32" in printed
    run_script("embed_prompts", *common, "--prompt", "a hat", "--out", embeds)
    assert set(load_embeds(embeds)) == {PROMPT, "a photo of a dog", "", "a hat"}

    run_script("generate", *common, "--steps", 2, "--prompt", PROMPT, "--out", tmp_path / "with_t5.png")
    monkeypatch.setattr("ifmodel.t5.load_encoder", lambda *_: pytest.fail("T5 was loaded"))
    common = (*common, "--steps", 2, "--embeds", embeds)
    status, _, err = run_script("generate", *common, "--prompt", PROMPT, "--out", tmp_path / "without.png")
    assert status == 0, err
    assert (pixels(tmp_path / "without.png") == pixels(tmp_path / "with_t5.png")).all()
    status, _, err = run_script("generate", *common, "--out", tmp_path / "all.png")  # every prompt of the file
    assert len(list(tmp_path.glob("all_*_0.png"))) == 3


def test_bad_input(refused, cascade, tmp_path, monkeypatch):
    folder, _, _ = cascade
    one, two, out = folder / "stage_1", folder / "stage_2", tmp_path / "out.png"
    options = ("--prompt", PROMPT, "--steps", 2, "--dtype", "float32", "--out", out)

    def said(*more):
        return refused("generate", *options, *more)

    with monkeypatch.context() as patch:  # refused before anything is computed
        patch.setattr("ifmodel.t5.load_encoder", lambda *_: pytest.fail("T5 was loaded"))
        patch.setattr("ifmodel.stage.load_unet", lambda *_, **__: pytest.fail("a UNet was loaded"))
        assert "is a stage-2 model, not a stage-1 one: give it as --upscaler" in said("--model", two)
        assert "is a stage-1 model, not a stage-2 one: give it as --model" in said("--model", one, "--upscaler", one)
        assert "steps must be from 1 to 1000" in said("--model", one, "--upscaler", two, "--upscaler-steps", 1001)
        assert "steps must be from 1 to 1000" in said("--model", one, "--steps", 1001)
        assert "the noise level must be from 0 to 999, not 1000" in said("--model", one, "--noise-level", 1000)
        assert "multiples of 4, not 18 × 16" in said("--model", one, "--size", 18, 16)
        line = said("--model", one, "--size", 100_000, 100_000)
        assert "an image of 100000 × 100000 needs about " in line and "GB are free" in line
        assert r"the prompt 'caf\udce9' is not valid UTF-8" in said("--model", one, "--prompt", "caf\udce9")
        assert "float16 is for GPUs" in said("--model", one, "--device", "cpu", "--dtype", "float16")
    assert "has no config.json" in said("--model", tmp_path)
    shutil.copytree(one, tmp_path / "run" / "model")
    assert f"has no config.json: did you mean {tmp_path / 'run' / 'model'}?" in said("--model", tmp_path / "run")
    save_embeds(tmp_path / "null.safetensors", {"": torch.zeros(77, 24)})
    assert "nothing to draw" in refused(
        "generate", "--model", one, "--embeds", tmp_path / "null.safetensors", "--out", out
    )
    assert "nothing to embed" in refused("embed_prompts", "--model", one, "--out", tmp_path / "e.safetensors")
    save_embeds(tmp_path / "wide.safetensors", {PROMPT: torch.zeros(77, 99), "": torch.zeros(77, 99)})
    line = said("--model", one, "--embeds", tmp_path / "wide.safetensors")
    assert f"embeddings are 99 wide, of another text encoder: {one} takes those that are 24 wide" in line
    save_embeds(tmp_path / "nan.safetensors", {prompt: torch.full((77, 24), torch.nan) for prompt in (PROMPT, "")})
    line = said("--model", one, "--embeds", tmp_path / "nan.safetensors")
    assert "are not finite floating-point numbers" in line
    shutil.copytree(one, tmp_path / "infinite")
    weights = tmp_path / "infinite" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_out.bias"][0] = torch.inf  # which thresholding would hide
    save_file(tensors, weights)
    assert "stage 1, t = 500: not finite any more" in said("--model", tmp_path / "infinite")
    assert not out.exists()


@pytest.mark.parametrize("number", [1, 2])
def test_what_guidance_makes_infinite_is_refused(refused, cascade, tmp_path, number):
    """Though the UNet's outputs are finite, and thresholding may make the image so again."""
    folder, out = cascade[0], tmp_path / "out.png"
    options = ["--model", folder / "stage_1", "--upscaler", folder / "stage_2", "--prompt", PROMPT, "--steps", 1]
    options += ["--upscaler-steps", 1, "--dtype", "float32", "--out", out]
    line = refused("generate", *options, "--guidance" if number == 1 else "--upscaler-guidance", 1e300)
    assert f"stage {number}, t = 0: not finite any more; try" in line and "less guidance" in line
    assert not out.exists()


def test_what_stage_2_cannot_do_is_refused_before_anything_runs(refused, cascade, tmp_path, monkeypatch):
    folder, out = cascade[0], tmp_path / "out.png"
    monkeypatch.setattr("ifmodel.t5.load_encoder", lambda *_: pytest.fail("T5 was loaded"))
    monkeypatch.setattr("ifmodel.stage.load_unet", lambda *_, **__: pytest.fail("a UNet was loaded"))
    two = shutil.copytree(folder / "stage_2", tmp_path / "two")

    def said(*more):
        options = ["--model", folder / "stage_1", "--upscaler", two, "--prompt", PROMPT, "--dtype", "float32"]
        return refused("generate", *options, "--out", out, *more)

    def change(name: str, **fields):
        path = two / name
        path.write_text(json.dumps(json.loads((folder / "stage_2" / name).read_text()) | fields))

    change("unet/config.json", sample_size=24)
    assert "multiples of 4, not 30 × 24" in said("--size", 20, 16)
    change("unet/config.json", sample_size=10**6)
    assert "an image of 1000000 × 1000000 needs about" in said()
    change("unet/config.json", sample_size=256)
    with monkeypatch.context() as patch:
        patch.setattr("ddpm.tools.memory.free_memory", lambda device: 10**9)
        assert "a batch of 8 images of 256 × 256 needs about" in said("--num-images", 20)
    change("unet/config.json", encoder_hid_dim=48)
    save_embeds(tmp_path / "e.safetensors", {prompt: torch.zeros(77, 24) for prompt in (PROMPT, "")})
    assert f"embeddings are 24 wide, of another text encoder: {two} takes" in said(
        "--embeds", tmp_path / "e.safetensors"
    )
    change("unet/config.json")
    change("scheduler/scheduler_config.json", thresholding=False)
    assert "scheduler_config.json has thresholding = False, the sampler implements True" in said()
    change("scheduler/scheduler_config.json")
    (two / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert "it has no safetensors at all" in said()
    assert not out.exists()


def test_a_prompt_with_weights_is_a_composition(run_script, cascade, tmp_path):
    """Alone and with weight 1 it is the prompt; with weights 1 and -1 of the same, and γ = 1, the null prompt."""
    options = ["--model", cascade[0] / "stage_1", "--dtype", "float32", "--device", "cpu", "--steps", 3]
    upscaled = ["--upscaler", cascade[0] / "stage_2", "--upscaler-steps", 2]

    def drawn(name: str, *more):
        more = more if "--upscaler" in more else [*upscaled, *more]
        status, _, err = run_script("generate", *options, "--out", tmp_path / f"{name}.png", *more)
        assert status == 0, err
        return pixels(tmp_path / f"{name}.png")

    plain = drawn("plain", "--prompt", PROMPT)
    for name, prompt in (("one", f"{PROMPT} :1"), ("twice", f"{PROMPT} :0.25 AND {PROMPT} :0.75")):
        assert abs(drawn(name, "--prompt", prompt) - plain).max() <= 1
    both = drawn("both", "--prompt", f"{PROMPT} AND {NEGATIVE} :0.5")
    assert abs(both - plain).max() > 5
    # with γ = 1, ε_c - (ε_c - ε_null) is the null prompt's; ddim takes no v, which would be of both
    alone = ["--upscaler", "none", "--guidance", 1, "--sampler", "ddim"]
    nothing = drawn("nothing", "--prompt", f"{PROMPT} AND {PROMPT} :-1", *alone)
    null = drawn("null", "--prompt", "", *alone)
    assert abs(nothing - null).max() <= 1


def test_a_grid_of_steps_is_of_prompts_without_weights(refused, cascade, tmp_path):
    options = ["--model", cascade[0] / "stage_1", "--steps-grid", 2, "--prompt", "a AND b", "--out", tmp_path / "x.png"]
    assert "without weights, not 'a AND b'" in refused("generate", *options)
