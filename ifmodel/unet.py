"""The UNet of IF's two stages: what it is built from, then the whole.

    x_t ── conv_in ── down_blocks ── mid_block ── up_blocks ── conv_norm_out ── conv_out ── eps, v
                          └──────── skips, last in, first out ────────┘

A level of the way down is a few ResNet blocks, each followed by attention on the coarser levels, and a ResNet
block that halves height and width. The way up mirrors it, and each of its ResNet blocks also takes one of the
feature maps that the way down left behind, a skip. Attribute names are those of the published checkpoints.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.tools.cpu import GELU, GroupNorm, attend
from ifmodel.config import UNetConfig

KeysValues = tuple[Tensor, Tensor]
ACTIVATION = {"gelu": GELU, "silu": nn.SiLU, "swish": nn.SiLU}


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
        # by uniform_ as in nn.Linear: torch.randn would, on the meta device, import torch._dynamo, which takes seconds
        self.positional_embedding = nn.Parameter(torch.empty(1, dim).uniform_(-(dim**-0.5), dim**-0.5))
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


class ResnetBlock(nn.Module):
    """Two convolutions, the second scaled and shifted by the time embedding, and a shortcut.

    x [B, in_dim, H, W], time [B, D_time] -> [B, out_dim, H, W]; resample "up" doubles H and W, "down" halves them.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
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
        self.norm1 = GroupNorm(groups, in_dim, eps)
        self.conv1 = nn.Conv2d(in_dim, out_dim, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, 2 * out_dim)
        self.norm2 = GroupNorm(groups, out_dim, eps)
        self.conv2 = nn.Conv2d(out_dim, out_dim, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()
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
        h = self.conv2(self.act(torch.addcmul(shift, self.norm2(h), 1 + scale)))  # norm2(h) (1 + scale) + shift
        return (self.conv_shortcut(x) + h).div_(self.out_scale_factor)


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


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, L, C] -> [B, heads, L, C / heads]."""
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2)


@dataclass(frozen=True)
class Text:
    """All that the UNet needs of a batch of prompts; made by `UNet.encode_text`, the same at every step.

    pooled: [B, D_time], added to the time embedding
    keys_values: for each attention layer, in the order they run, keys and values [B, heads, L, head_dim]
    """

    pooled: Tensor
    keys_values: tuple[KeysValues, ...]

    def __len__(self) -> int:
        return len(self.pooled)

    @classmethod
    def cat(cls, texts: Sequence["Text"]) -> "Text":
        """The prompts of several, one after another, as torch.cat does for tensors."""
        layers = zip(*(text.keys_values for text in texts), strict=True)
        keys_values = tuple(tuple(torch.cat(parts) for parts in zip(*layer, strict=True)) for layer in layers)
        return cls(torch.cat([text.pooled for text in texts]), keys_values)

    def __getitem__(self, rows: slice | Sequence[int]) -> "Text":
        """Some of the prompts, or one of them several times: text[[0, 0, 0]]."""
        return Text(self.pooled[rows], tuple((k[rows], v[rows]) for k, v in self.keys_values))


class DownBlock(nn.Module):
    """One level of the way down.

    x [B, in_dim, H, W], time [B, D_time], an iterator of each layer's keys and values -> x [B, out_dim, H/2, W/2], or
    of the same size at the last level, and the skips, x after each layer
    """

    def __init__(self, in_dim: int, out_dim: int, layers: int, attention, resnet, last: bool):
        super().__init__()
        self.resnets = nn.ModuleList([resnet(in_dim if layer == 0 else out_dim, out_dim) for layer in range(layers)])
        self.attentions = nn.ModuleList([attention(out_dim) for _ in range(layers)] if attention else [])
        self.downsamplers = nn.ModuleList([] if last else [resnet(out_dim, out_dim, resample="down")])

    def forward(self, x: Tensor, time: Tensor, keys_values: Iterator[KeysValues]) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for layer, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if self.attentions:
                x = self.attentions[layer](x, next(keys_values))
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x, time)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    """Between the ways: ResNet block, attention, ResNet block. x [B, dim, H, W] -> [B, dim, H, W]"""

    def __init__(self, dim: int, attention, resnet):
        super().__init__()
        self.resnets = nn.ModuleList([resnet(dim, dim), resnet(dim, dim)])
        self.attentions = nn.ModuleList([attention(dim)])

    def forward(self, x: Tensor, time: Tensor, keys_values: Iterator[KeysValues]) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, time), next(keys_values))
        return self.resnets[1](x, time)


class UpBlock(nn.Module):
    """One level of the way up, with one layer more than its mirror image, and a skip for each.

    x [B, in_dim, H, W], skips [B, …, H, W], latest first, time and keys and values as in `DownBlock` -> x
    [B, out_dim, 2H, 2W], or of the same size at the last level
    """

    def __init__(self, in_dim: int, out_dim: int, skip_dims: list[int], attention, resnet, last: bool):
        super().__init__()
        dims = [in_dim, *[out_dim] * (len(skip_dims) - 1)]
        self.resnets = nn.ModuleList([resnet(dim + skip, out_dim) for dim, skip in zip(dims, skip_dims, strict=True)])
        self.attentions = nn.ModuleList([attention(out_dim) for _ in skip_dims] if attention else [])
        self.upsamplers = nn.ModuleList([] if last else [resnet(out_dim, out_dim, resample="up")])

    def forward(self, x: Tensor, skips: list[Tensor], time: Tensor, keys_values: Iterator[KeysValues]) -> Tensor:
        for layer, (resnet, skip) in enumerate(zip(self.resnets, skips, strict=True)):
            x = resnet(torch.cat([x, skip], dim=1), time)
            if self.attentions:
                x = self.attentions[layer](x, next(keys_values))
        for upsampler in self.upsamplers:
            x = upsampler(x, time)
        return x


def resnet_of(config: UNetConfig) -> Callable[..., ResnetBlock]:
    """The ResNet block of a model, of which the widths and the resampling are still open."""
    return partial(
        ResnetBlock,
        time_dim=config.time_embedding_dim,
        groups=config.norm_num_groups,
        eps=config.norm_eps,
        act_fn=config.act_fn,
        skip_time_act=config.resnet_skip_time_act,
        out_scale_factor=config.resnet_out_scale_factor,
    )


def attention_of(config: UNetConfig) -> Callable[..., Attention]:
    """The attention of a model, of which the width and `only_cross` are still open."""
    return partial(
        Attention,
        text_dim=config.cross_attention_dim,
        head_dim=config.attention_head_dim,
        groups=config.norm_num_groups,
    )


class UNet(nn.Module):
    """DeepFloyd IF's UNet, stage 1 or 2 by its config. Source: Imagen appendix B, arXiv 2205.11487."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        widths, time_dim, levels = config.block_out_channels, config.time_embedding_dim, len(config.block_out_channels)
        resnet, attention = resnet_of(config), attention_of(config)
        mid_resnet = partial(resnet, out_scale_factor=config.mid_block_scale_factor)
        mid_attention = partial(attention, only_cross=config.mid_block_only_cross_attention)
        level_attention = [
            partial(attention, only_cross=only_cross) if has_attention else None
            for has_attention, only_cross in zip(config.attention, config.only_cross_attention, strict=True)
        ]

        self.time_embedding = TimestepEmbedding(widths[0], time_dim, config.act_fn)
        if config.class_embed_type == "timestep":
            self.class_embedding = TimestepEmbedding(widths[0], time_dim, config.act_fn)
        self.time_act = ACTIVATION[config.time_embedding_act_fn]() if config.time_embedding_act_fn else nn.Identity()
        self.add_embedding = TextEmbedding(config.encoder_hid_dim, time_dim, config.addition_embed_type_num_heads)
        self.encoder_hid_proj = nn.Linear(config.encoder_hid_dim, config.cross_attention_dim)

        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        skip_dims = [widths[0]]
        for level, width in enumerate(widths):
            i, layers, last = widths[max(level - 1, 0)], config.layers_per_block[level], level == levels - 1
            self.down_blocks.append(DownBlock(i, width, layers, level_attention[level], resnet, last))
            skip_dims += [width] * (layers + (not last))
        self.mid_block = MidBlock(widths[-1], mid_attention, mid_resnet)
        self.up_blocks = nn.ModuleList()
        for level in reversed(range(levels)):
            i, layers = widths[min(level + 1, levels - 1)], config.layers_per_block[level] + 1
            skips = [skip_dims.pop() for _ in range(layers)]
            self.up_blocks.append(UpBlock(i, widths[level], skips, level_attention[level], resnet, last=level == 0))

        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_act = ACTIVATION[config.act_fn]()
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def encode_text(self, prompt_embeds: Tensor) -> Text:
        """T5's output [B, L, D_text] -> everything in this UNet that depends on the prompt alone."""
        if prompt_embeds.ndim != 3 or prompt_embeds.shape[2] != self.config.encoder_hid_dim:
            shape, dim = list(prompt_embeds.shape), self.config.encoder_hid_dim
            raise ValueError(f"prompt_embeds must be [B, L, {dim}] for this UNet, not {shape}")
        weight = self.encoder_hid_proj.weight
        prompt_embeds = prompt_embeds.to(weight.dtype if weight.is_meta else weight)  # on meta: see `offload`
        projected = self.encoder_hid_proj(prompt_embeds)
        attentions = (layer for block in self._blocks() for layer in block.attentions)
        keys_values = tuple(layer.text_keys_values(projected) for layer in attentions)
        return Text(self.add_embedding(prompt_embeds), keys_values)

    def forward(self, x_t: Tensor, t: int | Tensor, text: Text, noise_level: int | Tensor | None = None) -> Tensor:
        """The model's eps and v, [B, 6, H, W].

        x_t: [B, 3, H, W], or [B, 6, H, W] for stage 2: the noisy image, then the upscaled, noised low-resolution one
        t: the timestep, an int, a 0-d or a [B] tensor; noise_level: stage 2 alone, that of the low-resolution image
        text: from `encode_text`, B prompts
        Raises ValueError when these do not fit each other or the model.
        """
        self._check(x_t, text, noise_level)
        # channels last: what convolutions work on fastest, and what makes attention's transposes free
        x, keys_values = x_t.to(text.pooled.dtype, memory_format=torch.channels_last), iter(text.keys_values)
        time = self.time_embedding(_one_each(t, x))
        if noise_level is not None:
            time = time + self.class_embedding(_one_each(noise_level, x))
        time = self.time_act(time + text.pooled)

        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            x, left_behind = block(x, time, keys_values)
            skips += left_behind
        x = self.mid_block(x, time, keys_values)
        for block in self.up_blocks:
            x = block(x, [skips.pop() for _ in block.resnets], time, keys_values)
        return self.conv_out(self.conv_act(self.conv_norm_out(x)))

    def _blocks(self) -> Iterator[nn.Module]:
        yield from (*self.down_blocks, self.mid_block, *self.up_blocks)

    def _check(self, x_t: Tensor, text: Text, noise_level: int | Tensor | None):
        config, multiple = self.config, self.config.size_multiple
        if x_t.ndim != 4 or x_t.shape[1] != config.in_channels:
            raise ValueError(f"x_t must be [B, {config.in_channels}, H, W] for this UNet, not {list(x_t.shape)}")
        if x_t.shape[2] % multiple or x_t.shape[3] % multiple:
            raise ValueError(f"height and width must be multiples of {multiple}, not {x_t.shape[2]} × {x_t.shape[3]}")
        if len(text) != len(x_t):
            raise ValueError(f"{len(x_t)} images need as many prompts, not {len(text)}")
        if (noise_level is not None) != (config.class_embed_type == "timestep"):
            raise ValueError("a stage-2 UNet takes a noise_level, a stage-1 UNet takes none")


def _one_each(t: int | Tensor, x: Tensor) -> Tensor:
    """A timestep for each image of x: [B]."""
    if isinstance(t, Tensor):
        return t.to(x.device).expand(len(x))
    return torch.full((len(x),), t, device=x.device)  # with torch.as_tensor, torch.compile compiles anew for each t
