"""Teaching a model a new thing from a few images of it: DreamBooth, with a LoRA.

    images = read_folder(Path("tests/data/boxing_glove"), 32)
    teach(images, Recipe("a photo of a zwx glove"), Path("out/glove"))
    Cascade("tiny-if", lora="out/glove").draw("a photo of a zwx glove", seeds=[1, 2, 3])

Source: DreamBooth §3, arXiv 2208.12242; LoRA, arXiv 2106.09685.
"""

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm.losses import ddpm_loss
from ddpm.tools.files import load_tensors, save_tensors
from ddpm.tools.images import read_image
from ddpm.tools.memory import check_memory
from ddpm.tools.runs import STATE, Run, check_folder, check_same, step_seed
from ifmodel.cascade import Cascade
from ifmodel.jobs import Job
from ifmodel.lora import ATTENTION, RESNETS, LoRALayer, add_lora, save_lora
from ifmodel.lora_files import FILES
from ifmodel.stage import SCHEDULE, find_variant, noised_upscaled
from ifmodel.t5 import embed_prompts
from ifmodel.unet import Text, UNet
from ifmodel.weights import load_unet

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
WARMUP = 20  # steps in which the learning rate rises


@dataclass(frozen=True)
class Recipe:
    """What, besides the images, decides the LoRA that `teach` trains.

    prompt: what the images show, with a rare word, which becomes the thing's name
    class_prompt: what must stay as it is; class_images: drawn of each of these; class_weight: of their loss
    model, upscaler: the stage 1 that learns or, with an upscaler, the one whose text encoder that stage 2 has
    max_noise_level: of the small images of stage 2; twice that of drawing when None
    layers: which learn: those of "attention", or "all", of the ResNets as well
    lr: falls to 0 in the end
    """

    prompt: str
    class_prompt: Sequence[str] = ()
    class_images: int = 16
    class_weight: float = 1.0
    model: str = "tiny-if/I"
    upscaler: str | None = None
    max_noise_level: int | None = None
    rank: int = 8
    layers: str = "all"
    steps: int = 160
    batch_size: int = 4
    lr: float = 2e-3
    seed: int = 20040805


def teach(
    images: Tensor,
    recipe: Recipe,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    resume: bool = False,
) -> bool:
    """Teach one stage of a model, with a LoRA, what images [N, 3, S, S] in [-1, 1] of its own size show.

    Writes pytorch_lora_weights.safetensors, state.safetensors and, with class prompts, class_images.safetensors to the
    folder. Ctrl-C saves and stops; `resume` goes on, to the same weights.
    Returns whether it is complete. Raises ValueError, before anything is drawn, for what does not fit, or for the state
    of another run, and when the loss is not finite.
    """
    cascade = partial(Cascade, recipe.model, upscaler=recipe.upscaler or "none", dtype=dtype, device=device)
    stages = cascade().stages
    learning, upscaling = stages[-1], None
    if recipe.upscaler:
        highest = recipe.max_noise_level or 2 * int(learning.settings["noise_level"])
        if highest > SCHEDULE.num_timesteps:
            raise ValueError(f"max_noise_level must be at most {SCHEDULE.num_timesteps}, not {highest}")
        upscaling = stages[0].config.sample_size, highest
    needed = learning.config.activation_bytes(recipe.batch_size, *images.shape[-2:])
    check_memory(needed, f"training with {recipe.batch_size} images at a time", device)
    targets = ATTENTION if recipe.layers == "attention" else (*ATTENTION, *RESNETS)
    with torch.device("meta"):
        add_lora(UNet(learning.config), recipe.rank, targets)  # so that a rank is refused before anything is drawn
    shown = hashlib.sha256(images.numpy().tobytes()).hexdigest()[:12]
    described = asdict(recipe) | {"class_prompt": list(recipe.class_prompt), "images": shown}
    check_folder(folder, resume)
    if resume:  # refuses another recipe now, not after drawing
        check_same(folder / STATE, load_tensors(folder / STATE)[1], {"recipe": described})
    found = embed_prompts(stages[0].source, [recipe.prompt, *recipe.class_prompt], dtype=dtype, device=device)
    embeds = {prompt: tensor.to(device) for prompt, tensor in found.items()}  # T5's output comes on the CPU
    kept = class_images(cascade, recipe, folder / "class_images.safetensors", resume)
    unet = load_unet(learning.source, dtype, device, find_variant(learning, dtype))
    torch.manual_seed(recipe.seed)
    layers = add_lora(unet, recipe.rank, targets)
    sets = [(1.0, {recipe.prompt: images}), *([(recipe.class_weight, kept)] if kept else [])]
    loss_of = partial(dreambooth_loss, unet, sets, embeds, recipe.batch_size, upscaling=upscaling)
    return train_lora(layers, loss_of, folder, described, dtype=dtype, base=learning.source, resume=resume)


def class_images(cascade: Callable[[], Cascade], recipe: Recipe, path: Path, resume: bool) -> dict[str, Tensor]:
    """For each class prompt, images [K, 3, S, S] by the untrained model; kept in a file, for a run that is resumed.

    cascade(): made and freed here, so that no other UNet stays in memory while one learns
    """
    if resume and path.exists():
        found, _ = load_tensors(path, recipe.class_prompt)
        return {prompt: found[prompt] for prompt in recipe.class_prompt}
    if not recipe.class_prompt:
        return {}
    jobs = [Job(prompt, range(recipe.seed, recipe.seed + recipe.class_images)) for prompt in recipe.class_prompt]
    drawn = cascade().draw_all(jobs, sampler="dpm++", eta=1.0, num_steps=20)
    kept = dict(zip(recipe.class_prompt, drawn, strict=True))
    save_tensors(path, kept, {})
    return kept


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
    Source: DreamBooth §3.3 (prior preservation), arXiv 2208.12242.
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
