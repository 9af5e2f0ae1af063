"""Training a small IF from captioned pictures: the text encoder against the pictures, stage 1 with it, then stage 2.

A text encoder that starts from random weights beside a UNet says nearly the same of every caption, and the UNet
learns to draw without listening. So it is trained first, contrastively, to tell by its caption which of many
pictures is meant; `caption_gap` then watches that the UNet goes on listening.
"""

import io
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
from ddpm.losses import variational_bound
from ddpm.process import add_noise, predict_x0
from ifmodel.captions import STYLES, CaptionedPictures
from ifmodel.cascade import SCHEDULE, noised_upscaled
from ifmodel.config import STAGE_1_CONFIG, STAGE_2_CONFIG
from ifmodel.text import Tokenizer
from ifmodel.unet import UNet

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
STAGE_2_INDEX = {
    **MODEL_INDEX,
    "_class_name": "IFSuperResolutionPipeline",
    "image_noising_scheduler": ["diffusers", "DDPMScheduler"],
    "text_encoder": [None, None],  # that of stage 1
    "tokenizer": [None, None],
}


def stage_1_config(size: int, widths: Sequence[int], layers: int, text_dim: int) -> dict:
    """The config.json of a stage-1 UNet: ResNets at the first level, attention at the others, as in IF.

    widths: of the levels, multiples of 32; text_dim: the width of the text encoder
    """
    return {**STAGE_1_CONFIG, **_shape(size, widths, layers, text_dim, attention=len(widths) - 1)}


def stage_2_config(size: int, widths: Sequence[int], layers: int, text_dim: int) -> dict:
    """The config.json of a stage-2 UNet: attention at the coarsest level alone, so that 128 × 128 is cheap.

    As in `stage_1_config`. Groups of fewer channels than IF's 32, since the finest level may have but 32 of them.
    """
    shape = _shape(size, widths, layers, text_dim, attention=1)
    return {**STAGE_2_CONFIG, **shape, "norm_num_groups": 8, "time_embedding_dim": widths[-1]}


def _shape(size: int, widths: Sequence[int], layers: int, text_dim: int, attention: int) -> dict:
    """The fields of both configs that say how large a UNet is. attention: how many levels have it, the coarsest."""
    resnets = len(widths) - attention
    return {
        "addition_embed_type_num_heads": text_dim // 32,
        "attention_head_dim": 32,
        "block_out_channels": list(widths),
        "cross_attention_dim": widths[-1],
        "down_block_types": ["ResnetDownsampleBlock2D"] * resnets + ["SimpleCrossAttnDownBlock2D"] * attention,
        "encoder_hid_dim": text_dim,
        "layers_per_block": layers,
        "sample_size": size,
        "up_block_types": ["SimpleCrossAttnUpBlock2D"] * attention + ["ResnetUpsampleBlock2D"] * resnets,
    }


def build_encoder(vocab_size: int, dim: int = 128, layers: int = 2) -> nn.Module:
    """An untrained T5 encoder, transformers' own, of the same kind as IF's."""
    from transformers import T5Config, T5EncoderModel

    shape = {"d_model": dim, "d_kv": 32, "d_ff": 2 * dim, "num_layers": layers, "num_heads": dim // 32}
    return T5EncoderModel(T5Config(vocab_size=vocab_size, dropout_rate=0.0, feed_forward_proj="gated-gelu", **shape))


def save_stage_1(folder: Path, config: dict, weights: dict[str, Tensor], encoder: nn.Module, tokenizer: Path):
    """Write a stage 1 in the Hub's layout, in float16: what generate.py, and diffusers, load.

    weights: those of a `TextToPicture`; encoder: where its config is from; tokenizer: a folder with spiece.model
    """
    encoder_config = {**encoder.config.to_dict(), "architectures": ["T5EncoderModel"]}
    encoder_config.pop("_name_or_path", None)  # where it was loaded from, on this machine
    _save_half(folder / "unet" / "diffusion_pytorch_model.safetensors", weights, "unet.")
    _save_half(folder / "text_encoder" / "model.safetensors", weights, "encoder.")
    files = {
        "model_index.json": MODEL_INDEX,
        "scheduler/scheduler_config.json": SCHEDULER_CONFIG,
        "text_encoder/config.json": encoder_config,
        "tokenizer/tokenizer_config.json": {"tokenizer_class": "T5Tokenizer"},
        "unet/config.json": config,
    }
    _save_json(folder, files)
    write_atomically(folder / "tokenizer" / "spiece.model", (tokenizer / "spiece.model").read_bytes())


def save_stage_2(folder: Path, config: dict, weights: dict[str, Tensor]):
    """Write a stage 2 as `save_stage_1` does; the text encoder is that of stage 1."""
    _save_half(folder / "unet" / "diffusion_pytorch_model.safetensors", weights, "unet.")
    noising = {name: SCHEDULER_CONFIG[name] for name in ("_class_name", "beta_schedule", "num_train_timesteps")}
    files = {
        "image_noising_scheduler/scheduler_config.json": noising,
        "model_index.json": STAGE_2_INDEX,
        "scheduler/scheduler_config.json": {**SCHEDULER_CONFIG, "sample_max_value": 1.0},
        "unet/config.json": config,
    }
    _save_json(folder, files)


def _save_half(path: Path, weights: dict[str, Tensor], prefix: str):
    half = {
        name.removeprefix(prefix): weight.half().contiguous()
        for name, weight in weights.items()
        if name.startswith(prefix) and not name.endswith("encoder.embed_tokens.weight")  # shared.weight again
    }
    write_atomically(path, save(half, {"format": "pt"}))


def _save_json(folder: Path, files: dict[str, dict]):
    for name, content in files.items():
        write_atomically(folder / name, json.dumps(content, indent=2, default=str).encode())


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
    return cropped(F.pad(x, (most,) * 4, mode="replicate"), x.shape[-1], generator)


def cropped(x: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """A random size × size part of each picture [B, C, S, S]."""
    corners = torch.randint(x.shape[-1] - size + 1, (len(x), 2), generator=generator).tolist()
    parts = [picture[:, y : y + size, left : left + size] for picture, (y, left) in zip(x, corners, strict=True)]
    return torch.stack(parts)


class TextToPicture(nn.Module):
    """A text encoder and a UNet, of either stage; what is shipped are its two parts."""

    def __init__(self, encoder: nn.Module, unet: UNet):
        super().__init__()
        self.encoder, self.unet = encoder, unet

    def forward(self, x_t: Tensor, t: Tensor, batch: Batch, noise_level: Tensor | None = None) -> Tensor:
        embeds = self.encoder(batch.tokens, attention_mask=batch.mask).last_hidden_state
        return self.unet(x_t, t, self.unet.encode_text(embeds), noise_level)


def stage_1_loss(model: TextToPicture, batch: Batch, generator: torch.Generator, rows: slice = slice(None)) -> Tensor:
    """The loss of each picture, [B], at a random t for each.

    rows: this process's share of the batch; the noise is drawn for all, so that it does not depend on the shares
    """
    device = batch.x_0.device
    t = torch.randint(SCHEDULE.num_timesteps, (len(batch.x_0),), generator=generator).to(device)[rows]
    eps = torch.randn(batch.x_0.shape, generator=generator).to(device)[rows]
    batch = batch[rows]
    x_t = add_noise(batch.x_0, eps, t, SCHEDULE)
    return hybrid_loss(model(x_t, t, batch), batch.x_0, x_t, eps, t)


def stage_2_loss(
    model: TextToPicture,
    batch: Batch,
    generator: torch.Generator,
    rows: slice = slice(None),
    *,
    small: int,
    crop: int,
    max_noise_level: int = 100,
    offset: float = 0.1,
) -> Tensor:
    """As `stage_1_loss`, for crops of the pictures beside crops of what stage 2 sees of the small ones.

    small: the size of stage 1's pictures; crop: of the crops; offset: the noise's own brightness, of each channel
    The small pictures are noised to a random level, which the model is told, so that in sampling it forgives what
    stage 1 draws. They are upscaled whole and cropped then: a crop upscaled alone would lie a little differently.
    How a pixel lies still depends on its place, since `noised_upscaled` aligns the corners: near them it moves the
    small picture by 3/8 of a small pixel. A crop does not say where it is from, so a model that saw nothing but crops
    blurs or misplaces edges; a few thousand steps with `crop` the whole size mend that.
    Noisy timesteps count for more, see `hybrid_loss`: there eps hardly says how bright a picture is. The mean of so
    many pixels of x_t does, even at t = 950: a model that reads it there believes pure noise to be of a dull grey
    picture. An offset of the noise makes it read the small picture instead.
    Source: Imagen §2.4, arXiv 2205.11487; Guttenberg, Diffusion with Offset Noise, crosslabs.org, 2023.
    """
    device, count = batch.x_0.device, len(batch.x_0)
    t = torch.randint(SCHEDULE.num_timesteps, (count,), generator=generator).to(device)[rows]
    noise_level = torch.randint(max_noise_level, (count,), generator=generator).to(device)
    low_res = small_noised(batch.x_0, small, noise_level, generator)
    both = cropped(torch.cat([batch.x_0, low_res], dim=1), crop, generator)[rows]
    x_0, low_res = both.chunk(2, dim=1)
    eps = torch.randn((count, 3, crop, crop), generator=generator)
    eps = (eps + offset * torch.randn((count, 3, 1, 1), generator=generator)).to(device)[rows]
    x_t = add_noise(x_0, eps, t, SCHEDULE)
    output = model(torch.cat([x_t, low_res], dim=1), t, batch[rows], noise_level[rows])
    return hybrid_loss(output, x_0, x_t, eps, t, most=5.0)


def small_noised(x_0: Tensor, small: int, noise_level: int | Tensor, generator: torch.Generator) -> Tensor:
    """What stage 2 would see of pictures [B, 3, S, S], if stage 1 had drawn them small × small pixels large."""
    size = x_0.shape[-1]
    noise = torch.randn(x_0.shape, generator=generator).to(x_0.device)
    return noised_upscaled(F.avg_pool2d(x_0, size // small), (size, size), noise_level, lambda: noise)


def hybrid_loss(output: Tensor, x_0: Tensor, x_t: Tensor, eps: Tensor, t: Tensor, most: float = 1.0) -> Tensor:
    """L_simple + λ L_vlb of each picture, [B]: eps is learned from the first, the variance from the second alone.

    λ = 1/T and t is uniform, so the bound's term at t has the weight 1.
    most: 1 weighs all t alike; with more, where noise prevails the error of eps counts 1/SNR times, which is the error
        of x̂_0, but at most so many times
    Source: Improved DDPM eq. 16, arXiv 2102.09672; 1/SNR, Progressive Distillation §4, arXiv 2202.00512.
    """
    eps_hat, v = output.float().chunk(2, dim=1)
    alphas_cumprod = SCHEDULE.alphas_cumprod.to(t.device)[t].float()
    weight = ((1 - alphas_cumprod) / alphas_cumprod).clamp(1, most)
    simple = weight * (eps_hat - eps).square().flatten(1).mean(1)
    return simple + variational_bound(x_0, x_t, eps_hat.detach(), v, t, SCHEDULE)


@torch.no_grad()
def caption_gap(model: TextToPicture, batch: Batch, t: int = 800, seed: int = 0) -> dict[str, float]:
    """The loss of eps with the right captions, with those of other pictures, and with none; and how alike captions are.

    A model that listens has a smaller one with the right captions; where they are equal, it draws without listening.
    "alike" is the mean cosine between the pooled embeddings of two captions; near 1, the UNet cannot tell them apart.
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
    embeds = model.encoder(batch.tokens, attention_mask=batch.mask).last_hidden_state
    pooled = F.normalize(model.unet.encode_text(embeds).pooled.float(), dim=1)
    count = len(pooled)
    alike = (pooled.sum(0).square().sum() - count) / max(count * (count - 1), 1)
    return {**losses, "alike": alike.item()}


@torch.no_grad()
def upscaling_error(model: TextToPicture, batch: Batch, small: int, t: int = 500, noise_level: int = 50) -> dict:
    """Mean squared errors of bicubic upscaling and of stage 2's estimate of x_0, from the same small pictures."""
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(batch.x_0.shape, generator=generator).to(batch.x_0.device)
    times, levels = (torch.full((len(eps),), value, device=eps.device) for value in (t, noise_level))
    x_t = add_noise(batch.x_0, eps, t, SCHEDULE)
    low_res = small_noised(batch.x_0, small, noise_level, generator)
    eps_hat = model(torch.cat([x_t, low_res], dim=1), times, batch, levels).float().chunk(2, dim=1)[0]
    x_0 = predict_x0(x_t, eps_hat, t, SCHEDULE).clamp(-1, 1)
    size = batch.x_0.shape[-1]
    upscaled = F.interpolate(F.avg_pool2d(batch.x_0, size // small), (size, size), mode="bicubic").clamp(-1, 1)
    return {"stage_2": F.mse_loss(x_0, batch.x_0).item(), "bicubic": F.mse_loss(upscaled, batch.x_0).item()}


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
    """Train a sentencepiece model on captions, lower-cased as IF does, and write it as folder/spiece.model.

    Raises OSError when it cannot be written; then nothing is.
    """
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([caption.lower().strip() for caption in captions]),
        model_writer=model,
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        minloglevel=2,
    )
    write_atomically(folder / "spiece.model", model.getvalue())
