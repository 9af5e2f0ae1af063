"""How fast a small IF trains here and in a plain loop around diffusers' UNet, on the same work.

    python scripts/bench/training.py
    python scripts/bench/training.py --stage 2 --rounds 5

Both sides train stage 1, or stage 2 on crops, of tiny-if's shape from the same random weights on the same random
images, timesteps and noise, with the same loss, alternately in this process. "plain" is diffusers' UNet in float32 with
AdamW; "tuned" is that in our dtype and memory format; ours is what scripts/train_if.py does. Prints the median
images/s of each, the ratio, the losses after as many steps, and what our step spends its time on.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # where shared/ is
from shared.options import SEED, add_device_options, parser, pick, positive, run
from shared.timing import race, short, where

import torch
from torch import Tensor, nn

from ddpm.tools.memory import check_memory
from ddpm.tools.timing import operators
from ifmodel.tiny.export import stage_1_config, stage_2_config
from ifmodel.tiny.losses import Batch, stage_1_loss, stage_2_loss
from ifmodel.tiny.models import TextToImage, build_encoder, zero_init
from ifmodel.unet import UNet, UNetConfig

try:
    import diffusers
except ImportError:
    diffusers = None

SMALL, LARGE, CROP = 32, 128, 64
VOCABULARY, TEXT_DIM = 1500, 128


class Plain(nn.Module):
    """diffusers' UNet as a loop around it would call it, with image and prompt."""

    def __init__(self, encoder: nn.Module, unet: nn.Module):
        super().__init__()
        self.encoder, self.unet = encoder, unet

    def forward(self, x_t: Tensor, t: Tensor, batch: Batch, noise_level: Tensor | None = None) -> Tensor:
        embeds = self.encoder(batch.tokens, attention_mask=batch.mask).last_hidden_state
        return self.unet(x_t, t, embeds, class_labels=noise_level, return_dict=False)[0]


def steps(side: str, stage: int, batch_size: int, device: torch.device, dtype: torch.dtype) -> Iterator[float]:
    """Train, a step each time that the next loss is asked for."""
    size, plain = SMALL if stage == 1 else LARGE, side == "plain"
    torch.manual_seed(SEED)
    model = model_of(side, stage).to(device, memory_format=torch.contiguous_format if plain else torch.channels_last)
    fused = not plain and device.type != "mps"
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.01, fused=fused)
    generator = torch.Generator().manual_seed(SEED)
    while True:
        x_0 = torch.rand((batch_size, 3, size, size), generator=generator) * 2 - 1
        tokens = torch.randint(2, VOCABULARY, (batch_size, 77), generator=generator)
        batch = Batch(x_0, tokens, torch.ones_like(tokens)).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=not plain and dtype == torch.bfloat16):
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


def config_of(stage: int) -> dict:
    """Of tiny-if's shape."""
    if stage == 1:
        return stage_1_config(SMALL, [64, 96, 192], 1, TEXT_DIM)
    return stage_2_config(LARGE, [32, 48, 64, 96], 1, TEXT_DIM)


def model_of(side: str, stage: int) -> nn.Module:
    """A text encoder and a UNet, ours or with the same weights diffusers'."""
    config = config_of(stage)
    encoder, unet = build_encoder(VOCABULARY, TEXT_DIM), UNet(UNetConfig.from_dict(config))
    zero_init(unet)
    if side == "ours":
        return TextToImage(encoder, unet)
    theirs = diffusers.UNet2DConditionModel.from_config(config).train()
    theirs.load_state_dict(unet.state_dict())
    return Plain(encoder, theirs)


def main():
    options = parser(__doc__)
    options.add_argument("--stage", type=int, choices=[1, 2], default=1, help="default: 1")
    options.add_argument("--rounds", type=positive, default=5, help="turns that each side takes (default: 5)")
    options.add_argument("--steps", type=positive, default=3, help="training steps in a turn (default: 3)")
    options.add_argument("--batch-size", type=positive, default=32, help="default: 32")
    add_device_options(options)
    args = options.parse_args()
    device, dtype = pick(args)
    config, side = config_of(args.stage), SMALL if args.stage == 1 else CROP
    needed = UNetConfig.from_dict(config).activation_bytes(args.batch_size, side, side)
    check_memory(needed, f"training with {args.batch_size} images at a time", device)
    if diffusers is None:
        print("diffusers is not installed: ours alone")
    names = ["ours"] if diffusers is None else ["ours", "plain", "tuned"]
    sides = {name: steps(name, args.stage, args.batch_size, device, dtype) for name in names}
    print(f"training stage {args.stage}, batch {args.batch_size}, {where(device)}, ours in {short(dtype)}")
    race(sides, args.rounds, args.steps, args.batch_size, device)
    largest = list(operators(lambda: next(sides["ours"]), device).items())[:7]
    print("  ours: " + ", ".join(f"{name} {share:.0%}" for name, share in largest))


if __name__ == "__main__":
    run(main)
