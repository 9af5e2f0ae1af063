"""How good tiny-if is: does it draw what it was asked for, and do the algorithms work on it?

    python scripts/evaluate/tiny_if.py --data emoji --curated
    python scripts/evaluate/tiny_if.py --data emoji --curated --lora out/glove \
        --taught "boxing glove" "a photo of a zwx glove" --best 4 --out out/evaluate_lora

A judge of its own (ifmodel/tiny/judge.py) is trained on the drawings that tiny-if learned from; how often it is right
about held-out drawings is said first. Then it says what it sees in images of stage 1:

- named: things asked for plainly and in a style, for each --guidance, then for other samplers at the best guidance
- aliases: other names of things, such as the assignment's "a rocket ship"
- anything: "a high quality photo" and "": how many show some thing, and how many different ones
- variety: how far ten samples of one prompt lie apart, compared with drawings by different artists
- memory: how near the nearest training drawing is to a sample, compared with a held-out drawing
- holes: the middle of held-out drawings filled again
- sdedited: our own drawings, started at index 5 to 10 of 34
- anagrams, hybrids: both things recognised, in random pairs and in pairs that are alike when blurred
- stage 2: compared with bicubic upscaling
- taught, with --lora and instead of all others: whether a new thing is drawn, and the others still are

Writes report.json, curves.png and samples of each kind to --out, each as soon as it is known. What was drawn is kept
there too, so a stopped evaluation goes on where it was. torchrun shares the batches of images among its processes.
"""

import copy
import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # where shared/ is
from shared.evaluation import FAST, Evaluation, Sampler
from shared.images import DRAWING_PROMPTS, DRAWINGS, read_image
from shared.options import add_common_options, check_writable, number, parser, positive, run
from shared.stages import MODEL, UPSCALER, model_name

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ddpm.components import low_high_pass, low_pass
from ddpm.estimates import REDUCTIONS
from ddpm.figures import save_curves
from ddpm.files import fingerprint
from ddpm.memory import check_memory
from ddpm.mnist.judge import frechet_distance
from ddpm.processes import check_shares, gathered, num_processes, rank
from ddpm.sampling import anagram, hybrid, inpaint, sdedit
from ddpm.schedule import strided_timesteps
from ddpm.views import identity, vertical_flip
from ifmodel import Cascade, load_unet
from ifmodel.jobs import Job
from ifmodel.lora_files import find_lora
from ifmodel.stage import SCHEDULE, check_stage, upscale
from ifmodel.text import embed_prompts
from ifmodel.tiny import judge
from ifmodel.tiny.captions import ANYTHING, curated
from ifmodel.tiny.data import CaptionedImages, show
from ifmodel.tiny.judge import share
from ifmodel.tiny.loading import load_captioned
from ifmodel.tiny.styles import STYLES

SAMPLERS = [("dpm++", 1.0, 5), ("dpm++", 1.0, 10), ("dpm++", 0.0, 20), ("ddim", 0.0, 20), ("ddpm", 0.0, 20)]
SAMPLERS += [("ddpm", 0.0, 100)]
PARTS = ["named", "aliases", "anything", "variety", "memory", "holes", "sdedited", "anagrams", "hybrids", "stage_2"]
FLIP, SIGMA = vertical_flip(), 3.0  # the blur that parts far from near, in pixels of a 64-pixel image


def main():
    args = arguments()
    check_writable(args.out / "report.json")
    side = check_stage(args.model, 1).sample_size
    count = max(args.prompts, 2 * args.samples + 10, 4 * args.pairs)  # of the largest kind
    check_memory(2 * 3 * 4 * count * side**2, f"{count} images of {side} × {side}")
    load = partial(load_captioned, args.data, side, finer=2)
    names = [*dict.fromkeys([*curated(), *args.taught[:1]])] if args.curated else None
    data = load(names, part="train" if args.hold_out else "all")
    held = load(data.names, part="held out") if args.hold_out else data
    if len(data.names) < 2:
        raise ValueError(f"{args.data} has one thing alone, {data.names[0]}: pairs and shares need two or more")
    if args.taught and args.taught[0] not in data.names:
        raise ValueError(f"{args.data} has no {args.taught[0]!r} that the judge could learn")
    e = Evaluation(args, data, held)
    e.keep("judge", judge_report(e))
    best = args.best or args.guidance[0]
    if args.taught:
        e.keep("taught", taught(e, best))
    if "named" in args.only:
        e.keep("guidance", [named(e, guidance, FAST) for guidance in args.guidance])
        best = max(e.report["guidance"], key=lambda row: row["plain"] + row["styled"])["guidance"]
        e.keep("best guidance", best)
        e.keep("samplers", [named(e, best, sampler) for sampler in SAMPLERS if sampler[2] <= args.most_steps])
        if rank() == 0:
            curves(e, best)
    for measure in (aliases, anything, variety, memory, holes, sdedited):
        if measure.__name__ in args.only:
            e.keep(measure.__name__, measure(e, best))
    for alike in (True, False):
        kind = "alike" if alike else "random"
        for reduction in args.reduction if "anagrams" in args.only else ():
            e.keep(f"anagrams, {reduction}, {kind} pairs", anagrams(e, alike, reduction))
        if "hybrids" in args.only:
            e.keep(f"hybrids, {kind} pairs", hybrids(e, alike))
    if "stage_2" in args.only and args.upscaler != "none":
        e.keep("stage 2", stage_2(e))
    if rank() == 0:
        print(args.out / "report.json")


def arguments() -> Namespace:
    options = parser(__doc__)
    options.add_argument("--data", type=Path, required=True, help="the folder that it was trained on")
    options.add_argument("--curated", action="store_true", help="as in train_if.py")
    options.add_argument("--hold-out", action="store_true", help="as in train_if.py: measure on what was held out")
    help = "how much the judge's drawings vary, as in train_if.py (default: 1)"
    options.add_argument("--variety", type=number, default=1.0, help=help)
    options.add_argument("--model", default=MODEL, type=model_name, metavar="FOLDER", help=f"default: {MODEL}")
    help = f"stage 2, or none (default: {UPSCALER})"
    options.add_argument("--upscaler", default=UPSCALER, metavar="FOLDER", help=help)
    options.add_argument("--lora", type=Path, metavar="FILE", help="what was taught: a file, or the folder that has it")
    help = "what it is called in --data, and by the LoRA"
    options.add_argument("--taught", nargs=2, default=[], metavar=("THING", "PROMPT"), help=help)
    options.add_argument("--prompts", type=positive, default=200, help="default: 200")
    options.add_argument("--samples", type=positive, default=100, help="of a prompt without a thing (default: 100)")
    options.add_argument("--pairs", type=positive, default=50, help="of anagrams and of hybrids (default: 50)")
    options.add_argument("--guidance", type=number, nargs="+", default=[1.0, 2.0, 4.0, 7.0], help="default: 1 2 4 7")
    options.add_argument("--illusion-guidance", type=number, default=2.0, help="of anagrams and hybrids (default: 2)")
    options.add_argument("--illusion-steps", type=positive, default=50, help="default: 50")
    options.add_argument("--most-steps", type=positive, default=100, help="leave slower samplers out (default: 100)")
    options.add_argument("--reduction", nargs="+", choices=REDUCTIONS, default=["mean"], help="of anagrams")
    parts = {"choices": PARTS, "default": PARTS, "metavar": "PART"}
    options.add_argument("--only", nargs="+", **parts, help=f"of {', '.join(PARTS)}")
    help = "γ for what is not guidance's own measure (default: the best of --guidance, or the first)"
    options.add_argument("--best", type=number, metavar="G", help=help)
    options.add_argument("--judge-steps", type=positive, default=6000, help="of the judge's training (default: 6000)")
    options.add_argument("--batch-size", type=positive, default=25, help="default: 25")
    add_common_options(options, "out/evaluate_if")
    args = options.parse_args()
    if not 0 <= args.variety <= 1:
        raise ValueError(f"--variety must be from 0 to 1, but is {args.variety}")
    if (args.lora is None) != (not args.taught):
        raise ValueError("--lora and --taught go together: give both")
    if args.taught:
        args.only = []
    if args.prompts < 2:
        raise ValueError("--prompts must be at least 2: one image has no covariance")
    what = f"batches of up to {args.batch_size} images: make them smaller with --batch-size"
    check_shares(-(-args.prompts // args.batch_size), what)
    if args.upscaler != "none":
        args.upscaler = UPSCALER if args.upscaler == "tiny-if" else args.upscaler
        check_stage(args.upscaler, 2)
    return args


def shuffled(count: int, seed: int) -> list[int]:
    """0 … count - 1 in a random order."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def photo_of(phrase: str) -> str:
    """The plain prompt for a thing."""
    return STYLES["photo"].templates[0].format(phrase)


def shown(e: Evaluation, data: CaptionedImages, rows: Sequence[int], variety: float = 0.0, seed: int = 0) -> Tensor:
    """Drawings as stage 1 would draw them, [N, 3, S, S]."""
    return show(data, rows, e.side, torch.Generator().manual_seed(seed), variety)[0]


def judge_report(e: Evaluation) -> dict[str, float]:
    """How often the judge is right about drawings, trained on and held out, and how often it is sure."""
    measures = {}
    for kind, data in (("trained on", e.data), ("held out", e.held)):
        rows = shuffled(len(data.files), e.args.seed)[:1000]
        x, things = shown(e, data, rows, e.args.variety), e.things_of(data, rows)
        measures[kind] = judge.accuracy(e.judge, x, things, data.styles[rows])
    return measures


def asked(e: Evaluation) -> tuple[list[str], Tensor, Tensor]:
    """Prompts for random things, half of them plain, the others in the other styles in turn; things and styles."""
    styles, names = list(STYLES.values()), e.data.phrases
    order = shuffled(len(names), e.args.seed)
    things = [order[k % len(order)] for k in range(e.args.prompts)]
    chosen = [0 if k % 2 == 0 else 1 + (k // 2) % (len(styles) - 1) for k in range(e.args.prompts)]
    prompts = [styles[s].templates[0].format(names[thing][0]) for thing, s in zip(things, chosen, strict=True)]
    return prompts, torch.tensor(things), torch.tensor(chosen)


def named(e: Evaluation, guidance: float, sampler: Sampler) -> dict:
    """How often the judge sees the thing that was asked for, and the style; and the distance from training drawings."""
    prompts, things, styles = asked(e)
    images = e.prompts("named", prompts, guidance, sampler)
    measures = {"guidance": guidance, "sampler": sampler, **judge.found(e.judge, images, things, styles)}
    rows = shuffled(len(e.data.files), 1)[: len(prompts)]
    reference = judge.features_of(e.judge, shown(e, e.data, rows, e.args.variety))
    measures["distance"] = round(frechet_distance(judge.features_of(e.judge, images), reference), 1)
    name = "_".join(map(str, ("named", guidance, *sampler))).replace("+", "p")
    e.figure(f"{name}.png", [images[:8]], [], prompts[:8])
    return measures


def aliases(e: Evaluation, guidance: float) -> dict:
    """Other names of things, as photos and as oil paintings."""
    others = [(phrase, thing) for thing, phrases in enumerate(e.data.phrases) for phrase in phrases[1:]]
    if not others:
        return {}
    things, measures = torch.tensor([thing for _, thing in others]), {}
    for style in ("photo", "oil"):
        prompts = [STYLES[style].templates[0].format(phrase) for phrase, _ in others]
        images = e.prompts("aliases", prompts, guidance)
        right = e.things(images) == things
        missed = [prompt for prompt, found in zip(prompts, right, strict=True) if not found]
        measures[style] = {"right": share(right), "missed": missed}
        e.figure(f"aliases_{style}.png", list(images[:16].split(8)), [], [])
    return measures


def anything(e: Evaluation, guidance: float) -> dict:
    """Prompts that name no thing, --samples images each: how many show some thing, and how many different ones."""
    measures = {}
    photos = [("photo", ANYTHING, guidance), ("photo without guidance", ANYTHING, 1.0)]
    for name, prompt, scale in (*photos, ("none", "", 1.0)):
        images = e.prompts("anything", [prompt] * e.args.samples, scale)
        measures[name] = judge.some_thing(e.judge, images)
        e.figure(f"anything_{name.replace(' ', '_')}.png", list(images[:24].split(8)), [], [])
    return measures


def variety(e: Evaluation, guidance: float) -> dict[str, float]:
    """Ten images of each of a fifth as many things, compared with ten drawings of it."""
    chosen = shuffled(len(e.data.names), 2)[: -(-e.args.samples // 5)]
    prompts = [photo_of(e.data.phrases[thing][0]) for thing in chosen for _ in range(10)]
    images, samples, drawings = e.prompts("variety", prompts, guidance), [], []
    for k, thing in enumerate(chosen):
        rows = e.data.rows(thing, 0) * 10
        samples.append(judge.apart(judge.features_of(e.judge, images[10 * k : 10 * k + 10])))
        drawings.append(judge.apart(judge.features_of(e.judge, shown(e, e.data, rows[:10], e.args.variety, thing))))
    e.figure("variety.png", list(images[:80].split(10)), [e.data.names[thing] for thing in chosen[:8]], [])
    means = [sum(values) / len(values) for values in (samples, drawings)]
    return {"samples": round(means[0], 4), "drawings": round(means[1], 4), "ratio": round(means[0] / means[1], 3)}


def memory(e: Evaluation, guidance: float) -> dict[str, float]:
    """1 - cosine between a sample and the nearest training drawing, the median; and of held-out drawings."""
    prompts, _, styles = asked(e)
    images = e.prompts("named", prompts, guidance)[styles == 0]
    known = judge.features_of(e.judge, shown(e, e.data, range(len(e.data.files))))
    rows = shuffled(len(e.held.files), 3)[:200]
    measures = {}
    for name, x in (("samples", images), ("held-out drawings", shown(e, e.held, rows, e.args.variety))):
        distance, which = judge.nearest(judge.features_of(e.judge, x), known)
        measures[name] = round(distance.median().item(), 4)
        rows = [x[:8], shown(e, e.data, which[:8].tolist())]
        e.figure(f"nearest_to_{name.replace(' ', '_')}.png", rows, [name, "nearest training drawing"], [])
    return measures


def pairs_of(e: Evaluation, alike: bool, view) -> list[tuple[int, int]]:
    """Pairs of things: random ones, or those whose drawings are most alike when blurred, one of them in a view."""
    count, total = e.args.pairs, len(e.data.names)
    if not alike:
        generator = torch.Generator().manual_seed(e.args.seed)
        return [tuple(torch.randperm(total, generator=generator)[:2].tolist()) for _ in range(count)]
    first_of_each = [(e.data.things == thing).nonzero()[0].item() for thing in range(total)]
    return judge.alike_pairs(shown(e, e.data, first_of_each), view, count)


def illusions(e: Evaluation, name: str, pairs: Sequence[tuple[int, int]], recipe, seen_of, labels) -> dict[str, float]:
    """Four images of each pair, each judged in both ways of seeing it; how often both things are recognised."""
    prompts = [tuple(photo_of(e.data.phrases[thing][0]) for thing in pair) for pair in pairs]
    seeds = range(e.args.seed, e.args.seed + 4)
    jobs = [Job(partial(recipe, pair), seeds) for pair in prompts]
    sampler = (*FAST[:2], e.args.illusion_steps)
    images = e.draw(name, jobs, e.args.illusion_guidance, sampler)
    seen = seen_of(images)
    each = judge.both_found(e.judge, seen, pairs)
    both = each[0] & each[1]
    best = both.any(1).double().argsort(descending=True, stable=True)[:8]
    rows = [4 * k.item() + both[k].double().argmax().item() for k in best]
    titles = [" / ".join(prompt.removeprefix("a photo of ") for prompt in prompts[k]) for k in best.tolist()]
    e.figure(f"{name}.png", [images[rows], *(x[rows] for x in seen)], ["drawn", *labels], titles)
    shares = {label: share(right[:, 0]) for label, right in zip(labels, each, strict=True)}
    return {**shares, "both": share(both[:, 0]), "both, in one of 4": share(both.any(1))}


def anagrams(e: Evaluation, alike: bool, reduction: str) -> dict[str, float]:
    """Upright and flipped."""

    def recipe(pair, stage):
        return anagram([stage.estimate(pair[0]), stage.estimate(pair[1], view=FLIP)], [identity(), FLIP], reduction)

    pairs, name = pairs_of(e, alike, FLIP), f"anagrams_{reduction}_{'alike' if alike else 'random'}"
    return illusions(e, name, pairs, recipe, lambda x: [x, FLIP.view(x)], ["upright", "flipped"])


def hybrids(e: Evaluation, alike: bool) -> dict[str, float]:
    """From afar and up close, seen through σ = 2 however they were drawn."""

    def recipe(pair, stage):
        return hybrid([stage.estimate(prompt) for prompt in pair], low_high_pass(SIGMA))

    pairs, name = pairs_of(e, alike, identity()), f"hybrids_{SIGMA:g}_{'alike' if alike else 'random'}"
    return illusions(e, name, pairs, recipe, lambda x: [low_pass(x), judge.high_passed(x)], ["far", "near"])


def holes(e: Evaluation, guidance: float) -> dict[str, float]:
    """The middle of held-out drawings, a quarter of each, filled with the name as prompt."""
    rows = [row for row in range(len(e.held.files)) if e.held.styles[row] < 2]
    rows = [rows[k] for k in shuffled(len(rows), 4)[: e.args.pairs]]
    x_orig, wanted, side = shown(e, e.held, rows), e.things_of(e.held, rows), e.side
    mask = torch.zeros(1, 1, side, side)
    mask[..., side // 4 : -side // 4, side // 4 : -side // 4] = 1
    styles = list(STYLES.values())
    prompts = [
        styles[int(e.held.styles[row])].templates[0].format(e.data.phrases[t][0])
        for row, t in zip(rows, wanted, strict=True)
    ]
    device, size = e.cascade.device, e.args.batch_size
    jobs = []
    for k in range(0, len(rows), size):
        filling = partial(inpaint, x_orig=x_orig[k : k + size].to(device), mask=mask.to(device))
        seeds = range(e.args.seed + k, e.args.seed + min(k + size, len(rows)))
        jobs.append(Job(prompts[k : k + size], seeds, filling))
    filled = e.draw("holes", jobs, guidance)
    holed = torch.where(mask > 0, 0.0, x_orig)
    e.figure("holes.png", [x_orig[:8], holed[:8], filled[:8]], ["held out", "hole", "filled"], prompts[:8])
    seen = {"filled": filled, "with its hole": holed, "before": x_orig}
    return {name: share(e.things(x) == wanted) for name, x in seen.items()}


def sdedited(e: Evaluation, guidance: float) -> dict[str, float]:
    """Our own drawings, with their own prompts, from index 5 to 10 of the strided timesteps, eight seeds each."""
    timesteps, size = strided_timesteps(SCHEDULE.num_timesteps, 30), e.cascade.sizes[0]
    known = [(name, e.data.phrases.index(p)) for name in DRAWINGS for p in e.data.phrases if DRAWING_PROMPTS[name] in p]
    if not known:  # the model has never heard of what they show
        return {}
    x_0 = {name: read_image(name, size) for name, _ in known}
    starts, seeds = range(5, 11), range(e.args.seed, e.args.seed + 8)
    jobs = [
        Job(DRAWING_PROMPTS[name], seeds, partial(sdedit, x_0=x_0[name].to(e.cascade.device), i_start=i), timesteps)
        for name, _ in known
        for i in starts
    ]
    images = e.draw("sdedit", jobs, guidance, ("ddpm", 0.0, len(timesteps))).view(len(known), len(starts) * 8, 3, *size)
    drawings, things = torch.cat(list(x_0.values())), torch.tensor([thing for _, thing in known])
    recognised = e.things(images.flatten(0, 1)).view(len(known), -1) == things[:, None]
    nearer = torch.cdist(images.flatten(2), drawings.flatten(1)).argmin(2) == torch.arange(len(known))[:, None]
    labels = ["drawing", *(f"i = {i}" for i in starts)]
    rows = [torch.cat([x_0[name], images[k][::8]]) for k, (name, _) in enumerate(known)]
    e.figure("sdedit.png", rows, [DRAWING_PROMPTS[name] for name, _ in known], labels)
    shares = {name: share(recognised[k]) for k, (name, _) in enumerate(known)}
    return {"recognised": share(recognised.flatten()), "nearer to its own": share(nearer.flatten()), **shares}


def stage_2(e: Evaluation) -> dict[str, dict[str, float]]:
    """Stage 2, told nothing, and bicubic upscaling of the same small drawings: how near each is to the large ones."""
    args, device = e.args, e.cascade.device
    unet = load_unet(args.upscaler, e.cascade.dtype, device, pack=True)
    size, measures = unet.config.sample_size, {}
    null = embed_prompts(args.model, [""])[""][None].to(device)
    sets = {"trained on": "train", "held out": "held out"} if args.hold_out else {"trained on": "all"}
    for kind, which in sets.items():
        data = load_captioned(args.data, size, e.data.names, part=which)
        rows = shuffled(len(data.files), 5)[:64]
        large = show(data, rows, size, torch.Generator().manual_seed(5), args.variety)[0]
        small = F.avg_pool2d(large, size // e.side)
        bicubic = F.interpolate(small, large.shape[-2:], mode="bicubic").clamp(-1, 1)
        drawn, parts = [], list(enumerate(small.split(8)))
        for k, part in tqdm(parts[rank() :: num_processes()], desc=f"stage 2, {kind}", leave=False):
            text = null.expand(len(part), -1, -1)
            options = {"num_steps": 20, "guidance_scale": 1.0, "noise_level": 50}
            seeds = range(args.seed + 8 * k, args.seed + 8 * k + len(part))
            drawn.append(upscale(unet, part.to(device), text, text, seeds=seeds, **options).cpu())
        images = torch.cat(gathered(drawn, [(len(part), 3, size, size) for _, part in parts]))
        both = {"stage 2": images.clamp(-1, 1), "bicubic": bicubic}
        near = {name: judge.fidelity(e.judge, x, large) for name, x in both.items()}
        measures[kind] = {f"{name}, {what}": near[name][what] for what in ("PSNR", "feature distance") for name in both}
        rows = [F.interpolate(x[:8], (size, size), mode="nearest") for x in (small, bicubic, both["stage 2"], large)]
        labels = [f"{e.side} px", "bicubic", "stage 2", "original"]
        e.figure(f"stage_2_{kind.replace(' ', '_')}.png", rows, labels, [])
    return measures


def taught(e: Evaluation, guidance: float) -> dict[str, dict[str, float]]:
    """Without a LoRA and with it: how often the new thing is drawn, how often the others are, or it in their place."""
    thing, prompt = e.args.taught
    new, after, measures, rows = e.data.names.index(thing), copy.copy(e), {}, []
    after.cascade = Cascade(e.args.model, lora=e.args.lora, device=e.cascade.device, dtype=e.cascade.dtype)
    after.identity += fingerprint(find_lora(e.args.lora))
    prompts, things, _ = asked(e)
    prompts, things = [prompt for prompt, k in zip(prompts, things, strict=True) if k != new], things[things != new]
    for name, one in (("without", e), ("with", after)):
        drawn = one.prompts("taught", [prompt] * e.args.samples, guidance)
        others = one.prompts("named", prompts, guidance)
        seen = e.things(others)
        measures[name] = {thing: share(e.things(drawn) == new), "others": share(seen == things)}
        measures[name][f"others, but {thing}"] = share(seen == new)
        rows += [drawn[:10], others[:10]]
    e.figure("taught.png", rows, ["without", "", "with", ""], [])
    return measures


def curves(e: Evaluation, best: float):
    """Share found and distance, against guidance and against steps."""
    rows = sorted(e.report["guidance"], key=lambda row: row["guidance"])
    found = {f"found, {kind}, %": {row["guidance"]: 100 * row[kind] for row in rows} for kind in ("plain", "styled")}
    found["distance"] = {row["guidance"]: row["distance"] for row in rows}
    by_steps: dict[str, dict] = {}
    rows = [*e.report["samplers"], *(row for row in rows if row["guidance"] == best)]
    for row in sorted(rows, key=lambda row: row["sampler"][2]):
        kind, eta, steps = row["sampler"]
        by_steps.setdefault(f"{kind}, η = {eta:g}", {})[steps] = row["distance"]
    left = {"xlabel": "guidance γ", "ylim": (0, None), "title": "SDE-DPM-Solver++, 20 steps"}
    right = {"xlabel": "steps", "ylabel": "distance", "xscale": "log", "ylim": (0, None), "title": f"γ = {best:g}"}
    save_curves(e.args.out / "curves.png", [(found, left), (by_steps, right)], e.args.seed)


if __name__ == "__main__":
    run(main)
