"""Ctrl-C while torch is imported; and trainings that are stopped at random moments, and go on to the same end."""

import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from ddpm.tools.files import load_tensors
from tests.conftest import ROOT
from tests.forked import run_all, stopped_at
from tests.ifmodel.test_t5 import model_folder  # noqa: F401
from tests.scripts.test_campaign import bases, models  # noqa: F401
from tests.scripts.test_generate import cascade  # noqa: F401

DIGITS = ["--limit", 60, "--batch-size", 20, "--epochs", 8, "--sample-epochs", 1, 5]
LONGER = {  # than the campaign's
    "train_ddpm": [*DIGITS, "--average", 0.9],
    "train_denoiser": DIGITS,
    "train_flow": DIGITS,
    "train_if": ["--steps", 20, "--every", 100, "--batch-size", 4],
    "train_lora": ["--steps", 20],
}

SCRIPTS = [path for path in (ROOT / "scripts").rglob("*.py") if "\n    run(main" in path.read_text()]
# Runs a script that is sent SIGINT when it imports a module.
INTERRUPTED = """
import runpy, signal, sys
_, moment, script, *_ = sys.argv
signal.signal(signal.SIGINT, signal.default_int_handler)  # which tests in the background inherit as ignored
sys.argv, sys.path[0] = sys.argv[2:], script.rpartition("/")[0]
sys.addaudithook(lambda event, args: event == "import" and args[0] == moment and signal.raise_signal(signal.SIGINT))
runpy.run_path(script, run_name="__main__")
"""


def interrupted_at(moment: str, script, *options) -> tuple[int, str, str]:
    command = [sys.executable, "-c", INTERRUPTED, moment, script, *map(str, options)]
    stopped = subprocess.run(command, capture_output=True, text=True)
    return stopped.returncode, stopped.stdout, stopped.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_ctrl_c_before_torch_is_imported_ends_a_script_at_once(script):
    """Without a word, killed by the signal, which shells call status 130; whatever the script imports first."""
    assert interrupted_at("torch", script) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize("moment", ["torch._C", "numpy", "torch.nn", "torch._meta_registrations", "PIL", "ifmodel"])
def test_ctrl_c_while_torch_is_imported_does_so_too(moment):
    assert interrupted_at(moment, ROOT / "scripts" / "generate.py", "--help") == (-signal.SIGINT, "", "")


def test_ctrl_c_after_that_is_the_scripts_own(tmp_path):
    """Which may end in order, here with status 130 while matplotlib is imported to write the figure."""
    options = ["--size", 16, "--timesteps", 500, "--out", tmp_path / "noisy.png"]
    assert interrupted_at("matplotlib", ROOT / "scripts" / "forward_process.py", *options) == (130, "", "")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("script", LONGER)
def test_a_training_that_is_stopped_ends_as_one_that_is_not(models, tmp_path, script, number):  # noqa: F811
    """Bit for bit, however often, since what a SIGKILL takes away is done again."""
    command, draw = [script, *bases(models)[script], *LONGER[script], "--out", "out"], random.Random(number)
    begun = time.monotonic()
    whole = run_all([command], tmp_path / "whole")[0]
    assert whole.complaint("") is None
    seconds, folder = time.monotonic() - begun, tmp_path / "parts" / "run"
    expected, state = load_tensors(whole.folder / "out" / "state.safetensors")[0], folder / "out" / "state.safetensors"
    for _ in range(6):
        before = state.stat().st_mtime_ns if state.exists() else None
        run = stopped_at([*command, *["--resume"] * state.exists()], folder, number, draw.uniform(0, seconds / 2))
        assert run.status in (0, 130, -number) and "Traceback" not in run.err, (run.status, run.err[-1500:])
        if not state.exists():
            shutil.rmtree(state.parent, ignore_errors=True)
            continue
        left = len(expected["losses"]) - len(load_tensors(state)[0]["losses"])
        if run.status == 130 and left and state.stat().st_mtime_ns != before:  # not while it was read or drawn from
            assert "go on with the same command and --resume" in run.err
    run = stopped_at([*command, *["--resume"] * state.exists()], folder, 0, 60)
    assert run.status == 0, run.err[-1500:]
    found = load_tensors(state)[0]
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert {path.name for path in (whole.folder / "out").iterdir()} <= {path.name for path in state.parent.iterdir()}
