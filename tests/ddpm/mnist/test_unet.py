"""The MNIST UNets against the assignment's table of operations."""

import pytest
import torch
from torch import nn

from ddpm.mnist import ClassFlow, ClassUNet, TimeFlow, TimeUNet, UNet
from ddpm.mnist.training import flow_from_ddpm
from ddpm.mnist.unet import folded
from tests.conftest import settled

D = 8
MODELS = {"UNet": UNet, "TimeUNet": TimeUNet, "ClassUNet": ClassUNet, "TimeFlow": TimeFlow, "ClassFlow": ClassFlow}


def call(model, batch=3):
    x = torch.randn(batch, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    t = torch.arange(batch) * (0.3 if isinstance(model, TimeFlow) else 100)
    arguments = [x, t, torch.eye(10)[:batch]]
    return model(*arguments[: {UNet: 1, TimeUNet: 2, ClassUNet: 3, TimeFlow: 2, ClassFlow: 3}[type(model)]])


def conv(i, o, kernel=3):
    """Weights of a convolution without bias, and the scale and shift of its BatchNorm."""
    return i * o * kernel**2 + 2 * o


def expected_parameters(d, time, classes):
    a = conv(1, d) + conv(d, d)
    b = 3 * conv(d, d)
    c = conv(d, 2 * d) + 2 * conv(2 * d, 2 * d)
    g = conv(2 * d, 2 * d, 7)
    u1 = conv(4 * d, d, 4) + 2 * conv(d, d)
    u2 = conv(2 * d, d, 4) + 2 * conv(d, d)
    h = conv(2 * d, d) + conv(d, d)
    out = 9 * d + 1
    fc = sum((i + 1) * o + (o + 1) * o for i in [1] * time + [10] * classes for o in (2 * d, d))
    return a + b + c + g + u1 + u2 + h + out + fc


@pytest.mark.parametrize(
    ("model", "count"), [(UNet(128), 7_888_385), (TimeUNet(64), 1_995_073), (ClassUNet(64), 2_017_857)]
)
def test_parameter_counts(model, count):
    found = sum(parameter.numel() for parameter in model.parameters())
    width = model.config["width"]
    assert found == count == expected_parameters(width, isinstance(model, TimeUNet), isinstance(model, ClassUNet))


@pytest.mark.parametrize("name", MODELS)
def test_shapes_on_the_way(name):
    model = MODELS[name](D).eval()
    shapes = {}
    for part in ("a", "b", "c", "f", "g", "u1", "u2", "h", "out"):
        getattr(model, part).register_forward_hook(
            lambda _, __, output, part=part: shapes.__setitem__(part, tuple(output.shape[1:]))
        )
    call(model)
    assert shapes == {
        "a": (D, 28, 28),
        "b": (D, 14, 14),
        "c": (2 * D, 7, 7),
        "f": (2 * D, 1, 1),
        "g": (2 * D, 7, 7),
        "u1": (D, 14, 14),
        "u2": (D, 28, 28),
        "h": (D, 28, 28),
        "out": (1, 28, 28),
    }


@pytest.mark.parametrize("name", MODELS)
def test_gradient_flows_into_every_parameter(name):
    torch.manual_seed(0)
    model = MODELS[name](D)
    call(model).square().mean().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-9, parameter_name


def test_every_convolution_but_the_last_is_normalised_and_activated():
    leaves = [module for module in UNet(D).modules() if not list(module.children())]
    for i, module in enumerate(leaves[:-1]):
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            assert isinstance(leaves[i + 1], nn.BatchNorm2d)
            assert isinstance(leaves[i + 2], nn.GELU)
    assert isinstance(leaves[-1], nn.Conv2d)


def constant(block: nn.Sequential, value: float):
    """Make an FCBlock return a constant."""
    nn.init.zeros_(block[2].weight)
    nn.init.constant_(block[2].bias, value)


@torch.no_grad()
def test_conditioning_is_c_times_plus_t_at_g_and_at_u1():
    torch.manual_seed(0)
    model = settled(ClassUNet(D))
    plain, timed = UNet(D).eval(), TimeUNet(D).eval()
    timed.load_state_dict(model.state_dict(), strict=False)
    plain.load_state_dict(model.state_dict(), strict=False)
    for block in (model.c1, model.c2):
        constant(block, 1)
    torch.testing.assert_close(call(model), call(timed))  # multiplied by one
    for block in (timed.t1, timed.t2):
        constant(block, 0)
    torch.testing.assert_close(call(timed), call(plain))  # zero added

    # c2 = 0 hides all below u2; what is left of u1 is t2, so the image still matters, c1 and t1 do not
    constant(model.c2, 0)
    before = call(model)
    constant(model.c1, 7)
    constant(model.t1, 7)
    torch.testing.assert_close(call(model), before)
    constant(model.t2, 7)
    assert not torch.allclose(call(model), before)


@torch.no_grad()
def test_t_may_be_an_int_a_scalar_or_a_batch():
    model = settled(TimeUNet(D))
    x = torch.randn(2, 1, 28, 28)
    expected = model(x, torch.tensor([7, 7]))
    torch.testing.assert_close(model(x, 7), expected)
    torch.testing.assert_close(model(x, torch.tensor(7)), expected)
    assert not torch.allclose(model(x, 250), expected)
    assert model.normalise(torch.tensor([0, 299]), x).flatten().tolist() == [0, 1]


@torch.no_grad()
def test_a_flows_time_multiplies_and_with_a_class_is_added():
    torch.manual_seed(0)
    model, classes = settled(TimeFlow(D)), settled(ClassFlow(D))
    plain = UNet(D).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    for block in (model.t1, model.t2):
        constant(block, 1)
    torch.testing.assert_close(call(model), call(plain))
    constant(model.t2, 0)  # hides all below u2, t1 too
    before = call(model)
    constant(model.t1, 7)
    torch.testing.assert_close(call(model), before)

    ddpm = settled(ClassUNet(D))  # the same network, with its own count of t
    ddpm.load_state_dict(classes.state_dict())
    x, c = torch.randn(2, 1, 28, 28), torch.eye(10)[[3, 7]]
    torch.testing.assert_close(classes(x, torch.tensor([0.0, 1.0]), c), ddpm(x, torch.tensor([0, 299]), c))


@torch.no_grad()
def test_a_flow_begins_as_the_ddpm_it_is_made_from():
    torch.manual_seed(0)
    ddpm = settled(ClassUNet(D))
    flow = flow_from_ddpm(ddpm).eval()
    x, c = torch.randn(2, 1, 28, 28), torch.eye(10)[[3, 7]]
    for t in (0.0, 0.25, 1.0):
        torch.testing.assert_close(flow(x, t, c), -ddpm(x, 299 * (1 - t), c), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_flow_that_multiplies_begins_as_a_ddpm_that_is_not_told_the_time():
    torch.manual_seed(0)
    ddpm = settled(TimeUNet(D))
    flow, x = flow_from_ddpm(ddpm).eval(), torch.randn(2, 1, 28, 28)
    constant(ddpm.t1, 0)
    constant(ddpm.t2, 0)
    for t in (0.0, 0.25, 1.0):
        torch.testing.assert_close(flow(x, t), -ddpm(x, 100), atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_folded_is_the_same_function_without_batchnorm(name):
    torch.manual_seed(0)
    model = settled(MODELS[name](D))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # none of its numbers may be forgotten
            for numbers in (module.weight, module.bias, module.running_mean, module.running_var):
                numbers.uniform_(0.5, 1.5)
    expected, found = call(model), call(folded(model))
    torch.testing.assert_close(found, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded(model).modules())
    torch.testing.assert_close(call(model), expected, atol=0, rtol=0)  # the model itself stays as it is


@torch.no_grad()
@pytest.mark.parametrize("name", ["ClassUNet", "ClassFlow"])
def test_two_classes_of_each_image_are_answered_as_two_images(name):
    torch.manual_seed(0)
    model = settled(MODELS[name](D))
    x, c = torch.randn(2, 1, 28, 28), torch.eye(10)[[3, 7, 1, 1]]
    torch.testing.assert_close(model(x, 0.5, c), model(torch.cat([x, x]), 0.5, c), atol=1e-5, rtol=1e-4)
