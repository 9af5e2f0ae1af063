"""Guidance, noise and the denoising loop."""

from functools import partial

import numpy
import pytest
import torch
from diffusers import DDPMScheduler

from ddpm.flow import flow_times, heun_step, integrate, velocity_of
from ddpm.mnist import ClassFlow, ClassUNet, TimeFlow, TimeUNet, sample_digits, sample_flow
from ddpm.mnist.sampling import GuidedDigits, visited_timesteps
from ddpm.process import ddim_step, dpm_solver_step
from ddpm.sampling import guided, iterative_denoise, noise_source, sdedit, unguided
from ddpm.schedule import linear_schedule, log_snr_timesteps
from tests.conftest import settled

SCHEDULE = linear_schedule()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return settled(ClassUNet(8))


def inputs():
    c = torch.eye(10)[[3, 7]]
    return torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0)), c, torch.zeros_like(c)


@torch.no_grad()
def test_guidance_0_is_unconditional_and_1_is_conditional(model):
    x_t, c, null = inputs()
    torch.testing.assert_close(guided(model, c, null, 1.0)(x_t, 5)[0], model(x_t, 5, c))
    torch.testing.assert_close(guided(model, c, null, 0.0)(x_t, 5)[0], model(x_t, 5, null))
    assert not torch.allclose(model(x_t, 5, c), model(x_t, 5, null))


@torch.no_grad()
def test_guidance_extrapolates_from_the_unconditional_estimate(model):
    x_t, c, null = inputs()
    eps_c, eps_u = model(x_t, 5, c), model(x_t, 5, null)
    eps, v = guided(model, c, null, 7.0)(x_t, 5)
    torch.testing.assert_close(eps, 7 * eps_c - 6 * eps_u, atol=1e-5, rtol=1e-4)
    assert v is None


def test_learned_variance_comes_from_the_conditional_half():
    def model(x_t, t, c):
        return torch.cat([x_t * c, c.expand(len(x_t), 1, 2, 2)], dim=1)

    c, null = torch.full((3, 1, 1, 1), 2.0), torch.full((3, 1, 1, 1), -1.0)
    eps, v = guided(model, c, null, 5.0)(torch.ones(3, 1, 2, 2), 9)
    assert torch.equal(v, c.expand(3, 1, 2, 2))
    assert torch.equal(eps, torch.full((3, 1, 2, 2), -1 + 5 * 3.0))


def test_an_estimate_is_float32_whatever_the_model_computes_in():
    eps, v = unguided(lambda x_t, t: torch.cat([x_t, x_t], dim=1).bfloat16())(torch.ones(1, 3, 2, 2), 0)
    assert eps.dtype == v.dtype == torch.float32


@pytest.mark.parametrize("channels", [1, 4, 9])
def test_a_model_of_other_channels_is_refused(channels):
    estimate = unguided(lambda x_t, t: torch.zeros(1, channels, 2, 2))
    with pytest.raises(ValueError, match=f"a model gives 3 or 6 channels for images of 3, not {channels}"):
        estimate(torch.ones(1, 3, 2, 2), 0)


def test_the_loop_reports_each_step_and_ends_at_the_clean_image(model):
    x_T, c, null = inputs()
    seen = []
    noise = noise_source([1, 2], (1, 28, 28))
    estimate, schedule = guided(model, c, null, 1.0), linear_schedule()
    x_0 = iterative_denoise(
        estimate, x_T, [299, 150, 3], schedule, noise=noise, callback=lambda *report: seen.append(report)
    )
    assert [(step, t) for step, t, _, _ in seen] == [(0, 299), (1, 150), (2, 3)]
    assert torch.equal(seen[0][2], x_T)
    assert torch.equal(seen[-1][3], x_0)


def test_the_loop_samples_as_diffusers_does_on_mnists_schedule(model):
    """A whole guided sample of the class-conditioned UNet, every one of 300 steps, with β as variance."""
    scheduler = DDPMScheduler(300, 1e-4, 0.02, "linear", variance_type="fixed_large", clip_sample=False)
    scheduler.set_timesteps(300)
    x_t, c, null = inputs()
    generator = torch.Generator().manual_seed(1)
    x_T, estimate = x_t, guided(model, c, null, 5.0)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x_t = scheduler.step(estimate(x_t, t)[0], t, x_t, generator=generator).prev_sample
    generator = torch.Generator().manual_seed(1)
    ours = iterative_denoise(
        estimate,
        x_T,
        list(range(299, -1, -1)),
        linear_schedule(),
        noise=lambda: torch.randn(x_T.shape, generator=generator),
    )
    torch.testing.assert_close(ours, x_t, atol=2e-3 * x_t.abs().max().item(), rtol=0)


def test_noise_belongs_to_its_seed():
    together, alone = noise_source([5, 6], (1, 4, 4)), noise_source([6], (1, 4, 4))
    for _ in range(3):
        z = together()
        assert torch.equal(z[1:], alone())
        assert not torch.equal(z[0], z[1])


def test_a_sample_does_not_depend_on_those_beside_it(model):
    options = {"num_steps": 20, "guidance_scale": 3.0}
    many = sample_digits(model, [0, 4, 4, 9, 2], [1, 2, 3, 4, 5], linear_schedule(), **options)
    alone = sample_digits(model, [4], [3], linear_schedule(), **options)
    torch.testing.assert_close(many[2:3], alone, atol=1e-4, rtol=0)
    in_batches = sample_digits(model, [0, 4, 4, 9, 2], [1, 2, 3, 4, 5], linear_schedule(), batch_size=2, **options)
    torch.testing.assert_close(in_batches, many, atol=1e-4, rtol=0)
    assert not torch.allclose(many[1], many[2])


def test_progress_is_counted_in_steps_of_digits(model):
    seen = []
    sample_digits(
        model,
        [1, 2, 3],
        [1, 2, 3],
        linear_schedule(),
        num_steps=2,
        batch_size=2,
        callback=lambda done, _: seen.append(done),
    )
    assert seen == [2, 4, 5, 6]


def test_a_time_conditioned_model_samples_without_labels():
    images = sample_digits(settled(TimeUNet(8)), None, [1, 2], linear_schedule(), num_steps=3)
    assert images.shape == (2, 1, 28, 28)
    assert images.min() >= 0 and images.max() <= 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [tuple, torch.tensor, numpy.array])
def test_labels_and_seeds_are_whole_numbers_of_any_kind(model, kind):
    def drawn(labels, seeds):
        digits = GuidedDigits(model, num_steps=2)
        flow = sample_flow(ClassFlow(4).eval(), labels, seeds, num_steps=1)
        others = digits.draw(digits.estimate(labels), seeds), sample_digits(model, labels, seeds, SCHEDULE, num_steps=2)
        return torch.stack([flow, *others])

    torch.manual_seed(0)
    expected = drawn([3, 4], range(1, 3))
    torch.manual_seed(0)
    assert torch.equal(drawn(kind([3, 4]), kind([1, 2])), expected)


@torch.no_grad()
@pytest.mark.parametrize(("sampler", "step"), [("ddim", ddim_step), ("dpm++", dpm_solver_step)])
def test_digits_by_another_sampler(model, sampler, step):
    schedule, c = linear_schedule(), torch.eye(10)[[3, 7]]
    noise = noise_source([1, 2], (1, 28, 28))
    estimate = guided(model, c, torch.zeros_like(c), 2.0)
    timesteps = visited_timesteps(schedule, 4, sampler)
    assert (timesteps == log_snr_timesteps(schedule, 4)) == (sampler == "dpm++")
    expected = iterative_denoise(estimate, noise(), timesteps, schedule, noise=noise, step=step).clamp(0, 1)
    found = sample_digits(model, [3, 7], [1, 2], schedule, num_steps=4, guidance_scale=2.0, sampler=sampler)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_any_algorithm_runs_on_digits(model):
    """From noise they are those of `sample_digits`; from an image, those of the algorithm itself."""
    digits = GuidedDigits(model, num_steps=4, guidance_scale=2.0)
    labels, seeds = [3, 7], [1, 2]
    drawn = digits.draw(digits.estimate(labels), seeds)
    wanted = sample_digits(model, labels, seeds, linear_schedule(), num_steps=4, guidance_scale=2.0)
    torch.testing.assert_close(drawn, wanted, atol=1e-3, rtol=0)  # whose BatchNorm is folded
    edit = {"x_0": drawn.flip(0), "i_start": 2}
    edited = digits.draw(digits.estimate(labels), seeds, partial(sdedit, **edit), num_steps=2)
    loop = {"timesteps": digits.timesteps, "schedule": linear_schedule(), "noise": noise_source(seeds, (1, 28, 28))}
    torch.testing.assert_close(edited, sdedit(digits.estimate(labels), **edit, **loop).clamp(0, 1))


def test_digits_of_a_flow():
    torch.manual_seed(0)
    flow, c = settled(ClassFlow(4)), torch.eye(10)[[3, 7]]
    x_0 = noise_source([1, 2], (1, 28, 28))()
    expected = integrate(velocity_of(flow, c, 2.0), x_0, flow_times(3), step=heun_step).clamp(0, 1)
    done = []
    options = {"num_steps": 3, "guidance_scale": 2.0, "sampler": "heun", "callback": lambda n, x_t: done.append(n)}
    found = sample_flow(flow, [3, 7], [1, 2], **options, batch_size=1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    assert done == [1, 2, 3, 4, 5, 6]
    assert sample_flow(settled(TimeFlow(4)), None, [1, 2], num_steps=2).shape == (2, 1, 28, 28)


def test_samplers_that_do_not_go_with_a_model_are_refused(model):
    with pytest.raises(ValueError, match="not euler, which is for flows"):
        sample_digits(model, [3], [1], linear_schedule(), sampler="euler")
    with pytest.raises(ValueError, match=r"not dpm\+\+, which is for DDPMs"):
        sample_flow(ClassFlow(4), [3], [1], sampler="dpm++")
    with pytest.raises(ValueError, match="eta is for ddim and dpm"):
        sample_digits(model, [3], [1], linear_schedule(), eta=1.0)


def test_a_model_of_the_other_kind_is_refused(model):
    with pytest.raises(ValueError, match="a ClassFlow is a flow: draw with sample_flow"):
        sample_digits(ClassFlow(4), [3], [1], linear_schedule())
    with pytest.raises(ValueError, match="a ClassUNet is a DDPM: draw with sample_digits"):
        sample_flow(model, [3], [1])


ASKED = {"labels": [3, 4], "seeds": [1, 2]}
WRONG = [  # what is asked for, what is said, and whether sample_flow says it, too
    ({"labels": None}, "a Class(UNet|Flow) draws the digits that it is told: give labels", True),
    ({"labels": 3}, r"labels must be a list of digits, such as \[3, 7\], not 3$", True),
    ({"labels": [3, 4.0]}, "labels must be a list of digits", True),
    ({"labels": torch.ones(2)}, r"labels must be .*, not tensor\(\[1., 1.\]\)", True),
    ({"labels": []}, "give a label for each of the 2 seeds, not 0", True),
    ({"seeds": []}, "seeds must hold one for each digit: there are none", True),
    ({"seeds": 5}, "seeds must be a list of whole numbers, of one for each image.*, not 5$", True),
    ({"seeds": "12"}, "seeds must be a list of whole numbers.*, not '12'$", True),
    ({"batch_size": 0}, "batch_size must be at least 1, not 0", True),
    ({"batch_size": -1}, "batch_size must be at least 1, not -1", True),
    ({"batch_size": 2.0}, "batch_size must be a whole number, not 2.0", True),
    ({"num_steps": 2.5}, "num_steps must be a whole number, not 2.5", True),
    ({"num_steps": "20"}, "num_steps must be a whole number, not '20'", True),
    ({"sampler": "ddim", "eta": -1}, "eta must be from 0 to 1, not -1", False),
    ({"sampler": "dpm++", "eta": 1.5}, "eta must be from 0 to 1, not 1.5", False),
    ({"schedule": linear_schedule(1000)}, "trained with 300 timesteps: give a schedule of these, not of 1000", False),
]


@pytest.mark.parametrize(("asked", "told", "of_flows"), WRONG)
def test_what_a_model_cannot_draw_is_refused_before_it_is_asked(model, monkeypatch, asked, told, of_flows):
    monkeypatch.setattr("ddpm.mnist.sampling.folded", lambda _: pytest.fail("the model was asked"))
    with pytest.raises(ValueError, match=told):
        sample_digits(model, **{**ASKED, "schedule": SCHEDULE, **asked})
    if of_flows:
        with pytest.raises(ValueError, match=told):
            sample_flow(ClassFlow(4), **{**ASKED, **asked})


def test_labels_for_a_model_without_classes_are_refused(model):
    with pytest.raises(ValueError, match="a TimeUNet cannot be told which digit to draw"):
        sample_digits(TimeUNet(4), [3], [1], SCHEDULE)
    with pytest.raises(ValueError, match="a TimeFlow cannot be told which digit to draw"):
        sample_flow(TimeFlow(4), [3], [1])
    for other in (TimeUNet(4), ClassFlow(4)):
        with pytest.raises(ValueError, match=f"draws with a ClassUNet, not with a {type(other).__name__}"):
            GuidedDigits(other)
    with pytest.raises(ValueError, match="labels must be a list of digits"):
        GuidedDigits(model).estimate(3)
    with pytest.raises(ValueError, match="seeds must be a list of whole numbers"):
        GuidedDigits(model).draw(None, seeds=5)


class Own(torch.nn.Conv2d):
    def forward(self, x_t, t):
        return super().forward(x_t)


def test_a_model_of_ones_own_is_neither():
    own = Own(1, 1, 1)
    assert sample_digits(own, None, [1], linear_schedule(), num_steps=2).shape == (1, 1, 28, 28)
    assert sample_flow(own, None, [1], num_steps=2).shape == (1, 1, 28, 28)


def test_labels_are_a_digit_for_each_seed(model):
    samplers = (lambda *asked: sample_digits(model, *asked, linear_schedule())), partial(sample_flow, ClassFlow(4))
    for sampler in samplers:
        for labels, seeds in ([3], [1, 2, 3, 4]), ([3, 4], [1]):
            told = f"give a label for each of the {len(seeds)} seeds, not {len(labels)}"
            with pytest.raises(ValueError, match=told):
                sampler(labels, seeds)
        for label in (-1, 10):
            with pytest.raises(ValueError, match=f"a digit from 0 to 9, not {label}$"):
                sampler([3, label], [1, 2])
