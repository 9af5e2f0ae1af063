"""An independent judge of images: which thing is it, and in which style?

A small CNN that learns the names and styles of tiny-if's drawings, while they are placed, turned, coloured, blurred,
high-passed and noised at random. It knows nothing of diffusion. Its penultimate features are the space in which images
are compared, and in which the Fréchet distance of ddpm.mnist.judge is measured. Below it is what
`measures` are made of: functions of images and a judge.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ddpm.components import low_pass
from ddpm.restoration import psnr
from ddpm.views import View
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
        """Images [B, 3, H, W] in [-1, 1] -> logits of names [B, N] and of styles [B, S]."""
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


def share(right: Tensor) -> float:
    """The share of True in [N], to four digits; NaN when there is nothing."""
    return round(right.double().mean().item(), 4) if len(right) else float("nan")


def accuracy(judge: ImageJudge, x: Tensor, things: Tensor, styles: Tensor) -> dict:
    """How often the judge is right about drawings [N, 3, H, W] of these things and styles, [N], and how often sure.

    Also "by style", the shares of right things and of right styles among the drawings in each.
    """
    thing, sure, style = judged(judge, x)
    right = {"thing": thing == things, "style": style == styles}
    shares = {name: share(hit) for name, hit in right.items()}
    return {**shares, "sure": share(sure > SURE), "by style": by_style(right, styles)}


def by_style(right: dict[str, Tensor], styles: Tensor) -> dict[str, dict[str, float]]:
    """The `share` of each of several tensors [N] among the images of each style that there is; styles: [N]."""
    there = {list(STYLES)[k]: styles == k for k in styles.unique().tolist()}
    return {style: {name: share(hit[rows]) for name, hit in right.items()} for style, rows in there.items()}


def found(judge: ImageJudge, x: Tensor, things: Tensor, styles: Tensor) -> dict:
    """How often images show what was asked for.

    x: [N, 3, H, W] in [-1, 1]; things, styles: [N], what was asked for
    Returns the shares "plain", of what was asked for in style 0; "styled", of the rest, the thing in its style;
    "named", of the rest, the thing in whatever style; and "by style", as `accuracy` does.
    """
    thing, _, style = judged(judge, x)
    right, plain = {"thing": thing == things, "style": style == styles}, styles == 0
    shares = {"plain": share(right["thing"][plain]), "styled": share((right["thing"] & right["style"])[~plain])}
    return {**shares, "named": share(right["thing"][~plain]), "by style": by_style(right, styles)}


def some_thing(judge: ImageJudge, x: Tensor) -> dict[str, float]:
    """How many of the images [N, 3, H, W] show some thing, whichever, and how many different ones they show."""
    thing, sure, _ = judged(judge, x)
    return {"some thing": share(sure > SURE), "different things": len(thing[sure > SURE].unique())}


def apart(features: Tensor) -> float:
    """How different images are: the mean of 1 - cosine over all pairs of their features [N, F]."""
    unit, count = F.normalize(features, dim=1), len(features)
    return ((count**2 - unit.sum(0).square().sum()) / (count * (count - 1))).item()


def nearest(features: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """1 - cosine from each of features [N, F] to the nearest of known [M, F], and which that is; [N] each."""
    near, which = (F.normalize(features, dim=1) @ F.normalize(known, dim=1).T).max(1)
    return 1 - near, which


def alike_pairs(x: Tensor, view: View, count: int, sigma: float = 4.0) -> list[tuple[int, int]]:
    """Which of the images [N, 3, H, W] make good illusions: the pairs that are most alike when blurred.

    view: in which the second of a pair is seen
    Returns at most `count` pairs, the most alike first; an image is in one of them at most.
    """
    first, second = (low_pass(seen, sigma).flatten(1) for seen in (x, view.view(x)))
    distances, chosen = torch.cdist(first, second).fill_diagonal_(torch.inf), []
    while len(chosen) < count and distances.isfinite().any():
        pair = divmod(distances.argmin().item(), len(x))
        chosen.append(pair)
        distances[list(pair), :] = distances[:, list(pair)] = torch.inf
    return chosen


def both_found(judge: ImageJudge, seen: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Of illusions, whether their first thing is found in one way of seeing them, and their second in the other.

    seen: the images in both ways, [P · T, 3, H, W] each: T tries of every pair after one another
    pairs: the P pairs of things
    Returns two of bool [P, T].
    """
    wanted = torch.tensor(pairs).repeat_interleave(len(seen[0]) // len(pairs), 0)
    first, second = ((judged(judge, x)[0] == wanted[:, k]).view(len(pairs), -1) for k, x in enumerate(seen))
    return first, second


def fidelity(judge: ImageJudge, x: Tensor, original: Tensor) -> dict[str, float]:
    """How near images [N, 3, H, W] in [-1, 1] are to the originals: mean PSNR in dB, mean 1 - cosine of features."""
    near = F.cosine_similarity(features_of(judge, x), features_of(judge, original))
    distance = round((1 - near).mean().item(), 5)
    return {"PSNR": round(psnr(x, original).mean().item(), 2), "feature distance": distance}


def saturation(x: Tensor) -> float:
    """The mean distance of the largest channel from the smallest, 0 to 1, of images [N, 3, H, W] in [-1, 1]."""
    return ((x.amax(1) - x.amin(1)) / 2).mean().item()
