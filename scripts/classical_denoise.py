"""A2: noisy images, and what a Gaussian blur makes of them.

    python scripts/classical_denoise.py --image photo.jpg

Rows: x_t at t = 0, 125, …, 875; x_t / √ᾱ_t, blurred as wide as its noise asks. Needs no model.
"""

from shared.images import write_table
from shared.noisy import add_noisy_options, noisy_images
from shared.options import parser, run

from ddpm.sampling import classical_denoise
from ifmodel.stage import SCHEDULE


def main():
    options = parser(__doc__)
    add_noisy_options(options, out="out/classical_denoise.png")
    args = options.parse_args()
    noisy, labels = noisy_images(args, (args.size, args.size))
    blurred = [classical_denoise(x_t[None], t, SCHEDULE)[0] for x_t, t in zip(noisy, args.timesteps, strict=True)]
    rows = {"noisy": noisy, "blurred": blurred}
    write_table(args, list(rows.values()), row_labels=list(rows), column_labels=labels)


if __name__ == "__main__":
    run(main)
