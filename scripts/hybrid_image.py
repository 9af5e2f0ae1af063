"""A11: hybrid images, one thing from afar and another up close.

    python scripts/hybrid_image.py
    python scripts/hybrid_image.py --components grey_colour \\
        --prompt "a photo of a skull" --prompt "a photo of flowers" --num-images 8

A prompt for each component: low_high_pass (two prompts: far, near; split at --sigma), three_bands (coarse, middle,
fine), grey_colour and motion_blur (moving, still). Rows: the image, then its components, those without a mean on
grey; columns: seeds. --animate adds the first seed as an animation that recedes and returns.
--keep FILE takes the first component from an image instead, and makes up the rest (one prompt).
"""

from argparse import Namespace
from functools import partial
from pathlib import Path

from shared.images import read_image, write_animations, write_table
from shared.options import parser, positive, positive_number, run
from shared.stages import MODEL, add_cascade_options, draw, grouped, open_cascade

from ddpm.components import DECOMPOSITIONS, SIGMA, Component, check_components, low_high_pass
from ddpm.sampling import hybrid, inpaint_component
from ddpm.tools.animation import recede
from ifmodel.jobs import Job, Stage

PAIRS = [  # the assignment's
    ("a lithograph of a skull", "a lithograph of waterfalls"),
    ("a lithograph of a skull", "an oil painting of a snowy mountain village"),
    ("an oil painting of an old man", "an oil painting of people around a campfire"),
]
TINY_PAIRS = [  # alike when blurred, see scripts/evaluate/tiny_if.py: the assignment's are too far apart for it
    ("a photo of a penguin", "a photo of an owl"),
    ("a photo of a red heart", "a photo of a doughnut"),
    ("a photo of a fire", "a photo of a crown"),
    ("a photo of a lion", "a photo of a bear"),
    ("a photo of a mushroom", "a photo of a birthday cake"),
    ("a photo of a tropical fish", "a photo of a maple leaf"),
]


def main():
    options = parser(__doc__)
    prompts = "one for each component; more make more images (default: the assignment's; with tiny-if, pairs alike)"
    options.add_argument("--prompt", action="append", metavar="TEXT", help=prompts)
    options.add_argument("--components", choices=DECOMPOSITIONS, default="low_high_pass", help="default: low_high_pass")
    sigmas = f"{SIGMA:g}; 3 with {MODEL}"
    help = f"of low_high_pass, in pixels of a 64-pixel image: larger shows more of the near one (default: {sigmas})"
    options.add_argument("--sigma", type=positive_number, metavar="PIXELS", help=help)
    options.add_argument("--keep", metavar="FILE", help="an image whose first component is kept")
    options.add_argument("--num-images", type=positive, default=4, help="seeds to try (default: 4)")
    options.add_argument("--animate", action="store_true", help="also the first seed as a .gif, going away")
    add_cascade_options(options, out="out/hybrid_image.png", stride=30)
    args = options.parse_args()
    if args.sigma and args.components != "low_high_pass":
        raise ValueError(f"--sigma is of --components low_high_pass, not of {args.components}")
    if args.model == MODEL and args.components == "low_high_pass":
        args.sigma = 3.0 if args.sigma is None else args.sigma  # its best
    components = low_high_pass(args.sigma) if args.sigma else DECOMPOSITIONS[args.components]()
    needed = 1 if args.keep else len(components)
    if args.keep and not args.prompt:
        raise ValueError("--keep takes one --prompt: what the rest shows")
    pairs = TINY_PAIRS if args.model == MODEL else PAIRS
    groups = grouped(args.prompt, needed) if args.prompt else pairs
    if any(len(group) != needed for group in groups):
        names = ", ".join(component.name for component in components)
        raise ValueError(f"give {needed} --prompt for the components {names}, not {len(args.prompt or groups[0])}")
    cascade = open_cascade(args)
    for size in cascade.sizes:
        check_components(components, (3, *size))
    seeds = range(args.seed, args.seed + args.num_images)

    def job(prompts: tuple[str, ...]) -> Job:
        def mixed(stage: Stage):
            return hybrid([stage.estimate(prompt) for prompt in prompts], components)

        if not args.keep:
            return Job(mixed, seeds, timesteps=args.visited)
        small, final = (
            partial(inpaint_component, x_orig=read_image(args.keep, size).to(cascade.device), keep=components[0])
            for size in (cascade.sizes[0], cascade.sizes[-1])
        )
        return Job(prompts[0], seeds, small, args.visited, upscale=final)

    drawn = draw(cascade, [job(prompts) for prompts in groups], args)
    rows = [row for images in drawn for row in (images, *(component.of(images) for component in components))]
    labels = [label for prompts in groups for label in row_labels(args, components, prompts)]
    write_table(args, rows, row_labels=labels, column_labels=[f"seed {seed}" for seed in seeds])
    if args.animate:
        write_animations(args, drawn, recede)


def row_labels(args: Namespace, components: list[Component], prompts: tuple[str, ...]) -> list[str]:
    """What is seen in the rows of one image: itself, and each component with the prompt or file it is from."""
    sources = [Path(args.keep).name, *prompts * (len(components) - 1)] if args.keep else prompts
    parts = [f"{component.name}:\n{source}" for component, source in zip(components, sources, strict=True)]
    if args.components == "low_high_pass":
        return [f"near view:\n{sources[1]}", f"far view, {parts[0]}", parts[1]]
    return ["image", *parts]


if __name__ == "__main__":
    run(main)
