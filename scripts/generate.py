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
from stages import check_size, check_stage, load_stage, watch
from torch import Tensor

from ddpm.schedule import leading_timesteps
from ifmodel.cascade import SCHEDULE, generate, upscale
from ifmodel.text import embed_prompts, load_embeds


def main():
    options = parser(__doc__)
    options.add_argument("--model", required=True, metavar="FOLDER_OR_HUB_ID", help="a stage-1 model")
    options.add_argument("--revision", help="branch, tag or commit of a Hub model")
    options.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    options.add_argument("--negative-prompt", default="", metavar="TEXT", help='the null prompt (default: "")')
    options.add_argument("--embeds", type=Path, metavar="FILE", help="prompts with their embeddings; spares T5")
    options.add_argument("--num-images", type=positive, default=1, help="pictures of each prompt (default: 1)")
    options.add_argument("--steps", type=positive, default=100, help="default: 100")
    options.add_argument("--guidance", type=number, default=7.0, help="γ (default: 7)")
    options.add_argument("--size", type=positive, nargs=2, metavar=("H", "W"), help="of stage 1 (default: the model's)")
    options.add_argument("--upscaler", metavar="FOLDER_OR_HUB_ID", help="a stage-2 model")
    options.add_argument("--upscaler-revision", help="branch, tag or commit of a Hub model")
    options.add_argument("--upscaler-steps", type=positive, default=50, help="default: 50")
    options.add_argument("--upscaler-guidance", type=number, default=4.0, help="default: 4")
    options.add_argument("--noise-level", type=int, default=250, help="0 to 999 (default: 250)")
    options.add_argument("--batch-size", type=positive, default=8, help="pictures at a time (default: 8)")
    options.add_argument("--seed", type=int, default=SEED, help=f"default: {SEED}")
    options.add_argument("--out", type=Path, default=Path("out/generated.png"), metavar="FILE.png")
    add_device_options(options, ("float32", "bfloat16", "float16"))
    args = options.parse_args()

    # what can be refused is refused before anything is computed
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    check_writable(args.out, ".png")
    if not 0 <= args.noise_level < SCHEDULE.num_timesteps:
        raise ValueError(f"--noise-level must be from 0 to 999, not {args.noise_level}")
    for steps in (args.steps, args.upscaler_steps):
        leading_timesteps(SCHEDULE.num_timesteps, steps)
    sample_size = check_stage(args.model, 1, args.revision).sample_size
    size = tuple(args.size or [sample_size] * 2)
    if args.upscaler:
        factor = check_stage(args.upscaler, 2, args.upscaler_revision).sample_size / sample_size

    prompts, embeds = get_embeds(args, dtype, device)
    labels = [prompt for prompt in prompts for _ in range(args.num_images)]
    seeds = [args.seed + k for _ in prompts for k in range(args.num_images)]
    batches = [slice(start, start + args.batch_size) for start in range(0, len(labels), args.batch_size)]
    largest = min(args.batch_size, len(labels))

    def conditions(batch: slice) -> dict:
        rows = [embeds[prompt] for prompt in labels[batch]]
        return {
            "prompt_embeds": torch.stack(rows).to(device, torch.float32),
            "null_embeds": embeds[args.negative_prompt][None].to(device, torch.float32),
            "seeds": seeds[batch],
        }

    unet = load_stage(args.model, dtype, device, args.revision)
    check_size(unet, size, largest, device)
    stage_1 = {"num_steps": args.steps, "guidance_scale": args.guidance, "size": size}
    with watch(unet, args.steps * len(batches), "stage 1") as callback:
        images = [generate(unet, **conditions(batch), **stage_1, callback=callback) for batch in batches]
    del unet
    if args.upscaler:
        unet = load_stage(args.upscaler, dtype, device, args.upscaler_revision)
        size = tuple(round(side * factor) for side in size)
        check_size(unet, size, largest, device)
        stage_2 = {"num_steps": args.upscaler_steps, "guidance_scale": args.upscaler_guidance}
        stage_2 |= {"noise_level": args.noise_level, "size": size}
        with watch(unet, args.upscaler_steps * len(batches), "stage 2") as callback:
            images = [
                upscale(unet, small, **conditions(batch), **stage_2, callback=callback)
                for small, batch in zip(images, batches, strict=True)
            ]
    save(args, prompts, torch.cat(images).cpu() / 2 + 0.5)


def get_embeds(args, dtype: torch.dtype, device: torch.device) -> tuple[list[str], dict[str, Tensor]]:
    """The prompts to draw, and the embeddings of these and of the null prompt."""
    embeds = load_embeds(args.embeds) if args.embeds else {}
    prompts = args.prompt or [prompt for prompt in embeds if prompt not in ("", args.negative_prompt)]
    if not prompts:
        raise ValueError("there is nothing to draw: give --prompt, or --embeds with some prompts in it")
    unknown = [prompt for prompt in [*prompts, args.negative_prompt] if prompt not in embeds]
    if unknown:
        embeds |= embed_prompts(args.model, unknown, dtype=dtype, device=device, revision=args.revision)
    return prompts, embeds


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
