"""How much memory is free, so that what needs more is refused first; and freed memory that the process keeps."""

import ctypes
import gc
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")  # where Linux says how much memory is free
CGROUP = Path("/sys/fs/cgroup")  # … and how much of it a container may take: limit, use, and what of this can go
CGROUP_FILES = {
    "v2": ("memory.max", "memory.current", "memory.stat", ""),
    "v1": ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_"),
}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h


def check_memory(needed: int, what: str, device: str | torch.device = "cpu"):
    """Refuse what does not fit into a device's memory, saying what is needed and what there is. Raises ValueError."""
    free = free_memory(torch.device(device))
    if free is not None and needed > free:
        raise ValueError(f"{what} needs about {needed / 1e9:,.1f} GB of memory, and {free / 1e9:.1f} GB are free")


def free_memory(device: torch.device) -> int | None:
    """Bytes that a device can still give; on macOS all that it has; None if unknown."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()  # left behind by the previous model
        return torch.cuda.mem_get_info(device)[0]
    if MEMINFO.exists():
        return_freed()
        lines = MEMINFO.read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        return min(available, free_in_container())
    for pages in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):
        if pages in getattr(os, "sysconf_names", ()):
            return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    return None


def free_in_container() -> float:
    """Bytes that are left of a container's limit, the pages of files counted as free; infinity without a limit."""
    for limit, used, stat, prefix in CGROUP_FILES.values():
        try:
            left = int((CGROUP / limit).read_text()) - int((CGROUP / used).read_text())  # a limit of "max" is none
            kinds = dict(line.split() for line in (CGROUP / stat).read_text().splitlines())
            return max(0, left + sum(int(kinds[f"{prefix}{kind}_file"]) for kind in ("inactive", "active")))
        except (OSError, ValueError, KeyError):
            continue
    return math.inf


@contextmanager
def keep_freed() -> Iterator[None]:
    """Within it, or in a function that has it as decorator, memory that is freed on the CPU stays with the process.

    glibc would give large pieces back at once, and Linux hand them out again for the next layer, page by page and
    zeroed: a fifth of the time of large batches of digits, and of tiny-if's stage 2, in float32. At the end they are
    given back. Nothing changes elsewhere than on Linux with glibc. Source: mallopt(3).
    """
    malloc = glibc()
    if malloc:
        malloc.mallopt(M_MMAP_MAX, 0)
        malloc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        if malloc:
            malloc.mallopt(M_MMAP_MAX, 2**16)  # glibc's own
            malloc.mallopt(M_TRIM_THRESHOLD, 2**26)
            malloc.mallopt(M_MMAP_THRESHOLD, 2**25)  # what glibc goes up to itself, until one of these is set
        return_freed()


def return_freed():
    """Give back what was freed on the CPU and kept."""
    if malloc := glibc():
        malloc.malloc_trim(0)


def glibc() -> ctypes.CDLL | None:
    """The C library of this process, if it can be told so."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
