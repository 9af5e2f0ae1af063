"""Teach IF a new thing from 3 to 5 images of it, with a LoRA, as DreamBooth does.

    python scripts/train_lora.py --images tests/data/boxing_glove --prompt "a photo of a zwx glove" --out out/glove
    python scripts/generate.py --lora out/glove --prompt "a photo of a zwx glove"
    python scripts/train_lora.py --model DeepFloyd/IF-I-M-v1.0 --images my_dog --prompt "a photo of a zwx dog" \\
        --class-prompt "a photo of a dog" --lr 1e-4 --steps 500 --out out/my_dog

The prompt has a rare word, which becomes the thing's name. --class-prompt, which may be given several times, says what
else must stay as it is: images of it, drawn beforehand, are learned beside the new ones (prior preservation). With
--upscaler it is stage 2 that learns, beside noisy small images, and --model is the stage 1 that has its text encoder.
Only eps is learned, so with a LoRA ddpm draws with the variance fixed_small. Writes pytorch_lora_weights.safetensors,
which diffusers loads, too, to --out; row.png with images before, the training images and images after; and
state.safetensors. Ctrl-C saves and stops; --resume goes on and ends with the same weights.
Source: DreamBooth §3, arXiv 2208.12242; LoRA, arXiv 2106.09685.
"""

import hashlib
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

from shared.figures import save_grid
from shared.images import read_picture
from shared.options import (
    SEED,
    add_device_options,
    check_run,
    end_training,
    number,
    parser,
    pick_device,
    pick_dtype,
    positive,
    positive_number,
    run,
    seed_number,
)
from shared.stages import MODEL, UPSCALER, model_name

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm.files import load_tensors, save_tensors
from ddpm.losses import ddpm_loss
from ddpm.runs import STATE, Run, check_same, step_seed
from ifmodel import Cascade, Text, UNet, load_unet
from ifmodel.cascade import Job
from ifmodel.lora import ATTENTION, FILES, RESNETS, LoRALayer, add_lora, save_lora
from ifmodel.stage import SCHEDULE, find_variant, noised_upscaled
from ifmodel.text import embed_prompts

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
SHOWN = 4  # images before, of training and after, in row.png
WARMUP = 20  # steps until the learning rate is the whole one
RECIPE = ("prompt", "class_prompt", "class_images", "class_weight", "model", "upscaler", "max_noise_level", "rank")
RECIPE += ("layers", "steps", "batch_size", "lr", "seed")


def arguments() -> Namespace:
    options = parser(__doc__)
    options.add_argument("--images", type=Path, required=True, metavar="FOLDER", help="images of the new thing")
    options.add_argument("--prompt", required=True, metavar="TEXT", help="what they show, with a rare word")
    help = "what must stay as it is; may be given several times"
    options.add_argument("--class-prompt", action="append", default=[], metavar="TEXT", help=help)
    options.add_argument("--class-images", type=positive, default=16, help="drawn of each of these (default: 16)")
    options.add_argument("--class-weight", type=number, default=1.0, help="of their loss (default: 1)")
    options.add_argument(
        "--model", default=MODEL, type=model_name, metavar="FOLDER_OR_HUB_ID", help=f"default: {MODEL}"
    )
    options.add_argument("--upscaler", metavar="FOLDER_OR_HUB_ID", help="a stage 2: it is this that learns")
    help = "stage 2: the most noise on small images (default: twice that of drawing)"
    options.add_argument("--max-noise-level", type=positive, help=help)
    options.add_argument("--rank", type=positive, default=8, help="default: 8")
    help = "which learn: those of attention, or of the ResNets as well (default)"
    options.add_argument("--layers", choices=("attention", "all"), default="all", help=help)
    options.add_argument("--steps", type=positive, default=160, help="default: 160")
    options.add_argument("--batch-size", type=positive, default=4, help="default: 4")
    options.add_argument("--lr", type=positive_number, default=2e-3, help="falls to 0 in the end (default: 2e-3)")
    options.add_argument("--resume", action="store_true", help="go on with the run in --out")
    options.add_argument("--seed", type=seed_number, default=SEED, help=f"default: {SEED}")
    options.add_argument("--out", type=Path, default=Path("out/lora"), metavar="FOLDER", help="default: out/lora")
    add_device_options(options)
    args = options.parse_args()
    args.upscaler = UPSCALER if args.upscaler == "tiny-if" else args.upscaler
    return args


def main():
    args = arguments()
    check_run(args)
    args.device = pick_device(args.device)
    args.dtype = pick_dtype(args.dtype, args.device)
    stages = cascade_of(args).stages
    learning, upscaling = stages[-1], None
    if args.upscaler:
        highest = args.max_noise_level or 2 * int(learning.settings["noise_level"])
        if highest > SCHEDULE.num_timesteps:
            raise ValueError(f"--max-noise-level must be at most {SCHEDULE.num_timesteps}, not {highest}")
        upscaling = stages[0].config.sample_size, highest
    targets = ATTENTION if args.layers == "attention" else (*ATTENTION, *RESNETS)
    with torch.device("meta"):
        add_lora(UNet(learning.config), args.rank, targets)  # so that a rank is refused before anything is drawn
    images = read_folder(args.images, learning.config.sample_size)
    args.fingerprint = hashlib.sha256(images.numpy().tobytes()).hexdigest()[:12]
    if args.resume:  # of another recipe, perhaps
        check_same(args.out / STATE, load_tensors(args.out / STATE)[1], {"recipe": recipe_of(args)})
    embeds = embed_prompts(args.model, [args.prompt, *args.class_prompt], dtype=args.dtype, device=args.device)
    kept = class_images(args)
    unet = load_unet(learning.source, args.dtype, args.device, find_variant(learning, args.dtype))
    torch.manual_seed(args.seed)
    layers = add_lora(unet, args.rank, targets)

    def loss_of(generator: torch.Generator) -> Tensor:
        loss = 0.0
        for weight, data in ((1.0, {args.prompt: images}), (args.class_weight, kept)):
            if data:
                x_0, prompts = draw_batch(data, args.batch_size, generator)
                prompt_embeds = torch.stack([embeds[prompt] for prompt in prompts])
                loss = loss + weight * eps_loss(unet, x_0.to(args.device), prompt_embeds, generator, upscaling)
        return loss

    fit(args, layers, loss_of, learning.source)
    draw_row(args, images)


def cascade_of(args: Namespace, **options) -> Cascade:
    """Both stages, or stage 1 alone; made anew each time, so that its UNets are not kept beside the one that learns."""
    return Cascade(args.model, upscaler=args.upscaler, dtype=args.dtype, device=args.device, **options)


def read_folder(folder: Path, side: int) -> Tensor:
    """All images of a folder [N, 3, side, side] in [-1, 1]. Raises FileNotFoundError or ValueError, naming the file."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {folder}: --images names one with 3 to 5 images of the new thing")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise FileNotFoundError(f"{folder} has no images ({' '.join(SUFFIXES)})")
    return torch.cat([read_picture(path, (side, side)) for path in paths])


def class_images(args: Namespace) -> dict[str, Tensor]:
    """For each class prompt, images [K, 3, S, S] that the model draws of it as it is now; kept in --out."""
    path, count = args.out / "class_images.safetensors", args.class_images
    if args.resume and path.exists():
        found, _ = load_tensors(path)
        return {prompt: found[prompt] for prompt in args.class_prompt}
    if not args.class_prompt:
        return {}
    jobs = [Job(prompt, range(args.seed, args.seed + count)) for prompt in args.class_prompt]
    drawn = cascade_of(args).draw_all(jobs, sampler="dpm++", eta=1.0, num_steps=20)
    kept = dict(zip(args.class_prompt, drawn, strict=True))
    save_tensors(path, kept, {})
    return kept


def draw_batch(data: dict[str, Tensor], size: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
    """Images [size, 3, S, S] of random prompts, with these; all moved by up to 1/16 each way, their edges repeated."""
    names, images = list(data), []
    prompts = [names[k] for k in torch.randint(len(names), (size,), generator=generator).tolist()]
    for prompt in prompts:
        images.append(data[prompt][torch.randint(len(data[prompt]), (1,), generator=generator).item()])
    side, most = images[0].shape[-1], images[0].shape[-1] // 16
    y, x = torch.randint(2 * most + 1, (2,), generator=generator).tolist()
    padded = F.pad(torch.stack(images), (most,) * 4, mode="replicate")
    return padded[:, :, y : y + side, x : x + side], prompts


def eps_loss(
    unet: UNet,
    x_0: Tensor,
    prompt_embeds: Tensor,
    generator: torch.Generator,
    upscaling: tuple[int, int] | None = None,
) -> Tensor:
    """‖eps - eps_θ(x_t, t, text)‖² of images [B, 3, S, S] and their prompts [B, 77, D_text]; v has no part in it.

    generator: on the CPU; upscaling: for stage 2, the side of the small images and the bound of their noise level
    """
    noise_level, low_res = None, None
    if upscaling is not None:
        small, most = upscaling
        noise = torch.randn(x_0.shape, generator=generator).to(x_0.device)
        noise_level = torch.randint(most, (len(x_0),), generator=generator).to(x_0.device)
        low_res = F.interpolate(x_0, (small, small), mode="area")
        low_res = noised_upscaled(low_res, x_0.shape[-2:], noise_level, lambda: noise)

    def model(x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        seen = x_t if low_res is None else torch.cat([x_t, low_res], dim=1)
        return unet(seen, t, text, noise_level)[:, :3]

    seed = torch.randint(2**31, (1,), generator=generator).item()
    on_device = torch.Generator(x_0.device).manual_seed(seed)
    return ddpm_loss(model, x_0, (unet.encode_text(prompt_embeds),), SCHEDULE, on_device)


def fit(args: Namespace, layers: dict[str, LoRALayer], loss_of: Callable[[torch.Generator], Tensor], base: str):
    """Train the updates to --steps, or until stopped; a step's batch and noise follow from the seed and its number.

    base: the model's name, for the file
    """
    pieces = {f"{name}.{piece}": getattr(layer, piece) for name, layer in layers.items() for piece in ("down", "up")}
    weights = {name: piece.weight for name, piece in pieces.items()}
    optimizer = torch.optim.AdamW(weights.values(), weight_decay=0.01)
    write = partial(save_lora, args.out / FILES[0], layers, base)
    run = Run(args.out, {"lora": weights}, optimizer, args.steps, {"recipe": recipe_of(args)}, args.dtype, write=write)
    if args.resume:
        run.restore()
    for step in run.steps(args.batch_size):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / WARMUP) * (1 - step / args.steps)
        loss = loss_of(torch.Generator().manual_seed(step_seed(args.seed, step)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.losses[step] = loss.detach()
    end_training(args, run.step == args.steps, FILES[0])


def recipe_of(args: Namespace) -> dict:
    """What decides the weights."""
    return {name: getattr(args, name) for name in RECIPE} | {"images": args.fingerprint}


def draw_row(args: Namespace, images: Tensor):
    """row.png: the prompt's images before, from the same seeds after, and between them what was learned from."""
    seeds = range(args.seed, args.seed + SHOWN)
    before, after = (
        cascade_of(args, lora=lora).draw(args.prompt, seeds=seeds, num_steps=50) for lora in ((), args.out / FILES[0])
    )
    shown = [*before, *images[:SHOWN], *after]
    labels = [
        label for label, part in (("before", before), ("training", images[:SHOWN]), ("after", after)) for _ in part
    ]
    row = [(image / 2 + 0.5).clamp(0, 1) for image in shown]
    zoom = max(1, 96 // images.shape[-1])
    save_grid(args.out / "row.png", [row], column_labels=labels, title=args.prompt, zoom=zoom, seed=args.seed)
    print(args.out / "row.png")


if __name__ == "__main__":
    run(main)
