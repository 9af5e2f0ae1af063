"""Measure the MNIST models with an independent judge, a CNN trained on real digits.

    python scripts/evaluate/mnist.py --data data
    python scripts/evaluate/mnist.py --data data --samples 1000 --steps 50 --guidance 0 1 2 5
    python scripts/evaluate/mnist.py --data data --samples 500 --guidance 1 --evaluations 5 10 20 50 100 300

For each guidance: the share of samples that the judge reads as the digit asked for, and the Fréchet distance
(FID, on the judge's penultimate features) between the samples and as many real test digits. The floor is the
same distance for as many real training digits. A time-conditioned model (--weights, a DDPM or a flow) is asked for no
digit: its samples have the distance alone. For the denoiser: the test error at every noise level of B1.
--evaluations: instead, the DDPM and the flow, each with its samplers, where the model is asked so often for a digit.

Writes report.json, guidance.png and the misread samples to --out, or samplers.json and .png with --evaluations. All
samples are kept there too, a hundred to a file: a stopped evaluation goes on where it was. torchrun shares these files
among its processes.
"""

import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # where shared/ is
from shared.options import add_common_options, add_data_option, check_writable, number, parser, pick, positive, run

import torch
from torch import Tensor
from tqdm import tqdm

from ddpm.mnist import ClassFlow, ClassUNet, TimeFlow, TimeUNet, UNet
from ddpm.mnist.checkpoint import SHIPPED, load_model, save_weights, weights_file
from ddpm.mnist.data import load_mnist
from ddpm.mnist.judge import Judge, examine, frechet_distance, measure_samples, train_judge
from ddpm.mnist.sampling import FLOW_SAMPLERS, SAMPLERS, pick_sampling
from ddpm.mnist.training import SIGMAS, denoiser_error
from ddpm.tools.distributed import rank, share, wait
from ddpm.tools.figures import save_curves, save_grid
from ddpm.tools.files import fingerprint, load_tensors, save_tensors, write_json
from ddpm.tools.memory import check_memory

CHUNK = 100
DRAWING = (ClassUNet, TimeUNet, ClassFlow, TimeFlow)
CURVES = ("ddpm_class:ddpm", "ddpm_class:ddim", "ddpm_class:dpm++", "flow_class:euler", "flow_class:heun")
JUDGE_EPOCHS = 6


@dataclass(frozen=True)
class Drawn:
    """How samples are drawn: by which model and sampler, in how many steps, with which guidance."""

    weights: Path
    sampler: str
    steps: int
    guidance: float


def main():
    args = arguments()
    args.device, args.dtype = pick(args)
    device = args.device
    check_writable(args.out / "report.json")
    check_memory(8 * 28**2 * args.samples, f"{args.samples} digits")
    model, denoiser = load_model(args.weights, DRAWING, device), load_model(args.denoiser, UNet, device)
    train, test = ([tensor.to(device) for tensor in load_mnist(args.data, part)] for part in ("train", "test"))
    conditioned = isinstance(model, (ClassUNet, ClassFlow))
    sampler = args.sampler or ("euler" if isinstance(model, TimeFlow) else "ddpm")
    scales = args.guidance if conditioned else [1.0]
    guided = [Drawn(args.weights, sampler, args.steps, guidance) for guidance in scales]
    for how in drawn_for_curves(args).values() if args.evaluations else guided:
        draw_samples(how, args)
    wait()
    if rank() > 0:
        return
    judge = get_judge(args, *train)
    report, real = measure_real(judge, train[0], *test, args)
    if args.evaluations:
        compare_samplers(judge, real, report, args)
        return
    if conditioned:
        report["guidance"] = [measure_guidance(how, judge, real, args) for how in guided]
        draw_guidance(args.out / "guidance.png", report, args.seed)
    else:
        report |= measure_samples(judge, load_samples(guided[0], args).to(device), None, real)[0]
        print(f"without labels: FID {report['fid']:.2f} ({len(real)} samples)")
    print("denoiser, mean squared error on test digits (without it: σ²)")
    x, report["denoiser_mse"] = test[0][: args.digits] / 255, {}
    for sigma in tqdm(SIGMAS, desc="denoiser", unit="σ", leave=False):
        error = report["denoiser_mse"][str(sigma)] = denoiser_error(denoiser, x, sigma, args.seed)
        tqdm.write(f"σ = {sigma}: {error:.5f} ({sigma**2:.2f})")
    write_json(args.out / "report.json", report)
    print(args.out / "report.json")


def measure_real(
    judge: Judge, train_images: Tensor, images: Tensor, labels: Tensor, args: Namespace
) -> tuple[dict[str, float], Tensor]:
    """How often the judge is right, and the floor; and the features of the test digits to compare samples with."""
    read, real = examine(judge, images / 255)
    real = real[: min(args.samples, len(train_images))]
    _, train_features = examine(judge, train_images[: len(real)] / 255)
    accuracy, floor = (read == labels.cpu()).double().mean().item(), frechet_distance(train_features, real)
    print(f"judge: {accuracy:.2%} of the {len(images)} test digits")
    print(f"floor: FID {floor:.2f}, {len(real)} real training digits against {len(real)} test digits")
    return {"judge_accuracy": accuracy, "samples": args.samples, "steps": args.steps, "fid_floor": floor}, real


def measure_guidance(how: Drawn, judge: Judge, real: Tensor, args: Namespace) -> dict[str, float]:
    """The share confirmed and the FID of samples with guidance; those that are misread, as an image."""
    images, labels = load_samples(how, args), torch.arange(args.samples) % 10
    measures, read = measure_samples(judge, images.to(args.device), labels, real)
    print(f"γ = {how.guidance:g}: {told(measures)} ({len(real)} samples)")
    misread = {str(digit): images[(labels == digit) & (read != digit)][:15] for digit in range(10)}
    if misread := {digit: rows for digit, rows in misread.items() if len(rows)}:
        title, path = f"γ = {how.guidance:g}: read as another digit than the row's", f"misread_g{how.guidance:g}.png"
        save_grid(args.out / path, list(misread.values()), row_labels=list(misread), title=title, seed=args.seed)
    return {"guidance": how.guidance, **measures}


def told(measures: dict[str, float]) -> str:
    return f"{measures['confirmed']:.2%} confirmed, FID {measures['fid']:.2f}"


def arguments() -> Namespace:
    options = parser(__doc__)
    add_data_option(options)
    options.add_argument("--weights", type=Path, default=SHIPPED["ddpm_class"], help="a DDPM or flow (default: B5)")
    options.add_argument("--denoiser", type=Path, default=SHIPPED["denoiser"], help="a one-step denoiser")
    options.add_argument("--train-judge", action="store_true", help="train the judge again, into --out, and use it")
    options.add_argument("--samples", type=positive, default=10_000, help="samples for each guidance (default: 10000)")
    options.add_argument("--guidance", type=number, nargs="+", default=[5.0], help="one or more γ (default: 5)")
    options.add_argument("--steps", type=positive, default=300, help="timesteps to visit (default: 300)")
    options.add_argument("--sampler", choices=[*SAMPLERS, *FLOW_SAMPLERS], help="default: ddpm; with a flow, euler")
    help = "compare samplers; γ is the first --guidance"
    options.add_argument("--evaluations", type=positive, nargs="+", metavar="N", help=help)
    options.add_argument("--curves", nargs="+", default=CURVES, metavar="WEIGHTS:SAMPLER", help=" ".join(CURVES))
    help = "test digits for the denoiser (default: 10000)"
    options.add_argument("--digits", type=positive, default=10_000, help=help)
    add_common_options(options, "out/evaluation")
    args = options.parse_args()
    args.weights = weights_file(args.weights)
    for curve in args.curves:
        if curve.rpartition(":")[2] not in (*SAMPLERS, *FLOW_SAMPLERS):
            raise ValueError(f"--curves are WEIGHTS:SAMPLER, such as {CURVES[0]}, not {curve}")
    if args.samples < 2:
        raise ValueError("--samples must be at least 2: one digit has no covariance")
    return args


def get_judge(args, images: Tensor, labels: Tensor) -> Judge:
    """The shipped judge or, with --train-judge, one that is trained into --out."""
    path = SHIPPED["judge"]
    if args.train_judge:
        path = args.out / "judge.safetensors"
        judge = train_judge(images, labels, epochs=JUDGE_EPOCHS, seed=args.seed)
        save_weights(path, judge, {"digits": len(images), "epochs": JUDGE_EPOCHS})
    return load_model(path, Judge, images.device)


def files_of(how: Drawn, args: Namespace) -> dict[int, Path]:
    """The files that keep these samples, by the number of the first in each."""
    dtype = str(args.dtype).removeprefix("torch.")
    name = f"{fingerprint(how.weights)}_g{how.guidance:g}_s{how.steps}_{dtype}_{args.seed}"
    folder = args.out / "samples" / (name + f"_{how.sampler}" * (how.sampler not in ("ddpm", "euler")))
    return {start: folder / f"{start:06d}.safetensors" for start in range(0, args.samples, CHUNK)}


def draw_samples(how: Drawn, args: Namespace):
    """Draw samples k = 0 … of the digits k mod 10 from seeds seed + k, in chunks that are kept on disk."""
    model = load_model(how.weights, DRAWING, args.device)
    _, draw = pick_sampling(model, how.steps, how.sampler)
    files = share(list(files_of(how, args).items()), f"files of {CHUNK} samples")
    for start, path in tqdm(files, desc=f"γ = {how.guidance:g}", unit=f"{CHUNK} digits", disable=rank() > 0):
        if not path.exists():
            numbers = range(start, start + CHUNK)
            labels, seeds = [k % 10 for k in numbers], [args.seed + k for k in numbers]
            asked = labels if isinstance(model, (ClassUNet, ClassFlow)) else None
            with torch.autocast(args.device.type, args.dtype, enabled=args.dtype != torch.float32):
                chunk = draw(model, asked, seeds, guidance_scale=how.guidance)
            save_tensors(path, {"images": chunk, "labels": torch.tensor(labels)}, {})


def load_samples(how: Drawn, args: Namespace) -> Tensor:
    """Samples [N, 1, 28, 28] that were drawn."""
    chunks = [load_tensors(path, ["images"])[0]["images"] for path in files_of(how, args).values()]
    return torch.cat(chunks)[: args.samples]


def drawn_for_curves(args: Namespace) -> dict[tuple[str, int], Drawn]:
    """What each of --curves draws with each number of --evaluations, of which heun takes two a step."""
    drawn = {}
    for curve in args.curves:
        weights, _, sampler = curve.rpartition(":")
        for evaluations in args.evaluations:
            if steps := evaluations // 2 if sampler == "heun" else evaluations:
                path = SHIPPED.get(weights, Path(weights))
                drawn[curve, evaluations] = Drawn(path, sampler, steps, args.guidance[0])
    return drawn


def compare_samplers(judge: Judge, real: Tensor, report: dict, args: Namespace):
    """The share confirmed and FID of each of --curves at each number of evaluations, as samplers.json and .png."""
    del report["steps"]
    report |= {"guidance": args.guidance[0], "curves": {curve: [] for curve in args.curves}}
    labels = torch.arange(args.samples) % 10
    for (curve, evaluations), how in drawn_for_curves(args).items():
        measures, _ = measure_samples(judge, load_samples(how, args).to(args.device), labels, real)
        report["curves"][curve].append({"evaluations": evaluations, **measures})
        print(f"{curve}, {evaluations} evaluations: {told(measures)}", flush=True)
    draw_samplers(args.out / "samplers.png", report, args.seed)
    write_json(args.out / "samplers.json", report)
    print(args.out / "samplers.json")


def draw_samplers(path: Path, report: dict, seed: int):
    """FID and confirmed share against evaluations, a line for each sampler."""
    panels = []
    for key, label in (("fid", "FID"), ("confirmed", "read as asked")):
        curves = {name: {row["evaluations"]: row[key] for row in rows} for name, rows in report["curves"].items()}
        panels.append((curves, {"xscale": "log", "xlabel": "evaluations", "ylabel": label}))
    panels[0][0]["real training digits"] = report["fid_floor"]
    panels[0][1]["yscale"] = "log"
    save_curves(path, panels, seed, f"{report['samples']} samples, γ = {report['guidance']:g}")


def draw_guidance(path: Path, report: dict, seed: int):
    """FID and confirmed share against guidance."""
    rows, options = sorted(report["guidance"], key=lambda row: row["guidance"]), {"xlabel": "guidance γ"}
    fid, confirmed = ({row["guidance"]: row[key] for row in rows} for key in ("fid", "confirmed"))
    distances = {"samples": fid, "real training digits": report["fid_floor"]}
    panels = [(distances, {**options, "ylabel": "FID", "ylim": (0, None)})]
    panels.append(({"": confirmed}, {**options, "ylabel": "read as asked"}))
    save_curves(path, panels, seed, f"{report['samples']} samples, {report['steps']} steps")


if __name__ == "__main__":
    run(main)
