"""A10: visual anagrams, images that show another thing when they are turned or rearranged.

    python scripts/visual_anagram.py
    python scripts/visual_anagram.py --model DeepFloyd/IF-I-XL-v1.0 --upscaler DeepFloyd/IF-II-L-v1.0 \\
        --prompt "a photo of a duck" --prompt "a photo of a rabbit" --view identity --view rotate_90 --num-images 20

Good illusions are found, not made to order: a contact sheet shows --num-images seeds, upright and in the other
views. --animate adds the first seed as an animation that turns from one view to the next. Views: identity,
vertical_flip, horizontal_flip, rotate_90, rotate_180, negate, pixels, patches, jigsaw, inner_circle, square_hinge,
skew.
"""

from functools import partial

from shared.images import write_animations, write_table
from shared.options import number, parser, positive, run
from shared.stages import MODEL, add_cascade_options, draw, grouped, open_cascade

from ddpm.estimates import REDUCTIONS, anagram
from ddpm.tools.animation import turn
from ddpm.views import VIEWS, check_view, pixels
from ifmodel.jobs import Job, Stage

PAIRS = [  # the assignment's
    ("an oil painting of an old man", "an oil painting of people around a campfire"),
    ("an oil painting of a snowy mountain village", "a photo of a hipster barista"),
    ("a photo of the amalfi coast", "an oil painting of a snowy mountain village"),
]
TINY_PAIRS = [  # alike when one is flipped, see scripts/evaluate/tiny_if.py: the assignment's are too far apart for it
    ("a photo of a light bulb", "a photo of a pear"),
    ("a photo of a crab", "a photo of a shopping cart"),
    ("a photo of a palm tree", "a photo of a christmas tree"),
    ("a photo of an ear", "a photo of a thumbs up"),
    ("a photo of an old man", "a photo of a nerd face"),
    ("a photo of a deer", "a photo of a church"),
]


def main():
    options = parser(__doc__)
    prompts = "one for each view; more make more images (default: the assignment's; with tiny-if, pairs of like shape)"
    options.add_argument("--prompt", action="append", metavar="TEXT", help=prompts)
    options.add_argument("--view", action="append", choices=VIEWS, help="(default: identity, vertical_flip)")
    options.add_argument("--weight", type=number, action="append", metavar="W", help="one for each view (default: 1)")
    options.add_argument("--reduction", choices=REDUCTIONS, default="mean", help="default: mean")
    options.add_argument("--num-images", type=positive, default=4, help="seeds to try (default: 4)")
    options.add_argument("--animate", action="store_true", help="also the first seed as a .gif, turning")
    add_cascade_options(options, out="out/visual_anagram.png", stride=30)
    args = options.parse_args()
    names = args.view or ["identity", "vertical_flip"]
    if len(names) < 2:
        raise ValueError(f"{names[0]} alone makes no illusion: give another --view, such as identity or vertical_flip")
    if not args.prompt and len(names) > 2:
        raise ValueError(f"give a --prompt for each of the {len(names)} views")
    pairs = TINY_PAIRS if args.model == MODEL else PAIRS
    groups = grouped(args.prompt, len(names)) if args.prompt else pairs
    if any(len(group) != len(names) for group in groups):
        count = len(args.prompt or groups[0])
        raise ValueError(f"give a --prompt for each --view: there are {count} prompts for {', '.join(names)}")
    cascade = open_cascade(args)
    views = [pixels(cascade.sizes[0][0]) if name == "pixels" else VIEWS[name]() for name in names]
    for view in views:
        for size in cascade.sizes:
            check_view(view, (3, *size))

    seeds = range(args.seed, args.seed + args.num_images)

    def job(prompts: tuple[str, ...]) -> Job:
        def illusion(stage: Stage):
            seen = zip(prompts, views, strict=True)
            estimates = [stage.estimate(prompt, view=view) for prompt, view in seen]
            return anagram(estimates, views, args.reduction, weights=args.weight)

        return Job(illusion, seeds, timesteps=args.visited)

    drawn = draw(cascade, [job(prompts) for prompts in groups], args)
    rows = [list(view.view(images)) for images in drawn for view in views]
    labels = [f"{name}:\n{prompt}" for prompts in groups for name, prompt in zip(names, prompts, strict=True)]
    write_table(args, rows, row_labels=labels, column_labels=[f"seed {seed}" for seed in seeds])
    if args.animate:
        write_animations(args, drawn, partial(turn, views=views))


if __name__ == "__main__":
    run(main)
