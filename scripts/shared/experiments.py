"""The assignment's experiments, as experiments.ini describes them: scripts, figures, equations and functions."""

import os
import re
import shlex
from collections.abc import Callable, Mapping
from configparser import ConfigParser, ExtendedInterpolation
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

# Which of reproduce.py's own options each script takes
STAGE_1 = ("model", "revision", "embeds", "device", "dtype")
CASCADE = (*STAGE_1, "upscaler", "upscaler_revision")
TAKES = {
    **dict.fromkeys(("generate", "sample", "sdedit", "inpaint", "visual_anagram", "hybrid_image"), CASCADE),
    **dict.fromkeys(("one_step_denoise", "iterative_denoise", "restore"), STAGE_1),
    **dict.fromkeys(("denoise_mnist", "flow_velocity"), ("device", "data")),
    "sample_mnist": ("device", "dtype"),
}
FILL_A_FOLDER = ("denoise_mnist", "train_denoiser")  # their --out is one; that of the others is a figure


@dataclass(frozen=True)
class Play:
    """Images of a table under a slider, see page.js.

    kind: "turn" or "away", of the first image of each of the rows, which the row below it is seen as at the slider's
        end; or "scrub", through the columns of all these rows at once
    table: the stem of the table's file
    """

    kind: str
    table: str
    rows: tuple[int, ...]
    says: str


@dataclass(frozen=True)
class Experiment:
    """One part of the page.

    key: the assignment's number or numbers; says: a sentence or two; equation: in TeX, as far as matplotlib sets it
    functions: those that do it, whose source is shown
    command: a script and its options, as a shell takes them; fast: more options, with --fast
    figures: files that it makes, and what they show, .gif where there is no JavaScript for `plays`; none for what takes
        too long for a page
    trained: figures of the training of the shipped weights, taken from .github/figures
    plays: what answers to the hand
    """

    key: str
    title: str
    says: str
    equation: str
    functions: tuple[Callable, ...]
    command: str
    figures: dict[str, str]
    fast: str = ""
    trained: dict[str, str] = field(default_factory=dict)
    plays: tuple[Play, ...] = ()

    @property
    def keys(self) -> list[str]:
        return self.key.split(", ")

    @property
    def folder(self) -> str:
        return "-".join(self.keys)

    @property
    def script(self) -> str:
        return self.command.split()[0]

    @property
    def takes(self) -> tuple[str, ...]:
        """Which of reproduce.py's own options the script is given."""
        return TAKES.get(self.script, ())

    def options(self, fast: bool = False) -> list[str]:
        return shlex.split(f"{self.command} {self.fast if fast else ''}")[1:]

    def out(self, root: Path) -> Path:
        """The script's --out: its first figure, or the folder."""
        folder = root / self.folder
        return folder if self.script in FILL_A_FOLDER else folder / next(iter(self.figures))


@dataclass(frozen=True)
class Made:
    """An experiment after its run.

    command: the command line to repeat it; seconds: how long it took
    inputs: a hash of all that decided its figures; failure: what went wrong, if something did
    """

    experiment: Experiment
    command: str
    seconds: float
    inputs: str = ""
    failure: str = ""


def read_experiments(path: Path) -> list[Experiment]:
    """All sections of such a file, in its order."""
    known_images = {name: known(name) for name in ("dog", "rocket", "sunflower", "penguin")}
    file = ConfigParser(known_images, interpolation=ExtendedInterpolation())
    file.read(path, encoding="utf-8")
    return [experiment_of(key, file[key]) for key in file.sections()]


def known(name: str) -> str:
    """--image with a drawing that tiny-if has learned from."""
    path = Path(__file__).parents[2] / "tests" / "data" / "emoji" / f"{name}.png"
    return f"--image {shlex.quote(os.path.relpath(path))}".replace("$", "$$")


def experiment_of(key: str, section: Mapping[str, str]) -> Experiment:
    """An experiment of a section, whose values may go over several lines."""
    texts = {name: " ".join(text.split()) for name, text in section.items()}
    return Experiment(
        key,
        texts["title"],
        texts["says"],
        texts["equation"],
        tuple(function_of(name) for name in texts["functions"].split()),
        texts["command"],
        captions(section.get("figures", "")),
        texts.get("fast", ""),
        captions(section.get("trained", "")),
        tuple(play_of(line) for line in section.get("plays", "").splitlines() if line),
    )


def function_of(name: str) -> Callable:
    """A function or a class by the name of its module and its own."""
    module, _, own = name.rpartition(".")
    return getattr(import_module(module), own)


def captions(text: str) -> dict[str, str]:
    """Files and what they show, from lines "FILE: what it shows", which may go on in the next ones."""
    entries = re.split(r"\n(?=\S+\.(?:png|gif): )", text.strip()) if text else []
    return {name: " ".join(says.split()) for name, says in (entry.split(": ", 1) for entry in entries)}


def play_of(line: str) -> Play:
    """From "scrub table 0 1: what it shows"."""
    images, says = line.split(": ", 1)
    kind, table, *rows = images.split()
    return Play(kind, table, tuple(map(int, rows)), says)


EXPERIMENTS = read_experiments(Path(__file__).with_suffix(".ini"))
