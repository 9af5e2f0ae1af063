"""An independent judge of images: which thing is it, and in which style?

A small CNN that learns the names and styles of tiny-if's drawings, while they are placed, turned and coloured as in its
training, and blurred, high-passed and noised as well. It knows nothing of diffusion. Its penultimate features are the
space in which images are compared, and in which the Fréchet distance of ddpm.mnist.judge is measured.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ddpm.components import low_pass
from ifmodel.tiny.data import CaptionedImages, draw_rows
from ifmodel.tiny.styles import STYLES

SIZE = 64  # what the judge sees; other sizes are resized
SURE = 0.5  # an image that shows this thing more probably than all others together shows it


class ImageJudge(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] -> logits of names [B, N] and of styles [B, S]."""

    def __init__(self, num_names: int, num_styles: int = len(STYLES), width: int = 64, num_features: int = 128):
        super().__init__()
        self.config = {"num_names": num_names, "num_styles": num_styles, "width": width, "num_features": num_features}

        def block(i: int, o: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())

        widths = (3, width, 2 * width, 4 * width, 8 * width)
        self.blocks = nn.Sequential(*(block(i, o) for i, o in itertools.pairwise(widths)))
        self.penultimate = nn.Linear(8 * width * (SIZE // 16) ** 2, num_features)
        self.names, self.styles = nn.Linear(num_features, num_names), nn.Linear(num_features, num_styles)

    def features(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> [B, num_features]."""
        if x.shape[-1] != SIZE:
            x = F.interpolate(x, (SIZE, SIZE), mode="bicubic", antialias=True)
        return self.penultimate(self.blocks(x).flatten(1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = F.relu(self.features(x))
        features = F.dropout(features, 0.2, self.training)
        return self.names(features), self.styles(features)


def high_passed(x: Tensor, sigma: float = 2.0) -> Tensor:
    """What a blur takes away from images [B, 3, H, W], on grey; σ in pixels of a 64-pixel image."""
    return x - low_pass(x, sigma, kernel_size=13)


def train_judge(
    data: CaptionedImages,
    *,
    steps: int = 6000,
    batch_size: int = 64,
    side: int = 32,
    seed: int = 20040805,
    dtype: torch.dtype = torch.float32,
) -> ImageJudge:
    """Train a judge on the drawings of `data`, shown at side × side pixels, as the images are that it will judge.

    dtype: float32, or bfloat16 with autocast, faster where it is native
    """
    torch.manual_seed(seed)
    judge = ImageJudge(len(data.names)).to(memory_format=torch.channels_last).train()
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(steps), desc="training the judge", leave=False):
        x, rows, _ = draw_rows(data, side, batch_size, generator)
        with autocast:
            by_name, by_style = judge(augment(x).contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(by_name.float(), data.things[rows], label_smoothing=0.05)
        loss = loss + F.cross_entropy(by_style.float(), data.styles[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


def augment(x: Tensor) -> Tensor:
    """Images [B, 3, H, W] as [B, 3, 64, 64]; of each four, one is blurred, one high-passed and one noised."""
    x = F.interpolate(x, (SIZE, SIZE), mode="bicubic", antialias=True)
    sigma = 0.5 + 2.5 * torch.rand(()).item()
    kinds = [low_pass(x[0::4], sigma, kernel_size=19), high_passed(x[1::4]), x[2::4], x[3::4]]
    kinds[2] = kinds[2] + 0.4 * torch.rand(()) * torch.randn_like(kinds[2])
    return torch.cat(kinds)[torch.cat([torch.arange(k, len(x), 4) for k in range(4)]).argsort()]


@torch.no_grad()
def judged(judge: ImageJudge, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For images [B, 3, H, W] in [-1, 1]: which thing each shows, how sure that is, in [0, 1], and in which style."""
    names, styles = (torch.cat(parts) for parts in zip(*(judge(batch) for batch in x.split(256)), strict=True))
    sure, thing = names.softmax(1).max(1)
    return thing, sure, styles.argmax(1)


@torch.no_grad()
def features_of(judge: ImageJudge, x: Tensor) -> Tensor:
    """The judge's features [B, num_features] of images [B, 3, H, W] in [-1, 1], in float64."""
    return torch.cat([judge.features(batch) for batch in x.split(256)]).double()
