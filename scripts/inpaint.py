"""A9: holes in images, filled.

    python scripts/inpaint.py --image photo.jpg --mask mask.png
    python scripts/inpaint.py --image photo.jpg --mask circle:0.3,0.5,0.2 \\
        --jump-length 10 --resamples 5

A row for each image: original, mask (white is the hole), hole to fill, result. A mask is a file as large as its
image, cut to shape in the same way, or rectangle:TOP,LEFT,BOTTOM,RIGHT or circle:Y,X,RADIUS in fractions of what is
cut out; one for each image, or one for all.
--resamples: as in RePaint, each stretch of --jump-length steps is noised back and denoised again, so many times.
"""

from functools import partial

from shared.images import DRAWINGS, read_image, read_mask, write_table
from shared.options import parser, run
from shared.resampling import add_images_options, add_resampling_options, for_each, prompts_for, resampling_of
from shared.stages import add_cascade_options, draw, open_cascade

import torch

from ddpm.sampling import inpaint
from ifmodel.jobs import Job

MASKS = ["rectangle:0.5,0.05,0.95,0.5", "circle:0.45,0.5,0.2", "rectangle:0.05,0.1,0.42,0.9"]  # for DRAWINGS


def main():
    options = parser(__doc__)
    add_images_options(options)
    options.add_argument("--mask", action="append", metavar="MASK", help="one for each image, or one for all")
    add_resampling_options(options)
    add_cascade_options(options, out="out/inpaint.png", stride=30)
    args = options.parse_args()
    images = args.image or list(DRAWINGS)
    masks = for_each(images, "--mask", args.mask or (["circle:0.5,0.5,0.25"] if args.image else MASKS))
    prompts = prompts_for(images, args)
    cascade = open_cascade(args)
    resampling, num_steps = resampling_of(args)

    def at(size):
        pairs = zip(images, masks, strict=True)
        x_orig = torch.cat([read_image(image, size) for image in images])
        return {"x_orig": x_orig, "mask": torch.cat([read_mask(mask, size, image) for image, mask in pairs])}

    def filling(known, **options):
        return partial(inpaint, **{name: x.to(cascade.device) for name, x in known.items()}, **options)

    known, seeds = at(cascade.sizes[-1]), [args.seed] * len(images)
    fill = filling(at(cascade.sizes[0]), **resampling)
    filled = draw(cascade, [Job(prompts, seeds, fill, args.visited, filling(known), num_steps)], args)[0]
    x_orig, mask = known.values()
    shown = [x_orig, (2 * mask - 1).expand(-1, 3, -1, -1), torch.where(mask > 0, 0.0, x_orig), filled]
    rows = list(zip(*shown, strict=True))
    columns = ["original", "mask", "hole to fill", "result"]
    labels = {"title": prompts[0]} if len(set(prompts)) == 1 else {"row_labels": prompts}
    write_table(args, rows, column_labels=columns, **labels)


if __name__ == "__main__":
    run(main)
