"""What the scripts share: options, devices, and errors in one line."""

import argparse
import difflib
import math
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from ddpm.tools.devices import pick_device, pick_dtype

SEED = 20040805
LARGEST = 1_000_000  # of anything that is counted
LONGEST_NAME = 200  # bytes of an output's name, of 255 that a file may have: it is written under a longer one first


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong with an option in one line; the usage is in --help."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        # ~ as the shell does, which leaves it in --out=~/dog.png and would have a folder of that name made
        self.register("type", Path, lambda text: Path(os.path.expanduser(text)))

    def parse_known_args(self, args: Sequence[str] | None = None, namespace=None):
        for argument in sys.argv[1:] if args is None else args:
            if argument.startswith("--") and argument.endswith("=--"):  # of which argparse makes an empty list
                self.error(f"{argument} gives no value")
        return super().parse_known_args(args, namespace)

    def parse_args(self, args: Sequence[str] | None = None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name, known = unknown[0].partition("=")[0], self._option_string_actions
            nearest = [option for option in known if option.strip("-") in name.split("-")]  # --num-inference-steps
            nearest = nearest or difflib.get_close_matches(name, known, n=1, cutoff=0.7)
            meant = f": did you mean {nearest[0]}?" if nearest else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
        return parsed

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


class Size(argparse.Action):
    """Height and width, or one number for both."""

    def __init__(self, *args, **options):
        super().__init__(*args, nargs="+", metavar="PIXELS", **options)

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: list[int], _=None):
        if len(values) > 2:
            raise argparse.ArgumentError(self, "give height and width, or one number for both")
        setattr(namespace, self.dest, (values[0], values[-1]))


def parser(doc: str, needed: str = "") -> argparse.ArgumentParser:
    """A parser whose --help is the script's docstring; needed: what its usage names before "[options]"."""
    formatter = partial(argparse.RawDescriptionHelpFormatter, max_help_position=36)
    return OneLineParser(description=doc, usage=f"%(prog)s {needed}[options]", formatter_class=formatter)


def add_common_options(options: argparse.ArgumentParser, out: str, *, float16: bool = False, dtype: str = "auto"):
    """--seed, --out, and the options of the device."""
    add_output_options(options, out)
    add_device_options(options, float16=float16, dtype=dtype)


def add_output_options(options: argparse.ArgumentParser, out: str):
    """--seed and --out."""
    options.add_argument("--seed", type=seed_number, default=SEED, help=f"default: {SEED}")
    options.add_argument("--out", type=Path, default=Path(out), metavar="PATH", help=f"default: {out}")


def add_device_options(options: argparse.ArgumentParser, *, float16: bool = False, dtype: str = "auto"):
    """--device and --dtype, see `pick`."""
    options.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    dtypes = ["auto", "float32", "bfloat16", *["float16"] * float16]
    otherwise = "else float16 on CUDA, and float32" if float16 else "else float32"
    help = f"auto: bfloat16 where the hardware has it, {otherwise} (default: {dtype})"
    options.add_argument("--dtype", default=dtype, choices=dtypes, help=help)


def add_data_option(options: argparse.ArgumentParser):
    help = "folder holding MNIST/raw; downloaded there when absent (default: data)"
    options.add_argument("--data", type=Path, default=Path("data"), help=help)


def add_low_memory_option(options: argparse.ArgumentParser):
    help = "read what the device's memory cannot hold from its files, layer by layer, at every step; needs accelerate"
    options.add_argument("--low-memory", action="store_true", help=help)


def positive(text: str) -> int:
    """An argparse type: a whole number from 1 to LARGEST."""
    value = int(text) if text.isdecimal() and len(text) < 10 else 0
    if not 1 <= value <= LARGEST:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number from 1 to {LARGEST}")
    return value


def number(text: str) -> float:
    """An argparse type: a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def positive_number(text: str) -> float:
    """An argparse type: a finite number above 0."""
    if (value := number(text)) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return value


def learning_rate(text: str) -> float:
    """An argparse type: above 0 and at most 1, beyond which no weights stay finite."""
    if (value := positive_number(text)) > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is above 1")
    return value


def seed_number(text: str) -> int:
    """An argparse type: a seed, from 0 to 4,000,000,000, so that others below 2³² may be counted on from it."""
    if not text.isdecimal() or len(text) > 10 or int(text) > 4_000_000_000:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number from 0 to 4000000000")
    return int(text)


def pick(args: argparse.Namespace, float16: bool = False) -> tuple[torch.device, torch.dtype]:
    """The device and the dtype of the options, see `pick_device` and `pick_dtype`."""
    device = pick_device(args.device)
    return device, pick_dtype(args.dtype, device, float16)


def run(main: Callable[[], None]):
    """Run a script: what the user can fix is one line on stderr and exit status 2; a warning is one line, too."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as shared/__init__.py leaves it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # γ, for a terminal that has only ASCII
    try:
        main()
        return
    except KeyboardInterrupt:
        sys.exit(130)
    except (torch.OutOfMemoryError, MemoryError):
        message = "out of memory: make fewer or smaller images at a time"
    except OSError as error:
        message = f"{error.strerror}: {error.filename}" if error.filename else str(error)
    except ValueError as error:
        message = str(error)
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def check_not_overwritten(args: argparse.Namespace, out: str = "out", read: Sequence[str] = ("image", "mask", "keep")):
    """Refuse an output that is what another option of the same command reads. Raises ValueError."""
    written = getattr(args, out)
    for option in read:
        given = getattr(args, option, None)
        for path in given if isinstance(given, list) else [given] if given else []:
            if Path(path).is_file() and written.exists() and Path(path).samefile(written):
                raise ValueError(f"--{out} {written} would overwrite --{option}: name another file")


def check_writable(path: Path, suffix: str | None = None):
    """Refuse an output file early: before the work, not after it. Raises ValueError."""
    if suffix is not None and path.suffix != suffix:
        raise ValueError(f"{path} must end in {suffix}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file in it")
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise ValueError(f"the name {path.name[:20]}… is too long: use at most {LONGEST_NAME} bytes")
    try:  # in the folder, or where it would be made: a later refusal leaves no empty folders
        tempfile.TemporaryFile(dir=next(folder for folder in path.absolute().parents if folder.exists())).close()
    except OSError as error:
        raise ValueError(
            f"cannot write in {path.parent} ({error.strerror}): choose another place for {path.name}"
        ) from None
