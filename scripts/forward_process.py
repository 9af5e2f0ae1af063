"""A1: an image at growing noise levels.

    python scripts/forward_process.py --image photo.jpg

x_t = √ᾱ_t x_0 + √(1-ᾱ_t) eps at t = 0, 125, …, 875 of IF's schedule. Needs no model.
"""

from shared.images import write_table
from shared.noisy import add_noisy_options, noisy_images
from shared.options import parser, run


def main():
    options = parser(__doc__)
    add_noisy_options(options, out="out/forward_process.png")
    args = options.parse_args()
    x_t, labels = noisy_images(args, (args.size, args.size))
    write_table(args, [x_t], column_labels=labels)


if __name__ == "__main__":
    run(main)
