"""A3: noisy images, and the model's estimate of the clean one in a single step.

    python scripts/one_step_denoise.py --image photo.jpg

Rows: x_t at t = 0, 125, …, 875; x̂_0. The more noise, the more the estimate is the mean of many images.
"""

from shared.images import write_table
from shared.noisy import add_noisy_options, noisy_images
from shared.options import parser, run
from shared.stages import add_cascade_options, open_cascade, settings_of

from ddpm.sampling import one_step_denoise
from ifmodel.jobs import Job


def main():
    options = parser(__doc__)
    options.add_argument("--prompt", default="a high quality photo", metavar="TEXT", help="default: %(default)r")
    add_noisy_options(options)
    alone = {"stages": 1, "stepwise": False, "batched": False}
    add_cascade_options(options, out="out/one_step_denoise.png", guidance=1.0, **alone)
    args = options.parse_args()
    cascade = open_cascade(args)
    noisy, labels = noisy_images(args, cascade.sizes[0])
    denoised = []

    def each_once(estimate, schedule, callback, **_):
        for x_t, t in zip(noisy, args.timesteps, strict=True):
            denoised.append(one_step_denoise(estimate, x_t[None].to(cascade.device), t, schedule)[0].cpu())
            callback()
        return denoised[-1][None]

    cascade.draw_all([Job(args.prompt, [args.seed], each_once, num_steps=len(noisy))], **settings_of(args))
    rows = {"noisy": noisy, "one step": denoised}
    write_table(args, list(rows.values()), row_labels=list(rows), column_labels=labels)


if __name__ == "__main__":
    run(main)
