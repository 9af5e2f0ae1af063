"""Every experiment of the assignment, and a few more, one after another, on one page: out/index.html.

    python scripts/reproduce.py
    python scripts/reproduce.py --only A7,A10
    python scripts/reproduce.py --model DeepFloyd/IF-I-XL-v1.0 --upscaler DeepFloyd/IF-II-L-v1.0 --out out/if-xl

A0 to A11, C1 and C2 run on the tiny IF that is shipped, or on --model; B1 to B8 run on the shipped digits. A0, B8, C1
and C2 are ours. Each is one of the other scripts, with the command line that the page shows. Finished
experiments are skipped unless command, code or weights changed, so a stopped run goes on where it was; those that
--only leaves out stay on the page. --fast is a tour of a minute or two, with fewer images and steps.
"""

import hashlib
import os
import runpy
import shlex
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from shared.experiments import EXPERIMENTS, Experiment, Made
from shared.options import check_writable, parser, run, seed_number
from shared.page import LivePage
from shared.stages import add_model_options

import torch

from ddpm.mnist.checkpoint import SHIPPED
from ddpm.tools.files import fingerprint, parse_json, read_small, write_atomically, write_json
from ifmodel.weights import SHIPPED as SHIPPED_IF

ROOT = Path(__file__).parent.parent


def main():
    args = arguments()
    check_writable(args.out / "index.html")
    chosen = sorted(choose(args.only), key=lambda one: len(one.takes))  # first those without a model: seconds each
    made = {experiment.key: before for experiment in EXPERIMENTS if (before := made_before(experiment, args.out))}
    with LivePage(args.out) as page:
        try:
            for number, experiment in enumerate(chosen):
                made.pop(experiment.key, None)
                page.show(made, chosen[number:])
                hint = "" if number else f"\nopen {args.out / 'index.html'}: it fills as they are made"
                print(f"[{number + 1}/{len(chosen)}] {experiment.key}: {experiment.title}{hint}", flush=True)
                made[experiment.key] = make(experiment, args)
        except KeyboardInterrupt:
            print("stopped: the same command goes on here", file=sys.stderr)
            raise
        finally:
            page.show(made)
    failed = [experiment.key for experiment in chosen if made[experiment.key].failure]
    seconds = sum(made[experiment.key].seconds for experiment in chosen)
    print(
        f"{args.out / 'index.html'}: {len(chosen) - len(failed)} of {len(chosen)} experiments, made in {seconds:.0f} s"
    )
    if failed:
        raise ValueError(f"{', '.join(failed)} failed, see above")


def arguments() -> Namespace:
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", metavar="A7,A10", help="some of the experiments (default: all)")
    options.add_argument("--fast", action="store_true", help="fewer images and steps")
    add_model_options(options)
    options.set_defaults(model=None)  # and not forwarded: the scripts have their own
    options.add_argument("--data", type=Path, help="folder holding MNIST/raw (default: data, or 100 test digits)")
    options.add_argument("--device", help="as in the other scripts")
    options.add_argument("--dtype", help="as in the other scripts")
    options.add_argument("--seed", type=seed_number, help="of all experiments (default: each has its own)")
    options.add_argument("--again", action="store_true", help="make again what is there already")
    options.add_argument("--out", type=Path, default=Path("out"), help="folder of the page (default: out)")
    args = options.parse_args()
    args.data = args.data or default_data()
    return args


def choose(only: Sequence[str] | None) -> list[Experiment]:
    """The experiments that --only names, as A7,A10 or A7 A10. Raises ValueError when there is no such one."""
    if only is None:
        return EXPERIMENTS
    wanted = " ".join(only).upper().replace(",", " ").split() or only  # "," names none, and is refused
    known = {key: experiment for experiment in EXPERIMENTS for key in experiment.keys}
    unknown = [key for key in wanted if key not in known]
    if unknown:
        raise ValueError(f"there is no experiment {', '.join(map(repr, unknown))}: choose from {', '.join(known)}")
    return [experiment for experiment in EXPERIMENTS if set(experiment.keys) & set(wanted)]


def make(experiment: Experiment, args: Namespace) -> Made:
    """Run an experiment, or leave what was made before with the same inputs."""
    folder = args.out / experiment.folder
    options = command_options(experiment, args)
    command = shlex.join(["python", f"scripts/{experiment.script}.py", *options])
    for figure in experiment.trained:
        write_atomically(folder / figure, (ROOT / ".github" / "figures" / figure).read_bytes())
    note, inputs = folder / "made.json", inputs_of(experiment, command, args)
    before = None if args.again else made_before(experiment, args.out)
    if before and before.inputs == inputs:
        if experiment.figures:
            print(f"    made before with the same inputs: {folder}")
        return before
    figures = [folder / figure for figure in experiment.figures]
    for path in (note, *figures):  # so that no older figure passes for one of this run
        path.unlink(missing_ok=True)
    start = time.monotonic()
    status = run_script(experiment.script, options) if figures else 0
    seconds = time.monotonic() - start
    missing = [figure.name for figure in figures if not figure.is_file()]
    if status or missing:
        failure = f"exit status {status}" if status else f"no {', '.join(missing)}"
        return Made(experiment, command, seconds, failure=failure)
    described = {"inputs": inputs, "seconds": seconds, "command": command, "figures": fingerprint(*figures)}
    write_json(note, described)
    return Made(experiment, command, seconds, inputs)


def made_before(experiment: Experiment, out: Path) -> Made | None:
    """What an earlier run made of an experiment, if all its figures are there as it left them."""
    folder = out / experiment.folder
    figures = [folder / figure for figure in experiment.figures]
    try:
        note = parse_json(read_small(folder / "made.json"), "made.json")
        before = Made(experiment, note["command"], note["seconds"], note["inputs"])
        if note["figures"] != fingerprint(*figures) or (type(before.command), type(before.seconds)) != (str, float):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return before if all((folder / figure).is_file() for figure in experiment.trained) else None


def command_options(experiment: Experiment, args: Namespace) -> list[str]:
    """The options with which an experiment's script is called."""
    options = experiment.options(args.fast)
    for name in experiment.takes:
        value = getattr(args, name)
        if value is not None and not (value == "float16" and "model" not in experiment.takes):  # digits have none
            options += [f"--{name.replace('_', '-')}", str(value)]
    seed = [] if args.seed is None else ["--seed", str(args.seed)]
    return [*options, *seed, "--out", str(experiment.out(args.out))]


def default_data() -> Path:
    """All of MNIST where it was downloaded before, else the 100 test digits of the tests."""
    everything, few = Path("data"), ROOT / "tests" / "data"
    return everything if (everything / "MNIST" / "raw").is_dir() else Path(os.path.relpath(few))


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
    except Exception:  # a defect in one of them: the others are still made
        traceback.print_exc()
        return 1
    finally:
        sys.argv = before
    return 0


def inputs_of(experiment: Experiment, command: str, args: Namespace) -> str:
    """What decides the figures: the command, the code, torch's version, the weights, and files that it reads."""
    digest = hashlib.sha256(f"{command} {torch.__version__}".encode())
    apart = {"reproduce.py", "page.py", "experiments.py"}
    for path in sorted(path for part in ("ddpm", "ifmodel", "scripts") for path in (ROOT / part).rglob("*.py")):
        digest.update(b"" if path.name in apart else path.read_bytes())
    read = [ROOT / "scripts" / "shared" / "drawings", ROOT / "tests" / "data" / "emoji"]
    read += [args.embeds] if args.embeds and "embeds" in experiment.takes else []
    read += [args.data] if "data" in experiment.takes else []
    for source in [*weight_folders(experiment, args), *read]:
        for path in sorted(path for path in [source, *source.rglob("*")] if path.is_file()):
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
