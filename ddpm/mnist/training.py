"""Training the MNIST models: the denoiser's loss, the recipes of Part B, and one loop."""

import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ddpm.files import write_atomically
from ddpm.memory import check_memory
from ddpm.mnist.checkpoint import load_start, save_weights
from ddpm.mnist.unet import NUM_CLASSES, ClassFlow, ClassUNet, check_batch
from ddpm.runs import load_state, save_state, step_seed, stop_signal
from ddpm.sampling import noise_source


@dataclass(frozen=True)
class Recipe:
    """What, besides the loss, decides the trained weights."""

    epochs: int
    batch_size: int
    learning_rate: float
    decay: float = 1.0  # the learning rate's factor over the whole run, a little of it after each epoch
    seed: int = 20040805


SIGMAS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)  # the noise levels of B1; the denoiser is trained at 0.5
DENOISER = Recipe(epochs=5, batch_size=256, learning_rate=1e-4)
DDPM = Recipe(epochs=20, batch_size=128, learning_rate=1e-3, decay=0.1)
FLOW = Recipe(epochs=10, batch_size=64, learning_rate=1e-2, decay=0.1)
FLOW_FROM_DDPM = Recipe(epochs=4, batch_size=64, learning_rate=1e-3, decay=0.03)  # begun with a DDPM's weights


def denoiser_loss(model: nn.Module, x_0: Tensor, generator: torch.Generator, sigma: float = 0.5) -> Tensor:
    """‖D(x_0 + σ eps) - x_0‖², the mean over pixels, for clean digits x_0 [B, 1, 28, 28] (B2)."""
    eps = torch.randn(x_0.shape, generator=generator, device=x_0.device)
    return F.mse_loss(model(x_0 + sigma * eps).float(), x_0)


def noisy_digits(x: Tensor, sigma: float, seed: int) -> Tensor:
    """z = x + σ eps for digits x [N, 1, 28, 28]; digit k takes its noise from seed + k, whatever N is (B1)."""
    return x + sigma * noise_source(range(seed, seed + len(x)), x.shape[1:], x.device)()


def drop_classes(labels: Tensor, generator: torch.Generator, probability: float = 0.1) -> Tensor:
    """Labels [B] -> one-hot [B, 10], whole rows set to zero with this probability.

    So the model also learns the unconditional eps that guidance needs.
    Source: classifier-free guidance, Algorithm 1, arXiv 2207.12598.
    """
    kept = torch.rand(len(labels), generator=generator, device=labels.device) >= probability
    return F.one_hot(labels, NUM_CLASSES).float() * kept.unsqueeze(1)


@torch.no_grad()
def flow_from_ddpm(ddpm: ClassUNet) -> ClassFlow:
    """A class-conditioned flow that begins as a DDPM of the same network: turned clock, and u = -eps.

    Where t is near 1, x_1 - x_0 is -eps but for the digit, so that little is left to learn.
    """
    flow = ClassFlow(ddpm.config["width"])
    flow.load_state_dict(ddpm.state_dict())
    for first, *_ in (flow.t1, flow.t2):  # w (1 - t) + b = -w t + (w + b)
        first.bias += first.weight[:, 0]
        first.weight.neg_()
    flow.out.weight.neg_()
    flow.out.bias.neg_()
    return flow


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor],
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    *,
    first_step: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[int, Tensor]]:
    """Train in place, one optimizer step each time the caller asks for the next item.

    images: [N, 1, 28, 28] uint8, labels: [N], on the model's device
    loss_of(model, x_0, labels, generator): the loss of one batch, x_0 [B, 1, 28, 28] in [0, 1]
    first_step: where to go on; the order and the noise of every step follow from the seed and the step
        alone, so a resumed run sees what an uninterrupted one would have seen
    dtype: torch.bfloat16 runs the model under autocast

    Yields (step, loss) after each step.
    """
    device = images.device
    steps_per_epoch = math.ceil(len(images) / recipe.batch_size)
    order_generator, generator = torch.Generator(), torch.Generator(device)
    model.train()
    for step in range(first_step, recipe.epochs * steps_per_epoch):
        epoch, i = divmod(step, steps_per_epoch)
        if i == 0 or step == first_step:
            order = torch.randperm(len(images), generator=order_generator.manual_seed(recipe.seed + epoch)).to(device)
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * recipe.decay ** (epoch / recipe.epochs)
        rows = order[i * recipe.batch_size : (i + 1) * recipe.batch_size]
        x_0 = (images[rows].float() / 255).contiguous(memory_format=torch.channels_last)

        generator.manual_seed(step_seed(recipe.seed, step))
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = loss_of(model, x_0, labels[rows], generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield step, loss.detach()


class Run:
    """A run's files in a folder: state.safetensors to resume, weights.safetensors to use, log.csv to read.

    losses: [steps of the whole run], filled as it goes; NaN for steps before a `start`
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        recipe: Recipe,
        digits: int,
        dtype: torch.dtype,
    ):
        self.folder, self.model, self.optimizer = folder, model, optimizer
        self.steps_per_epoch = math.ceil(digits / recipe.batch_size)
        check_memory(8 * recipe.epochs * self.steps_per_epoch, f"a log of {recipe.epochs} epochs")
        self.losses = torch.zeros(recipe.epochs * self.steps_per_epoch, device=next(model.parameters()).device)
        kind = {"model": type(model).__name__, "config": model.config}
        run = {"recipe": asdict(recipe), "digits": digits, "dtype": str(dtype).removeprefix("torch.")}
        self.described = kind | run
        self.seconds_before, self.started = 0.0, time.monotonic()

    def restore(self, resume: bool, start: Path | None) -> int:
        """Put the folder's state, or the weights of `start`, into the model; returns how many steps are done."""
        state = self.folder / "state.safetensors"
        if state.exists():
            if not resume:
                raise ValueError(f"there is a run in {self.folder}: add --resume to go on, or choose another --out")
            wanted = {key: value for key, value in self.described.items() if key != "dtype"}
            others, found = load_state(state, self.model, self.optimizer, wanted)
            steps = others["losses"].numel() if "losses" in others else 0
            if not 0 < steps <= len(self.losses) or not isinstance(found.get("seconds"), (int, float)):
                raise ValueError(f"{state} is damaged: it does not say how far the run came")
            if found.get("dtype") != self.described["dtype"]:
                told = f"the run was in {found.get('dtype')} and goes on in {self.described['dtype']}"
                warnings.warn(told, stacklevel=3)
            self.losses[:steps] = others["losses"].flatten()
        elif start is not None:
            found = load_start(start, self.model)
            steps = min(round(found["epochs"] * self.steps_per_epoch), len(self.losses))
            self.losses[:steps] = math.nan  # not in a weights file
        elif resume:
            raise ValueError(f"there is no run in {self.folder} to resume")
        else:
            return 0
        self.seconds_before = found["seconds"]
        return steps

    def save(self, steps: int):
        """Write the three files, each whole or not at all."""
        seconds = self.seconds_before + time.monotonic() - self.started
        progress = {"epochs": round(steps / self.steps_per_epoch, 4), "seconds": round(seconds, 1)}
        metadata = {**self.described, **progress}
        losses = {"losses": self.losses[:steps]}
        save_state(self.folder / "state.safetensors", self.model, self.optimizer, losses, metadata)
        save_weights(self.folder / "weights.safetensors", self.model, metadata)
        whole_epochs = self.losses[: steps - steps % self.steps_per_epoch].view(-1, self.steps_per_epoch)
        means = enumerate(whole_epochs.mean(1).tolist(), start=1)
        lines = ["epoch,mean_loss", *(f"{epoch},{mean:.6f}" for epoch, mean in means if math.isfinite(mean)), ""]
        write_atomically(self.folder / "log.csv", "\n".join(lines).encode())


def fit(
    model: nn.Module,
    loss_of: Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor],
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    resume: bool = False,
    start: Path | None = None,
    save_every: float = 300,
    after_epoch: Callable[[int, list[float]], None] = lambda epoch, losses: None,
) -> bool:
    """`train` with a progress bar, checkpoints and a log in a folder, and a way to stop and go on.

    Writes folder/state.safetensors (to resume), folder/weights.safetensors (to use) and folder/log.csv every
    `save_every` seconds, after each epoch, and on Ctrl-C or SIGTERM once the running step is done.
    after_epoch(epochs done, all losses so far) draws figures.
    start: a weights file of the same model to go on from where its state file is lost: at the step that it had
        reached, with Adam's moments anew
    Returns whether the run is complete. Raises ValueError when there is a run in the folder and `resume` is
    false, when that run is of another recipe, or when the loss is not finite.
    """
    device = images.device
    model.to(device, memory_format=torch.channels_last)
    check_batch(model, min(recipe.batch_size, len(images)), numbers=33)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate, fused=device.type != "mps")
    run = Run(folder, model, optimizer, recipe, len(images), dtype)
    first_step = run.restore(resume, start)
    per_epoch, losses, size = run.steps_per_epoch, run.losses, recipe.batch_size
    if resume and first_step % per_epoch == 0:  # stopped between an epoch and its figures
        after_epoch(first_step // per_epoch, losses[:first_step].tolist())
    if first_step == len(losses):  # nothing left to do but to write what it came to
        run.save(first_step)

    step, saved = first_step - 1, time.monotonic()
    bar = tqdm(total=len(losses) * size, initial=first_step * size, unit="img", smoothing=0.05)
    with stop_signal() as stopped, bar:
        for step, loss in train(model, optimizer, loss_of, images, labels, recipe, first_step=first_step, dtype=dtype):
            losses[step] = loss
            bar.update(size)
            epoch, end_of_epoch = step // per_epoch + 1, (step + 1) % per_epoch == 0
            saving = end_of_epoch or stopped() or time.monotonic() - saved > save_every
            if saving or step % 10 == 0:
                recent = losses[max(first_step, step - 99) : step + 1].mean().item()
                bar.set_description(f"epoch {epoch}/{recipe.epochs}, loss {recent:.4f}", refresh=False)
                if not math.isfinite(recent):  # before it could overwrite a good state
                    raise ValueError(f"the loss is not finite at step {step}: try --dtype float32, or --resume the run")
            if saving:
                run.save(step + 1)
                saved = time.monotonic()
            if stopped():
                break
            if end_of_epoch:
                after_epoch(epoch, losses[: step + 1].tolist())
                model.train()
    return step + 1 == len(losses)
