"""How good tiny-if is: what a cascade draws when it is asked for things, and what a judge sees in that.

    exam = Exam(Cascade("tiny-if/I"), train_judge(data), data)
    named(exam, guidance_scale=2.0)  # {"plain": …, "styled": …, "named": …, "distance": …}

Each measure is a function of an `Exam` and returns numbers; shares are from 0 to 1. Those of the algorithms are in
`algorithm_measures`. `scripts/evaluate/tiny_if.py` takes all of them.
"""

import torch
from torch import Tensor

from ddpm.mnist.judge import frechet_distance
from ifmodel.tiny.captions import ANYTHING
from ifmodel.tiny.data import CaptionedImages
from ifmodel.tiny.exam import FAST, Exam, Sampler
from ifmodel.tiny.judge import accuracy, apart, features_of, found, nearest, share, some_thing
from ifmodel.tiny.styles import STYLES


def shuffled(count: int, seed: int) -> list[int]:
    """0 … count - 1 in a random order."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def prompt_for(data: CaptionedImages, thing: int, style: int = 0) -> str:
    """A thing, asked for by its name: as a photo, or in another of STYLES."""
    return list(STYLES.values())[style].templates[0].format(data.phrases[thing][0])


def random_prompts(exam: Exam, count: int) -> tuple[list[str], Tensor, Tensor]:
    """Prompts for random things, half of them plain, the others in the other styles in turn; things and styles."""
    order = shuffled(len(exam.data.names), exam.seed)
    things = [order[k % len(order)] for k in range(count)]
    styles = [0 if k % 2 == 0 else 1 + (k // 2) % (len(STYLES) - 1) for k in range(count)]
    prompts = [prompt_for(exam.data, *asked) for asked in zip(things, styles, strict=True)]
    return prompts, torch.tensor(things), torch.tensor(styles)


def judge_accuracy(exam: Exam) -> dict[str, dict[str, float]]:
    """How often the judge is right about a thousand drawings, trained on and held out, and how often it is sure."""
    measures = {}
    for kind, data in (("trained on", exam.data), ("held out", exam.held)):
        rows = shuffled(len(data.files), exam.seed)[:1000]
        x, things = exam.drawings(data, rows, exam.variety), exam.things_of(data, rows)
        measures[kind] = accuracy(exam.judge, x, things, data.styles[rows])
    return measures


def named(exam: Exam, guidance_scale: float, sampler: Sampler = FAST, count: int = 200) -> dict[str, float]:
    """Does it draw what it is asked for? `random_prompts`, and the shares of `found`.

    Also returns "distance", Fréchet's, of the judge's features from those of training drawings.
    """
    prompts, things, styles = random_prompts(exam, count)
    images = exam.ask("named", prompts, guidance_scale, sampler)
    rows = shuffled(len(exam.data.files), 1)[:count]
    real = features_of(exam.judge, exam.drawings(exam.data, rows, exam.variety))
    exam.show("_".join(map(str, ("named", guidance_scale, *sampler))), [images[:8]], [], prompts[:8])
    distance = round(frechet_distance(features_of(exam.judge, images), real), 1)
    return {**found(exam.judge, images, things, styles), "distance": distance}


def aliases(exam: Exam, guidance_scale: float) -> dict[str, dict]:
    """Does it know other names of things? All of them, as photos and as oil paintings.

    Returns for both styles the share of those that show the thing, and the prompts of the others; {} without aliases.
    """
    others = [(phrase, thing) for thing, phrases in enumerate(exam.data.phrases) for phrase in phrases[1:]]
    if not others:
        return {}
    things, measures = torch.tensor([thing for _, thing in others]), {}
    for style in ("photo", "oil"):
        prompts = [STYLES[style].templates[0].format(phrase) for phrase, _ in others]
        images = exam.ask("aliases", prompts, guidance_scale)
        right = exam.things(images) == things
        missed = [prompt for prompt, hit in zip(prompts, right, strict=True) if not hit]
        measures[style] = {"right": share(right), "missed": missed}
        exam.show(f"aliases_{style}", images[:16].split(8))
    return measures


def anything(exam: Exam, guidance_scale: float, count: int = 100) -> dict[str, dict]:
    """What does it draw when no thing is named? `some_thing` of images of one prompt, with guidance and without."""
    measures = {}
    photos = [("photo", ANYTHING, guidance_scale), ("photo without guidance", ANYTHING, 1.0)]
    for name, prompt, scale in (*photos, ("none", "", 1.0)):
        images = exam.ask("anything", [prompt] * count, scale)
        measures[name] = some_thing(exam.judge, images)
        exam.show(f"anything_{name.replace(' ', '_')}", images[:24].split(8))
    return measures


def variety(exam: Exam, guidance_scale: float, count: int = 20) -> dict[str, float]:
    """Do images of one prompt differ? How far `apart` ten of each of some things are, ten drawings of it, the ratio."""
    chosen = shuffled(len(exam.data.names), 2)[:count]
    images = exam.ask("variety", [prompt_for(exam.data, k) for k in chosen for _ in range(10)], guidance_scale)
    samples, drawings = [], []
    for thing, x in zip(chosen, images.split(10), strict=True):
        rows = (exam.data.rows(thing, 0) * 10)[:10]
        samples.append(apart(features_of(exam.judge, x)))
        drawings.append(apart(features_of(exam.judge, exam.drawings(exam.data, rows, exam.variety, thing))))
    exam.show("variety", images[:80].split(10), [exam.data.names[thing] for thing in chosen[:8]])
    means = [sum(values) / len(values) for values in (samples, drawings)]
    return {"samples": round(means[0], 4), "drawings": round(means[1], 4), "ratio": round(means[0] / means[1], 3)}


def memory(exam: Exam, guidance_scale: float, count: int = 200) -> dict[str, float]:
    """Does it copy what it has learned from? 1 - cosine from the plain images of `named` to the nearest drawing.

    Returns the median, and that of held-out drawings, with which a model that copies nothing compares.
    """
    prompts, _, styles = random_prompts(exam, count)
    images = exam.ask("named", prompts, guidance_scale)[styles == 0]
    known = features_of(exam.judge, exam.drawings(exam.data, range(len(exam.data.files))))
    held = exam.drawings(exam.held, shuffled(len(exam.held.files), 3)[:200], exam.variety)
    measures = {}
    for name, x in (("samples", images), ("held-out drawings", held)):
        distance, which = nearest(features_of(exam.judge, x), known)
        measures[name] = round(distance.median().item(), 4)
        rows = [x[:8], exam.drawings(exam.data, which[:8].tolist())]
        exam.show(f"nearest_to_{name.replace(' ', '_')}", rows, [name, "nearest training drawing"])
    return measures


def taught(
    before: Exam, after: Exam, thing: str, prompt: str, guidance_scale: float, count: int = 200, samples: int = 100
) -> dict[str, dict[str, float]]:
    """What has a LoRA taught, and what has it taken away? Without it and with it, in two exams of one judge:

    how often `samples` images of a prompt show the thing that it was taught, how often the others of `named` show what
    they should, and how often these show the new thing instead.
    """
    new = before.data.names.index(thing)
    prompts, things, _ = random_prompts(before, count)
    prompts, things = [prompt for prompt, k in zip(prompts, things, strict=True) if k != new], things[things != new]
    measures, rows = {}, []
    for name, exam in (("without", before), ("with", after)):
        drawn = exam.ask("taught", [prompt] * samples, guidance_scale)
        others = exam.ask("named", prompts, guidance_scale)
        seen = exam.things(others)
        measures[name] = {thing: share(exam.things(drawn) == new), "others": share(seen == things)}
        measures[name][f"others, but {thing}"] = share(seen == new)
        rows += [drawn[:10], others[:10]]
    before.show("taught", rows, ["without", "", "with", ""])
    return measures
