"""Part B: small DDPMs on MNIST.

    from ddpm.mnist import SHIPPED, load_model, sample_digits

Read in this order: `unet`, `training`, `sampling`, `judge` (how samples are measured). `data` and `checkpoint` read
and write files.
"""

from ddpm.mnist.checkpoint import SHIPPED, load_model
from ddpm.mnist.sampling import sample_digits
from ddpm.mnist.unet import ClassUNet, TimeUNet, UNet

__all__ = ["SHIPPED", "ClassUNet", "TimeUNet", "UNet", "load_model", "sample_digits"]
