"""Small DDPMs and flows on MNIST.

    from ddpm.mnist import SHIPPED, load_model, sample_digits

Read in this order: `unet`, `training`, `sampling`, `judge` (how samples are measured). `data` and `checkpoint` read
and write files.
"""

from ddpm.mnist.checkpoint import SHIPPED, load_model
from ddpm.mnist.sampling import sample_digits, sample_flow
from ddpm.mnist.unet import ClassFlow, ClassUNet, TimeFlow, TimeUNet, UNet

__all__ = [
    "SHIPPED",
    "ClassFlow",
    "ClassUNet",
    "TimeFlow",
    "TimeUNet",
    "UNet",
    "load_model",
    "sample_digits",
    "sample_flow",
]
