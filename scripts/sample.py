"""A5 and A6: pictures from pure noise, without guidance and with it, side by side.

    python scripts/sample.py

Rows: γ = 1 and --guidance (default: 7, or 4 with tiny-if), for the same prompt and noise; columns: seeds.
"""

from common import parser, positive, run
from figures import save_table
from stages import Cascade, Cell, add_cascade_options


def main():
    options = parser(__doc__)
    options.add_argument("--prompt", default="a high quality photo", metavar="TEXT", help="default: %(default)r")
    options.add_argument("--num-images", type=positive, default=5, help="default: 5")
    add_cascade_options(options, out="out/sample.png", stride=30)
    args = options.parse_args()
    cascade = Cascade(args, [args.prompt])
    seeds = range(args.seed, args.seed + args.num_images)
    rows = cascade.draw([Cell(cascade.plain(args.prompt, guidance), seeds) for guidance in (1.0, args.guidance)])
    labels = ["γ = 1", f"γ = {args.guidance:g}"]
    columns = [f"seed {seed}" for seed in seeds]
    save_table(args.out, rows, row_labels=labels, column_labels=columns, title=args.prompt, seed=args.seed)


if __name__ == "__main__":
    run(main)
