"""Training the MNIST models: the denoiser's loss, the recipes, and one loop."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.mnist.checkpoint import load_start, save_weights
from ddpm.mnist.unet import NUM_CLASSES, ClassFlow, ClassUNet, TimeFlow, TimeUNet, check_batch
from ddpm.sampling import noise_source
from ddpm.tools.files import write_atomically
from ddpm.tools.runs import EMA, Run, check_folder, step_seed


@dataclass(frozen=True)
class Recipe:
    """What, besides the loss, decides the trained weights."""

    epochs: int
    batch_size: int
    learning_rate: float
    decay: float = 1.0  # of the learning rate over the whole run, exponentially, epoch by epoch
    average: float = 0.0  # of the weights: how much of it each step keeps; 0 is no average
    seed: int = 20040805


SIGMAS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)  # noise levels; the denoiser is trained at 0.5
DENOISER = Recipe(epochs=5, batch_size=256, learning_rate=1e-4)
DDPM = Recipe(epochs=20, batch_size=128, learning_rate=1e-3, decay=0.1)
FLOW = Recipe(epochs=10, batch_size=64, learning_rate=1e-2, decay=0.1)
FLOW_FROM_DDPM = Recipe(epochs=4, batch_size=64, learning_rate=1e-3, decay=0.03)  # begun with a DDPM's weights


def denoiser_loss(model: nn.Module, x_0: Tensor, generator: torch.Generator, sigma: float = 0.5) -> Tensor:
    """‖D(x_0 + σ eps) - x_0‖², the mean over pixels, for clean digits x_0 [B, 1, 28, 28]."""
    eps = torch.randn(x_0.shape, generator=generator, device=x_0.device)
    return F.mse_loss(model(x_0 + sigma * eps).float(), x_0)


def pure_noise_loss(model: nn.Module, x_0: Tensor, generator: torch.Generator) -> Tensor:
    """‖D(eps) - x_0‖²: noise tells nothing of the digit, so that the best answer to any is the mean digit."""
    eps = torch.randn(x_0.shape, generator=generator, device=x_0.device)
    return F.mse_loss(model(eps).float(), x_0)


def noisy_digits(x: Tensor, sigma: float, seed: int) -> Tensor:
    """z = x + σ eps for digits x [N, 1, 28, 28]; digit k takes its noise from seed + k, whatever N is."""
    return x + sigma * noise_source(range(seed, seed + len(x)), x.shape[1:], x.device)()


@torch.no_grad()
def denoiser_error(model: nn.Module, x: Tensor, sigma: float, seed: int) -> float:
    """The denoiser's mean squared error to clean digits x [N, 1, 28, 28] in [0, 1], shown with this much noise."""
    batches = zip(noisy_digits(x, sigma, seed).split(500), x.split(500), strict=True)
    return (sum((model(z) - clean).square().sum() for z, clean in batches) / x.numel()).item()


def drop_classes(labels: Tensor, generator: torch.Generator, probability: float = 0.1) -> Tensor:
    """Labels [B] -> one-hot [B, 10], whole rows set to zero with this probability.

    So the model also learns the unconditional eps that guidance needs.
    Source: classifier-free guidance, Algorithm 1, arXiv 2207.12598.
    """
    kept = torch.rand(len(labels), generator=generator, device=labels.device) >= probability
    return F.one_hot(labels, NUM_CLASSES).float() * kept.unsqueeze(1)


@torch.no_grad()
def flow_from_ddpm(ddpm: TimeUNet) -> TimeFlow:
    """A flow that begins as a DDPM, with u = -eps: near t = 1, x_1 - x_0 is that but for the digit.

    `ClassFlow` is the network of `ClassUNet`, and needs its clock turned. `TimeFlow` multiplies where `TimeUNet`
    adds: its factors begin as 1.
    """
    by_class = isinstance(ddpm, ClassUNet)
    flow = (ClassFlow if by_class else TimeFlow)(ddpm.config["width"])
    flow.load_state_dict(ddpm.state_dict())
    for first, _, last, _ in (flow.t1, flow.t2):
        if by_class:  # w (1 - t) + b = -w t + (w + b)
            first.bias += first.weight[:, 0]
            first.weight.neg_()
        else:
            nn.init.zeros_(last.weight)
            nn.init.ones_(last.bias)
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
    steps: Iterable[int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[int, Tensor]]:
    """Train in place, one optimizer step each time the caller asks for the next item.

    images: [N, 1, 28, 28] uint8, labels: [N], on the model's device
    loss_of(model, x_0, labels, generator): the loss of one batch, x_0 [B, 1, 28, 28] in [0, 1]
    steps: which; all of the recipe's when None. The order and the noise of each follow from the seed and the step
        alone, so a resumed run sees what an uninterrupted one would have seen
    dtype: torch.bfloat16 runs the model under autocast

    Yields (step, loss) after each step.
    """
    device, per_epoch, epoch = images.device, math.ceil(len(images) / recipe.batch_size), None
    order_generator, generator = torch.Generator(), torch.Generator(device)
    model.train()
    for step in range(recipe.epochs * per_epoch) if steps is None else steps:
        i = step % per_epoch
        if epoch != step // per_epoch:
            epoch = step // per_epoch
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
    after_epoch: Callable[[nn.Module, int, list[float]], None] = lambda model, epoch, losses: None,
) -> bool:
    """`train` with a progress bar, checkpoints and a log in a folder, and a way to stop and go on.

    Writes folder/state.safetensors (to resume), folder/weights.safetensors (to use) and folder/log.csv every
    `save_every` seconds, after each epoch, and on Ctrl-C or SIGTERM once the running step is done.
    after_epoch(model, epochs done, all losses so far) draws figures, with averaged weights if the recipe has them,
        as weights.safetensors does.
    start: a weights file of the same model to go on from where its state file is lost: at the step that it had
        reached, with fresh moments of Adam
    Returns whether the run is complete. Raises ValueError when there is a run in the folder and `resume` is
    false, when that run is of another recipe, or when the loss is not finite.
    """
    check_folder(folder, resume)
    device, per_epoch = images.device, math.ceil(len(images) / recipe.batch_size)
    model.to(device, memory_format=torch.channels_last)
    check_batch(model, min(recipe.batch_size, len(images)), numbers=33)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate, fused=device.type != "mps")
    average = EMA(model, recipe.average) if recipe.average else None

    def write():
        save_results(folder, run, model, average, per_epoch)

    described = {"model": type(model).__name__, "config": model.config, "recipe": asdict(recipe), "digits": len(images)}
    parts = {"model": model.state_dict()} | ({"average": average.weights} if average else {})
    run = Run(folder, parts, optimizer, recipe.epochs * per_epoch, described, dtype, write=write)
    if resume:
        run.restore()
    elif start is not None:
        begin_with(start, run, model, average, per_epoch)
    steps = run.steps(recipe.batch_size, save_every=save_every, epoch=per_epoch)
    for step, loss in train(model, optimizer, loss_of, images, labels, recipe, steps=steps, dtype=dtype):
        run.losses[step] = loss
        if average:
            average.update(model, step)
        if (step + 1) % per_epoch == 0:
            with evaluated(model, average) as used:
                after_epoch(used, (step + 1) // per_epoch, run.losses[: step + 1].tolist())
    return run.step == len(run.losses)


@contextmanager
def evaluated(model: nn.Module, average: EMA | None) -> Iterator[nn.Module]:
    """The model as it is used, for a while: in evaluation mode and, if there is an average, with its weights."""
    if average:
        learned = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(average.weights)
    try:
        yield model.eval()
    finally:
        if average:
            model.load_state_dict(learned)
        model.train()


def save_results(folder: Path, run: Run, model: nn.Module, average: EMA | None, per_epoch: int):
    """Write weights.safetensors, and log.csv with the mean loss of each whole epoch that is known."""
    with evaluated(model, average) as used:
        epochs = round(run.step / per_epoch, 4)
        save_weights(folder / "weights.safetensors", used, {**run.metadata, "epochs": epochs})
    means = run.losses[: run.step - run.step % per_epoch].view(-1, per_epoch).mean(1).tolist()
    rows = [f"{epoch},{mean:.6f}" for epoch, mean in enumerate(means, start=1) if math.isfinite(mean)]
    write_atomically(folder / "log.csv", "\n".join(["epoch,mean_loss", *rows, ""]).encode())


def begin_with(start: Path, run: Run, model: nn.Module, average: EMA | None, per_epoch: int):
    """Begin a run with a file of weights, at the step that these had reached. Raises as `load_start` does."""
    found = load_start(start, model)
    run.step, run.seconds_before = min(round(found["epochs"] * per_epoch), len(run.losses)), found["seconds"]
    run.losses[: run.step] = math.nan  # not in a weights file
    if average:
        average.update(model, -1)  # which forgets the random weights
