"""How fast a small IF trains here and in a plain loop around diffusers' UNet, on the same work.

    python scripts/bench/training.py
    python scripts/bench/training.py --stage 2 --rounds 5

Both sides train stage 1, or stage 2 on crops, of tiny-if's shape from the same random weights on the same random
pictures, timesteps and noise, with the same loss, in turns in this process. "plain" is diffusers' UNet in float32 with
AdamW; "tuned" is that in our dtype and memory format; ours is what scripts/train_if.py does. Prints the median
pictures/s of each, the ratio, the losses after as many steps, and what our step spends its time on.
"""

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # where shared/ is
from ifmodel.tiny.export import stage_1_config, stage_2_config
from ifmodel.tiny.losses import Batch, stage_1_loss, stage_2_loss
from ifmodel.tiny.training import TextToImage, build_encoder, zero_init
from ifmodel.unet import UNet, UNetConfig
from shared.options import SEED, add_device_options, parser, pick_device, pick_dtype, positive, run

SMALL, LARGE, CROP = 32, 128, 64
VOCABULARY, TEXT_DIM = 1500, 128


class Plain(nn.Module):
    """diffusers' UNet as a loop around it would call it, the prompt beside the picture."""

    def __init__(self, encoder: nn.Module, unet: nn.Module):
        super().__init__()
        self.encoder, self.unet = encoder, unet

    def forward(self, x_t: Tensor, t: Tensor, batch: Batch, noise_level: Tensor | None = None) -> Tensor:
        embeds = self.encoder(batch.tokens, attention_mask=batch.mask).last_hidden_state
        return self.unet(x_t, t, embeds, class_labels=noise_level, return_dict=False)[0]


def steps(side: str, stage: int, batch_size: int, device: torch.device, dtype: torch.dtype) -> Iterator[float]:
    """Train, a step each time that the next loss is asked for."""
    config = (
        stage_1_config(SMALL, [64, 96, 192], 1, TEXT_DIM)
        if stage == 1
        else stage_2_config(LARGE, [32, 48, 64, 96], 1, TEXT_DIM)
    )
    torch.manual_seed(SEED)
    encoder, unet = build_encoder(VOCABULARY, TEXT_DIM), UNet(UNetConfig.from_dict(config))
    zero_init(unet)
    if side == "ours":
        model = TextToImage(encoder, unet)
    else:
        from diffusers import UNet2DConditionModel

        theirs = UNet2DConditionModel.from_config(config).train()
        theirs.load_state_dict(unet.state_dict())
        model = Plain(encoder, theirs)
    plain = side == "plain"
    model.to(device, memory_format=torch.contiguous_format if plain else torch.channels_last)
    fused = not plain and device.type != "mps"
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.01, fused=fused)
    generator = torch.Generator().manual_seed(SEED)
    while True:
        side_length = SMALL if stage == 1 else LARGE
        x_0 = torch.rand((batch_size, 3, side_length, side_length), generator=generator) * 2 - 1
        tokens = torch.randint(2, VOCABULARY, (batch_size, 77), generator=generator)
        batch = Batch(x_0, tokens, torch.ones_like(tokens)).to(device)
        lower = not plain and dtype == torch.bfloat16
        with torch.autocast(device.type, torch.bfloat16) if lower else nullcontext():
            if stage == 1:
                losses = stage_1_loss(model, batch, generator)
            else:
                losses = stage_2_loss(model, batch, generator, small=SMALL, crop=CROP)
        loss = losses.mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield loss.item()


def main():
    options = parser(__doc__)
    options.add_argument("--stage", type=int, choices=[1, 2], default=1, help="default: 1")
    options.add_argument("--rounds", type=positive, default=5, help="turns that each side takes (default: 5)")
    options.add_argument("--steps", type=positive, default=3, help="training steps in a turn (default: 3)")
    options.add_argument("--batch-size", type=positive, default=32, help="default: 32")
    add_device_options(options)
    args = options.parse_args()
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    names = ["ours", "plain", "tuned"]
    try:
        import diffusers  # noqa: F401
    except ImportError:
        print("diffusers is not installed: ours alone")
        names = ["ours"]

    sides = {name: steps(name, args.stage, args.batch_size, device, dtype) for name in names}
    rates, losses = {name: [] for name in sides}, {name: [] for name in sides}
    for turn in tqdm(range(args.rounds + 1), desc="rounds, the first to warm up", leave=False):
        for name, side in sides.items():
            started = perf_counter()
            losses[name] += [next(side) for _ in range(args.steps)]
            if turn > 0:
                rates[name].append(args.steps * args.batch_size / (perf_counter() - started))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"training stage {args.stage}, batch {args.batch_size}, {where}, ours in {str(dtype).removeprefix('torch.')}")
    for name, values in rates.items():
        pairs = [ours / other for ours, other in zip(rates["ours"], values, strict=True)]
        told = "" if name == "ours" else f", ours is {median(pairs):.2f} × ({min(pairs):.2f} to {max(pairs):.2f})"
        final = sum(losses[name][-args.steps :]) / args.steps
        print(f"  {name:5} {median(values):7.1f} pictures/s, loss {final:.4f} at step {len(losses[name])}{told}")

    if device.type == "mps":
        return  # the profiler does not see it
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as profiled:
        next(sides["ours"])
    times = {
        event.key: event.self_device_time_total if cuda else event.self_cpu_time_total
        for event in profiled.key_averages()
        if event.device_type == DeviceType.CPU
    }
    largest = sorted(times, key=times.get, reverse=True)[:7]
    print("  ours: " + ", ".join(f"{name} {times[name] / sum(times.values()):.0%}" for name in largest))


if __name__ == "__main__":
    run(main)
