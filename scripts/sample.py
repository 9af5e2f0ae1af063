"""A5 and A6: images from pure noise, without guidance and with it, side by side.

    python scripts/sample.py

Rows: γ = 1 and --guidance (default: 7, or 2 with tiny-if), for each prompt and the same noise; columns: seeds.
"""

from shared.images import write_table
from shared.options import parser, positive, run
from shared.stages import MODEL, add_cascade_options, draw, open_cascade

from ifmodel.jobs import Job
from ifmodel.tiny.captions import ANYTHING

TINY_PROMPT = "a photo of an owl"  # tiny-if's best


def main():
    options = parser(__doc__)
    default = f"may be given several times (default: {ANYTHING!r}; with tiny-if {TINY_PROMPT!r} too)"
    options.add_argument("--prompt", action="append", metavar="TEXT", help=default)
    options.add_argument("--num-images", type=positive, default=5, help="default: 5")
    add_cascade_options(options, out="out/sample.png", stride=30)
    args = options.parse_args()
    prompts = args.prompt or ([TINY_PROMPT, ANYTHING] if args.model == MODEL else [ANYTHING])
    cascade = open_cascade(args)
    seeds = range(args.seed, args.seed + args.num_images)
    guidance = cascade.stages[0].settings["guidance_scale"] if args.guidance is None else args.guidance
    lines = [(prompt, scale) for prompt in prompts for scale in (1.0, guidance)]

    def job(prompt: str, scale: float) -> Job:
        return Job(lambda stage: stage.estimate(prompt, guidance_scale=scale), seeds, timesteps=args.visited)

    rows = draw(cascade, [job(*line) for line in lines], args)
    labels = [f"γ = {scale:g}" + (f":\n{prompt}" if len(prompts) > 1 else "") for prompt, scale in lines]
    title = prompts[0] if len(prompts) == 1 else ""
    columns = [f"seed {seed}" for seed in seeds]
    write_table(args, rows, row_labels=labels, column_labels=columns, title=title)


if __name__ == "__main__":
    run(main)
