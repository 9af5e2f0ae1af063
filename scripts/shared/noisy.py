"""What A1 to A4 share: an image, noised."""

from argparse import ArgumentParser, Namespace

from shared.images import DRAWINGS, read_image
from shared.options import add_output_options, check_not_overwritten, check_writable, positive

from torch import Tensor

from ddpm.process import add_noise
from ddpm.sampling import noise_source
from ddpm.tools.memory import check_memory
from ifmodel.stage import SCHEDULE

TIMESTEPS = list(range(0, 1000, 125))


def add_image_option(options: ArgumentParser):
    options.add_argument("--image", default="face", metavar="FILE", help=f"or a drawing of ours: {', '.join(DRAWINGS)}")


def add_noisy_options(options: ArgumentParser, out: str | None = None):
    """--image and --timesteps; with `out`, for scripts without a model, also --size, --seed and --out."""
    add_image_option(options)
    listed = ", ".join(map(str, TIMESTEPS))
    options.add_argument("--timesteps", type=int, nargs="+", default=TIMESTEPS, metavar="T", help=f"default: {listed}")
    if out is not None:
        options.add_argument("--size", type=positive, default=64, help="height and width (default: 64)")
        add_output_options(options, out)


def noisy_images(args: Namespace, size: tuple[int, int]) -> tuple[list[Tensor], list[str]]:
    """--image [3, H, W] in [-1, 1] at each of --timesteps, the noise always that of --seed, and labels."""
    check_writable(args.out, ".png")
    check_not_overwritten(args)
    for t in args.timesteps:
        if not 0 <= t < SCHEDULE.num_timesteps:
            raise ValueError(f"--timesteps must be from 0 to {SCHEDULE.num_timesteps - 1}, not {t}")
    count, (h, w) = len(args.timesteps), size
    check_memory(4 * 3 * 4 * count * h * w, f"{count} images of {h} × {w}")
    x_0 = read_image(args.image, size)
    noisy = []
    for t in args.timesteps:
        noise = noise_source([args.seed], x_0.shape[1:])
        noisy.append(add_noise(x_0, noise(), t, SCHEDULE)[0])
    return noisy, [f"t = {t}" for t in args.timesteps]
