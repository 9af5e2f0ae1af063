"""Images restored by a model that was never trained for it: colours, details and holes, or all at once (DDNM).

    python scripts/restore.py
    python scripts/restore.py --image photo.jpg --prompt "a photo of a dog" --task colour --task upscale --factor 4
    python scripts/restore.py --task upscale --noise 0.2 --sampler ddim

A row for each image and task: the degraded image, restored without a model (bicubic upscaling, no colours, grey in the
hole), restored, and the original. Tasks: colour (the image is grey), upscale (its pixels are the means of --factor ×
--factor), fill (it has a hole, a --mask as in inpaint.py), all (small, grey and with a hole). The result fits the
degraded image exactly, unless that is noisy: --noise adds noise of this standard deviation, in [-1, 1]. --resamples is
the paper's time travel: each stretch of --jump-length steps is noised back and denoised again, so many times.
"""

from argparse import Namespace
from collections.abc import Sequence
from functools import partial

from shared.images import read_image, read_mask, write_table
from shared.options import number, parser, positive, run
from shared.resampling import add_images_options, add_resampling_options, prompts_for, resampling_of
from shared.stages import add_cascade_options, open_cascade, settings_of

import torch
import torch.nn.functional as F

from ddpm.restoration import Degradation, check_operator, psnr
from ifmodel.jobs import Job

TASKS = ("colour", "upscale", "fill", "all")
COLUMNS = ["seen", "without a model", "restored", "original"]
MASK = "circle:0.45,0.55,0.2"


def main():
    args = arguments()
    cascade = open_cascade(args)
    size = cascade.sizes[-1]
    resampling, num_steps = resampling_of(args)
    jobs, rows, labels = [], [], []
    for image, prompt in zip(args.image, args.prompt, strict=True):
        x = read_image(image, size)
        for task in args.task:
            degradation = degradation_of(task, image, size, args)
            check_operator(degradation.operator(), tuple(x.shape[1:]))
            y = degradation.degrade(x, args.seed)
            stages = [degradation.restorer(y.to(cascade.device), stage_size) for stage_size in (cascade.sizes[0], size)]
            jobs.append(Job(prompt, [args.seed], partial(stages[0], **resampling), args.visited, stages[1], num_steps))
            shown = F.interpolate(y, tuple(size), mode="nearest").expand(-1, 3, -1, -1)
            rows.append([shown[0], degradation.baseline(y, size)[0], x[0]])
            labels.append(f"{task}:\n{prompt}")
    restored = cascade.draw_all(jobs, **settings_of(args))
    rows = [[seen, without, result[0], x] for (seen, without, x), result in zip(rows, restored, strict=True)]
    _, without, result, x = (torch.stack(column) for column in zip(*rows, strict=True))
    for label, ours, theirs in zip(labels, psnr(result, x), psnr(without, x), strict=True):
        print(f"{' '.join(label.split())}: PSNR {ours:.1f} dB, without a model {theirs:.1f} dB")
    write_table(args, rows, row_labels=labels, column_labels=COLUMNS)


def arguments() -> Namespace:
    options = parser(__doc__)
    add_images_options(options)
    options.add_argument("--task", action="append", choices=TASKS, help="may be given several times (default: each)")
    options.add_argument("--factor", type=positive, default=4, help="of upscale and all (default: 4)")
    options.add_argument("--mask", help=f"of fill and all, as of inpaint.py (default: {MASK})")
    options.add_argument("--noise", type=number, default=0.0, help="standard deviation of what is seen (default: 0)")
    add_resampling_options(options)
    add_cascade_options(options, out="out/restored.png", stride=30, batched=False)
    args = options.parse_args()
    args.image, args.task = args.image or ["rocket"], args.task or list(TASKS)
    args.prompt = prompts_for(args.image, args)
    if args.mask is not None and not {"fill", "all"} & {*args.task}:
        raise ValueError("--mask is of the tasks fill and all: give one of them as --task, too")
    args.mask = MASK if args.mask is None else args.mask
    if args.noise < 0:
        raise ValueError(f"--noise must not be below 0, it is {args.noise:g}")
    return args


def degradation_of(task: str, image: str, size: Sequence[int], args: Namespace) -> Degradation:
    """What a task takes away from an image of this size."""
    n = args.factor if task in ("upscale", "all") else 1
    mask = read_mask(args.mask, (size[0] // n, size[1] // n), image) if task in ("fill", "all") else None
    return Degradation(task in ("colour", "all"), n, mask, args.noise)


if __name__ == "__main__":
    run(main)
