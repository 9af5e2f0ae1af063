"""The options of a cascade, checked before anything is computed."""

import difflib
import inspect
import math
import operator
import warnings
from collections.abc import Callable, Sequence

from ddpm.sampling import Step, sample
from ifmodel.stage import SAMPLERS, SCHEDULE


def check_options(options: dict, draw_all: Callable, algorithm: Callable = sample):
    """Raises TypeError for an option of `Cascade.draw` that `Cascade.draw_all` has not."""
    known = [name for name in inspect.signature(draw_all).parameters if name != "jobs"]
    for name in options:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            meant = f" (did you mean {nearest[0]}?)" if nearest else ""
            own = name in inspect.signature(algorithm).parameters
            hint = "; bind the algorithm's own arguments with functools.partial" if own else ""
            raise TypeError(f"draw has no option {name}{meant}: there are {', '.join(known)}{hint}")


def as_number(name: str, value) -> float:
    """A setting's value: a finite γ, a whole number of steps or noise level. Raises ValueError for another."""
    try:
        number = float(value) if name == "guidance_scale" else operator.index(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if number != number or abs(number) == math.inf:  # an int may be too large for math.isfinite
        kind = "finite" if name == "guidance_scale" else "whole"
        raise ValueError(f"{name} must be a {kind} number, not {value!r}")
    return number


def warn_of_noise(number: int, timesteps: Sequence[int]):
    """IF's spacing of few steps, or of more than a third of all, begins where a model expects an image, not noise."""
    if timesteps[0] < 700:
        steps = "1 step begins" if len(timesteps) == 1 else f"{len(timesteps)} steps begin"
        told = f"stage {number}: {steps} at t = {timesteps[0]} of {SCHEDULE.num_timesteps}, so noise will stay"
        warnings.warn(f"{told}: take 4 to {SCHEDULE.num_timesteps // 3}", stacklevel=5)


def check_settings(sampler: str | Step, eta: float, guidance_interval: tuple[float, float], noise_level: int):
    """Raises ValueError for a setting that is out of its range."""
    if sampler not in SAMPLERS and not callable(sampler):
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, or a step function, not {sampler!r}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be from 0 to 1, not {eta:g}")
    if eta and callable(sampler) and "eta" not in inspect.signature(sampler).parameters:
        raise ValueError("this step function takes no eta: bind its own options with functools.partial")
    first, last = guidance_interval
    if first > last:
        raise ValueError(f"the guidance interval begins at the smaller t: {last} {first}, not {first} {last}")
    if last < 0 or first >= SCHEDULE.num_timesteps:
        raise ValueError(f"the guidance interval has no t from 0 to {SCHEDULE.num_timesteps - 1}: {first} {last}")
    if not 0 <= noise_level < SCHEDULE.num_timesteps:
        raise ValueError(f"the noise level must be from 0 to {SCHEDULE.num_timesteps - 1}, not {noise_level}")
