"""Models larger than memory: what does not fit stays in the memory-mapped files and is read layer by layer.

accelerate does it (the extra low-memory): before a layer runs, its weights are read from the file to the device, and
freed after it. They are not copied to the disk, and in host memory they are the page cache's.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from ddpm.tools.files import opened


def check_accelerate():
    """Raises ValueError, which says what to install, when accelerate is not there."""
    if find_spec("accelerate") is None:
        raise ValueError("low memory needs accelerate: pip install 'pixel-diffusion[low-memory]'")


def offload(model: nn.Module, files: Sequence[Path], device: str | torch.device, room: int = 0) -> nn.Module:
    """A model on the meta device, in the dtypes that it is to have, made to run on a device from safetensors files.

    room: bytes of the device that may be filled with weights, which are then read once
    The results are those of the same model wholly in memory, bit for bit.
    Raises ValueError when the files lack some of its tensors, or hold them in other shapes.
    """
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import set_module_tensor_to_device

    device = torch.device(device)
    place = (device.index or 0) if device.type == "cuda" else device.type
    index = _index(model, files)
    device_map = infer_auto_device_map(model, {place: room, "disk": 2**60}) if room > 0 else {"": "disk"}
    with ExitStack() as stack:
        mapped = {path: stack.enter_context(opened(path, device)) for path in files}
        for name, where in index.items():
            module = max((key for key in device_map if f"{name}.".startswith(f"{key}." if key else "")), key=len)
            if device_map[module] != "disk":
                value = mapped[where["safetensors_file"]].get_tensor(where["weight_name"])
                set_module_tensor_to_device(model, name, device, value=value)
    if "disk" not in device_map.values():
        return model
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # it warns of what was asked for
    return dispatch_model(model, device_map, main_device=str(device), offload_index=index)


def change_weight(layer: nn.Module, change: Callable[[Tensor], Tensor]):
    """Put `change` of a layer's weight in its place: now, or where it stays in its file, whenever it is read."""
    if layer.weight.is_meta:
        hook = layer._hf_hook  # accelerate's
        hook.weights_map = _Changed(hook.weights_map, change)
    else:
        layer.weight = nn.Parameter(change(layer.weight), requires_grad=layer.weight.requires_grad)


@dataclass
class _Changed(Mapping):
    """A layer's tensors, as accelerate reads them, with another weight."""

    tensors: Mapping[str, Tensor]
    change: Callable[[Tensor], Tensor]

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        return self.change(tensor) if name == "weight" else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def _index(model: nn.Module, files: Sequence[Path]) -> dict[str, dict]:
    """accelerate's index: for every tensor of a model its file, its name there and its dtype. Raises ValueError."""
    tensors = model.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}  # of one tensor, which may have several: T5's embedding has two
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    found: dict[str, tuple[Path, list[int]]] = {}
    for path in files:
        with opened(path) as file:
            found |= {name: (path, file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    index, folder = {}, files[0].parent
    for name, tensor in tensors.items():
        stored = next((other for other in names[id(tensor)] if other in found), None)
        if stored is None:
            raise ValueError(f"the weights in {folder} lack {name}: they are of another model, or not whole")
        path, shape = found[stored]
        if shape != list(tensor.shape):
            raise ValueError(f"{stored} in {path} is {shape} instead of {list(tensor.shape)}: it is of another model")
        index[name] = {
            "safetensors_file": path,
            "weight_name": stored,
            "dtype": str(tensor.dtype).removeprefix("torch."),
        }
    return index
