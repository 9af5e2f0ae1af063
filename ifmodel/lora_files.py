"""The files of LoRAs, in the layouts of diffusers, PEFT and kohya.

A file has a few tensors for each layer: down, A: [r, in]; up, B: [out, r]; and perhaps a number, alpha. What reads them
ends with the same `LoRA` whatever they were called, and refuses what it does not know.
"""

import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ddpm.tools.files import parse_json, read_small, reading
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
