"""Train a small IF, text encoder, stage 1 and stage 2, on a folder of captioned images.

    python scripts/train_if.py --data emoji --curated --size 16 --out out/16
    python scripts/train_if.py --data emoji --curated --start out/16/model --out out/stage-1
    python scripts/train_if.py --data emoji --curated --stage-2-of out/stage-1/model --out out/stage-2
    python scripts/train_if.py --data my_images --start tiny-if/I --out out/mine
    torchrun --nproc-per-node 2 scripts/train_if.py --data emoji --out out/stage-1

Stage 1: first a tokenizer is trained on the captions, and the text encoder against the images (--text-steps); then
the encoder and the UNet together. Small images are cheap and teach which caption is of what: begin with --size 16, go
on with --start. Stage 2 keeps the text encoder of its stage 1, and learns on crops, which are cheap; let it finish on
whole images, which alone show where a pixel lies (--start out/stage-2/model --crop 128).
Writes to --out: state.safetensors (for --resume); every --every steps and at the last a line of log.csv and
samples.png; and model/, with the averaged weights, which scripts/generate.py and diffusers load. The log's columns are
the loss and, for stage 1, what it is with the right captions, with others' and with none (right should become the
smallest), and alike, the mean cosine of two captions' embeddings (near 1, they say nothing); for stage 2 its error and
bicubic upscaling's. Ctrl-C saves and stops; --resume goes on and ends with the same weights, bit for bit, on the same
CPU with as many threads. While the text encoder is trained, before the UNet, Ctrl-C saves nothing. Under torchrun the
processes share each batch; on several hosts, --out must be a shared folder. --resume with more --steps trains for
longer, at the learning rate of a run that long.
"""

import os
import sys
from argparse import Namespace
from dataclasses import fields
from functools import partial
from pathlib import Path

from shared.options import LARGEST, learning_rate, parser, positive, run
from shared.stages import MODEL, UPSCALER
from shared.training import add_run_options, check_run, end_training

import torch
from torch import Tensor

from ddpm.tools.devices import pick_device, pick_dtype
from ddpm.tools.distributed import num_processes, rank, start_group, wait
from ddpm.tools.figures import save_grid
from ddpm.tools.files import fingerprint
from ifmodel.tiny.captions import curated
from ifmodel.tiny.data import CaptionedImages
from ifmodel.tiny.export import stage_1_config, stage_2_config
from ifmodel.tiny.loading import load_captioned
from ifmodel.tiny.stages import Stage2, start_encoder, start_tokenizer, start_unet
from ifmodel.tiny.training import Recipe, begin_stage_1, check_room, train_stage
from ifmodel.unet import UNetConfig
from ifmodel.weights import fetch, load_config, load_unet


def arguments() -> Namespace:
    options = parser(__doc__, "--data FOLDER ")
    options.add_argument("--data", type=Path, required=True, help="folder with images and metadata.jsonl")
    options.add_argument("--curated", action="store_true", help="take our list of names out of the emoji folder")
    help = "keep one artist's drawings of a third of the things, and 5 %% of all, out: the log measures on them"
    options.add_argument("--hold-out", action="store_true", help=help)
    help = "how much place, size, turn, hue and background vary (default: 1)"
    options.add_argument("--variety", type=float, default=1.0, help=help)
    help = 'share of the UNet\'s captions that name no thing, such as "a photo"; A5 to A7 ask for these (default: 0.1)'
    options.add_argument("--unnamed", type=float, default=0.1, help=help)
    options.add_argument("--stage-2-of", metavar="FOLDER", help="train stage 2 for this stage 1")
    help = "begin with the weights of this stage, ours or another run's model/, rather than with random ones"
    options.add_argument("--start", metavar="FOLDER", help=help)
    help = "with --start: train a new tokenizer and text encoder, for other words; the UNet alone keeps its weights"
    options.add_argument("--new-text", action="store_true", help=help)
    options.add_argument("--size", type=positive, help="height and width (default: 32; stage 2: 128)")
    options.add_argument("--crop", type=positive, default=64, help="stage 2: trains on parts (default: 64 pixels)")
    default = "default: 32 48 96 192; stage 2: 16 24 48 96 128"
    help = "stage 2: share of the small images that stage 1 has drawn anew (default: 0, see weights.md)"
    options.add_argument("--redrawn", type=float, default=0.0, help=help)
    options.add_argument("--widths", type=positive, nargs="+", help=f"channels of the levels ({default})")
    options.add_argument("--layers", type=positive, default=1, help="ResNets a level (default: 1)")
    options.add_argument("--text-dim", type=positive, default=128, help="width of the text encoder (default: 128)")
    options.add_argument("--text-steps", type=int, default=2000, help="contrastive steps before (default: 2000)")
    options.add_argument("--text-batch", type=positive, default=128, help="their batch size (default: 128)")
    options.add_argument("--steps", type=positive, default=40_000, help="of the UNet (default: 40000)")
    options.add_argument("--batch-size", type=positive, default=48, help="default: 48")
    options.add_argument("--lr", type=learning_rate, default=4e-4, help="falls to a tenth in the end (default: 4e-4)")
    options.add_argument("--every", type=positive, default=500, help="steps between sheets (default: 500)")
    help = "processes that draw batches ahead, so that a GPU need not wait (default: 0; the weights are the same)"
    options.add_argument("--workers", type=positive, default=0, help=help)
    options.add_argument("--compile", action="store_true", help="torch.compile the UNet: for GPUs; slower on CPUs")
    add_run_options(options, "out/stage-1")
    args = options.parse_args()
    if args.new_text and (args.stage_2_of or not args.start):
        raise ValueError("--new-text is for stage 1 and goes with --start, whose UNet it keeps")
    if not 0 <= args.text_steps <= LARGEST:
        raise ValueError(f"--text-steps must be from 0 to {LARGEST}")
    if args.workers > (os.cpu_count() or 1):
        raise ValueError(f"--workers {args.workers} are more than this machine's {os.cpu_count()} processors")
    for name in ("variety", "unnamed", "redrawn"):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"--{name} must be from 0 to 1, but is {getattr(args, name)}")
    if args.redrawn and not args.stage_2_of:
        raise ValueError("--redrawn is for stage 2: it goes with --stage-2-of")
    args.stage_2_of = MODEL if args.stage_2_of == "tiny-if" else args.stage_2_of
    if args.start == "tiny-if":
        args.start = UPSCALER if args.stage_2_of else MODEL
    args.size = args.size or (128 if args.stage_2_of else 32)
    if args.start and not args.widths:
        args.widths = list(stage_config("--start", args.start, 2 if args.stage_2_of else 1).block_out_channels)
    args.widths = args.widths or ([16, 24, 48, 96, 128] if args.stage_2_of else [32, 48, 96, 192])
    check_shapes(args)
    return args


def check_shapes(args: Namespace):
    """Refuse images that the UNet cannot halve, and --start or --stage-2-of that do not fit. Raises ValueError."""
    config = unet_config(args)
    try:
        wanted = UNetConfig.from_dict(config)
    except ValueError as error:
        raise ValueError(f"--widths, --layers and --text-dim make no UNet: {error}") from None
    sides = {"--size": args.size, **({"--crop": args.crop} if args.stage_2_of else {})}
    for name, side in sides.items():
        if side % wanted.size_multiple:
            needed = f"a multiple of {wanted.size_multiple} for a UNet of {len(args.widths)} levels"
            raise ValueError(f"{name} must be {needed}, but is {side}")
    if args.stage_2_of:
        small = stage_config("--stage-2-of", args.stage_2_of, 1).sample_size
        if args.size % small or args.crop > args.size:
            raise ValueError(f"--size {args.size} must be a multiple of stage 1's {small}, and not below --crop")
    if args.start is None:
        return
    found = stage_config("--start", args.start, 2 if args.stage_2_of else 1)
    for field in fields(UNetConfig):
        theirs, ours = getattr(found, field.name), getattr(wanted, field.name)
        if theirs != ours and field.name != "sample_size":  # the same weights draw at any size
            raise ValueError(f"--start {args.start} has {field.name} = {theirs}, the options of this run say {ours}")


def unet_config(args: Namespace) -> dict:
    """The config.json of the UNet that the options ask for. Raises ValueError if --stage-2-of is no stage 1."""
    if args.stage_2_of:
        text_dim = stage_config("--stage-2-of", args.stage_2_of, 1).encoder_hid_dim
        return stage_2_config(args.size, args.widths, args.layers, text_dim)
    return stage_1_config(args.size, args.widths, args.layers, args.text_dim)


def stage_config(option: str, source: str, stage: int) -> UNetConfig:
    """The config of a model that an option names. Raises ValueError when it is of the other stage."""
    config = load_config(source)
    found = 2 if config.class_embed_type else 1
    if found != stage:
        mend = "name its stage 1" if option == "--stage-2-of" else "with --stage-2-of stage 2 is trained, else stage 1"
        raise ValueError(f"{option} {source} is a stage-{found} model, not a stage-{stage} one: {mend}")
    return config


def main():
    args = arguments()
    device = start_processes(args)
    dtype = pick_dtype(args.dtype, device)
    check_run(args)
    text_dim, side = (None, args.crop) if args.stage_2_of else (args.text_dim, args.size)
    check_room(UNetConfig.from_dict(unet_config(args)), text_dim, args.batch_size // num_processes(), side, device)
    names, finer = curated() if args.curated else None, 1 if args.stage_2_of else 2
    load = partial(load_captioned, args.data, args.size, names, finer=finer, quiet=rank() > 0)
    data = load(part="train" if args.hold_out else "all")
    watched = load(part="held out") if args.hold_out else data
    torch.manual_seed(args.seed)
    kept = ("size", "steps", "batch_size", "seed", "start", "variety", "unnamed", "redrawn")
    chosen = {name: getattr(args, name) for name in kept}
    chosen |= {"learning_rate": args.lr, "text_steps": args.text_steps, "text_batch": args.text_batch}
    chosen |= {"crop": args.crop if args.stage_2_of else None, "dtype": str(dtype).removeprefix("torch.")}
    tokenizer = get_tokenizer(args, data)
    vocabulary = [path for name in ("spiece.model", "tokenizer.json") if (path := tokenizer / name).is_file()]
    recipe = Recipe(**chosen, data=data.fingerprint(), tokenizer=fingerprint(*vocabulary))
    if args.stage_2_of:
        unet, encoder = start_unet(unet_config(args), args.start), start_encoder(args.stage_2_of, tokenizer)
        stage_1 = load_unet(args.stage_2_of, pack=False)
        stage = Stage2(
            unet_config(args), encoder, unet, stage_1, tokenizer, device, crop=args.crop, redrawn=args.redrawn
        )
    else:
        own = {"new_text": args.new_text, "resume": args.resume}
        stage = begin_stage_1(unet_config(args), data, recipe, tokenizer, device, **own)
    if stage is None:
        message = "stopped while the text encoder was trained, before the UNet: nothing is saved, start again"
        print(f"{message} with the same command", file=sys.stderr)
        sys.exit(130)
    if args.compile:
        stage.model.unet.compile()
    torch.backends.cudnn.benchmark = True  # all batches are of one size
    options = {"resume": args.resume, "every": args.every, "workers": args.workers, "draw": partial(draw_sheet, args)}
    end_training(args, train_stage(stage, data, watched, recipe, args.out, **options), "model")


def get_tokenizer(args: Namespace, data: CaptionedImages) -> Path:
    """The folder of the tokenizer: that of stage 1 or of --start, else one that is trained on the captions."""
    if args.stage_2_of:
        return fetch(args.stage_2_of, "tokenizer", ["spiece.model"])
    folder = args.out / "tokenizer"
    if rank() == 0 and not args.resume:
        start_tokenizer(folder, None if args.new_text else args.start, data.all_captions())
    wait()
    return folder


def start_processes(args: Namespace) -> torch.device:
    """This process's device, and the connection to the others of torchrun."""
    device = pick_device(args.device)
    if args.batch_size % num_processes():
        raise ValueError(f"--batch-size {args.batch_size} does not divide among {num_processes()} processes")
    if num_processes() > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        start_group("nccl" if device.type == "cuda" else "gloo")
    return device


def draw_sheet(args: Namespace, step: int, rows: list[Tensor], labels: dict):
    """The stage's samples at this step, as samples.png."""
    title, zoom = f"step {step}, 25 steps each", max(1, 128 // args.size)
    save_grid(args.out / "samples.png", rows, **labels, title=title, zoom=zoom, seed=args.seed)


if __name__ == "__main__":
    run(main)
