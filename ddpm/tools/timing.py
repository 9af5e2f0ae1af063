"""How long something takes beside something else, on a machine that others use too, and on what it spends its time.

seconds = in_turns({"packed": lambda: packed(x_t, 500, text), "plain": lambda: plain(x_t, 500, text)}, rounds=10)
ratio = median(plain / packed for plain, packed in zip(seconds["plain"], seconds["packed"]))
"""

import os
import time
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

Side = TypeVar("Side", bound=Hashable)


def in_turns(
    sides: dict[Side, Callable],
    rounds: int,
    device: str | torch.device = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Side, list[float]]:
    """Seconds of each side in each of the rounds, in which all take their turn; a round before them warms up.

    device: on which the sides compute, which is waited for; clock: `time.process_time` counts this process's work alone
    """
    device = torch.device(device)

    def synchronize():
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    times = {name: [] for name in sides}
    for turn in tqdm(range(rounds + 1), desc="rounds, the first to warm up", leave=False):
        for name, side in sides.items():
            synchronize()
            started = clock()
            side()
            synchronize()
            if turn > 0:
                times[name].append(clock() - started)
    return times


def operators(step: Callable, device: str | torch.device = "cpu") -> dict[str, float]:
    """The share of a step's time that each operator takes, largest first; none on MPS, which the profiler lacks."""
    device = torch.device(device)
    if device.type == "mps":
        return {}
    cuda = device.type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it tells, on stderr, of a GPU that there is not
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as profiled:
        step()
    times = {
        event.key: event.self_device_time_total if cuda else event.self_cpu_time_total
        for event in profiled.key_averages()
        if event.device_type == DeviceType.CPU  # operators; kernels are listed a second time
    }
    total = sum(times.values())
    return {name: times[name] / total for name in sorted(times, key=times.get, reverse=True)}
