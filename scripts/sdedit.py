"""A7 and A8: image to image with SDEdit: images noised to several timesteps, and denoised from there.

    python scripts/sdedit.py --image photo.jpg --image drawing.png
    python scripts/sdedit.py --image photo.jpg \\
        --prompt "a rocket ship" --prompt "a photo of a dog" --prompt "a man wearing a hat"

A row for each image and prompt; columns: how many steps are left out, 1 to 20 (the more, the more of the image
stays), and the image itself. An image is a file, or a drawing of ours: village, rocket, face. The prompt is "a high
quality photo" unless said otherwise; with tiny-if our drawings come with prompts of their own before it.
"""

from functools import partial
from pathlib import Path

from shared.images import DRAWING_PROMPTS, DRAWINGS, read_image, write_table
from shared.options import parser, run
from shared.stages import MODEL, add_cascade_options, draw, from_index, open_cascade

import torch

from ddpm.sampling import sdedit
from ifmodel.jobs import Job
from ifmodel.tiny.captions import ANYTHING


def main():
    options = parser(__doc__)
    options.add_argument("--image", action="append", metavar="FILE", help="may be given several times")
    options.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    default = "default: those of 1 3 5 7 10 20 that there are"
    options.add_argument("--i-start", type=int, nargs="+", metavar="I", help=default)
    add_cascade_options(options, out="out/sdedit.png", stride=30)
    args = options.parse_args()
    images, prompts = args.image or list(DRAWINGS), args.prompt or [ANYTHING]
    lines = [(image, prompt) for image in images for prompt in prompts]
    if args.model == MODEL and not args.prompt:
        lines = [(image, DRAWING_PROMPTS[image]) for image in images if image in DRAWING_PROMPTS] + lines
    cascade = open_cascade(args)
    args.i_start = args.i_start or [i for i in (1, 3, 5, 7, 10, 20) if i < len(args.visited)] or [0]
    counts = {i_start: len(from_index(args.visited, i_start)) for i_start in args.i_start}
    small, originals = (
        torch.cat([read_image(image, size) for image, _ in lines]) for size in (cascade.sizes[0], cascade.sizes[-1])
    )

    def job(rows: slice, i_start: int) -> Job:
        algorithm = partial(sdedit, x_0=small[rows].to(cascade.device), i_start=i_start)
        prompts = [prompt for _, prompt in lines[rows]]
        return Job(prompts, [args.seed] * len(prompts), algorithm, args.visited, num_steps=counts[i_start])

    parts = [slice(first, first + args.batch_size) for first in range(0, len(lines), args.batch_size)]
    drawn = draw(cascade, [job(rows, i_start) for i_start in args.i_start for rows in parts], args)
    columns = torch.cat(drawn).unflatten(0, (len(args.i_start), len(lines)))
    rows = [[*row, original] for row, original in zip(columns.transpose(0, 1), originals, strict=True)]
    row_labels = [f"{Path(image).name}:\n{prompt}" if len(images) > 1 else prompt for image, prompt in lines]
    column_labels = [*(f"i_start = {i_start}" for i_start in args.i_start), "original"]
    write_table(args, rows, row_labels=row_labels, column_labels=column_labels)


if __name__ == "__main__":
    run(main)
