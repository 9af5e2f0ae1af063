"""What is trained: a text encoder, first against images, then together with a UNet.

An untrained text encoder says nearly the same for every caption, and a UNet learns to ignore it. So the encoder is
first trained contrastively, to match images and captions; `caption_loss_gap` then shows whether the UNet uses them.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.tools.files import write_atomically
from ifmodel.tiny.losses import Batch
from ifmodel.unet import UNet


def build_encoder(vocab_size: int, dim: int = 128, layers: int = 2) -> nn.Module:
    """An untrained T5 encoder, transformers' own, of the same kind as IF's."""
    from transformers import T5Config, T5EncoderModel

    shape = {"d_model": dim, "d_kv": 32, "d_ff": 2 * dim, "num_layers": layers, "num_heads": dim // 32}
    return T5EncoderModel(T5Config(vocab_size=vocab_size, dropout_rate=0.0, feed_forward_proj="gated-gelu", **shape))


class ImageEncoder(nn.Module):
    """The images' side of the contrast: [B, 3, S, S] in [-1, 1] -> [B, D]. Discarded after training."""

    def __init__(self, dim: int, width: int = 32):
        super().__init__()

        def block(i: int, o: int) -> nn.Sequential:
            convolution = nn.Conv2d(i, o, 3, stride=2, padding=1)
            return nn.Sequential(convolution, nn.GroupNorm(8, o), nn.GELU())

        widths = (width, 2 * width, 4 * width, 4 * width)
        self.blocks = nn.Sequential(*(block(i, o) for i, o in zip((3, *widths), widths, strict=False)))
        self.out = nn.Linear(4 * width, dim)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] in [-1, 1] -> [B, D], the mean over all places."""
        return self.out(self.blocks(images).mean((2, 3)))


class ContrastiveText(nn.Module):
    """A T5 encoder and an image encoder, which learn to match captions and images.

    The caption's side is the mean over all 77 positions, padding too, since that is what the UNet pools.
    Source: CLIP §2.3, arXiv 2103.00020.
    """

    def __init__(self, encoder: nn.Module, dim: int = 128):
        super().__init__()
        self.encoder = encoder
        self.caption = nn.Sequential(nn.LayerNorm(encoder.config.d_model), nn.Linear(encoder.config.d_model, dim))
        self.tower = ImageEncoder(dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, images: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Similarities [B images, B captions], which should be largest on the diagonal."""
        embeds = self.encoder(tokens, attention_mask=mask).last_hidden_state
        captions = F.normalize(self.caption(embeds.mean(1)), dim=1)
        return self.log_scale.exp().clamp(max=100) * F.normalize(self.tower(images), dim=1) @ captions.T


def contrastive_loss(similarities: Tensor) -> Tensor:
    """Each image finds its caption, each caption its image, among those of the batch."""
    right = torch.arange(len(similarities), device=similarities.device)
    return (F.cross_entropy(similarities, right) + F.cross_entropy(similarities.T, right)) / 2


class TextToImage(nn.Module):
    """A text encoder and a UNet, of either stage; what is shipped are its two parts."""

    def __init__(self, encoder: nn.Module, unet: UNet):
        super().__init__()
        self.encoder, self.unet = encoder, unet

    def forward(self, x_t: Tensor, t: Tensor, batch: Batch, noise_level: Tensor | None = None) -> Tensor:
        """eps and v [B, 6, S, S] for x_t [B, 3, S, S], in stage 2 [B, 6, S, S] with the small images.

        t, noise_level: [B]; of the batch only the captions are used
        """
        return self.unet(x_t, t, self.unet.encode_text(self.embed(batch)), noise_level)

    def embed(self, batch: Batch) -> Tensor:
        """The captions' embeddings, [B, 77, D]."""
        return self.encoder(batch.tokens, attention_mask=batch.mask).last_hidden_state


@torch.no_grad()
def zero_init(unet: UNet):
    """Zero the last layer of every residual branch, which then starts as the identity, and of the whole: it says 0."""
    for name, parameter in unet.named_parameters():
        if ".conv2." in name or ".to_out." in name or name.startswith("conv_out."):
            parameter.zero_()


def train_tokenizer(captions: Sequence[str], folder: Path, vocab_size: int = 1500):
    """Train a sentencepiece model on captions, lower-cased as IF does, and write it as folder/spiece.model.

    Raises OSError when it cannot be written, and leaves no file then.
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
