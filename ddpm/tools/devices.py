"""Which device this machine has, and which dtype is fastest on it.

    device = pick_device()
    cascade = Cascade("tiny-if", device=device, dtype=pick_dtype("auto", device, float16=True))

What the scripts' --device and --dtype mean.
"""

import os

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str = "auto") -> torch.device:
    """A device of this machine by its name; "auto" is a GPU if there is one, for each process of torchrun its own.

    Raises ValueError for a device that is not there.
    """
    there = ["cpu"]
    if torch.cuda.is_available():
        there = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count())), "cpu"]
    elif torch.backends.mps.is_available():
        there = ["mps", "cpu"]
    if name != "auto" and name not in there:
        raise ValueError(f"device {name!r} is not on this machine: choose from auto, {', '.join(there)}")
    device = torch.device(there[0] if name == "auto" else name)
    if device == torch.device("cuda") and "LOCAL_RANK" in os.environ:
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise ValueError(f"torchrun has more processes than GPUs here: give it --nproc-per-node {gpus}")
        device = torch.device("cuda", local)
    return device


def pick_dtype(name: str, device: torch.device, float16: bool = False) -> torch.dtype:
    """A dtype by its name; "auto" is bfloat16 where it is native, since emulated bfloat16 is many times slower.

    float16: what auto is on a GPU without bfloat16, such as a T4; training, which has no loss scaling, takes float32
    Raises ValueError for a name that there is not, and for float16 on the CPU.
    """
    if name not in ("auto", *DTYPES):
        raise ValueError(f"the dtype must be one of auto, {', '.join(DTYPES)}, not {name!r}")
    if name == "float16" and device.type == "cpu":
        raise ValueError("float16 is for GPUs: on the CPU, use float32, or bfloat16 where it is native")
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere; all that AMD's report is above it
        return torch.bfloat16 if native else torch.float16 if float16 else torch.float32
    native = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if native else torch.float32
