"""The judge and the Fréchet distance against closed forms."""

import pytest
import torch

from ddpm.mnist.data import load_mnist
from ddpm.mnist.judge import examine, frechet_distance, train_judge
from tests.conftest import DATA


def gaussian(mean, scale, count=200_000):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 2, dtype=torch.float64, generator=generator) @ torch.tensor(scale).double() + mean


def test_frechet_distance_of_gaussians_is_the_closed_form():
    a, b = gaussian(0, [[1.0, 0.0], [0.0, 1.0]]), gaussian(2, [[3.0, 0.0], [0.0, 0.5]])
    # ‖(2, 2)‖² + (1 - 3)² + (1 - 0.5)²
    assert frechet_distance(a, b) == pytest.approx(8 + 4 + 0.25, rel=0.01)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))


def test_frechet_distance_sees_correlation():
    a, b = gaussian(0, [[1.0, 0.8], [0.0, 0.6]]), gaussian(0, [[1.0, 0.0], [0.0, 1.0]])
    covariance = torch.tensor([[1.0, 0.8], [0.8, 1.0]])  # and that of b is the identity
    expected = 2 + 2 - 2 * torch.linalg.eigvalsh(covariance).sqrt().sum().item()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=0.03)


def test_frechet_distance_of_few_samples_is_finite():
    a = torch.randn(20, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert 0 < frechet_distance(a[:10], a[10:]) < float("inf")


def test_a_judge_learns_even_from_500_digits():
    images, labels = load_mnist(DATA, "train")
    judge = train_judge(images, labels, batch_size=25)
    test_images, test_labels = load_mnist(DATA, "test")
    read, features = examine(judge, test_images / 255)
    assert (read == test_labels).float().mean() > 0.8
    assert features.shape == (100, 128) and features.dtype == torch.float64
