"""Part A's algorithms on models whose answer is known: the exact eps for Gaussians and mixtures of them."""

import math
import re
from functools import partial
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from diffusers.pipelines.deepfloyd_if import timesteps as diffusers_timesteps

from ddpm.components import Component, grey_colour, low_high_pass
from ddpm.process import add_noise, ddim_step, ddpm_step, dpm_solver_step, static_threshold
from ddpm.sampling import (
    Trajectory,
    anagram,
    classical_denoise,
    guided,
    hybrid,
    inpaint,
    inpaint_component,
    iterative_denoise,
    noise_source,
    one_step_denoise,
    resampling_path,
    sdedit,
)
from ddpm.schedule import (
    NAMED_SECTIONS,
    cosine_schedule,
    leading_timesteps,
    linear_schedule,
    named_timesteps,
)
from ddpm.views import View, horizontal_flip, identity, negate, vertical_flip

COSINE = cosine_schedule(1000)


def tensor(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def gaussians(count, shape, seed=0):
    """A source of noise in float64, [count, *shape] a call."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(count, *shape, dtype=torch.float64, generator=generator)


class Mixture:
    """Images [C, H, W] from a mixture of Gaussians, flat means [K, D] and covariances [K, D, D]; its exact eps."""

    def __init__(self, weights, means, covariances, shape=(1, 2, 2), schedule=COSINE):
        self.weights, self.means, self.covariances = weights, means, covariances
        self.shape, self.schedule = shape, schedule

    @property
    def mean(self):
        return self.weights @ self.means

    @property
    def covariance(self):
        off = self.means - self.mean
        return torch.einsum("k,kij->ij", self.weights, self.covariances + off[:, :, None] * off[:, None])

    def estimate(self, x_t, t):
        """eps = -√(1-ᾱ) ∇ log p(x_t), where x_t is a mixture of N(√ᾱ μ_k, ᾱ Σ_k + (1-ᾱ) I)."""
        alpha_cumprod = self.schedule.alpha_cumprod(t)
        C = alpha_cumprod * self.covariances + (1 - alpha_cumprod) * torch.eye(self.means.shape[1]).double()
        inverse = torch.linalg.inv(C)
        off = x_t.flatten(1)[:, None] - math.sqrt(alpha_cumprod) * self.means  # [B, K, D]
        pulled = torch.einsum("bki,kij->bkj", off, inverse)
        log_p = self.weights.log() - 0.5 * torch.logdet(C) - 0.5 * (off * pulled).sum(-1)
        score = -(log_p.softmax(1)[..., None] * pulled).sum(1)
        return (-math.sqrt(1 - alpha_cumprod) * score).view(x_t.shape), None

    def nearest(self, x):
        """Which mode each image belongs to, as numbers [B]."""
        return torch.cdist(x.flatten(1), self.means).argmin(1)

    def flow(self, x, t, t_to):
        """Where the probability-flow ODE takes x from t to t_to, exactly, when there is but one Gaussian."""
        values, vectors = torch.linalg.eigh(self.covariances[0])
        a, b = self.schedule.alpha_cumprod(t), self.schedule.alpha_cumprod(t_to)
        scale = ((b * values + 1 - b) / (a * values + 1 - a)).sqrt()
        off = (x.flatten(1) - math.sqrt(a) * self.means[0]) @ vectors
        return (off * scale @ vectors.T + math.sqrt(b) * self.means[0]).view(x.shape)


CORRELATED = tensor([1.0, 0.8, 0.3, 0.0], [0.8, 1.0, 0.5, 0.2], [0.3, 0.5, 0.7, 0.1], [0.0, 0.2, 0.1, 0.3])
GAUSSIAN = Mixture(tensor(1.0), tensor([0.5, -0.5, 1.0, 0.0]), CORRELATED[None])
TWO_MODES = Mixture(
    tensor(0.3, 0.7),
    tensor([1.5, 1.5, -1.5, 0.0], [-1.5, -1.0, 1.5, 0.5]),
    torch.stack([0.1 * CORRELATED, torch.diag(tensor(0.05, 0.2, 0.1, 0.02))]),
)
EVERY_10TH = leading_timesteps(1000, 100)


def sample(model, count=4000, timesteps=EVERY_10TH, seed=0, estimate=None, **options):
    noise = gaussians(count, model.shape, seed)
    x_T = noise()
    return iterative_denoise(estimate or model.estimate, x_T, timesteps, model.schedule, noise=noise, **options)


def assert_moments(x, mean, covariance, bias=0.0):
    """Within 4 standard errors of a sample as large as x, and `bias` of the largest variance."""
    x, variance = x.flatten(1), covariance.diagonal()
    assert ((x.mean(0) - mean).abs() <= 4 * (variance / len(x)).sqrt() + bias * variance.max().sqrt()).all()
    error = 4 * ((variance[:, None] * variance + covariance**2) / len(x)).sqrt() + bias * variance.max()
    assert ((x.T.cov() - covariance).abs() <= error).all()


# ---- the models' answers themselves, without which nothing here means anything


def test_the_exact_estimate_is_the_posterior_mean():
    """E[x_0 | x_t] of a mixture of one pixel by a sum over a fine grid of x_0, without any formula for scores."""
    model = Mixture(tensor(0.3, 0.7), tensor([1.0], [-0.5]), tensor([[0.04]], [[0.3]]), (1, 1, 1))
    x_0 = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    weighed = zip(model.weights, model.means[:, 0], model.covariances[:, 0, 0], strict=True)
    prior = sum(w * torch.exp(-((x_0 - m) ** 2) / (2 * s)) / s.sqrt() for w, m, s in weighed)
    x_t = tensor(-2.0, -0.3, 0.2, 0.9, 2.5)
    for t in (50, 300, 600, 950):
        alpha_cumprod = COSINE.alpha_cumprod(t)
        off = x_t[:, None] - math.sqrt(alpha_cumprod) * x_0
        p = prior * torch.exp(-(off**2) / (2 * (1 - alpha_cumprod)))
        expected = (p * x_0).sum(1) / p.sum(1)
        found = one_step_denoise(model.estimate, x_t.view(-1, 1, 1, 1), t, COSINE)
        torch.testing.assert_close(found.flatten(), expected, atol=1e-6, rtol=0)


def test_one_step_denoise_of_a_gaussian_is_its_regression_on_x_t():
    for t in (50, 300, 600, 950):
        x_t, alpha_cumprod = gaussians(5, (1, 2, 2))(), COSINE.alpha_cumprod(t)
        gain = math.sqrt(alpha_cumprod) * torch.linalg.solve(
            alpha_cumprod * CORRELATED + (1 - alpha_cumprod) * torch.eye(4).double(), CORRELATED
        )
        expected = GAUSSIAN.mean + (x_t.flatten(1) - math.sqrt(alpha_cumprod) * GAUSSIAN.mean) @ gain
        found = one_step_denoise(GAUSSIAN.estimate, x_t, t, COSINE)
        torch.testing.assert_close(found.flatten(1), expected, atol=1e-8, rtol=0)


# ---- sampling from nothing


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_ddpm_samples_the_mixture(variance):
    x = sample(TWO_MODES, 4000, leading_timesteps(1000, 500), step=partial(ddpm_step, variance=variance))
    mode = TWO_MODES.nearest(x)
    assert (mode == 0).double().mean().item() == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / 4000))
    for k in range(2):
        assert_moments(x[mode == k], TWO_MODES.means[k], TWO_MODES.covariances[k], bias=0.01)
    assert_moments(x, TWO_MODES.mean, TWO_MODES.covariance)


def test_few_steps_are_exact_for_white_noise_with_beta_and_for_one_image_with_beta_tilde():
    """What DDPM §3.2 chose the two variances for: then x_t has its true moments at every step, however long."""
    timesteps, count = [999, 700, 500, 250, 100], 20000
    white, one = torch.eye(4).double(), torch.full((4,), 0.3).double()
    for variance, mean, spread, of_other in (("beta", 0 * one, 1.0, -0.1), ("beta_tilde", one, 0.0, 0.05)):
        model = Mixture(tensor(1.0), mean[None], spread * white[None])
        for name in ("beta", "beta_tilde"):
            seen = Trajectory()
            sample(model, count, timesteps, step=partial(ddpm_step, variance=name), callback=seen)
            for _, t, x_t, _ in seen[1:]:
                alpha_cumprod = COSINE.alpha_cumprod(t)
                true = alpha_cumprod * spread + 1 - alpha_cumprod
                if name == variance:
                    assert_moments(x_t, math.sqrt(alpha_cumprod) * mean, true * white, bias=2e-3)
                else:
                    assert (x_t.var() / true - 1) / of_other > 1


@pytest.mark.parametrize("step", [ddim_step, dpm_solver_step])
def test_deterministic_steps_sample_the_mixture(step):
    x = sample(TWO_MODES, 4000, EVERY_10TH, step=step)
    assert (TWO_MODES.nearest(x) == 0).double().mean().item() == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 4000))
    assert_moments(x, TWO_MODES.mean, TWO_MODES.covariance, bias=0.02)


FINE = linear_schedule(100_000, 1e-6, 2e-4)  # so many timesteps that rounding to one of them does not matter


def even_steps(num_steps, schedule=FINE, first=99_999, last=5_000):
    """Timesteps from first to last, as evenly spaced in log SNR as the schedule allows."""
    log_snr = torch.logit(schedule.alphas_cumprod)
    wanted = torch.linspace(log_snr[first], log_snr[last], num_steps + 1, dtype=torch.float64)
    return [first, *torch.searchsorted(-log_snr, -wanted[1:-1]).tolist(), last]


@pytest.mark.parametrize(("step", "order"), [(ddim_step, 1), (dpm_solver_step, 2)])
def test_the_flow_of_a_gaussian_is_followed_to_the_steps_order(step, order):
    """Against the closed form, at a timestep before the clean image, which both reach by a step of first order."""
    model = Mixture(tensor(1.0), GAUSSIAN.means, GAUSSIAN.covariances, schedule=FINE)
    x_T, errors = gaussians(50, (1, 2, 2))(), []
    for num_steps in (20, 40, 80, 160):
        timesteps, seen = even_steps(num_steps), Trajectory()
        iterative_denoise(model.estimate, x_T, timesteps, FINE, noise=lambda: None, step=step, callback=seen)
        _, t, x_t, _ = seen[-1]
        assert t == timesteps[-1]
        errors.append((x_t - model.flow(x_T, timesteps[0], t)).square().mean().sqrt().item())
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert orders[-1] == pytest.approx(order, abs=0.15)
    assert orders[-2] == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("model", [GAUSSIAN, TWO_MODES], ids=["gaussian", "two modes"])
def test_20_steps_of_dpm_solver_are_nearer_than_20_of_ddim(model):
    x_T, first = gaussians(200, (1, 2, 2))(), 980

    def end(step, timesteps):
        return iterative_denoise(model.estimate, x_T, timesteps, COSINE, noise=lambda: None, step=step)

    def error(x):
        return (x - exact).square().mean().sqrt().item()

    every, some = list(range(first, -1, -1)), even_steps(19, COSINE, first, 0)
    assert len(some) == 20
    exact = model.flow(x_T, first, -1) if model is GAUSSIAN else end(dpm_solver_step, every)
    assert error(end(ddim_step, every)) < 0.002
    assert error(end(dpm_solver_step, some)) < 0.015
    assert error(end(dpm_solver_step, some)) < error(end(ddim_step, some)) / 4


def test_noisy_steps_of_dpm_solver_sample_the_mixture():
    x = sample(TWO_MODES, 4000, EVERY_10TH, step=partial(dpm_solver_step, eta=1.0))
    assert (TWO_MODES.nearest(x) == 0).double().mean().item() == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 4000))
    assert_moments(x, TWO_MODES.mean, TWO_MODES.covariance, bias=0.02)


def test_ddim_with_eta_1_is_ddpm_with_beta_tilde():
    ours = sample(TWO_MODES, 50, step=partial(ddim_step, eta=1.0))
    torch.testing.assert_close(ours, sample(TWO_MODES, 50, step=partial(ddpm_step, variance="beta_tilde")))
    assert not torch.allclose(ours, sample(TWO_MODES, 50, step=ddim_step))


def test_ddim_without_eta_takes_no_noise():
    x_T = gaussians(10, (1, 2, 2))()
    first, second = (
        iterative_denoise(TWO_MODES.estimate, x_T, EVERY_10TH, COSINE, noise=gaussians(10, (1, 2, 2), seed), step=step)
        for seed, step in ((1, ddim_step), (2, ddim_step))
    )
    assert torch.equal(first, second)


# ---- against diffusers' schedulers, step by step


def trajectory(timesteps, step, estimate, x_T, seed=1, **loop):
    """Every x_t passed through, and the result."""
    seen = Trajectory()
    noise = gaussians(len(x_T), x_T.shape[1:], seed)
    x_0 = iterative_denoise(estimate, x_T, timesteps, COSINE, noise=noise, step=step, callback=seen, **loop)
    return torch.stack([*(x_t for _, _, x_t, _ in seen), x_0])


def diffusers_trajectory(scheduler, estimate, x_T, noise=None, **options):
    """noise(): what its steps are given where they take noise rather than a generator."""
    scheduler.alphas_cumprod = COSINE.alphas_cumprod  # in float64, so that it is its arithmetic we compare with
    x_t, frames = x_T, []
    for t in scheduler.timesteps:
        frames.append(x_t)
        given = options if noise is None else {**options, "variance_noise": noise()}
        x_t = scheduler.step(estimate(x_t, int(t))[0], t, x_t, **given).prev_sample
    return torch.stack([*frames, x_t])


@pytest.mark.parametrize("num_steps", [5, 20, 100])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("threshold", [None, static_threshold])
def test_ddim_trajectories_equal_diffusers(num_steps, eta, threshold):
    options = {"clip_sample": threshold is not None, "set_alpha_to_one": True, "steps_offset": 0}
    scheduler = DDIMScheduler(1000, beta_schedule="squaredcos_cap_v2", timestep_spacing="leading", **options)
    scheduler.set_timesteps(num_steps)
    assert scheduler.timesteps.tolist() == leading_timesteps(1000, num_steps)
    x_T = gaussians(20, (1, 2, 2))()
    options = {"eta": eta, "generator": torch.Generator().manual_seed(1), "use_clipped_model_output": True}
    # where the next is the clean image diffusers too has no variance, and adds none of its noise
    theirs = diffusers_trajectory(scheduler, TWO_MODES.estimate, x_T, **options)
    step = partial(ddim_step, eta=eta)
    ours = trajectory(leading_timesteps(1000, num_steps), step, TWO_MODES.estimate, x_T, threshold=threshold)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("timesteps", [leading_timesteps(1000, 20), named_timesteps("smart50"), [900, 500, 80]])
def test_dpm_solver_trajectories_equal_diffusers(timesteps, eta):
    scheduler = DPMSolverMultistepScheduler(
        1000,
        beta_schedule="squaredcos_cap_v2",
        algorithm_type="sde-dpmsolver++" if eta else "dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        lower_order_final=True,
        final_sigmas_type="zero",
    )
    scheduler.alphas_cumprod = COSINE.alphas_cumprod
    scheduler.set_timesteps(timesteps=timesteps)
    assert scheduler.timesteps.tolist() == timesteps
    x_T = gaussians(20, (1, 2, 2))()
    # the noise it would draw itself is in float32
    noise = gaussians(len(x_T), x_T.shape[1:], seed=1)
    theirs = diffusers_trajectory(scheduler, TWO_MODES.estimate, x_T, noise=noise)
    # diffusers keeps its σ in float32, and takes logarithms and differences of them
    ours = trajectory(timesteps, partial(dpm_solver_step, eta=eta), TWO_MODES.estimate, x_T)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", sorted(NAMED_SECTIONS))
def test_named_timesteps_are_diffusers_lists(name):
    assert named_timesteps(name) == getattr(diffusers_timesteps, f"{name}_timesteps")


def test_there_are_eight_named_lists_and_others_are_refused():
    theirs = {name.removesuffix("_timesteps") for name in vars(diffusers_timesteps) if name.endswith("_timesteps")}
    assert set(NAMED_SECTIONS) == theirs
    with pytest.raises(ValueError, match="'smart51': choose from fast27"):
        named_timesteps("smart51")
    with pytest.raises(ValueError, match="299 are too few"):
        named_timesteps("super100", 299)
    assert named_timesteps("smart50", 500)[0] == 499


# ---- guidance and what is told of a run


class Counting:
    """A model of images with eps = c x_t and v = c, which counts the rows it is asked for."""

    def __init__(self):
        self.rows = []

    def __call__(self, x_t, t, c):
        self.rows.append(len(x_t))
        return torch.cat([c * x_t, c.expand_as(x_t)], dim=1)


def test_an_interval_limits_guidance_and_its_cost():
    model, x_t = Counting(), torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    c, null = torch.full((3, 1, 1, 1), 2.0), torch.full((3, 1, 1, 1), -1.0)
    estimate = guided(model, c, null, 5.0, interval=(200, 700))
    for t, factor, rows in ((999, 2, 3), (701, 2, 3), (700, 14, 6), (450, 14, 6), (200, 14, 6), (199, 2, 3), (0, 2, 3)):
        eps, v = estimate(x_t, t)
        torch.testing.assert_close(eps, factor * x_t, msg=f"t = {t}")
        assert torch.equal(v, c.expand_as(x_t))
        assert model.rows.pop() == rows


@pytest.mark.parametrize("interval", [(-math.inf, math.inf), (200, 700)])
def test_gamma_1_is_conditional_everywhere_and_0_unconditional_where_there_is_guidance(interval):
    model, x_t = Counting(), torch.ones(3, 1, 2, 2)
    c, null = torch.full((3, 1, 1, 1), 2.0), torch.full((3, 1, 1, 1), -1.0)
    for t in (100, 450, 900):
        within = interval[0] <= t <= interval[1]
        assert torch.equal(guided(model, c, null, 1.0, interval=interval)(x_t, t)[0], 2 * x_t)
        assert model.rows.pop() == 3
        assert torch.equal(guided(model, c, null, 0.0, interval=interval)(x_t, t)[0], -x_t if within else 2 * x_t)


def test_a_trajectory_keeps_every_nth_step():
    seen, some = Trajectory(), Trajectory(every=3)
    for kept in (seen, some):
        x = sample(TWO_MODES, 5, leading_timesteps(1000, 8), callback=kept)
    assert [(step, t) for step, t, _, _ in seen] == list(enumerate(leading_timesteps(1000, 8)))
    assert [(step, t) for step, t, _, _ in some] == [(0, 875), (3, 500), (6, 125)]
    assert torch.equal(seen[-1][3], x)
    assert torch.equal(some[1][2], seen[3][2])
    torch.testing.assert_close(seen[3][3], one_step_denoise(TWO_MODES.estimate, seen[3][2], 500, COSINE))


# ---- denoising without a model


def smooth(count=8, size=64, seed=0):
    """Random images in [-1, 1] with the low frequencies of photographs, of different brightness."""
    generator = torch.Generator().manual_seed(seed)
    frequency = torch.fft.fftfreq(size)
    falloff = 1 / (frequency[:, None] ** 2 + frequency**2 + 1 / size**2)
    spectrum = torch.fft.fft2(torch.randn(count, 3, size, size, generator=generator)) * falloff
    x = torch.fft.ifft2(spectrum).real
    return x / x.abs().amax((1, 2, 3), keepdim=True)


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("t", [50, 250, 500, 750])
def test_a_blur_denoises_a_smooth_image(t, size):
    x_0 = smooth(2 if size == 256 else 8, size)
    x_t = add_noise(x_0, torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1)), t, COSINE)
    blurred, mean = classical_denoise(x_t, t, COSINE), x_t / math.sqrt(COSINE.alpha_cumprod(t))
    assert ((blurred - x_0) ** 2).mean() < (0.9 if t == 50 else 0.3) * ((mean - x_0) ** 2).mean()
    assert ((blurred - x_0) ** 2).mean() < 1.5 * x_0.var()  # nearer than noise of the image's own size


@pytest.mark.parametrize("t", [50, 500, 750])
def test_a_blur_keeps_brightness(t):
    x_0 = torch.full((200, 1, 64, 64), 0.4)
    x_t = add_noise(x_0, torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1)), t, COSINE)
    alpha_cumprod = COSINE.alpha_cumprod(t)
    error = math.sqrt((1 - alpha_cumprod) / alpha_cumprod / x_0.numel())
    # the mirrored edge is counted more than once, which adds to the error
    assert classical_denoise(x_t, t, COSINE).mean().item() == pytest.approx(0.4, abs=4 * 1.5 * error)


def test_the_clean_image_is_not_blurred():
    x = smooth(1)
    assert torch.equal(classical_denoise(x, -1, COSINE), x)


# ---- image to image


def test_a_late_start_keeps_the_mode_and_an_early_one_forgets_it():
    noise = gaussians(2000, (1, 2, 2))
    x_0 = TWO_MODES.means[0].view(1, 1, 2, 2).expand(2000, 1, 2, 2)

    def share(i_start):
        x = sdedit(TWO_MODES.estimate, x_0, i_start, EVERY_10TH, COSINE, noise=noise)
        return (TWO_MODES.nearest(x) == 0).double().mean().item()

    assert share(80) > 0.99
    assert share(0) == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 2000))
    assert 0.35 < share(30) < 0.95  # between the two


def test_image_to_image_starts_at_the_image_noised_to_its_first_timestep():
    seen, x_0 = Trajectory(), gaussians(2, (1, 2, 2), 5)()
    sdedit(TWO_MODES.estimate, x_0, 97, EVERY_10TH, COSINE, noise=gaussians(2, (1, 2, 2)), callback=seen)
    assert [(step, t) for step, t, _, _ in seen] == [(0, 20), (1, 10), (2, 0)]
    torch.testing.assert_close(seen[0][2], add_noise(x_0, gaussians(2, (1, 2, 2))(), 20, COSINE))


@pytest.mark.parametrize("i_start", [-1, 100, 1000])
def test_a_start_outside_the_steps_is_refused(i_start):
    with pytest.raises(ValueError, match=f"from 0 to 99, .* not {i_start}"):
        sdedit(TWO_MODES.estimate, torch.zeros(1, 1, 2, 2), i_start, EVERY_10TH, COSINE, noise=lambda: None)


# ---- inpainting

LEFT_KNOWN = tensor([0.0, 1.0], [0.0, 1.0]).view(1, 1, 2, 2)


def filled(num_steps, jump_length=1, num_resamples=1, count=4000, known=(1.5, -0.5), seed=0, **options):
    """Inpaint the right column of GAUSSIAN's images; the flat images, and the true conditional's moments."""
    x_orig = tensor(known[0], 9.0, known[1], 9.0).view(1, 1, 2, 2).expand(count, 1, 2, 2)
    x = inpaint(
        GAUSSIAN.estimate,
        x_orig,
        LEFT_KNOWN,
        leading_timesteps(1000, num_steps),
        COSINE,
        noise=gaussians(count, (1, 2, 2), seed),
        jump_length=jump_length,
        num_resamples=num_resamples,
        **options,
    )
    k, u = [0, 2], [1, 3]
    gain = CORRELATED[u][:, k] @ torch.linalg.inv(CORRELATED[k][:, k])
    mean = GAUSSIAN.mean[u] + gain @ (tensor(*known) - GAUSSIAN.mean[k])
    return x, mean, CORRELATED[u][:, u] - gain @ CORRELATED[k][:, u], x_orig


@pytest.mark.parametrize(("jump_length", "num_resamples"), [(1, 1), (3, 4), (10, 2)])
@pytest.mark.parametrize("step", [ddpm_step, ddim_step, dpm_solver_step])
def test_known_pixels_are_exact_in_the_end_and_noised_as_the_timestep_asks_before(jump_length, num_resamples, step):
    seen = Trajectory()
    x, _, _, x_orig = filled(10, jump_length, num_resamples, step=step, callback=seen)
    assert torch.equal(x[..., 0], x_orig[..., 0])
    assert not torch.isclose(x[..., 1], x_orig[..., 1]).any()
    assert seen[-1][1] == 0
    for _, t, x_t, _ in seen[1:]:
        alpha_cumprod = COSINE.alpha_cumprod(t)
        mean, variance = math.sqrt(alpha_cumprod) * x_orig[0, 0, :, 0], (1 - alpha_cumprod) * torch.eye(2).double()
        assert_moments(x_t[..., 0], mean, variance)


def test_images_of_another_size_than_the_noise_are_refused():
    noise, good, bad = gaussians(1, (3, 4, 4)), torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 8, 6)
    rest = {"timesteps": [9, 5, 0], "schedule": COSINE, "noise": noise}
    for name, run in (
        ("x_orig", partial(inpaint, x_orig=bad, mask=good[:, :1])),
        ("mask", partial(inpaint, x_orig=good, mask=bad[:, :1])),
        ("x_orig", partial(inpaint_component, x_orig=bad, keep=grey_colour()[0])),
        ("x_0", partial(sdedit, x_0=bad, i_start=0)),
    ):
        told = f"{name} is 8 × 6 (height × width), but what is sampled 4 × 4"
        with pytest.raises(ValueError, match=re.escape(told)):
            run(toy(0.1, 0.0), **rest)


def test_where_nothing_is_known_inpainting_is_sampling():
    count, x_orig = 50, torch.zeros(50, 1, 2, 2).double()
    seen = []

    def noise_of(draw):  # inpainting draws twice a step: for the step, and for the known pixels
        source = gaussians(count, (1, 2, 2))

        def noise():
            seen.append(None)
            return source() if draw(len(seen) - 1) else torch.full((count, 1, 2, 2), torch.nan).double()

        return noise

    ours = inpaint(
        TWO_MODES.estimate,
        x_orig,
        torch.ones(1, 1, 2, 2),
        EVERY_10TH,
        COSINE,
        noise=noise_of(lambda n: n == 0 or n % 2),
    )
    assert torch.equal(ours, sample(TWO_MODES, count))


def test_no_timesteps_make_no_path():
    with pytest.raises(ValueError, match="no timesteps"):
        list(resampling_path([], 1, 1))


def test_resampling_brings_the_new_part_to_the_true_conditional():
    """Without it the new part is biased: known pixels with fresh noise at each step tell it too little, too late."""
    plain, mean, covariance, _ = filled(25)
    resampled, *_ = filled(25, jump_length=5, num_resamples=10)

    def error(x):
        x = x[..., 1].flatten(1)
        return (x.mean(0) - mean).norm().item(), (x.T.cov() - covariance).norm().item()

    assert error(plain)[0] > 0.1  # without, more steps do not help
    assert error(filled(100)[0])[0] > 0.1
    assert error(resampled)[0] < 0.05
    assert error(resampled)[1] < 0.05 < 0.1 < error(plain)[1]


def test_with_more_steps_and_resamples_the_new_part_follows_the_true_conditional():
    x, mean, covariance, _ = filled(100, jump_length=5, num_resamples=20)
    assert_moments(x[..., 1], mean, covariance, bias=0.01)


def test_without_resampling_the_path_is_the_list_of_steps():
    for jump_length in (1, 3, 100):
        path = list(resampling_path([90, 60, 30, 0], jump_length, 1))
        assert path == [(90, 60), (60, 30), (30, 0), (0, -1)]


def test_a_path_by_hand():
    assert list(resampling_path([8, 6, 4, 2, 0], 2, 3)) == [
        *[(8, 6), (6, 4), (4, 8), (8, 6), (6, 4), (4, 8), (8, 6), (6, 4)],
        *[(4, 2), (2, 0), (0, 4), (4, 2), (2, 0), (0, 4), (4, 2), (2, 0)],
        (0, -1),
    ]


@pytest.mark.parametrize("num_steps", [1, 2, 7, 20])
@pytest.mark.parametrize("jump_length", [1, 2, 5, 7, 30])
@pytest.mark.parametrize("num_resamples", [1, 2, 5])
def test_a_path_walks_each_block_r_times_and_never_leaves_the_clean_image(num_steps, jump_length, num_resamples):
    timesteps = leading_timesteps(1000, num_steps)
    path = list(resampling_path(timesteps, jump_length, num_resamples))
    assert path[0][0] == timesteps[0]
    assert path[-1] == (0, -1)
    assert all(here == there for (_, here), (there, _) in pairwise(path))  # each step starts where the last one ended
    assert [t_prev for _, t_prev in path].count(-1) == 1
    index = {t: i for i, t in enumerate([*timesteps, -1])}
    hops = [index[t_prev] - index[t] for t, t_prev in path]
    assert all(hop == 1 or -jump_length <= hop < 0 for hop in hops)
    for down in pairwise([*timesteps, -1]):
        assert path.count(down) == (1 if down[1] == -1 else num_resamples)
    last_block = (num_steps - 1) % jump_length  # shorter, as the last timestep is its end
    blocks = [jump_length] * ((num_steps - 1) // jump_length) + [last_block] * (last_block > 0)
    ups = [-hop for hop in hops if hop < 0]
    assert ups == [length for length in blocks for _ in range(num_resamples - 1)]


@pytest.mark.parametrize(("jump_length", "num_resamples"), [(0, 1), (1, 0), (-1, 5)])
def test_a_path_of_nothing_is_refused(jump_length, num_resamples):
    with pytest.raises(ValueError, match=f"at least 1, not {jump_length} and {num_resamples}"):
        filled(5, jump_length, num_resamples, count=2)


# ---- anagrams


def toy(scale, shift):
    """An estimate with eps and v of its own, neither of which any view leaves as it is."""

    def estimate(x_t, t):
        ramp = torch.arange(x_t[0].numel()).view(x_t.shape[1:]) / 10
        return scale * x_t.roll(1, -1) + ramp + t, torch.sin(shift + ramp + x_t)

    return estimate


def test_an_anagram_is_the_mean_of_what_each_sees():
    x_t, a, b = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)), toy(0.5, 0.1), toy(-2.0, 0.9)
    eps, v = anagram([a, b], [identity(), vertical_flip()])(x_t, 7)
    eps_b, v_b = b(x_t.flip(-2), 7)
    torch.testing.assert_close(eps, (a(x_t, 7)[0] + eps_b.flip(-2)) / 2)
    torch.testing.assert_close(v, (a(x_t, 7)[1] + v_b.flip(-2)) / 2)

    eps, v = anagram([a, b], [identity(), negate()])(x_t, 7)
    eps_b, v_b = b(-x_t, 7)
    torch.testing.assert_close(eps, (a(x_t, 7)[0] - eps_b) / 2)
    torch.testing.assert_close(v, (a(x_t, 7)[1] + v_b) / 2)  # v is a share of a variance, which has no negative

    eps, v = anagram([a], [View("quarter", lambda x: x.rot90(1, (-2, -1)), lambda x: x.rot90(-1, (-2, -1)))])(x_t, 7)
    torch.testing.assert_close(eps, a(x_t.rot90(1, (-2, -1)), 7)[0].rot90(-1, (-2, -1)))
    torch.testing.assert_close(v, a(x_t.rot90(1, (-2, -1)), 7)[1].rot90(-1, (-2, -1)))


def with_variance(model):
    """The model's estimate, with a learned variance that depends on the image and the timestep."""
    return lambda x_t, t: (model.estimate(x_t, t)[0], torch.sin(x_t + t))


@pytest.mark.parametrize("reduction", ["mean", "alternate"])
def test_equal_prompts_in_the_same_view_are_plain_sampling(reduction):
    model = anagram([TWO_MODES.estimate] * 2, [identity()] * 2, reduction)
    assert torch.equal(sample(TWO_MODES, 20, estimate=model), sample(TWO_MODES, 20))
    learned, plain = partial(ddpm_step, variance="learned_range"), with_variance(TWO_MODES)
    model = anagram([plain] * 2, [identity()] * 2, reduction)
    assert torch.equal(
        sample(TWO_MODES, 20, estimate=model, step=learned), sample(TWO_MODES, 20, estimate=plain, step=learned)
    )


def test_alternate_asks_one_after_another():
    asked = []

    def listening(name):
        return lambda x_t, t: asked.append((name, t)) or toy(1.0, 0.5)(x_t, t)

    x_t = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    views = [identity(), vertical_flip(), negate()]
    estimate = anagram([listening(name) for name in "abc"], views, "alternate")
    found = [estimate(x_t, t) for t in (9, 8, 7, 6)]
    assert asked == [("a", 9), ("b", 8), ("c", 7), ("a", 6)]
    for k, (eps, v) in enumerate(found):
        expected = toy(1.0, 0.5)(views[k % 3].view(x_t), 9 - k)
        assert torch.equal(eps, views[k % 3].inverse(expected[0]))
        assert torch.equal(v, expected[1].flip(-2) if k == 1 else expected[1])


def test_an_anagram_of_two_gaussians_is_the_gaussian_between_them():
    """With the covariance s² I in both, the mean of the two eps is exact for the mean of the two means, seen back."""
    first, second = tensor([1.0, 0.0, -1.0, 0.5]), tensor([0.0, 2.0, 1.0, -1.0])
    white = 0.25 * torch.eye(4).double()
    models = [Mixture(tensor(1.0), mean, white[None]) for mean in (first, second)]
    estimates = [model.estimate for model in models]
    x = sample(models[0], 4000, estimate=anagram(estimates, [identity(), vertical_flip()]))
    assert_moments(x, (first[0] + second[0, [2, 3, 0, 1]]) / 2, white, bias=0.01)
    x = sample(models[0], 4000, estimate=anagram(estimates, [horizontal_flip(), negate()]))
    assert_moments(x, (first[0, [1, 0, 3, 2]] - second[0]) / 2, white, bias=0.01)


def test_a_strange_anagram_is_refused():
    a = toy(1.0, 0.0)
    for estimates, views in (([a], [identity(), negate()]), ([a, a], [identity()]), ([], [])):
        with pytest.raises(ValueError, match=f"a view for each prompt, not {len(views)} for {len(estimates)}"):
            anagram(estimates, views)
    with pytest.raises(ValueError, match="reduction must be mean, rectified or alternate, not 'sum'"):
        anagram([a], [identity()], "sum")


# ---- hybrids and completion


def test_a_hybrid_takes_each_component_from_its_own_prompt():
    x_t, a, b = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), toy(0.5, 0.1), toy(-2.0, 0.9)
    for low, high in (low_high_pass(), grey_colour()):
        eps, v = hybrid([a, b], [low, high])(x_t, 3)
        torch.testing.assert_close(eps, low.of(a(x_t, 3)[0]) + high.of(b(x_t, 3)[0]))
        torch.testing.assert_close(v, (a(x_t, 3)[1] + b(x_t, 3)[1]) / 2)
        torch.testing.assert_close(low.of(x_t) + high.of(x_t), x_t)
    eps, v = hybrid([lambda x, t: (x, None)], [Component("all", lambda x: x)])(x_t, 3)
    assert torch.equal(eps, x_t)
    assert v is None


def test_a_hybrid_of_equal_prompts_is_plain_sampling():
    columns = [
        Component("left", lambda x: x * tensor(1.0, 0.0)),
        Component("right", lambda x: x * tensor(0.0, 1.0)),
    ]
    model = hybrid([TWO_MODES.estimate] * 2, columns)
    assert torch.equal(sample(TWO_MODES, 20, estimate=model), sample(TWO_MODES, 20))

    learned, plain = partial(ddpm_step, variance="learned_range"), with_variance(TWO_MODES)
    drawn = sample(TWO_MODES, 20, estimate=plain, step=learned)
    assert torch.equal(sample(TWO_MODES, 20, estimate=hybrid([plain] * 2, columns), step=learned), drawn)
    assert not torch.equal(drawn, sample(TWO_MODES, 20))


def test_a_strange_hybrid_is_refused():
    for estimates, components in (([toy(1.0, 0.0)], low_high_pass()), ([], [])):
        with pytest.raises(ValueError, match=f"not {len(components)} for {len(estimates)}"):
            hybrid(estimates, components)


@pytest.mark.parametrize("step", [ddpm_step, ddim_step, dpm_solver_step])
def test_completion_keeps_the_grey_and_makes_up_the_colour(step):
    shape, count = (3, 2, 2), 2000
    model = Mixture(tensor(1.0), torch.zeros(1, 12).double(), 0.5 * torch.eye(12).double()[None], shape)
    x_orig, grey = 0.4 * gaussians(1, shape, 7)().expand(count, *shape), grey_colour()[0]
    seen, noise = Trajectory(), gaussians(count, shape)
    x = inpaint_component(model.estimate, x_orig, grey, EVERY_10TH, COSINE, noise=noise, step=step, callback=seen)
    torch.testing.assert_close(grey.of(x), grey.of(x_orig), atol=1e-5, rtol=0)
    colour, variance = x - grey.of(x), 0.5 * 2 / 3  # the channels' mean takes a third of the variance
    assert colour.var(0).mean().item() == pytest.approx(variance, rel=0.05)
    assert colour.mean(0).abs().max() < 4 * math.sqrt(variance / count)
    for _, t, x_t, _ in seen[1:]:
        alpha_cumprod = COSINE.alpha_cumprod(t)
        mean = math.sqrt(alpha_cumprod) * x_orig.mean(1)[0].flatten()
        assert_moments(x_t.mean(1), mean, (1 - alpha_cumprod) / 3 * torch.eye(4).double())


def test_noise_of_two_seeds_completes_two_images():
    x_orig, noise = torch.zeros(2, 3, 4, 4), noise_source([1, 2], (3, 4, 4))
    x = inpaint_component(toy(0.1, 0.0), x_orig, grey_colour()[0], [9, 5, 0], COSINE, noise=noise, step=ddim_step)
    assert x.shape == (2, 3, 4, 4)
    assert not torch.allclose(x[0], x[1])
