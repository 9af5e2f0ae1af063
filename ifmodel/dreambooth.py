"""Teaching a model a new thing from a few images of it: DreamBooth, with a LoRA.

Source: DreamBooth §3, arXiv 2208.12242; LoRA, arXiv 2106.09685.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm.images import read_image
from ddpm.losses import ddpm_loss
from ddpm.runs import Run, step_seed
from ifmodel.lora import LoRALayer, save_lora
from ifmodel.lora_files import FILES
from ifmodel.stage import SCHEDULE, noised_upscaled
from ifmodel.unet import Text, UNet

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
WARMUP = 20  # steps in which the learning rate rises


def read_folder(folder: Path, side: int) -> Tensor:
    """All images of a folder [N, 3, side, side] in [-1, 1]; warns of what it leaves out, such as a phone's .heic.

    Raises FileNotFoundError or ValueError, naming the file.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {folder}: it should hold 3 to 5 images of the new thing")
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    paths = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not paths:
        raise FileNotFoundError(f"{folder} has no images ({' '.join(SUFFIXES)})")
    if left := [path.name for path in files if path not in paths]:
        named = f"{', '.join(left[:5])}{', …' if len(left) > 5 else ''}"
        warnings.warn(f"{folder}: {named} {'is' if len(left) == 1 else 'are'} left out", stacklevel=2)
    return torch.cat([read_image(path, (side, side)) for path in paths])


def random_batch(data: dict[str, Tensor], size: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
    """Images [size, 3, S, S] of random prompts, and these; all are shifted by up to 1/16 to each side, edges repeated.

    data: {prompt: images [N, 3, S, S]}
    """
    names, images = list(data), []
    prompts = [names[k] for k in torch.randint(len(names), (size,), generator=generator).tolist()]
    for prompt in prompts:
        images.append(data[prompt][torch.randint(len(data[prompt]), (1,), generator=generator).item()])
    side, furthest = images[0].shape[-1], images[0].shape[-1] // 16
    y, x = torch.randint(2 * furthest + 1, (2,), generator=generator).tolist()
    padded = F.pad(torch.stack(images), (furthest,) * 4, mode="replicate")
    return padded[:, :, y : y + side, x : x + side], prompts


def eps_loss(
    unet: UNet,
    x_0: Tensor,
    prompt_embeds: Tensor,
    generator: torch.Generator,
    upscaling: tuple[int, int] | None = None,
) -> Tensor:
    """‖eps - eps_θ(x_t, t, text)‖² of images [B, 3, S, S] and their prompts [B, 77, D_text]; v is not trained.

    generator: on the CPU; upscaling: for stage 2, the side of the small images and the bound of their noise level
    """
    noise_level, low_res = None, None
    if upscaling is not None:
        small, levels = upscaling
        noise = torch.randn(x_0.shape, generator=generator).to(x_0.device)
        noise_level = torch.randint(levels, (len(x_0),), generator=generator).to(x_0.device)
        low_res = F.interpolate(x_0, (small, small), mode="area")
        low_res = noised_upscaled(low_res, x_0.shape[-2:], noise_level, lambda: noise)

    def model(x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        seen = x_t if low_res is None else torch.cat([x_t, low_res], dim=1)
        return unet(seen, t, text, noise_level)[:, :3]

    seed = torch.randint(2**31, (1,), generator=generator).item()
    on_device = torch.Generator(x_0.device).manual_seed(seed)
    return ddpm_loss(model, x_0, (unet.encode_text(prompt_embeds),), SCHEDULE, on_device)


def dreambooth_loss(
    unet: UNet,
    sets: Sequence[tuple[float, dict[str, Tensor]]],
    embeds: dict[str, Tensor],
    batch_size: int,
    generator: torch.Generator,
    upscaling: tuple[int, int] | None = None,
) -> Tensor:
    """The weighted sum of `eps_loss`, of a batch each: of the new thing, and of what must stay as it is.

    sets: a weight and {prompt: images [N, 3, S, S]} each; embeds: prompts -> [77, D_text], on the UNet's device
    Source: DreamBooth §3.2 (prior preservation).
    """
    loss = 0.0
    for weight, data in sets:
        x_0, prompts = random_batch(data, batch_size, generator)
        prompt_embeds = torch.stack([embeds[prompt] for prompt in prompts])
        loss = loss + weight * eps_loss(unet, x_0.to(prompt_embeds.device), prompt_embeds, generator, upscaling)
    return loss


def train_lora(
    layers: dict[str, LoRALayer],
    loss_of: Callable[[torch.Generator], Tensor],
    folder: Path,
    recipe: dict,
    *,
    dtype: torch.dtype = torch.float32,
    base: str | None = None,
    resume: bool = False,
) -> bool:
    """Train the layers of `add_lora` with AdamW; the learning rate rises for WARMUP steps, then falls to 0.

    Writes folder/state.safetensors, to resume, and the LoRA, pytorch_lora_weights.safetensors.

    loss_of(generator): the loss of a batch; each step has a generator of its own
    recipe: "steps", "batch_size", "lr", "seed", and all else that must not have changed when the run is resumed
    dtype: of the base model; base: its name, for the file
    Returns whether the run is complete. Raises ValueError when the loss is not finite, or the state is of another run.
    """
    pieces = {f"{name}.{piece}": getattr(layer, piece) for name, layer in layers.items() for piece in ("down", "up")}
    weights, steps, lr = {name: piece.weight for name, piece in pieces.items()}, recipe["steps"], recipe["lr"]
    optimizer = torch.optim.AdamW(weights.values(), weight_decay=0.01)
    write = partial(save_lora, folder / FILES[0], layers, base)
    run = Run(folder, {"lora": weights}, optimizer, steps, {"recipe": recipe}, dtype, write=write)
    if resume:
        run.restore()
    for step in run.steps(recipe["batch_size"]):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / WARMUP) * (1 - step / steps)
        loss = loss_of(torch.Generator().manual_seed(step_seed(recipe["seed"], step)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.losses[step] = loss.detach()
    return run.step == steps
