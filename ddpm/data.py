"""MNIST, held in memory as two tensors."""

from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets import MNIST

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def load_mnist(root: str | Path, split: str = "train", limit: int | None = None) -> tuple[Tensor, Tensor]:
    """One split of MNIST from torchvision's layout, root/MNIST/raw; downloaded when absent.

    Returns images [N, 1, 28, 28] uint8 in 0 … 255 and labels [N] int64; the first `limit` of them if given.
    Raises FileNotFoundError when the files are neither there nor to be had, ValueError when one is damaged.
    """
    root = Path(root)
    raw = root / "MNIST" / "raw"
    train = {"train": True, "test": False}[split]
    here = [name for name in FILES[split] if (raw / name).is_file() or (raw / f"{name}.gz").is_file()]
    try:
        # torchvision asks for all four files even to read two of them: only download what is absent
        dataset = MNIST(root, train=train, download=len(here) < 2)
    except (OSError, RuntimeError) as error:
        if len(here) == 2:
            raise ValueError(f"cannot read MNIST in {raw}: {_one_line(error)}") from None
        names = ", ".join(name for pair in FILES.values() for name in pair)
        raise FileNotFoundError(
            f"MNIST is not in {raw} and could not be downloaded ({_one_line(error)}): put these four files there: {names}"
        ) from None
    except (ValueError, AssertionError) as error:
        raise ValueError(f"a file of MNIST in {raw} is damaged or cut short ({_one_line(error)}): fetch {' and '.join(FILES[split])} again") from None
    images, labels = dataset.data.unsqueeze(1), dataset.targets.long()
    return images[:limit], labels[:limit]
