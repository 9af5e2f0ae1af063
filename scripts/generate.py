"""Text to pictures with DeepFloyd IF: 64 × 64 with stage 1, and 256 × 256 with --upscaler, stage 2.

    python scripts/generate.py --model DeepFloyd/IF-I-M-v1.0 --prompt "a photo of a dog" --out out/dog.png
    python scripts/generate.py --model DeepFloyd/IF-I-XL-v1.0 --upscaler DeepFloyd/IF-II-L-v1.0 \\
        --prompt "a rocket ship" --prompt "a man wearing a hat" --num-images 4 --out out/grid.png

A model is a folder as diffusers saves it, or a Hub id. One prompt and one image make the picture itself; more
make a labelled grid, with each picture beside it in a file of its own. Picture k of a prompt starts from
seed + k, in both stages. T5 runs only for prompts that --embeds and the cache do not know, and is freed before
a UNet is loaded; stage 1 is freed before stage 2 is loaded.
"""

from pathlib import Path

import torch
from common import SEED, add_device_options, check_writable, number, parser, pick_device, pick_dtype, positive, run
from figures import save_grid, save_image
from stages import load_stage, progress
from torch import Tensor

from ifmodel import UNet
from ifmodel.cascade import generate, upscale
from ifmodel.text import embed_prompts, load_embeds
from ifmodel.weights import check_memory


def main():
    options = parser(__doc__)
    options.add_argument("--model", required=True, metavar="FOLDER_OR_HUB_ID", help="a stage-1 model")
    options.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    options.add_argument("--negative-prompt", default="", metavar="TEXT", help='the null prompt (default: "")')
    options.add_argument("--embeds", type=Path, metavar="FILE", help="prompts with their embeddings; spares T5")
    options.add_argument("--num-images", type=positive, default=1, help="pictures of each prompt (default: 1)")
    options.add_argument("--steps", type=positive, default=100, help="default: 100")
    options.add_argument("--guidance", type=number, default=7.0, help="γ (default: 7)")
    options.add_argument("--size", type=positive, nargs=2, metavar=("H", "W"), help="of stage 1 (default: the model's)")
    options.add_argument("--upscaler", metavar="FOLDER_OR_HUB_ID", help="a stage-2 model")
    options.add_argument("--upscaler-steps", type=positive, default=50, help="default: 50")
    options.add_argument("--upscaler-guidance", type=number, default=4.0, help="default: 4")
    options.add_argument(
        "--noise-level", type=int, default=250, help="on the upscaled picture, 0 to 999 (default: 250)"
    )
    options.add_argument("--batch-size", type=positive, default=8, help="pictures at a time (default: 8)")
    options.add_argument("--seed", type=int, default=SEED, help=f"default: {SEED}")
    options.add_argument("--out", type=Path, default=Path("out/generated.png"), metavar="FILE.png")
    add_device_options(options, ("float32", "bfloat16", "float16"))
    args = options.parse_args()

    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    check_writable(args.out, ".png")
    if not 0 <= args.noise_level < 1000:
        raise ValueError(f"--noise-level must be from 0 to 999, not {args.noise_level}")
    prompts, embeds = get_embeds(args, dtype, device)
    labels = [prompt for prompt in prompts for _ in range(args.num_images)]
    seeds = [args.seed + k for _ in prompts for k in range(args.num_images)]
    batches = [slice(start, start + args.batch_size) for start in range(0, len(labels), args.batch_size)]

    def conditions(batch: slice) -> dict:
        null = [embeds[args.negative_prompt]] * len(labels[batch])
        return {
            "prompt_embeds": torch.stack([embeds[prompt] for prompt in labels[batch]]).to(device, torch.float32),
            "null_embeds": torch.stack(null).to(device, torch.float32),
            "seeds": seeds[batch],
        }

    unet = load_stage(args.model, 1, dtype, device)
    size = tuple(args.size or [unet.config.sample_size] * 2)
    check_size(unet, size, min(args.batch_size, len(labels)), device)
    stage_1 = {"num_steps": args.steps, "guidance_scale": args.guidance, "size": size}
    sample_size = unet.config.sample_size
    with progress(args.steps * len(batches), "stage 1") as callback:
        images = [generate(unet, **conditions(batch), **stage_1, callback=callback) for batch in batches]
    del unet
    if args.upscaler:
        unet = load_stage(args.upscaler, 2, dtype, device)
        size = tuple(side * unet.config.sample_size // sample_size for side in size)
        check_size(unet, size, min(args.batch_size, len(labels)), device)
        stage_2 = {"num_steps": args.upscaler_steps, "guidance_scale": args.upscaler_guidance}
        stage_2 |= {"noise_level": args.noise_level, "size": size}
        with progress(args.upscaler_steps * len(batches), "stage 2") as callback:
            images = [
                upscale(unet, small, **conditions(batch), **stage_2, callback=callback)
                for small, batch in zip(images, batches, strict=True)
            ]
    save(args, prompts, torch.cat(images).cpu() / 2 + 0.5)


def get_embeds(args, dtype: torch.dtype, device: torch.device) -> tuple[list[str], dict[str, Tensor]]:
    """The prompts to draw, and the embeddings of these and of the null prompt."""
    embeds = load_embeds(args.embeds) if args.embeds else {}
    prompts = args.prompt or [prompt for prompt in embeds if prompt != args.negative_prompt]
    if not prompts:
        raise ValueError("there is nothing to draw: give --prompt, or --embeds with some prompts in it")
    unknown = [prompt for prompt in [*prompts, args.negative_prompt] if prompt not in embeds]
    if unknown:
        embeds |= embed_prompts(args.model, unknown, dtype=dtype, device=device)
    return prompts, embeds


def check_size(unet: UNet, size: tuple[int, int], batch_size: int, device: torch.device):
    """Refuse a height or width that the UNet cannot halve often enough, or that the memory cannot hold."""
    if any(side % unet.size_multiple for side in size):
        raise ValueError(f"height and width must be multiples of {unet.size_multiple}, not {size[0]} × {size[1]}")
    needed = unet.activation_bytes(2 * batch_size, *size)  # guidance doubles the batch
    check_memory(needed, f"{batch_size} pictures of {size[0]} × {size[1]} at a time", device)


def save(args, prompts: list[str], images: Tensor):
    """The picture itself, or a labelled grid and each picture beside it."""
    if len(images) == 1:
        save_image(args.out, images[0], args.seed)
    else:
        rows = images.split(args.num_images)
        for row, pictures in enumerate(rows):
            for k, picture in enumerate(pictures):
                save_image(args.out.with_stem(f"{args.out.stem}_{row}_{k}"), picture, args.seed + k)
        columns = [f"seed {args.seed + k}" for k in range(args.num_images)]
        zoom = max(1, 128 // images.shape[-1])
        save_grid(args.out, rows, row_labels=prompts, column_labels=columns, zoom=zoom, seed=args.seed)
    print(args.out)


if __name__ == "__main__":
    run(main)
