"""Several processes draw what one draws, and a folder of images is gone on with where it was."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from functools import wraps
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from ifmodel import Cascade
from ifmodel.embeds import load_embeds
from tests.conftest import DATA, ROOT
from tests.ifmodel.tiny.test_tiny_if import save_untrained

SMALL = ["--model", "tiny-if/I", "--upscaler", "none", "--size", 16, 16, "--dtype", "float32", "--device", "cpu"]
PROMPTS = ["a photo of a dog", "a rocket ship", "an oil painting of a castle", "a photo of an owl"]
# A script and its options; with two images in a batch, the processes have unequal shares
SCRIPTS = {
    "generate": ["--prompt", PROMPTS[0], "--num-images", 5, *SMALL, "--steps", 2],
    "sample": ["--prompt", PROMPTS[0], "--num-images", 3, *SMALL, "--steps", 2],
    "visual_anagram": ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--animate", *SMALL, "--steps", 2],
    "hybrid_image": ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--num-images", 3, *SMALL, "--steps", 2],
}

# Runs several scripts in one process, since starting one takes longer than what they do
DRIVER = """
import json, runpy, sys
for command in json.loads(sys.argv[1]):
    sys.argv = command
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as exit:
        assert not exit.code, command
"""


def commands(folder: Path, prompts: Path) -> list[list[str]]:
    """All of SCRIPTS, a folder of images and a file of embeddings, with their outputs below a folder."""
    made = [(name, [*options, "--batch-size", 2, "--out", folder / f"{name}.png"]) for name, options in SCRIPTS.items()]
    made.append(("generate", ["--prompts", prompts, *SMALL, "--steps", 2, "--batch-size", 2, "--out", folder / "all"]))
    embedded = ["--prompts", prompts, "--dtype", "float32", "--device", "cpu", "--out", folder / "all.safetensors"]
    made.append(("embed_prompts", ["--model", "tiny-if/I", *embedded]))
    return [[str(part) for part in (ROOT / "scripts" / f"{name}.py", *options)] for name, options in made]


def pixels(path: Path) -> numpy.ndarray:
    with Image.open(path) as image:
        return numpy.asarray(image.convert("RGB"))


def evaluations(folder: Path, models: Path) -> list[list[str]]:
    """All evaluations, of few images, into a folder; models: the folder of an untrained cascade."""
    digits = ["--samples", 200, "--steps", 1, "--guidance", 1, "--digits", 10, "--dtype", "float32"]
    few = ["--data", DATA / "emoji", "--model", models / "I", "--upscaler", models / "II", "--judge-steps", 5]
    few += ["--prompts", 4, "--samples", 5, "--guidance", 2, "--most-steps", 5, "--batch-size", 1]
    few += ["--dtype", "float32", "--device", "cpu", "--only", "named", "variety", "stage_2"]
    images = ["--skip-digits", "--emoji", DATA / "emoji", "--images", 2, "--image-steps", 2, "--guidance", 3]
    made = {
        "mnist": ["--data", DATA, *digits, "--device", "cpu", "--out", folder / "mnist"],
        "tiny_if": [*few, "--out", folder / "tiny_if"],
        "guidance": [*images, "--judge-steps", 5, "--out", folder / "guidance"],
        "solvers": ["--model", models / "I", "--steps", 2, 3, "--eta", 0, "--out", folder / "s.json"],
    }
    return [[str(part) for part in (ROOT / "scripts/evaluate" / f"{k}.py", *v)] for k, v in made.items()]


def torchrun(processes: int, scripts: list[list[str]], folder: Path) -> list[str]:
    """Run scripts, one after another, in so many processes on the CPU; the lines that these print."""
    (folder / "driver.py").write_text(DRIVER)
    environment = {**os.environ, "HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "scripts", ROOT / "scripts/evaluate")))
    options = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *options, str(folder / "driver.py"), json.dumps(scripts)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_two_processes_draw_what_one_draws(tmp_path):
    """torchrun with two processes on the CPU: every file is the same, pixel for pixel, and none is drawn twice."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        lines = torchrun(processes, commands(folder, tmp_path / "prompts.txt"), tmp_path)
        assert all(lines.count(str(folder / f"{name}.png")) == 1 for name in SCRIPTS)
    one, two = (
        {path.relative_to(folder) for path in folder.rglob("*.*")} for folder in (tmp_path / "1", tmp_path / "2")
    )
    assert one == two and len(one) == 38
    for name in one:
        if name.suffix in (".png", ".gif"):
            assert (pixels(tmp_path / "1" / name) == pixels(tmp_path / "2" / name)).all(), name
    alone, shared = (load_embeds(tmp_path / name / "all.safetensors") for name in "12")
    assert list(alone) == list(shared) and all(torch.equal(alone[prompt], shared[prompt]) for prompt in alone)


def test_two_processes_measure_what_one_measures(tmp_path):
    """The evaluations: the same images, kept in files of the same names, the same numbers, and each said once."""
    save_untrained(tmp_path / "models", 16, 32)
    said = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        lines = torchrun(processes, evaluations(folder, tmp_path / "models"), tmp_path)
        said.append(sorted(line.replace(str(folder), "") for line in lines))
    assert said[0] == said[1] and "/mnist/report.json" in said[0] and "/s.json" in said[0]
    one, two = ({path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*.*")} for name in "12")
    assert one == two and {".json", ".png", ".safetensors"} == {name.suffix for name in one}
    for name in one:
        if name.suffix == ".png":
            assert (pixels(tmp_path / "1" / name) == pixels(tmp_path / "2" / name)).all(), name
        else:
            assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


def test_a_folder_is_gone_on_with_after_a_kill(run_script, tmp_path):
    """What was written before is left as it is, and what is missing is drawn as it would have been."""
    (tmp_path / "prompts.txt").write_text("\n\n".join(PROMPTS))
    options = ["--prompts", tmp_path / "prompts.txt", *SMALL, "--steps", 20, "--batch-size", 1]
    status, out, err = run_script("generate", *options, "--out", tmp_path / "whole")
    assert status == 0, err
    assert out.strip() == str(tmp_path / "whole")
    folder, script = tmp_path / "killed", ROOT / "scripts" / "generate.py"
    command = [str(part) for part in (sys.executable, script, *options, "--out", folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        while len(list(folder.glob("*.png"))) < 2:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    assert 2 <= len(before) < len(PROMPTS)

    status, _, err = run_script("generate", *options, "--out", folder)
    assert status == 0, err
    for number in range(len(PROMPTS)):
        assert (pixels(folder / f"{number:05}.png") == pixels(tmp_path / "whole" / f"{number:05}.png")).all()
    assert all(path.stat().st_mtime_ns == drawn for path, drawn in before.items())


def test_prompts_of_a_file_may_have_weights(run_script, tmp_path):
    """Each line is what --prompt makes of it, in its place and with its own words in the file."""
    lines = [PROMPTS[0], f"{PROMPTS[0]} AND {PROMPTS[1]} :0.5", PROMPTS[1], f"{PROMPTS[1]} :1"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    options = [*SMALL, "--steps", 3]
    status, _, err = run_script("generate", "--prompts", tmp_path / "prompts.txt", *options, "--out", tmp_path / "all")
    assert status == 0, err
    for number, line in enumerate(lines):
        found, alone = tmp_path / "all" / f"{number:05}.png", tmp_path / f"{number}.png"
        status, _, err = run_script("generate", "--prompt", line, *options, "--out", alone)
        assert status == 0, err
        assert abs(pixels(found).astype(int) - pixels(alone)).max() <= 1
        assert Image.open(found).text["Description"] == line
    composed, plain, other, again = (pixels(tmp_path / f"{number}.png").astype(int) for number in (1, 0, 2, 3))
    assert min(abs(composed - plain).max(), abs(composed - other).max()) > 20 and (other == again).all()


@pytest.mark.parametrize("fits", [True, False])
def test_memory_does_not_grow_with_the_number_of_images(run_script, tmp_path, monkeypatch, fits):
    """All tensors together have as many bytes before the last images as after the first, where both stages fit and
    where one does, when sixteen batches are drawn at a time."""
    draw_all, held, drawn = Cascade.draw_all, [], []

    @wraps(draw_all)
    def watched(cascade: Cascade, jobs, **options):
        real = torch.Tensor, torch.nn.Parameter  # a compiler that another test used leaves tensors without memory
        tensors = [x for x in gc.get_objects() if type(x) in real and x.layout == torch.strided]
        held.append(sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values()))
        drawn.append(sum(len(job.seeds) for job in jobs))
        return draw_all(cascade, jobs, **options)

    monkeypatch.setattr(Cascade, "draw_all", watched)
    monkeypatch.setattr(Cascade, "keeps_all", lambda cascade: fits)
    (tmp_path / "prompts.txt").write_text("\n".join(f"{PROMPTS[k % 4]}, number {k}" for k in range(35)))
    options = ["--prompts", tmp_path / "prompts.txt", *SMALL, "--steps", 1, "--batch-size", 1]
    status, _, err = run_script("generate", *options, "--out", tmp_path / "out")
    assert status == 0, err
    assert drawn == [1] * 35 if fits else drawn == [1, 16, 16, 2]
    assert held[-1] - held[1] < (100_000 if fits else 1_000_000)  # an image and its prompt's embedding are 50,000


def test_a_folder_of_other_images_is_refused(run_script, refused, tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a photo of a dog\n")
    options = ["--prompts", prompts, *SMALL, "--steps", 2, "--out", out]
    status, _, err = run_script("generate", *options, "--num-images", 2)
    assert status == 0, err
    assert sorted(path.name for path in out.iterdir()) == ["00000_0.png", "00000_1.png"]
    with Image.open(out / "00000_1.png") as image:
        assert image.text["Description"] == "a photo of a dog" and image.text["Seed"] == "20040806"

    assert "drawn from another seed: name another folder" in refused(
        "generate", *options, "--num-images", 2, "--seed", 1
    )
    told = refused("generate", *options, "--num-images", 2, "--guidance", 2)
    assert "00000_0.png is there, drawn with other options" in told
    prompts.write_text("a photo of a cat\n")
    assert "drawn of another prompt" in refused("generate", *options, "--num-images", 2)
    assert "would be a file" in refused("generate", *options[:-1], tmp_path / "out.png")
    assert "leave --prompt and --steps-grid" in refused("generate", *options, "--prompt", "a hat")
    prompts.write_text("\n \n")
    assert "is empty" in refused("generate", *options)
    assert "no file of prompts at" in refused("generate", "--prompts", tmp_path / "none.txt", *SMALL)
    (tmp_path / "file").touch()
    prompts.write_text("a hat\n")
    assert "cannot write in" in refused("generate", *options[:-1], tmp_path / "file")


def test_processes_without_a_share_are_refused(refused, tmp_path, monkeypatch):
    monkeypatch.setattr("ifmodel.stage.load_unet", lambda *_, **__: pytest.fail("a UNet was loaded"))
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    told = refused("generate", "--prompt", "a hat", "--num-images", 3, *SMALL, "--out", tmp_path / "out.png")
    assert "3 processes cannot share 1 batches of up to 8 images: make them smaller with --batch-size" in told
    assert "is drawn by one process" in refused("one_step_denoise", "--out", tmp_path / "out.png")
    told = refused("embed_prompts", "--model", "tiny-if/I", "--prompt", "a hat", "--out", tmp_path / "x.safetensors")
    assert "3 processes cannot share 2 prompts" in told
    told = refused("evaluate/mnist", "--data", DATA, "--samples", 200, "--out", tmp_path / "mnist")
    assert "3 processes cannot share 2 files of 100 samples" in told
    told = refused("evaluate/tiny_if", "--data", DATA / "emoji", "--prompts", 50, "--out", tmp_path / "tiny_if")
    assert "3 processes cannot share 2 batches of up to 25 images" in told
