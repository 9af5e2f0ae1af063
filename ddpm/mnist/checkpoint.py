"""The MNIST models' weights and training states as safetensors files."""

from pathlib import Path

import torch
from torch import nn

from ddpm.mnist.judge import Judge
from ddpm.mnist.unet import ClassFlow, ClassUNet, TimeFlow, TimeUNet, UNet
from ddpm.tools.files import check_tensors, first_line, load_tensors, save_tensors
from ddpm.tools.memory import check_memory

MODELS = {cls.__name__: cls for cls in (UNet, TimeUNet, ClassUNet, TimeFlow, ClassFlow, Judge)}
SHIPPED = {
    name: Path(__file__).parent / "weights" / f"{name}.safetensors"
    for name in ("denoiser", "ddpm_time", "ddpm_class", "flow_time", "flow_class", "judge")
}


def save_weights(path: str | Path, model: nn.Module, metadata: dict):
    """Write a model's weights in half precision, with all that `load_model` needs to build it again."""
    tensors = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()
    }
    save_tensors(path, tensors, {"model": type(model).__name__, "config": model.config, **metadata})


def build(kind: type[nn.Module], **config) -> nn.Module:
    """An untrained MNIST model, if the memory holds it with its gradients and Adam's moments. Raises ValueError."""
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in kind(**config).parameters())
    check_memory(4 * 4 * weights, f"training a {kind.__name__} of {config}")
    return kind(**config)


def weights_file(path: str | Path) -> Path:
    """The file that `load_model` reads: a file, that of a run's folder, or one of SHIPPED.

    Raises FileNotFoundError when there is none.
    """
    path = SHIPPED.get(str(path), Path(path))
    path = path / "weights.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}: name one, or one that is shipped ({', '.join(SHIPPED)})")
    return path


def load_model(
    path: str | Path, kind: type | tuple[type, ...] = nn.Module, device: str | torch.device = "cpu"
) -> nn.Module:
    """The MNIST model of a weights file, or the last of a training state: float32, channels_last, evaluation mode.

    path: a file, the folder of a run, or the name of one of SHIPPED
    kind: the class that it must be, such as `ClassUNet`, or several; a subclass does not do.
    Raises FileNotFoundError when there is no file, ValueError when it is damaged or holds another model.
    """
    path = weights_file(path)
    tensors, metadata = load_tensors(path)
    name = metadata.get("model")
    if not isinstance(name, str) or name not in MODELS:
        raise ValueError(
            f"{path} holds no MNIST model (its metadata names {name!r}): expected one of {', '.join(MODELS)}"
        )
    wanted = [cls.__name__ for cls in (kind if isinstance(kind, tuple) else (kind,))]
    if kind is not nn.Module and name not in wanted:
        flow, flows = name.endswith("Flow"), [other.endswith("Flow") for other in wanted]
        kind = " (a flow)" * (flow and not any(flows)) + " (not a flow)" * (not flow and all(flows))
        raise ValueError(f"{path} holds a {name}{kind}, but a {' or '.join(wanted)} is needed here")
    tensors = {
        key.removeprefix("model."): tensor
        for key, tensor in tensors.items()
        if not key.startswith(("optimizer.", "loss", "average."))
    }
    misfit = f"{path} does not fit the {name} that its metadata describes"
    try:
        model = build(MODELS[name], **metadata["config"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{misfit}: {first_line(error)}") from None
    check_tensors(misfit, model.state_dict(), tensors)
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ValueError(f"{path} has weights that are not finite: its training went wrong")
    model.load_state_dict(tensors)
    return model.to(device, memory_format=torch.channels_last).eval()


def load_start(path: str | Path, model: nn.Module) -> dict:
    """Put the weights of a file into a model of the same kind; returns the metadata. Raises as `load_model` does."""
    loaded, metadata = load_model(path, type(model)), load_tensors(weights_file(path))[1]
    if loaded.config != model.config:
        raise ValueError(f"{path} holds a model of {loaded.config}, not of {model.config}")
    if not all(type(metadata.get(name)) in (int, float) and metadata[name] >= 0 for name in ("epochs", "seconds")):
        raise ValueError(f"{path} does not say how long it was trained")
    model.load_state_dict(loaded.state_dict())
    return metadata
