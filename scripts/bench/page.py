"""How long the page of reproduce.py, or a sheet of digits, takes here and in an earlier commit, in turns.

    python scripts/bench/page.py 2374fad
    python scripts/bench/page.py 2374fad --avx2
    python scripts/bench/page.py 2374fad --digits 10 --rounds 3

Each is made from nothing by a process of its own, in a home folder of its own, so that prompts are embedded again.
--avx2 forbids the CPU whatever is newer than AVX2 and computes in float32, as on most laptops. Prints the seconds of
each experiment and of both processes, when the first figure was there, and the ratios. --digits N makes N of each digit
in 100 steps by sample_mnist.py instead of the page, and prints the seconds of the processes, with their start.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))  # where shared/ is
from shared.options import parser, positive, run

ROOT = Path(__file__).parents[2]
PAGE, DIGITS = ["reproduce.py"], ["sample_mnist.py", "--steps", "100", "--per-class"]
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def main():
    options = parser(__doc__)
    options.add_argument("commit", help="of the earlier page")
    options.add_argument("--only", metavar="A7,A10", help="some of the experiments (default: all)")
    options.add_argument("--rounds", type=positive, default=1, help="pages that each side makes (default: 1)")
    options.add_argument("--avx2", action="store_true", help="float32, with AVX2 alone")
    options.add_argument("--digits", type=positive, metavar="N", help="N of each digit instead of the page")
    args = options.parse_args()
    if args.digits and args.only:
        raise ValueError("--only is of the page: leave it or --digits")
    command = [*DIGITS, str(args.digits)] if args.digits else [*PAGE, *(["--only", args.only] if args.only else [])]
    command += ["--dtype", "float32" if args.avx2 else "auto"]
    with tempfile.TemporaryDirectory() as folder:
        earlier = Path(folder) / "earlier"
        check_out(args.commit, earlier)
        rounds = []
        for number in range(args.rounds):
            sides = {"ours": ROOT, "earlier": earlier}
            rounds.append({name: seconds_of(side, command, AVX2 if args.avx2 else {}) for name, side in sides.items()})
            print(f"round {number + 1}:", *(f"{name} {parts['whole']:.0f} s" for name, parts in rounds[-1].items()))
    print(f"{'':16}{'ours':>8}{'earlier':>9}   ours / earlier")
    for part in dict.fromkeys(part for both in rounds for pages in both.values() for part in pages):
        ours, theirs = ([both[side][part] for both in rounds if part in both[side]] for side in ("ours", "earlier"))
        cells = [f"{median(side):.1f}" if side else "" for side in (ours, theirs)]
        ratio = f"{median(a / b for a, b in zip(ours, theirs, strict=True)):.2f}" if ours and theirs else ""
        print(f"{part:16}{cells[0]:>8}{cells[1]:>9}   {ratio}")


def check_out(commit: str, folder: Path):
    """A commit's files. Raises ValueError where git does not know it."""
    for command in (["clone", "--quiet", "--no-checkout", ROOT, folder], ["-C", folder, "checkout", "--quiet", commit]):
        done = subprocess.run(["git", *map(str, command)], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"git has no commit {commit!r} here: {done.stderr.strip().splitlines()[-1]}")


def seconds_of(checkout: Path, command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Seconds of a checkout's script: of each experiment and until the first figure, if it is the page, and in all."""
    with tempfile.TemporaryDirectory() as folder:
        page, home = command[:1] == PAGE, Path(folder) / "home"
        out = Path(folder) / ("out" if page else "out.png")
        home.mkdir()
        command = [sys.executable, f"scripts/{command[0]}", *command[1:], "--out", out]
        environment = {**os.environ, **environment, "HOME": str(home), "PYTHONPATH": str(checkout)}
        started, first = time.monotonic(), None
        with open(Path(folder) / "said", "w") as said:
            process = subprocess.Popen(command, cwd=checkout, env=environment, stdout=said, stderr=said)
            while process.poll() is None:
                time.sleep(0.1)
                if first is None and list(out.glob("*/*.png")):
                    first = time.monotonic() - started
        whole = time.monotonic() - started
        if process.returncode:
            raise ValueError(f"{command[1]} of {checkout} failed: {(Path(folder) / 'said').read_text()[-200:]}")
        if not page:
            return {"whole": whole}
        notes = sorted(out.glob("*/made.json"))
        seconds = {note.parent.name: json.loads(note.read_text())["seconds"] for note in notes}
        drawn = {part: value for part, value in seconds.items() if value > 0.1}  # B2 is copied
        return drawn | {"first figure": first, "whole": whole}


if __name__ == "__main__":
    run(main)
