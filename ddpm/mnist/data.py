"""MNIST, held in memory as two tensors."""

from contextlib import suppress
from pathlib import Path

from torch import Tensor

from ddpm.mnist.unet import NUM_CLASSES
from ddpm.tools.files import first_line

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def load_mnist(root: str | Path, split: str = "train", limit: int | None = None) -> tuple[Tensor, Tensor]:
    """The "train" or "test" split of MNIST from torchvision's layout, root/MNIST/raw; downloaded when absent.

    Returns images [N, 1, 28, 28] uint8 in 0 … 255 and labels [N] int64; the first `limit` of them if given.
    Raises FileNotFoundError when the files are neither there nor downloadable, ValueError when one is damaged.
    """
    from torchvision.datasets import MNIST  # here, since torchvision takes long to import

    raw = Path(root) / "MNIST" / "raw"
    made = [folder for folder in (raw, *raw.parents) if not folder.exists()]
    complete = all((raw / name).is_file() for name in FILES)
    try:
        dataset = MNIST(root, train={"train": True, "test": False}[split], download=not complete)
        images, labels = dataset.data.unsqueeze(1), dataset.targets.long()
        if images.shape[1:] != (1, 28, 28) or len(images) != len(labels):
            raise ValueError(f"{len(images)} images of {tuple(images.shape[2:])}, {len(labels)} labels")
        if labels.max() >= NUM_CLASSES:
            raise ValueError(f"it has a label {labels.max()}")
    except Exception as error:  # torchvision raises what its parser stumbles over, of a dozen kinds
        reason = first_line(error)
        if complete:
            names = [name for name in FILES if name.startswith("t10k" if split == "test" else "train")]
            raise ValueError(f"MNIST in {raw} is damaged ({reason}): get {' and '.join(names)} again") from None
        for folder in made:
            with suppress(OSError):  # what has a file in it stays
                folder.rmdir()
        raise FileNotFoundError(
            f"MNIST is not in {raw} and could not be downloaded ({reason}): put these four files there, "
            f"unpacked: {', '.join(FILES)}"
        ) from None
    return images[:limit], labels[:limit]


def one_of_each(images: Tensor, labels: Tensor) -> tuple[Tensor, list[int]]:
    """Of what `load_mnist` returns, the first of every digit, [10, 1, 28, 28] in [0, 1], and which these are."""
    digits = labels.unique().tolist()
    return images[[(labels == digit).nonzero()[0].item() for digit in digits]] / 255, digits
