"""The MNIST UNets and the eight operations they are built from.

    x [B, 1, 28, 28] ── a ──────────────────────────────────────────── h ── out [B, 1, 28, 28]
                        └─ b [14×14] ───────────────────────── u2 ──┘
                           └─ c [7×7] ──────────────── u1 ──┘
                              └─ f [1×1] ── g [7×7] ──┘

`UNet` sees only the image (the one-step denoiser), `TimeUNet` also the timestep, `ClassUNet` also
the class. Conditioning enters at two places, after `g` and after `u1`. `TimeFlow` and `ClassFlow` predict a
velocity, as in the assignment's newer editions.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ddpm.schedule import check_num_timesteps
from ddpm.tools.cpu import GELU
from ddpm.tools.memory import check_memory

IMAGE_SIZE = 28
NUM_CLASSES = 10


def _norm_act(channels: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels), GELU()]


# Convolutions before a BatchNorm have no bias: the normalisation would subtract it again.
class Conv(nn.Sequential):
    """3×3 convolution, BatchNorm, GELU: [B, i, H, W] -> [B, o, H, W]."""

    def __init__(self, i: int, o: int):
        super().__init__(nn.Conv2d(i, o, 3, padding=1, bias=False), *_norm_act(o))


class DownConv(nn.Sequential):
    """3×3 convolution of stride 2, BatchNorm, GELU: [B, i, H, W] -> [B, o, H/2, W/2]."""

    def __init__(self, i: int, o: int):
        super().__init__(nn.Conv2d(i, o, 3, stride=2, padding=1, bias=False), *_norm_act(o))


class UpConv(nn.Sequential):
    """4×4 transposed convolution of stride 2, BatchNorm, GELU: [B, i, H, W] -> [B, o, 2H, 2W]."""

    def __init__(self, i: int, o: int):
        super().__init__(nn.ConvTranspose2d(i, o, 4, stride=2, padding=1, bias=False), *_norm_act(o))


class Flatten(nn.Sequential):
    """7×7 average pool, GELU: [B, C, 7, 7] -> [B, C, 1, 1]."""

    def __init__(self):
        super().__init__(nn.AvgPool2d(7), GELU())


class Unflatten(nn.Sequential):
    """7×7 transposed convolution of stride 7, BatchNorm, GELU: [B, C, 1, 1] -> [B, C, 7, 7]."""

    def __init__(self, c: int):
        super().__init__(nn.ConvTranspose2d(c, c, 7, stride=7, bias=False), *_norm_act(c))


class ConvBlock(nn.Sequential):
    """Two `Conv`: [B, i, H, W] -> [B, o, H, W]."""

    def __init__(self, i: int, o: int):
        super().__init__(Conv(i, o), Conv(o, o))


class DownBlock(nn.Sequential):
    """`DownConv` and `ConvBlock`: [B, i, H, W] -> [B, o, H/2, W/2]."""

    def __init__(self, i: int, o: int):
        super().__init__(DownConv(i, o), ConvBlock(o, o))


class UpBlock(nn.Sequential):
    """`UpConv` and `ConvBlock`: [B, i, H, W] -> [B, o, 2H, 2W]."""

    def __init__(self, i: int, o: int):
        super().__init__(UpConv(i, o), ConvBlock(o, o))


class FCBlock(nn.Sequential):
    """Linear, GELU, Linear, shaped to scale or shift feature maps: [B, i] -> [B, o, 1, 1]."""

    def __init__(self, i: int, o: int):
        super().__init__(nn.Linear(i, o), nn.GELU(), nn.Linear(o, o), nn.Unflatten(1, (o, 1, 1)))


class UNet(nn.Module):
    """Unconditional: noisy digits [B, 1, 28, 28] -> clean digits [B, 1, 28, 28]."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.config = {"width": width}
        D = width
        self.a = ConvBlock(1, D)
        self.b = DownBlock(D, D)
        self.c = DownBlock(D, 2 * D)
        self.f = Flatten()
        self.g = Unflatten(2 * D)
        self.u1 = UpBlock(4 * D, D)
        self.u2 = UpBlock(2 * D, D)
        self.h = ConvBlock(2 * D, D)
        self.out = nn.Conv2d(D, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.unet(x, lambda g: g, lambda u1: u1)

    def unet(self, x: Tensor, condition_g, condition_u1, copies: int = 1) -> Tensor:
        """The UNet, with what the subclasses do to `g` and `u1`; x [B, …] in as many copies from there on."""
        a = self.a(x)
        b = self.b(a)
        c = self.c(b)
        g = self.g(self.f(c))
        a, b, c, g = (torch.cat([once] * copies) for once in (a, b, c, g)) if copies > 1 else (a, b, c, g)
        u1 = condition_u1(self.u1(torch.cat([condition_g(g), c], dim=1)))
        u2 = self.u2(torch.cat([u1, b], dim=1))
        h = self.h(torch.cat([u2, a], dim=1))
        return self.out(h)


def check_batch(model: UNet, digits: int, numbers: int = 13):
    """Refuse more digits at a time than fit in memory: 13 numbers a pixel and channel, 33 in training, measured."""
    needed = 4 * numbers * model.config["width"] * IMAGE_SIZE**2 * digits
    check_memory(needed, f"a batch of {digits} digits", next(model.parameters()).device)


def one_each(t: float | Tensor, batch: Tensor) -> Tensor:
    """A number, or a tensor 0-d or [B] -> [B, 1], one for each row of a batch [B, …]."""
    return torch.as_tensor(t, device=batch.device).to(batch.dtype).expand(len(batch)).unsqueeze(1)


class TimeUNet(UNet):
    """Time-conditioned: x_t [B, 1, 28, 28] and t, an int, 0-d or [B], -> eps [B, 1, 28, 28]."""

    def __init__(self, width: int = 64, num_timesteps: int = 300):
        super().__init__(width)
        check_num_timesteps(num_timesteps, least=2)
        self.config = {"width": width, "num_timesteps": num_timesteps}
        self.num_timesteps = num_timesteps
        self.t1 = FCBlock(1, 2 * width)
        self.t2 = FCBlock(1, width)

    def forward(self, x_t: Tensor, t: int | Tensor) -> Tensor:
        t = self.normalise(t, x_t)
        return self.unet(x_t, lambda g: g + self.t1(t), lambda u1: u1 + self.t2(t))

    def normalise(self, t: int | Tensor, batch: Tensor) -> Tensor:
        """Timesteps in 0 … T-1 -> [B, 1] in [0, 1], one for each row of a batch."""
        return one_each(t, batch) / (self.num_timesteps - 1)


class ClassUNet(TimeUNet):
    """Time- and class-conditioned: x_t [B, 1, 28, 28], t, one-hot c [B, 10] -> eps [B, 1, 28, 28].

    A row of zeros in `c` is the null class of classifier-free guidance. With n·B rows each image gets n answers
    [n·B, 1, 28, 28], all for the first rows first, and what precedes the class is computed once.
    """

    def __init__(self, width: int = 64, num_timesteps: int = 300):
        super().__init__(width, num_timesteps)
        self.c1 = FCBlock(NUM_CLASSES, 2 * width)
        self.c2 = FCBlock(NUM_CLASSES, width)

    def forward(self, x_t: Tensor, t: int | Tensor, c: Tensor) -> Tensor:
        t = self.normalise(t, c)
        return self.unet(
            x_t,
            lambda g: self.c1(c) * g + self.t1(t),
            lambda u1: self.c2(c) * u1 + self.t2(t),
            copies=len(c) // len(x_t),
        )


class TimeFlow(UNet):
    """The velocity of a flow: x_t [B, 1, 28, 28] and t from 0, noise, to 1, data, a float or [B] -> u."""

    def __init__(self, width: int = 64):
        super().__init__(width)
        self.t1 = FCBlock(1, 2 * width)
        self.t2 = FCBlock(1, width)

    def forward(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        t = one_each(t, x_t)
        return self.unet(x_t, lambda g: g * self.t1(t), lambda u1: u1 * self.t2(t))


class ClassFlow(TimeFlow):
    """… and of a class, one-hot c [B or n·B, 10]: the network of `ClassUNet`."""

    def __init__(self, width: int = 64):
        super().__init__(width)
        self.c1 = FCBlock(NUM_CLASSES, 2 * width)
        self.c2 = FCBlock(NUM_CLASSES, width)

    def forward(self, x_t: Tensor, t: float | Tensor, c: Tensor) -> Tensor:
        t = one_each(t, c)
        return self.unet(
            x_t,
            lambda g: self.c1(c) * g + self.t1(t),
            lambda u1: self.c2(c) * u1 + self.t2(t),
            copies=len(c) // len(x_t),
        )


@torch.no_grad()
def folded(model: UNet) -> UNet:
    """A copy to evaluate, with each BatchNorm folded into the convolution before it.

    γ (W x - μ) / √(σ² + ε) + β is a convolution with γ W / √(σ² + ε) and a bias: the same up to rounding, in one pass.
    """
    model = copy.deepcopy(model).eval()
    for block in model.modules():
        if isinstance(block, (Conv, DownConv, UpConv, Unflatten)):
            convolution, norm, _ = block
            block[0] = fuse_conv_bn_eval(convolution, norm, transpose=isinstance(convolution, nn.ConvTranspose2d))
            block[1] = nn.Identity()
    return model
