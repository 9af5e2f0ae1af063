"""The losses, the class drop, overfitting one batch, and resuming bit for bit."""

import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from ddpm.losses import ddpm_loss
from ddpm.mnist import ClassUNet, TimeUNet, UNet
from ddpm.mnist.checkpoint import load_model, load_start
from ddpm.mnist.data import load_mnist
from ddpm.mnist.training import (
    DDPM,
    DENOISER,
    SIGMAS,
    denoiser_loss,
    drop_classes,
    fit,
    noisy_digits,
    pure_noise_loss,
    train,
)
from ddpm.schedule import linear_schedule
from ddpm.tools.files import load_tensors, save_tensors
from ddpm.tools.runs import step_seed, stop_signal
from tests.conftest import DATA

SCHEDULE = linear_schedule()


def class_loss(model, x_0, labels, generator):
    return ddpm_loss(model, x_0, (drop_classes(labels, generator),), SCHEDULE, generator)


def new_model():
    torch.manual_seed(0)
    return ClassUNet(8)


@pytest.fixture(scope="module")
def digits():
    return load_mnist(DATA, "train")


def test_the_recipes_are_the_specs():
    assert (DENOISER.epochs, DENOISER.batch_size, DENOISER.learning_rate, DENOISER.decay) == (5, 256, 1e-4, 1.0)
    assert (DDPM.epochs, DDPM.batch_size, DDPM.learning_rate, DDPM.decay) == (20, 128, 1e-3, 0.1)
    assert SIGMAS == (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)


def test_the_learning_rate_falls_by_the_20th_root_of_a_tenth_each_epoch(digits):
    images, labels = (tensor[:128] for tensor in digits)
    model = TimeUNet(2)
    optimizer = torch.optim.Adam(model.parameters())

    def loss_of(model, x_0, labels, generator):
        return ddpm_loss(model, x_0, (), SCHEDULE, generator)

    steps = train(model, optimizer, loss_of, images, labels, replace(DDPM, batch_size=64))
    rates = [optimizer.param_groups[0]["lr"] for _ in steps]
    assert rates == pytest.approx([1e-3 * 0.1 ** (epoch / 20) for epoch in range(20) for _ in range(2)])


def test_every_epoch_sees_every_digit_once_in_another_order(digits):
    images, _ = digits
    seen = []

    class Spy(UNet):
        def forward(self, x):
            return super().forward(x[:2]).mean() * 0 + x

    def loss_of(model, x_0, numbers, generator):
        assert x_0.min() >= 0 and x_0.max() <= 1
        seen.append(numbers)
        return model(x_0).sum() * 0

    model = Spy(2)
    recipe = replace(DENOISER, epochs=2, batch_size=128)
    for _ in train(model, torch.optim.Adam(model.parameters()), loss_of, images, torch.arange(500), recipe):
        pass
    first, second = torch.cat(seen[:4]), torch.cat(seen[4:])
    assert torch.equal(first.sort().values, torch.arange(500))
    assert torch.equal(second.sort().values, torch.arange(500))
    assert not torch.equal(first, second)


def test_class_drop_zeroes_a_tenth_of_the_rows():
    labels = torch.arange(20_000) % 10
    one_hot = drop_classes(labels, torch.Generator().manual_seed(0))
    dropped = one_hot.sum(1) == 0
    assert 0.09 < dropped.float().mean() < 0.11
    assert torch.equal(one_hot[~dropped], torch.eye(10)[labels[~dropped]])
    assert not drop_classes(labels, torch.Generator(), probability=1.0).any()


def test_ddpm_loss_is_zero_for_the_true_eps_and_one_for_none(digits):
    x_0 = digits[0][:256] / 255

    def oracle(x_t, t):
        alpha_cumprod = SCHEDULE.alphas_cumprod[t].view(-1, 1, 1, 1)
        return (x_t - alpha_cumprod.sqrt() * x_0) / (1 - alpha_cumprod).sqrt()

    assert ddpm_loss(oracle, x_0, (), SCHEDULE, torch.Generator().manual_seed(0)) < 1e-8
    silent = ddpm_loss(lambda x_t, t: torch.zeros_like(x_t), x_0, (), SCHEDULE, torch.Generator().manual_seed(0))
    assert silent == pytest.approx(1, abs=0.01)


def test_ddpm_loss_draws_every_timestep(digits):
    seen = []

    def model(x_t, t):
        seen.append(t)
        return x_t

    ddpm_loss(model, digits[0].repeat(20, 1, 1, 1) / 255, (), SCHEDULE, torch.Generator().manual_seed(0))
    assert seen[0].unique().tolist() == list(range(300))


def test_denoiser_loss_of_doing_nothing_is_sigma_squared(digits):
    x_0 = digits[0] / 255
    for sigma in (0.2, 0.5):
        loss = denoiser_loss(lambda z: z, x_0, torch.Generator().manual_seed(0), sigma)
        assert loss == pytest.approx(sigma**2, rel=0.01)
        noise = noisy_digits(x_0, sigma, seed=0) - x_0
        assert noise.std() == pytest.approx(sigma, rel=0.01)
        assert noise.mean().abs() < 0.01


def test_from_pure_noise_the_mean_digit_is_the_best_answer(digits):
    """Its loss is the variance of the digits; any other answer's is greater by its squared distance."""
    x_0 = digits[0] / 255
    mean = x_0.mean(0, keepdim=True)
    seen = []

    def loss_of(answer):
        def model(z):
            seen.append(z)
            return answer.expand_as(z)

        return pure_noise_loss(model, x_0, torch.Generator().manual_seed(0)).item()

    assert loss_of(mean) == pytest.approx((x_0 - mean).square().mean().item(), rel=1e-5)
    assert loss_of(mean + 0.1) == pytest.approx(loss_of(mean) + 0.01, rel=1e-4)
    assert seen[0].std() == pytest.approx(1, abs=0.01) and seen[0].mean().abs() < 0.01
    assert (seen[0] * (x_0 - mean)).mean().abs() < 1e-3  # nothing of the digit in it


def test_a_digits_noise_does_not_depend_on_those_beside_it(digits):
    x = digits[0][:5] / 255
    assert torch.equal(noisy_digits(x, 0.5, 7)[:2], noisy_digits(x[:2], 0.5, 7))


@pytest.mark.parametrize("width", [16])
def test_a_unet_overfits_one_batch(digits, width):
    """The same noise at every step: the model can learn it by heart, down to a tenth of the silent loss."""
    torch.manual_seed(0)
    x_0, labels = digits[0][:16] / 255, digits[1][:16]
    model = ClassUNet(width)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = class_loss(model, x_0, labels, torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


RECIPE = replace(DDPM, epochs=2, batch_size=100)


def weights_after(folder):
    return load_tensors(folder / "state.safetensors")[0]


def interrupted_after(steps: int):
    """class_loss, which also sends this process a Ctrl-C in its n-th step."""
    count = []

    def loss_of(*arguments):
        count.append(1)
        if len(count) == steps:
            signal.raise_signal(signal.SIGINT)
        return class_loss(*arguments)

    return loss_of


def test_averaged_weights_are_what_is_used(digits, tmp_path):
    """An exponential average of ten steps' weights, through a stop, in weights.safetensors and for the figures."""
    recipe, used = replace(RECIPE, average=0.5), []
    kept = {"expected": new_model().state_dict()["out.weight"]}

    def watched(model, *arguments):
        kept["model"] = model
        return class_loss(model, *arguments)

    shown = {"after_epoch": lambda model, *_: used.append(model.state_dict()["out.weight"].clone())}
    assert not fit(new_model(), interrupted_after(4), *digits, recipe, tmp_path)
    assert fit(new_model(), watched, *digits, recipe, tmp_path, resume=True, **shown)
    plain = tmp_path / "plain"
    for step in range(10):  # the weights after each step, of the run without an average
        fit(new_model(), interrupted_after(step + 1), *digits, RECIPE, plain)
        weight = weights_after(plain)["model.out.weight"]
        decay = min(0.5, (1 + step) / (10 + step))
        kept["expected"] = decay * kept["expected"] + (1 - decay) * weight
        shutil.rmtree(plain)
    torch.testing.assert_close(used[-1], kept["expected"])
    assert torch.equal(kept["model"].state_dict()["out.weight"], weight)  # trained as if there were no average
    saved = load_model(tmp_path / "weights.safetensors", ClassUNet).out.weight
    torch.testing.assert_close(saved, kept["expected"], atol=1e-3, rtol=1e-3)
    assert torch.equal(load_model(tmp_path / "state.safetensors", ClassUNet).out.weight, weight)


@pytest.mark.parametrize("stop", [1, 3, 5, 8])
def test_resume_equals_uninterrupted_bit_for_bit(digits, tmp_path, stop):
    """Ten steps, stopped in the middle of an epoch or at its end: weights, moments and losses are the same."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert fit(new_model(), class_loss, *digits, RECIPE, whole)
    assert not fit(new_model(), interrupted_after(stop), *digits, RECIPE, parts)
    assert len(weights_after(parts)["losses"]) == stop
    drawn = []
    torch.manual_seed(1)  # whatever the process did before
    resumed = ClassUNet(8)
    assert fit(
        resumed, class_loss, *digits, RECIPE, parts, resume=True, after_epoch=lambda _, epoch, __: drawn.append(epoch)
    )
    assert drawn == ([1, 2] if stop < 5 else [2])
    expected, found = weights_after(whole), weights_after(parts)
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name


def test_weights_without_their_state_go_on_at_their_step(digits, tmp_path):
    fit(new_model(), interrupted_after(5), *digits, RECIPE, tmp_path / "a")
    weights, steps = tmp_path / "a" / "weights.safetensors", []

    def counted(*arguments):
        steps.append(1)
        return class_loss(*arguments)

    assert fit(new_model(), counted, *digits, RECIPE, tmp_path / "b", start=weights)
    assert len(steps) == 5
    losses = weights_after(tmp_path / "b")["losses"]
    assert losses[:5].isnan().all() and losses[5:].isfinite().all()
    assert (tmp_path / "b" / "log.csv").read_text().splitlines()[1].startswith("2,")
    finished = tmp_path / "b" / "weights.safetensors"
    assert fit(new_model(), counted, *digits, RECIPE, tmp_path / "d", start=finished)
    assert len(steps) == 5 and (tmp_path / "d" / "weights.safetensors").exists()
    with pytest.raises(ValueError, match="holds a ClassUNet, but a TimeUNet is needed"):
        fit(TimeUNet(8), class_loss, *digits, RECIPE, tmp_path / "c", start=weights)
    with pytest.raises(ValueError, match=r"not of \{'width': 4"):
        fit(ClassUNet(4), class_loss, *digits, RECIPE, tmp_path / "c", start=weights)


def test_another_seed_gives_other_weights(digits, tmp_path):
    fit(new_model(), class_loss, *digits, replace(RECIPE, epochs=1), tmp_path / "a")
    fit(new_model(), class_loss, *digits, replace(RECIPE, epochs=1, seed=1), tmp_path / "b")
    a, b = weights_after(tmp_path / "a"), weights_after(tmp_path / "b")
    assert not torch.equal(a["model.out.weight"], b["model.out.weight"])


def test_a_run_is_not_overwritten_and_not_mixed_with_another(digits, tmp_path):
    fit(new_model(), class_loss, *digits, replace(RECIPE, epochs=1), tmp_path)
    before = (tmp_path / "state.safetensors").read_bytes()
    with pytest.raises(ValueError, match="add --resume"):
        fit(new_model(), class_loss, *digits, RECIPE, tmp_path)
    with pytest.raises(ValueError, match=r"no run in .* to resume"):
        fit(new_model(), class_loss, *digits, RECIPE, tmp_path / "elsewhere", resume=True)
    with pytest.warns(UserWarning, match="was in float32 and goes on in bfloat16"):
        fit(new_model(), class_loss, *digits, replace(RECIPE, epochs=1), tmp_path, resume=True, dtype=torch.bfloat16)
    before = (tmp_path / "state.safetensors").read_bytes()
    with pytest.raises(ValueError, match="another recipe"):
        fit(new_model(), class_loss, *digits, RECIPE, tmp_path, resume=True)
    with pytest.raises(ValueError, match="another model: ClassUNet, not TimeUNet"):
        fit(TimeUNet(8), class_loss, *digits, replace(RECIPE, epochs=1), tmp_path, resume=True)
    assert (tmp_path / "state.safetensors").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_the_run(digits, tmp_path):
    with pytest.raises(ValueError, match=r"the loss is (nan|-?inf) at step 0"):
        fit(new_model(), lambda model, x_0, *_: model.a(x_0).sum() * torch.inf, *digits, RECIPE, tmp_path)
    assert not (tmp_path / "state.safetensors").exists()

    steps = []

    def breaks_at_the_third(*arguments):
        steps.append(1)
        return class_loss(*arguments) * (torch.nan if len(steps) == 3 else 1)

    with pytest.raises(ValueError, match="the loss is nan at step 2"):  # though every step is saved
        fit(new_model(), breaks_at_the_third, *digits, RECIPE, tmp_path, save_every=0)
    assert all(tensor.isfinite().all() for tensor in weights_after(tmp_path).values())
    assert len(weights_after(tmp_path)["losses"]) == 2


def test_the_weights_file_is_the_model_in_half_precision(digits, tmp_path):
    model = new_model()
    fit(model, class_loss, *digits, replace(RECIPE, epochs=1), tmp_path)
    loaded = load_model(tmp_path / "weights.safetensors", ClassUNet)
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, atol=1e-3, rtol=1e-3)
    assert torch.equal(load_model(tmp_path).out.weight, loaded.out.weight)  # the run's folder will do
    assert load_start(tmp_path, new_model())["epochs"] == 1
    metadata = load_tensors(tmp_path / "weights.safetensors")[1]
    assert metadata["epochs"] == 1 and metadata["digits"] == 500
    assert (tmp_path / "log.csv").read_text().startswith("epoch,mean_loss\n1,")


def test_bfloat16_trains_like_float32(digits, tmp_path):
    """The same ten steps; emulated on some CPUs, so only a few."""
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        fit(new_model(), class_loss, *digits, RECIPE, tmp_path / str(dtype), dtype=dtype)
        losses.append(weights_after(tmp_path / str(dtype))["losses"])
    torch.testing.assert_close(losses[1], losses[0], rtol=0.05, atol=0)
    assert not torch.equal(*losses)


def test_every_seed_has_a_generator_of_its_own_for_every_step():
    seeds = [step_seed(seed, step) for seed in (0, 1, 257, 20040805, 2**31) for step in (0, 1, 2**23)]
    assert len(set(seeds)) == len(seeds)
    for seed in seeds:
        torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("damage", ["missing", "extra", "other shape", "no moments", "no losses", "seconds", "width"])
def test_a_state_of_another_run_or_damaged_is_refused_in_a_line(digits, tmp_path, damage):
    recipe, path = replace(RECIPE, epochs=1), tmp_path / "state.safetensors"
    assert fit(new_model(), class_loss, *digits, recipe, tmp_path)
    tensors, metadata = load_tensors(path)
    first = next(name for name in tensors if name.startswith("model."))
    told = f"not the whole state of this training: 1 missing .{first}"
    if damage == "missing":
        del tensors[first]
    elif damage == "extra":
        tensors["model.extra"], told = torch.zeros(1), "1 unexpected .model.extra"
    elif damage == "other shape":
        tensors[first], told = tensors[first].flatten()[:1], f"1 of another shape .{first} "
    elif damage == "no moments":
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("optimizer.0.")}
        told = "3 missing .optimizer.0.exp_avg, "
    elif damage == "no losses":
        del tensors["losses"]
        told = "does not say how far the run came"
    elif damage == "seconds":
        metadata["seconds"], told = "x", "does not say how far the run came"
    else:
        metadata["config"], told = {"width": 5}, "has another config width: 5, not "
    save_tensors(path, tensors, metadata)
    with pytest.raises(ValueError, match=told):
        fit(new_model(), class_loss, *digits, recipe, tmp_path, resume=True)


def test_a_thread_trains_without_handlers_of_its_own():
    """Only the main thread may set these: a notebook's or a server's worker goes on without."""

    def ask() -> bool:
        with stop_signal() as stopped:
            return stopped()

    with ThreadPoolExecutor(1) as pool:
        assert not pool.submit(ask).result()
