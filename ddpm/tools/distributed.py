"""Work that is split across torchrun's processes, and gathered again; one process alone does all of it."""

import atexit
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")


def rank() -> int:
    """Which process this is: 0 is the one that writes figures."""
    return int(os.environ.get("RANK", 0))


def num_processes() -> int:
    """How many torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def share(items: Sequence[Item], what: str) -> Sequence[Item]:
    """This process's part of what is the same list in all. Raises ValueError when one of them would have nothing."""
    check_shares(len(items), what)
    return items[rank() :: num_processes()]


def check_shares(count: int, what: str):
    """Refuse more processes than there are things to share. Raises ValueError."""
    if count < num_processes():
        raise ValueError(f"{num_processes()} processes cannot share {count} {what}")


def gathered(own: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """The tensors of all processes in their order, in every process; own: those of its `share`; shapes: of all."""
    if num_processes() == 1:
        return list(own)
    tensors = [torch.zeros(*shape) for shape in shapes]
    for tensor, values in zip(tensors[rank() :: num_processes()], own, strict=True):
        tensor.copy_(values)
    start_group()
    for tensor in tensors:
        dist.all_reduce(tensor)  # a sum with zeros, which is exact
    return tensors


def wait():
    """Until every process is here."""
    if num_processes() > 1:
        start_group()
        dist.barrier()


def start_group(backend: str = "gloo"):
    """Connect the processes, through the CPU unless told otherwise; the first to come waits for the last."""
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=timedelta(days=7))
        # a thread of gloo's that is left when Python ends may take the whole process down with SIGABRT
        atexit.register(dist.destroy_process_group)
