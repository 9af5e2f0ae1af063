"""The tiny IF that is shipped: what is in it, diffusers draws the same with it, and it draws what it is asked for."""

import errno
import json
from argparse import Namespace

import numpy
import pytest
import tiny_if
import torch
import torch.nn.functional as F
from diffusers import IFPipeline, IFSuperResolutionPipeline
from PIL import Image

from ddpm.files import load_tensors
from ddpm.sampling import noise_source, sample
from ddpm.views import vertical_flip
from ifmodel import UNet, UNetConfig, load_unet
from ifmodel.stage import SCHEDULE, STAGE_1_THRESHOLD, generate, stage_1, upscale
from ifmodel.text import embed_each, embed_prompts
from ifmodel.tiny import export, training
from ifmodel.tiny.captions import CaptionedImages, load_captioned
from ifmodel.weights import SHIPPED
from tests.conftest import DATA

STAGE_1, STAGE_2 = SHIPPED["tiny-if/I"], SHIPPED["tiny-if/II"]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setitem(embed_prompts.__kwdefaults__, "cache", cache)
    monkeypatch.setitem(embed_each.__kwdefaults__, "cache", cache)


def test_it_is_small_and_in_safetensors_alone():
    files = [path for path in STAGE_1.parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 25e6
    assert {path.suffix for path in files} == {".safetensors", ".json", ".model"}
    assert {path.relative_to(STAGE_1.parent).parts[1] for path in files if path.suffix == ".safetensors"} == {
        "unet",
        "text_encoder",
    }


def test_diffusers_draws_the_same_pictures(run_script, tmp_path):
    """Both stages by our script, in float32, and by diffusers' pipelines from the same folders."""
    prompt, out = "a photo of a rocket ship", tmp_path / "out.png"
    options = ["--prompt", prompt, "--steps", 6, "--upscaler-steps", 4, "--upscaler-guidance", 2]
    status, _, err = run_script("generate", *options, "--dtype", "float32", "--device", "cpu", "--out", out)
    assert status == 0, err
    with Image.open(out) as picture:
        found = numpy.asarray(picture).astype(int)

    stage_1 = IFPipeline.from_pretrained(STAGE_1, torch_dtype=torch.float32)
    shared = {"tokenizer": stage_1.tokenizer, "text_encoder": stage_1.text_encoder}
    stage_2 = IFSuperResolutionPipeline.from_pretrained(STAGE_2, torch_dtype=torch.float32, **shared)

    def call(pipeline, **options):
        generator = torch.Generator().manual_seed(20040805)
        return pipeline(prompt=prompt, generator=generator, clean_caption=False, **options).images

    small = call(stage_1, num_inference_steps=6, guidance_scale=4.0, output_type="pt")
    large = call(stage_2, image=small, num_inference_steps=4, guidance_scale=2.0, noise_level=50)
    expected = numpy.asarray(large[0]).astype(int)
    assert found.shape == expected.shape == (128, 128, 3)
    assert expected.std() > 10
    assert abs(found - expected).max() <= 1


def test_it_draws_what_it_is_asked_for():
    """Twelve prompts; at least ten pictures are nearer to their own training picture than to the eleven others."""
    data = load_captioned(DATA / "emoji", 32)
    prompts = [f"a photo of {phrases[0]}" for phrases in data.phrases]
    embeds = embed_prompts("tiny-if/I", [*prompts, ""])
    text, null = torch.stack([embeds[prompt] for prompt in prompts]), embeds[""][None]
    options = {"num_steps": 20, "guidance_scale": 4.0}
    drawn = generate(load_unet("tiny-if/I"), text, null, seeds=range(12), **options)

    assert (likest(drawn, data.pictures[:, 0]) == torch.arange(12)).sum() >= 10


def likest(drawn, pictures):
    """Which of the pictures [K, 3, 32, 32] uint8 is likest to each drawn one [N, 3, 32, 32], coarsely, [N]."""

    def coarse(x):  # without its brightness
        x = F.avg_pool2d(x, 4).flatten(1)
        return F.normalize(x - x.mean(1, keepdim=True), dim=1)

    return (coarse(drawn) @ coarse(pictures / 127.5 - 1).T).argmax(1)


def test_it_draws_the_assignments_prompts():
    """Other names than the pictures' own, as photos and as oil paintings: seven of the eight are likest to theirs."""
    data = load_captioned(DATA / "emoji", 32)
    others = ("a snowy mountain village", "a rocket ship", "people around a campfire", "a dog")
    asked = [one for one in tiny_if.aliases_of(data) if one.prompt.endswith(others)]
    prompts = [one.prompt for one in asked]
    assert prompts == [f"{style} {other}" for style in ("a photo of", "an oil painting of") for other in others]
    embeds = embed_prompts("tiny-if/I", [*prompts, ""])
    estimate = stage_1(load_unet("tiny-if/I"), torch.stack([embeds[one] for one in prompts]), embeds[""][None], 4.0)
    step, spaced = tiny_if.STEPS["sde-dpm++"]
    noise = noise_source(range(8), (3, 32, 32), torch.device("cpu"))
    drawn = sample(estimate, spaced(1000, 20), SCHEDULE, noise=noise, step=step, threshold=STAGE_1_THRESHOLD)
    found = torch.cat([likest(part, data.pictures[:, style]) for style, part in enumerate(drawn.chunk(2))])
    assert (found == torch.tensor([one.name for one in asked])).sum() >= 7


def test_a_folder_of_that_name_is_not_needed_and_others_are_not_found(refused, tmp_path):
    line = refused("sample", "--model", "tiny-if/III", "--out", tmp_path / "out.png")
    assert "tiny-if/III" in line
    line = refused("sample", "--model", "tiny-if/II", "--out", tmp_path / "out.png")
    assert "give it as --upscaler" in line


def test_upscaler_none_leaves_stage_2_out(run_script, tmp_path):
    for more, side in (([], 128), (["--upscaler", "none"], 32)):
        out = tmp_path / f"{side}.png"
        options = ["--prompt", "a skull", "--steps", 1, "--upscaler-steps", 1, *more, "--out", out]
        status, _, err = run_script("generate", *options)
        assert status == 0, err
        with Image.open(out) as picture:
            assert picture.size == (side, side)


def test_evaluation(run_script, refused, tmp_path):
    """Its measures on twelve pictures, kept and used again by a second run, and what it refuses."""
    options = [
        "--data",
        DATA / "emoji",
        "--judge-steps",
        30,
        "--prompts",
        4,
        "--pairs",
        2,
        "--tries",
        2,
        "--guidance",
        2,
        "--seed",
        1,
    ]
    options += ["--most-steps", 5, "--illusion-steps", 6, "--dtype", "float32", "--device", "cpu", "--out", tmp_path]
    status, printed, err = run_script("evaluate/tiny_if", *options)
    assert status == 0, err
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["guidance"] for row in report["guidance"]] == [2]
    assert [(row["sampler"], row["steps"]) for row in report["samplers"]] == [("sde-dpm++", 5)]
    for row in [*report["guidance"], *report["samplers"]]:
        assert row["plain"] in (0, 0.5, 1) and row["styled"] in (0, 0.5, 1) and row["distance"] > 0
    for kind in ("anagrams, random pairs", "anagrams, alike pairs", "hybrids, random pairs", "hybrids, alike pairs"):
        first, second, both, of_two = report[kind].values()
        assert 0 <= both <= min(first, second, of_two) <= 1
    assert len(report["aliases"]["prompts"]) == 16  # eight other names, as photos and as oil paintings
    found = list(report["aliases"]["prompts"].values())
    assert report["aliases"]["all"] == sum(found) / 16 and report["aliases"]["photo"] == sum(found[:8]) / 8
    assert "8 other names, γ = 2: photo" in printed and (tmp_path / "aliases.png").is_file()
    assert report["stage_2"]["trained on"]["bicubic, PSNR"] > 15
    assert (tmp_path / "curves.png").is_file() and (tmp_path / "anagrams_alike.png").is_file()

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "pictures").iterdir()}
    assert run_script("evaluate/tiny_if", *options)[1] == printed
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "pictures").iterdir()} == before

    status, _, err = run_script("evaluate/tiny_if", *options, "--only", "anagrams", "--reduction", "rectified")
    assert status == 0, err
    rectified = json.loads((tmp_path / "report.json").read_text())
    pairs = {f"anagrams, rectified, {kind} pairs" for kind in ("random", "alike")}
    assert rectified.keys() == {"prompts", "seed", "judge", *pairs}

    assert "metadata.jsonl" in refused("evaluate/tiny_if", "--data", tmp_path, "--out", tmp_path / "other")
    line = refused("evaluate/tiny_if", "--data", DATA / "emoji", "--prompts", 0, "--out", tmp_path / "other")
    assert "'0' is not a whole number" in line


def test_guiders_are_evaluated_on_digits_and_images(run_script, tmp_path):
    options = ["--data", DATA, "--emoji", DATA / "emoji", "--judge-steps", 5, "--guidance", 3, 6, "--out", tmp_path]
    options += ["--digits", 20, "--digit-steps", 2, "--images", 2, "--image-steps", 2]
    status, printed, err = run_script("evaluate/guidance", *options)
    assert status == 0, err
    report = json.loads((tmp_path / "report.json").read_text())
    for part, measures in (("digits", ("fid", "hits")), ("images", ("hits", "saturation"))):
        rows = report[part]["rows"]
        kinds = [(guider, gamma) for guider in ("plain", "rescaled", "projected") for gamma in (3, 6)]
        assert [(row["guider"], row["guidance"]) for row in rows] == kinds
        assert len({tuple(row[measure] for measure in measures) for row in rows}) > 1
    assert 0 < report["images"]["saturation"] < 1
    assert (tmp_path / "guidance.png").is_file()
    again = run_script("evaluate/guidance", *options, "--skip-digits")[1]
    assert "fid" not in again and set(again.splitlines()) <= set(printed.splitlines())
    assert json.loads((tmp_path / "report.json").read_text()) == report


def save_untrained(folder, small, large, text_dim=32):
    """A stage 1 of small × small pixels with the text encoder of 32, and a stage 2 of large × large, in a folder."""
    torch.manual_seed(0)
    encoder, widths = training.build_encoder(1500, 32), (32, 32)
    for name, config in (
        ("I", export.stage_1_config(small, widths, 1, 32)),
        ("II", export.stage_2_config(large, widths, 1, text_dim)),
    ):
        weights = training.TextToImage(encoder, UNet(UNetConfig.from_dict(config))).state_dict()
        if name == "I":
            export.save_stage_1(folder / name, config, weights, encoder, STAGE_1 / "tokenizer")
        else:
            export.save_stage_2(folder / name, config, weights)
    return ["--data", DATA / "emoji", "--model", folder / "I", "--upscaler", folder / "II", "--out", folder / "out"]


QUICK = ["--judge-steps", 2, "--prompts", 2, "--pairs", 1, "--tries", 1, "--guidance", 2, "--illusion-steps", 1]
QUICK += ["--most-steps", 5, "--dtype", "float32", "--device", "cpu"]


def test_models_of_other_sizes_are_evaluated(run_script, refused, tmp_path):
    """The data are loaded as large as stage 2 draws, and compared with stage 1 as small as that draws."""
    options = [*save_untrained(tmp_path, 16, 32), *QUICK]
    status, _, err = run_script("evaluate/tiny_if", *options)
    assert status == 0, err
    with Image.open(tmp_path / "out" / "stage_2_trained_on.png") as picture:
        assert picture.height < 4 * 128 + 200  # four rows of pictures of 128 pixels: 32, each four times
    assert load_tensors(next((tmp_path / "out" / "pictures").glob("aliases*")))[0]["pictures"].shape == (16, 3, 16, 16)
    line = refused("evaluate/tiny_if", *save_untrained(tmp_path, 20, 32), *QUICK)
    assert "draws pictures of 32 pixels, no multiple of the 20" in line


@pytest.mark.parametrize(("small", "size"), [(16, 128), (32, 128), (48, 96), (64, 128), (256, 256)])
def test_without_an_upscaler_the_data_are_large_enough_for_the_judge(monkeypatch, small, size):
    monkeypatch.setattr(tiny_if, "check_stage", lambda *_: Namespace(sample_size=small, encoder_hid_dim=128))
    args = Namespace(model="tiny-if/I", upscaler="none")
    tiny_if.check_models(args)
    assert (args.small, args.size) == (small, size)


def test_what_cannot_be_evaluated_is_refused_before_a_judge_is_trained(refused, monkeypatch, tmp_path):
    def too_late(*_, **__):
        raise AssertionError("it began")

    monkeypatch.setattr("ifmodel.tiny.judge.train_picture_judge", too_late)
    line = refused("evaluate/tiny_if", *save_untrained(tmp_path, 16, 32, text_dim=64), *QUICK)
    assert "II takes texts that are 64 wide" in line and "encoder gives 32" in line
    options = save_untrained(tmp_path, 16, 32)
    monkeypatch.setattr("ifmodel.tiny.captions.curated", lambda: ["rocket", "skull"])
    assert "64 of them cannot be held out" in refused("evaluate/tiny_if", *options, "--curated", *QUICK)
    (tmp_path / "1F680.png").write_bytes((DATA / "emoji" / "1F680.png").read_bytes())
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "1F680.png", "text": "rocket"}))
    line = refused("evaluate/tiny_if", *options, "--data", tmp_path, *QUICK)
    assert "has one picture alone, rocket" in line
    (tmp_path / "I" / "text_encoder" / "config.json").unlink()
    assert "must hold its text encoder" in refused("evaluate/tiny_if", *options, *QUICK)


def test_a_late_failure_loses_no_measures(refused, monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "hybrids_random")

    monkeypatch.setattr("ddpm.sampling.hybrid", full)
    assert "No space left" in refused("evaluate/tiny_if", *save_untrained(tmp_path, 16, 32), *QUICK)
    sections = ["judge", "distance_floor", "guidance", "best_guidance", "samplers", "aliases", "anagrams, random pairs"]
    assert list(json.loads((tmp_path / "out" / "report.json").read_text())) == ["prompts", "seed", *sections]
    assert (tmp_path / "out" / "curves.png").is_file()


def test_tiny_if_is_short_for_both_stages(monkeypatch):
    options = ["--data", "emoji", "--model", "tiny-if", "--upscaler", "tiny-if"]
    monkeypatch.setattr("sys.argv", ["evaluate/tiny_if.py", *options])
    args = tiny_if.arguments()
    assert (args.model, args.upscaler, args.small, args.size) == ("tiny-if/I", "tiny-if/II", 32, 128)


def test_pictures_without_other_names_have_no_aliases():
    pictures = torch.zeros((2, 4, 3, 128, 128), dtype=torch.uint8)
    assert tiny_if.aliases_of(CaptionedImages(pictures, list("ab"), [["a"], ["b"]], [[]] * 2)) == []


def test_pairs_that_are_alike_are_the_nearest_ones():
    pictures = torch.zeros((4, 4, 3, 128, 128), dtype=torch.uint8)
    for row, (top, bottom) in enumerate(((0, 200), (199, 1), (90, 100), (110, 80))):
        pictures[row, :, :, :64], pictures[row, :, :, 64:] = top, bottom
    data = CaptionedImages(pictures, list("abcd"), [["a"], ["b"], ["c"], ["d"]], [[]] * 4)
    chosen = tiny_if.pairs_of(data, 5, 0, vertical_flip(), alike=True, side=32)
    assert [{one.name for one in pair} for pair in chosen] == [{0, 1}, {2, 3}]  # each upside down is the other, nearly
    apart = tiny_if.pairs_of(data, 5, 0, vertical_flip(), alike=False, side=32)
    assert len(apart) == 5 and all(first.name != second.name for first, second in apart)


def test_stage_2_keeps_the_colours_of_what_it_enlarges():
    """It begins with pure noise, whose brightness it must not believe."""
    embeds = embed_prompts("tiny-if/I", ["a photo of a dog", "an oil painting of a dog", "a lithograph of a skull", ""])
    *texts, null = embeds.values()
    text, null = torch.stack(texts), null[None]
    small = generate(load_unet("tiny-if/I"), text, null, seeds=[1, 2, 3], num_steps=20, guidance_scale=4.0).clamp(-1, 1)
    options = {"num_steps": 10, "guidance_scale": 1.0, "noise_level": 50}
    large = upscale(load_unet("tiny-if/II"), small, text, null, seeds=[1, 2, 3], **options).clamp(-1, 1)
    assert small.mean((1, 2, 3)).std() > 0.05  # of different brightness
    assert (large.mean((2, 3)) - small.mean((2, 3))).abs().max() < 0.1
    again = torch.nn.functional.avg_pool2d(large, 4)
    assert (again - small).abs().mean() < 0.1 < 0.2 < (again - small.roll(1, 0)).abs().mean()


def test_generate_alone_draws_the_assignments_prompts(run_script, tmp_path):
    out = tmp_path / "out.png"
    status, _, err = run_script("generate", "--model", "tiny-if", "--steps", 1, "--upscaler", "none", "--out", out)
    assert status == 0, err
    assert sorted(path.name for path in tmp_path.glob("out_*.png")) == [f"out_{k}_0.png" for k in range(3)]


def test_a_guidance_interval_the_wrong_way_round(refused, tmp_path):
    line = refused("sample", "--guidance-interval", 900, 100, "--out", tmp_path / "out.png")
    assert "begins at the smaller t: 100 900" in line
