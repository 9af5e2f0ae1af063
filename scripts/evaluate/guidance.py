"""What guidance does as γ grows, and what rescaled and projected guidance do instead: to digits and to tiny-if.

    python scripts/evaluate/guidance.py --emoji emoji --curated --data data

Of digits: the Fréchet distance to as many real ones, and how many the judge of evaluate/mnist.py reads as asked. Of
tiny-if's images of plain prompts ("a photo of …"): how often the judge of evaluate/tiny_if.py finds the one that was
asked for, and their colours: saturation, the distance of the largest from the smallest channel, of which the training
images have some themselves. Guiders: plain; rescaled with φ = 0.7; projected, only what is orthogonal to x̂_c.

Writes report.json and guidance.png to --out; all images are kept there, and a stopped evaluation goes on where it was.
--skip-digits and --skip-images leave one of them out. torchrun shares the kinds of images among its processes.
"""

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # where shared/ is
from shared.options import add_data_option, add_output_options, check_writable, number, parser, positive, run
from shared.stages import MODEL

import torch
from torch import Tensor
from tqdm import tqdm

from ddpm.estimates import Guider, classifier_free, projected, rescaled
from ddpm.mnist import SHIPPED, load_model, sample_digits
from ddpm.mnist.data import load_mnist
from ddpm.mnist.judge import examine, measure_samples
from ddpm.schedule import Schedule, linear_schedule
from ddpm.tools.distributed import rank, share, wait
from ddpm.tools.figures import save_curves
from ddpm.tools.files import fingerprint, load_tensors, parse_json, read_small, save_tensors, write_json
from ddpm.tools.memory import check_memory
from ifmodel import Cascade
from ifmodel.stage import SCHEDULE
from ifmodel.tiny.captions import curated
from ifmodel.tiny.data import show
from ifmodel.tiny.exam import identity_of, kept_judge
from ifmodel.tiny.judge import judged, saturation
from ifmodel.tiny.loading import load_captioned
from ifmodel.tiny.styles import STYLES

GUIDERS = ("plain", "rescaled", "projected")


def main():
    args = arguments()
    path = args.out / "report.json"
    check_writable(path)
    if not args.skip_digits:  # refused before any image is drawn
        load_mnist(args.data, "test")
        check_memory(8 * 28**2 * args.digits, f"{args.digits} digits")
    report = parse_json(read_small(path), path) if path.is_file() else {}
    for part, measure in (("images", measure_images), ("digits", measure_digits)):
        if not getattr(args, f"skip_{part}"):
            report[part] = measure(args)
            if rank() == 0:
                write_json(path, report)
    if rank() == 0:
        draw_figure(args.out / "guidance.png", report, args.seed)


def arguments() -> Namespace:
    options = parser(__doc__)
    add_data_option(options)
    options.add_argument("--emoji", type=Path, default=Path("emoji"), help="what tiny-if learned from (default: emoji)")
    options.add_argument("--curated", action="store_true", help="as in train_if.py")
    options.add_argument("--guidance", type=number, nargs="+", default=[2.0, 5.0, 10.0], help="γ (default: 2 5 10)")
    options.add_argument("--digits", type=positive, default=1000, help="of each kind (default: 1000)")
    options.add_argument("--digit-steps", type=positive, default=50, help="default: 50")
    options.add_argument("--images", type=positive, default=100, help="of each kind (default: 100)")
    options.add_argument("--image-steps", type=positive, default=20, help="of SDE-DPM-Solver++ (default: 20)")
    options.add_argument("--judge-steps", type=positive, default=6000, help="of tiny-if's judge (default: 6000)")
    options.add_argument("--skip-digits", action="store_true")
    options.add_argument("--skip-images", action="store_true")
    add_output_options(options, "out/guidance")
    return options.parse_args()


def guider_of(name: str, schedule: Schedule) -> Guider:
    """One of GUIDERS, new, since a guider may remember."""
    return {"plain": lambda: classifier_free, "rescaled": rescaled, "projected": partial(projected, schedule)}[name]()


def drawn(args: Namespace, what: str, made: str, draw: Callable) -> Iterator[tuple[str, float, Tensor]]:
    """Each guider, γ and their images, draw(guider, γ) or those kept before; of torchrun's processes, in the first.

    made: how they are made, for the names of files
    """
    asked = [(name, gamma) for name in GUIDERS for gamma in args.guidance]

    def path_of(name: str, gamma: float) -> Path:
        return args.out / "drawn" / f"{what}_{name}_g{gamma:g}_{made}_{args.seed}.safetensors"

    for one in tqdm(share(asked, f"kinds of {what}"), what, disable=rank() > 0):
        if not path_of(*one).is_file():
            save_tensors(path_of(*one), {"images": draw(*one)}, {})
    wait()
    for one in asked if rank() == 0 else ():
        yield *one, load_tensors(path_of(*one), ["images"])[0]["images"]


@torch.no_grad()
def measure_digits(args: Namespace) -> dict:
    """For each guider and γ: FID, and the share that is read as asked."""
    model, judge = (load_model(name) for name in ("ddpm_class", "judge"))
    _, real = examine(judge, load_mnist(args.data, "test")[0][: args.digits] / 255)
    schedule, labels = linear_schedule(), [k % 10 for k in range(args.digits)]
    made = f"{args.digits}_{args.digit_steps}_{fingerprint(SHIPPED['ddpm_class'])}"
    seeds, rows = [args.seed + k for k in range(args.digits)], []

    def draw(name: str, gamma: float) -> Tensor:
        options = {"num_steps": args.digit_steps, "guidance_scale": gamma, "guider": guider_of(name, schedule)}
        return sample_digits(model, labels, seeds, schedule, **options)

    for name, gamma, images in drawn(args, "digits", made, draw):
        found, _ = measure_samples(judge, images, torch.tensor(labels), real)
        rows.append({"guider": name, "guidance": gamma, "fid": found["fid"], "hits": found["confirmed"]})
        print(rows[-1])
    return {"count": args.digits, "steps": args.digit_steps, "rows": rows}


def measure_images(args: Namespace) -> dict:
    """For each guider and γ: the share of images that show what was asked for, and their saturation."""
    cascade = Cascade(MODEL)
    side = cascade.sizes[0][0]
    data = load_captioned(args.emoji, side, curated() if args.curated else None, finer=2)
    judge = kept_judge(args.out, data, side, args.judge_steps, args.seed)
    names = torch.randperm(len(data.names), generator=torch.Generator().manual_seed(args.seed))[: args.images]
    prompts = [STYLES["photo"].templates[0].format(data.phrases[name][0]) for name in names.tolist()]
    seeds, rows = [args.seed + k for k in range(len(prompts))], []
    made = f"{len(names)}_{args.image_steps}_{identity_of(MODEL)}"

    def draw(name: str, gamma: float) -> Tensor:
        options = {"sampler": "dpm++", "eta": 1.0, "num_steps": args.image_steps, "progress": False}

        def recipe(stage):
            return stage.estimate(prompts, guidance_scale=gamma, guider=guider_of(name, SCHEDULE))

        return cascade.draw(recipe, seeds=seeds, batch_size=len(seeds), **options).clamp(-1, 1)

    for name, gamma, images in drawn(args, "images", made, draw):
        found = judged(judge, images)[0] == names
        row = {"guider": name, "guidance": gamma, "hits": found.double().mean().item()}
        rows.append({**row, "saturation": saturation(images)})
        print(rows[-1])
    drawings = [data.rows(name, 0)[0] for name in names.tolist() if data.rows(name, 0)]
    real = saturation(show(data, drawings, side, torch.Generator(), variety=0.0)[0])
    return {"count": len(names), "steps": args.image_steps, "saturation": real, "rows": rows}


def draw_figure(path: Path, report: dict, seed: int):
    """Digits' FID, tiny-if's hits, and its colours, against γ."""
    panels = []
    for part, measure, label in (("digits", "fid", "FID"), ("images", "hits", "found"), ("images", "saturation", "")):
        if part in report:
            curves = {guider: {} for guider in GUIDERS}
            for row in report[part]["rows"]:
                curves[row["guider"]][row["guidance"]] = row[measure]
            if measure == "saturation":
                curves["training images"] = report[part]["saturation"]
            title = f"{report[part]['count']} {part}, {report[part]['steps']} steps"
            options = {"xlabel": "guidance γ", "ylabel": label or measure, "ylim": (0, None), "title": title}
            panels.append((curves, options))
    save_curves(path, panels, seed)


if __name__ == "__main__":
    run(main)
