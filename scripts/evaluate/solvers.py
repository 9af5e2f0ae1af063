"""How far DPM-Solver++ is from the converged image, here and in diffusers, with as many calls of the model.

    python scripts/evaluate/solvers.py
    python scripts/evaluate/solvers.py --eta 1 --steps 5 10 20 --num-images 8

Stage 1 draws --num-images of each prompt along one path of noise, with 200 steps and more, down to t = 0, and with
--steps of them; the number is the root mean square difference, in [-1, 1]. With --eta 1 the noise of a long step is
made of that of the short ones within it, so that all go the same way. Ours is the spacing that is shipped; the others
are diffusers' settings. Prints a table and writes it to --out as JSON; torchrun shares its rows. Needs `pip install -e
".[test]"`.
"""

import math
import sys
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # where shared/ is
from shared.options import add_output_options, check_writable, number, parser, positive, run
from shared.stages import MODEL, model_name

import torch
from torch import Tensor
from tqdm import tqdm

from ddpm.convergence import NoisePath
from ddpm.sampling import Estimate
from ddpm.tools.distributed import gathered, rank, share
from ddpm.tools.files import write_json
from ddpm.tools.memory import check_memory
from ifmodel import load_unet
from ifmodel.stage import SCHEDULE, check_stage, spaced_timesteps, stage_1, stage_threshold
from ifmodel.t5 import embed_prompts

PROMPTS = ["a photo of a dog", "a rocket ship"]
DIFFUSERS = {  # the settings that diffusers documents for this solver
    "linspace": {"timestep_spacing": "linspace"},
    "leading": {"timestep_spacing": "leading"},
    "trailing": {"timestep_spacing": "trailing"},
    "lu lambdas": {"use_lu_lambdas": True},
    "karras": {"use_karras_sigmas": True},
}


def converged_timesteps(eta: float) -> list[int]:
    """Those of 200 steps, and all of the last 20, down to t = 0: on exact mixtures 4e-5 from all 1000 at η = 0."""
    return sorted({*spaced_timesteps("dpm++", 200, eta), *range(20)}, reverse=True)


@torch.no_grad()
def theirs(estimate: Estimate, path: NoisePath, num_steps: int, setting: dict, threshold, eta: float) -> Tensor:
    from diffusers import DPMSolverMultistepScheduler

    settings = threshold.keywords
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2",
        thresholding=True,
        dynamic_thresholding_ratio=settings.get("percentile", 0.95),
        sample_max_value=settings["maximum"],
        lambda_min_clipped=-5.1,  # as diffusers asks for with this schedule
        algorithm_type="sde-dpmsolver++" if eta else "dpmsolver++",
        **setting,
    )
    scheduler.set_timesteps(num_steps)
    scheduler.set_begin_index(0)
    # the timestep of each σ of theirs, √((1-ᾱ) / ᾱ); the last is 0
    visited = [int((path.log_snr + math.log(sigma)).abs().argmin()) for sigma in scheduler.sigmas[:-1].tolist()]
    x_t = path.start(visited[0], eta)
    for k, t in enumerate(scheduler.timesteps):
        last = k + 1 == len(visited) or visited[k] == visited[k + 1]
        noise = torch.zeros_like(x_t) if last else path.between(visited[k], visited[k + 1])
        eps = estimate(x_t, min(int(t), SCHEDULE.num_timesteps - 1))[0]
        x_t = scheduler.step(eps, t, x_t, variance_noise=noise).prev_sample
    return x_t


def main():
    options = parser(__doc__)
    options.add_argument("--model", default=MODEL, type=model_name, metavar="FOLDER_OR_HUB_ID", help="a stage 1")
    options.add_argument("--prompt", action="append", metavar="TEXT", help=f"default: {', '.join(PROMPTS)}")
    options.add_argument("--num-images", type=positive, default=2, help="of each prompt (default: 2)")
    options.add_argument("--steps", type=positive, nargs="+", default=[4, 5, 6, 7, 8, 10, 12, 15, 20, 30, 50])
    options.add_argument("--eta", type=number, nargs="+", default=[0.0, 1.0], help="default: 0 1")
    options.add_argument("--guidance", type=number, default=4.0, help="γ (default: 4)")
    add_output_options(options, "out/solvers.json")
    args = options.parse_args()
    check_writable(args.out, ".json")
    side, prompts = check_stage(args.model, 1).sample_size, args.prompt or PROMPTS
    count = len(prompts) * args.num_images
    check_memory(4 * 3 * side**2 * SCHEDULE.num_timesteps * count, f"the noise of {count} images")
    unet, prompts = load_unet(args.model, pack=True), prompts * args.num_images
    embeds = embed_prompts(args.model, [*prompts, ""])
    estimate = stage_1(unet, torch.stack([embeds[prompt] for prompt in prompts]), embeds[""][None], args.guidance)
    seeds = [args.seed + k // len(args.prompt or PROMPTS) for k in range(len(prompts))]
    path, threshold = NoisePath(SCHEDULE, seeds, (3, side, side)), stage_threshold(args.model, 1)

    @cache
    def converged(eta: float) -> Tensor:
        return path.solve(estimate, converged_timesteps(eta), threshold=threshold, eta=eta)

    def distances(eta: float, name: str) -> Tensor:
        """From the converged image, for each of --steps."""

        def draw(num_steps: int) -> Tensor:
            if name == "ours":
                timesteps = spaced_timesteps("dpm++", num_steps, eta)
                return path.solve(estimate, timesteps, threshold=threshold, eta=eta)
            return theirs(estimate, path, num_steps, DIFFUSERS[name], threshold, eta)

        images = torch.stack([draw(n) for n in tqdm(args.steps, desc=f"{name}, η = {eta:g}", leave=False)])
        return (images - converged(eta)).square().flatten(1).mean(1).sqrt()

    rows = [(eta, name) for eta in args.eta for name in ("ours", *DIFFUSERS)]
    found = gathered([distances(*row) for row in share(rows, "rows")], [(len(args.steps),) for _ in rows])
    if rank() > 0:
        return
    print(f"{len(prompts)} images of {side} × {side}, steps {args.steps}")
    report = {}
    for (eta, name), row in zip(rows, found, strict=True):
        report[f"{name}, eta = {eta:g}"] = dict(zip(args.steps, row.tolist(), strict=True))
        print(f"{name:12} η = {eta:<4g}" + "".join(f"{distance:8.3f}" for distance in row.tolist()))
    write_json(args.out, report)
    print(args.out)


if __name__ == "__main__":
    run(main)
