"""What differs between training stage 1 and stage 2: model, loss, what is measured, and the sheet of samples."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm.sampling import guided, noise_source, sample
from ddpm.schedule import leading_timesteps
from ddpm.tools.files import write_atomically
from ifmodel.stage import LEARNED, SCHEDULE, STAGE_1_THRESHOLD, upscale
from ifmodel.t5 import Tokenizer, load_encoder
from ifmodel.tiny.data import CaptionedImages
from ifmodel.tiny.export import save_stage_1, save_stage_2
from ifmodel.tiny.losses import (
    Batch,
    caption_loss_gap,
    small_noised,
    stage_1_loss,
    stage_2_loss,
    upscaling_error,
)
from ifmodel.tiny.models import TextToImage, train_tokenizer, zero_init
from ifmodel.tiny.styles import STYLES
from ifmodel.unet import UNet, UNetConfig
from ifmodel.weights import fetch, load_unet

SHEET_THINGS = ["a rocket ship", "a dog", "a skull", "an old man", "a snowy mountain village", "a pear", "a house"]


class Stage1:
    """Stage 1 in training: text encoder and UNet learn together."""

    def __init__(self, config: dict, encoder, unet: UNet, tokenizer: Path, device: torch.device):
        self.config, self.folder, self.tokenizer = config, tokenizer, Tokenizer(tokenizer)
        self.model = TextToImage(encoder, unet).to(device, memory_format=torch.channels_last)
        self.parameters = [{"params": unet.parameters()}, {"params": encoder.parameters(), "share": 0.1}]
        self.loss = stage_1_loss

    def watch(self, held: Batch) -> dict[str, float]:
        """What the log says of it, `caption_loss_gap`."""
        return caption_loss_gap(self.model, held)

    def sheet(self, held: Batch, seed: int, data: CaptionedImages) -> tuple[list[Tensor], dict]:
        """Rows of images in [0, 1], things across, styles down, γ = 4 and 25 steps; and their labels."""
        styles, things = sheet_prompts(data)
        unet, device = self.model.unet, held.x_0.device
        prompts = [style.format(thing) for style in styles for thing in things]
        tokens, mask = (tensor.to(device) for tensor in self.tokenizer([*prompts, ""]))
        text = unet.encode_text(self.model.encoder(tokens, attention_mask=mask).last_hidden_state)
        estimate = guided(unet, text[list(range(len(prompts)))], text[[len(prompts)] * len(prompts)], 4.0)
        noise = noise_source([seed] * len(prompts), held.x_0.shape[1:], device)
        loop = {"step": LEARNED, "threshold": STAGE_1_THRESHOLD}
        images = sample(estimate, leading_timesteps(SCHEDULE.num_timesteps, 25), SCHEDULE, noise=noise, **loop)
        labels = {"row_labels": [style.format("…") for style in styles], "column_labels": things}
        return list((images / 2 + 0.5).split(len(things))), labels

    def save(self, folder: Path, weights: dict[str, Tensor], data: CaptionedImages):
        """Write weights of the model, such as the averaged ones, as `save_stage_1` does; data: for the vocabulary."""
        save_stage_1(folder, self.config, weights, self.model.encoder, self.folder, data.vocabulary())


class Stage2:
    """Stage 2 in training, for a stage 1, which stays as it is, with its text encoder.

    crop, redrawn: of `stage_2_loss`, the size of its crops and its share
    """

    def __init__(
        self,
        config: dict,
        encoder,
        unet: UNet,
        stage_1: UNet,
        tokenizer: Path,
        device: torch.device,
        *,
        crop: int,
        redrawn: float = 0.0,
    ):
        self.config, self.tokenizer, self.small = config, Tokenizer(tokenizer), stage_1.config.sample_size
        self.model = TextToImage(encoder.requires_grad_(False), unet).to(device, memory_format=torch.channels_last)
        self.parameters = [{"params": unet.parameters()}]
        self.loss = partial(stage_2_loss, small=self.small, crop=crop, stage_1=stage_1.to(device), share=redrawn)

    def watch(self, held: Batch) -> dict[str, float]:
        """What the log says of it, `upscaling_error` of a few images."""
        return upscaling_error(self.model, held[:16], self.small)

    def sheet(self, held: Batch, seed: int, data: CaptionedImages) -> tuple[list[Tensor], dict]:
        """Rows of images in [0, 1]: the small ones, stage 2's, and the originals; and their labels."""
        few, size = held[:6], held.x_0.shape[-1]
        embeds = self.model.embed(few)
        small = F.avg_pool2d(few.x_0, size // self.small)
        options = {"num_steps": 25, "guidance_scale": 1.0, "noise_level": 50, "size": (size, size)}
        images = upscale(self.model.unet, small, embeds, embeds, seeds=[seed] * len(small), **options)
        enlarged = small_noised(few.x_0, self.small, 0, torch.Generator().manual_seed(0))
        rows = [(x / 2 + 0.5).clamp(0, 1) for x in (enlarged, images, few.x_0)]
        return rows, {"row_labels": [f"{self.small} px", "stage 2", f"{size} px"], "column_labels": [""] * len(small)}

    def save(self, folder: Path, weights: dict[str, Tensor], data: CaptionedImages):
        """Write weights of the model, such as the averaged ones, as `save_stage_2` does."""
        save_stage_2(folder, self.config, weights)


def sheet_prompts(data: CaptionedImages) -> tuple[list[str], list[str]]:
    """Templates of the styles that the data has, and SHEET_THINGS; the first things of data that lacks one of these."""
    styles = [style.templates[0] for number, style in enumerate(STYLES.values()) if number in data.styles]
    known = {phrase for phrases in data.phrases for phrase in phrases}
    first = [phrases[0] for phrases in data.phrases[: len(SHEET_THINGS)]]
    return styles, SHEET_THINGS if known.issuperset(SHEET_THINGS) else first


def start_tokenizer(folder: Path, start: str | None, captions: Sequence[str]):
    """Write folder/spiece.model: that of the stage 1 `start`, or a new one, see `train_tokenizer`."""
    if start is None:
        train_tokenizer(captions, folder)
    else:
        vocabulary = fetch(start, "tokenizer", ["spiece.model"]) / "spiece.model"
        write_atomically(folder / "spiece.model", vocabulary.read_bytes())


def start_encoder(source: str, tokenizer: Path):
    """The T5 encoder of a stage 1, in float32. Raises as `load_encoder` does."""
    return load_encoder(fetch(source, "text_encoder", ["*.json", "*.safetensors"]), Tokenizer(tokenizer))


def start_unet(config: dict, start: str | None) -> UNet:
    """An untrained UNet of this config, or one with the weights of the model `start`, which must be of this shape."""
    if start is None:
        zero_init(unet := UNet(UNetConfig.from_dict(config)))
        return unet
    return load_unet(start, pack=False).train().requires_grad_(True)
