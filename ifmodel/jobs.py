"""What a cascade draws, along two axes: which estimate, and which loop.

A recipe builds an estimate from a stage, the same recipe in both stages; the loop is an algorithm of `ddpm.sampling`. A
new recipe or algorithm needs no change here or in the cascade.
"""

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor

from ddpm.estimates import Estimate, Guider, classifier_free, compose
from ddpm.sampling import check_falling, check_finite, inpaint, sample, whole_seeds
from ddpm.views import View
from ifmodel.stage import SCHEDULE, stage_1, stage_2
from ifmodel.unet import UNet


@dataclass
class Stage:
    """A stage at work on a batch of images: what a recipe builds its estimate from, the same recipe in both stages.

    number: 1 or 2; count: how many images
    embedded: prompts -> T5's output [B, 77, D_text]
    low_res: what stage 2 sees of the small images, [B, 3, H, W], None in stage 1
    """

    number: int
    unet: UNet
    embedded: Callable[[Sequence[str]], Tensor]
    count: int
    guidance_scale: float
    guidance_interval: tuple[float, float]
    negative_prompt: str
    noise_level: int
    low_res: Tensor | None = None

    def estimate(
        self,
        prompt: str | Sequence[str],
        *,
        view: View | None = None,
        guidance_scale: float | None = None,
        guider: Guider = classifier_free,
    ) -> Estimate:
        """The guided estimate of a prompt, or of one for each image: x_t [B, 3, H, W] and t -> eps and v of that shape.

        prompt: one that the job has asked for in both stages, since T5 is gone by now
        view: in which x_t is seen, so that stage 2 sees the small images in it, too
        guidance_scale: γ of stage 1; that of `Cascade.draw` when None
        guider: how both stages are guided, see `ddpm.estimates`
        The estimate raises ValueError for another number of prompts than images, and for an eps that is not finite.
        """
        text = self.embedded([prompt] * self.count if isinstance(prompt, str) else prompt)
        null = self.embedded([self.negative_prompt])
        if self.number == 1:
            scale = self.guidance_scale if guidance_scale is None else guidance_scale
            return self._finite(stage_1(self.unet, text, null, scale, self.guidance_interval, guider))
        low_res = self.low_res if view is None else view.view(self.low_res)
        return self._finite(stage_2(self.unet, low_res, text, null, self.guidance_scale, self.noise_level, guider))

    def _finite(self, estimate: Estimate) -> Estimate:
        """Raises ValueError as soon as eps is not finite, which thresholding would hide."""

        def checked(x_t: Tensor, t: int) -> tuple[Tensor, Tensor | None]:
            eps, v = estimate(x_t, t)
            check_finite(f"stage {self.number}, t = {t}", eps, *([] if v is None else [v]))
            return eps, v

        return checked


@dataclass
class _Asked:
    """Stands in for a `Stage`, before anything is computed, to learn which prompts a recipe asks for."""

    number: int
    low_res: None = None
    prompts: list[str] = field(default_factory=list)

    def estimate(self, prompt: str | Sequence[str], **_) -> Estimate:
        """Notes the prompt; the estimate that it gives says that all of x_t is noise, and is never asked."""
        self.prompts += [prompt] if isinstance(prompt, str) else prompt
        return lambda x_t, t: (x_t, None)


GIVEN = ("estimate", "timesteps", "schedule", "noise", "step", "threshold", "callback")  # by the cascade
Recipe = str | Sequence[str] | Callable[[Stage], Estimate]


@dataclass(frozen=True)
class Job:
    """Images that share everything but the seed, and the prompt if the recipe is a list of them.

    recipe: a prompt for all, one for each seed, or a function that builds an `Estimate` from a `Stage`, of which it may
        use `estimate`, `number` and `low_res`: it is called once before there is a UNet, to learn its prompts
    algorithm: takes estimate, timesteps, schedule, noise, step, threshold and callback by name, as `sample` does; bind
        the others' own arguments with functools.partial, such as partial(sdedit, x_0=x_0, i_start=10)
        an x_0, x_orig or mask is one [1, …, H, W] for all, or one for each seed
    timesteps: those of stage 1, noisiest first; the sampler's own spacing when None
    upscale: the algorithm of stage 2
    num_steps: how many the algorithm takes, if not one for each timestep: for the progress bar
    """

    recipe: Recipe
    seeds: Sequence[int]
    algorithm: Callable[..., Tensor] = sample
    timesteps: Sequence[int] | None = None
    upscale: Callable[..., Tensor] = sample
    num_steps: int | None = None

    def __post_init__(self):
        for algorithm in (self.algorithm, self.upscale):
            if isinstance(algorithm, partial) and (bound := [name for name in GIVEN if name in algorithm.keywords]):
                raise ValueError(f"the cascade gives {', '.join(bound)} to an algorithm itself: bind none of its own")
        object.__setattr__(self, "seeds", whole_seeds(self.seeds))  # frozen; of a tensor, too
        if not self.seeds:
            raise ValueError("seeds must hold one for each image")
        if self.timesteps is not None:
            object.__setattr__(self, "timesteps", [operator.index(t) for t in self.timesteps])
            check_falling(self.timesteps)
            for t in (self.timesteps[0], self.timesteps[-1]):
                SCHEDULE.alpha_cumprod(t)  # refuses one that there is not
        if self.recipe is None:
            raise ValueError("give a prompt, one for each seed, or a function of a stage, not None")
        if not isinstance(self.recipe, str) and not callable(self.recipe) and len(self.recipe) != len(self.seeds):
            raise ValueError(f"give one prompt, or one for each of the {len(self.seeds)} seeds, not {len(self.recipe)}")
        for algorithm in (self.algorithm, self.upscale):
            for name, image in images_of(algorithm).items():
                self._check_image(name, image)

    def _check_image(self, name: str, image: Tensor):
        fits = isinstance(image, Tensor) and image.dim() == 4 and image.is_floating_point()
        if name != "mask" and (not fits or image.abs().max() > 1.5):  # in [0, 255], most likely
            raise ValueError(f"{name} must be a float tensor [B, 3, H, W] in [-1, 1], see ddpm.tools.images")
        if len(image) not in (1, len(self.seeds)):
            raise ValueError(f"{name} has {len(image)} images for {len(self.seeds)} seeds: give one, or as many")

    def from_noise(self) -> bool:
        """Whether its algorithm is one of those that are known to begin with pure noise."""
        return getattr(self.algorithm, "func", self.algorithm) in (sample, inpaint)

    def prompts(self) -> list[str]:
        """All that it asks for, in either stage."""
        if isinstance(self.recipe, str):
            return [self.recipe]
        if not callable(self.recipe):
            return list(self.recipe)
        for asked in (stages := [_Asked(1), _Asked(2)]):
            if not callable(self.recipe(asked)):
                raise ValueError("the recipe must return an estimate, such as stage.estimate(prompt)")
        return [prompt for asked in stages for prompt in asked.prompts]

    def batches(self, size: int) -> Iterator["Job"]:
        """The same in batches of at most `size` images."""
        for k in range(0, len(self.seeds), size):
            shared = isinstance(self.recipe, str) or callable(self.recipe)
            recipe = self.recipe if shared else self.recipe[k : k + size]
            rows = slice(k, k + size)
            algorithm, upscale = some_images(self.algorithm, rows), some_images(self.upscale, rows)
            yield replace(self, recipe=recipe, seeds=self.seeds[rows], algorithm=algorithm, upscale=upscale)

    def estimate(self, stage: Stage) -> Estimate:
        """What the recipe makes of a stage at work on these images, see `Stage.estimate`."""
        return self.recipe(stage) if callable(self.recipe) else stage.estimate(self.recipe)


def images_of(algorithm: Callable) -> dict[str, Tensor]:
    """The images that are bound to an algorithm, and a mask, if it has the images' four dimensions."""
    bound = getattr(algorithm, "keywords", {})
    images = {name: bound[name] for name in ("x_0", "x_orig", "mask") if name in bound}
    return {name: x for name, x in images.items() if name != "mask" or getattr(x, "ndim", 0) == 4}


def some_images(algorithm: Callable, rows: slice) -> Callable:
    """An algorithm with those of its images that are these seeds' own."""
    own = {name: image[rows] for name, image in images_of(algorithm).items() if len(image) > 1}
    return partial(algorithm, **own) if own else algorithm


def parse_prompt(prompt: str, null: str = "") -> Recipe:
    """The recipe of a prompt: itself or, with several, as in "a dog AND a hat :0.5 AND snow :-1", a composition.

    null: the null prompt, whose weight is what is missing to a sum of 1, see `compose`
    """
    parts = [re.fullmatch(r"(.*?)(?:\s:(-?\d+(?:\.\d+)?))?", part, re.DOTALL) for part in prompt.split(" AND ")]
    texts, weights = [part[1] for part in parts], [float(part[2] or 1) for part in parts]
    if weights == [1]:
        return texts[0]
    rest = 1 - sum(weights)

    def recipe(stage: Stage) -> Estimate:
        estimates = [stage.estimate(text) for text in texts]
        if abs(rest) < 1e-6:
            return compose(estimates, weights)
        return compose([*estimates, stage.estimate(null, guidance_scale=1.0)], [*weights, rest])

    return recipe
