"""Files of prompts, and of prompts with their T5 embeddings, ours and others'."""

from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from pathlib import Path

import numpy
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ddpm.tools.files import read_small, reading, write_atomically

NUM_TOKENS = 77
EMBEDS_LAYOUT = "a dictionary {prompt: tensor [77, D] or [1, 77, D]}, as scripts/embed_prompts.py writes it"


def load_embeds(path: str | Path) -> dict[str, Tensor]:
    """A file of prompts and their embeddings [77, D_text]; prompts as T5 reads them, lower-cased and stripped.

    Reads what `save_embeds` wrote, and a .pth dictionary or .npz {prompt: [1, 77, D_text]}, without unpickling code and
    from whatever device it was saved on.
    Raises FileNotFoundError when there is no file, ValueError when it holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no embeddings file at {path}")
    with reading(path, "file of prompt embeddings"):
        if path.suffix in (".pth", ".pt"):
            embeds = torch.load(path, weights_only=True, map_location="cpu")
        elif path.suffix == ".npz":  # which numpy does not unpickle unless told to
            with numpy.load(path) as arrays:
                embeds = {prompt: torch.from_numpy(array) for prompt, array in arrays.items()}
        else:
            embeds = load_file(path)
    if not isinstance(embeds, dict):
        raise ValueError(
            f"{path} is no file of prompt embeddings: it holds a {type(embeds).__name__}, not {EMBEDS_LAYOUT}"
        )
    for prompt, tensor in embeds.items():
        if not isinstance(prompt, str) or not isinstance(tensor, Tensor) or not 2 <= tensor.ndim <= 3:
            kind = type(tensor).__name__
            raise ValueError(
                f"{path} is no file of prompt embeddings: {prompt!r} is a {kind}; it needs {EMBEDS_LAYOUT}"
            )
        if prompt in ("prompt_embeds", "negative_prompt_embeds"):
            raise ValueError(f"{path} names no prompts, but {prompt!r}: it must hold {EMBEDS_LAYOUT}")
        if not tensor.is_floating_point() or not tensor.float().isfinite().all():
            raise ValueError(f"{path}: the embeddings of {prompt!r} are not finite floating-point numbers")
    try:
        embeds = {normalised(prompt): tensor.reshape(tensor.shape[-2:]) for prompt, tensor in embeds.items()}
    except RuntimeError:  # several in one
        raise ValueError(f"{path} holds batches of embeddings, not {EMBEDS_LAYOUT}") from None
    _check_embeds(path, embeds)
    return embeds


def normalised(prompt: str) -> str:
    """A prompt as T5 reads it: lower-cased, without blanks at its ends."""
    return prompt.lower().strip()


def _check_embeds(path: str | Path, embeds: dict[str, Tensor]):
    shapes = {tuple(tensor.shape) for tensor in embeds.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2 or next(iter(shapes))[0] != NUM_TOKENS:
        found = " and ".join(str(list(shape)) for shape in sorted(shapes)) or "nothing"
        raise ValueError(f"{path} is no file of prompt embeddings: all must be [77, D] of one model, these are {found}")


def read_prompts(path: str | Path) -> list[str]:
    """The lines of a text file, UTF-8 or UTF-16 with a byte-order mark, without blanks at their ends and empty lines.

    Raises FileNotFoundError, or ValueError when it is not such text.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file of prompts at {path}")
    content = read_small(path)
    encoding = "utf-16" if content.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not {encoding.removesuffix('-sig')} text, at byte {error.start}") from None
    if "\0" in text:
        raise ValueError(f"{path} is not text: it holds zeros; save it as UTF-8")
    return [line.strip() for line in text.splitlines() if line.strip()]


def save_embeds(path: str | Path, embeds: dict[str, Tensor]):
    """Write prompts and their embeddings, [77, D_text] of one T5, to a safetensors file, atomically."""
    _check_embeds(path, embeds)
    write_atomically(path, save({prompt: tensor.cpu().contiguous() for prompt, tensor in embeds.items()}))
