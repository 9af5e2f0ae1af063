"""Estimates: what a model makes of the noise in x_t, and how several of them become one.

An *estimate* is a function `estimate(x_t, t) -> (eps, v)`, with v = None where the variance is not learned. Guidance
makes one from a model; compositions, anagrams and hybrids make one from several. The result is an estimate again, so
these nest, and every loop of `ddpm.sampling` takes it.

An estimate that is another function at each step (`alternating` makes one) has the attribute `alternates`, and so has
whatever is made of it: `denoise_along` then lets no step look back at the one before.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm.components import Component
from ddpm.process import predict_eps, predict_x0
from ddpm.schedule import Schedule
from ddpm.views import View

Model = Callable[..., Tensor]  # (x_t, t, conditioning) -> eps, or eps and v side by side
Estimate = Callable[[Tensor, int], tuple[Tensor, Tensor | None]]  # (x_t, t) -> (eps, v)
Guider = Callable[[Tensor, int, Tensor, Tensor, float], Tensor]  # (x_t, t, eps_u, eps_c, γ) -> eps
Combine = Callable[[Sequence[Tensor], Sequence[float]], Tensor]  # (tensors of one shape, a weight each) -> one
REDUCTIONS = ("mean", "rectified", "alternate")  # of what the views of an anagram say
ALWAYS = (-math.inf, math.inf)  # the interval of t with guidance, unless it is limited


def split_output(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """A model's output [B, C or 2C, H, W] -> (eps [B, C, H, W], v of the same shape or None), in float32.

    Raises ValueError for another number of channels.
    """
    output = output.float()
    if output.shape[1] not in (channels, 2 * channels):
        given = f"{channels} or {2 * channels} channels for images of {channels}"
        raise ValueError(f"a model gives {given}, not {output.shape[1]}")
    return (output, None) if output.shape[1] == channels else tuple(output.split(channels, dim=1))


def unguided(model: Model, *conditioning) -> Estimate:
    """The model's own estimate, given its conditioning (none for an unconditional model)."""
    return lambda x_t, t: split_output(model(x_t, t, *conditioning), x_t.shape[1])


def classifier_free(x_t: Tensor, t: int, eps_u: Tensor, eps_c: Tensor, guidance_scale: float) -> Tensor:
    """eps = eps_u + γ (eps_c - eps_u). Source: arXiv 2207.12598, eq. 6 with γ = 1 + w."""
    return eps_u + guidance_scale * (eps_c - eps_u)


def guided(
    model: Model,
    c,
    null,
    guidance_scale: float,
    *,
    interval: tuple[float, float] = ALWAYS,
    guider: Guider = classifier_free,
) -> Estimate:
    """Classifier-free guidance, eps = eps_u + γ (eps_c - eps_u), both halves in one batched forward pass.

    c, null: the conditioning of B images and that of the null (or a negative) prompt, as many rows of each: tensors
        [B, …], or objects of a class that has a `cat` of its own
    guidance_scale: γ, 0 is unconditional, 1 conditional; v is that of the conditional half, but for γ = 0
    interval: the first and last t with guidance; outside it the estimate is the conditional one, at half the cost
    guider: what combines the halves; `rescaled` and `projected` make others, which saturate less at large γ
    Source: classifier-free guidance, arXiv 2207.12598; the interval, arXiv 2404.07724.
    """
    if guidance_scale == 1:
        return unguided(model, c)
    conditional = unguided(model, c)
    if guidance_scale == 0 and interval == ALWAYS and guider is classifier_free:
        return unguided(model, null)
    both = getattr(type(c), "cat", torch.cat)([null, c])

    def estimate(x_t: Tensor, t: int) -> tuple[Tensor, Tensor | None]:
        if not interval[0] <= t <= interval[1]:
            return conditional(x_t, t)
        eps, v = split_output(model(torch.cat([x_t, x_t]), t, both), x_t.shape[1])
        eps_u, eps_c = eps.chunk(2)
        return guider(x_t, t, eps_u, eps_c, guidance_scale), None if v is None else v.chunk(2)[1]

    return estimate


def rescaled(share: float = 0.7) -> Guider:
    """Guidance whose eps has, by this share, the standard deviation of the conditional half: contrast stays.

    share: the paper's φ; 0 is `classifier_free`
    Source: Common Diffusion Noise Schedules eq. 15 and 16, arXiv 2305.08891.
    """

    def guider(x_t: Tensor, t: int, eps_u: Tensor, eps_c: Tensor, guidance_scale: float) -> Tensor:
        eps = classifier_free(x_t, t, eps_u, eps_c, guidance_scale)
        std, std_c = (part.std((1, 2, 3), keepdim=True) for part in (eps, eps_c))
        return share * (std_c / std) * eps + (1 - share) * eps

    return guider


def projected(
    schedule: Schedule, *, parallel: float = 0.0, max_norm: float = math.inf, momentum: float = 0.0
) -> Guider:
    """Adaptive projected guidance: leaves out the part of x̂_c - x̂_u that is parallel to x̂_c and oversaturates.

    parallel: how much of it stays, the paper's η; 1, with the other defaults, is `classifier_free`
    max_norm: the paper's r; a longer difference, over all of an image's values, is shortened to it
    momentum: the paper's β, negative, of a running sum of differences. A guider keeps it: make one for each estimate
    Source: APG Algorithm 1, arXiv 2410.02416.
    """
    average, before = 0.0, -math.inf

    def guider(x_t: Tensor, t: int, eps_u: Tensor, eps_c: Tensor, guidance_scale: float) -> Tensor:
        nonlocal average, before
        x_c, x_u = (predict_x0(x_t, eps, t, schedule) for eps in (eps_c, eps_u))
        average = x_c - x_u + (momentum * average if t < before else 0)  # not across the start of another image
        before = t
        norm = average.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        way = average * (max_norm / norm).clamp(max=1)
        onto = F.normalize(x_c.flatten(1), dim=1).view_as(x_c)
        along = (way * onto).sum((1, 2, 3), keepdim=True) * onto
        x_0 = x_c + (guidance_scale - 1) * (way - along + parallel * along)
        return predict_eps(x_t, x_0, t, schedule)

    return guider


def compose(estimates: Sequence[Estimate], weights: Sequence[float]) -> Estimate:
    """Several prompts at once, eps = Σ wᵢ epsᵢ: weights above 0 ask for a prompt, weights below 0 avoid it.

    weights: one for each estimate. They should sum to 1, or eps is not as large as noise: give an unconditional
        estimate the rest, 1 - Σ wᵢ. With 1 - γ and γ, this is guidance; v is the mean by the weights above 0
    Raises ValueError when these do not go together, or cancel. Source: Composable Diffusion eq. 11, arXiv 2206.01714.
    """
    if len(estimates) != len(weights):
        raise ValueError(f"give a weight for each estimate, not {len(weights)} for {len(estimates)}")
    if sum(weights) <= 1e-6:
        given = ", ".join(f"{weight:g}" for weight in weights)
        raise ValueError(f"the weights {given or 'are none: they'} cancel: all of them must sum to more than 0")
    return combined(estimates, weights, weigh)


def anagram(
    estimates: Sequence[Estimate],
    views: Sequence[View],
    reduction: str = "mean",
    *,
    weights: Sequence[float] | None = None,
) -> Estimate:
    """A visual anagram's estimate: every prompt sees x_t in its own view, and the views are turned back.

    estimates, views: as many of each; eps = Σ αᵢ view⁻¹(eps_i(view(x_t), t)), and v likewise
    reduction: "mean"; "rectified", that mean with the variance of noise, see `rectify`; or "alternate": one view a
        step, at the cost of one. Multistep solvers then take single steps, since one view's x̂_0 says nothing about
        the next one's
    weights: of the views, above 0, equal when None; αᵢ are their shares
    Raises ValueError when these do not go together. Source: Visual Anagrams eq. 4, arXiv 2311.17919.
    """
    if len(estimates) != len(views) or not views:
        raise ValueError(f"an anagram needs a view for each prompt, not {len(views)} for {len(estimates)}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be {', '.join(REDUCTIONS[:-1])} or {REDUCTIONS[-1]}, not {reduction!r}")
    if reduction == "alternate" and weights is not None:
        raise ValueError("weights are of the reductions mean and rectified: alternate asks one view a step")
    weights = [1.0] * len(views) if weights is None else weights
    if len(weights) != len(views) or min(weights) <= 0:
        given = ", ".join(f"{weight:g}" for weight in weights)
        raise ValueError(f"give each of the {len(views)} views a weight above 0, not {given}")
    if not all(isinstance(view, View) for view in views):
        raise ValueError("views must be made first: vertical_flip(), not vertical_flip")
    seen = [turned_back(estimate, view) for estimate, view in zip(estimates, views, strict=True)]
    if reduction == "alternate":
        return alternating(seen)
    return combined(seen, [weight / sum(weights) for weight in weights], rectify if reduction == "rectified" else weigh)


def turned_back(estimate: Estimate, view: View) -> Estimate:
    """The estimate of x_t as it is seen in a view, mapped back to how x_t lies."""

    def seen(x_t: Tensor, t: int) -> tuple[Tensor, Tensor | None]:
        eps, v = estimate(view.view(x_t), t)
        return view.inverse(eps), None if v is None else view.inverse_variance(v)

    seen.alternates = alternates(estimate)
    return seen


def hybrid(estimates: Sequence[Estimate], components: Sequence[Component]) -> Estimate:
    """A hybrid image's estimate: each component of the image is drawn from a prompt of its own.

    estimates, components: as many of each; eps = Σ component_i(eps_i(x_t, t)), v is the mean
    With the components of `low_high_pass`, the first prompt is seen from afar and the second up close.
    Raises ValueError when these do not go together. Source: Factorized Diffusion eq. 5, arXiv 2404.11615.
    """
    if len(estimates) != len(components) or not components:
        raise ValueError(f"a hybrid needs a component for each prompt, not {len(components)} for {len(estimates)}")

    def parts(eps: Sequence[Tensor], _: Sequence[float]) -> Tensor:
        return torch.stack([component.of(part) for component, part in zip(components, eps, strict=True)]).sum(0)

    return combined(estimates, [1 / len(estimates)] * len(estimates), parts)


def combined(estimates: Sequence[Estimate], weights: Sequence[float], combine: Combine) -> Estimate:
    """One estimate of several: combine(their eps, weights), and the mean of v by the weights above 0."""
    shares = [max(weight, 0) / sum(max(weight, 0) for weight in weights) for weight in weights]

    def estimate(x_t: Tensor, t: int) -> tuple[Tensor, Tensor | None]:
        eps, v = zip(*(each(x_t, t) for each in estimates), strict=True)
        return combine(eps, weights), None if v[0] is None else weigh(v, shares)

    estimate.alternates = any(map(alternates, estimates))
    return estimate


def weigh(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ wᵢ xᵢ."""
    return sum(weight * x for weight, x in zip(weights, tensors, strict=True))


def rectify(eps: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """c Σ αᵢ epsᵢ with c = 1 / √(Σ αᵢ² + 2 Σ αᵢ αⱼ ρᵢⱼ), so that it has variance 1 as noise does; a mean has less.

    eps: [B, C, H, W] each, of variance 1; ρᵢⱼ is the mean of epsᵢ epsⱼ over an image
    Source: Anagram-MTL, arXiv 2412.02693.
    """
    variance = sum(weight**2 for weight in weights)
    for (a, eps_a), (b, eps_b) in itertools.combinations(zip(weights, eps, strict=True), 2):
        variance = variance + 2 * a * b * (eps_a * eps_b).mean((1, 2, 3), keepdim=True)
    return weigh(eps, weights) / torch.as_tensor(variance).clamp(min=1e-6).sqrt()


def alternating(estimates: Sequence[Estimate]) -> Estimate:
    """One of the estimates after another, one a step, and marked: see the head of this file."""
    turns, first = iter(()), -math.inf

    def estimate(x_t: Tensor, t: int) -> tuple[Tensor, Tensor | None]:
        nonlocal turns, first
        if t >= first:  # another image begins, as the one before it did
            turns, first = itertools.cycle(estimates), t
        return next(turns)(x_t, t)

    estimate.alternates = True
    return estimate


def alternates(estimate: Estimate) -> bool:
    """Whether it is another function of (x_t, t) at each step; one without the mark, such as a reader's own, is not.

    A multistep solver extrapolates from x̂_0 of two steps, which must then be of one function.
    """
    return getattr(estimate, "alternates", False)
