"""What the scripts that run DeepFloyd IF share: loading a stage, and watching it sample."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm import tqdm

from ifmodel import UNet, load_unet


def load_stage(source: str, stage: int, dtype: torch.dtype, device: torch.device) -> UNet:
    """A stage's UNet: half precision from the fp16 files where there are some, full precision from the others.

    Raises ValueError when the model is of the other stage.
    """
    variants = [None, "fp16"] if dtype == torch.float32 else ["fp16", None]
    for variant in variants:
        try:
            unet = load_unet(source, dtype, device, variant)
            break
        except FileNotFoundError:
            if variant == variants[-1]:
                raise
    if dtype == torch.float32 and variant == "fp16":
        print(f"{source} has its weights in float16 alone: computing with them in float32", file=sys.stderr)
    found = 2 if unet.config.class_embed_type else 1
    if found != stage:
        option = {1: "--model", 2: "--upscaler"}[found]
        raise ValueError(f"{source} is a stage-{found} model, not a stage-{stage} one: give it as {option}")
    return unet


@contextmanager
def progress(steps: int, description: str) -> Iterator[Callable[[int, int, Tensor, Tensor], None]]:
    """A progress bar; gives the callback that moves it and refuses the first x̂_0 that is not finite."""
    with tqdm(total=steps, desc=description, unit="step") as bar:

        def callback(step: int, t: int, x_t: Tensor, x_0: Tensor):
            bar.update()
            if not x_0.isfinite().all():
                where = f"{description}, step {step} (t = {t})"
                raise ValueError(f"{where}: the picture is no longer finite; try --dtype float32, or less --guidance")

        yield callback
