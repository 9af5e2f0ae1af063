"""Every experiment of the assignment, one after another, on one page: out/index.html.

    python scripts/reproduce.py
    python scripts/reproduce.py --only A7,A10
    python scripts/reproduce.py --model DeepFloyd/IF-I-XL-v1.0 --upscaler DeepFloyd/IF-II-L-v1.0 --out out/if-xl

A0 to A11 run on the tiny IF that is shipped, or on --model; B1 to B5 on the shipped digits. Each is one of the other
scripts, with the command line that the page shows. What was made before with the same command, code and weights is
left as it is, so a stopped run goes on where it was. --fast is a tour of a few minutes, with fewer pictures and steps.
"""

import hashlib
import json
import runpy
import shlex
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from common import SEED, check_writable, parser, run
from experiments import EXPERIMENTS, Experiment
from page import write_page

from ddpm.checkpoint import SHIPPED
from ddpm.files import write_atomically
from ifmodel.weights import SHIPPED as SHIPPED_IF

ROOT = Path(__file__).parent.parent
FORWARDED = ("model", "revision", "upscaler", "upscaler_revision", "embeds", "device", "dtype")


@dataclass(frozen=True)
class Made:
    """An experiment after its run: the command line to repeat it, how long it took, and what went wrong, if it did."""

    experiment: Experiment
    command: str
    seconds: float
    failure: str = ""


def main():
    args = arguments()
    check_writable(args.out / "index.html")
    chosen = choose(args.only)
    made: list[Made] = []
    try:
        for number, experiment in enumerate(chosen, start=1):
            print(f"[{number}/{len(chosen)}] {experiment.key}: {experiment.title}", flush=True)
            made.append(make(experiment, args))
            write_page(args.out, made, chosen)  # so that there is something to look at from the first one on
    except KeyboardInterrupt:
        print("stopped: the same command goes on here", file=sys.stderr)
        raise
    finally:
        write_page(args.out, made, chosen)
    print(f"{args.out / 'index.html'}: {sum(not one.failure for one in made)} of {len(chosen)} experiments")
    if any(one.failure for one in made):
        raise ValueError(f"{', '.join(one.experiment.key for one in made if one.failure)} failed, see above")


def arguments() -> Namespace:
    options = parser(__doc__)
    options.add_argument("--only", metavar="A7,A10", help="some of the experiments (default: all)")
    options.add_argument("--fast", action="store_true", help="fewer pictures and steps")
    options.add_argument("--model", metavar="FOLDER_OR_HUB_ID", help="a stage-1 model (default: tiny-if/I, shipped)")
    options.add_argument("--revision", help="branch, tag or commit of a Hub model")
    options.add_argument("--upscaler", metavar="FOLDER_OR_HUB_ID", help="a stage-2 model, or none")
    options.add_argument("--upscaler-revision", help="branch, tag or commit of a Hub model")
    options.add_argument("--embeds", type=Path, metavar="FILE", help="prompts with their embeddings; spares T5")
    options.add_argument("--data", type=Path, help="folder holding MNIST/raw (default: data, or 100 test digits)")
    options.add_argument("--device", help="as in the other scripts")
    options.add_argument("--dtype", help="as in the other scripts")
    options.add_argument("--seed", type=int, default=SEED, help=f"default: {SEED}")
    options.add_argument("--again", action="store_true", help="make anew what is there already")
    options.add_argument("--out", type=Path, default=Path("out"), help="folder of the page (default: out)")
    return options.parse_args()


def choose(only: str | None) -> list[Experiment]:
    """The experiments that --only names, such as "A7,A10". Raises ValueError when there is no such one."""
    if only is None:
        return EXPERIMENTS
    wanted = [key.strip().upper() for key in only.split(",")]
    known = {key: experiment for experiment in EXPERIMENTS for key in experiment.keys}
    unknown = [key for key in wanted if key not in known]
    if unknown:
        raise ValueError(f"there is no experiment {', '.join(unknown)}: choose from {', '.join(known)}")
    return [experiment for experiment in EXPERIMENTS if set(experiment.keys) & set(wanted)]


def make(experiment: Experiment, args: Namespace) -> Made:
    """Run an experiment, or leave what was made before with the same inputs."""
    folder = args.out / experiment.folder
    options = command_options(experiment, args, folder)
    command = shlex.join(["python", f"scripts/{experiment.script}.py", *options])
    note, inputs = folder / "made.json", fingerprint(experiment, command, args)
    figures = [folder / figure for figure, _ in experiment.figures]
    if not args.again and all(figure.is_file() for figure in figures) and note.is_file():
        before = json.loads(note.read_text())
        if before.get("inputs") == inputs:
            print(f"    made before with the same inputs: {folder}")
            return Made(experiment, command, before["seconds"])
    note.unlink(missing_ok=True)
    start = time.monotonic()
    status = run_script(experiment.script, options) if experiment.runs else 0
    seconds = time.monotonic() - start
    missing = [figure.name for figure in figures if not figure.is_file() and not copy_trained(figure)]
    if status or missing:
        return Made(experiment, command, seconds, f"exit status {status}" if status else f"no {', '.join(missing)}")
    write_atomically(note, json.dumps({"inputs": inputs, "seconds": seconds, "command": command}).encode())
    return Made(experiment, command, seconds)


def command_options(experiment: Experiment, args: Namespace, folder: Path) -> list[str]:
    """The options with which an experiment's script is called."""
    options = [*experiment.options, *(experiment.fast if args.fast else ())]
    for name in FORWARDED:
        value = getattr(args, name)
        if value is not None and name in experiment.takes:
            options += [f"--{name.replace('_', '-')}", str(value)]
    if "data" in experiment.takes:
        options += ["--data", str(args.data or default_data())]
    return [*options, "--seed", str(args.seed), "--out", str(folder / experiment.out)]


def default_data() -> Path:
    """All of MNIST where it was downloaded before, else the 100 test digits that lie beside the tests."""
    everything = Path("data")
    return everything if (everything / "MNIST" / "raw").is_dir() else ROOT / "tests" / "data"


def run_script(name: str, options: Sequence[str]) -> int:
    """Run a script as its command line would, in this process, so that torch is imported once; its exit status."""
    path, before = ROOT / "scripts" / f"{name}.py", sys.argv
    sys.argv = [f"scripts/{name}.py", *options]
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as exit:
        if exit.code == 130:  # Ctrl-C: the others are not begun
            raise KeyboardInterrupt from None
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    finally:
        sys.argv = before
    return 0


def copy_trained(figure: Path) -> bool:
    """Take a figure of the training from the repository, where there is one of that name."""
    source = ROOT / ".github" / "figures" / figure.name
    if source.is_file():
        figure.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, figure)
    return source.is_file()


def fingerprint(experiment: Experiment, command: str, args: Namespace) -> str:
    """What decides the figures: the command, the code, torch's version and the weights."""
    digest = hashlib.sha256(f"{command} {torch.__version__}".encode())
    apart = {"reproduce.py", "page.py", "experiments.py"}
    for path in sorted(path for part in ("ddpm", "ifmodel", "scripts") for path in (ROOT / part).glob("*.py")):
        digest.update(b"" if path.name in apart else path.read_bytes())
    for folder in weight_folders(experiment, args):
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return digest.hexdigest()


def weight_folders(experiment: Experiment, args: Namespace) -> list[Path]:
    """Where an experiment's weights lie; a Hub model has none here, its name and revision are in the command."""
    if "model" not in experiment.takes:
        return [next(iter(SHIPPED.values())).parent]
    sources = [args.model or "tiny-if/I", args.upscaler or "tiny-if/II"]
    return [folder for folder in (SHIPPED_IF.get(source, Path(source)) for source in sources) if folder.is_dir()]


if __name__ == "__main__":
    run(main)
