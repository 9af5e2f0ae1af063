"""Safetensors files with a description, and files that are written whole or not at all."""

import json
import os
import tempfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


def write_atomically(path: str | Path, content: bytes):
    """Write a file under a temporary name beside its place, then rename: a crash or a full disk leaves the old file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, OSError):  # such as a full disk: say which file was not written
            raise OSError(error.errno, f"{error.strerror}, not written", str(path)) from None
        raise


def save_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict):
    """Write tensors and a JSON-able description to a safetensors file, atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(tensors, {key: json.dumps(value) for key, value in metadata.items()}))


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the description of a safetensors file.

    Raises FileNotFoundError when there is none, ValueError when it is damaged or no safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            described = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}): it may be cut short, or of another kind"
        ) from None
    what = f"{path} was not written by this project's training scripts: its metadata"
    return tensors, {key: parse_json(value, what) for key, value in described.items() if key != "format"}


def parse_json(text: str | bytes, what: str | Path):
    """What a JSON text holds. Raises ValueError, of `what`, when it is none, or nested too deeply to be one of ours."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not JSON: {error}") from None


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its kind when it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
