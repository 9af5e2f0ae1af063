"""Training runs that save, stop on Ctrl-C and resume bit for bit; and the average of a model's weights."""

import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from ddpm.tools.files import check_tensors, load_tensors, save_tensors
from ddpm.tools.memory import check_memory

STATE = "state.safetensors"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what Adam keeps of each parameter


def step_seed(seed: int, step: int) -> int:
    """The seed of one step's noise: a resumed run draws what an uninterrupted one would have drawn.

    Spread over the 32 bits that torch's CPU generator keeps of it, so that runs of different seeds differ.
    """
    return (seed * 2654435761 + step) % 2**32  # Knuth's multiplier, 2^32 over the golden ratio


def check_folder(folder: Path, resume: bool):
    """Refuse a folder with a run, unless it is resumed, and one without a run, if it is. Raises ValueError."""
    if (folder / STATE).exists() and not resume:
        raise ValueError(f"there is a run in {folder}: add --resume to go on, or choose another --out")
    if resume and not (folder / STATE).exists():
        raise ValueError(f"there is no run in {folder} to resume")


class Run:
    """A training run in a folder. It can stop after any step; resumed, it ends with the same weights, bit for bit.

    folder/state.safetensors holds all that it needs to go on.

    parts: the tensors that training changes, by part and name, such as {"model": model.state_dict()}
    total: how many steps it has in all
    described: what must not have changed when it is resumed, such as {"recipe": {…}}
    dtype: what it computes in; resuming in another one warns
    write: writes the run's other files, each time that the state is saved
    leads: whether this process saves and shows a progress bar
    agree: whether all processes are to stop, from whether this one is

    step: how many are done; losses: [total], filled by the loop over `steps`; log: lines that are kept with the state
    """

    def __init__(
        self,
        folder: Path,
        parts: dict[str, dict[str, Tensor]],
        optimizer: torch.optim.Optimizer,
        total: int,
        described: dict,
        dtype: torch.dtype,
        *,
        write: Callable[[], None] = lambda: None,
        leads: bool = True,
        agree: Callable[[bool], bool] = bool,
    ):
        check_memory(8 * total, f"a log of {total} steps")
        self.state, self.optimizer, self.described, self.dtype = folder / STATE, optimizer, described, dtype
        self.tensors = {f"{part}.{name}": x for part, tensors in parts.items() for name, x in tensors.items()}
        self.write, self.leads, self.agree = write, leads, agree
        self.losses = torch.zeros(total, device=next(iter(self.tensors.values())).device)
        self.step, self.log, self.seconds_before, self.started = 0, [], 0.0, time.monotonic()

    def steps(self, batch_size: int, *, save_every: float = 300, epoch: int | None = None) -> Iterator[int]:
        """The steps that are left, up to the last or to Ctrl-C or SIGTERM, with a progress bar in images.

        save_every: seconds; the state is also saved in the end, and after every `epoch` steps
        Raises ValueError when the loss has become huge or is not a number; the state keeps the last good one.
        """
        first, saved, stop, total = self.step, time.monotonic(), False, len(self.losses)
        shown = {"total": total * batch_size, "initial": first * batch_size, "disable": not self.leads}
        with stop_signal() as stopped, tqdm(**shown, unit="img", smoothing=0.05) as bar:
            while self.step < total and not stop:
                yield self.step
                self.step += 1
                bar.update(batch_size)
                stop = self.agree(stopped())
                due = time.monotonic() - saved > save_every or (epoch is not None and self.step % epoch == 0)
                if due or stop or self.step == total or self.step % 10 == 1:
                    recent = self.losses[max(first, self.step - 100) : self.step].mean().item()
                    if not abs(recent) < 1e3:
                        advice = "try a lower learning rate or --dtype float32, or --resume what was saved"
                        raise ValueError(f"the loss is {recent} at step {self.step - 1}: {advice}")
                    bar.set_description(f"loss {recent:.4f}", refresh=False)
                if due:
                    self.save()
                    saved = time.monotonic()
            self.save()

    @property
    def metadata(self) -> dict:
        """What the run's files say of it."""
        seconds = self.seconds_before + time.monotonic() - self.started
        return {**self.described, "dtype": str(self.dtype).removeprefix("torch."), "seconds": round(seconds, 1)}

    def save(self):
        """Write the state, then the other files, each atomically."""
        if not self.leads:
            return
        tensors = self.tensors | {"losses": self.losses[: self.step]}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
        # two names of the same memory, such as a T5's embedding, are one tensor each in the file
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        save_tensors(self.state, tensors, self.metadata | {"log": self.log})
        self.write()

    @torch.no_grad()
    def restore(self):
        """Put the saved state back into the tensors and the optimizer.

        Raises as `load_tensors` does, and ValueError, having changed nothing, when the run is another one or a tensor
        does not fit.
        """
        tensors, found = load_tensors(self.state)
        if not any(name.startswith("optimizer.") for name in tensors):
            raise ValueError(f"{self.state} is a weights file: only a training state ({STATE}) can be resumed")
        check_same(self.state, found, self.described)
        losses = tensors.pop("losses", self.losses[:0]).flatten()
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        expected = dict(self.tensors)
        for index, parameter in enumerate(parameters):
            moments = dict.fromkeys(MOMENTS, parameter) | {"step": torch.tensor(0.0)}
            expected |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
        check_tensors(f"{self.state} is not the whole state of this training", expected, tensors)
        if not (len(losses) and isinstance(found.get("seconds"), int | float) and isinstance(found.get("log"), list)):
            raise ValueError(f"{self.state} is damaged: it does not say how far the run came")
        if len(losses) > len(self.losses):
            raise ValueError(f"{self.state} has {len(losses)} steps done, more than the {len(self.losses)} asked for")
        if found.get("dtype") != self.metadata["dtype"] and self.leads:
            warnings.warn(f"the run was in {found.get('dtype')} and goes on in {self.metadata['dtype']}", stacklevel=3)
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])
        state = {}
        for index, parameter in enumerate(parameters):
            state[index] = {name: tensors[f"optimizer.{index}.{name}"] for name in MOMENTS}
            for name in ("exp_avg", "exp_avg_sq"):  # fused Adam walks both in memory order: keep channels_last
                state[index][name] = torch.empty_like(parameter).copy_(state[index][name])
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.step, self.log, self.seconds_before = len(losses), found["log"], found["seconds"]
        self.losses[: self.step] = losses


class EMA:
    """The exponential moving average of a model's weights, which samples better than the weights themselves."""

    def __init__(self, model: nn.Module, decay: float = 0.999):
        self.decay = decay
        self.weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int):
        """After step `step`; it is quicker at first, so that it forgets the random weights."""
        decay = min(self.decay, (1 + step) / (10 + step))
        pairs = [(self.weights[name], weight) for name, weight in model.state_dict().items()]
        averages, weights = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
        get_ema_multi_avg_fn(decay)(averages, weights, None)
        for count, current in pairs:
            if not count.is_floating_point():  # BatchNorm counts its batches
                count.copy_(current)


def check_same(path: str | Path, found: dict, wanted: dict):
    """Raises ValueError when a run's metadata is not what is wanted, naming every field."""

    def flat(fields: dict) -> dict:
        inner = {
            f"{key} {name}": x for key, value in fields.items() if isinstance(value, dict) for name, x in value.items()
        }
        return inner | {key: value for key, value in fields.items() if not isinstance(value, dict)}

    found, wanted = flat({key: found.get(key) for key in wanted}), flat(wanted)
    differ = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    if differ:
        differences = ", ".join(f"another {key}: {found.get(key)}, not {wanted.get(key)}" for key in differ)
        raise ValueError(f"{path} is of another run: it has {differences}")


@contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C and SIGTERM set a flag, so that the caller can end its step and save; a second one acts as usual."""
    received: list[int] = []
    previous: dict = {}

    def note(number: int, frame):
        received.append(number)
        restore()

    def restore():
        for number, handler in previous.items():
            signal.signal(number, handler)

    main = threading.current_thread() is threading.main_thread()  # no other may set handlers
    for number in (signal.SIGINT, signal.SIGTERM) if main else ():
        previous[number] = signal.signal(number, note)
    try:
        yield lambda: bool(received)
    finally:
        restore()
