"""The configs of a small IF, and its folders in the Hub's layout."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save
from torch import Tensor, nn

from ddpm.tools.files import write_atomically
from ifmodel.config import STAGE_1_CONFIG, STAGE_2_CONFIG

SCHEDULER_CONFIG = {
    "_class_name": "DDPMScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "clip_sample": True,
    "dynamic_thresholding_ratio": 0.95,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.5,
    "thresholding": True,
    "variance_type": "learned_range",
}
MODEL_INDEX = {
    "_class_name": "IFPipeline",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDPMScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "watermarker": [None, None],
}
STAGE_2_INDEX = {
    **MODEL_INDEX,
    "_class_name": "IFSuperResolutionPipeline",
    "image_noising_scheduler": ["diffusers", "DDPMScheduler"],
    "text_encoder": [None, None],  # that of stage 1
    "tokenizer": [None, None],
}


def stage_1_config(size: int, widths: Sequence[int], layers: int, text_dim: int) -> dict:
    """The config.json of a stage-1 UNet: ResNets at the first level, attention at the others, as in IF.

    widths: of the levels, see `UNetConfig`, which refuses what does not divide; text_dim: the width of the text encoder
    """
    return {**STAGE_1_CONFIG, **_shape(size, widths, layers, text_dim, attention=len(widths) - 1)}


def stage_2_config(size: int, widths: Sequence[int], layers: int, text_dim: int) -> dict:
    """The config.json of a stage-2 UNet: attention at the coarsest level alone, so that 128 × 128 is cheap.

    As in `stage_1_config`.
    """
    shape = _shape(size, widths, layers, text_dim, attention=1)
    return {**STAGE_2_CONFIG, **shape, "time_embedding_dim": widths[-1]}


def _shape(size: int, widths: Sequence[int], layers: int, text_dim: int, attention: int) -> dict:
    """The fields of both configs that say how large a UNet is: fewer groups and smaller heads where it is narrow.

    attention: how many levels have it, the coarsest
    """
    resnets = len(widths) - attention
    groups = math.gcd(8, *widths) if min(widths) < 64 else 32
    return {
        "addition_embed_type_num_heads": text_dim // 32,
        "attention_head_dim": math.gcd(32, *widths[resnets:]),
        "block_out_channels": list(widths),
        "cross_attention_dim": widths[-1],
        "down_block_types": ["ResnetDownsampleBlock2D"] * resnets + ["SimpleCrossAttnDownBlock2D"] * attention,
        "encoder_hid_dim": text_dim,
        "layers_per_block": layers,
        "norm_num_groups": groups,
        "sample_size": size,
        "up_block_types": ["SimpleCrossAttnUpBlock2D"] * attention + ["ResnetUpsampleBlock2D"] * resnets,
    }


def save_stage_1(
    folder: Path, config: dict, weights: dict[str, Tensor], encoder: nn.Module, tokenizer: Path, vocabulary: dict
):
    """Write a stage 1 in the Hub's layout, in float16: what generate.py, and diffusers, load.

    weights: those of a `TextToImage`; encoder: where its config is from; tokenizer: a folder with spiece.model
    vocabulary: what it can be asked for, see `ifmodel.vocabulary`
    """
    encoder_config = {**encoder.config.to_dict(), "architectures": ["T5EncoderModel"]}
    encoder_config.pop("_name_or_path", None)  # where it was loaded from, on this machine
    _save_half(folder / "unet" / "diffusion_pytorch_model.safetensors", weights, "unet.")
    _save_half(folder / "text_encoder" / "model.safetensors", weights, "encoder.")
    files = {
        "model_index.json": MODEL_INDEX,
        "sampling_config.json": {"guidance_scale": 2.0, "num_steps": 50},
        "scheduler/scheduler_config.json": SCHEDULER_CONFIG,
        "text_encoder/config.json": encoder_config,
        "tokenizer/tokenizer_config.json": {"tokenizer_class": "T5Tokenizer"},
        "unet/config.json": config,
        "vocabulary.json": vocabulary,
    }
    _save_json(folder, files)
    write_atomically(folder / "tokenizer" / "spiece.model", (tokenizer / "spiece.model").read_bytes())


def save_stage_2(folder: Path, config: dict, weights: dict[str, Tensor]):
    """Write a stage 2 as `save_stage_1` does; the text encoder is that of stage 1."""
    _save_half(folder / "unet" / "diffusion_pytorch_model.safetensors", weights, "unet.")
    noising = {name: SCHEDULER_CONFIG[name] for name in ("_class_name", "beta_schedule", "num_train_timesteps")}
    files = {
        "image_noising_scheduler/scheduler_config.json": noising,
        "model_index.json": STAGE_2_INDEX,
        "sampling_config.json": {"guidance_scale": 1.0, "num_steps": 20, "noise_level": 50},
        "scheduler/scheduler_config.json": {**SCHEDULER_CONFIG, "sample_max_value": 1.0},
        "unet/config.json": config,
    }
    _save_json(folder, files)


def _save_half(path: Path, weights: dict[str, Tensor], prefix: str):
    """The weights of one part, in float16."""
    half = {
        name.removeprefix(prefix): weight.half().contiguous()
        for name, weight in weights.items()
        if name.startswith(prefix) and not name.endswith("encoder.embed_tokens.weight")  # shared.weight again
    }
    write_atomically(path, save(half, {"format": "pt"}))


def _save_json(folder: Path, files: dict[str, dict]):
    """Each in its file of the folder."""
    for name, content in files.items():
        write_atomically(folder / name, json.dumps(content, indent=2, default=str).encode())
