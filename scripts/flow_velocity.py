"""A flow's velocity and the true one, along the path from noise to test digits (B8).

    python scripts/flow_velocity.py

Rows for each t: x_t = (1-t) x_0 + t x_1, the velocity x_1 - x_0 that leads to this digit, the model's, which is the
mean over all digits that x_t may come from, and their difference, as a heat map, with its mean square. Near t = 0
it is open which digit it will be; near t = 1 the noise is hard to see, and so is the velocity.
"""

from pathlib import Path

from shared.options import add_data_option, add_output_options, check_writable, number, parser, run

import torch
from torch import Tensor

from ddpm.flow import interpolate
from ddpm.mnist import ClassFlow, TimeFlow, load_model
from ddpm.mnist.data import load_mnist, one_of_each
from ddpm.mnist.sampling import one_hot
from ddpm.sampling import noise_source
from ddpm.tools.devices import pick_device
from ddpm.tools.figures import save_grid


def main():
    options = parser(__doc__)
    add_data_option(options)
    options.add_argument("--weights", type=Path, default=Path("flow_class"), help="a flow (default: flow_class)")
    options.add_argument("--times", type=number, nargs="+", default=[0, 0.3, 0.6, 0.9], metavar="T", help="in [0, 1]")
    add_output_options(options, "out/b8_velocity.png")
    options.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    args = options.parse_args()
    if not all(0 <= t <= 1 for t in args.times):
        raise ValueError("--times must be from 0, noise, to 1, a digit")

    device = pick_device(args.device)
    check_writable(args.out, ".png")
    model = load_model(args.weights, (ClassFlow, TimeFlow), device)
    x_1, digits = one_of_each(*load_mnist(args.data, "test"))
    x_1 = x_1.to(device)
    x_0 = noise_source(range(args.seed, args.seed + len(digits)), x_1.shape[1:], device)()
    conditioning = (one_hot(digits, device),) if isinstance(model, ClassFlow) else ()

    rows, names, u = [], [], x_1 - x_0
    for t in args.times:
        x_t = interpolate(x_0, x_1, torch.full((len(x_1),), t, device=device))
        with torch.no_grad():
            predicted = model(x_t, t, *conditioning)
        error = (predicted - u).abs()
        rows += [x_t, u / 4 + 0.5, predicted / 4 + 0.5, heat(error)]  # velocities from -2 to 2
        names += [f"t = {t:g}", "x_1 - x_0", "the model's u", f"error, mean square {error.square().mean():.3f}"]
    rows = [row.clamp(0, 1).cpu() for row in rows]
    save_grid(args.out, rows, row_labels=names, title="velocities, grey is 0", seed=args.seed)
    print(args.out)


def heat(x: Tensor) -> Tensor:
    """[B, 1, H, W] from 0 to 1 -> colours [B, 3, H, W]: black, red, yellow, white."""
    return torch.cat([3 * x, 3 * x - 1, 3 * x - 2], dim=1).clamp(0, 1)


if __name__ == "__main__":
    run(main)
