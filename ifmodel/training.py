"""Training a small IF from captioned pictures: the text encoder against the pictures, then stage 1 with it.

A text encoder that starts from random weights beside a UNet says nearly the same of every caption, and the UNet
learns to draw without listening. So it is trained first, contrastively, to tell by its caption which of many
pictures is meant; `caption_gap` then watches that the UNet goes on listening.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from ddpm.files import write_atomically
from ddpm.process import add_noise
from ddpm.training import variational_bound
from ifmodel.captions import STYLES, CaptionedPictures
from ifmodel.cascade import SCHEDULE
from ifmodel.text import Tokenizer
from ifmodel.unet import UNet

# What the config.json of every IF stage 1 says beside its widths
STAGE_1_CONFIG = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "gelu",
    "addition_embed_type": "text",
    "cross_attention_norm": "group_norm",
    "encoder_hid_dim_type": "text_proj",
    "in_channels": 3,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "out_channels": 6,
    "resnet_time_scale_shift": "scale_shift",
}
SCHEDULER_CONFIG = {
    "_class_name": "DDPMScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "clip_sample": True,
    "dynamic_thresholding_ratio": 0.95,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.5,
    "thresholding": True,
    "variance_type": "learned_range",
}
MODEL_INDEX = {
    "_class_name": "IFPipeline",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDPMScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "watermarker": [None, None],
}


def stage_1_config(size: int, widths: Sequence[int], layers: int, text_dim: int) -> dict:
    """The config.json of a stage-1 UNet: ResNets at the first level, attention at the others, as in IF.

    widths: of the levels, multiples of 32; text_dim: the width of the text encoder
    """
    attention = len(widths) - 1
    return {
        **STAGE_1_CONFIG,
        "addition_embed_type_num_heads": text_dim // 32,
        "attention_head_dim": 32,
        "block_out_channels": list(widths),
        "cross_attention_dim": widths[-1],
        "down_block_types": ["ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * attention],
        "encoder_hid_dim": text_dim,
        "layers_per_block": layers,
        "sample_size": size,
        "up_block_types": [*["SimpleCrossAttnUpBlock2D"] * attention, "ResnetUpsampleBlock2D"],
    }


def build_encoder(vocab_size: int, dim: int = 128, layers: int = 2) -> nn.Module:
    """An untrained T5 encoder, transformers' own, of the same kind as IF's."""
    from transformers import T5Config, T5EncoderModel

    shape = {"d_model": dim, "d_kv": 32, "d_ff": 2 * dim, "num_layers": layers, "num_heads": dim // 32}
    return T5EncoderModel(T5Config(vocab_size=vocab_size, dropout_rate=0.0, feed_forward_proj="gated-gelu", **shape))


def save_model(folder: Path, config: dict, weights: dict[str, Tensor], encoder: nn.Module, tokenizer: Path):
    """Write a stage 1 in the Hub's layout, in float16: what generate.py, and diffusers, load.

    weights: those of a `TextToPicture`; encoder: where its config is from; tokenizer: a folder with spiece.model
    """
    parts = {
        "unet/diffusion_pytorch_model.safetensors": "unet.",
        "text_encoder/model.safetensors": "encoder.",
    }
    for name, prefix in parts.items():
        half = {
            key.removeprefix(prefix): weight.half().contiguous()
            for key, weight in weights.items()
            if key.startswith(prefix) and not key.endswith("encoder.embed_tokens.weight")  # shared.weight again
        }
        write_atomically(folder / name, save(half, {"format": "pt"}))
    encoder_config = {**encoder.config.to_dict(), "architectures": ["T5EncoderModel"]}
    files = {
        "model_index.json": MODEL_INDEX,
        "scheduler/scheduler_config.json": SCHEDULER_CONFIG,
        "text_encoder/config.json": encoder_config,
        "tokenizer/tokenizer_config.json": {"tokenizer_class": "T5Tokenizer"},
        "unet/config.json": config,
    }
    for name, content in files.items():
        write_atomically(folder / name, json.dumps(content, indent=2, default=str).encode())
    write_atomically(folder / "tokenizer" / "spiece.model", (tokenizer / "spiece.model").read_bytes())


class PictureTower(nn.Module):
    """The pictures' side of the contrast: [B, 3, S, S] in [-1, 1] -> [B, D]. It is thrown away afterwards."""

    def __init__(self, dim: int, width: int = 32):
        super().__init__()

        def block(i: int, o: int) -> nn.Sequential:
            convolution = nn.Conv2d(i, o, 3, stride=2, padding=1)
            return nn.Sequential(convolution, nn.GroupNorm(8, o), nn.GELU())

        widths = (width, 2 * width, 4 * width, 4 * width)
        self.blocks = nn.Sequential(*(block(i, o) for i, o in zip((3, *widths), widths, strict=False)))
        self.out = nn.Linear(4 * width, dim)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.out(self.blocks(pictures).mean((2, 3)))


class ContrastiveText(nn.Module):
    """A T5 encoder and a picture tower that agree on which caption is of which picture.

    The caption's side is the mean over all 77 positions, padding too, since that is what the UNet pools.
    Source: CLIP §2.3, arXiv 2103.00020.
    """

    def __init__(self, encoder: nn.Module, dim: int = 128):
        super().__init__()
        self.encoder = encoder
        self.caption = nn.Sequential(nn.LayerNorm(encoder.config.d_model), nn.Linear(encoder.config.d_model, dim))
        self.tower = PictureTower(dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, pictures: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Similarities [B pictures, B captions], which should be largest on the diagonal."""
        embeds = self.encoder(tokens, attention_mask=mask).last_hidden_state
        captions = F.normalize(self.caption(embeds.mean(1)), dim=1)
        return self.log_scale.exp().clamp(max=100) * F.normalize(self.tower(pictures), dim=1) @ captions.T


def contrastive_loss(similarities: Tensor) -> Tensor:
    """Each picture finds its caption, each caption its picture, among those of the batch."""
    right = torch.arange(len(similarities), device=similarities.device)
    return (F.cross_entropy(similarities, right) + F.cross_entropy(similarities.T, right)) / 2


@dataclass(frozen=True)
class Batch:
    """What one step sees: pictures [B, 3, S, S] in [-1, 1], tokens and their mask [B, 77]."""

    x_0: Tensor
    tokens: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device) for tensor in (self.x_0, self.tokens, self.mask)))

    def __getitem__(self, rows: slice) -> "Batch":
        return Batch(self.x_0[rows], self.tokens[rows], self.mask[rows])


def draw_batch(
    data: CaptionedPictures, tokenizer: Tokenizer, size: int, generator: torch.Generator, *, drop: float = 0.1
) -> Batch:
    """A batch of different pictures, each in one style with a fitting caption, some captions dropped.

    Half of the pictures are plain; the others are spread over the styles. Pictures are shifted by up to 1/16.
    drop: the share of captions that become "", for classifier-free guidance
    """
    count = len(data.names)
    chosen = torch.cat([torch.randperm(count, generator=generator) for _ in range(-(-size // count))])[:size].tolist()
    styles = torch.randint(2 * (len(STYLES) - 1), (size,), generator=generator)
    styles = torch.where(styles < len(STYLES) - 1, 0, styles - len(STYLES) + 2).tolist()
    captions = [data.caption(index, style, generator) for index, style in zip(chosen, styles, strict=True)]
    dropped = (torch.rand(size, generator=generator) < drop).tolist()
    tokens, mask = tokenizer(["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)])
    x_0 = data.pictures[chosen, styles].float() / 127.5 - 1
    return Batch(shifted(x_0, x_0.shape[-1] // 16, generator), tokens, mask)


def shifted(x: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Each picture [B, C, S, S] moved by up to so many pixels each way, its edge repeated."""
    size = x.shape[-1]
    padded = F.pad(x, (most,) * 4, mode="replicate")
    corners = torch.randint(2 * most + 1, (len(x), 2), generator=generator).tolist()
    moved = [picture[:, dy : dy + size, dx : dx + size] for picture, (dy, dx) in zip(padded, corners, strict=True)]
    return torch.stack(moved)


class TextToPicture(nn.Module):
    """A text encoder and a UNet, trained together; what is shipped are its two parts."""

    def __init__(self, encoder: nn.Module, unet: UNet):
        super().__init__()
        self.encoder, self.unet = encoder, unet

    def forward(self, x_t: Tensor, t: Tensor, batch: Batch) -> Tensor:
        embeds = self.encoder(batch.tokens, attention_mask=batch.mask).last_hidden_state
        return self.unet(x_t, t, self.unet.encode_text(embeds))


def stage_1_loss(model: TextToPicture, batch: Batch, generator: torch.Generator, rows: slice = slice(None)) -> Tensor:
    """L_simple + λ L_vlb for each picture, [B], at a random t for each.

    rows: this process's share of the batch; the noise is drawn for all, so that it does not depend on the shares
    λ = 1/T and t is uniform, so the bound's term at t has the weight 1.
    Source: Improved DDPM eq. 16, arXiv 2102.09672.
    """
    device = batch.x_0.device
    t = torch.randint(SCHEDULE.num_timesteps, (len(batch.x_0),), generator=generator).to(device)[rows]
    eps = torch.randn(batch.x_0.shape, generator=generator).to(device)[rows]
    batch = batch[rows]
    x_t = add_noise(batch.x_0, eps, t, SCHEDULE)
    eps_hat, v = model(x_t, t, batch).float().chunk(2, dim=1)
    simple = (eps_hat - eps).square().flatten(1).mean(1)
    return simple + variational_bound(batch.x_0, x_t, eps_hat.detach(), v, t, SCHEDULE)


@torch.no_grad()
def caption_gap(model: TextToPicture, batch: Batch, t: int = 800, seed: int = 0) -> dict[str, float]:
    """The loss of eps with the right captions, with those of other pictures, and with none.

    A model that listens has a smaller one with the right captions; where they are equal, it draws without listening.
    """
    eps = torch.randn(batch.x_0.shape, generator=torch.Generator().manual_seed(seed)).to(batch.x_0.device)
    times = torch.full((len(eps),), t, device=eps.device)
    x_t = add_noise(batch.x_0, eps, times, SCHEDULE)
    none = torch.zeros_like(batch.tokens)
    none[:, 0] = 1
    given = {
        "right": batch,
        "others": Batch(batch.x_0, batch.tokens.roll(1, 0), batch.mask.roll(1, 0)),
        "none": Batch(batch.x_0, none, (none > 0).long()),
    }
    losses = {}
    for name, other in given.items():
        eps_hat = model(x_t, times, other).float().chunk(2, dim=1)[0]
        losses[name] = F.mse_loss(eps_hat, eps).item()
    return losses


class Average:
    """The exponential moving average of a model's weights, which samples better than the weights themselves."""

    def __init__(self, model: nn.Module, decay: float = 0.999):
        self.decay = decay
        self.weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int):
        """After step `step`; it is quicker at first, so that it forgets the random weights."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, weight in model.state_dict().items():
            self.weights[name].lerp_(weight, 1 - decay)


@torch.no_grad()
def silence(unet: UNet):
    """Let an untrained UNet start as the identity: the last layer of every branch, and of the whole, says zero."""
    for name, parameter in unet.named_parameters():
        if ".conv2." in name or ".to_out." in name or name.startswith("conv_out."):
            parameter.zero_()


def train_tokenizer(captions: Sequence[str], folder: Path, vocab_size: int = 1500):
    """Train a sentencepiece model on captions, lower-cased as IF does, and write it as folder/spiece.model."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([caption.lower().strip() for caption in captions]),
        model_prefix=str(folder / "spiece"),
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
