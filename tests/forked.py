"""Scripts run in processes forked from one that has torch already: hundreds in a minute, each on its own."""

import json
import os
import re
import resource
import runpy
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path

from PIL import Image

from tests.conftest import ROOT

SECONDS, MEMORY = 180, 2e9  # that a run may take, on a busy core too
PRELOADED = ["torch", "torchvision", "transformers.models.t5.modeling_t5", "sentencepiece", "tests.forked"]
PRELOADED += ["ddpm.tools.figures", "ddpm.tools.animation", "shared.images", "shared.stages", "matplotlib.figure"]
PRELOADED += ["ifmodel.dreambooth", "ifmodel.tiny.training", "ddpm.mnist", "torchvision.datasets", "diffusers"]
SERVER = get_context("forkserver")


@dataclass
class Run:
    """A script's command line, and what became of it in a folder of its own."""

    command: list[str]
    folder: Path
    status: int | None = None
    err: str = ""
    peak: float = 0

    def complaint(self, expected: str | None = None) -> str | None:
        """What is wrong with it: it must end with status 0 and whole files, or status 2, one line and no file.

        expected: "" for status 0, or a part of the line
        """
        if self.status not in (0, 2) or "Traceback" in self.err:
            return f"status {self.status}: {self.err[-1500:]}"
        if self.peak > MEMORY:
            return f"{self.peak / 1e9:.1f} GB of memory"
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        lines = [line for line in re.split(r"[\r\n]", self.err) if re.match(r"\S+\.py: error: ", line)]
        left = [] if self.command[0].startswith("evaluate/") else files  # which keep what they made, to go on with
        if self.status == 2 and (len(lines) != 1 or left or not self.err.endswith(f"{lines[0]}\n")):
            return f"refused with {[path.name for path in files]} and {self.err[-1500:]!r}"
        silent = self.command[0] in ("bench/mnist", "bench/page", "bench/training")  # which only print
        silent = silent or self.command[-1].startswith(("--out=..", "--out=~"))
        if self.status == 0 and not ((files or silent) and all(map(is_whole, files))):
            return f"wrote {[path.name for path in files]}"
        if expected is not None and expected not in (lines[0] if self.status else ""):
            return f"expected {expected!r}: {lines or 'it ran'}"
        return None


def is_whole(path: Path) -> bool:
    """Whether a file can be read to its end; no temporary file is."""
    if path.suffix in (".png", ".gif"):
        with Image.open(path) as image:
            image.load()
    elif path.suffix == ".json":
        json.loads(path.read_text())
    return not path.name.startswith(".")


def run_all(commands: list[list[str]], folder: Path) -> list[Run]:
    """Run commands, [script, option, …] each, two at a time, each in a new folder below this one."""
    runs = [Run([str(part) for part in command], folder / f"{k}" / "run") for k, command in enumerate(commands)]
    SERVER.set_forkserver_preload(PRELOADED)
    waiting, begun = runs[::-1], []  # in one thread: two that ask for a process's status may take it from each other
    while waiting or begun:
        while waiting and len(begun) < 2:
            run = waiting.pop()
            begun.append((run, _start(run), time.monotonic()))
        wait([process.sentinel for _, process, _ in begun], 1)
        for run, process, since in [*begun]:
            if not process.is_alive() or time.monotonic() - since > SECONDS:
                _end(run, process)
                begun.remove((run, process, since))
    return runs


def stopped_at(command: list, folder: Path, number: int, seconds: float) -> Run:
    """A run in a folder, which is sent a signal so long after its script began."""
    run = Run([str(part) for part in command], folder)
    process = _start(run)
    while process.is_alive() and not (folder.parent / "begun").exists():
        time.sleep(0.01)
    process.join(seconds)
    if process.is_alive():
        os.kill(process.pid, number)
    process.join(SECONDS)
    _end(run, process)
    return run


def _start(run: Run):
    """The process of a run."""
    run.folder.mkdir(parents=True, exist_ok=True)
    process = SERVER.Process(target=_invoke, args=(run.command, run.folder))
    process.start()
    return process


def _end(run: Run, process):
    """Note what became of a run, and kill what still goes on."""
    if process.is_alive():
        process.kill()
    process.join()
    beside = run.folder.parent
    run.status, run.err = process.exitcode, (beside / "stderr").read_text(errors="replace")
    run.peak = float((beside / "peak").read_text()) if (beside / "peak").exists() else 0


def _invoke(command: list[str], folder: Path):
    """In the forked process: a script as its user runs it, with nobody to download from and 2 GB of memory to plan.

    IF draws with two steps where a script leaves it its own number: more would find no other faults.
    """
    from torchvision.datasets import MNIST

    from ddpm.tools import memory
    from ifmodel import cascade

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as shared/__init__.py does in a process of its own
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder.parent / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    resource.setrlimit(resource.RLIMIT_DATA, (2 * int(MEMORY), 2 * int(MEMORY)))
    memory.free_memory = lambda device: int(MEMORY)
    spaced = cascade.spaced_timesteps
    cascade.spaced_timesteps = lambda *args: spaced(*args)[:2]
    MNIST.mirrors = ["http://127.0.0.1:9/"]
    os.environ.update(HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1", HOME=str(folder.parent))
    os.chdir(folder)
    script, *arguments = command
    path = ROOT / "scripts" / f"{script}.py"
    sys.argv = [str(path), *arguments]
    (folder.parent / "begun").touch()
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        (folder.parent / "peak").write_text(str(peak))
