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

import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path

from shared.options import learning_rate, number, parser, pick, positive, run
from shared.stages import MODEL, UPSCALER, model_name
from shared.training import add_run_options, check_run, end_training

from torch import Tensor

from ddpm.tools.figures import save_grid
from ifmodel import Cascade
from ifmodel.dreambooth import Recipe, read_folder, teach
from ifmodel.lora_files import FILES

SHOWN = 4  # images before, of training and after, in row.png


def arguments() -> Namespace:
    options = parser(__doc__, "--images FOLDER --prompt TEXT ")
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
    options.add_argument("--lr", type=learning_rate, default=2e-3, help="falls to 0 in the end (default: 2e-3)")
    add_run_options(options, "out/lora")
    args = options.parse_args()
    args.upscaler = UPSCALER if args.upscaler == "tiny-if" else args.upscaler
    return args


def main():
    args = arguments()
    check_run(args)
    device, dtype = pick(args)
    cascade = partial(Cascade, args.model, upscaler=args.upscaler, dtype=dtype, device=device)
    images = read_folder(args.images, cascade().sizes[-1][0])
    recipe = Recipe(**{field.name: getattr(args, field.name) for field in fields(Recipe)})
    complete = teach(images, recipe, args.out, dtype=dtype, device=device, resume=args.resume)
    end_training(args, complete, FILES[0])
    draw_row(args, cascade, images)


def draw_row(args: Namespace, cascade: Callable[..., Cascade], images: Tensor):
    """row.png: the prompt's images before, from the same seeds after, and between them what was learned from."""
    seeds = range(args.seed, args.seed + SHOWN)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* does not know")  # what it learned is new to the model before
        before, after = (
            cascade(lora=lora).draw(args.prompt, seeds=seeds, num_steps=50) for lora in ((), args.out / FILES[0])
        )
    shown = {"before": before, "training": images[:SHOWN], "after": after}
    labels = [label for label, part in shown.items() for _ in part]
    row = [image / 2 + 0.5 for part in shown.values() for image in part]
    save_grid(args.out / "row.png", [row], column_labels=labels, title=args.prompt, seed=args.seed)
    print(args.out / "row.png")


if __name__ == "__main__":
    run(main)
