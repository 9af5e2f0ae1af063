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
from shared.options import OneLineParser, learning_rate, number, positive, positive_number, seed_number
from shared.stages import model_name, steps_or_name
from tests.conftest import DATA, ROOT, settled
from tests.forked import PRELOADED, SERVER, Run, run_all
from tests.ifmodel.test_t5 import model_folder  # noqa: F401
from tests.scripts.test_generate import cascade  # noqa: F401
from tests.scripts.test_prepare_emoji import RED, pack

TRILLION, LONG = "1" + "0" * 12, "9" * 400
TEXTS = ["", " ", "x" * 300, "ü \u202e<script>$\\frac{", "\udcff", "a/../b", "two words " * 500]
PATHS = ["", "nowhere/ü n.png", "../../there", "../../there.txt", "../../there.txt/below", "y" * 250 + ".png"]
PATHS += ["/proc/nope.png", "-", "../../there.png", "~", "a/" * 3000, "/dev/null"]
WRONG = {  # what no option of a type takes
    positive: ["", "x", "0", "-1", "1.5", "nan", TRILLION, LONG, "²"],
    int: ["", "x", "1e3", "inf", LONG],
    number: ["", "x", "nan", "inf", "-inf", "1e400", LONG],
    seed_number: ["", "x", "-1", "4294967296", TRILLION, LONG, "1.5"],
    steps_or_name: ["", "x", "0", "-1", "1001", "smart51", TRILLION, LONG],
    model_name: ["", "tiny-if/II", "no/such-model", "../../there.txt/below"],
    Path: ["../../there.txt/below"],
    "choices": ["", "nothing", "DDPM"],
    "flag": ["1"],
}
TAKEN = {  # what some take
    positive: ["٣"],
    int: ["-1", TRILLION],
    number: ["1e38", "-1e300", "0"],
    model_name: [*TEXTS, *PATHS],
    Path: PATHS,
    None: [*TEXTS, *PATHS],
}
SKIPPED = {"--help", "--compile", "--train-judge", "--growth", "--cold"}  # the last four take their time


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
    few_guided = ["--digits", 2, "--digit-steps", 1, "--images", 2, "--image-steps", 1, "--judge-steps", 1]
    few_judged = ["--only", "named", "--guidance", 2, "--prompts", 2, "--most-steps", 1, "--judge-steps", 1]
    small = ["--size", 16, "--widths", 32, 32, "--text-dim", 32, "--text-steps", 1, "--every", 1]
    return {
        "forward_process": ["--size", 16, "--timesteps", 0, 500],
        "classical_denoise": ["--size", 16, "--timesteps", 0, 500],
        "one_step_denoise": [*stage_1[:-2], "--timesteps", 500],
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
        "digits_gallery": [*digits, "--only", "inpaint"],
        "train_ddpm": ["--condition", "class", "--sample-steps", 1, *training],
        "train_denoiser": training,
        "train_flow": ["--condition", "class", "--sample-steps", 1, *training],
        "flow_velocity": ["--data", DATA, "--weights", models / "ClassFlow.safetensors"],
        "train_if": ["--data", DATA / "emoji", *small, *one_step],
        "train_lora": [*stage_1[:2], "--images", DATA / "boxing_glove", "--prompt", "a dog", "--rank", 2, *one_step],
        "prepare_emoji": [models / "icons.tgz", "--artists", 1, "--size", 16],
        "reproduce": ["--only", "B2"],
        "evaluate/mnist": [*digits, "--digits", 2, "--denoiser", models / "UNet.safetensors"],
        "evaluate/guidance": ["--data", DATA, "--emoji", DATA / "emoji", "--guidance", 2, *few_guided],
        "evaluate/solvers": [*stage_1[:2], "--prompt", "a dog", "--num-images", 1, "--steps", 4, "--eta", 0],
        "evaluate/tiny_if": ["--data", DATA / "emoji", *stage_1[:2], "--upscaler", "none", *cpu, *few_judged],
        "bench/mnist": ["--data", DATA, "--rounds", 1, "--steps", 1, "--batch-size", 2, "--sample-digits", 1, *cpu],
        "bench/page": ["HEAD", "--only", "B2", "--rounds", 1],
        "bench/training": ["--rounds", 1, *one_step],
        "bench/unet": ["--rounds", 1, "--size", 8, 8, *cpu],
    }


class Seen(Exception):
    """Raised with a parser when it would read the command line."""


def options_of(script: str) -> list[argparse.Action]:
    """All options of a script."""

    def see(self, *_):
        raise Seen(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Seen) as seen:
        patch.setattr(OneLineParser, "parse_known_args", see)
        runpy.run_path(str(ROOT / "scripts" / f"{script}.py"), run_name="__main__")
    actions = seen.value.args[0]._actions
    return [action for action in actions if action.option_strings and not SKIPPED & {*action.option_strings}]


def kind_of(action: argparse.Action):
    """Which of the values an option is given."""
    if action.nargs == 0:
        return "flag"
    numbers = (float, positive_number, learning_rate)
    return "choices" if action.choices else number if action.type in numbers else action.type


def given_to(action: argparse.Action, value: str) -> list[str]:
    """An option with a value, or with as many of this one as it takes."""
    name, several = action.option_strings[0], type(action.nargs) is int and action.nargs > 1
    return [name, *[value] * action.nargs] if several else [f"{name}={value}"]


def commands_of(models: Path, values: dict, each: int = 1, bare: bool = False, once: bool = False) -> list[list]:
    """Command lines that each give one option another value, `each` for an option, the next ones at the next option.

    bare: one without a value for every option, not only for those whose type has none
    once: only for the first script that has an option of a name
    """
    turns = {kind: itertools.cycle(listed) for kind, listed in values.items()}
    commands, seen = [], set()
    for script, base in bases(models).items():
        for action in options_of(script):
            kind, name = kind_of(action), action.option_strings[0]
            if once and name in seen:
                continue
            seen.add(name)
            number_of = (1 if kind == "flag" else each) if kind in turns else 0
            given = [given_to(action, next(turns[kind])) for _ in range(number_of)]
            given += [[name]] if number_of == 0 or (bare and action.nargs not in (0, "*")) else []
            commands += [[script, *base, *one] for one in given]
    return commands


def check(runs: list[Run], expected: list[str | None]):
    """Fail with what is wrong with some of the runs; expected: of each, see `Run.complaint`."""
    told = [(" ".join(run.command)[-300:], run.complaint(part)) for run, part in zip(runs, expected, strict=True)]
    wrong = [f"{command}\n{complaint}" for command, complaint in told if complaint]
    assert not wrong, "\n\n".join(wrong)


@pytest.fixture
def there(tmp_path):
    """What stands beside the folder of each run, as PATHS have it."""
    (tmp_path / "there").mkdir()
    (tmp_path / "there.txt").write_text("in the way")
    Image.new("RGB", (8, 8)).save(tmp_path / "there.png")
    return tmp_path


def test_every_script_has_its_campaign():
    scripts = [path for path in (ROOT / "scripts").rglob("*.py") if "\n    run(main" in path.read_text()]
    names = {str(path.relative_to(ROOT / "scripts").with_suffix("")) for path in scripts}
    assert names == bases(Path()).keys()


def test_a_wrong_value_for_every_option(models, there):
    commands = commands_of(models, WRONG, 2, bare=True)
    assert len(commands) >= 1000
    # reproduce passes most of them on to B2, which needs none of them
    check(run_all(commands, there), [None if script == "reproduce" else "error: " for script, *_ in commands])


def test_each_option_with_a_value_that_some_take(models, there):
    """One script for each; --slow has all of them, and more values."""
    commands = commands_of(models, TAKEN, once=True)
    check(run_all(commands, there), [None] * len(commands))


@pytest.fixture(scope="module")
def commands(models):
    return commands_of(models, TAKEN, 2)


@pytest.mark.slow
@pytest.mark.parametrize("script", bases(Path()))
def test_every_option_with_values_that_some_take(commands, there, script):
    own = [command for command in commands if command[0] == script]
    check(run_all(own, there), [None] * len(own))


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
    ("generate", ["--guidance-interval", 1000, 2000], "the guidance interval has no t from 0 to 999"),
    ("generate", ["--guidance-interval", -9, -1], "the guidance interval has no t from 0 to 999"),
    ("generate", ["--num-steps", 5], "did you mean --steps?"),
    ("generate", ["--guidance-scale", 5], "did you mean --guidance?"),
    ("generate", ["--size", 8, 8, 8], "argument --size: give height and width, or one number for both"),
    ("generate", ["--size", 17, 16], "must be multiples of"),
    ("generate", ["--size", 100_000, 100_000], "GB of memory"),
    ("generate", ["--num-images", 1_000_000], "GB of memory"),
    ("generate", ["--noise-level", 1000], "noise level must be from 0 to 999"),
    ("generate", ["--dtype", "float16"], "float16 is for GPUs"),
    ("generate", ["--device", "cuda:99"], "is not on this machine"),
    ("generate", ["--out", "y" * 250 + ".png"], "is too long: use at most 200 bytes"),
    ("generate", ["--prompt=--"], "gives no value"),
    ("generate", ["--prompt"], "expected one argument"),
    ("one_step_denoise", ["--upscaler", "tiny-if/II"], "unrecognized arguments: --upscaler"),
    ("one_step_denoise", ["--timesteps", -1], "--timesteps must be from 0 to 999"),
    ("iterative_denoise", ["--i-start", 3], "--i-start must be from 0 to 2"),
    ("sdedit", ["--i-start", -1], "--i-start must be from 0 to 2"),
    ("inpaint", ["--mask", "circle:0.5,0.5,-0.3"], "a radius above 0"),
    ("inpaint", ["--mask", "circle:nan,0.5,0.3"], "has no hole"),
    ("inpaint", ["--mask", "circle:0.5,0.5,nan"], "a radius above 0"),
    ("inpaint", ["--mask", "circle:0.5,0.5,inf"], "is all hole"),
    ("inpaint", ["--mask", "rectangle:0.9,0.9,0.1,0.1"], "TOP above BOTTOM and LEFT left of RIGHT"),
    ("inpaint", ["--mask", "rectangle:0.9,0.1,0.1,0.9"], "TOP above BOTTOM and LEFT left of RIGHT"),
    ("inpaint", ["--mask", "rectangle:10,10,20,20"], "has no hole: its numbers are fractions, from 0 to 1"),
    ("inpaint", ["--mask", "rectangle:1,2,3"], "is 4 numbers"),
    ("inpaint", ["--mask", "face", "--mask", "face"], "give one --mask"),
    ("inpaint", ["--resamples", 1_000_000], "steps are too many"),
    ("inpaint", ["--prompt", "a", "--prompt", "b"], "give one --prompt"),
    ("restore", ["--mask", "circle:0.5,0.5,0.2"], "--mask is of the tasks fill and all"),
    ("restore", ["--task", "fill", "--mask", ""], "no image at"),
    ("visual_anagram", ["--view", "rotate_90"], "rotate_90 alone makes no illusion: give another --view"),
    ("visual_anagram", ["--prompt", "a third"], "give a --prompt for each --view"),
    ("hybrid_image", ["--components", "three_bands"], "give 3 --prompt"),
    ("hybrid_image", ["--sigma", 0], "'0' is not above 0"),
    ("sample_mnist", ["--animate", "--per-class", 11], "at most 100 digits"),
    ("sample_mnist", ["--per-class", 1_000_000], "GB of memory"),
    ("sample_mnist", ["--guidance", "1e38", "--steps", 3], "not finite any more"),
    ("sample_mnist", ["--steps", 301], "from 1 to 300"),
    ("sample_mnist", ["--out", "digits.jpg"], "must end in .png"),
    ("sample_mnist", ["--out", "ü" * 120 + ".png"], "is too long: use at most 200 bytes"),
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
    ("train_if", ["--widths", 3200, 3200], "GB of memory"),
    ("train_if", ["--widths", 1_000_000], "one whole number from 1 to 1000000"),
    ("train_if", ["--text-dim", 32_000], "GB of memory"),
    ("train_if", ["--widths", 20, 40], "--widths, --layers and --text-dim make no UNet: config.json has a cross_"),
    ("train_if", ["--batch-size", 1_000_000], "GB of memory"),
    ("train_if", ["--layers", 1_000_000], "at most 1000"),
    ("train_if", ["--text-steps", LONG], "--text-steps must be from 0 to 1000000"),
    ("train_if", ["--size", 1_000_000], "GB of memory"),
    ("train_if", ["--start", "tiny-if/II"], "is a stage-2 model, not a stage-1 one"),
    ("train_lora", ["--batch-size", 1_000_000], "GB of memory"),
    ("train_lora", ["--class-prompt", "a hat", "--class-images", 1_000_000], "GB of memory"),
    ("train_lora", ["--rank", 1_000_000], "take a lower one"),
    ("train_lora", ["--model", "tiny-if/II"], "is a stage-2 model, not a stage-1 one"),
    ("train_flow", ["--width", 1_000_000], "GB of memory"),
    ("evaluate/solvers", ["--num-images", 1_000_000], "GB of memory"),
    ("evaluate/solvers", ["--model", "tiny-if/II"], "is a stage-2 model, not a stage-1 one"),
    ("evaluate/solvers", ["--steps", 1001], "steps must be from 1 to 1000"),
    ("evaluate/guidance", ["--digits", 1_000_000], "GB of memory"),
    ("evaluate/tiny_if", ["--prompts", 1_000_000], "GB of memory"),
    ("evaluate/tiny_if", ["--pairs", 1_000_000], "GB of memory"),
    ("evaluate/tiny_if", ["--taught", "penguin", "a bird"], "give both"),
    ("evaluate/tiny_if", ["--upscaler", "tiny-if/I"], "is a stage-1 model, not a stage-2 one"),
    ("bench/mnist", ["--sampling", "--sample-digits", 1_000_000], "GB of memory"),
    ("bench/mnist", ["--rounds", 1_000_000], "need more than the"),
    ("bench/training", ["--batch-size", 1_000_000], "GB of memory"),
    ("bench/unet", ["--batch-size", 1_000_000], "GB of memory"),
    ("bench/unet", ["--size", 1_000_000, 1_000_000], "GB of memory"),
    ("bench/unet", ["--size", 9, 9], "must be multiples of"),
    ("forward_process", ["--size", 1_000_000], "GB of memory"),
    ("classical_denoise", ["--timesteps", 1000], "--timesteps must be from 0 to 999"),
    ("reproduce", ["--only", "A12"], "there is no experiment"),
]


def test_options_that_contradict_each_other(models, tmp_path):
    base = bases(models)
    commands = [[script, *base[script], *more] for script, more, _ in CONTRADICTIONS]
    check(run_all(commands, tmp_path), [part for *_, part in CONTRADICTIONS])
