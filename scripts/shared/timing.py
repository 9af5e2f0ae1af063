"""What the benchmarks share: tables of sides that take turns, and processes."""

import gc
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch

from ddpm.tools.timing import in_turns

SCRIPTS = Path(__file__).parents[1]
# Runs a script and then says how long its process computed and how much memory it had at most, of a GPU where it used
# one; rusage would count its parent's memory too.
MEASURED = """
import resource, runpy, sys, time
from pathlib import Path
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name=__name__)
status = Path("/proc/self/status")
lines = status.read_text().splitlines() if status.exists() else []
peak = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)
peak = 1024 * (peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
cuda = sys.modules["torch"].cuda
peak = cuda.max_memory_allocated() if cuda.is_initialized() else peak
print(f"measured: {time.process_time()} {peak}\\n", end="", flush=True)
"""


def where(device: torch.device) -> str:
    """The GPU's name, or how many threads the CPU has."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@torch.no_grad()
def compare(what: str, sides: dict[str, Callable], rounds: int, device: torch.device, floor: float | None = None):
    """Print and return each side's median time and spread, how often it is ours, and how often the floor."""
    times = in_turns(sides, rounds, device)
    print(f"{what}, {rounds} rounds")
    rows = {}
    for name, values in times.items():
        pairs = [other / own for other, own in zip(values, times["ours"], strict=True)]
        row = {"median": median(values), "min": min(values), "max": max(values), "times_ours": median(pairs)}
        line = f"  {name:22} {1000 * row['median']:9.1f} ms ({1000 * row['min']:.1f} to {1000 * row['max']:.1f})"
        if floor is not None:
            row["times_floor"] = row["median"] / floor
            line += f", {row['times_floor']:.2f} × the floor"
        print(line + ("" if name == "ours" else f", {row['times_ours']:.2f} × ours"))
        rows[name] = row
    gc.collect()  # before another side has its turn
    return rows


def race(trainings: dict[str, Iterator[float]], rounds: int, steps: int, batch_size: int, device: torch.device):
    """Let trainings, "ours" among them, take turns of some steps; each yields its loss after a step. Prints a table."""
    losses = {name: [] for name in trainings}

    def turn(name: str) -> Callable:
        return lambda: losses[name].extend(next(trainings[name]) for _ in range(steps))

    times = in_turns({name: turn(name) for name in trainings}, rounds, device)
    for name, seconds in times.items():
        rates = [steps * batch_size / value for value in seconds]
        pairs = [other / ours for ours, other in zip(times["ours"], seconds, strict=True)]
        ratio = "" if name == "ours" else f", ours is {median(pairs):.2f} × ({min(pairs):.2f} to {max(pairs):.2f})"
        loss = f"loss {sum(losses[name][-steps:]) / steps:.5f} at step {len(losses[name])}"
        print(f"  {name:5} {median(rates):8.1f} images/s ({min(rates):.1f} to {max(rates):.1f}), {loss}{ratio}")


def run_measured(script: Path, *options, processes: int | None = None, home: Path | None = None) -> tuple[float, int]:
    """Run a script by itself: its seconds of computing, and bytes at most. Raises ValueError when it fails.

    processes: start so many with torchrun; seconds and bytes are those of the one that has more
    home: the home folder that it sees
    """
    environment = {**os.environ, "PYTHONPATH": f"{SCRIPTS.parent}{os.pathsep}{SCRIPTS}"}
    environment |= {"HOME": str(home)} if home else {}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes] if processes else []
    with tempfile.TemporaryDirectory() as folder:
        measured = Path(folder) / "measured.py"
        measured.write_text(MEASURED)
        command = [sys.executable, *torchrun, measured, script, *options]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise ValueError(f"a process of {script.name} failed: {done.stderr[-200:]}")
    found = re.findall(r"measured: ([\d.]+) (\d+)", done.stdout)
    return max(float(seconds) for seconds, _ in found), max(int(peak) for _, peak in found)
