"""An independent judge of small pictures: which of the training pictures does this one look like?

A small CNN that learns to tell the training pictures apart, by name and by style, while they are shifted, noised,
blurred and high-passed. It knows nothing of diffusion. Its penultimate features are the space in which the nearest
training picture is looked up, and in which the Fréchet distance of ddpm.mnist.judge is measured.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ddpm.components import low_pass

SIZE = 64  # what the judge sees; other sizes are resized


class ImageJudge(nn.Module):
    """Pictures [B, 3, H, W] in [-1, 1] -> logits of names [B, N] and of styles [B, S]."""

    def __init__(self, num_names: int, num_styles: int, width: int = 32, num_features: int = 64):
        super().__init__()
        self.config = {"num_names": num_names, "num_styles": num_styles, "width": width, "num_features": num_features}

        def block(i: int, o: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())

        widths = (3, width, 2 * width, 4 * width, 4 * width)
        self.blocks = nn.Sequential(*(block(i, o) for i, o in itertools.pairwise(widths)))
        self.penultimate = nn.Linear(4 * width * (SIZE // 16) ** 2, num_features)
        self.names, self.styles = nn.Linear(num_features, num_names), nn.Linear(num_features, num_styles)

    def features(self, x: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] -> [B, 64]."""
        if x.shape[-1] != SIZE:
            x = F.interpolate(x, (SIZE, SIZE), mode="bicubic", antialias=True)
        return self.penultimate(self.blocks(x).flatten(1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = F.relu(self.features(x))
        return self.names(features), self.styles(features)


def high_passed(x: Tensor, sigma: float = 2.0) -> Tensor:
    """What a blur takes away from pictures [B, 3, H, W], on grey; σ in pixels of a 64-pixel picture."""
    return x - low_pass(x, sigma, kernel_size=13)


def train_picture_judge(pictures: Tensor, *, steps: int = 2000, batch_size: int = 64, seed: int = 20040805):
    """Train a judge on pictures [N, S, 3, H, W] uint8, of N names in S styles. Returns a `ImageJudge`."""
    torch.manual_seed(seed)
    judge = ImageJudge(*pictures.shape[:2]).train()
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    small = torch.stack([resized(styles) for styles in pictures])
    for _ in tqdm(range(steps), desc="training the judge", leave=False):
        names, styles = (torch.randint(count, (batch_size,)) for count in small.shape[:2])
        by_name, by_style = judge(augment(small[names, styles]))
        loss = F.cross_entropy(by_name, names, label_smoothing=0.05) + F.cross_entropy(by_style, styles)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


def resized(pictures: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] uint8 -> [B, 3, 64, 64] in [-1, 1]."""
    return F.interpolate(pictures / 127.5 - 1, (SIZE, SIZE), mode="bicubic", antialias=True)


def augment(x: Tensor) -> Tensor:
    """Pictures [B, 3, 64, 64], each shifted, a quarter each blurred, high-passed and noised as well."""
    dy, dx = torch.randint(-5, 6, (2,)).tolist()
    x = F.pad(x, (5, 5, 5, 5), mode="replicate")[:, :, 5 + dy : 5 + dy + SIZE, 5 + dx : 5 + dx + SIZE]
    blurred, high, noised, plain = x.chunk(4)
    sigma = 0.5 + 2.5 * torch.rand(()).item()
    noised = noised + 0.4 * torch.rand(()) * torch.randn_like(noised)
    return torch.cat([low_pass(blurred, sigma, kernel_size=19), high_passed(high), noised, plain])


@torch.no_grad()
def nearest(judge: ImageJudge, x: Tensor, known: Tensor) -> Tensor:
    """For pictures [B, 3, H, W]: which of the known features [K, 64] is nearest, by the angle between them, [B]."""
    return (F.normalize(features_of(judge, x), dim=1) @ F.normalize(known, dim=1).T).argmax(1)


@torch.no_grad()
def features_of(judge: ImageJudge, x: Tensor) -> Tensor:
    """The judge's features [B, 64] of pictures [B, 3, H, W] in [-1, 1], in float64."""
    return torch.cat([judge.features(batch) for batch in x.split(256)]).double()
