"""Drawing digits with a `TimeUNet` or `ClassUNet`, and with a `TimeFlow` or `ClassFlow`."""

import operator
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ddpm.estimates import Estimate, Guider, Model, classifier_free, guided, unguided
from ddpm.flow import euler_step, flow_times, heun_step, integrate, velocity_of
from ddpm.mnist.unet import IMAGE_SIZE, NUM_CLASSES, ClassFlow, ClassUNet, TimeFlow, TimeUNet, UNet, folded
from ddpm.process import ddim_step, ddpm_step, dpm_solver_step
from ddpm.sampling import iterative_denoise, noise_source, sample, whole_seeds
from ddpm.schedule import Schedule, check_whole, linear_schedule, linspace_timesteps, log_snr_timesteps
from ddpm.tools.memory import keep_freed

SAMPLERS = {"ddpm": ddpm_step, "ddim": ddim_step, "dpm++": dpm_solver_step}
FLOW_SAMPLERS = {"euler": euler_step, "heun": heun_step}


@keep_freed()
def sample_digits(
    model: TimeUNet,
    labels: Sequence[int] | None,
    seeds: Sequence[int],
    schedule: Schedule,
    *,
    num_steps: int | None = None,
    guidance_scale: float = 5.0,
    guider: Guider = classifier_free,
    sampler: str = "ddpm",
    eta: float = 0.0,
    batch_size: int = 100,
    callback: Callable[[int, Tensor], None] = lambda done, x_t: None,
) -> Tensor:
    """Digits from pure noise: labels [N] and seeds [N] -> images [N, 1, 28, 28] in [0, 1], on the CPU.

    labels, seeds: lists, ranges, arrays or tensors of whole numbers
    labels: the digits to draw with a `ClassUNet`; None for a `TimeUNet`
    schedule: of as many timesteps as the model was trained with
    num_steps: how many of the schedule's timesteps to visit, all of them when None
    guidance_scale, guider: γ and guider of `guided`; without labels there is nothing to guide
    sampler, eta: one of SAMPLERS; how much fresh noise ddim and dpm++ add
    callback(done, x_t): after each step: how many steps of how many digits are done, of N · num_steps in all, and
        the noisy digits of the batch before it
    Each image depends on its own seed and label alone, up to the rounding of another batch size.
    Raises ValueError, before anything is computed, for labels that are not one digit for each seed, for what does not
    go with the model or is out of its range, and for a flow, which `sample_flow` draws with.

    Digits are in [0, 1] in training, too: after 300 linear steps ᾱ_T is still 0.048, so x_T keeps 22 % of the image. In
    [-1, 1], where digits have the mean -0.74, x_T would have the mean -0.16, 4.5 standard errors from the N(0, I) that
    sampling starts from; in [0, 1] it is 0.03, less than one.
    """
    if isinstance(model, TimeFlow):
        raise ValueError(f"a {type(model).__name__} is a flow: draw with sample_flow")
    check_schedule(model, schedule)
    classes, seeds = conditioning(model, labels, seeds)
    device = next(model.parameters()).device
    step = pick_step(SAMPLERS, sampler, eta)
    timesteps = visited_timesteps(schedule, num_steps, sampler, eta)
    batches = in_batches(len(seeds), batch_size)
    model, images = folded(model), []
    for batch in batches:
        noise = noise_source(seeds[batch], (1, IMAGE_SIZE, IMAGE_SIZE), device)
        if classes is None:
            estimate = unguided(model)
        else:
            c = classes[batch]
            estimate = guided(encoded_once(model, len(c)), c, torch.zeros_like(c), guidance_scale, guider=guider)

        def report(step: int, t: int, x_t: Tensor, _: Tensor, before: int = batch.start * len(timesteps)):
            callback(before + (step + 1) * len(x_t), x_t)

        x_0 = iterative_denoise(estimate, noise(), timesteps, schedule, noise=noise, step=step, callback=report)
        images.append(x_0.clamp(0, 1).cpu())
    return torch.cat(images)


class GuidedDigits:
    """A `ClassUNet` for the algorithms of `ddpm.sampling`, which also run IF.

    digits = GuidedDigits(load_model("ddpm_class"))
    six, nine = digits.estimate([6] * 8), digits.estimate([9] * 8)
    images = digits.draw(anagram([six, nine], [identity(), rotate_180()]), seeds=range(8))

    num_steps: how many of the schedule's timesteps to visit, evenly; guidance_scale: γ of `guided`
    dtype: in which the model computes; the sampler's arithmetic is in float32
    Raises ValueError when num_steps is not from 1 to T, and for a model without classes.
    """

    def __init__(
        self,
        model: ClassUNet,
        *,
        num_steps: int = 100,
        guidance_scale: float = 5.0,
        dtype: torch.dtype = torch.float32,
    ):
        if isinstance(model, UNet) and not isinstance(model, ClassUNet):
            raise ValueError(f"GuidedDigits draws with a ClassUNet, not with a {type(model).__name__}")
        self.model, self.guidance_scale, self.dtype = model, guidance_scale, dtype
        self.device = next(model.parameters()).device
        self.schedule = linear_schedule(model.num_timesteps)
        self.timesteps = linspace_timesteps(self.schedule.num_timesteps, num_steps)

    def estimate(self, labels: Sequence[int]) -> Estimate:
        """The guided estimate of these digits [N], one for each image."""

        def model(x_t: Tensor, t: int, c: Tensor) -> Tensor:
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                return self.model(x_t, t, c)

        c = one_hot(labels, self.device)
        return guided(model, c, torch.zeros_like(c), self.guidance_scale)

    @keep_freed()
    def draw(
        self,
        estimate: Estimate,
        seeds: Sequence[int],
        algorithm: Callable[..., Tensor] = sample,
        *,
        num_steps: int | None = None,
        description: str = "digits",
    ) -> Tensor:
        """Images [N, 1, 28, 28] in [0, 1], on the CPU, one for each seed, all at once, with a progress bar.

        algorithm: bind its own arguments with functools.partial, such as partial(sdedit, x_0=x_0, i_start=50)
        num_steps: how many it takes, if not one for each timestep; description: both for the progress bar
        """
        noise = noise_source(some_seeds(seeds), (1, IMAGE_SIZE, IMAGE_SIZE), self.device)
        with tqdm(total=num_steps or len(self.timesteps), desc=description, unit="step") as bar:
            loop = {"timesteps": self.timesteps, "schedule": self.schedule, "callback": lambda *_: bar.update()}
            return algorithm(estimate=estimate, noise=noise, **loop).clamp(0, 1).cpu()


def visited_timesteps(schedule: Schedule, num_steps: int | None, sampler: str, eta: float = 0.0) -> list[int]:
    """Noisiest first: evenly from T-1 to 0; for DPM-Solver++ without fresh noise, even in log SNR."""
    num_steps = schedule.num_timesteps if num_steps is None else num_steps
    if sampler == "dpm++" and not eta:
        return log_snr_timesteps(schedule, num_steps)
    return linspace_timesteps(schedule.num_timesteps, num_steps)


def pick_step(samplers: dict[str, Callable], name: str, eta: float = 0.0) -> Callable:
    """One of SAMPLERS or FLOW_SAMPLERS. Raises ValueError for another, and for an eta that it does not take."""
    if name not in samplers:
        hint = ", which is for flows" if name in FLOW_SAMPLERS else ", which is for DDPMs" if name in SAMPLERS else ""
        raise ValueError(f"the sampler must be one of {', '.join(samplers)}, not {name}{hint}")
    if eta and name not in ("ddim", "dpm++"):
        raise ValueError(f"eta is for ddim and dpm++: {name} has no such choice")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be from 0 to 1, not {eta:g}")
    return partial(samplers[name], eta=eta) if eta else samplers[name]


@keep_freed()
def sample_flow(
    model: TimeFlow,
    labels: Sequence[int] | None,
    seeds: Sequence[int],
    *,
    num_steps: int = 50,
    guidance_scale: float = 5.0,
    sampler: str = "euler",
    batch_size: int = 100,
    callback: Callable[[int, Tensor], None] = lambda done, x_t: None,
) -> Tensor:
    """`sample_digits` for a flow, in steps of 1/num_steps from t = 0 to 1.

    sampler: "euler", or "heun" for two evaluations a step and second order
    """
    if isinstance(model, TimeUNet):
        raise ValueError(f"a {type(model).__name__} is a DDPM: draw with sample_digits")
    classes, seeds = conditioning(model, labels, seeds)
    step, times = pick_step(FLOW_SAMPLERS, sampler), flow_times(num_steps)
    batches = in_batches(len(seeds), batch_size)
    device = next(model.parameters()).device
    model, images = folded(model), []
    for batch in batches:
        x_0 = noise_source(seeds[batch], (1, IMAGE_SIZE, IMAGE_SIZE), device)()
        c = None if classes is None else classes[batch]

        def report(i: int, t: float, x_t: Tensor, before: int = batch.start * num_steps):
            callback(before + (i + 1) * len(x_t), x_t)

        velocity = velocity_of(model if c is None else encoded_once(model, len(c)), c, guidance_scale)
        x_1 = integrate(velocity, x_0, times, step=step, callback=report)
        images.append(x_1.clamp(0, 1).cpu())
    return torch.cat(images)


def pick_sampling(
    model: TimeUNet | TimeFlow, num_steps: int | None = None, sampler: str | None = None, eta: float = 0.0
) -> tuple[int, Callable[..., Tensor]]:
    """How many steps a model of either kind takes, and `sample_digits` or `sample_flow` with these options bound.

    num_steps: when None, all timesteps of a DDPM, and 50 steps of a flow
    sampler: when None, "ddpm", and "euler" of a flow
    Raises ValueError as these do.
    """
    if isinstance(model, TimeFlow):
        num_steps, sampler = 50 if num_steps is None else num_steps, sampler or "euler"
        pick_step(FLOW_SAMPLERS, sampler, eta)
        flow_times(num_steps)
        return num_steps, partial(sample_flow, num_steps=num_steps, sampler=sampler)
    schedule, sampler = linear_schedule(model.num_timesteps), sampler or "ddpm"
    pick_step(SAMPLERS, sampler, eta)
    steps = len(visited_timesteps(schedule, num_steps, sampler, eta))
    return steps, partial(sample_digits, schedule=schedule, num_steps=num_steps, sampler=sampler, eta=eta)


def check_schedule(model: nn.Module, schedule: Schedule):
    """Raises ValueError for a schedule of another length than the model was trained with, if it says with which."""
    trained, given = getattr(model, "num_timesteps", None), schedule.num_timesteps
    if trained not in (None, given):
        raise ValueError(f"the model was trained with {trained} timesteps: give a schedule of these, not of {given}")


def conditioning(
    model: nn.Module, labels: Sequence[int] | None, seeds: Sequence[int]
) -> tuple[Tensor | None, list[int]]:
    """What the model is told, one-hot [N, 10] or None, and the seeds [N] as a list.

    Raises ValueError when labels and seeds are not whole numbers, and as many; and unless there are labels for a model
    of this module with classes, and none for one without.
    """
    name, seeds = type(model).__name__, some_seeds(seeds)
    if labels is None:
        if isinstance(model, (ClassUNet, ClassFlow)):
            raise ValueError(f"a {name} draws the digits that it is told: give labels, one for each seed")
        return None, seeds
    if type(model) in (TimeUNet, TimeFlow):
        raise ValueError(f"a {name} cannot be told which digit to draw: give None as labels")
    c = one_hot(labels, next(model.parameters()).device)
    if len(c) != len(seeds):
        raise ValueError(f"give a label for each of the {len(seeds)} seeds, not {len(c)}")
    return c, seeds


def some_seeds(seeds: Sequence[int]) -> list[int]:
    """`whole_seeds`, of which there must be one at least."""
    if not (seeds := whole_seeds(seeds)):
        raise ValueError("seeds must hold one for each digit: there are none")
    return seeds


def in_batches(count: int, size: int) -> list[slice]:
    """So many digits in batches of at most `size`. Raises ValueError for a size below 1, or that is not whole."""
    check_whole("batch_size", size)
    if size < 1:
        raise ValueError(f"batch_size must be at least 1, not {size}")
    return [slice(start, start + size) for start in range(0, count, size)]


def encoded_once(model: Model, count: int) -> Model:
    """For guidance, which asks twice about the same `count` images: all before the class enters is computed once."""
    return lambda x_t, t, c: model(x_t[:count], t, c)


def one_hot(labels: Sequence[int], device: torch.device) -> Tensor:
    """Labels [B] as one-hot rows, [B, 10]. Raises ValueError for what are no digits."""
    try:
        labels = [operator.index(label) for label in labels]
    except TypeError:
        raise ValueError(f"labels must be a list of digits, such as [3, 7], not {labels!r:.40}") from None
    for label in labels:
        if not 0 <= label < NUM_CLASSES:
            raise ValueError(f"a label is a digit from 0 to {NUM_CLASSES - 1}, not {label}")
    return F.one_hot(torch.tensor(labels, dtype=torch.long), NUM_CLASSES).float().to(device)
