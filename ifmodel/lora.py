"""LoRA: low-rank updates of a model's weights, merged, learned and saved; `lora_files` reads them from any layout.

    W' = W + scale · α/r · B A        A: [r, in], "down"; B: [out, r], "up"; the rank r far below the width

    load_lora(unet, "pytorch_lora_weights.safetensors", scale=0.8)  # before encode_text: a text's keys change, too

An update is merged into its layer, so that an image costs what it cost before; `add_lora` adds one to each layer
instead, where it can be learned. A name in the file that fits no layer is an error, since it would have no effect.
Source: LoRA §4.1, arXiv 2106.09685.
"""

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ddpm.tools.cpu import PackedConv2d
from ddpm.tools.files import write_atomically
from ifmodel.config import UNetConfig
from ifmodel.lora_files import LoRA, Update, read_lora
from ifmodel.offload import change_weight
from ifmodel.unet import UNet

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")
RESNETS = ("conv1", "conv2", "conv_shortcut", "time_emb_proj")


def load_lora(unet: UNet, source: str | Path, scale: float = 1.0):
    """Merge a LoRA into a UNet before its first image; another call adds another.

    source: a safetensors file, or a folder or a Hub repository that holds one of `lora_files.FILES`
    Warns of a part for T5, which `Cascade` and `embed_prompts` take.
    Raises FileNotFoundError, or ValueError when the file is damaged or does not fit the UNet; then nothing is changed.
    """
    lora = read_lora(source)
    if lora.text_encoder and lora.unet:
        warnings.warn(f"{source} changes T5 as well: Cascade(…, lora=…) has that part, too", stacklevel=2)
    merge_lora(unet, lora, scale)


def merge_lora(model: nn.Module, lora: LoRA, scale: float = 1.0, part: str = "unet"):
    """Merge a part of a LoRA, "unet" or "text_encoder", into that model. Raises as `load_lora` does."""
    fitting, misfits = match_layers(lora, model, part)
    if misfits:
        raise ValueError(refusal(lora, misfits))
    for name, update in fitting.items():
        change_weight(model.get_submodule(name), partial(update.merged, scale=scale))


def place_lora(lora: LoRA, configs: Sequence[UNetConfig]) -> int:
    """Which stage, 1 or 2, a LoRA is of: the first that it fits. Raises ValueError for none."""
    refused = []
    for number, config in enumerate(configs, start=1):
        with torch.device("meta"):
            unet = UNet(config)
        refused.append(match_layers(lora, unet)[1])
        if not refused[-1]:
            return number
    raise ValueError(refusal(lora, min(refused, key=len)))


def match_layers(lora: LoRA, model: nn.Module, part: str = "unet") -> tuple[dict[str, Update], list[str]]:
    """The updates by the names of a model's layers, and a line for each that fits none of them."""
    layers = {k: layer for k, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d | PackedConv2d)}
    flat = {name.replace(".", "_"): name for name in layers}  # as kohya writes them
    fitting, misfits = {}, []
    if not getattr(lora, part):
        raise ValueError(f"{lora} has nothing for {'the UNet, but for a text encoder' if part == 'unet' else 'T5'}")
    for name, update in getattr(lora, part).items():
        found = name if name in layers else flat.get(name)
        if found is None:
            misfits.append(f"there is no {name}")
            continue
        if layers[found].weight is None:
            raise ValueError("this UNet has drawn already, and its convolutions are packed: load the LoRA before that")
        wanted, own = shape_of(layers[found].weight.shape), shape_of([len(update.up), *update.down.shape[1:]])
        if wanted != own:
            misfits.append(f"{name} is {wanted}, not {own}")
        if found in fitting:
            misfits.append(f"{name} is there twice")
        fitting[found] = update
    return fitting, misfits


def shape_of(shape: Sequence[int]) -> list[int]:
    """[out, in, k, k]; [out, in] of a linear layer, and of a 1 × 1 convolution, which is the same."""
    return list(shape[:2] if set(shape[2:]) <= {1} else shape)


def refusal(lora: LoRA, misfits: Sequence[str]) -> str:
    """What is said of a LoRA that does not fit."""
    stable = any("transformer_blocks" in name for name in lora.unet)  # Stable Diffusion's, which IF does not have
    of = "Stable Diffusion or SDXL, not of IF" if stable else "another model"
    more = f" and {len(misfits) - 2} more" if len(misfits) > 2 else ""
    return f"{lora} is of {of}: {', '.join(misfits[:2])}{more}"


class LoRALayer(nn.Module):
    """W x + B A x: a linear layer or a convolution as it is, plus an update that learns. B starts at zero.

    The shapes and the dtype are those of the layer; the update is kept in float32 at least.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int):
        super().__init__()
        self.layer = layer
        o, i = layer.weight.shape[:2]
        if isinstance(layer, nn.Linear):
            self.down, self.up = nn.Linear(i, rank, bias=False), nn.Linear(rank, o, bias=False)
        else:
            self.down = nn.Conv2d(i, rank, layer.kernel_size, padding=layer.padding, bias=False)
            self.up = nn.Conv2d(rank, o, 1, bias=False)
        nn.init.normal_(self.down.weight, std=1 / rank)
        nn.init.zeros_(self.up.weight)
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)  # half precision would lose Adam's small steps
        self.down.to(layer.weight.device, dtype), self.up.to(layer.weight.device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x.to(self.down.weight.dtype))).to(x.dtype)


def add_lora(unet: UNet, rank: int, targets: Sequence[str] = ATTENTION) -> dict[str, LoRALayer]:
    """Add an update to every layer whose name ends in one of the targets; nothing else is learned any more.

    unet: not packed
    Raises ValueError when the rank is above a layer's width, or no layer is a target; then nothing is changed.
    """
    found = {}
    for name, layer in unet.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and any(f".{name}".endswith(f".{target}") for target in targets):
            if rank > (width := min(len(layer.weight), layer.weight[0].numel())):
                raise ValueError(f"a rank of {rank} is above the width of {name}, {width}: take a lower one")
            found[name] = layer
    if not found:
        raise ValueError(f"this UNet has no layer whose name ends in {' or '.join(targets)}")
    unet.requires_grad_(False)
    added = {name: LoRALayer(layer, rank) for name, layer in found.items()}
    for name, layer in added.items():
        parent, _, child = name.rpartition(".")
        setattr(unet.get_submodule(parent), child, layer)
    return added


def save_lora(path: str | Path, layers: dict[str, LoRALayer], base: str | None = None):
    """Write the updates of a UNet's layers as diffusers does, atomically; alpha is the rank.

    base: the name of the model that it is of
    """
    tensors = {
        f"unet.{name}.lora.{piece}.weight": getattr(layer, piece).weight.detach().float().cpu().contiguous()
        for name, layer in layers.items()
        for piece in ("down", "up")
    }
    write_atomically(path, save(tensors, {"format": "pt", **({"base_model": base} if base else {})}))
