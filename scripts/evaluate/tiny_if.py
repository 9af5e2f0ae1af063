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

import json
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # where shared/ is
from shared.images import DRAWING_PROMPTS, DRAWINGS, read_image
from shared.options import add_common_options, check_writable, number, parser, pick, positive, run
from shared.stages import MODEL, UPSCALER, model_name

from ddpm.estimates import REDUCTIONS
from ddpm.tools.distributed import check_shares, rank
from ddpm.tools.figures import save_curves
from ddpm.tools.files import fingerprint, write_json
from ddpm.tools.memory import check_memory
from ifmodel import Cascade, load_unet
from ifmodel.lora_files import find_lora
from ifmodel.stage import check_stage
from ifmodel.t5 import embed_prompts
from ifmodel.tiny.algorithm_measures import anagrams, holes, hybrids, illusions, sdedited, upscaled
from ifmodel.tiny.captions import curated
from ifmodel.tiny.exam import FAST, Exam, Sampler, identity_of, kept_judge
from ifmodel.tiny.loading import load_captioned
from ifmodel.tiny.measures import aliases, anything, judge_accuracy, memory, named, taught, variety

SAMPLERS = [("dpm++", 1.0, 5), ("dpm++", 1.0, 10), ("dpm++", 0.0, 20), ("ddim", 0.0, 20), ("ddpm", 0.0, 20)]
SAMPLERS += [("ddpm", 0.0, 100)]
PARTS = ["named", "aliases", "anything", "variety", "memory", "holes", "sdedited", "anagrams", "hybrids", "stage_2"]


def main():
    args = arguments()
    check_writable(args.out / "report.json")
    exam = begin(args)
    report = {"seed": args.seed, "things": len(exam.data.names)}
    keep = partial(keep_section, args.out / "report.json", report)
    keep("judge", judge_accuracy(exam))
    best = args.guidance[0] if args.best is None else args.best
    if args.taught:
        keep("taught", taught(exam, with_lora(exam, args.lora), *args.taught, best, args.prompts, args.samples))
    if "named" in args.only:
        found = measure_named(exam, args, keep)
        best = found if args.best is None else best
        if rank() == 0:
            curves(args.out / "curves.png", report, args.seed)
    drawings = {name: (DRAWING_PROMPTS[name], read_image(name, exam.cascade.sizes[0])) for name in DRAWINGS}
    measures = {
        "aliases": partial(aliases, exam, best),
        "anything": partial(anything, exam, best, args.samples),
        "variety": partial(variety, exam, best, -(-args.samples // 5)),
        "memory": partial(memory, exam, best, args.prompts),
        "holes": partial(holes, exam, best, args.pairs),
        "sdedited": partial(sdedited, exam, drawings, best),
    }
    for name, measure in measures.items():
        if name in args.only:
            keep(name, measure())
    for alike in (True, False):
        kinds = {f"anagrams, {name}": anagrams(name) for name in args.reduction if "anagrams" in args.only}
        kinds |= {"hybrids": hybrids()} if "hybrids" in args.only else {}
        for name, kind in kinds.items():
            how = (args.illusion_guidance, args.pairs, args.illusion_steps)
            keep(f"{name}, {'alike' if alike else 'random'} pairs", illusions(exam, kind, alike, *how))
    if "stage_2" in args.only and args.upscaler != "none":
        keep("stage 2", measure_stage_2(exam, args))
    if rank() == 0:
        print(args.out / "report.json")


def keep_section(path: Path, report: dict, section: str, measures):
    """Write the report each time, so that a late failure loses nothing."""
    report[section] = measures
    if rank() == 0:
        write_json(path, report)
        print(f"{section}: {json.dumps(measures)}", flush=True)


def begin(args: Namespace) -> Exam:
    """The exam, with its drawings and its judge. Raises ValueError for what cannot be measured."""
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
    device, dtype = pick(args)
    cascade = Cascade(args.model, device=device, dtype=dtype)
    judge = kept_judge(args.out, data, side, args.judge_steps, args.seed)
    return Exam(cascade, judge, data, held, args.out, args.seed, args.variety, args.batch_size)


def arguments() -> Namespace:
    options = parser(__doc__, "--data FOLDER ")
    options.add_argument("--data", type=Path, required=True, help="the folder that it was trained on")
    options.add_argument("--curated", action="store_true", help="as in train_if.py")
    options.add_argument("--hold-out", action="store_true", help="as in train_if.py: measure on what was held out")
    help = "how much the drawings vary with which images are compared, as in train_if.py (default: 1)"
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


def with_lora(exam: Exam, lora: Path) -> Exam:
    """The same of the model with a LoRA."""
    model, device, dtype = exam.cascade.stages[0].source, exam.cascade.device, exam.cascade.dtype
    identity = identity_of(model) + fingerprint(find_lora(lora))
    return replace(exam, cascade=Cascade(model, lora=lora, device=device, dtype=dtype), identity=identity)


def measure_named(exam: Exam, args: Namespace, keep: Callable) -> float:
    """`named` for each γ, then for other samplers at the best γ, which is returned."""

    def row(guidance: float, sampler: Sampler) -> dict:
        return {"guidance": guidance, "sampler": sampler, **named(exam, guidance, sampler, args.prompts)}

    rows = [row(guidance, FAST) for guidance in args.guidance]
    best = max(rows, key=lambda row: row["plain"] + row["styled"])["guidance"]
    keep("guidance", rows)
    keep("best guidance", best)
    keep("samplers", [row(best, sampler) for sampler in SAMPLERS if sampler[2] <= args.most_steps])
    return best


def measure_stage_2(exam: Exam, args: Namespace) -> dict[str, dict[str, float]]:
    """`upscaled` for drawings that were trained on, and held out."""
    unet = load_unet(args.upscaler, exam.cascade.dtype, exam.cascade.device, pack=True)
    null = embed_prompts(args.model, [""])[""][None].to(exam.cascade.device)
    parts = {"trained on": "train", "held out": "held out"} if args.hold_out else {"trained on": "all"}
    load, measures = partial(load_captioned, args.data, unet.config.sample_size, exam.data.names), {}
    for kind, part in parts.items():
        data, name = load(part=part), f"stage_2_{kind.replace(' ', '_')}"
        measures[kind] = upscaled(exam, name, data, unet, null)
        measures[f"{kind}, drawn anew"] = upscaled(exam, f"{name}_anew", data, unet, null, again=True)
    return measures


def curves(path: Path, report: dict, seed: int):
    """Share found and distance, against guidance and against steps."""
    best = report["best guidance"]
    rows = sorted(report["guidance"], key=lambda row: row["guidance"])
    found = {f"found, {kind}, %": {row["guidance"]: 100 * row[kind] for row in rows} for kind in ("plain", "styled")}
    found["distance"] = {row["guidance"]: row["distance"] for row in rows}
    by_steps: dict[str, dict] = {}
    rows = [*report["samplers"], *(row for row in rows if row["guidance"] == best)]
    for row in sorted(rows, key=lambda row: row["sampler"][2]):
        kind, eta, steps = row["sampler"]
        by_steps.setdefault(f"{kind}, η = {eta:g}", {})[steps] = row["distance"]
    left = {"xlabel": "guidance γ", "ylim": (0, None), "title": "SDE-DPM-Solver++, 20 steps"}
    right = {"xlabel": "steps", "ylabel": "distance", "xscale": "log", "ylim": (0, None), "title": f"γ = {best:g}"}
    save_curves(path, [(found, left), (by_steps, right)], seed)


if __name__ == "__main__":
    run(main)
