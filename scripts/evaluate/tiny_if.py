"""How good a small IF is: does it draw what it was asked for, and do the algorithms work on it?

    python scripts/evaluate/tiny_if.py --data emoji --curated

For --prompts prompts, half of them plain ("a photo of …"), half with a style, one picture each: is the nearest training
picture, in the features of an independent judge (ifmodel/tiny/judge.py), the prompted one? And how far are these
pictures from the training pictures, as a Fréchet distance on the same features? This for every --guidance with 20 steps
of SDE-DPM-Solver++, then for other samplers and numbers of steps at the best guidance, the one that finds most. At that
guidance also the assignment's own prompts, "a rocket ship" and its like, which are other names of pictures. Then
anagrams and hybrids, in which both things must be recognised: of random pairs, and of pairs whose pictures are alike
when blurred, as one who makes illusions would choose them; one picture each, and the best of --tries. And stage 2
beside bicubic upscaling.

Writes report.json, curves.png and samples of each kind to --out, each as soon as it is known; all pictures of stage 1
are kept there too, so a stopped evaluation goes on where it was.
"""

import hashlib
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # where shared/ is
from ddpm.components import low_high_pass, low_pass
from ddpm.estimates import REDUCTIONS
from ddpm.files import load_tensors, save_tensors, write_atomically
from ddpm.mnist.judge import frechet_distance
from ddpm.process import ddim_step, ddpm_step, dpm_solver_step
from ddpm.sampling import Estimate, anagram, hybrid, noise_source, sample
from ddpm.schedule import leading_timesteps, linspace_timesteps
from ddpm.views import View, identity, vertical_flip
from ifmodel import load_unet
from ifmodel.stage import SCHEDULE, STAGE_1_THRESHOLD, check_stage, stage_1, upscale
from ifmodel.text import embed_prompts
from ifmodel.tiny.captions import STYLES, CaptionedImages, curated, held_out, load_captioned
from ifmodel.tiny.judge import ImageJudge, features_of, high_passed, nearest, train_picture_judge
from ifmodel.weights import read_json
from shared.figures import save_figure, save_grid
from shared.options import (
    SEED,
    add_device_options,
    check_writable,
    number,
    parser,
    pick_device,
    pick_dtype,
    positive,
    positive_number,
    run,
    seed_number,
)
from shared.stages import MODEL, UPSCALER

# each with the spacing of its timesteps: IF's own, or diffusers' for DPM-Solver++, from the noisiest on
STEPS = {
    "ddpm": (partial(ddpm_step, variance="learned_range"), leading_timesteps),
    "ddim": (ddim_step, leading_timesteps),
    "dpm++": (dpm_solver_step, linspace_timesteps),
    "sde-dpm++": (partial(dpm_solver_step, eta=1.0), linspace_timesteps),
}
FAST = ("sde-dpm++", 20)
SAMPLERS = [("sde-dpm++", 10), ("dpm++", 20), ("ddim", 20), ("ddpm", 20), ("ddpm", 100), ("sde-dpm++", 5)]
TEMPLATES = ["a photo of {}", "an oil painting of {}", "a lithograph of {}", "a sketch of {}"]  # a STYLES each
ALIAS_STYLES = (0, 1)  # in which other names are asked for


def main():
    args = arguments()
    device = pick_device(args.device)
    check_writable(args.out / "report.json")
    model = SmallIF(args, device, pick_dtype(args.dtype, device))
    data = load_captioned(args.data, args.size, curated() if args.curated else None)
    if len(data.names) < 2:
        raise ValueError(f"{args.data} has one picture alone, {data.names[0]}: pairs and shares need two or more")
    sets = {} if args.upscaler == "none" else upscaling_sets(args, data)  # now, since there may be too few pictures
    judge, known = get_judge(args, data)
    asked = prompts_of(data, args.prompts, args.seed)
    measure = partial(measured, args, model, judge, known, data, asked)
    report = {"prompts": len(asked), "seed": args.seed}

    def keep(section: str, measures):  # written each time, so that a late failure loses nothing
        report[section] = measures
        write_atomically(args.out / "report.json", json.dumps(report, indent=2).encode())

    keep("judge", judge_report(args, judge, data, known))
    if "prompts" in args.only:
        measure_prompts(args, measure, keep, report, known, asked)
        if asked_otherwise := aliases_of(data):
            keep("aliases", aliases(args, model, judge, known, data, asked_otherwise, report["best_guidance"]))
    named = {reduction: "anagrams" if reduction == "mean" else f"anagrams, {reduction}" for reduction in args.reduction}
    illusions = {name: partial(anagrams, reduction=reduction) for reduction, name in named.items()}
    for name, measure_pairs in {**illusions, "hybrids": hybrids}.items():
        for alike in (False, True) if name.split(",")[0] in args.only else ():
            kind = "alike" if alike else "random"
            keep(f"{name}, {kind} pairs", measure_pairs(args, model, judge, known, data, alike))
    for kind, pictures in sets.items() if "stage_2" in args.only else ():
        keep("stage_2", {**report.get("stage_2", {}), kind: upscaled(args, model, judge, pictures, kind)})
    print(args.out / "report.json")


def measure_prompts(args: Namespace, measure: Callable, keep: Callable, report: dict, known: Tensor, asked):
    """Every guidance with few steps, then the samplers at the best of them."""
    reference = known[[one.row for one in asked]]
    others = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(1))[: len(asked)]]
    keep("distance_floor", frechet_distance(others, reference))
    print(f"distance of other training pictures, as many: {report['distance_floor']:.1f}")
    keep("guidance", [measure(guidance, *FAST) for guidance in args.guidance])
    found = {row["guidance"]: row["plain"] + row["styled"] for row in report["guidance"]}
    best = max(found, key=found.get)
    keep("best_guidance", best)
    keep("samplers", [measure(best, sampler, steps) for sampler, steps in SAMPLERS if steps <= args.most_steps])
    draw_curves(args.out / "curves.png", report, args.seed)


def arguments() -> Namespace:
    options = parser(__doc__)
    options.add_argument("--data", type=Path, required=True, help="the folder that it was trained on")
    options.add_argument("--curated", action="store_true", help="as in train_if.py; 64 other pictures test stage 2")
    options.add_argument("--model", default=MODEL, metavar="FOLDER", help=f"default: {MODEL}")
    options.add_argument("--upscaler", default=UPSCALER, metavar="FOLDER", help=f"or none (default: {UPSCALER})")
    options.add_argument("--prompts", type=positive, default=200, help="default: 200")
    options.add_argument("--pairs", type=positive, default=50, help="of anagrams and of hybrids (default: 50)")
    options.add_argument("--tries", type=positive, default=4, help="pictures of each pair (default: 4)")
    options.add_argument("--anagram-guidance", type=number, default=2.0, help="default: 2")
    options.add_argument("--reduction", nargs="+", choices=REDUCTIONS, default=["mean"], help="of anagrams")
    options.add_argument("--hybrid-guidance", type=number, default=2.0, help="default: 2")
    help = "the blur that parts far from near, in pixels of a 64-pixel picture (default: 4)"
    options.add_argument("--hybrid-sigma", type=positive_number, default=4.0, help=help)
    help = "of anagrams and hybrids, with SDE-DPM-Solver++ (default: 50)"
    options.add_argument("--illusion-steps", type=positive, default=50, help=help)
    options.add_argument("--guidance", type=number, nargs="+", default=[1.0, 2.0, 4.0, 7.0], help="default: 1 2 4 7")
    options.add_argument("--most-steps", type=positive, default=100, help="leave slower samplers out (default: 100)")
    parts = ["prompts", "anagrams", "hybrids", "stage_2"]
    options.add_argument("--only", nargs="+", choices=parts, default=parts, help="default: all")
    options.add_argument("--judge-steps", type=positive, default=2000, help="of the judge's training (default: 2000)")
    options.add_argument("--noise-level", type=int, default=50, help="of stage 2 (default: 50)")
    options.add_argument("--batch-size", type=positive, default=25, help="default: 25")
    options.add_argument("--seed", type=seed_number, default=SEED, help=f"default: {SEED}")
    options.add_argument("--out", type=Path, default=Path("out/evaluate_if"), help="default: out/evaluate_if")
    add_device_options(options)
    args = options.parse_args()
    if args.prompts < 2:
        raise ValueError("--prompts must be at least 2: one picture has no covariance")
    if not 0 <= args.noise_level < SCHEDULE.num_timesteps:
        raise ValueError(f"--noise-level must be from 0 to 999, not {args.noise_level}")
    args.model = MODEL if args.model == "tiny-if" else args.model
    args.upscaler = UPSCALER if args.upscaler == "tiny-if" else args.upscaler
    check_models(args)
    return args


def check_models(args: Namespace):
    """Find args.small, which stage 1 draws, and args.size, of the data.

    The data are as large as stage 2 draws, or without one the largest multiple of args.small up to 128, or itself.
    Raises FileNotFoundError or ValueError, in one line, for a model that lacks something or stages that do not fit.
    """
    stages = [(args.model, check_stage(args.model, 1))]
    args.small = stages[0][1].sample_size
    args.size = max(128 // args.small, 1) * args.small
    if args.upscaler != "none":
        stages.append((args.upscaler, check_stage(args.upscaler, 2)))
        args.size = stages[1][1].sample_size
        if args.size % args.small:
            told = f"{args.upscaler} draws pictures of {args.size} pixels, no multiple of the {args.small}"
            raise ValueError(f"{told} of {args.model}: give another --upscaler, or none")
    path, encoder = read_json(args.model, "text_encoder", "config.json")
    if encoder is None:
        raise FileNotFoundError(f"{path} is not there: {args.model} must hold its text encoder")
    for source, config in stages:
        if (width := encoder.get("d_model")) != config.encoder_hid_dim:
            told = f"{source} takes texts that are {config.encoder_hid_dim} wide, {args.model}'s encoder gives {width}"
            raise ValueError(f"{told}: give stages with the same text encoder, or --upscaler none")


@dataclass(frozen=True)
class Asked:
    """A prompt, and the training picture that it asks for: its name, its style, and its row of name × style."""

    prompt: str
    name: int
    style: int

    @property
    def row(self) -> int:
        return self.name * len(STYLES) + self.style


def prompts_of(data: CaptionedImages, count: int, seed: int) -> list[Asked]:
    """Half of them plain, the others with the other styles in turn; of random pictures."""
    order = torch.randperm(len(data.names), generator=torch.Generator().manual_seed(seed)).tolist()
    asked = []
    for k in range(count):
        name, style = order[k % len(order)], 0 if k % 2 == 0 else 1 + (k // 2) % (len(STYLES) - 1)
        asked.append(Asked(TEMPLATES[style].format(data.phrases[name][0]), name, style))
    return asked


def aliases_of(data: CaptionedImages) -> list[Asked]:
    """The other names of pictures, such as the assignment's "a rocket ship": as photos all, then as oil paintings."""
    return [
        Asked(TEMPLATES[style].format(phrase), name, style)
        for style in ALIAS_STYLES
        for name, phrases in enumerate(data.phrases)
        for phrase in phrases[1:]
    ]


def pairs_of(
    data: CaptionedImages, count: int, seed: int, view: View, alike: bool, side: int
) -> list[tuple[Asked, Asked]]:
    """Pairs of different pictures, both plain: random ones, or those nearest to each other when blurred.

    alike: the second is compared in its view, at side × side pixels; each picture is in one pair alone
    """
    if alike:
        plain = reduced(data.pictures[:, 0], side)
        seen = [low_pass(x, 4.0).flatten(1) for x in (plain, view.view(plain))]
        distances, chosen = torch.cdist(*seen).fill_diagonal_(torch.inf), []
        while len(chosen) < count and distances.isfinite().any():
            pair = divmod(distances.argmin().item(), len(distances))
            chosen.append(pair)
            distances[list(pair), :] = distances[:, list(pair)] = torch.inf
    else:
        generator = torch.Generator().manual_seed(seed)
        chosen = [torch.randperm(len(data.names), generator=generator)[:2].tolist() for _ in range(count)]
    return [tuple(Asked(TEMPLATES[0].format(data.phrases[name][0]), name, 0) for name in pair) for pair in chosen]


class SmallIF:
    """Both stages, with what the evaluation asks of them; what was drawn before is read from --out."""

    def __init__(self, args: Namespace, device: torch.device, dtype: torch.dtype):
        self.args, self.device = args, device
        self.unet = load_unet(args.model, dtype, device, pack=True)
        self.upscaler = None if args.upscaler == "none" else load_unet(args.upscaler, dtype, device, pack=True)
        weights = b"".join(parameter.detach().float().cpu().numpy().tobytes() for parameter in self.unet.parameters())
        self.identity = f"{hashlib.sha256(weights).hexdigest()[:12]}_{str(dtype).removeprefix('torch.')}_{args.seed}"

    def embedded(self, prompts: Sequence[str]) -> Tensor:
        """[N, 77, D_text]"""
        embeds = embed_prompts(self.args.model, prompts)
        return torch.stack([embeds[prompt] for prompt in prompts]).to(self.device)

    def estimate(self, prompts: Sequence[str], guidance: float) -> Estimate:
        return stage_1(self.unet, self.embedded(prompts), self.embedded([""]), guidance)

    def draw_prompts(
        self, asked: Sequence[Asked], guidance: float, sampler: str, steps: int, kind: str = "prompts"
    ) -> Tensor:
        name, prompts = f"{kind}_{len(asked)}_g{guidance:g}_{sampler}_{steps}", [one.prompt for one in asked]
        return self.draw(name, prompts, lambda rows: self.estimate(prompts[rows], guidance), sampler, steps)

    def draw(
        self, name: str, prompts: Sequence, estimate_of: Callable, sampler: str = FAST[0], steps: int = FAST[1]
    ) -> Tensor:
        """Pictures [N, 3, S, S] in [-1, 1], number k from seed + k, those of estimate_of(rows) at a time.

        prompts: of each picture its prompt, or several: with the text encoder they tell whether it was drawn before
        """
        texts = [text for prompt in prompts for text in ([prompt] if isinstance(prompt, str) else prompt)]
        told = hashlib.sha256(repr(texts).encode() + self.embedded(texts).float().cpu().numpy().tobytes())
        path = self.args.out / "pictures" / f"{name}_{self.identity}_{told.hexdigest()[:12]}.safetensors"
        if path.is_file():
            return load_tensors(path)[0]["pictures"]
        count = len(prompts)
        step, spaced = STEPS[sampler]
        timesteps, loop = spaced(SCHEDULE.num_timesteps, steps), {"step": step, "threshold": STAGE_1_THRESHOLD}
        side, pictures = self.args.small, []
        for start in tqdm(range(0, count, self.args.batch_size), desc=name, leave=False):
            rows = slice(start, min(start + self.args.batch_size, count))
            seeds = range(self.args.seed + rows.start, self.args.seed + rows.stop)
            noise = noise_source(seeds, (3, side, side), self.device)
            pictures.append(sample(estimate_of(rows), timesteps, SCHEDULE, noise=noise, **loop).cpu())
        drawn = torch.cat(pictures).clamp(-1, 1)
        save_tensors(path, {"pictures": drawn}, {"name": name})
        return drawn


def get_judge(args: Namespace, data: CaptionedImages) -> tuple[ImageJudge, Tensor]:
    """The judge of these pictures, trained once and kept in --out, and the features of every name × style."""
    identity = hashlib.sha256(data.pictures.numpy().tobytes()).hexdigest()[:12]
    path = args.out / f"judge_{identity}_{args.judge_steps}_{args.seed}.safetensors"
    if not path.is_file():
        trained = train_picture_judge(data.pictures, steps=args.judge_steps, seed=args.seed)
        save_tensors(path, trained.state_dict(), {"steps": args.judge_steps})
    judge = ImageJudge(*data.pictures.shape[:2])
    judge.load_state_dict(load_tensors(path)[0])
    judge.eval()
    return judge, features_of(judge, data.pictures.flatten(0, 1) / 127.5 - 1)


def judge_report(args: Namespace, judge: ImageJudge, data: CaptionedImages, known: Tensor) -> dict[str, float]:
    """How often the judge finds the training pictures themselves, as small as stage 1 draws and moved by one."""
    small = reduced(data.pictures.flatten(0, 1), args.small).roll((1, -1), (2, 3))
    blurred, high = low_pass(small, 2.0), high_passed(small)
    rows = torch.arange(len(known))
    shares = {}
    for name, x in (("small and moved", small), ("low-passed", blurred), ("high-passed", high)):
        shares[name] = share(nearest(judge, x, known) // len(STYLES) == rows // len(STYLES))
        print(f"the judge finds {shares[name]:.1%} of the training pictures, {name}")
    return shares


def measured(
    args, model: SmallIF, judge, known: Tensor, data, asked: Sequence[Asked], guidance: float, sampler: str, steps: int
) -> dict:
    """How often what was asked for is the nearest, and how far the pictures are from the training pictures."""
    pictures = model.draw_prompts(asked, guidance, sampler, steps)
    found, row = nearest(judge, pictures, known), {"guidance": guidance, "sampler": sampler, "steps": steps}
    same_name = found // len(STYLES) == torch.tensor([one.name for one in asked])
    rows = torch.tensor([one.row for one in asked])
    same, plain = found == rows, torch.tensor([one.style == 0 for one in asked])
    row |= {"plain": share(same_name[plain]), "styled": share(same[~plain]), "named": share(same_name[~plain])}
    row["distance"] = frechet_distance(features_of(judge, pictures), known[rows])
    told = f"γ = {guidance:g}, {sampler} {steps}: plain {row['plain']:.0%}, with a style {row['styled']:.0%}"
    print(f"{told} (the name alone {row['named']:.0%}), distance {row['distance']:.1f}")
    labels = [one.prompt for one in asked[:8]]
    name = f"prompts_g{guidance:g}_{sampler.replace('+', 'p')}_{steps}.png"
    draw(args, name, [pictures[:8], data_rows(data, asked[:8], args.small)], ["drawn", "asked for"], labels)
    return row


def aliases(args, model: SmallIF, judge, known: Tensor, data, asked: Sequence[Asked], guidance: float) -> dict:
    """Prompts of `aliases_of`: how often the nearest picture has the name that each is another word for."""
    pictures = model.draw_prompts(asked, guidance, *FAST, kind="aliases")
    found = nearest(judge, pictures, known) // len(STYLES) == torch.tensor([one.name for one in asked])
    photos, oils = found.chunk(2)
    measures = {"photo": share(photos), "oil painting": share(oils), "all": share(found)}
    told = ", ".join(f"{name} {value:.0%}" for name, value in measures.items())
    print(f"{len(photos)} other names, γ = {guidance:g}: {told}")
    measures["prompts"] = {one.prompt: right for one, right in zip(asked, found.tolist(), strict=True)}
    rows, labels = [], [one.prompt.removeprefix(TEMPLATES[0].format("")) for one in asked[: len(photos)][:8]]
    for part, prompts in zip(pictures.chunk(2), (asked[: len(photos)], asked[len(photos) :]), strict=True):
        rows += [part[:8], data_rows(data, prompts[:8], args.small)]
    named = [label for style in ALIAS_STYLES for label in (TEMPLATES[style].format("…"), "asked for")]
    draw(args, "aliases.png", rows, named, labels)
    return measures


def anagrams(
    args, model: SmallIF, judge, known: Tensor, data: CaptionedImages, alike: bool, reduction: str
) -> dict[str, float]:
    """Upright and flipped: how often each thing, and both, are the nearest."""
    views = [identity(), vertical_flip()]
    pairs = pairs_of(data, args.pairs, args.seed, views[1], alike, args.small) * args.tries
    name = f"anagrams_{'alike' if alike else 'random'}" + (f"_{reduction}" if reduction != "mean" else "")

    def estimate_of(rows: slice) -> Estimate:
        sides = zip(*pairs[rows], strict=True)
        estimates = [model.estimate([one.prompt for one in side], args.anagram_guidance) for side in sides]
        return anagram(estimates, views, reduction)

    prompts = [tuple(one.prompt for one in pair) for pair in pairs]
    drawn = f"{name}_{len(pairs)}_g{args.anagram_guidance:g}_{args.illusion_steps}"
    pictures = model.draw(drawn, prompts, estimate_of, steps=args.illusion_steps)
    seen = [view.view(pictures) for view in views]
    found, measures = recognised(name, ["upright", "flipped"], seen, pairs, judge, known, args.tries)
    draw_best(args, f"{name}.png", seen, ["upright", "flipped"], pairs, found)
    return measures


def hybrids(args, model: SmallIF, judge, known: Tensor, data: CaptionedImages, alike: bool) -> dict[str, float]:
    """Far and near, always seen through σ = 2, however drawn: how often each thing, and both, are the nearest."""
    components = low_high_pass(args.hybrid_sigma)
    pairs = pairs_of(data, args.pairs, args.seed + 1, identity(), alike, args.small) * args.tries
    name = f"hybrids_{'alike' if alike else 'random'}"

    def estimate_of(rows: slice) -> Estimate:
        sides = zip(*pairs[rows], strict=True)
        estimates = [model.estimate([one.prompt for one in side], args.hybrid_guidance) for side in sides]
        return hybrid(estimates, components)

    prompts = [tuple(one.prompt for one in pair) for pair in pairs]
    drawn = f"{name}_{len(pairs)}_g{args.hybrid_guidance:g}_s{args.hybrid_sigma:g}_{args.illusion_steps}"
    pictures = model.draw(drawn, prompts, estimate_of, steps=args.illusion_steps)
    seen = [low_pass(pictures), high_passed(pictures)]
    found, measures = recognised(name, ["low pass", "high pass"], seen, pairs, judge, known, args.tries)
    draw_best(args, f"{name}.png", [pictures, *seen], ["drawn", "low pass", "high pass"], pairs, found)
    return measures


def recognised(what: str, names, seen: Sequence[Tensor], pairs, judge, known: Tensor, tries: int):
    """Which pictures show both things, whatever their style, [tries, pairs]; and the shares of pairs.

    Of the first try: whose first, second, and both things are the nearest; and for which any try shows both.
    """
    first, second = (
        (nearest(judge, part, known) // len(STYLES) == torch.tensor([pair[k].name for pair in pairs])).view(tries, -1)
        for k, part in enumerate(seen)
    )
    both = first & second
    shares = {names[0]: share(first[0]), names[1]: share(second[0]), "both": share(both[0])}
    shares[f"both, in one of {tries}"] = share(both.any(0))
    print(f"{what}: " + ", ".join(f"{name} {value:.0%}" for name, value in shares.items()))
    return both, shares


def draw_best(args, name: str, rows: Sequence[Tensor], row_labels: Sequence[str], pairs, both: Tensor):
    """Of eight pairs the picture that shows both things, or the first; pairs in which one does come first."""
    count = both.shape[1]
    order = both.any(0).double().argsort(descending=True, stable=True)[:8].tolist()
    chosen = [int(both[:, k].double().argmax()) * count + k for k in order]
    labels = [" / ".join(one.prompt.removeprefix("a photo of ") for one in pairs[k]) for k in order]
    draw(args, name, [row[chosen] for row in rows], row_labels, labels)


def upscaling_sets(args: Namespace, data: CaptionedImages) -> dict[str, Tensor]:
    """Plain pictures [64, 3, S, S] in [-1, 1], S = args.size: of our list, or the first, and those of --hold-out 64."""
    sets = {"trained on": data.pictures[:64, 0]}
    if args.curated:
        sets["never seen"] = load_captioned(args.data, args.size, held_out(args.data, 64)).pictures[:, 0]
    return {name: pictures / 127.5 - 1 for name, pictures in sets.items()}


def upscaled(args: Namespace, model: SmallIF, judge: ImageJudge, pictures: Tensor, kind: str) -> dict[str, float]:
    """Stage 2, told nothing, and bicubic upscaling of the same small pictures: how near each is to the large ones."""
    small = F.avg_pool2d(pictures, pictures.shape[-1] // args.small)
    bicubic = F.interpolate(small, pictures.shape[-2:], mode="bicubic").clamp(-1, 1)
    null, drawn = model.embedded([""]), []
    for start in tqdm(range(0, len(small), 8), desc=f"stage 2, {kind}", leave=False):
        part = small[start : start + 8].to(model.device)
        text = null.expand(len(part), -1, -1)
        options = {"num_steps": 20, "guidance_scale": 1.0, "noise_level": args.noise_level}
        seeds = range(args.seed + start, args.seed + start + len(part))
        drawn.append(upscale(model.upscaler, part, text, text, seeds=seeds, **options).cpu())
    drawn = torch.cat(drawn).clamp(-1, 1)
    reference, measures = features_of(judge, pictures), {}
    for name, x in (("stage 2", drawn), ("bicubic", bicubic)):
        mse = (x - pictures).square().flatten(1).mean(1)
        measures[f"{name}, PSNR"] = (10 * torch.log10(4 / mse)).mean().item()
        near = F.cosine_similarity(features_of(judge, x), reference)
        measures[f"{name}, feature distance"] = (1 - near).mean().item()
    print(f"stage 2, pictures {kind}: " + ", ".join(f"{name} {value:.3f}" for name, value in measures.items()))
    rows, labels = [small, bicubic, drawn, pictures], [f"{args.small} px", "bicubic", "stage 2", "original"]
    rows = [F.interpolate(x[:8], pictures.shape[-2:], mode="nearest") for x in rows]
    draw(args, f"stage_2_{kind.replace(' ', '_')}.png", rows, labels, [""] * 8)
    return measures


def share(right: Tensor) -> float:
    return right.double().mean().item() if len(right) else float("nan")


def data_rows(data: CaptionedImages, asked: Sequence[Asked], side: int) -> Tensor:
    """The training pictures that prompts ask for, [N, 3, side, side] in [-1, 1]."""
    return reduced(torch.stack([data.pictures[one.name, one.style] for one in asked]), side)


def reduced(pictures: Tensor, side: int) -> Tensor:
    """Pictures [N, 3, S, S] uint8 -> means of their pixels [N, 3, side, side] in [-1, 1]; S is a multiple of side."""
    return F.avg_pool2d(pictures / 127.5 - 1, pictures.shape[-1] // side)


def draw(args: Namespace, name: str, rows: Sequence[Tensor], row_labels: Sequence[str], labels: Sequence[str]):
    """A figure in --out, of pictures in [-1, 1], of one size."""
    pictures = [[x / 2 + 0.5 for x in row] for row in rows]
    zoom = max(1, 128 // rows[0].shape[-1])
    options = {"row_labels": row_labels, "column_labels": labels, "zoom": zoom, "seed": args.seed}
    save_grid(args.out / name, pictures, **options)


def draw_curves(path: Path, report: dict, seed: int):
    """Share found and distance, against guidance and against steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = sorted(report["guidance"], key=lambda row: row["guidance"])
    for name in ("plain", "styled"):
        left.plot([row["guidance"] for row in rows], [100 * row[name] for row in rows], "o-", label=f"found, {name}, %")
    left.plot([row["guidance"] for row in rows], [row["distance"] for row in rows], "s--", label="distance")
    left.set(xlabel="guidance γ", ylim=(0, None), title="SDE-DPM-Solver++, 20 steps")
    best = [row for row in report["guidance"] if row["guidance"] == report["best_guidance"]]
    for sampler in STEPS:
        rows = sorted(
            (row for row in [*report["samplers"], *best] if row["sampler"] == sampler), key=lambda r: r["steps"]
        )
        right.plot([row["steps"] for row in rows], [row["distance"] for row in rows], "o-", label=sampler)
    right.axhline(report["distance_floor"], color="0.5", linestyle=":", label="other training pictures")
    right.set(xlabel="steps", ylabel="distance", xscale="log", ylim=(0, None), title=f"γ = {report['best_guidance']:g}")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.3)
    save_figure(path, figure, seed)


if __name__ == "__main__":
    run(main)
