"""A layer that CPUs compute faster when they are asked differently; attention and convolutions: `ifmodel.cpu`."""

from torch import Tensor, nn


class GELU(nn.GELU):
    """torch's, in half the time on CPUs: oneDNN takes what is contiguous, which channels-last images are once permuted.

    x of any shape -> the same shape
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 4 and x.device.type == "cpu" and not x.is_contiguous():
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return super().forward(x)
