"""A training run: its state, saved whole and put back exactly, its steps' seeds, and Ctrl-C between two of them."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ddpm.files import check_tensors, load_tensors, save_tensors

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what Adam keeps of each parameter


def step_seed(seed: int, step: int) -> int:
    """The seed of one step's noise: a resumed run draws what an uninterrupted one would have drawn.

    Spread over the 32 bits that torch's CPU generator keeps of it, so that runs of different seeds differ.
    """
    return (seed * 2654435761 + step) % 2**32  # Knuth's multiplier, 2^32 over the golden ratio


def save_state(
    path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, others: dict[str, Tensor], metadata: dict
):
    """Write all that a run needs to go on: weights, Adam's moments, and other tensors, such as the losses so far."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
    # two names of the same memory, such as a T5's embedding, are one tensor each in the file
    tensors = {name: tensor.clone() for name, tensor in (tensors | others).items()}
    save_tensors(path, tensors, metadata)


def load_state(
    path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, wanted: dict
) -> tuple[dict[str, Tensor], dict]:
    """Put a saved run back into a model and its optimizer; returns the other tensors and the metadata.

    wanted: what the metadata must say, such as {"recipe": {…}}
    Raises as `load_tensors` does, and ValueError, having changed nothing, when the run is another or a tensor does not
    fit.
    """
    tensors, metadata = load_tensors(path)
    if not any(name.startswith("optimizer.") for name in tensors):
        raise ValueError(f"{path} is a weights file: only a training state (state.safetensors) can be resumed")
    check_same(path, metadata, wanted)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    expected = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, parameter in enumerate(parameters):
        moments = dict.fromkeys(MOMENTS, parameter) | {"step": torch.tensor(0.0)}
        expected |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
    state = {name: tensor for name, tensor in tensors.items() if name.startswith(("model.", "optimizer."))}
    check_tensors(f"{path} is not the whole state of this training", expected, state)
    model.load_state_dict({name: state[f"model.{name}"] for name in model.state_dict()})
    moments = {}
    for index, parameter in enumerate(parameters):
        moments[index] = {name: state[f"optimizer.{index}.{name}"] for name in MOMENTS}
        for name in ("exp_avg", "exp_avg_sq"):  # fused Adam walks both in memory order: keep channels_last
            moments[index][name] = torch.empty_like(parameter).copy_(moments[index][name])
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return {name: tensor for name, tensor in tensors.items() if name not in state}, metadata


def check_same(path: str | Path, found: dict, wanted: dict):
    """Raises ValueError that names every field in which the metadata of a run is not what is wanted."""

    def flat(fields: dict) -> dict:
        inner = {
            f"{key} {name}": x for key, value in fields.items() if isinstance(value, dict) for name, x in value.items()
        }
        return inner | {key: value for key, value in fields.items() if not isinstance(value, dict)}

    found, wanted = flat({key: found.get(key) for key in wanted}), flat(wanted)
    differ = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    if differ:
        told = ", ".join(f"another {key}: {found.get(key)}, not {wanted.get(key)}" for key in differ)
        raise ValueError(f"{path} is of another run: it has {told}")


@contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """Within it, Ctrl-C or SIGTERM sets a flag, so that the caller can end its step and save; a second one acts."""
    received: list[int] = []
    previous: dict = {}

    def note(number: int, frame):
        received.append(number)
        restore()

    def restore():
        for number, handler in previous.items():
            signal.signal(number, handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, note)
    try:
        yield lambda: bool(received)
    finally:
        restore()
