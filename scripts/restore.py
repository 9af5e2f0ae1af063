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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from shared.figures import save_table
from shared.images import read_image, read_mask
from shared.options import number, parser, positive, run
from shared.resampling import add_images_options, add_resampling_options, prompts_for, resampling_of
from shared.stages import add_cascade_options, open_cascade, settings_of

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm.restoration import Operator, chain, check_operator, downscale, grey, hole, psnr, restore
from ddpm.sampling import noise_source
from ifmodel.jobs import Job

TASKS = ("colour", "upscale", "fill", "all")
COLUMNS = ["seen", "without a model", "restored", "original"]
MASK = "circle:0.45,0.55,0.2"


@dataclass(frozen=True)
class Lost:
    """What an image [1, 3, S, S] has lost: colours, details (means of n × n pixels), and what was in the hole.

    mask: [1, 1, S/n, S/n]; noise_std: of what is seen
    """

    grey: bool
    n: int
    mask: Tensor | None
    noise_std: float

    @classmethod
    def by_task(cls, task: str, factor: int, mask_of: Callable[[int], Tensor], noise_std: float) -> "Lost":
        """mask_of(n): the hole in an image that is 1/n as large."""
        n = factor if task in ("upscale", "all") else 1
        return cls(task in ("colour", "all"), n, mask_of(n) if task in ("fill", "all") else None, noise_std)

    def operator(self, n: int | None = None, mask: Tensor | None = None) -> Operator:
        """A; with another n and mask that of another stage."""
        n, mask = n or self.n, self.mask if mask is None else mask
        return chain(*[grey()] * self.grey, downscale(n), *([] if mask is None else [hole(mask)]))

    def seen(self, x: Tensor, seed: int) -> Tensor:
        """y, of which nothing is known in the hole."""
        y = self.operator().of(x)
        y = y + self.noise_std * noise_source([seed], y.shape[1:])()
        return y if self.mask is None else hole(self.mask).of(y)

    def restoring(self, y: Tensor, size: Sequence[int], **options) -> Callable[..., Tensor]:
        """The algorithm of a stage that draws images of this size; y may be larger than they are."""
        h = size[0]
        if h >= y.shape[-2]:
            return partial(restore, y=y, operator=self.operator(h // y.shape[-2]), noise_std=self.noise_std, **options)
        r = y.shape[-2] // h  # what is seen is larger than the image: its means are, and no hole touches them
        mask = None if self.mask is None else F.max_pool2d(self.mask, r)
        options |= {"operator": self.operator(1, mask), "noise_std": self.noise_std / r}
        return partial(restore, y=F.avg_pool2d(y, r), **options)

    def without_a_model(self, y: Tensor, size: Sequence[int]) -> Tensor:
        """Bicubic, in grey if colours are lost, and grey in the hole."""
        return F.interpolate(y, tuple(size), mode="bicubic").clamp(-1, 1).expand(-1, 3, -1, -1)


def main():
    args = arguments()
    cascade = open_cascade(args)
    size = cascade.sizes[-1]
    resampling, num_steps = resampling_of(args)
    jobs, rows, labels = [], [], []
    for image, prompt in zip(args.image, args.prompt, strict=True):
        x = read_image(image, size)
        for task in args.task:
            lost = Lost.by_task(task, args.factor, partial(mask_at, args.mask, size, image), args.noise)
            check_operator(lost.operator(), tuple(x.shape[1:]))
            y = lost.seen(x, args.seed)
            stages = [lost.restoring(y.to(cascade.device), stage_size) for stage_size in (cascade.sizes[0], size)]
            jobs.append(Job(prompt, [args.seed], partial(stages[0], **resampling), args.visited, stages[1], num_steps))
            shown = F.interpolate(y, tuple(size), mode="nearest").expand(-1, 3, -1, -1)
            rows.append([shown[0], lost.without_a_model(y, size)[0], x[0]])
            labels.append(f"{task}:\n{prompt}")
    restored = cascade.draw_all(jobs, **settings_of(args))
    rows = [[seen, without, result[0], x] for (seen, without, x), result in zip(rows, restored, strict=True)]
    _, without, result, x = (torch.stack(column) for column in zip(*rows, strict=True))
    for label, ours, theirs in zip(labels, psnr(result, x), psnr(without, x), strict=True):
        print(f"{' '.join(label.split())}: PSNR {ours:.1f} dB, without a model {theirs:.1f} dB")
    save_table(args.out, rows, row_labels=labels, column_labels=COLUMNS, seed=args.seed)


def arguments() -> Namespace:
    options = parser(__doc__)
    add_images_options(options)
    options.add_argument("--task", action="append", choices=TASKS, help="may be given several times (default: each)")
    options.add_argument("--factor", type=positive, default=4, help="of upscale and all (default: 4)")
    options.add_argument("--mask", default=MASK, help=f"of fill and all, as of inpaint.py (default: {MASK})")
    options.add_argument("--noise", type=number, default=0.0, help="standard deviation of what is seen (default: 0)")
    add_resampling_options(options)
    add_cascade_options(options, out="out/restored.png", stride=30)
    args = options.parse_args()
    args.image, args.task = args.image or ["rocket"], args.task or list(TASKS)
    args.prompt = prompts_for(args.image, args)
    if args.noise < 0:
        raise ValueError(f"--noise must not be below 0, it is {args.noise:g}")
    return args


def mask_at(source: str, size: Sequence[int], image: str, n: int) -> Tensor:
    """The hole in what is seen of an image, 1/n as large."""
    return read_mask(source, (size[0] // n, size[1] // n), image)


if __name__ == "__main__":
    run(main)
