"""What the scripts that run DeepFloyd IF share: loading a stage, and watching it sample."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm import tqdm

from ifmodel import UNet, UNetConfig, load_unet
from ifmodel.weights import check_memory, load_config


def check_stage(source: str, stage: int, revision: str | None = None) -> UNetConfig:
    """The config of a model. Raises ValueError when it is of the other stage."""
    config = load_config(source, revision)
    found = 2 if config.class_embed_type else 1
    if found != stage:
        option = {1: "--model", 2: "--upscaler"}[found]
        raise ValueError(f"{source} is a stage-{found} model, not a stage-{stage} one: give it as {option}")
    return config


def load_stage(source: str, dtype: torch.dtype, device: torch.device, revision: str | None = None) -> UNet:
    """A stage's UNet: half precision from the fp16 files where there are some, full precision from the others."""
    variants = [None, "fp16"] if dtype == torch.float32 else ["fp16", None]
    try:
        return load_unet(source, dtype, device, variants[0], revision)
    except FileNotFoundError:
        unet = load_unet(source, dtype, device, variants[1], revision)
    if dtype == torch.float32:
        print(f"{source} has its weights in float16 alone: computing with them in float32", file=sys.stderr)
    return unet


def check_size(unet: UNet, size: tuple[int, int], batch_size: int, device: torch.device):
    """Refuse a height or width that the UNet cannot halve often enough, or that the memory cannot hold."""
    if any(side % unet.size_multiple for side in size):
        raise ValueError(f"height and width must be multiples of {unet.size_multiple}, not {size[0]} × {size[1]}")
    needed = unet.activation_bytes(2 * batch_size, *size)  # guidance doubles the batch
    check_memory(needed, f"{batch_size} pictures of {size[0]} × {size[1]} at a time", device)


@contextmanager
def watch(unet: UNet, steps: int, description: str) -> Iterator[Callable[[int, int, Tensor, Tensor], None]]:
    """A progress bar for a sampler, whose callback it gives; stops at the UNet's first output that is not finite."""
    step = [0]

    def check(module, inputs, output: Tensor):
        if not output.isfinite().all():
            where = f"{description}, step {step[0]} (t = {int(torch.as_tensor(inputs[1]).max())})"
            raise ValueError(f"{where}: not finite any more; try --dtype float32, or less --guidance")

    def callback(*_):
        step[0] += 1
        bar.update()

    hook = unet.register_forward_hook(check)
    try:
        with tqdm(total=steps, desc=description, unit="step") as bar:
            yield callback
    finally:
        hook.remove()
