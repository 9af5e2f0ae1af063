"""What a step of a UNet costs: operations, bytes, the least time that they take on a machine, and memory.

unet = load_unet("tiny-if/I")
x_t, text = torch.randn(2, 3, 32, 32), unet.encode_text(torch.randn(2, 77, 128))
least_time(unet, lambda: unet(x_t, 500, text))  # {"gflop": …, "gigabytes": …, "seconds": …, …}
"""

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ddpm.tools.cpu import PackedConv2d
from ddpm.tools.files import write_json
from ddpm.tools.timing import in_turns
from ifmodel.config import UNetConfig
from ifmodel.unet import UNet


def save_random(folder: Path, config: dict, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"):
    """A folder in the Hub's layout with random weights, to learn what a model costs that one does not have.

    config: its config.json, see `published_config`; device: draws the numbers, of which a GPU makes billions in no time
    """
    with torch.device(device):
        unet = UNet(UNetConfig.from_dict(config))
    write_json(folder / "unet" / "config.json", config)
    weights = {name: tensor.to(dtype) for name, tensor in unet.state_dict().items()}
    save_file(weights, folder / "unet" / "diffusion_pytorch_model.safetensors")


def weight_bytes(unet: nn.Module) -> int:
    """Bytes of its weights, as they are in memory."""
    return sum(parameter.nbytes for parameter in unet.parameters())


def least_time(unet: UNet, step: Callable, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """The least "seconds" that a step could take on this machine, from what it reaches in the two simplest tasks.

    unet: not packed, since the counter knows no packed layers; step(): calls it
    That is the longer of "gflop" at "gflops" per second, the rate of a matrix product of 2048 × 2048 in dtype, and of
    "gigabytes" of weights at "gigabytes_per_s", at which a copy reads and writes.
    """
    device = next(unet.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        step()
    a, b = (torch.randn(2048, 2048, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(2**26, device=device)
    target = torch.empty_like(source)
    sides = {"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}
    matmul, copy = (min(times) for times in in_turns(sides, 20, device).values())
    flops, rate, bandwidth = counter.get_total_flops(), 2 * 2048**3 / matmul, 2 * source.nbytes / copy  # read, written
    size = weight_bytes(unet)
    least = {"gflop": flops / 1e9, "gflops": rate / 1e9, "gigabytes": size / 1e9, "gigabytes_per_s": bandwidth / 1e9}
    return {**least, "seconds": max(flops / rate, size / bandwidth)}


@torch.no_grad()
def layers_alone(unet: UNet, step: Callable, rounds: int) -> dict[str, float]:
    """Seconds of a step's "convolutions" and "linear layers", one after another with nothing between them, medians."""
    kinds = {"convolutions": (PackedConv2d, nn.Conv2d), "linear layers": (nn.Linear,)}
    calls = {name: [] for name in kinds}
    hooks = [
        module.register_forward_pre_hook(lambda layer, inputs, name=name: calls[name].append((layer, inputs[0])))
        for name, kind in kinds.items()
        for module in unet.modules()
        if isinstance(module, kind)
    ]
    step()
    for hook in hooks:
        hook.remove()
    sides = {name: lambda name=name: [layer(x) for layer, x in calls[name]] for name in kinds}
    return {name: median(times) for name, times in in_turns(sides, rounds, next(unet.parameters()).device).items()}


@torch.no_grad()
def peak_memory(
    step_of: Callable[[int], Callable], batches: Sequence[int], device: str | torch.device = "cuda"
) -> dict[str, int]:
    """Bytes that a step takes at most on a GPU beside what is there before it, for so many images at a time.

    step_of(batch): makes the inputs of a step, and gives the step
    """
    found = {}
    for batch in batches:
        step = step_of(batch)
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        found[str(batch)] = torch.cuda.max_memory_allocated(device) - before
    return found
