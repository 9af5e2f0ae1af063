"""Training tiny-if: the text encoder first, then the loop that both stages share.

Each step's batch and noise follow from the seed and the step alone, and are the same for any number of processes, which
share them. So a run that was stopped and resumed ends with the same weights, bit for bit, on the same CPU.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from ddpm.files import write_atomically
from ddpm.runs import load_state, save_state, step_seed, stop_signal
from ifmodel.text import Tokenizer
from ifmodel.tiny.data import CaptionedImages
from ifmodel.tiny.losses import draw_batch
from ifmodel.tiny.models import EMA, ContrastiveText, TextToImage, contrastive_loss
from ifmodel.tiny.stages import Stage1, Stage2


@dataclass(frozen=True)
class Recipe:
    """What decides the trained weights. The learning rate rises for 500 steps, then falls to a tenth.

    size: of the images; crop: stage 2 trains on parts of so many pixels
    text_steps, text_batch: of the text encoder, before the UNet
    variety: how much drawings vary, see `ifmodel.tiny.data.show`
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
    seed: int = 20040805


def train_text(encoder, data: CaptionedImages, tokenizer: Tokenizer, recipe: Recipe, device: torch.device) -> bool:
    """The text encoder learns which caption is of which image; the same in every process, without their talking.

    Returns whether it came to its end: Ctrl-C stops it, and nothing is saved.
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


class Run:
    """A run's files in a folder: state.safetensors to resume, model/ to use, log.csv to read."""

    def __init__(self, folder: Path, stage: Stage1 | Stage2, recipe: Recipe, data: CaptionedImages):
        self.folder, self.stage, self.recipe, self.data = folder, stage, recipe, data
        fused = next(stage.model.parameters()).device.type != "mps"
        self.optimizer = torch.optim.AdamW(stage.parameters, lr=recipe.learning_rate, weight_decay=0.01, fused=fused)
        self.average, self.log, self.step, self.started = EMA(stage.model), [], 0, time.monotonic()

    def restore(self):
        """Put the folder's state back; more steps than planned and another dtype are fine. Raises ValueError."""
        path = self.folder / "state.safetensors"
        recipe = {name: value for name, value in asdict(self.recipe).items() if name not in ("steps", "dtype")}
        others, found = load_state(path, self.stage.model, self.optimizer, {"recipe": recipe})
        step, seconds, log = found.get("step"), found.get("seconds"), found.get("log")
        shapes = {f"average.{name}": weight.shape for name, weight in self.average.weights.items()}
        fits = {name: tensor.shape for name, tensor in others.items()} == shapes and isinstance(log, list)
        if not (fits and isinstance(step, int) and isinstance(seconds, (int, float))):
            raise ValueError(f"{path} is damaged: its averaged weights, or how far the run came, are not there")
        for name, weight in self.average.weights.items():
            weight.copy_(others[f"average.{name}"])
        self.step, self.log, self.started = step, log, time.monotonic() - seconds
        if found.get("dtype") != self.recipe.dtype and rank() == 0:
            warnings.warn(f"the run was in {found.get('dtype')} and goes on in {self.recipe.dtype}", stacklevel=3)

    def save(self):
        """Write the files, each whole or not at all."""
        if rank() > 0:
            return
        recipe = {name: value for name, value in asdict(self.recipe).items() if name not in ("steps", "dtype")}
        progress = {"step": self.step, "seconds": round(time.monotonic() - self.started, 1), "log": self.log}
        metadata = {"recipe": recipe, "dtype": self.recipe.dtype, "steps": self.recipe.steps, **progress}
        averages = {f"average.{name}": weight for name, weight in self.average.weights.items()}
        save_state(self.folder / "state.safetensors", self.stage.model, self.optimizer, averages, metadata)
        write_atomically(self.folder / "log.csv", "\n".join([*self.log, ""]).encode())
        self.stage.save(self.folder / "model", self.average.weights, self.data)

    def learning_rate(self, step: int) -> float:
        """It rises for 500 steps, then falls to a tenth."""
        return self.recipe.learning_rate * min(1, (step + 1) / 500) * 0.1 ** (step / self.recipe.steps)


def fit(
    stage: Stage1 | Stage2,
    data: CaptionedImages,
    watched: CaptionedImages,
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    every: int = 500,
    draw: Callable[[int, list[Tensor], dict], None] = lambda step, rows, labels: None,
    save_every: float = 300,
) -> bool:
    """Train a stage to recipe.steps or until stopped, saving every five minutes and at the end; log on `watched`.

    draw(step, rows, labels) makes a figure of the stage's sheet every so many steps.
    Returns whether the run is complete. Raises ValueError when the loss is not finite, or the state is of another run.
    """
    model, run = stage.model, Run(folder, stage, recipe, data)
    device = next(model.parameters()).device
    if processes() > 1:  # the text encoders were trained apart, on GPUs not to the same bit
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)
    if resume:
        run.restore()
    shown = {"variety": recipe.variety}
    seeded = torch.Generator().manual_seed(recipe.seed)
    held = draw_batch(watched, stage.tokenizer, 64, recipe.size, seeded, drop=0, **shown).to(device)
    share = recipe.batch_size // processes()
    mine = slice(rank() * share, (rank() + 1) * share)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=recipe.dtype == "bfloat16")
    losses, saved, first = [], time.monotonic(), run.step
    bar = tqdm(range(first, recipe.steps), initial=first, total=recipe.steps, unit="step", disable=rank() > 0)
    with stop_signal() as stopped, bar:
        for step in bar:
            for group in run.optimizer.param_groups:
                group["lr"] = run.learning_rate(step) * group.get("share", 1)
            generator = torch.Generator().manual_seed(step_seed(recipe.seed, step))
            batch = draw_batch(data, stage.tokenizer, recipe.batch_size, recipe.size, generator, **shown).to(device)
            with autocast:
                loss = stage.loss(model, batch, generator, mine).mean()
            loss, stop = descend(model, run.optimizer, loss, stopped())
            run.average.update(model, step)
            run.step = step + 1
            losses.append(loss)
            if not loss < 1e3:
                raise ValueError(f"the loss is {loss} at step {step}: try a smaller learning rate, or resume the run")
            if step % 10 == 0:
                bar.set_description(f"loss {sum(losses[-100:]) / len(losses[-100:]):.4f}", refresh=False)
            if run.step % every == 0 and rank() == 0:
                with averaged(model, run.average), autocast, torch.no_grad():
                    add_row(run.log, run.step, losses[-every:], stage.watch(held), bar)
                    draw(run.step, *stage.sheet(held, recipe.seed))
            if stop:
                break
            if time.monotonic() - saved > save_every:
                run.save()
                saved = time.monotonic()
    run.save()
    return run.step >= recipe.steps


def descend(model: TextToImage, optimizer, loss: Tensor, stop: bool) -> tuple[float, bool]:
    """One step of the optimizer; returns the loss, the mean over all processes, and whether any of them is to stop."""
    optimizer.zero_grad()
    loss.backward()
    told = torch.stack([loss.detach(), loss.new_tensor(float(stop))])
    if processes() > 1:
        for parameter in model.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= processes()
        dist.all_reduce(told)  # so that all processes stop when one is told to
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return told[0].item() / processes(), told[1].item() > 0


def rank() -> int:
    """This process's number, 0 for the one that writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    """How many processes share each batch."""
    return dist.get_world_size() if dist.is_initialized() else 1


def add_row(log: list[str], step: int, losses: list[float], seen: dict[str, float], bar: tqdm):
    """Add the mean loss, and what was seen, to the log and show it; warn where captions are not listened to."""
    if not log:
        log.append(",".join(["step", "loss", *seen]))
    log.append(",".join([str(step), *(f"{x:.5f}" for x in (sum(losses) / len(losses), *seen.values()))]))
    bar.write(f"{log[0]}: {log[-1]}")
    if step > 1000 and seen.get("others", math.inf) < 1.05 * seen.get("right", 0):
        bar.write("warning: it draws without listening: others' captions serve it as well as the right ones")


@contextmanager
def averaged(model: TextToImage, average: EMA) -> Iterator[None]:
    """The model with its averaged weights, for a while."""
    kept = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.load_state_dict(average.weights)
    try:
        yield
    finally:
        model.load_state_dict(kept)
