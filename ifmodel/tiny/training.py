"""Training tiny-if: the text encoder, then either stage, in the same loop.

Each step's batch and noise follow from the seed and the step alone, whatever the number of processes that share them.
So a run that was stopped and resumed ends with the same weights, bit for bit, on the same CPU.
"""

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ddpm.tools.distributed import num_processes, rank
from ddpm.tools.files import write_atomically
from ddpm.tools.memory import check_memory
from ddpm.tools.runs import EMA, Run, step_seed, stop_signal
from ifmodel.t5 import Tokenizer
from ifmodel.tiny.data import CaptionedImages
from ifmodel.tiny.losses import Batch, draw_batch
from ifmodel.tiny.models import ContrastiveText, TextToImage, build_encoder, contrastive_loss
from ifmodel.tiny.stages import Stage1, Stage2, start_encoder, start_unet
from ifmodel.unet import UNet, UNetConfig


@dataclass(frozen=True)
class Recipe:
    """What decides the trained weights. The learning rate rises for 500 steps, then falls to a tenth.

    size: of the images; crop: stage 2 trains on parts of so many pixels; redrawn: on a share that stage 1 has drawn
    text_steps, text_batch: of the text encoder, before the UNet
    variety, unnamed: how much drawings vary, and how many captions name no thing, see `ifmodel.tiny.data`
    data, tokenizer: a hash of each
    """

    size: int
    steps: int
    batch_size: int
    learning_rate: float
    text_steps: int
    text_batch: int
    variety: float
    data: str
    tokenizer: str
    dtype: str
    start: str | None = None
    crop: int | None = None
    unnamed: float = 0.1
    redrawn: float = 0.0
    seed: int = 20040805


def check_room(config: UNetConfig, text_dim: int | None, batch_size: int, side: int, device: torch.device):
    """Refuse a training that the memory cannot hold: weights, gradients, Adam's moments, their average, and a batch.

    text_dim: the width of the text encoder, None where it is not trained; side: of the images. Raises ValueError.
    """
    with torch.device("meta"):
        parts = [UNet(config), *([] if text_dim is None else [build_encoder(2, text_dim)])]
    weights = sum(parameter.numel() for part in parts for parameter in part.parameters())
    needed = 5 * 4 * weights + config.activation_bytes(batch_size, side, side)
    check_memory(needed, f"training with {batch_size} images of {side} × {side} at a time", device)


def begin_stage_1(
    config: dict,
    data: CaptionedImages,
    recipe: Recipe,
    tokenizer: Path,
    device: torch.device,
    *,
    new_text: bool = False,
    resume: bool = False,
) -> Stage1 | None:
    """Stage 1 before its first step, with a trained text encoder: that of recipe.start, if there is one.

    config: see `stage_1_config`; tokenizer: a folder with spiece.model
    new_text: train a new text encoder, although there is a start; resume: none is trained, since `train_stage` restores
    None when the training of the text encoder was stopped.
    """
    kept, unet = recipe.start and not new_text, start_unet(config, recipe.start)
    if kept:
        encoder = start_encoder(recipe.start, tokenizer)
    else:
        encoder = build_encoder(Tokenizer(tokenizer).vocab_size, config["encoder_hid_dim"])
    stage = Stage1(config, encoder, unet, tokenizer, device)
    complete = resume or kept or train_text(encoder, data, stage.tokenizer, recipe, device)
    return stage if complete else None


def train_text(encoder, data: CaptionedImages, tokenizer: Tokenizer, recipe: Recipe, device: torch.device) -> bool:
    """Train the text encoder to match captions and images; each process does the same, without communication.

    Returns whether it was completed: Ctrl-C stops it, and nothing is saved.
    """
    contrast, found = ContrastiveText(encoder).to(device), 0.0
    optimizer = torch.optim.AdamW(contrast.parameters(), lr=1e-3, weight_decay=0.01)
    bar = tqdm(range(recipe.text_steps), desc="text", unit="step", disable=rank() > 0)
    with stop_signal() as stopped, bar:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * min(1, (step + 1) / 100) * (1 - step / recipe.text_steps)
            generator = torch.Generator().manual_seed(step_seed(recipe.seed, step))
            count, shown = min(recipe.text_batch, len(data.names)), {"drop": 0, "variety": recipe.variety}
            batch = draw_batch(data, tokenizer, count, recipe.size, generator, **shown).to(device)
            similarities = contrast(batch.x_0, batch.tokens, batch.mask)
            loss = contrastive_loss(similarities)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(contrast.parameters(), 1.0)
            optimizer.step()
            right = (similarities.argmax(1) == torch.arange(count, device=device)).float().mean().item()
            found += 0.05 * (right - found)
            bar.set_description(f"text, loss {loss.item():.3f}, {found:.0%} found", refresh=False)
            if stopped():
                return False
    return True


class Batches(Dataset):
    """The batch of each step, by its number, so that other processes can draw them ahead."""

    def __init__(self, data: CaptionedImages, tokenizer: Tokenizer, recipe: Recipe):
        self.data, self.tokenizer, self.recipe = data, tokenizer, recipe

    def __getitem__(self, step: int) -> Batch:
        """The batch of this step, on the CPU; all processes draw the same."""
        generator = torch.Generator().manual_seed(step_seed(self.recipe.seed, step))
        recipe = self.recipe
        shown = {"variety": recipe.variety, "unnamed": recipe.unnamed}
        return draw_batch(self.data, self.tokenizer, recipe.batch_size, recipe.size, generator, **shown)

    def ahead(self, first: int, workers: int) -> Iterator[Batch]:
        """Those from step `first` on, drawn by so many processes; by this one if 0. Ctrl-C is this one's to handle."""
        options = {"batch_size": None, "num_workers": workers, "worker_init_fn": ignore_signals}
        return iter(DataLoader(self, sampler=range(first, self.recipe.steps), **options))


def ignore_signals(worker: int):
    """In a process that draws batches: a stop is for the one that trains, which then ends this one."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def train_stage(
    stage: Stage1 | Stage2,
    data: CaptionedImages,
    watched: CaptionedImages,
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    every: int = 500,
    draw: Callable[[int, list[Tensor], dict], None] = lambda step, rows, labels: None,
    workers: int = 0,
) -> bool:
    """Train a stage to recipe.steps or until stopped, saving every five minutes and at the end; log on `watched`.

    draw(step, rows, labels) makes a figure of the stage's sheet every so many steps, and at the last.
    workers: processes that draw batches ahead, for a GPU, which would wait for them; the batches are the same
    Returns whether the run is complete. Raises ValueError when the loss is not finite, or the state is of another run.
    """
    model, device = stage.model, next(stage.model.parameters()).device
    run, optimizer, average = new_run(stage, data, recipe, folder)
    if resume:
        run.restore()
    held = held_batch(watched, stage.tokenizer, recipe).to(device)
    batches = Batches(data, stage.tokenizer, recipe).ahead(run.step, workers)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=recipe.dtype == "bfloat16")
    for step in run.steps(recipe.batch_size):
        set_learning_rate(optimizer, recipe, step)
        batch = next(batches).to(device)
        generator = torch.Generator(device).manual_seed(step_seed(recipe.seed + 1, step))  # the batch has its own
        with autocast:
            loss = stage.loss(model, batch, generator, own_rows(recipe.batch_size)).mean()
        run.losses[step] = descend(model, optimizer, loss)
        average.update(model, step)
        if rank() == 0 and ((step + 1) % every == 0 or step + 1 == recipe.steps):
            with averaged(model, average), autocast:
                recent = run.losses[step // every * every : step + 1].mean().item()
                add_row(run.log, step + 1, recent, stage.watch(held))
                draw(step + 1, *stage.sheet(held, recipe.seed, data))
    return run.step == recipe.steps


def new_run(
    stage: Stage1 | Stage2, data: CaptionedImages, recipe: Recipe, folder: Path
) -> tuple[Run, torch.optim.Optimizer, EMA]:
    """A run before its first step, the optimizer and the averaged weights; log.csv and model/ are written with it."""
    model, average = stage.model, EMA(stage.model)
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(stage.parameters, weight_decay=0.01, fused=device.type != "mps")
    if num_processes() > 1:  # each trained its own text encoder, and GPUs do not agree to the bit
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)

    def write():
        write_atomically(folder / "log.csv", "\n".join([*run.log, ""]).encode())
        stage.save(folder / "model", average.weights, data)

    described = {name: value for name, value in asdict(recipe).items() if name not in ("steps", "dtype")}
    parts, dtype = {"model": model.state_dict(), "average": average.weights}, getattr(torch, recipe.dtype)
    options = {"write": write, "leads": rank() == 0, "agree": partial(any_process, device)}
    run = Run(folder, parts, optimizer, recipe.steps, {"recipe": described}, dtype, **options)
    return run, optimizer, average


def held_batch(watched: CaptionedImages, tokenizer: Tokenizer, recipe: Recipe) -> Batch:
    """The 64 images on which the log measures, all with their captions."""
    generator = torch.Generator().manual_seed(recipe.seed)
    return draw_batch(watched, tokenizer, 64, recipe.size, generator, drop=0, variety=recipe.variety)


def set_learning_rate(optimizer: torch.optim.Optimizer, recipe: Recipe, step: int):
    """It rises for 500 steps, then falls to a tenth; the text encoder has a share of it."""
    learning_rate = recipe.learning_rate * min(1, (step + 1) / 500) * 0.1 ** (step / recipe.steps)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("share", 1)


def own_rows(batch_size: int) -> slice:
    """This process's share of a batch."""
    share = batch_size // num_processes()
    return slice(rank() * share, (rank() + 1) * share)


def descend(model: TextToImage, optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
    """One step of the optimizer; returns the loss, the mean over all processes."""
    optimizer.zero_grad()
    loss.backward()
    loss = loss.detach()
    if num_processes() > 1:
        for parameter in model.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= num_processes()
        dist.all_reduce(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss / num_processes()


def any_process(device: torch.device, stop: bool) -> bool:
    """Whether any of the processes is to stop, so that all of them do after the same step."""
    if num_processes() == 1:
        return stop
    dist.all_reduce(stops := torch.tensor(float(stop), device=device))
    return stops.item() > 0


def add_row(log: list[str], step: int, loss: float, seen: dict[str, float]):
    """Add the mean loss, and what was seen, to the log and show it; warn of a model that ignores its captions."""
    if not log:
        log.append(",".join(["step", "loss", *seen]))
    log.append(",".join([str(step), *(f"{x:.5f}" for x in (loss, *seen.values()))]))
    tqdm.write(f"{log[0]}: {log[-1]}")
    if step > 1000 and seen.get("others", math.inf) < 1.05 * seen.get("right", 0):
        tqdm.write("warning: it ignores its captions: others' serve it as well as the right ones")


@contextmanager
def averaged(model: TextToImage, average: EMA) -> Iterator[None]:
    """The model with its averaged weights, for a while: to be looked at, without gradients."""
    kept = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.load_state_dict(average.weights)
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # other sizes are not worth compiling for
            yield
    finally:
        model.load_state_dict(kept)
