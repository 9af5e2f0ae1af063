"""A4: a noisy image denoised step by step, compared with a blur and a single step.

    python scripts/iterative_denoise.py --image photo.jpg

OUT.png: x_t at every 5th step from --i-start, and the result. OUT_compared.png: the original, the noisy image, and what
the blur, one step and all steps make of it. x_t and x̂_0 of every step are written, too, as OUT_steps_ROW_STEP.png.
"""

from shared.images import read_image
from shared.noisy import add_image_option
from shared.options import parser, positive, run
from shared.stages import add_cascade_options, from_index, open_cascade, settings_of

from ddpm.process import add_noise
from ddpm.sampling import Trajectory, classical_denoise, iterative_denoise, one_step_denoise
from ddpm.tools.figures import save_cells, save_table


def main():
    options = parser(__doc__)
    options.add_argument("--prompt", default="a high quality photo", metavar="TEXT", help="default: %(default)r")
    add_image_option(options)
    default = "index of the first timestep (default: 10, or a third of fewer steps than 30)"
    options.add_argument("--i-start", type=int, metavar="I", help=default)
    options.add_argument("--every", type=positive, default=5, help="show every so many steps (default: 5)")
    alone = {"stages": 1, "batched": False}
    add_cascade_options(options, out="out/iterative_denoise.png", stride=30, guidance=1.0, **alone)
    args = options.parse_args()
    cascade = open_cascade(args)
    default = min(10, len(args.visited) // 3)
    timesteps = from_index(args.visited, default if args.i_start is None else args.i_start)
    x_0 = read_image(args.image, cascade.sizes[0])
    frames, once = Trajectory(), {}

    def three_ways(estimate, timesteps, schedule, *, noise, callback, **loop):
        x_t = add_noise(x_0.to(cascade.device), noise(), timesteps[0], schedule)
        once["noisy"] = x_t.cpu()
        once["blur"] = classical_denoise(x_t, timesteps[0], schedule).cpu()
        once["one step"] = one_step_denoise(estimate, x_t, timesteps[0], schedule).cpu()

        def report(*step):
            frames(*step)
            callback(*step)

        return iterative_denoise(estimate, x_t, timesteps, schedule, noise=noise, callback=report, **loop)

    result = cascade.draw(args.prompt, three_ways, seeds=[args.seed], timesteps=timesteps, **settings_of(args))
    labels, x_t, x_0_hat = zip(*((f"t = {t}", x_t[0], x_0[0]) for _, t, x_t, x_0 in frames), strict=True)
    steps = args.out.with_stem(f"{args.out.stem}_steps")
    rows = [[image / 2 + 0.5 for image in row] for row in (x_t, x_0_hat)]
    save_cells(steps, rows, row_labels=["x_t", "x̂_0"], column_labels=labels, seed=args.seed)
    first = [*x_t[:: args.every], result[0]]
    second = [image[0] for image in (x_0, *once.values(), result)]
    labels = [*labels[:: args.every], "result"]
    names = ["original", f"noisy, t = {timesteps[0]}", "blur", "one step", "iterative"]
    save_table(args.out, [first], column_labels=labels, title="iterative denoising", seed=args.seed)
    print(args.out)
    compared = args.out.with_stem(f"{args.out.stem}_compared")
    save_table(compared, [second], column_labels=names, title="the same noisy image, denoised", seed=args.seed)
    print(compared)


if __name__ == "__main__":
    run(main)
