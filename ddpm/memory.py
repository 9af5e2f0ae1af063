"""How much memory a device has free, so that what needs more is refused before it begins."""

import gc
import os
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")  # where Linux says how much memory is free


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
        lines = MEMINFO.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    for pages in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):
        if pages in getattr(os, "sysconf_names", ()):
            return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    return None
