"""The cascade in one file draws what generate.py draws."""

import subprocess
import sys

import minimal
import numpy
from PIL import Image

from tests.conftest import ROOT


def test_it_draws_the_image_of_generate(run_script, tmp_path):
    minimal.main("a photo of a dog", tmp_path / "minimal.png", seed=3, steps=10, upscaler_steps=4)
    options = ("--seed", 3, "--steps", 10, "--upscaler-steps", 4, "--dtype", "float32", "--device", "cpu")
    options += ("--prompt", "a photo of a dog", "--out", tmp_path / "generated.png")
    status, _, err = run_script("generate", *options)
    assert status == 0, err
    ours, theirs = (
        numpy.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("minimal", "generated")
    )
    assert ours.shape == theirs.shape == (128, 128, 3)
    assert ours.std() > 10
    assert abs(ours - theirs).max() <= 1


def test_it_is_short_and_says_how_it_is_called():
    assert len((ROOT / "scripts" / "minimal.py").read_text().splitlines()) <= 90
    for arguments, told in [([], "usage:"), (["a dog", "nowhere/dog.png"], "in a folder that is there")]:
        command = [sys.executable, ROOT / "scripts" / "minimal.py", *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1) and told in done.stderr
