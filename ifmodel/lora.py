"""LoRA: low-rank updates of a model's weights, read from a file in any of its layouts, merged, learned and saved.

    W' = W + scale · α/r · B A        A: [r, in], "down"; B: [out, r], "up"; the rank r far below the width

    load_lora(unet, "pytorch_lora_weights.safetensors", scale=0.8)  # before encode_text: a text's keys change, too

An update is merged into its layer, so that an image costs what it cost before; `add_lora` adds one to each layer
instead, where it can be learned. A name in the file that fits no layer is an error, since it would have no effect.
Source: LoRA §4.1, arXiv 2106.09685.
"""

import hashlib
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ddpm.files import parse_json, read_small, reading, write_atomically
from ifmodel.config import UNetConfig
from ifmodel.cpu import PackedConv2d
from ifmodel.offload import change_weight
from ifmodel.unet import UNet
from ifmodel.weights import fetch

FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # diffusers' and PEFT's names
ADAPTER_CONFIG = "adapter_config.json"  # where PEFT keeps alpha
# A tensor's name, such as unet.mid_block.attentions.0.to_q.lora.down.weight: a layer, and which piece of its update
KEY = re.compile(
    r"""
    (?P<layer> .+?)            # with a prefix, see PREFIXES; as kohya writes it, _ for each dot
    (?:
        \.lora                 # diffusers: to_q.lora.down
      | \.lora_linear_layer    # diffusers in 2023: to_q.lora_linear_layer.down
      | _lora                  # diffusers' first, of attention processors: processor.to_q_lora.down
    )?                         # none of PEFT and kohya
    \.
    (?:
        (?:
            (?P<down> lora_A | lora_down | down)  # PEFT, kohya, diffusers
          | (?P<up> lora_B | lora_up | up)
        )
        (?: \.\w+ )?           # PEFT's adapter, by its name: lora_A.default
        \.weight
      | alpha                  # a number, all but PEFT: the update is scaled by alpha / rank
    )
    """,
    re.VERBOSE,
)
T5_PREFIXES = ("text_encoder.", "lora_te_", "encoder.")
# taken off in this order: PEFT puts its own outside or inside of the others
PREFIXES = ("base_model.model.", "unet.", "lora_unet_", "text_encoder.", "lora_te_", "base_model.model.")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")
RESNETS = ("conv1", "conv2", "conv_shortcut", "time_emb_proj")


@dataclass(frozen=True)
class Update:
    """A layer's update. down: [r, in], of a convolution [r, in, k, k]; up: [out, r] or [out, r, 1, 1]; scale: α/r."""

    down: Tensor
    up: Tensor
    scale: float

    @torch.no_grad()
    def merged(self, weight: Tensor, scale: float = 1.0) -> Tensor:
        """W + scale · α/r · B A, in the dtype and on the device of W, which is left alone: it may be the file's."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        up, down = (piece.flatten(1).to(weight.device, dtype) for piece in (self.up, self.down))
        delta = (self.scale * up @ down).reshape(weight.shape)
        return torch.empty_like(weight).copy_(weight.to(dtype) + scale * delta)


@dataclass(frozen=True)
class LoRA:
    """What a file has for the UNet and for T5, by layer. base: the model that it was trained on, None if unknown."""

    source: str
    base: str | None
    unet: dict[str, Update]
    text_encoder: dict[str, Update]

    def __str__(self) -> str:
        ranks = sorted({len(update.down) for update in (*self.unet.values(), *self.text_encoder.values())})
        base = f" for {self.base}" if self.base else ""
        return f"{self.source}, a LoRA{base} of rank {' and '.join(map(str, ranks))},"

    def fingerprint(self) -> str:
        """A short hash of what changes T5, whose output is kept by it."""
        parts = ((k, u.scale, u.down.float().numpy(), u.up.float().numpy()) for k, u in self.text_encoder.items())
        content = b"".join(f"{k} {scale}".encode() + down.tobytes() + up.tobytes() for k, scale, down, up in parts)
        return hashlib.sha256(content).hexdigest()[:16]


def load_lora(unet: UNet, source: str | Path, scale: float = 1.0):
    """Merge a LoRA into a UNet before its first image; another call adds another.

    source: a safetensors file, or a folder or a Hub repository that holds one of FILES
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


# Reading


def read_lora(source: str | Path) -> LoRA:
    """A LoRA from a file, a folder or the Hub, whatever its layout. Raises as `load_lora` does."""
    path = find_lora(source)
    with reading(path, "whole safetensors file"), safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    config = adapter_config(path, metadata)
    pieces: dict[str, dict[str, dict[str, Tensor]]] = {"unet": {}, "text_encoder": {}}
    unknown = [key for key, tensor in tensors.items() if not KEY.fullmatch(key) or not tensor.is_floating_point()]
    if unknown or not tensors:
        named = f"{', '.join(unknown[:3])}{', …' if len(unknown) > 3 else ''}" or "nothing"
        raise ValueError(f"{source} is no LoRA of the kind that is implemented, down, up and alpha: it has {named}")
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        part, layer = layer_of(match["layer"])
        piece = "down" if match["down"] else "up" if match["up"] else "alpha"
        if pieces[part].setdefault(layer, {}).setdefault(piece, tensor) is not tensor:
            raise ValueError(f"{source} has two updates of {layer}: {key} is the second")
    updates = {
        part: {layer: update_of(source, part, layer, found, config) for layer, found in layers.items()}
        for part, layers in pieces.items()
    }
    bases = (metadata.get("base_model"), setting(config, "unet", "base_model_name_or_path"))
    named = (*bases, metadata.get("modelspec.architecture"), metadata.get("ss_sd_model_name"))
    return LoRA(str(source), next(filter(None, named), None), **updates)


def find_lora(source: str | Path) -> Path:
    """The safetensors file of a LoRA, downloaded if need be."""
    if Path(source).is_file():
        return Path(source)
    if Path(source).suffix in (".safetensors", ".bin", ".pt", ".ckpt"):
        raise FileNotFoundError(f"no LoRA file at {source}")
    folder = fetch(source, "", [*FILES, ADAPTER_CONFIG])
    for name in FILES:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{source} has neither {' nor '.join(FILES)}: name a safetensors file (.bin is not read)")


def layer_of(name: str) -> tuple[str, str]:
    """Of which part of the cascade a layer is, and its name there."""
    part = "text_encoder" if name.removeprefix("base_model.model.").startswith(T5_PREFIXES) else "unet"
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    name = name.replace(".processor.", ".")
    return part, f"{name}.0" if name.endswith(".to_out") else name


def adapter_config(path: Path, metadata: dict[str, str]) -> dict:
    """PEFT's settings: in the file's metadata, where diffusers keeps them by part, or in a file of its own."""
    adapter = path.with_name(ADAPTER_CONFIG)
    if "lora_adapter_metadata" in metadata:
        config = parse_json(metadata["lora_adapter_metadata"], f"the metadata of {path}")
    else:
        config = parse_json(read_small(adapter), adapter) if path.name == FILES[1] and adapter.is_file() else {}
    if not isinstance(config, dict):
        raise ValueError(f"{path} does not say how its LoRA was made, but has a {type(config).__name__} there")
    return config


def setting(config: dict, part: str, name: str):
    """One of PEFT's settings for a part, None when it is not there."""
    return config.get(f"{part}.{name}", config.get(name))


def update_of(source: str | Path, part: str, layer: str, pieces: dict[str, Tensor], config: dict) -> Update:
    """A layer's update from its tensors. Raises ValueError when these do not belong together."""
    down, up, alpha = (pieces.get(name) for name in ("down", "up", "alpha"))
    if down is None or up is None:
        raise ValueError(f"{source} has no {'down (A)' if down is None else 'up (B)'} of {layer}")
    if down.ndim not in (2, 4) or up.ndim not in (2, 4) or up[0].numel() != len(down):
        shapes = f"down is {list(down.shape)}, up {list(up.shape)}"
        raise ValueError(f"{source} has no one rank for {layer}: {shapes}")
    try:
        if alpha is None:
            patterns = (setting(config, part, "alpha_pattern") or {}).items()
            own = (value for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", layer))
            alpha = next(own, setting(config, part, "lora_alpha") or len(down))
        scale = float(alpha) / (len(down) ** 0.5 if setting(config, part, "use_rslora") else len(down))
    except (TypeError, ValueError, RuntimeError, AttributeError, re.error):
        raise ValueError(f"{source} has an alpha of {layer} that is no number") from None
    if not (math.isfinite(scale) and down.isfinite().all() and up.isfinite().all()):
        raise ValueError(f"{source} has an update of {layer} that is not finite")
    return Update(down, up, scale)


# Learning


class LoRALayer(nn.Module):
    """W x + B A x: a linear layer or a convolution as it is, plus an update that learns. B starts at zero."""

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
