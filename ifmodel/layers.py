"""What IF's UNets are built from. Attribute names are those of the published checkpoints."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATION = {"gelu": nn.GELU, "silu": nn.SiLU, "swish": nn.SiLU}


def sinusoidal_embedding(t: Tensor, dim: int) -> Tensor:
    """Timesteps [B] -> [B, dim] in float32: cosines, then sines, of falling frequency.

    Source: Attention Is All You Need §3.5, arXiv 1706.03762, as used by DDPM.
    """
    frequencies = torch.exp(
        -math.log(10000) * torch.arange(dim // 2, dtype=torch.float32, device=t.device) / (dim // 2)
    )
    angles = t.float().unsqueeze(1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimestepEmbedding(nn.Module):
    """A timestep or noise level, embedded: [B] -> [B, D_time]."""

    def __init__(self, sinusoidal_dim: int, time_dim: int, act_fn: str):
        super().__init__()
        self.sinusoidal_dim = sinusoidal_dim
        self.linear_1 = nn.Linear(sinusoidal_dim, time_dim)
        self.act = ACTIVATION[act_fn]()
        self.linear_2 = nn.Linear(time_dim, time_dim)

    def forward(self, t: Tensor) -> Tensor:
        embedding = sinusoidal_embedding(t, self.sinusoidal_dim).to(self.linear_1.weight.dtype)
        return self.linear_2(self.act(self.linear_1(embedding)))


class AttentionPooling(nn.Module):
    """The mean of the tokens attends to all of them and to itself: [B, L, D] -> [B, D]."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(torch.randn(1, dim) / dim**0.5)
        self.k_proj = nn.Linear(dim, dim)
        self.q_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        mean = tokens.mean(dim=1, keepdim=True) + self.positional_embedding
        tokens = torch.cat([mean, tokens], dim=1)
        q = split_heads(self.q_proj(mean), self.num_heads)
        k = split_heads(self.k_proj(tokens), self.num_heads)
        v = split_heads(self.v_proj(tokens), self.num_heads)
        scale = q.shape[-1] ** -0.25  # on both sides, so that float16 does not overflow
        weights = (q * scale) @ (k * scale).transpose(2, 3)
        weights = weights.float().softmax(dim=-1).to(v.dtype)  # in float32 whatever the dtype, as IF was trained
        return (weights @ v).flatten(1)


class TextEmbedding(nn.Module):
    """All of the prompt in one vector, which is added to the time embedding: [B, L, D_text] -> [B, D_time]."""

    def __init__(self, text_dim: int, time_dim: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(text_dim)
        self.pool = AttentionPooling(text_dim, num_heads)
        self.proj = nn.Linear(text_dim, time_dim)
        self.norm2 = nn.LayerNorm(time_dim)

    def forward(self, prompt_embeds: Tensor) -> Tensor:
        return self.norm2(self.proj(self.pool(self.norm1(prompt_embeds))))


class GroupNorm(nn.GroupNorm):
    """torch's, in float32 where its way with channels-last bfloat16 on the CPU is slower: small pictures, gradients."""

    def forward(self, x: Tensor) -> Tensor:
        slower = x.requires_grad or x[0, 0].numel() < 1024  # up to 4 and 5 × as slow
        if slower and x.device.type == "cpu" and x.dtype == torch.bfloat16:
            weight, bias = self.weight.float(), self.bias.float()
            return F.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)
        return super().forward(x)


class ResnetBlock(nn.Module):
    """Two convolutions, the second scaled and shifted by the time embedding, beside a shortcut.

    x [B, i, H, W], time [B, D_time] -> [B, o, H, W]; resample "up" doubles H and W, "down" halves them.
    """

    def __init__(
        self,
        i: int,
        o: int,
        time_dim: int,
        *,
        groups: int,
        eps: float,
        act_fn: str,
        skip_time_act: bool,
        out_scale_factor: float,
        resample: str | None = None,
    ):
        super().__init__()
        self.norm1 = GroupNorm(groups, i, eps)
        self.conv1 = nn.Conv2d(i, o, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, 2 * o)
        self.norm2 = GroupNorm(groups, o, eps)
        self.conv2 = nn.Conv2d(o, o, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(i, o, 1) if i != o else nn.Identity()
        self.act = ACTIVATION[act_fn]()
        self.time_act = nn.Identity() if skip_time_act else ACTIVATION[act_fn]()
        self.out_scale_factor = out_scale_factor
        self.resample = resample

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.act(self.norm1(x))
        if self.resample == "up":
            x, h = (F.interpolate(y, scale_factor=2.0, mode="nearest") for y in (x, h))
        elif self.resample == "down":
            x, h = (F.avg_pool2d(y, 2) for y in (x, h))
        h = self.conv1(h)
        scale, shift = self.time_emb_proj(self.time_act(time))[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(self.act(self.norm2(h) * (1 + scale) + shift))
        return (self.conv_shortcut(x) + h) / self.out_scale_factor


class Attention(nn.Module):
    """Every pixel attends to the tokens of the text and, unless only_cross, to every pixel.

    x [B, C, H, W], text keys and values from `text_keys_values` -> [B, C, H, W]
    """

    def __init__(self, dim: int, text_dim: int, head_dim: int, *, groups: int, only_cross: bool):
        super().__init__()
        self.num_heads = dim // head_dim
        self.group_norm = GroupNorm(groups, dim, 1e-5)
        self.norm_cross = GroupNorm(32, text_dim, 1e-5)
        self.to_q = nn.Linear(dim, dim)
        if not only_cross:
            self.to_k = nn.Linear(dim, dim)
            self.to_v = nn.Linear(dim, dim)
        self.only_cross = only_cross
        self.add_k_proj = nn.Linear(text_dim, dim)
        self.add_v_proj = nn.Linear(text_dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def text_keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Projected text [B, L, D] -> keys and values [B, heads, L, head_dim], the same at every step."""
        text = self.norm_cross(text.transpose(1, 2)).transpose(1, 2)
        return split_heads(self.add_k_proj(text), self.num_heads), split_heads(self.add_v_proj(text), self.num_heads)

    def forward(self, x: Tensor, text_keys_values: tuple[Tensor, Tensor]) -> Tensor:
        pixels = self.group_norm(x).flatten(2).transpose(1, 2)  # [B, HW, C]
        q = split_heads(self.to_q(pixels), self.num_heads)
        k, v = text_keys_values
        if not self.only_cross:
            k = torch.cat([k, split_heads(self.to_k(pixels), self.num_heads)], dim=2)
            v = torch.cat([v, split_heads(self.to_v(pixels), self.num_heads)], dim=2)
        attended = attend(q, k, v).transpose(1, 2).flatten(2)  # [B, HW, C]
        return x + self.to_out[0](attended).transpose(1, 2).reshape(x.shape)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v for heads of queries [B, heads, Q, d], keys and values [B, heads, K, d]."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # 2.5 × as fast as torch's fused kernel there; of 256 queries at a time the weights stay in the cache
        k = (k * q.shape[-1] ** -0.5).transpose(2, 3)
        return torch.cat([(part @ k).softmax(dim=-1) @ v for part in q.split(256, dim=2)], dim=2)
    return F.scaled_dot_product_attention(q, k, v)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, L, C] -> [B, heads, L, C / heads]."""
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2)
