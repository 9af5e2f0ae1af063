"""What inpaint and restore share: images with a prompt each, and steps that are taken several times (RePaint)."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from shared.images import DRAWING_PROMPTS
from shared.options import positive
from shared.stages import MODEL

from ddpm.sampling import resampling_path
from ifmodel.tiny.captions import ANYTHING


def add_images_options(options: ArgumentParser):
    """--image and --prompt."""
    options.add_argument("--image", action="append", metavar="FILE", help="may be given several times")
    default = f"one for each image, or one for all (default: {ANYTHING!r}; our drawings' own with tiny-if)"
    options.add_argument("--prompt", action="append", metavar="TEXT", help=default)


def add_resampling_options(options: ArgumentParser):
    """--jump-length and --resamples."""
    options.add_argument("--jump-length", type=positive, default=10, help="steps to go back (default: 10)")
    options.add_argument("--resamples", type=positive, default=1, help="times to do them, 1 for once (default: 1)")


def prompts_for(images: Sequence[str], args: Namespace) -> list[str]:
    """A prompt for each image. Raises ValueError when --prompt has another number."""
    own = DRAWING_PROMPTS if args.model == MODEL else {}
    return for_each(images, "--prompt", args.prompt or [own.get(image, ANYTHING) for image in images])


def for_each(images: Sequence[str], option: str, given: Sequence[str]) -> list[str]:
    """What was given for each of the images, or for all of them. Raises ValueError for another number."""
    given = list(given) * len(images) if len(given) == 1 else list(given)
    if len(given) != len(images):
        raise ValueError(f"give one {option}, or one for each of the {len(images)} images, not {len(given)}")
    return given


def resampling_of(args: Namespace) -> tuple[dict[str, int], int]:
    """What `inpaint` and `restore` take of the options, and how many steps they then denoise."""
    resampling = {"jump_length": args.jump_length, "num_resamples": args.resamples}
    return resampling, sum(t_prev < t for t, t_prev in resampling_path(args.visited, **resampling))
