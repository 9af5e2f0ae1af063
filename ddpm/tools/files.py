"""Safetensors files with a description, and files written atomically."""

import hashlib
import json
import os
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

FLOATS = {torch.float64, torch.float32, torch.bfloat16, torch.float16}  # that weights may be stored in
LARGEST_TEXT = 100_000_000  # bytes of a text or JSON file
POINTER = b"version https://git-lfs"


def write_atomically(path: str | Path, content: bytes):
    """Write under a temporary name in the same folder, then rename: a crash or a full disk leaves the old file."""
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


def write_json(path: str | Path, content):
    """Write what JSON can say, atomically."""
    write_atomically(path, json.dumps(content, indent=2).encode())


def save_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict):
    """Write tensors and a JSON-able description to a safetensors file, atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(tensors, {key: json.dumps(value) for key, value in metadata.items()}))


def load_tensors(path: str | Path, expected: Collection[str] = ()) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the description of a safetensors file.

    Raises FileNotFoundError when there is none, ValueError when it is damaged, no safetensors file, or lacks a tensor
    that is expected.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}")
    with reading(path, "whole safetensors file"), safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        described = file.metadata() or {}
    if missing := sorted(set(expected) - tensors.keys()):
        raise ValueError(f"{path} has no {missing[0]!r}: delete it, so that it is made again")
    what = f"{path} was not written by this project's training scripts: its metadata"
    return tensors, {key: parse_json(value, what) for key, value in described.items() if key != "format"}


@contextmanager
def opened(path: Path, device: object = "cpu") -> Iterator[safe_open]:
    """A safetensors file, mapped, whose tensors come to a device. Raises ValueError when it is damaged."""
    with reading(path, "whole safetensors file"), safe_open(path, framework="pt", device=str(device)) as file:
        yield file


def mapped(files: Sequence[Path]) -> dict[str, Tensor]:
    """The tensors of safetensors files, whose values are read when they are used. Raises ValueError."""
    tensors: dict[str, Tensor] = {}
    for path in files:
        with opened(path) as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def check_tensors(misfit: str, expected: dict[str, Tensor], found: dict[str, Tensor]):
    """Refuse tensors of other names, shapes or kinds of number, naming at most five of each. Raises ValueError.

    misfit: the sentence that the names end, such as "these weights do not fit their config"
    Any of FLOATS will do for another.
    """
    misfits: dict[str, list[str]] = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape": [],
        "of another type": [],
    }
    for name in sorted(expected.keys() & found.keys()):
        wanted, given = expected[name], found[name]
        if wanted.shape != given.shape:
            misfits["of another shape"].append(f"{name} {list(given.shape)} instead of {list(wanted.shape)}")
        elif given.dtype != wanted.dtype and not {given.dtype, wanted.dtype} <= FLOATS:
            misfits["of another type"].append(f"{name} {given.dtype} instead of {wanted.dtype}")
    wrong = [
        f"{len(names)} {kind} ({', '.join(names[:5])}{', …' if len(names) > 5 else ''})"
        for kind, names in misfits.items()
        if names
    ]
    if wrong:
        raise ValueError(f"{misfit}: {'; '.join(wrong)}")


def fingerprint(*paths: Path) -> str:
    """Twelve hex digits that other contents do not share: they name what was made from these files."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]


@contextmanager
def reading(path: str | Path, kind: str) -> Iterator[None]:
    """Turn whatever a damaged file makes its reader raise, a dozen kinds of exception, into a ValueError of one line.

    kind: what the file should be, such as "whole safetensors file"
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = "it only names the file for Git LFS: run `git lfs pull`" if is_pointer(path) else first_line(error)
        raise ValueError(f"{path} is no {kind}, or is damaged: {reason}") from None


def is_pointer(path: str | Path) -> bool:
    """Whether a file is what a clone without Git LFS has in the place of a large one."""
    if not Path(path).is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(POINTER)) == POINTER


def read_small(path: Path) -> bytes:
    """The bytes of a text or JSON file. Raises ValueError for one that is too large to be one of ours."""
    if path.stat().st_size > LARGEST_TEXT:
        raise ValueError(f"{path} has {path.stat().st_size / 1e9:,.1f} GB, too much for text or JSON")
    return path.read_bytes()


def parse_json(text: str | bytes, what: str | Path):
    """What a JSON text holds. Raises ValueError, of `what`, when it is none, or nested too deeply to be one of ours."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not JSON: {error}") from None


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its kind when it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
