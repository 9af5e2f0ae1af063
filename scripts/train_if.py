"""Train a small IF, text encoder, stage 1 and stage 2, on a folder of captioned pictures.

    python scripts/train_if.py --data emoji --curated --out out/stage-1
    python scripts/train_if.py --data emoji --curated --stage-2-of out/stage-1/model --out out/stage-2
    python scripts/train_if.py --data my_pictures --start tiny-if/I --out out/mine
    torchrun --nproc-per-node 2 scripts/train_if.py --data emoji --out out/stage-1

Stage 1: first a tokenizer is trained on the captions, and the text encoder against the pictures (--text-steps); then
both the encoder and the UNet. Stage 2 keeps the text encoder of its stage 1 as it is, and learns on crops, which are
cheap; let it finish on whole pictures, which alone say where a pixel lies (--start out/stage-2/model --crop 128).
Writes to --out: state.safetensors (for --resume), log.csv with the loss and, for stage 1, the caption gap, for stage
2 its error beside bicubic upscaling; samples.png; and model/, with the averaged weights, which scripts/generate.py
and diffusers load. Ctrl-C saves and stops; --resume goes on and ends with the same weights, bit for bit, on the same
CPU with as many threads. While the text encoder is trained, before the UNet, Ctrl-C saves nothing: start again then.
Several processes share each batch, and on several hosts --out, which must be a folder that all see. With more --steps
it goes on for longer than was planned, at the learning rate of a run that long.
"""

import hashlib
import math
import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ddpm.files import load_tensors, save_tensors, write_atomically
from ddpm.mnist.training import step_seed, stop_signal
from ddpm.sampling import guided, noise_source, sample
from ddpm.schedule import leading_timesteps
from ifmodel.stage import LEARNED, SCHEDULE, STAGE_1_THRESHOLD, upscale
from ifmodel.text import Tokenizer
from ifmodel.tiny.captions import CaptionedImages, curated, held_out, load_captioned
from ifmodel.tiny.export import save_stage_1, save_stage_2, stage_1_config, stage_2_config
from ifmodel.tiny.losses import (
    Batch,
    caption_loss_gap,
    draw_batch,
    small_noised,
    stage_1_loss,
    stage_2_loss,
    upscaling_error,
)
from ifmodel.tiny.training import (
    EMA,
    ContrastiveText,
    TextToImage,
    build_encoder,
    contrastive_loss,
    train_tokenizer,
    zero_init,
)
from ifmodel.unet import UNet, UNetConfig
from ifmodel.weights import fetch, load_config, load_unet
from shared.figures import save_grid
from shared.options import (
    SEED,
    add_device_options,
    check_writable,
    parser,
    pick_device,
    pick_dtype,
    positive,
    positive_number,
    run,
    seed_number,
)
from shared.stages import MODEL, UPSCALER

SHEET = ["a photo of {}", "an oil painting of {}", "a lithograph of {}", "a sketch of {}"]
SUBJECTS = ["a rocket ship", "a dog", "a skull", "an old man", "a snowy mountain village", "people around a campfire"]


def arguments() -> Namespace:
    options = parser(__doc__)
    options.add_argument("--data", type=Path, required=True, help="folder with pictures and metadata.jsonl")
    options.add_argument("--curated", action="store_true", help="take our list of names out of the emoji folder")
    help = "keep so many pictures, not of our list, out of the training: the log measures on them (default: 0)"
    options.add_argument("--hold-out", type=int, default=0, metavar="N", help=help)
    options.add_argument("--stage-2-of", metavar="FOLDER", help="train stage 2 for this stage 1")
    options.add_argument("--out", type=Path, default=Path("out/stage-1"), help="default: out/stage-1")
    options.add_argument("--resume", action="store_true", help="go on with the run in --out")
    help = "begin with the weights of this stage, ours or another run's model/, rather than with random ones"
    options.add_argument("--start", metavar="FOLDER", help=help)
    options.add_argument("--size", type=positive, help="height and width (default: 32; stage 2: 128)")
    options.add_argument("--crop", type=positive, default=64, help="stage 2: trains on parts (default: 64 pixels)")
    default = "default: 64 96 192; stage 2: 32 48 64 96"
    options.add_argument("--widths", type=positive, nargs="+", help=f"channels of the levels ({default})")
    options.add_argument("--layers", type=positive, default=1, help="ResNets a level (default: 1)")
    options.add_argument("--text-dim", type=positive, default=128, help="width of the text encoder (default: 128)")
    options.add_argument("--text-steps", type=int, default=2000, help="contrastive steps before (default: 2000)")
    options.add_argument("--text-batch", type=positive, default=128, help="their batch size (default: 128)")
    options.add_argument("--steps", type=positive, default=40_000, help="of the UNet (default: 40000)")
    options.add_argument("--batch-size", type=positive, default=48, help="default: 48")
    options.add_argument("--lr", type=positive_number, default=4e-4, help="falls to a tenth in the end (default: 4e-4)")
    options.add_argument("--every", type=positive, default=500, help="steps between sheets (default: 500)")
    options.add_argument("--compile", action="store_true", help="torch.compile the UNet: for GPUs; slower on CPUs")
    options.add_argument("--seed", type=seed_number, default=SEED, help=f"default: {SEED}")
    add_device_options(options)
    args = options.parse_args()
    for name, value in (("--hold-out", args.hold_out), ("--text-steps", args.text_steps)):
        if value < 0:
            raise ValueError(f"{name} must not be negative, but is {value}")
    args.stage_2_of = MODEL if args.stage_2_of == "tiny-if" else args.stage_2_of
    if args.start == "tiny-if":
        args.start = UPSCALER if args.stage_2_of else MODEL
    args.size = args.size or (128 if args.stage_2_of else 32)
    args.widths = args.widths or ([32, 48, 64, 96] if args.stage_2_of else [64, 96, 192])
    check_shapes(args)
    return args


def check_shapes(args: Namespace):
    """Refuse pictures that the UNet cannot halve, and --start or --stage-2-of that do not fit. Raises ValueError."""
    wanted = UNetConfig.from_dict(unet_config(args))
    sides = {"--size": args.size, **({"--crop": args.crop} if args.stage_2_of else {})}
    for name, side in sides.items():
        if side % wanted.size_multiple:
            told = f"a multiple of {wanted.size_multiple} for a UNet of {len(args.widths)} levels"
            raise ValueError(f"{name} must be {told}, but is {side}")
    if args.stage_2_of:
        small = stage_config("--stage-2-of", args.stage_2_of, 1).sample_size
        if args.size % small or args.crop > args.size:
            raise ValueError(f"--size {args.size} must be a multiple of stage 1's {small}, and not below --crop")
    if args.start is None:
        return
    found = stage_config("--start", args.start, 2 if args.stage_2_of else 1)
    for field in fields(UNetConfig):
        theirs, ours = getattr(found, field.name), getattr(wanted, field.name)
        if theirs != ours:
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
    device, rank, world = start_processes(args)
    dtype = pick_dtype(args.dtype, device)
    state = args.out / "state.safetensors"
    check_writable(state)
    if state.exists() != args.resume:
        told = (
            "there is no run in {} to resume" if args.resume else "there is a run in {}: add --resume, or another --out"
        )
        raise ValueError(told.format(args.out))
    unseen = held_out(args.data, args.hold_out) if args.hold_out else []
    quiet = rank > 0
    data = load_captioned(args.data, args.size, curated() if args.curated else None, without=unseen, quiet=quiet)
    watched = load_captioned(args.data, args.size, unseen, quiet=quiet) if unseen else data
    args.seen = {"dtype": str(dtype).removeprefix("torch."), "data": data.fingerprint()}
    torch.manual_seed(args.seed)
    stage = Stage2(args, data, device) if args.stage_2_of else Stage1(args, data, device, rank, world)
    fit(args, data, watched, stage, dtype, rank, world)


class Stage1:
    """What is special in training stage 1: text encoder and UNet learn together, once the first knows its captions."""

    def __init__(self, args: Namespace, data: CaptionedImages, device: torch.device, rank: int, world: int):
        self.args, folder = args, args.out / "tokenizer"
        if rank == 0 and not args.resume:
            if args.start:
                vocabulary = fetch(args.start, "tokenizer", ["spiece.model"]) / "spiece.model"
                write_atomically(folder / "spiece.model", vocabulary.read_bytes())
            else:
                train_tokenizer(data.all_captions(), folder)
        if world > 1:
            dist.barrier()
        self.tokenizer = Tokenizer(folder)
        self.config = unet_config(args)
        unet = start_unet(self.config, args.start)
        encoder = load_encoder(args.start) if args.start else build_encoder(self.tokenizer.vocab_size, args.text_dim)
        self.model = TextToImage(encoder, unet)
        self.model.to(device, memory_format=torch.channels_last)
        if not args.resume and not args.start:
            train_text(args, data, self.tokenizer, encoder, device, rank)
        parts = [{"params": self.model.unet.parameters()}, {"params": encoder.parameters(), "share": 0.1}]
        self.parameters, self.loss = parts, stage_1_loss

    def watch(self, held: Batch) -> dict[str, float]:
        return caption_loss_gap(self.model, held)

    def draw_sheet(self, held: Batch, step: int):
        """Subjects across, styles down, γ = 4 and 25 steps."""
        args, unet, device = self.args, self.model.unet, held.x_0.device
        prompts = [template.format(subject) for template in SHEET for subject in SUBJECTS]
        tokens, mask = (tensor.to(device) for tensor in self.tokenizer([*prompts, ""]))
        text = unet.encode_text(self.model.encoder(tokens, attention_mask=mask).last_hidden_state)
        estimate = guided(unet, text[list(range(len(prompts)))], text[[len(prompts)] * len(prompts)], 4.0)
        noise = noise_source([args.seed] * len(prompts), (3, args.size, args.size), device)
        timesteps = leading_timesteps(SCHEDULE.num_timesteps, 25)
        loop = {"step": LEARNED, "threshold": STAGE_1_THRESHOLD}
        pictures = sample(estimate, timesteps, SCHEDULE, noise=noise, **loop)
        labels = {"row_labels": [template.format("…") for template in SHEET], "column_labels": SUBJECTS}
        rows, zoom = (pictures / 2 + 0.5).split(len(SUBJECTS)), max(1, 128 // args.size)
        title = f"step {step}, γ = 4, 25 steps"
        save_grid(args.out / "samples.png", rows, **labels, title=title, zoom=zoom, seed=args.seed)

    def save(self, folder: Path, weights: dict[str, Tensor]):
        save_stage_1(folder, self.config, weights, self.model.encoder, self.args.out / "tokenizer")


class Stage2:
    """What is special in training stage 2: the text encoder is that of a stage 1, and stays as it is."""

    def __init__(self, args: Namespace, data: CaptionedImages, device: torch.device):
        self.args, self.small = args, load_config(args.stage_2_of).sample_size
        vocabulary = fetch(args.stage_2_of, "tokenizer", ["spiece.model"])
        self.tokenizer = Tokenizer(vocabulary)
        args.seen["tokenizer"] = fingerprint(vocabulary)  # not the encoder's: the state has its weights
        encoder = load_encoder(args.stage_2_of)
        self.config = unet_config(args)
        self.model = TextToImage(encoder.requires_grad_(False), start_unet(self.config, args.start))
        self.model.to(device, memory_format=torch.channels_last)
        self.parameters = [{"params": self.model.unet.parameters()}]
        self.loss = partial(stage_2_loss, small=self.small, crop=args.crop)

    def watch(self, held: Batch) -> dict[str, float]:
        return upscaling_error(self.model, held[:16], self.small)

    def draw_sheet(self, held: Batch, step: int):
        """Small pictures, what is made of them, and the pictures from which the small ones are."""
        args, few, nothing = self.args, held[:6], torch.Generator().manual_seed(0)
        embeds = self.model.encoder(few.tokens, attention_mask=few.mask).last_hidden_state
        small = F.avg_pool2d(few.x_0, args.size // self.small)
        seeds = [args.seed] * len(small)
        options = {"num_steps": 25, "guidance_scale": 1.0, "noise_level": 50, "size": (args.size, args.size)}
        pictures = upscale(self.model.unet, small, embeds, embeds, seeds=seeds, **options)
        rows = [(x / 2 + 0.5).clamp(0, 1) for x in (small_noised(few.x_0, self.small, 0, nothing), pictures, few.x_0)]
        labels = {"row_labels": [f"{self.small} px", "stage 2", f"{args.size} px"], "column_labels": [""] * len(small)}
        save_grid(args.out / "samples.png", rows, **labels, title=f"step {step}, 25 steps", zoom=1, seed=args.seed)

    def save(self, folder: Path, weights: dict[str, Tensor]):
        save_stage_2(folder, self.config, weights)


def fingerprint(folder: Path) -> str:
    """A short hash of a tokenizer's files."""
    digest = hashlib.sha256()
    for path in (folder / "spiece.model", folder / "tokenizer.json"):
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()[:12]


def load_encoder(source: str):
    """The T5 encoder of a stage 1, in float32."""
    from transformers import T5EncoderModel

    return T5EncoderModel.from_pretrained(
        fetch(source, "text_encoder", ["*.json", "*.safetensors"]), dtype=torch.float32
    )


def start_unet(config: dict, start: str | None) -> UNet:
    """An untrained UNet of this config, or one with the weights of `start`, which `check_shapes` has looked at."""
    if start is None:
        zero_init(unet := UNet(UNetConfig.from_dict(config)))
        return unet
    return load_unet(start, pack=False).train().requires_grad_(True)


def start_processes(args: Namespace) -> tuple[torch.device, int, int]:
    """This process's device and number, and how many processes there are: torchrun says so in the environment."""
    device, world = pick_device(args.device), int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % world:
        raise ValueError(f"--batch-size {args.batch_size} does not divide among {world} processes")
    if world == 1:
        return device, 0, 1
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, dist.get_rank(), world


def train_text(args: Namespace, data: CaptionedImages, tokenizer: Tokenizer, encoder, device: torch.device, rank: int):
    """The text encoder learns which caption is of which picture; the same in every process, without their talking.

    Ctrl-C ends the whole run, with status 130 and nothing saved, so that the same command can start it again.
    """
    contrast = ContrastiveText(encoder).to(device)
    optimizer = torch.optim.AdamW(contrast.parameters(), lr=1e-3, weight_decay=0.01)
    bar = tqdm(range(args.text_steps), desc="text", unit="step", disable=rank > 0)
    found = 0.0
    with stop_signal() as stopped:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * min(1, (step + 1) / 100) * (1 - step / args.text_steps)
            generator = torch.Generator().manual_seed(step_seed(args.seed, step))
            batch = draw_batch(data, tokenizer, min(args.text_batch, len(data.names)), generator, drop=0).to(device)
            similarities = contrast(batch.x_0, batch.tokens, batch.mask)
            loss = contrastive_loss(similarities)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(contrast.parameters(), 1.0)
            optimizer.step()
            right = (similarities.argmax(1) == torch.arange(len(similarities), device=device)).float().mean().item()
            found += 0.05 * (right - found)
            bar.set_description(f"text, loss {loss.item():.3f}, {found:.0%} found", refresh=False)
            if stopped():
                break
    if stopped():
        bar.close()
        if rank == 0:
            told = "stopped while the text encoder was trained, before the UNet: nothing is saved, start again"
            print(f"{told} with the same command", file=sys.stderr)
        raise SystemExit(130)


def fit(args: Namespace, data, watched: CaptionedImages, stage: Stage1 | Stage2, dtype, rank: int, world: int):
    """Train a stage on `data` from --resume's state or the start, to --steps or until stopped; log it on `watched`."""
    model = stage.model
    device = next(model.parameters()).device
    if world > 1:  # the text encoders were trained apart, on GPUs not to the same bit
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)
    if args.compile:
        model.unet.compile()
    optimizer = torch.optim.AdamW(stage.parameters, lr=args.lr, weight_decay=0.01, fused=device.type != "mps")
    average, log, first, seconds = EMA(model), [], 0, 0.0
    if args.resume:
        first, seconds, log = restore(args, model, optimizer, average)
    held = draw_batch(watched, stage.tokenizer, 64, torch.Generator().manual_seed(args.seed), drop=0).to(device)
    mine = slice(rank * args.batch_size // world, (rank + 1) * args.batch_size // world)
    started, saved, losses = time.monotonic() - seconds, time.monotonic(), []

    def save(step: int):
        if rank == 0:
            seconds = round(time.monotonic() - started, 1)
            save_run(args, model, optimizer, average, log, step, seconds)
            stage.save(args.out / "model", average.weights)

    step = first
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, unit="step", disable=rank > 0)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    with stop_signal() as stopped:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * group.get("share", 1) * min(1, (step + 1) / 500) * 0.1 ** (step / args.steps)
            generator = torch.Generator().manual_seed(step_seed(args.seed, step))
            batch = draw_batch(data, stage.tokenizer, args.batch_size, generator).to(device)
            with autocast:
                loss = stage.loss(model, batch, generator, mine).mean()
            loss, stop = descend(model, optimizer, loss, bool(stopped()), world)
            average.update(model, step)
            losses.append(loss)
            if not losses[-1] < 1e3:
                raise ValueError(f"the loss is {losses[-1]} at step {step}: try a smaller --lr, or --resume the run")
            if step % 10 == 0:
                recent = losses[-100:]
                bar.set_description(f"loss {sum(recent) / len(recent):.4f}", refresh=False)
            if (step + 1) % args.every == 0 and rank == 0:
                with averaged(model, average), autocast, torch.no_grad():
                    seen = stage.watch(held)
                    stage.draw_sheet(held, step + 1)
                add_row(log, step, losses[-args.every :], seen, bar)
            if stop:
                break
            if time.monotonic() - saved > 300:
                save(step + 1)
                saved = time.monotonic()
    save(step + 1)
    if step + 1 < args.steps:
        bar.write(f"stopped and saved: go on with the same command and --resume (the run is in {args.out})")
        raise SystemExit(130)
    print(f"trained: {args.out / 'model'}")


def descend(model: TextToImage, optimizer, loss: Tensor, stop: bool, world: int) -> tuple[float, bool]:
    """One step of the optimizer; returns the loss, the mean over all processes, and whether any of them is to stop."""
    optimizer.zero_grad()
    loss.backward()
    told = torch.stack([loss.detach(), loss.new_tensor(float(stop))])
    if world > 1:
        average_gradients(model, world)
        dist.all_reduce(told)  # so that all processes stop when one is told to
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return told[0].item() / world, told[1].item() > 0


def add_row(log: list[str], step: int, losses: list[float], seen: dict[str, float], bar: tqdm):
    """Add the mean loss, and what was seen, to the log and show it; warn where captions are not listened to."""
    if not log:
        log.append(",".join(["step", "loss", *seen]))
    log.append(",".join([str(step + 1), *(f"{x:.5f}" for x in (sum(losses) / len(losses), *seen.values()))]))
    bar.write(f"{log[0]}: {log[-1]}")
    if step >= 1000 and seen.get("others", math.inf) < 1.05 * seen.get("right", 0):
        bar.write("warning: it draws without listening: others' captions serve it as well as the right ones")


def average_gradients(model: TextToImage, world: int):
    """Every process's gradients become the mean over all processes."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= world


@contextmanager
def averaged(model: TextToImage, average: EMA) -> Iterator[None]:
    """The model with its averaged weights, for a while."""
    kept = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.load_state_dict(average.weights)
    try:
        yield
    finally:
        model.load_state_dict(kept)


def save_run(args, model, optimizer, average: EMA, log: list[str], step: int, seconds: float):
    """Write state.safetensors and log.csv, each whole or not at all."""
    tensors: dict[str, Tensor] = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    tensors |= {f"average.{name}": weight for name, weight in average.weights.items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
    # two names of the same memory, the tokens' embedding, are one tensor each in the file
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    metadata = {"recipe": recipe_of(args), "step": step, "seconds": seconds, "log": log}
    save_tensors(args.out / "state.safetensors", tensors, metadata)
    write_atomically(args.out / "log.csv", "\n".join([*log, ""]).encode())


def recipe_of(args) -> dict:
    """What decides the trained weights, the data by a hash of it."""
    names = ("size", "widths", "layers", "text_dim", "text_steps", "text_batch", "steps", "batch_size", "lr", "seed")
    recipe = {**{name: getattr(args, name) for name in names}, **args.seen}
    for name in ("start", "hold_out"):  # states from before there were these have no such field
        if getattr(args, name):
            recipe[name] = getattr(args, name)
    return {**recipe, "stage": 2, "crop": args.crop} if args.stage_2_of else recipe


def check_recipe(args, before: dict):
    """Refuse to go on with a state of another recipe, but for --steps. Raises ValueError that says what differs."""
    now = recipe_of(args)
    unknown = args.seen.keys() - before.keys()  # of a state from before these were written down
    differ = [
        name for name in {**before, **now} if before.get(name) != now.get(name) and name not in {"steps", *unknown}
    ]
    if differ:
        told = ", ".join(f"{name} {before.get(name)}, not {now.get(name)}" for name in differ)
        raise ValueError(f"the run in {args.out} has another recipe: {told}")


def restore(args, model, optimizer, average: EMA) -> tuple[int, float, list[str]]:
    """Put the state of --out back; returns the step to go on with, the seconds spent and the log."""
    tensors, metadata = load_tensors(args.out / "state.safetensors")
    check_recipe(args, metadata.get("recipe") or {})
    if metadata["step"] >= args.steps:
        raise ValueError(f"the run in {args.out} has done its {metadata['step']} steps: add --steps with more")

    def part(prefix: str) -> dict[str, Tensor]:
        found = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        return {name.removeprefix(prefix): tensor for name, tensor in found.items()}

    model.load_state_dict(part("model."))
    for name, weight in part("average.").items():
        average.weights[name].copy_(weight)
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in part("optimizer.").items():
        index, kind = name.split(".")
        moments.setdefault(int(index), {})[kind] = value
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, state in moments.items():
        for kind in ("exp_avg", "exp_avg_sq"):  # fused Adam walks both in memory order: keep channels_last
            state[kind] = torch.empty_like(parameters[index]).copy_(state[kind])
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return metadata["step"], metadata["seconds"], metadata["log"]


if __name__ == "__main__":
    run(main)
