"""Text to image (A0): small images by stage 1, enlarged by stage 2.

    python scripts/generate.py --prompt "a photo of a dog" --out out/dog.png
    python scripts/generate.py --steps-grid 4 6 8 12 20
    python scripts/generate.py --model DeepFloyd/IF-I-XL-v1.0 --upscaler DeepFloyd/IF-II-L-v1.0 \\
        --prompt "a rocket ship" --prompt "a man wearing a hat" --num-images 4 --out out/grid.png
    torchrun --nproc-per-node 2 scripts/generate.py --prompts prompts.txt --out out/images

A model is a folder as diffusers saves it, or a Hub id; by default the shipped tiny-if/I and tiny-if/II. One prompt and
one seed give the bare image; more give a labelled grid, and each image in a file of its own. Image k of a prompt starts
from seed + k, in both stages. --steps-grid draws every prompt with several numbers of steps. The prompts are the
assignment's three, or all of --embeds, unless others are given. A prompt may combine several with weights: "a dog AND a
hat :0.5 AND snow :-1" is all of the first (1 if none is given), some of the second, and none of the third. T5 runs only
for prompts that --embeds and the cache do not know, and is freed before a UNet is loaded; stage 1 is freed before stage
2 is loaded unless both fit. --prompts FILE, a prompt on each line, with weights or without, fills the folder --out with
00000.png, 00001.png, …, each written when it is ready; run again after a stop, it draws what is missing. Under torchrun
each process, one for a GPU or several on the CPU, draws its share of the batches: the same images as one process.
"""

from pathlib import Path

from shared.images import write_table
from shared.options import parser, positive, run
from shared.stages import add_cascade_options, draw, open_cascade, prompts_of, settings_of

from ddpm.tools.distributed import rank
from ddpm.tools.figures import save_image
from ifmodel.embeds import read_prompts
from ifmodel.folder import draw_folder
from ifmodel.jobs import Job, parse_prompt
from ifmodel.stage import spaced_timesteps

A0_PROMPTS = ["an oil painting of a snowy mountain village", "a man wearing a hat", "a rocket ship"]


def main():
    options = parser(__doc__)
    options.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    help = "a prompt on each line, for a folder of images, --out"
    options.add_argument("--prompts", type=Path, metavar="FILE", help=help)
    options.add_argument("--num-images", type=positive, default=1, help="images of each prompt (default: 1)")
    options.add_argument("--steps-grid", type=positive, nargs="+", metavar="N", help="a row for each number of steps")
    add_cascade_options(options, out="out/generated.png")
    args = options.parse_args()
    if args.prompts:
        if args.prompt or args.steps_grid:
            raise ValueError("--prompts has all prompts, and an image of each: leave --prompt and --steps-grid")
        if args.out == options.get_default("out"):
            args.out = args.out.with_suffix("")
        return draw_prompts(args)
    if args.steps_grid:
        return draw_steps_grid(args)

    cascade = open_cascade(args)
    prompts = prompts_of(args, cascade, A0_PROMPTS)
    seeds = range(args.seed, args.seed + args.num_images)
    jobs = [Job(parse_prompt(prompt, args.null_prompt), seeds, timesteps=args.visited) for prompt in prompts]
    rows = draw(cascade, jobs, args)
    if len(rows) == len(seeds) == 1:
        save_image(args.out, rows[0][0] / 2 + 0.5, seed=args.seed)
        print(args.out)
    else:
        write_table(args, rows, row_labels=prompts, column_labels=[f"seed {seed}" for seed in seeds])


def draw_prompts(args):
    """--num-images of every line of --prompts, into the folder --out."""
    if args.out.suffix == ".png":
        raise ValueError(f"--prompts fills a folder with images: --out names it, and {args.out} would be a file")
    prompts, seeds = read_prompts(args.prompts), range(args.seed, args.seed + args.num_images)
    if not prompts:
        raise ValueError(f"{args.prompts} is empty: it must have a prompt on each line")
    cascade = open_cascade(args, out=args.out / "00000.png")
    draw_folder(cascade, prompts, args.out, seeds=seeds, timesteps=args.visited, **settings_of(args))
    if rank() == 0:
        print(args.out)


def draw_steps_grid(args):
    """Rows: numbers of steps; columns: prompts; all from the same seed."""
    if args.steps is not None or args.stride is not None or args.num_images > 1:
        raise ValueError(
            "--steps-grid gives the steps, with an image of each: leave --steps, --stride and --num-images"
        )
    cascade = open_cascade(args)
    prompts = prompts_of(args, cascade, A0_PROMPTS)
    if composed := [prompt for prompt in prompts if callable(parse_prompt(prompt, ""))]:
        raise ValueError(f"--steps-grid draws prompts without weights, not {composed[0]!r}")
    jobs = [
        Job(prompts, [args.seed] * len(prompts), timesteps=spaced_timesteps(args.sampler, num_steps, args.eta))
        for num_steps in args.steps_grid
    ]
    rows = draw(cascade, jobs, args)
    labels = [f"{num_steps} steps" for num_steps in args.steps_grid]
    write_table(args, rows, row_labels=labels, column_labels=prompts)


if __name__ == "__main__":
    run(main)
