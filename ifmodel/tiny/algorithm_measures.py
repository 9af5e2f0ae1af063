"""Do the algorithms work on tiny-if? Anagrams, hybrids, inpainting, SDEdit and stage 2, each judged in an `Exam`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm.components import low_high_pass, low_pass
from ddpm.estimates import Estimate, anagram, hybrid
from ddpm.sampling import inpaint, sdedit
from ddpm.schedule import strided_timesteps
from ddpm.views import View, identity, vertical_flip
from ifmodel.jobs import Job, Stage
from ifmodel.stage import SCHEDULE, upscale
from ifmodel.tiny.data import CaptionedImages, show
from ifmodel.tiny.exam import FAST, Exam
from ifmodel.tiny.judge import alike_pairs, both_found, fidelity, high_passed, share
from ifmodel.tiny.measures import prompt_for, shuffled
from ifmodel.unet import UNet

SIGMA = 3.0  # the blur that parts far from near, in pixels of a 64-pixel image


@dataclass(frozen=True)
class Illusion:
    """A kind of illusion: what makes one of two prompts, and how both are seen.

    recipe: (prompts, stage) -> the estimate
    seen: the way in which the first thing is seen, and that of the second, by what they are called
    view: in which the second is drawn
    """

    name: str
    recipe: Callable[[Sequence[str], Stage], Estimate]
    seen: dict[str, Callable[[Tensor], Tensor]]
    view: View


def anagrams(reduction: str = "mean") -> Illusion:
    """Upright and flipped; reduction: one of REDUCTIONS, see `anagram`."""
    view = vertical_flip()

    def recipe(pair: Sequence[str], stage: Stage) -> Estimate:
        estimates = [stage.estimate(pair[0]), stage.estimate(pair[1], view=view)]
        return anagram(estimates, [identity(), view], reduction)

    return Illusion(f"anagrams_{reduction}", recipe, {"upright": lambda x: x, "flipped": view.view}, view)


def hybrids(sigma: float = SIGMA) -> Illusion:
    """From afar and up close, seen through σ = 2 whatever the σ they are drawn with."""

    def recipe(pair: Sequence[str], stage: Stage) -> Estimate:
        return hybrid([stage.estimate(prompt) for prompt in pair], low_high_pass(sigma))

    return Illusion(f"hybrids_{sigma:g}", recipe, {"far": low_pass, "near": high_passed}, identity())


def pairs_of(exam: Exam, alike: bool, view: View, count: int) -> list[tuple[int, int]]:
    """Pairs of things: random ones, or those whose drawings are most alike when blurred, one of them in a view."""
    total = len(exam.data.names)
    if not alike:
        generator = torch.Generator().manual_seed(exam.seed)
        return [tuple(torch.randperm(total, generator=generator)[:2].tolist()) for _ in range(count)]
    first_of_each = [(exam.data.things == thing).nonzero()[0].item() for thing in range(total)]
    return alike_pairs(exam.drawings(exam.data, first_of_each), view, count)


def illusions(
    exam: Exam, kind: Illusion, alike: bool, guidance_scale: float = 2.0, count: int = 50, num_steps: int = 50
) -> dict[str, float]:
    """Does an illusion show both of its things? Four images of each of `pairs_of`, judged in both ways of seeing them.

    Returns the shares of images in which one, the other and both are recognised, and of pairs with one image in four
    that shows both.
    """
    pairs, name = pairs_of(exam, alike, kind.view, count), f"{kind.name}_{'alike' if alike else 'random'}"
    prompts = [tuple(prompt_for(exam.data, thing) for thing in pair) for pair in pairs]
    jobs = [Job(partial(kind.recipe, pair), range(exam.seed, exam.seed + 4)) for pair in prompts]
    images = exam.draw(name, jobs, guidance_scale, (*FAST[:2], num_steps))
    seen = [see(images) for see in kind.seen.values()]
    each = both_found(exam.judge, seen, pairs)
    both = each[0] & each[1]
    best = both.any(1).double().argsort(descending=True, stable=True)[:8]
    rows = [4 * k.item() + both[k].double().argmax().item() for k in best]
    titles = [" / ".join(prompt.removeprefix("a photo of ") for prompt in prompts[k]) for k in best.tolist()]
    exam.show(name, [images[rows], *(x[rows] for x in seen)], ["drawn", *kind.seen], titles)
    shares = {way: share(right.flatten()) for way, right in zip(kind.seen, each, strict=True)}
    return {**shares, "both": share(both.flatten()), "both, in one of 4": share(both.any(1))}


def holes(exam: Exam, guidance_scale: float, count: int = 50) -> dict[str, float]:
    """Does `inpaint` mend held-out drawings, of which the middle quarter is missing? The prompt is what they show.

    Returns the shares in which the judge sees it: "filled", "with its hole" and "before".
    """
    rows = [row for row in range(len(exam.held.files)) if exam.held.styles[row] < 2]
    rows = [rows[k] for k in shuffled(len(rows), 4)[:count]]
    x_orig, wanted, side = exam.drawings(exam.held, rows), exam.things_of(exam.held, rows), exam.side
    mask = torch.zeros(1, 1, side, side)
    mask[..., side // 4 : -side // 4, side // 4 : -side // 4] = 1
    things, styles = wanted.tolist(), exam.held.styles[rows].tolist()
    prompts = [prompt_for(exam.data, *asked) for asked in zip(things, styles, strict=True)]
    device, size, jobs = exam.cascade.device, exam.batch_size, []
    for k, part in zip(range(0, len(rows), size), x_orig.split(size), strict=True):
        filling = partial(inpaint, x_orig=part.to(device), mask=mask.to(device))
        jobs.append(Job(prompts[k : k + size], range(exam.seed + k, exam.seed + k + len(part)), filling))
    filled = exam.draw("holes", jobs, guidance_scale)
    holed = torch.where(mask > 0, 0.0, x_orig)
    exam.show("holes", [x_orig[:8], holed[:8], filled[:8]], ["held out", "hole", "filled"], prompts[:8])
    seen = {"filled": filled, "with its hole": holed, "before": x_orig}
    return {name: share(exam.things(x) == wanted) for name, x in seen.items()}


def sdedited(exam: Exam, drawings: dict[str, tuple[str, Tensor]], guidance_scale: float) -> dict[str, float]:
    """Does `sdedit` turn a drawing into its thing, and keep it? From index 5 to 10 of 34 timesteps, eight seeds each.

    drawings: by name, the prompt and the image [1, 3, S, S] in [-1, 1]; those whose prompt `data` lacks are left out
    Returns the shares in which the thing is recognised, of all and of each drawing, and of images that are nearer to
    their own drawing than to the others; {} without drawings.
    """
    numbers = {phrase: thing for thing, phrases in enumerate(exam.data.phrases) for phrase in phrases}
    drawings = {name: (prompt, x_0) for name, (prompt, x_0) in drawings.items() if prompt in numbers}
    if not drawings:
        return {}
    timesteps = strided_timesteps(SCHEDULE.num_timesteps, 30)
    starts, seeds, device = range(5, 11), range(exam.seed, exam.seed + 8), exam.cascade.device
    jobs = [
        Job(prompt, seeds, partial(sdedit, x_0=x_0.to(device), i_start=i), timesteps)
        for prompt, x_0 in drawings.values()
        for i in starts
    ]
    images = exam.draw("sdedit", jobs, guidance_scale, ("ddpm", 0.0, len(timesteps))).chunk(len(drawings))
    originals = torch.cat([x_0 for _, x_0 in drawings.values()]).flatten(1)
    prompts = [prompt for prompt, _ in drawings.values()]
    recognised = [exam.things(x) == numbers[prompt] for x, prompt in zip(images, prompts, strict=True)]
    nearer = [torch.cdist(x.flatten(1), originals).argmin(1) == k for k, x in enumerate(images)]
    rows = [torch.cat([x_0, x[::8]]) for (_, x_0), x in zip(drawings.values(), images, strict=True)]
    exam.show("sdedit", rows, prompts, ["drawing", *(f"i = {i}" for i in starts)])
    shares = {name: share(right) for name, right in zip(drawings, recognised, strict=True)}
    return {"recognised": share(torch.cat(recognised)), "nearer to its own": share(torch.cat(nearer)), **shares}


def drawn_anew(exam: Exam, name: str, data: CaptionedImages, rows: Sequence[int], small: Tensor) -> Tensor:
    """Small drawings of these rows as stage 1 would have drawn them: SDEdit from t = 300, asked for what they show."""
    timesteps, size, jobs = strided_timesteps(SCHEDULE.num_timesteps, 30), exam.batch_size, []
    prompts = [prompt_for(data, int(data.things[row]), int(data.styles[row])) for row in rows]
    for k, part in enumerate(small.split(size)):
        edit = partial(sdedit, x_0=part.to(exam.cascade.device), i_start=timesteps.index(300))
        seeds = range(exam.seed + size * k, exam.seed + size * k + len(part))
        jobs.append(Job(prompts[size * k : size * (k + 1)], seeds, edit, timesteps))
    return exam.draw(name, jobs, 1.0, ("ddpm", 0.0, len(timesteps)))


def upscaled(
    exam: Exam, name: str, data: CaptionedImages, unet: UNet, null_embeds: Tensor, again: bool = False
) -> dict[str, float]:
    """How near does stage 2 come to large drawings, from small ones alone, and how near bicubic upscaling?

    data: large drawings, S × S as `unet` draws them; null_embeds: [1, 77, D], of "", all that stage 2 is told
    again: the small ones are `drawn_anew`
    Returns `fidelity` of both.
    """
    size, seed = unet.config.sample_size, exam.seed
    rows = shuffled(len(data.files), 5)[:64]
    large = show(data, rows, size, torch.Generator().manual_seed(5), exam.variety)[0]
    small = F.avg_pool2d(large, size // exam.side)
    small = drawn_anew(exam, f"{name}_small", data, rows, small) if again else small
    bicubic = F.interpolate(small, large.shape[-2:], mode="bicubic").clamp(-1, 1)
    parts = small.split(8)

    def draw(k: int) -> Tensor:
        text, seeds = null_embeds.expand(len(parts[k]), -1, -1), range(seed + 8 * k, seed + 8 * k + len(parts[k]))
        options = {"num_steps": 20, "guidance_scale": 1.0, "noise_level": 50}
        return upscale(unet, parts[k].to(null_embeds.device), text, text, seeds=seeds, **options).cpu()

    images = torch.cat(exam.each(draw, [(len(part), 3, size, size) for part in parts])).clamp(-1, 1)
    rows = [F.interpolate(x[:8], (size, size), mode="nearest") for x in (small, bicubic, images, large)]
    exam.show(name, rows, [f"{exam.side} px", "bicubic", "stage 2", "original"])
    near = {kind: fidelity(exam.judge, x, large) for kind, x in (("stage 2", images), ("bicubic", bicubic))}
    return {f"{kind}, {what}": near[kind][what] for what in ("PSNR", "feature distance") for kind in near}
