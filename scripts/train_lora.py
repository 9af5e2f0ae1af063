"""Teach IF a new thing from 3 to 5 images of it, with a LoRA, as DreamBooth does.

    python scripts/train_lora.py --images tests/data/boxing_glove --prompt "a photo of a zwx glove" --out out/glove
    python scripts/generate.py --lora out/glove --prompt "a photo of a zwx glove"
    python scripts/train_lora.py --model DeepFloyd/IF-I-M-v1.0 --images my_dog --prompt "a photo of a zwx dog" \\
        --class-prompt "a photo of a dog" --lr 1e-4 --steps 500 --out out/my_dog

The prompt has a rare word, which becomes the thing's name. --class-prompt, which may be given several times, names what
must not change: images of it, drawn beforehand, are learned with the new ones (prior preservation). With --upscaler,
stage 2 learns, from noisy small images, and --model is the stage 1 that has its text encoder. Only eps is learned, so
with a LoRA ddpm draws with the variance fixed_small. Writes to --out: pytorch_lora_weights.safetensors, which diffusers
loads, too; row.png with images before, the training images and images after; and state.safetensors. Ctrl-C saves and
stops; --resume goes on and ends with the same weights.
Source: DreamBooth §3, arXiv 2208.12242; LoRA, arXiv 2106.09685.
"""

import hashlib
import warnings
from argparse import Namespace
from functools import partial
from pathlib import Path

from shared.options import number, parser, pick, positive, positive_number, run
from shared.stages import MODEL, UPSCALER, model_name
from shared.training import add_run_options, check_run, end_training

import torch
from torch import Tensor

from ddpm.figures import save_grid
from ddpm.files import load_tensors, save_tensors
from ddpm.memory import check_memory
from ddpm.runs import STATE, check_same
from ifmodel import Cascade, UNet, load_unet
from ifmodel.dreambooth import dreambooth_loss, read_folder, train_lora
from ifmodel.jobs import Job
from ifmodel.lora import ATTENTION, RESNETS, add_lora
from ifmodel.lora_files import FILES
from ifmodel.stage import SCHEDULE, find_variant
from ifmodel.text import embed_prompts

SHOWN = 4  # images before, of training and after, in row.png
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
    source = {"metavar": "FOLDER_OR_HUB_ID"}
    options.add_argument("--model", default=MODEL, type=model_name, help=f"default: {MODEL}", **source)
    options.add_argument("--upscaler", help="a stage 2: it is this that learns", **source)
    help = "stage 2: the most noise on small images (default: twice that of drawing)"
    options.add_argument("--max-noise-level", type=positive, help=help)
    options.add_argument("--rank", type=positive, default=8, help="default: 8")
    help = "which learn: those of attention, or of the ResNets as well (default)"
    options.add_argument("--layers", choices=("attention", "all"), default="all", help=help)
    options.add_argument("--steps", type=positive, default=160, help="default: 160")
    options.add_argument("--batch-size", type=positive, default=4, help="default: 4")
    options.add_argument("--lr", type=positive_number, default=2e-3, help="falls to 0 in the end (default: 2e-3)")
    add_run_options(options, "out/lora")
    args = options.parse_args()
    args.upscaler = UPSCALER if args.upscaler == "tiny-if" else args.upscaler
    return args


def main():
    args = arguments()
    check_run(args)
    args.device, args.dtype = pick(args)
    stages = cascade_of(args).stages
    learning, upscaling = stages[-1], None
    if args.upscaler:
        highest = args.max_noise_level or 2 * int(learning.settings["noise_level"])
        if highest > SCHEDULE.num_timesteps:
            raise ValueError(f"--max-noise-level must be at most {SCHEDULE.num_timesteps}, not {highest}")
        upscaling = stages[0].config.sample_size, highest
    targets = ATTENTION if args.layers == "attention" else (*ATTENTION, *RESNETS)
    config = learning.config
    needed = config.activation_bytes(args.batch_size, config.sample_size, config.sample_size)
    check_memory(needed, f"training with {args.batch_size} images at a time", args.device)
    with torch.device("meta"):
        add_lora(UNet(config), args.rank, targets)  # so that a rank is refused before anything is drawn
    images = read_folder(args.images, config.sample_size)
    args.fingerprint = hashlib.sha256(images.numpy().tobytes()).hexdigest()[:12]
    if args.resume:  # refuses another recipe now, not after drawing
        check_same(args.out / STATE, load_tensors(args.out / STATE)[1], {"recipe": described(args)})
    embeds = embed_prompts(args.model, [args.prompt, *args.class_prompt], dtype=args.dtype, device=args.device)
    kept = class_images(args)
    unet = load_unet(learning.source, args.dtype, args.device, find_variant(learning, args.dtype))
    torch.manual_seed(args.seed)
    layers = add_lora(unet, args.rank, targets)

    sets = [(1.0, {args.prompt: images}), *([(args.class_weight, kept)] if kept else [])]
    loss_of = partial(dreambooth_loss, unet, sets, embeds, args.batch_size, upscaling=upscaling)
    options = {"dtype": args.dtype, "base": learning.source, "resume": args.resume}
    end_training(args, train_lora(layers, loss_of, args.out, described(args), **options), FILES[0])
    draw_row(args, images)


def cascade_of(args: Namespace, **options) -> Cascade:
    """Both stages, or stage 1 alone; made for each use, so that no other UNet stays in memory while one learns."""
    return Cascade(args.model, upscaler=args.upscaler, dtype=args.dtype, device=args.device, **options)


def class_images(args: Namespace) -> dict[str, Tensor]:
    """For each class prompt, images [K, 3, S, S] by the untrained model; kept in --out."""
    path, count = args.out / "class_images.safetensors", args.class_images
    if args.resume and path.exists():
        found, _ = load_tensors(path, args.class_prompt)
        return {prompt: found[prompt] for prompt in args.class_prompt}
    if not args.class_prompt:
        return {}
    jobs = [Job(prompt, range(args.seed, args.seed + count)) for prompt in args.class_prompt]
    drawn = cascade_of(args).draw_all(jobs, sampler="dpm++", eta=1.0, num_steps=20)
    kept = dict(zip(args.class_prompt, drawn, strict=True))
    save_tensors(path, kept, {})
    return kept


def described(args: Namespace) -> dict:
    """What decides the weights."""
    return {name: getattr(args, name) for name in RECIPE} | {"images": args.fingerprint}


def draw_row(args: Namespace, images: Tensor):
    """row.png: the prompt's images before, from the same seeds after, and between them what was learned from."""
    seeds = range(args.seed, args.seed + SHOWN)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* does not know")  # what it learned is new to the model before
        before, after = (
            cascade_of(args, lora=lora).draw(args.prompt, seeds=seeds, num_steps=50)
            for lora in ((), args.out / FILES[0])
        )
    shown = {"before": before, "training": images[:SHOWN], "after": after}
    labels = [label for label, part in shown.items() for _ in part]
    row = [image / 2 + 0.5 for part in shown.values() for image in part]
    save_grid(args.out / "row.png", [row], column_labels=labels, title=args.prompt, seed=args.seed)
    print(args.out / "row.png")


if __name__ == "__main__":
    run(main)
