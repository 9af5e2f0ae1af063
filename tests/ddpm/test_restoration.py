"""Restoration on models whose answer is known, and operators that are what they must be."""

import math

import pytest
import torch

from ddpm.process import ddim_step, ddpm_step, dpm_solver_step, static_threshold
from ddpm.restoration import Degradation, Operator, chain, check_operator, downscale, grey, hole, psnr, restore
from ddpm.sampling import Trajectory, noise_source
from ddpm.schedule import leading_timesteps
from tests.ddpm.test_algorithms import CORRELATED, COSINE, GAUSSIAN, Mixture, assert_moments, gaussians, tensor, toy

MASK = torch.zeros(1, 1, 8, 8)
MASK[..., 2:6, 1:5] = 1
ALIGNED = MASK.roll(1, -1)  # its hole is made of boxes of 2 × 2
SMALL = ALIGNED[..., ::2, ::2]
OPERATORS = {
    "grey": grey(),
    "hole": hole(MASK),
    "half": downscale(2),
    "quarter": downscale(4),
    "grey half": chain(grey(), downscale(2)),
    "half grey": chain(downscale(2), grey()),
    "grey with a hole": chain(hole(MASK), grey()),
    "a hole of boxes, smaller": chain(hole(ALIGNED), downscale(2)),
    "all at once": chain(grey(), downscale(2), hole(SMALL)),
}


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- operators


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_operators_have_their_pseudo_inverse(name):
    """Beside the one that linear algebra finds for the operator written as a matrix."""
    operator = OPERATORS[name]
    check_operator(operator, (3, 8, 8))
    basis = torch.eye(192, dtype=torch.float64).view(192, 3, 8, 8)
    A = operator.of(basis).flatten(1).T
    y_shape = operator.of(basis[:1]).shape[1:]
    back = operator.inverse(torch.eye(len(A), dtype=torch.float64).view(-1, *y_shape)).flatten(1).T
    torch.testing.assert_close(back, torch.linalg.pinv(A), atol=1e-6, rtol=0)
    values = torch.linalg.svdvals(A)
    kept = values[values > 1e-6]
    torch.testing.assert_close(kept, torch.full_like(kept, operator.gain), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("operator", "told"),
    [
        (chain(hole(MASK), downscale(4)), "A A⁺ A is not A"),  # boxes that are half hole
        (Operator("steep", lambda x: x, lambda y: y / 2), "A A⁺ A is not A"),
        (Operator("first", lambda x: x[:, :1], lambda y: y.expand(-1, 3, -1, -1)), "A⁺A is not symmetric"),
        (Operator("bent", lambda x: x.abs(), lambda y: y), "not linear"),
        (Operator("doubled", lambda x: 2 * x, lambda y: y / 2), "its gain is 2, or several, not 1"),
    ],
)
def test_operators_without_a_pseudo_inverse_are_refused(operator, told):
    with pytest.raises(ValueError, match=f"the operator {operator.name!r} cannot be undone on .*{told}"):
        check_operator(operator, (3, 8, 8))


def test_boxes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="8 × 8 pixels has no boxes of 3 × 3"):
        downscale(3).of(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="by 1 or more, not 0"):
        downscale(0)


# ---- without noise


@pytest.mark.parametrize("resampling", [(1, 1), (3, 2)])
@pytest.mark.parametrize("step", [ddpm_step, ddim_step, dpm_solver_step])
@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_the_end_fits_what_was_seen(name, step, resampling):
    operator, x_orig = OPERATORS[name], noise(2, 3, 8, 8)
    y = operator.of(x_orig)
    x = restore(
        toy(0.3, 0.1),
        y,
        operator,
        [900, 700, 400, 200, 50],
        COSINE,
        noise=noise_source([1, 2], (3, 8, 8)),
        step=step,
        threshold=static_threshold,
        jump_length=resampling[0],
        num_resamples=resampling[1],
    )
    if name == "hole":
        assert torch.equal(operator.of(x), y)
    torch.testing.assert_close(operator.of(x), y, atol=1e-5, rtol=0)
    assert not torch.allclose(x, x_orig, atol=0.1)


LEFT = hole(tensor([0.0, 1.0], [0.0, 1.0]).view(1, 1, 2, 2))
KNOWN, UNKNOWN = [0, 2], [1, 3]
Y = tensor([1.5, 0.0], [-0.5, 0.0]).view(1, 1, 2, 2)


def restored(model, num_steps, y=Y, operator=LEFT, count=4000, **options):
    timesteps = leading_timesteps(1000, num_steps)
    y = y.expand(count, -1, -1, -1)
    return restore(model.estimate, y, operator, timesteps, COSINE, noise=gaussians(count, model.shape), **options)


def posterior(mean, covariance, A, y, noise_std):
    """Mean and covariance of N(mean, covariance) given y = A x + noise_std z."""
    gain = covariance @ A.T @ torch.linalg.inv(A @ covariance @ A.T + noise_std**2 * torch.eye(len(A)).double())
    return mean + gain @ (y - A @ mean), covariance - gain @ A @ covariance


@pytest.mark.parametrize("step", [ddpm_step, ddim_step])
def test_what_is_independent_of_what_was_seen_is_drawn_from_the_model(step):
    covariance = CORRELATED.clone()
    covariance[0::2, 1::2] = covariance[1::2, 0::2] = 0
    model = Mixture(tensor(1.0), GAUSSIAN.means, covariance[None])
    x = restored(model, 200, step=step)
    assert torch.equal(x[..., 0], Y[..., 0].expand(4000, -1, -1))
    mean, covariance = model.mean[UNKNOWN], covariance[UNKNOWN][:, UNKNOWN]
    assert_moments(x[..., 1].flatten(1), mean, covariance, bias=0.02)


def test_time_travel_brings_what_depends_on_it_to_the_posterior():
    """Of a linear-Gaussian model; without time travel what is made up hears of y too little, too late."""
    A = torch.eye(4).double()[KNOWN]
    mean, covariance = posterior(GAUSSIAN.mean, CORRELATED, A, Y.flatten()[KNOWN], 0.0)

    def error(x):
        x = x[..., 1].flatten(1)
        off = (x.mean(0) - mean[UNKNOWN]).norm(), (x.T.cov() - covariance[UNKNOWN][:, UNKNOWN]).norm()
        return [part.item() for part in off]

    plain, travelled = error(restored(GAUSSIAN, 50)), error(restored(GAUSSIAN, 50, jump_length=5, num_resamples=10))
    assert plain[0] > 0.1
    assert max(travelled) < 0.05


def test_colours_of_grey_gaussians_are_the_posterior():
    """Three channels of a pixel that vary together: given their mean, what is left of them."""
    shape = (3, 1, 1)
    covariance = tensor([1.0, 0.5, 0.5], [0.5, 1.0, 0.5], [0.5, 0.5, 1.0])
    model = Mixture(tensor(1.0), tensor([0.2, 0.0, -0.2]), covariance[None], shape)
    x = restored(model, 200, tensor(0.7).view(1, 1, 1, 1), grey())
    A = torch.full((1, 3), 1 / 3).double()
    mean, covariance = posterior(model.mean, covariance, A, tensor(0.7), 0.0)
    torch.testing.assert_close(x.mean(1), torch.full((4000, 1, 1), 0.7).double())
    assert_moments(x, mean, covariance, bias=0.02)


# ---- with noise


def ddnm_plus(step, operator, y, noise_std):
    """The paper's own rule, eq. 19, as a step: as near to λ = 1 as the fresh noise of the step can hide y's."""

    def corrected(x_t, predicted, t, t_prev, schedule, z):
        a, a_prev = schedule.alpha_cumprod(t), schedule.alpha_cumprod(t_prev)
        beta = 1 - a / a_prev
        share, sigma = math.sqrt(a_prev) * beta / (1 - a), math.sqrt(beta)
        weight = min(1.0, sigma / (share * noise_std / operator.gain))
        x_0 = predicted.x_0 - weight * operator.inverse(operator.of(predicted.x_0) - y)
        fresh = math.sqrt(max(1 - (share * weight * noise_std / operator.gain / sigma) ** 2, 0))
        return step(x_t, predicted._replace(x_0=x_0), t, t_prev, schedule, fresh * z)

    return corrected


BOX = downscale(2)
UNIT = Mixture(tensor(1.0), tensor([0.5, -0.5, 1.0, 0.0]), torch.eye(4).double()[None])


@pytest.mark.parametrize("step", [ddpm_step, ddim_step], ids=["ddpm", "ddim"])
@pytest.mark.parametrize("noise_std", [0.3, 1.0])
@pytest.mark.parametrize("operator", [LEFT, BOX], ids=["hole", "half"])
def test_noisy_y_gives_the_posterior_of_a_unit_gaussian(operator, noise_std, step):
    basis = torch.eye(4).double().view(4, 1, 2, 2)
    A = operator.of(basis).flatten(1).T
    A = A[A.abs().sum(1) > 0]
    y = Y if operator is LEFT else tensor(0.8).view(1, 1, 1, 1)
    mean, covariance = posterior(UNIT.mean, UNIT.covariances[0], A, y.flatten()[y.flatten() != 0], noise_std)
    x = restored(UNIT, 250, y, operator, noise_std=noise_std, step=step)
    assert_moments(x, mean, covariance, bias=0.015)


def test_the_papers_rule_keeps_the_noise_of_y():
    """Why ours is another: of y, 4/5 are the posterior mean here, and nearly all of it is what eq. 19 arrives at."""
    model = Mixture(tensor(1.0), torch.zeros(1, 4).double(), torch.eye(4).double()[None])
    y, everything = torch.ones(1, 1, 2, 2).double(), hole(torch.zeros(1, 1, 2, 2))
    ours = restored(model, 100, y, everything, noise_std=0.5)
    step = ddnm_plus(ddpm_step, everything, y, 0.5)
    theirs = restored(model, 100, y, hole(torch.ones(1, 1, 2, 2)), step=step)
    assert ours.mean().item() == pytest.approx(0.8, abs=0.02)
    assert ours.var().item() == pytest.approx(0.2, abs=0.02)
    assert theirs.mean().item() > 0.95
    assert theirs.var().item() < 0.02


def test_no_noise_is_the_limit_of_little():
    few = [900, 500, 100]
    options = {"timesteps": few, "schedule": COSINE}
    exact, near = (
        restore(toy(0.3, 0.1), noise(2, 3, 4, 4), BOX, noise=noise_source([1, 2], (3, 8, 8)), noise_std=std, **options)
        for std in (0.0, 1e-4)
    )
    torch.testing.assert_close(exact, near, atol=1e-3, rtol=0)


def test_what_was_seen_is_fitted_at_every_step():
    seen = Trajectory()
    y = noise(2, 3, 4, 4)
    noise_of = noise_source([1, 2], (3, 8, 8))
    options = {"noise": noise_of, "callback": seen, "threshold": static_threshold}
    restore(toy(0.3, 0.1), y, BOX, [900, 500, 100], COSINE, **options)
    assert [t for _, t, _, _ in seen] == [900, 500, 100]
    for _, _, _, x_0 in seen:
        torch.testing.assert_close(BOX.of(x_0), y, atol=1e-5, rtol=0)


def test_a_strange_restoration_is_refused():
    options = {"timesteps": [500, 0], "schedule": COSINE, "noise": noise_source([1], (3, 8, 8))}
    with pytest.raises(ValueError, match=r"to \[3, 4, 4\], but y is \[3, 8, 8\]"):
        restore(toy(1.0, 0.0), torch.zeros(1, 3, 8, 8), BOX, **options)
    with pytest.raises(ValueError, match=r"not be below 0, it is -0\.5"):
        restore(toy(1.0, 0.0), torch.zeros(1, 3, 4, 4), BOX, noise_std=-0.5, **options)


def test_psnr_is_that_of_clipped_images():
    """The peak is 2, so a tenth of it everywhere is 20 dB; what is outside of [-1, 1] counts as its end."""
    original = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    torch.testing.assert_close(psnr(original - 0.2, original), torch.tensor([20.0, 20.0]))
    assert psnr(original + 0.2, original).tolist() == pytest.approx([20, 10 * math.log10(4e12)], abs=1e-3)


def test_every_image_that_is_seen_has_noise_of_its_own():
    seen = Degradation(n=2, noise_std=0.1).degrade(torch.zeros(2, 3, 8, 8), seed=1)
    assert 0.05 < seen.std() < 0.15 and not torch.equal(seen[0], seen[1])
