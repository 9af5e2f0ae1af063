"""Faster ways to compute attention, GELU, GroupNorm and convolutions on CPUs.

Packing: oneDNN, which computes torch's convolutions on x86 CPUs, wants weights in an order of its own, and puts them in
that order again at every call. On small images with many channels that takes longer than the convolution: laid out
once, a 3 × 3 convolution of 768 channels at 8 × 8 is three times as fast in bfloat16, and a step of IF-I-M as a whole
1.06 times. The price: the laid out weights are no longer those of the memory-mapped file but a copy, and the model is
for inference alone, without gradients, copies or a state_dict.
"""

import platform
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v for heads of queries [B, heads, Q, d], keys and values [B, heads, K, d]."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # 2.5 × as fast as torch's fused kernel there; of 256 queries at a time the weights stay in the cache
        k = (k * q.shape[-1] ** -0.5).transpose(2, 3)
        return torch.cat([(part @ k).softmax(dim=-1) @ v for part in q.split(256, dim=2)], dim=2)
    return F.scaled_dot_product_attention(q, k, v)


class GELU(nn.GELU):
    """torch's, in half the time on CPUs: oneDNN takes what is contiguous, which channels-last images are once permuted.

    x of any shape -> the same shape
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 4 and x.device.type == "cpu" and not x.is_contiguous():
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return super().forward(x)


class GroupNorm(nn.GroupNorm):
    """torch's, in float32 where its way with channels-last bfloat16 on the CPU is slower: small images, gradients.

    x [B, C, H, W] or [B, C, L] -> the same shape and dtype
    """

    def forward(self, x: Tensor) -> Tensor:
        slower = x.requires_grad or x[0, 0].numel() < 1024  # up to 4 and 5 × as slow
        if slower and x.device.type == "cpu" and x.dtype == torch.bfloat16:
            weight, bias = self.weight.float(), self.bias.float()
            return F.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)
        return super().forward(x)


class PackedConv2d(nn.Module):
    """What an nn.Conv2d computes; its weight is laid out for the first image it sees, and the original is let go.

    x [B, in, H, W] -> [B, out, H', W'], for inference alone
    """

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        self.weight, self.bias, self.padding = convolution.weight, convolution.bias, list(convolution.padding)
        self.packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is None:
            self.packed = torch._C._nn.mkldnn_reorder_conv2d_weight(
                self.weight.to_mkldnn(), self.padding, [1, 1], [1, 1], 1, list(x.shape)
            )
            self.weight = None
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.packed, self.bias, self.padding, [1, 1], [1, 1], 1, "none", [], ""
        )


def can_pack(dtype: torch.dtype = torch.float32) -> bool:
    """Whether this is a CPU, and a torch, whose convolutions can be packed in a dtype: bfloat16 needs AVX-512."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight") or not hasattr(torch.ops, "mkldnn"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def is_plain(convolution: nn.Conv2d) -> bool:
    """Whether it takes every pixel, with all channels, and zeros around the image."""
    steps = (convolution.stride, convolution.dilation, convolution.groups)
    return steps == ((1, 1), (1, 1), 1) and convolution.padding_mode == "zeros"


def plain_convolutions(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Conv2d]]:
    """Those below a model that can be packed, each with the module that has it, and its name there."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.Conv2d) and is_plain(child):
                yield parent, name, child


def pack_convolutions(model: nn.Module):
    """Replace every plain nn.Conv2d below a model; from its first image on, the model is for inference alone."""
    for parent, name, convolution in list(plain_convolutions(model)):
        setattr(parent, name, PackedConv2d(convolution))
