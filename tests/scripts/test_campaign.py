"""Hundreds of command lines that are wrong, and of files that are damaged or hostile.

Each ends with status 0 and whole files, or with status 2, one line and no file; see `tests.forked`.
"""

import argparse
import itertools
import runpy
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from PIL import Image

from ddpm.mnist import ClassFlow, ClassUNet, UNet
from ddpm.mnist.checkpoint import save_weights
from shared.options import OneLineParser, number, positive, seed_number
from shared.stages import model_name, steps_or_name
from tests.conftest import DATA, ROOT, settled
from tests.forked import PRELOADED, SERVER, run_all
from tests.ifmodel.test_text import model_folder  # noqa: F401
from tests.scripts.test_generate import cascade  # noqa: F401
from tests.scripts.test_prepare_emoji import RED, pack

TRILLION, LONG = "1" + "0" * 12, "9" * 400
TEXTS = ["", " ", "x" * 300, "ü \u202e<script>$\\frac{", "\udcff", "a/../b", "two words " * 500]
PATHS = ["", "nowhere/ü n.png", "../../there", "../../there.txt", "../../there.txt/below", "y" * 250 + ".png"]
PATHS += ["/proc/nope.png", "-", "../../there.png", "~", "a/" * 3000, "/dev/null"]
VALUES = {  # what is given to an option, by its type
    positive: ["", "x", "0", "-1", "1.5", "nan", TRILLION, LONG, "٣", "1000000", "²"],
    int: ["", "x", "-1", "1e3", "inf", TRILLION, LONG],
    number: ["", "x", "nan", "inf", "-inf", "1e400", "1e38", "-1e300", "0", LONG],
    seed_number: ["", "x", "-1", "4294967296", TRILLION, LONG, "1.5"],
    steps_or_name: ["", "x", "0", "-1", "1001", "smart51", TRILLION, LONG],
    model_name: [*TEXTS, *PATHS, "tiny-if/II", "no/such-model"],
    Path: PATHS,
    None: [*TEXTS, *PATHS],
    "choices": ["", "nothing", "DDPM"],
    "flag": ["=1"],
}
SKIPPED = {"--help", "--compile", "--train-judge"}


@pytest.fixture(scope="module")
def models(cascade, tmp_path_factory):  # noqa: F811
    """A folder with a small cascade, the digits' models, and what stands in the way; and a server of forks."""
    folder = tmp_path_factory.mktemp("models")
    for stage in ("stage_1", "stage_2"):
        (folder / stage).symlink_to(cascade[0] / stage)
    torch.manual_seed(0)
    for model in (UNet(4), ClassUNet(4), ClassFlow(4)):
        save_weights(folder / f"{type(model).__name__}.safetensors", settled(model), {})
    pack(folder, "icons", {"red-apple": RED})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HOME", str(folder))
        SERVER.set_forkserver_preload(PRELOADED)
        forkserver.ensure_running()
    return folder


def bases(models: Path) -> dict[str, list]:
    """A short command line of each script, which is right."""
    cpu = ["--dtype", "float32", "--device", "cpu"]
    stage_1 = ["--model", models / "stage_1", *cpu, "--stride", 400]
    digits = ["--data", DATA, "--weights", models / "ClassUNet.safetensors", "--steps", 1, "--samples", 2]
    training = ["--data", DATA, "--width", 4, "--limit", 20, "--epochs", 1]
    pair = ["--prompt", "a dog", "--prompt", "a hat"]
    one_step = ["--steps", 1, "--batch-size", 1, *cpu]
    small = ["--size", 16, "--widths", 32, 32, "--text-dim", 32, "--text-steps", 1, "--every", 1]
    return {
        "forward_process": ["--size", 16, "--timesteps", 0, 500],
        "classical_denoise": ["--size", 16, "--timesteps", 0, 500],
        "one_step_denoise": [*stage_1, "--timesteps", 500],
        "iterative_denoise": stage_1,
        "sample": [*stage_1, "--prompt", "a dog", "--num-images", 1],
        "sdedit": [*stage_1, "--image", "face", "--i-start", 1],
        "inpaint": [*stage_1, "--image", "face"],
        "restore": [*stage_1, "--image", "face", "--task", "upscale"],
        "visual_anagram": [*stage_1, *pair, "--num-images", 1],
        "hybrid_image": [*stage_1, *pair, "--num-images", 1],
        "generate": [*stage_1, "--prompt", "a dog", "--upscaler", models / "stage_2", "--upscaler-steps", 1],
        "embed_prompts": ["--model", models / "stage_1", "--prompt", "a dog", "--dtype", "float32"],
        "sample_mnist": ["--weights", models / "ClassUNet.safetensors", "--steps", 1, "--per-class", 1],
        "denoise_mnist": ["--data", DATA, "--weights", models / "UNet.safetensors"],
        "digits_gallery": [*digits, "--only", "anagram"],
        "train_ddpm": ["--condition", "class", "--sample-steps", 1, *training],
        "train_denoiser": training,
        "train_flow": ["--condition", "class", "--sample-steps", 1, *training],
        "flow_velocity": ["--data", DATA, "--weights", models / "ClassFlow.safetensors"],
        "train_if": ["--data", DATA / "emoji", *small, *one_step],
        "train_lora": [*stage_1[:2], "--images", DATA / "boxing_glove", "--prompt", "a dog", "--rank", 2, *one_step],
        "prepare_emoji": [models / "icons.tgz", "--artists", 1, "--size", 16],
        "reproduce": ["--only", "B2"],
        "evaluate/mnist": [*digits, "--digits", 2, "--denoiser", models / "UNet.safetensors"],
    }


class Seen(Exception):
    """Raised with a parser when it would read the command line."""


def options_of(script: str, monkeypatch) -> list[argparse.Action]:
    """All options of a script."""

    def see(self, *_):
        raise Seen(self)

    with monkeypatch.context() as patch, pytest.raises(Seen) as seen:
        patch.setattr(OneLineParser, "parse_known_args", see)
        runpy.run_path(str(ROOT / "scripts" / f"{script}.py"), run_name="__main__")
    return [
        action
        for action in seen.value.args[0]._actions
        if action.option_strings and not SKIPPED & {*action.option_strings}
    ]


def wrong_values(models: Path, monkeypatch, each: int = 2) -> list[list]:
    """Command lines that each give one option another value, `each` for an option, the next ones at the next script."""
    turns = {kind: itertools.cycle(values) for kind, values in VALUES.items()}
    commands = []
    for script, base in bases(models).items():
        for action in options_of(script, monkeypatch):
            kind = "flag" if action.nargs == 0 else "choices" if action.choices else action.type
            for _ in range(1 if kind == "flag" else each):
                value = next(turns.get(kind, turns[number]))
                commands.append([script, *base, f"{action.option_strings[0]}{'' if kind == 'flag' else '='}{value}"])
            if action.nargs != 0:
                commands.append([script, *base, action.option_strings[0]])  # and none at all
    return commands


def complaints(runs, expected=None) -> str:
    told = [(" ".join(run.command)[-300:], run.complaint(expected)) for run in runs]
    return "\n\n".join(f"{command}\n{complaint}" for command, complaint in told if complaint)


@pytest.fixture(scope="module")
def commands(models):
    with pytest.MonkeyPatch.context() as patch:
        return wrong_values(models, patch)


@pytest.mark.slow
@pytest.mark.parametrize("script", bases(Path()))
def test_every_option_with_other_values(commands, tmp_path, script):
    assert len(commands) >= 400
    (tmp_path / "there").mkdir()
    (tmp_path / "there.txt").write_text("in the way")
    Image.new("RGB", (8, 8)).save(tmp_path / "there.png")
    runs = run_all([command for command in commands if command[0] == script], tmp_path)
    assert not complaints(runs)


CONTRADICTIONS = [  # a script, options that do not go together, and a part of what it says
    ("generate", ["--steps", 5], "not allowed with"),
    ("generate", ["--steps-grid", 2], "--steps-grid gives the steps"),
    ("generate", ["--eta", 1], "--eta is of ddim"),
    ("generate", ["--eta", 2, "--sampler", "ddim"], "eta must be from 0 to 1"),
    ("generate", ["--upscaler", ""], "--upscaler is empty"),
    ("generate", ["--upscaler", "tiny-if/I"], "is a stage-1 model, not a stage-2 one"),
    ("generate", ["--model", "tiny-if/II"], "is a stage-2 model, not a stage-1 one"),
    ("generate", ["--upscaler", "tiny-if/II"], "embeddings are 24 wide"),
    ("generate", ["--guidance-interval", 800, 200], "begins at the smaller t"),
    ("generate", ["--guidance-interval", 1], "expected 2 arguments"),
    ("generate", ["--size", 17, 16], "must be multiples of"),
    ("generate", ["--size", 100_000, 100_000], "GB of memory"),
    ("generate", ["--num-images", 1_000_000], "GB of memory"),
    ("generate", ["--noise-level", 1000], "noise level must be from 0 to 999"),
    ("generate", ["--dtype", "float16"], "float16 is for GPUs"),
    ("generate", ["--device", "cuda:99"], "is not on this machine"),
    ("generate", ["--prompt=--"], "gives no value"),
    ("generate", ["--prompt"], "expected one argument"),
    ("one_step_denoise", ["--upscaler", "tiny-if/II"], "of stage 1 alone"),
    ("one_step_denoise", ["--timesteps", -1], "--timesteps must be from 0 to 999"),
    ("iterative_denoise", ["--i-start", 3], "--i-start must be from 0 to 2"),
    ("sdedit", ["--i-start", -1], "--i-start must be from 0 to 2"),
    ("inpaint", ["--mask", "circle:0.5,0.5,-0.3"], "a radius above 0"),
    ("inpaint", ["--mask", "circle:nan,0.5,0.3"], "has no hole"),
    ("inpaint", ["--mask", "circle:0.5,0.5,nan"], "a radius above 0"),
    ("inpaint", ["--mask", "circle:0.5,0.5,inf"], "is all hole"),
    ("inpaint", ["--mask", "rectangle:0.9,0.9,0.1,0.1"], "has no hole"),
    ("inpaint", ["--mask", "rectangle:1,2,3"], "is 4 numbers"),
    ("inpaint", ["--mask", "face", "--mask", "face"], "give one --mask"),
    ("inpaint", ["--resamples", 1_000_000], "steps are too many"),
    ("inpaint", ["--prompt", "a", "--prompt", "b"], "give one --prompt"),
    ("visual_anagram", ["--view", "identity"], ""),  # two pairs of one
    ("visual_anagram", ["--prompt", "a third"], "give a --prompt for each --view"),
    ("hybrid_image", ["--components", "three_bands"], "give 3 --prompt"),
    ("hybrid_image", ["--sigma", 0], "'0' is not above 0"),
    ("sample_mnist", ["--animate", "--per-class", 11], "at most 100 digits"),
    ("sample_mnist", ["--per-class", 1_000_000], "GB of memory"),
    ("sample_mnist", ["--guidance", "1e38", "--steps", 3], "not finite any more"),
    ("sample_mnist", ["--steps", 301], "from 1 to 300"),
    ("sample_mnist", ["--out", "digits.jpg"], "must end in .png"),
    ("sample_mnist", ["--save", "digits.pt"], "must end in .safetensors"),
    ("digits_gallery", ["--samples", 1_000_000], "GB of memory"),
    ("digits_gallery", ["--guidance", "1e38", "--steps", 3], "not finite any more"),
    ("evaluate/mnist", ["--samples", 1], "--samples must be at least 2"),
    ("evaluate/mnist", ["--samples", 1_000_000], "GB of memory"),
    ("evaluate/mnist", ["--guidance", "1e38", "--steps", 3], "not finite any more"),
    ("train_ddpm", ["--width", 1_000_000], "GB of memory"),
    ("train_ddpm", ["--epochs", 1_000_000, "--limit", 60_000, "--batch-size", 1], "GB of memory"),
    ("train_ddpm", ["--resume"], "there is no run in"),
    ("train_ddpm", ["--condition", "none"], "invalid choice"),
    ("train_denoiser", ["--width", 1000], "GB of memory"),
    ("train_denoiser", ["--start", "nowhere"], "no weights file at"),
    ("forward_process", ["--size", 1_000_000], "GB of memory"),
    ("classical_denoise", ["--timesteps", 1000], "--timesteps must be from 0 to 999"),
    ("reproduce", ["--only", "A12"], "there is no experiment"),
]


def test_options_that_contradict_each_other(models, tmp_path):
    base = bases(models)
    commands = [[script, *base[script], *more] for script, more, _ in CONTRADICTIONS]
    runs = run_all(commands, tmp_path)
    told = [complaints([run], part) for run, (*_, part) in zip(runs, CONTRADICTIONS, strict=True)]
    assert not "\n\n".join(filter(None, told))
