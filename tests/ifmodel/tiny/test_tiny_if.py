"""The tiny IF that is shipped: what is in it, diffusers draws the same with it, and it draws what it is asked for."""

import errno
import json

import numpy
import pytest
import torch
import torch.nn.functional as F
from diffusers import IFPipeline, IFSuperResolutionPipeline
from PIL import Image
from safetensors.torch import load_file

from ddpm.views import vertical_flip
from ifmodel import Cascade, UNet, UNetConfig, load_unet
from ifmodel.lora import add_lora, save_lora
from ifmodel.stage import generate, upscale
from ifmodel.t5 import embed_each, embed_prompts
from ifmodel.tiny import export, models
from ifmodel.tiny.algorithm_measures import pairs_of
from ifmodel.tiny.data import CaptionedImages, draw_rows, show
from ifmodel.tiny.exam import Exam
from ifmodel.tiny.judge import apart, judged, train_judge
from ifmodel.tiny.loading import load_captioned
from ifmodel.tiny.styles import STYLES
from ifmodel.vocabulary import load_vocabulary, nearest_known
from ifmodel.weights import SHIPPED
from tests.conftest import DATA

STAGE_1, STAGE_2 = SHIPPED["tiny-if/I"], SHIPPED["tiny-if/II"]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setitem(embed_each.__kwdefaults__, "cache", cache)


def test_it_is_small_and_in_safetensors_alone():
    files = [path for path in STAGE_1.parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 25e6
    assert {path.suffix for path in files} == {".safetensors", ".json", ".model"}
    assert {path.relative_to(STAGE_1.parent).parts[1] for path in files if path.suffix == ".safetensors"} == {
        "unet",
        "text_encoder",
    }


def test_diffusers_draws_the_same_images(run_script, tmp_path):
    """Both stages by our script, in float32, and by diffusers' pipelines from the same folders."""
    prompt, out = "a photo of a rocket ship", tmp_path / "out.png"
    options = ["--prompt", prompt, "--steps", 6, "--upscaler-steps", 4, "--upscaler-guidance", 2]
    status, _, err = run_script("generate", *options, "--dtype", "float32", "--device", "cpu", "--out", out)
    assert status == 0, err
    with Image.open(out) as image:
        found = numpy.asarray(image).astype(int)

    stage_1 = IFPipeline.from_pretrained(STAGE_1, torch_dtype=torch.float32)
    shared = {"tokenizer": stage_1.tokenizer, "text_encoder": stage_1.text_encoder}
    stage_2 = IFSuperResolutionPipeline.from_pretrained(STAGE_2, torch_dtype=torch.float32, **shared)

    def call(pipeline, **options):
        generator = torch.Generator().manual_seed(20040805)
        return pipeline(prompt=prompt, generator=generator, clean_caption=False, **options).images

    small = call(stage_1, num_inference_steps=6, guidance_scale=2.0, output_type="pt")
    large = call(stage_2, image=small, num_inference_steps=4, guidance_scale=2.0, noise_level=50)
    expected = numpy.asarray(large[0]).astype(int)
    assert found.shape == expected.shape == (128, 128, 3)
    assert expected.std() > 10
    assert abs(found - expected).max() <= 1


def test_it_draws_what_it_is_asked_for():
    """Twelve prompts; at least nine images are nearer to one artist's drawing of the thing than to the eleven others.

    It may draw as any of nine artists do, and these are Noto's.
    """
    data = load_captioned(DATA / "emoji", 32)
    prompts = [f"a photo of {phrases[0]}" for phrases in data.phrases]
    embeds = embed_prompts("tiny-if/I", [*prompts, ""])
    text, null = torch.stack([embeds[prompt] for prompt in prompts]), embeds[""][None]
    options = {"num_steps": 20, "guidance_scale": 4.0}
    drawn = generate(load_unet("tiny-if/I"), text, null, seeds=range(12), **options)

    assert (likest(drawn, as_drawn(data)) == torch.arange(12)).sum() >= 9


def as_drawn(data, style="photo"):
    """Every thing in a style, as it is, [K, 3, 32, 32]."""
    rows = (data.styles == list(STYLES).index(style)).nonzero().flatten().tolist()
    return show(data, rows, 32, torch.Generator(), variety=0.0)[0]


def likest(drawn, known):
    """Which of the known images [K, 3, 32, 32] is likest to each drawn one [N, 3, 32, 32], coarsely, [N]."""

    def coarse(x):  # without its brightness
        x = F.avg_pool2d(x, 4).flatten(1)
        return F.normalize(x - x.mean(1, keepdim=True), dim=1)

    return (coarse(drawn) @ coarse(known).T).argmax(1)


def test_it_draws_the_assignments_prompts():
    """Other names than the drawings' own, as photos and as oil paintings: six of the eight are likest to theirs."""
    data = load_captioned(DATA / "emoji", 32)
    others = ("a snowy mountain village", "a rocket ship", "people around a campfire", "a dog")
    things = [k for other in others for k, phrases in enumerate(data.phrases) if other in phrases]
    cascade, right = Cascade("tiny-if/I"), 0
    for style in ("photo", "oil"):
        prompts = [STYLES[style].templates[0].format(other) for other in others]
        options = {"sampler": "dpm++", "eta": 1.0, "num_steps": 20, "progress": False}
        drawn = cascade.draw(prompts, seeds=range(4), **options)
        right += (likest(drawn, as_drawn(data, style)) == torch.tensor(things)).sum()
    assert len(things) == 4 and right >= 6


@pytest.mark.parametrize(
    ("prompt", "nearest"),
    [
        ("a photo of a puppy", "a dog face"),
        ("a flower in a pot", "a sunflower"),
        ("two dogs", None),
        ("a photo of a unicorn", None),
        ("a photo of an unicorn", None),
        ("an oil painting of a snowy mountain village", None),
        ("a high quality photo", None),
        ("", None),
    ],
)
def test_prompts_beyond_the_vocabulary_are_told_what_is_near(prompt, nearest):
    known = nearest_known(prompt, load_vocabulary("tiny-if/I"))
    assert (nearest in known) if nearest else known == []


def test_a_vocabulary_may_hold_names_without_letters():
    known = {"things": {"\U0001f600": {"aliases": [], "tags": ["happy"]}}, "anything": []}
    assert nearest_known("a happy man", known) == ["\U0001f600"]


@pytest.mark.parametrize(
    "damaged", [{}, {"things": [], "anything": []}, {"things": {"a dog": {"aliases": [5], "tags": []}}, "anything": []}]
)
def test_a_damaged_vocabulary_is_refused(damaged, tmp_path):
    (tmp_path / "vocabulary.json").write_text(json.dumps(damaged))
    with pytest.raises(ValueError, match="is no vocabulary"):
        load_vocabulary(tmp_path)


def test_generate_warns_of_what_it_does_not_know(run_script, tmp_path, recwarn):
    quick = ["--steps", 1, "--upscaler", "none", "--out", tmp_path / "out.png"]
    for prompt, count in (("a photo of a dog", 0), ("a photo of a puppy", 1)):
        status, _, _ = run_script("generate", "--prompt", prompt, *quick)
        told = [str(one.message) for one in recwarn if "does not know" in str(one.message)]
        assert status == 0 and len(told) == count
    assert "does not know 'a photo of a puppy'" in told[0] and "nearest to it are a dog face" in told[0]


def test_a_folder_of_that_name_is_not_needed_and_others_are_not_found(refused, tmp_path):
    line = refused("sample", "--model", "tiny-if/III", "--out", tmp_path / "out.png")
    assert "tiny-if/III" in line
    line = refused("sample", "--model", "tiny-if/II", "--out", tmp_path / "out.png")
    assert "give it as --upscaler" in line


def test_the_short_name_will_do_wherever_a_model_is_named(run_script, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the Hub was asked"))
    out = tmp_path / "embeds.safetensors"
    status, _, err = run_script("embed_prompts", "--model", "tiny-if", "--prompt", "a dog", "--out", out)
    assert status == 0, err
    assert embed_prompts("tiny-if", ["a dog"])["a dog"].shape == (77, 128)
    assert load_unet("tiny-if").config == load_unet("tiny-if/I").config
    assert [stage.source for stage in Cascade("tiny-if/I", upscaler="tiny-if").stages] == ["tiny-if/I", "tiny-if/II"]


def test_upscaler_none_leaves_stage_2_out(run_script, tmp_path):
    for more, side in (([], 128), (["--upscaler", "none"], 32)):
        out = tmp_path / f"{side}.png"
        options = ["--prompt", "a skull", "--steps", 1, "--upscaler-steps", 1, *more, "--out", out]
        status, _, err = run_script("generate", *options)
        assert status == 0, err
        with Image.open(out) as image:
            assert image.size == (side, side)


QUICK = ["--judge-steps", 5, "--prompts", 4, "--pairs", 2, "--samples", 2, "--guidance", 2, "--illusion-steps", 2]
QUICK += ["--most-steps", 5, "--dtype", "float32", "--device", "cpu"]


def test_evaluation(run_script, refused, tmp_path):
    """Its measures on twelve things, kept and used again by a second run, and what it refuses."""
    options, out = [*save_untrained(tmp_path, 16, 32), *QUICK, "--seed", 1], tmp_path / "out"
    status, _, err = run_script("evaluate/tiny_if", *options)
    assert status == 0, err
    report = json.loads((out / "report.json").read_text())
    assert [row["guidance"] for row in report["guidance"]] == [2]
    assert [row["sampler"] for row in report["samplers"]] == [["dpm++", 1.0, 5]]
    for row in [*report["guidance"], *report["samplers"]]:
        assert row["plain"] in (0, 0.5, 1) and row["styled"] in (0, 0.5, 1) and row["distance"] > 0
    for kind in (
        "anagrams, mean, random pairs",
        "anagrams, mean, alike pairs",
        "hybrids, random pairs",
        "hybrids, alike pairs",
    ):
        first, second, both, of_four = report[kind].values()
        assert 0 <= both <= min(first, second, of_four) <= 1
    assert report["anything"]["photo"]["different things"] <= 2
    assert report["variety"]["drawings"] > 0 and report["memory"]["samples"] >= 0
    assert report["holes"]["before"] >= 0 and report["sdedited"]["nearer to its own"] >= 0
    assert report["stage 2"]["trained on"]["bicubic, PSNR"] > 15
    assert (out / "curves.png").is_file() and (out / "anagrams_mean_alike.png").is_file()

    before = {path: path.stat().st_mtime_ns for path in (out / "images").iterdir()}
    assert run_script("evaluate/tiny_if", *options)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "images").iterdir()} == before

    best = ["--only", "named", "aliases", "--best", 3]
    status, _, err = run_script("evaluate/tiny_if", *options, *best)
    assert status == 0, err
    aliases = [path.name for path in (out / "images").glob("aliases_*")]
    assert len(aliases) == 4  # of γ = 2, the best of those measured, and of the one that is given

    status, _, err = run_script("evaluate/tiny_if", *options, "--only", "anagrams", "--reduction", "rectified")
    assert status == 0, err
    rectified = json.loads((out / "report.json").read_text())
    pairs = {f"anagrams, rectified, {kind} pairs" for kind in ("random", "alike")}
    assert rectified.keys() == {"seed", "things", "judge", *pairs}

    assert "metadata.jsonl" in refused("evaluate/tiny_if", "--data", tmp_path, "--out", tmp_path / "other")
    line = refused("evaluate/tiny_if", "--data", DATA / "emoji", "--prompts", 0, "--out", tmp_path / "other")
    assert "'0' is not a whole number" in line


def test_what_a_lora_has_taught_is_measured(run_script, refused, tmp_path):
    """Without it and with it; one that changes nothing draws the same images, another one others."""
    options = [*save_untrained(tmp_path, 16, 32), *QUICK, "--taught", "penguin", "a photo of a zwx bird"]
    unet = load_unet(tmp_path / "I")
    layers = add_lora(unet, 2)
    for name in ("none", "some"):
        save_lora(tmp_path / f"{name}.safetensors", layers)
        lora = ["--lora", tmp_path / f"{name}.safetensors", "--out", tmp_path / name]
        status, _, err = run_script("evaluate/tiny_if", *options, *lora)
        assert status == 0, err
        report = json.loads((tmp_path / name / "report.json").read_text())
        assert report.keys() == {"seed", "things", "judge", "taught"}
        assert report["taught"]["with"].keys() == {"penguin", "others", "others, but penguin"}
        for kind in ("taught", "named"):
            kept = [load_file(path)["images"] for path in (tmp_path / name / "images").glob(f"{kind}_*")]
            assert len(kept) == 2 and torch.equal(*kept) == (name == "none")
        assert (report["taught"]["with"] == report["taught"]["without"]) or name == "some"
        assert (tmp_path / name / "taught.png").is_file()
        for layer in layers.values():
            torch.nn.init.normal_(layer.up.weight)
    assert "give both" in refused("evaluate/tiny_if", *options)
    line = refused("evaluate/tiny_if", *options, *lora, "--taught", "boxing glove", "a glove")
    assert "has no 'boxing glove' that the judge could learn" in line


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
    encoder, widths = models.build_encoder(1500, 32), (32, 32)
    for name, config in (
        ("I", export.stage_1_config(small, widths, 1, 32)),
        ("II", export.stage_2_config(large, widths, 1, text_dim)),
    ):
        weights = models.TextToImage(encoder, UNet(UNetConfig.from_dict(config))).state_dict()
        if name == "I":
            export.save_stage_1(
                folder / name, config, weights, encoder, STAGE_1 / "tokenizer", {"things": {}, "anything": []}
            )
        else:
            export.save_stage_2(folder / name, config, weights)
    return ["--data", DATA / "emoji", "--model", folder / "I", "--upscaler", folder / "II", "--out", folder / "out"]


def test_what_cannot_be_evaluated_is_refused_before_a_judge_is_trained(refused, monkeypatch, tmp_path):
    def too_late(*_, **__):
        raise AssertionError("it began")

    monkeypatch.setattr("ifmodel.tiny.judge.train_judge", too_late)
    options = save_untrained(tmp_path, 16, 32)
    (tmp_path / "rocket.png").write_bytes((DATA / "emoji" / "rocket.png").read_bytes())
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "rocket.png", "text": "rocket"}))
    line = refused("evaluate/tiny_if", *options, "--data", tmp_path, *QUICK)
    assert "has one thing alone, rocket" in line
    assert "give it as --upscaler" in refused("evaluate/tiny_if", "--data", DATA, "--model", "tiny-if/II")
    assert "give it as --model" in refused("evaluate/tiny_if", "--data", DATA, "--upscaler", "tiny-if/I")


def test_a_late_failure_loses_no_measures(refused, monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "hybrids_alike")

    monkeypatch.setattr("ifmodel.tiny.algorithm_measures.hybrid", full)
    assert "No space left" in refused("evaluate/tiny_if", *save_untrained(tmp_path, 16, 32), *QUICK)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report)[-1] == "anagrams, mean, alike pairs" and {"judge", "guidance", "variety"} <= report.keys()


def test_pairs_that_are_alike_are_the_nearest_ones():
    images = torch.full((4, 4, 32, 32), 255, dtype=torch.uint8)
    for row, (top, bottom) in enumerate(((0, 200), (199, 1), (90, 100), (110, 80))):
        images[row, :3, :16], images[row, :3, 16:] = top, bottom
    names, zeros = list("abcd"), torch.zeros(4, dtype=torch.long)
    data = CaptionedImages(images, torch.arange(4), zeros, names, [[name] for name in names], [[]] * 4, names)
    exam = Exam(Cascade("tiny-if/I"), None, data)
    chosen = pairs_of(exam, True, vertical_flip(), 5)
    assert [set(pair) for pair in chosen] == [{0, 1}, {2, 3}]  # each upside down is the other, nearly
    random = pairs_of(exam, False, vertical_flip(), 5)
    assert len(random) == 5 and all(first != second for first, second in random)


def test_how_far_apart_features_are():
    features = torch.eye(3, dtype=torch.float64)
    assert apart(features) == pytest.approx(1)
    assert apart(5 * features[[0, 0, 0]]) == pytest.approx(0)
    assert apart(features[[0, 0, 1]]) == pytest.approx(2 / 3)


def test_the_judge_tells_things_apart():
    """Six of very different colours, after few steps, as they are shown in training; by chance it is one in six."""
    data = load_captioned(DATA / "emoji", 16, ["rocket", "red heart", "sunflower", "penguin", "frog", "skull"])
    judge = train_judge(data, steps=150, batch_size=32, side=16)
    x, rows, _ = draw_rows(data, 16, 120, torch.Generator().manual_seed(1))
    thing, sure, _ = judged(judge, x)
    assert (thing == data.things[rows]).float().mean() > 0.6
    assert ((sure > 0) & (sure <= 1)).all()


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
