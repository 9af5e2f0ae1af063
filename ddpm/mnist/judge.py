"""An independent judge of digits: a small CNN classifier, and the Fréchet distance in its feature space.

It knows nothing of diffusion and is trained on real digits alone, so it can say whether a generated digit is
the one that was asked for, and how far a set of digits is from the real ones.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ddpm.mnist.unet import NUM_CLASSES


class Judge(nn.Module):
    """Digits [B, 1, 28, 28] in [0, 1] -> logits [B, 10]; `features` gives the layer before, [B, 128]."""

    def __init__(self, width: int = 32, num_features: int = 128):
        super().__init__()
        self.config = {"width": width, "num_features": num_features}

        def block(i: int, o: int) -> nn.Sequential:
            convolution = nn.Conv2d(i, o, 3, padding=1, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2))

        self.blocks = nn.Sequential(block(1, width), block(width, 2 * width), block(2 * width, 4 * width))
        self.penultimate = nn.Linear(4 * width * 3 * 3, num_features)
        self.last = nn.Linear(num_features, NUM_CLASSES)

    def features(self, x: Tensor) -> Tensor:
        """Digits [B, 1, 28, 28] in [0, 1] -> [B, 128], what the Fréchet distance is measured on."""
        return F.relu(self.penultimate(F.dropout(self.blocks(x).flatten(1), 0.3, self.training)))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.features(x))


def train_judge(
    images: Tensor, labels: Tensor, *, epochs: int = 6, batch_size: int = 256, seed: int = 20040805
) -> Judge:
    """Train a judge on digits [N, 1, 28, 28] uint8 and labels [N], each shifted by up to two pixels at random."""
    torch.manual_seed(seed)
    judge = Judge().to(images.device).train()
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.01)
    batches_per_epoch = -(-len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * batches_per_epoch)
    for epoch in range(epochs):
        batches = torch.randperm(len(images)).split(batch_size)
        for rows in tqdm(batches, desc=f"training the judge, epoch {epoch + 1}/{epochs}", leave=False):
            x = F.pad(images[rows].float() / 255, (2, 2, 2, 2))
            dx, dy = torch.randint(5, (2,)).tolist()
            loss = F.cross_entropy(judge(x[:, :, dy : dy + 28, dx : dx + 28]), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return judge.eval()


@torch.no_grad()
def examine(judge: Judge, images: Tensor) -> tuple[Tensor, Tensor]:
    """Digits [N, 1, 28, 28] in [0, 1] -> the digits that the judge reads [N], and its features [N, 128] in float64.

    Both are on the CPU, since not every device has float64.
    """
    features = torch.cat([judge.features(batch) for batch in images.split(1000)])
    return judge.last(features).argmax(1).cpu(), features.cpu().double()


def measure_samples(
    judge: Judge, images: Tensor, labels: Tensor | None, real: Tensor
) -> tuple[dict[str, float], Tensor]:
    """How good samples are: "confirmed", the share that is read as asked, and "fid", their distance from real digits.

    images: [N, 1, 28, 28] in [0, 1]; labels: [N], what was asked for, or None: "confirmed" is then left out
    real: features [M, F] of real digits, see `examine`; the first M of the images are compared with them
    Also returns the digits that the judge reads [N].
    """
    read, features = examine(judge, images)
    confirmed = {} if labels is None else {"confirmed": (read == labels).double().mean().item()}
    return {**confirmed, "fid": frechet_distance(features[: len(real)], real)}, read


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """‖μ_a - μ_b‖² + tr(Σ_a + Σ_b - 2 √(Σ_a Σ_b)) between features [N, F] and [M, F].

    Smaller sets give larger distances: compare only with sets of the same size.
    Source: Fréchet inception distance eq. 6, arXiv 1706.08500, here with the judge's features.
    """
    mean = (a.mean(0) - b.mean(0)).square().sum()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # the eigenvalues of Σ_a Σ_b are those of √Σ_a Σ_b √Σ_a, which is symmetric
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T
    trace_root = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    return (mean + cov_a.trace() + cov_b.trace() - 2 * trace_root).item()
