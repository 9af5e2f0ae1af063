"""The losses of both stages, their batches, and what is measured during training.

The model is a `TextToImage` throughout.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.estimates import unguided
from ddpm.losses import variational_bound
from ddpm.process import add_noise, ddim_step, predict_x0
from ddpm.sampling import noise_source, sdedit
from ifmodel.stage import SCHEDULE, STAGE_1_THRESHOLD, noised_upscaled
from ifmodel.t5 import Tokenizer
from ifmodel.tiny.data import CaptionedImages, draw_images
from ifmodel.unet import UNet


@dataclass(frozen=True)
class Batch:
    """What one step sees: images [B, 3, S, S] in [-1, 1], tokens and their mask [B, 77]."""

    x_0: Tensor
    tokens: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same on another device."""
        return Batch(*(tensor.to(device) for tensor in (self.x_0, self.tokens, self.mask)))

    def __getitem__(self, rows: slice) -> "Batch":
        """Some of its images, with their captions."""
        return Batch(self.x_0[rows], self.tokens[rows], self.mask[rows])


def draw_batch(
    data: CaptionedImages,
    tokenizer: Tokenizer,
    count: int,
    size: int,
    generator: torch.Generator,
    *,
    drop: float = 0.1,
    variety: float = 1.0,
    unnamed: float = 0.1,
) -> Batch:
    """`count` images of size × size with their captions, see `draw_images`.

    drop: the share of captions that become "", for classifier-free guidance; unnamed: see `draw_images`
    """
    x_0, captions = draw_images(data, size, count, generator, variety, unnamed)
    dropped = (torch.rand(count, generator=generator) < drop).tolist()
    tokens, mask = tokenizer(["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)])
    return Batch(x_0, tokens, mask)


def cropped(x: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """A random size × size part of each image [B, C, S, S]."""
    corners = torch.randint(x.shape[-1] - size + 1, (2, len(x), 1), generator=generator, device=generator.device)
    y, left = corners.to(x.device) + torch.arange(size, device=x.device)  # [B, size] each
    images = torch.arange(len(x), device=x.device)[:, None, None]
    return x[images, :, y[:, :, None], left[:, None, :]].permute(0, 3, 1, 2)


def stage_1_loss(model: nn.Module, batch: Batch, generator: torch.Generator, rows: slice = slice(None)) -> Tensor:
    """The loss of each image, [B], at a random t for each.

    The noisy timesteps decide what an image shows, so they count for more, see `hybrid_loss`.

    rows: this process's share of the batch; the noise is drawn for all, so that it does not depend on the shares
    """
    device, given = batch.x_0.device, {"generator": generator, "device": generator.device}
    t = torch.randint(SCHEDULE.num_timesteps, (len(batch.x_0),), **given).to(device)[rows]
    eps = torch.randn(batch.x_0.shape, **given).to(device)[rows]
    batch = batch[rows]
    x_t = add_noise(batch.x_0, eps, t, SCHEDULE)
    return hybrid_loss(model(x_t, t, batch), batch.x_0, x_t, eps, t, least=0.25, most=4.0)


def stage_2_loss(
    model: nn.Module,
    batch: Batch,
    generator: torch.Generator,
    rows: slice = slice(None),
    *,
    small: int,
    crop: int,
    stage_1: UNet | None = None,
    share: float = 0.0,
    max_noise_level: int = 100,
    offset: float = 0.1,
) -> Tensor:
    """As `stage_1_loss`, for crops of the images, concatenated with crops of what stage 2 sees of the small ones.

    small: the size of stage 1's images; crop: of the crops; offset: the standard deviation of the noise's brightness
    stage_1, share: what draws a share of the small images anew, see `redrawn`
    The small images are noised to a random level, also passed to the model, which makes it robust to stage-1
    artefacts. They are cropped after upscaling: a crop upscaled alone would be slightly displaced.
    `noised_upscaled` aligns the corners, so near them it displaces the small image by 3/8 of a small pixel. A crop
    does not show where it is from, so a model trained on crops alone blurs or misplaces edges; a few thousand steps
    with `crop` the whole size correct that.
    Noisy timesteps count for more, see `hybrid_loss`: there eps hardly depends on how bright an image is. The mean
    of x_t's many pixels does, even at t = 950, but a model that relies on it takes pure noise for a dull grey image.
    Offset noise makes it read the brightness off the small image instead.
    Source: Imagen §2.4, arXiv 2205.11487; Guttenberg, Diffusion with Offset Noise, crosslabs.org, 2023.
    """
    device, given = batch.x_0.device, {"generator": generator, "device": generator.device}
    count = len(batch.x_0)
    t = torch.randint(SCHEDULE.num_timesteps, (count,), **given).to(device)[rows]
    noise_level = torch.randint(max_noise_level, (count,), **given).to(device)
    again = partial(redrawn, model, stage_1, batch, round(share * count), generator) if share else None
    low_res = small_noised(batch.x_0, small, noise_level, generator, again)
    both = cropped(torch.cat([batch.x_0, low_res], dim=1), crop, generator)[rows]
    x_0, low_res = both.chunk(2, dim=1)
    eps = torch.randn((count, 3, crop, crop), **given)
    eps = (eps + offset * torch.randn((count, 3, 1, 1), **given)).to(device)[rows]
    x_t = add_noise(x_0, eps, t, SCHEDULE)
    output = model(torch.cat([x_t, low_res], dim=1), t, batch[rows], noise_level[rows])
    return hybrid_loss(output, x_0, x_t, eps, t, most=5.0)


def small_noised(
    x_0: Tensor,
    small: int,
    noise_level: int | Tensor,
    generator: torch.Generator,
    again: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """What stage 2 would see of images [B, 3, S, S], if stage 1 had drawn them small × small pixels large.

    again: what is done with the small ones before
    """
    size = x_0.shape[-1]
    noise = torch.randn(x_0.shape, generator=generator, device=generator.device).to(x_0.device)
    x = F.avg_pool2d(x_0, size // small)
    return noised_upscaled(x if again is None else again(x), (size, size), noise_level, lambda: noise)


@torch.no_grad()
def redrawn(
    model: nn.Module, stage_1: UNet, batch: Batch, count: int, generator: torch.Generator, x: Tensor, num_steps: int = 4
) -> Tensor:
    """Small images [B, 3, S, S], of which stage 1 has drawn the first `count` anew: noised to a t, and denoised again.

    So stage 2 sees how stage 1 draws, and still knows what the large image is. Source: SDEdit, arXiv 2108.01073.
    model: whose text encoder is stage 1's, too; the first t is random, from 100 to 500
    """
    start = int(torch.randint(100, 501, (1,), generator=generator, device=generator.device))
    seeds = torch.randint(2**31, (count,), generator=generator, device=generator.device).tolist()
    text = stage_1.encode_text(model.embed(batch[:count]))
    loop = {"noise": noise_source(seeds, x.shape[1:], x.device), "step": ddim_step, "threshold": STAGE_1_THRESHOLD}
    timesteps = torch.linspace(start, 0, num_steps + 1).int().tolist()
    return torch.cat([sdedit(unguided(stage_1, text), x[:count], 0, timesteps, SCHEDULE, **loop), x[count:]])


def hybrid_loss(
    output: Tensor, x_0: Tensor, x_t: Tensor, eps: Tensor, t: Tensor, least: float = 1.0, most: float = 1.0
) -> Tensor:
    """L_simple + λ L_vlb of each image, [B]: eps is learned from the first, the variance from the second alone.

    λ = 1/T and t is uniform, so the bound's term at t has the weight 1.
    least, most: the error of eps counts 1/SNR times, which is the error of x̂_0, but at least and at most so many
        times; 1 and 1 weigh all t alike
    Source: Improved DDPM eq. 16, arXiv 2102.09672; 1/SNR, Progressive Distillation §4, arXiv 2202.00512.
    """
    eps_hat, v = output.float().chunk(2, dim=1)
    alphas_cumprod = SCHEDULE.alphas_cumprod.to(t.device)[t].float()
    weight = ((1 - alphas_cumprod) / alphas_cumprod).clamp(least, most)
    simple = weight * (eps_hat - eps).square().flatten(1).mean(1)
    return simple + variational_bound(x_0, x_t, eps_hat.detach(), v, t, SCHEDULE)


@torch.no_grad()
def caption_loss_gap(model: nn.Module, batch: Batch, t: int = 800, seed: int = 0) -> dict[str, float]:
    """The loss of eps with the right captions, with those of other images, and with none; and how alike they are.

    It is smallest with the right captions if the model uses them; if all are equal, the model ignores them.
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
    pooled = F.normalize(model.unet.encode_text(model.embed(batch)).pooled.float(), dim=1)
    count = len(pooled)
    alike = (pooled.sum(0).square().sum() - count) / max(count * (count - 1), 1)
    return {**losses, "alike": alike.item()}


@torch.no_grad()
def upscaling_error(model: nn.Module, batch: Batch, small: int, t: int = 500, noise_level: int = 50) -> dict:
    """Mean squared errors of bicubic upscaling and of stage 2's estimate of x_0, from the same small images."""
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
