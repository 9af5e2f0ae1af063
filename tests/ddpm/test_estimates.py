"""Estimates that are made of others: their moments and products in closed form, and diffusers' guiders."""

import math

import pytest
import torch
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer

from ddpm.estimates import alternates, anagram, classifier_free, compose, guided, projected, rectify, rescaled
from ddpm.process import predict_x0
from ddpm.views import identity, negate, vertical_flip
from tests.ddpm.test_algorithms import COSINE, Mixture, assert_moments, sample, tensor, toy

# ---- anagrams that are rectified, and their weights


def correlated(rho: float, count: int = 3, shape=(2, 3, 128, 128)) -> list[torch.Tensor]:
    """As many unit Gaussians, each pair of them with the correlation rho."""
    z, *others = torch.randn(count + 1, *shape, generator=torch.Generator().manual_seed(0))
    return [math.sqrt(rho) * z + math.sqrt(1 - rho) * other for other in others]


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("weights", [[1 / 3, 1 / 3, 1 / 3], [0.6, 0.3, 0.1]])
def test_rectified_noise_has_variance_1_however_correlated(rho, weights):
    eps = correlated(rho)
    plain = sum(weight * part for weight, part in zip(weights, eps, strict=True))
    shrunk = (1 - rho) * sum(weight**2 for weight in weights) + rho
    assert plain.var().item() == pytest.approx(shrunk, abs=0.01)
    for image, mean in zip(rectify(eps, weights), plain, strict=True):
        assert image.var().item() == pytest.approx(1, abs=0.02)
        torch.testing.assert_close(image / image.std(), mean / mean.std())


def test_rectified_noise_that_is_opposed_has_variance_1():
    z = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    assert rectify([z, -z], [0.7, 0.3]).var().item() == pytest.approx(1, abs=0.02)


def test_each_image_is_rectified_by_its_own_correlation():
    same, other = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    both = rectify([torch.stack([same, same]), torch.stack([same, other])], [0.5, 0.5])
    torch.testing.assert_close(both[0], same, atol=0.02, rtol=0.02)
    torch.testing.assert_close(both[1], (same + other) / math.sqrt(2), atol=0.05, rtol=0.05)


def test_a_rectified_anagram_is_the_mean_made_larger_and_v_stays():
    def noise(seed):
        eps = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
        return lambda x_t, t: (eps, torch.tanh(eps))

    estimates, views = [noise(0), noise(1)], [identity(), vertical_flip()]
    x_t = torch.zeros(2, 3, 64, 64)
    eps, v = anagram(estimates, views)(x_t, 5)
    rectified, v_rectified = anagram(estimates, views, "rectified")(x_t, 5)
    assert torch.equal(v, v_rectified)
    assert eps.var().item() == pytest.approx(0.5, abs=0.02)
    assert rectified.var().item() == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(rectified / rectified.std(), eps / eps.std(), atol=0.02, rtol=0.02)


def test_weights_of_views_are_shares():
    x_t, a, b = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)), toy(0.5, 0.1), toy(-2.0, 0.9)
    eps, v = anagram([a, b], [identity(), negate()], weights=[3, 1])(x_t, 7)
    eps_b, v_b = b(-x_t, 7)
    torch.testing.assert_close(eps, 0.75 * a(x_t, 7)[0] - 0.25 * eps_b)
    torch.testing.assert_close(v, 0.75 * a(x_t, 7)[1] + 0.25 * v_b)
    plain = anagram([a, b], [identity(), negate()])(x_t, 7)
    for found, expected in zip(anagram([a, b], [identity(), negate()], weights=[2, 2])(x_t, 7), plain, strict=True):
        assert torch.equal(found, expected)


def test_a_weighed_anagram_of_two_gaussians_is_the_gaussian_nearer_to_the_heavier():
    first, second, white = tensor([1.0, 0.0, -1.0, 0.5]), tensor([0.0, 2.0, 1.0, -1.0]), 0.25 * torch.eye(4).double()
    models = [Mixture(tensor(1.0), mean, white[None]) for mean in (first, second)]
    estimate = anagram([model.estimate for model in models], [identity(), vertical_flip()], weights=[4, 1])
    x = sample(models[0], 4000, estimate=estimate)
    assert_moments(x, 0.8 * first[0] + 0.2 * second[0, [2, 3, 0, 1]], white, bias=0.01)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, 1.0, 1.0]])
def test_strange_weights_of_views_are_refused(weights):
    told = ", ".join(f"{weight:g}" for weight in weights)
    with pytest.raises(ValueError, match=f"each of the 2 views a weight above 0, not {told}$"):
        anagram([toy(1.0, 0.0)] * 2, [identity(), negate()], weights=weights)
    with pytest.raises(ValueError, match="alternate asks one view a step"):
        anagram([toy(1.0, 0.0)] * 2, [identity(), negate()], "alternate", weights=[1, 1])


# ---- compositions


WHITE = 0.25 * torch.eye(4).double()


def gaussian(*mean: float) -> Mixture:
    return Mixture(tensor(1.0), tensor(mean), WHITE[None])


def test_a_composition_is_the_product_of_gaussians():
    """Π N(μᵢ, s²)^wᵢ is N(Σ wᵢ μᵢ, s²) where the weights sum to 1, and so it is at every noise level."""
    means = [(1.0, 0.0, -1.0, 0.5), (0.0, 2.0, 1.0, -1.0), (0.5, 0.5, 0.0, -0.5)]
    for weights in ([1.0, 1.0, -1.0], [0.5, 0.25, 0.25], [-0.5, 1.2, 0.3]):
        models = [gaussian(*mean) for mean in means]
        estimate = compose([model.estimate for model in models], weights)
        product = gaussian(*(torch.tensor(weights, dtype=torch.float64) @ tensor(*means)).tolist())
        x_t = torch.randn(50, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for t in (10, 300, 700, 990):
            torch.testing.assert_close(estimate(x_t, t)[0], product.estimate(x_t, t)[0])
    x = sample(product, 4000, estimate=estimate)
    assert_moments(x, product.means[0], WHITE, bias=0.01)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 7.0])
def test_a_composition_with_1_minus_gamma_and_gamma_is_guidance(gamma):
    x_t, a, b = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)), toy(0.5, 0.1), toy(-2.0, 0.9)

    def model(x_t, t, c):  # b's rows come first: the null half
        halves = [torch.cat(told(x[None], t), dim=1) for told, x in zip(((b, a)[int(k)] for k in c), x_t, strict=True)]
        return torch.cat(halves)

    eps, v = guided(model, torch.ones(2), torch.zeros(2), gamma)(x_t, 7)
    composed, v_composed = compose([b, a], [1 - gamma, gamma])(x_t, 7)
    torch.testing.assert_close(composed, eps)
    if gamma >= 1:  # v of guidance is the conditional one
        torch.testing.assert_close(v_composed, v)


def test_every_image_begins_with_the_first_of_alternating_estimates():
    """An odd number of steps does not leave the next image with another order."""
    asked = []
    turns = anagram([lambda x_t, t, k=k: (asked.append(k) or x_t, None) for k in (0, 1)], [identity()] * 2, "alternate")
    for t in (900, 500, 100) * 2:
        turns(torch.zeros(1, 1, 2, 2), t)
    assert asked == [0, 1, 0] * 2


def test_a_composition_of_alternating_estimates_alternates():
    views = [identity(), negate()]
    turns = anagram([toy(1.0, 0.0)] * 2, views, "alternate")
    assert alternates(compose([turns, toy(1.0, 0.0)], [1, 1]))
    assert not alternates(compose([toy(1.0, 0.0)] * 2, [1, 1]))


@pytest.mark.parametrize(("weights", "told"), [([1.0, -1.0], "1, -1"), ([0.5, -2.0], "0.5, -2"), ([0.0, 0.0], "0, 0")])
def test_weights_that_cancel_are_refused(weights, told):
    with pytest.raises(ValueError, match=f"the weights {told} cancel: all of them must sum to more than 0"):
        compose([toy(1.0, 0.0)] * 2, weights)


def test_a_composition_needs_a_weight_for_each_estimate():
    with pytest.raises(ValueError, match="a weight for each estimate, not 1 for 2"):
        compose([toy(1.0, 0.0)] * 2, [1.0])


# ---- guidance that does not burn, against diffusers


def halves(seed: int) -> tuple[torch.Tensor, ...]:
    """x_t, eps_u and eps_c of three images."""
    return torch.randn(3, 3, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("gamma", [0.0, 3.0, 7.5])
@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_rescaled_guidance_is_diffusers(gamma, share):
    x_t, eps_u, eps_c = halves(0)
    theirs = ClassifierFreeGuidance(gamma, guidance_rescale=share).forward(eps_c, eps_u)
    ours = rescaled(share)(x_t, 500, eps_u, eps_c, gamma)
    torch.testing.assert_close(ours, theirs.pred)
    if share == 1:
        torch.testing.assert_close(ours.std((1, 2, 3)), eps_c.std((1, 2, 3)))


@pytest.mark.parametrize("momentum", [0.0, -0.5])
@pytest.mark.parametrize(("parallel", "max_norm"), [(0.0, 2.5), (0.3, 1.0), (0.0, math.inf), (1.0, math.inf)])
def test_projected_guidance_is_diffusers(parallel, max_norm, momentum):
    """Their guider is told the clean images, as the paper has it; their scale is counted from the conditional one."""
    guider, gamma = projected(COSINE, parallel=parallel, max_norm=max_norm, momentum=momentum), 5.0
    theirs = AdaptiveProjectedGuidance(
        gamma - 1,
        adaptive_projected_guidance_momentum=momentum,
        adaptive_projected_guidance_rescale=max_norm if max_norm < math.inf else 0.0,
        eta=parallel,
        use_original_formulation=True,
    )
    theirs.momentum_buffer = MomentumBuffer(momentum)
    for t in (900, 500, 100):
        x_t, eps_u, eps_c = halves(t)
        x_u, x_c = (predict_x0(x_t, eps, t, COSINE) for eps in (eps_u, eps_c))
        ours = guider(x_t, t, eps_u, eps_c, gamma)
        torch.testing.assert_close(predict_x0(x_t, ours, t, COSINE), theirs.forward(x_c, x_u).pred)
        if parallel == 1 and not momentum:
            torch.testing.assert_close(ours, classifier_free(x_t, t, eps_u, eps_c, gamma))


def test_projected_guidance_forgets_what_it_saw_of_another_image():
    seen, fresh = (projected(COSINE, momentum=-0.5) for _ in range(2))
    for t in (900, 500):
        seen(halves(t)[0], t, *halves(t)[1:], 5.0)
    assert torch.equal(seen(halves(1)[0], 900, *halves(1)[1:], 5.0), fresh(halves(1)[0], 900, *halves(1)[1:], 5.0))


def test_projected_guidance_leaves_the_length_of_the_conditional_image():
    x_t, eps_u, eps_c = halves(0)
    eps = projected(COSINE)(x_t, 500, eps_u, eps_c, 7.0)
    x_c, x_0 = (predict_x0(x_t, part, 500, COSINE) for part in (eps_c, eps))
    torch.testing.assert_close((x_0 * x_c).sum((1, 2, 3)), x_c.square().sum((1, 2, 3)))


@pytest.mark.parametrize("guider", [rescaled(0.7), projected(COSINE, momentum=-0.5)])
def test_every_guider_is_conditional_at_gamma_1_and_where_there_is_no_guidance(guider):
    def model(x_t, t, c):
        return c * x_t

    c, null, x_t = torch.full((3, 1, 1, 1), 2.0), torch.full((3, 1, 1, 1), -1.0), torch.randn(3, 3, 4, 4)
    for gamma, t in ((1.0, 500), (5.0, 900)):
        eps, v = guided(model, c, null, gamma, interval=(200, 700), guider=guider)(x_t, t)
        assert torch.equal(eps, 2 * x_t)
        assert v is None
    assert not torch.equal(
        guided(model, c, null, 5.0, guider=guider)(x_t, 500)[0], guided(model, c, null, 5.0)(x_t, 500)[0]
    )
    torch.testing.assert_close(guider(x_t, 500, -x_t, 2 * x_t, 1.0), 2 * x_t)
