"""The shipped weights: what they say of themselves, and that they do what they are for, on a few digits."""

import pytest
import torch

from ddpm.flow import as_estimate, straight_schedule, velocity_of
from ddpm.mnist import sample_digits, sample_flow
from ddpm.mnist.checkpoint import SHIPPED, load_model
from ddpm.mnist.data import load_mnist
from ddpm.mnist.judge import examine, frechet_distance
from ddpm.mnist.sampling import one_hot
from ddpm.mnist.training import noisy_digits
from ddpm.process import ddim_step
from ddpm.sampling import anagram, noise_source, sample
from ddpm.schedule import linear_schedule
from ddpm.tools.files import load_tensors
from ddpm.views import identity, rotate_180
from tests.conftest import DATA


@pytest.fixture(scope="module")
def digits():
    images, labels = load_mnist(DATA, "test")
    return images / 255, labels


@pytest.mark.parametrize("name", SHIPPED)
def test_each_file_loads_and_says_what_it_was_trained_on(name):
    model, metadata = load_model(SHIPPED[name]), load_tensors(SHIPPED[name])[1]
    assert metadata["digits"] == (30_000 if name == "flow_class" else 60_000)
    assert metadata["epochs"] > 0
    stored = load_tensors(SHIPPED[name])[0]
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16, torch.int64}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config["width"] == {"denoiser": 128, "judge": 32}.get(name, 64)


def test_the_judge_reads_real_digits(digits):
    images, labels = digits
    read, _ = examine(load_model(SHIPPED["judge"]), images)
    assert (read == labels).float().mean() >= 0.98


@torch.no_grad()
def test_the_denoiser_removes_most_of_the_noise(digits):
    images, _ = digits
    noisy = noisy_digits(images[:50], 0.5, seed=0)
    error = (load_model(SHIPPED["denoiser"])(noisy) - images[:50]).square().mean()
    assert error < 0.2 * (noisy - images[:50]).square().mean()


def test_the_judge_reads_what_the_ddpm_was_asked_to_write():
    """Few and quick samples; scripts/evaluate/mnist.py measures properly. By chance, 2 of 20 would be right."""
    labels = list(range(10)) * 2
    seeds = [k // 10 for k in range(20)]
    options = {"num_steps": 30, "guidance_scale": 5.0}
    images = sample_digits(load_model(SHIPPED["ddpm_class"]), labels, seeds, linear_schedule(), **options)
    read, _ = examine(load_model(SHIPPED["judge"]), images)
    assert (read == torch.tensor(labels)).sum() >= 14


def test_the_judge_reads_what_the_flow_was_asked_to_write():
    labels = list(range(10)) * 2
    images = sample_flow(load_model("flow_class"), labels, [k // 10 for k in range(20)], num_steps=10)
    assert (examine(load_model("judge"), images)[0] == torch.tensor(labels)).sum() >= 17


def test_an_anagram_of_a_flow():
    """Through the adapter the flow is an eps, as any other: 6 and, turned over, 9."""
    schedule, flow = straight_schedule(12), load_model("flow_class")
    six, nine = (as_estimate(velocity_of(flow, one_hot([k] * 8, "cpu"), 5.0), schedule) for k in (6, 9))
    estimate = anagram([six, nine], [identity(), rotate_180()])
    noise = noise_source(range(8), (1, 28, 28))
    images = sample(estimate, range(12)[::-1], schedule, noise=noise, step=ddim_step).clamp(0, 1)
    judge = load_model("judge")
    read = [(examine(judge, seen)[0] == digit).sum() for seen, digit in ((images, 6), (images.flip(2, 3), 9))]
    assert min(read) >= 5


@pytest.mark.parametrize(("kind", "share"), [("ddpm", 0.5), ("flow", 0.7)])
def test_the_time_conditioned_models_write_what_the_judge_takes_for_digits(digits, kind, share):
    """Few and quick samples, nearer to real digits than blurred real ones are."""
    images, _ = digits
    if kind == "ddpm":
        samples = sample_digits(load_model("ddpm_time"), None, range(40), linear_schedule(), num_steps=30)
    else:
        samples = sample_flow(load_model("flow_time"), None, range(40), num_steps=20)
    blurred = torch.nn.functional.avg_pool2d(images[:40], 5, stride=1, padding=2)
    judge = load_model(SHIPPED["judge"])
    (read, features), (_, worse), (_, real) = (examine(judge, some) for some in (samples, blurred, images))
    assert frechet_distance(features, real) < share * frechet_distance(worse, real)
    assert len(read.unique()) >= 7
