"""The shape of a UNet, read from the config.json next to its weights.

The file is written by diffusers and has some fifty fields. `UNetConfig` keeps those in which IF's models
differ. All others must have the one value that IF gives them: a field with another value, and a field that is
not known here, is refused by name, so that no model is built that is not the one in the file.
"""

from dataclasses import dataclass, fields
from typing import get_args

RESNET_BLOCKS = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
ATTENTION_BLOCKS = ("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D")
ACTIVATIONS = ("gelu", "silu", "swish")
MAX_LAYERS = 1000  # whose modules take their time even without memory
TEXT_GROUPS = 32  # of the GroupNorm that each attention layer has for the text

# What IF's models have in common: each field with the values that the UNet implements
FIXED = {
    "_class_name": ("UNet2DConditionModel",),
    "act_fn": ACTIVATIONS,
    "addition_embed_type": ("text",),
    "addition_time_embed_dim": (None,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None, "timestep"),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": ("group_norm",),
    "dropout": (0,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim_type": (None, "text_proj"),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_type": ("UNetMidBlock2DSimpleCrossAttn",),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "projection_class_embeddings_input_dim": (None,),
    "resnet_skip_time_act": (False, True),
    "resnet_time_scale_shift": ("scale_shift",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None, *ACTIVATIONS),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "transformer_layers_per_block": (1,),
    "use_linear_projection": (False,),
}
# What diffusers assumes for a fixed field that the file leaves out, where that is not the value IF has
ASSUMED = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "cross_attention_norm": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "resnet_time_scale_shift": "default",
}
# Fields that say nothing about these blocks: where the file was written, and options of other blocks
IGNORED = (
    *("_diffusers_version", "_name_or_path", "downsample_padding", "upcast_attention"),
    # what diffusers' EMAModel adds to the model's own fields, about a training that is over
    *("decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup"),
)
# What the values of the other fields must be, by their type in UNetConfig
KINDS = {
    bool: (lambda value: type(value) is bool, "true or false"),
    int: (lambda value: type(value) is int and 1 <= value <= 10**6, "one whole number from 1 to 1000000"),
    float: (lambda value: type(value) in (int, float) and 0 < value < 10**6, "one positive number"),
}

# What the config.json of every IF stage 1 says, apart from its widths
STAGE_1_CONFIG = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "gelu",
    "addition_embed_type": "text",
    "cross_attention_norm": "group_norm",
    "encoder_hid_dim_type": "text_proj",
    "in_channels": 3,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "out_channels": 6,
    "resnet_time_scale_shift": "scale_shift",
}
# … and that of a stage 2
STAGE_2_CONFIG = {
    **STAGE_1_CONFIG,
    "class_embed_type": "timestep",
    "in_channels": 6,
    "mid_block_scale_factor": 1.4142271248762552,
    "resnet_out_scale_factor": 1.4142271248762552,
    "resnet_skip_time_act": True,
    "time_embedding_act_fn": "gelu",
}
# The published models: stage, widths, layers of each level. Those of IF-I-M, IF-I-L and IF-II-M are what gives their
# parameter counts.
PUBLISHED = {
    "IF-I-M": (1, (192, 384, 576, 768), 3),
    "IF-I-L": (1, (320, 640, 960, 1280), 3),
    "IF-I-XL": (1, (704, 1408, 2112, 2816), 3),
    "IF-II-M": (2, (128, 256, 512, 768, 768), (2, 2, 3, 4, 2)),
    "IF-II-L": (2, (160, 320, 640, 960, 1280), (2, 2, 3, 5, 5)),
}


@dataclass(frozen=True)
class UNetConfig:
    """What is different from one IF UNet to the next; a tuple has one entry a level, the finest first."""

    in_channels: int  # 3 for stage 1, 6 for stage 2: x_t, then the upscaled low-resolution image
    out_channels: int  # 6: eps, v
    block_out_channels: tuple[int, ...]
    layers_per_block: tuple[int, ...]
    attention: tuple[bool, ...]  # which levels have attention
    only_cross_attention: tuple[bool, ...]  # which of those attend to the text alone, not to the image
    mid_block_only_cross_attention: bool
    attention_head_dim: int
    cross_attention_dim: int  # width of the projected text
    encoder_hid_dim: int  # width of T5's output
    addition_embed_type_num_heads: int  # of the attention that pools the text
    time_embedding_dim: int
    class_embed_type: str | None  # "timestep" for stage 2: the noise level of the low-resolution image
    act_fn: str
    time_embedding_act_fn: str | None
    resnet_skip_time_act: bool
    resnet_out_scale_factor: float
    mid_block_scale_factor: float
    norm_num_groups: int
    norm_eps: float
    sample_size: int

    @classmethod
    def from_dict(cls, config: dict) -> "UNetConfig":
        """From the fields of a config.json. Raises ValueError for a field that this UNet does not implement."""
        cls._check_fields(config)
        widths = config["block_out_channels"]
        attention = cls._attention_levels(config, len(widths))
        only_cross = config.get("only_cross_attention", False)
        mid_only_cross = config.get("mid_block_only_cross_attention")
        if mid_only_cross is None:  # as diffusers does: one value for all levels is the middle's too
            mid_only_cross = only_cross if isinstance(only_cross, bool) else False
        result = cls(
            in_channels=config.get("in_channels", 3),
            out_channels=config.get("out_channels", 6),
            block_out_channels=tuple(widths),
            layers_per_block=_per_level(config, "layers_per_block", 2, len(widths)),
            attention=attention,
            only_cross_attention=_per_level(config, "only_cross_attention", False, len(widths)),
            mid_block_only_cross_attention=mid_only_cross,
            attention_head_dim=config["attention_head_dim"],
            cross_attention_dim=config["cross_attention_dim"],
            encoder_hid_dim=config["encoder_hid_dim"],
            addition_embed_type_num_heads=config.get("addition_embed_type_num_heads", 64),
            time_embedding_dim=config.get("time_embedding_dim") or 4 * widths[0],
            class_embed_type=config.get("class_embed_type"),
            act_fn=config.get("act_fn", "silu"),
            time_embedding_act_fn=config.get("time_embedding_act_fn"),
            resnet_skip_time_act=config.get("resnet_skip_time_act", False),
            resnet_out_scale_factor=config.get("resnet_out_scale_factor", 1.0),
            mid_block_scale_factor=config.get("mid_block_scale_factor", 1.0),
            norm_num_groups=config.get("norm_num_groups", 32),
            norm_eps=config.get("norm_eps", 1e-5),
            sample_size=_side(config.get("sample_size", 64)),
        )
        result._check_kinds()
        result._check_divisibility()
        return result

    @classmethod
    def _check_fields(cls, config: dict):
        """Refuse fields that are unknown, missing or set to what is not implemented. Raises ValueError."""
        check_fixed("config.json", config, FIXED, ASSUMED, "this UNet")
        known = {*FIXED, *IGNORED, *cls.__dataclass_fields__, "down_block_types", "up_block_types"}
        unknown = sorted(name for name in set(config) - known if config[name] is not None)
        if unknown:
            raise ValueError(f"config.json has fields that this UNet does not know: {', '.join(unknown)}")
        for name in ("block_out_channels", "encoder_hid_dim", "cross_attention_dim", "attention_head_dim"):
            if config.get(name) is None:
                raise ValueError(f"config.json has no {name}: is it the config of an IF UNet?")

        widths = config["block_out_channels"]
        if not _is_list(widths) or not widths:
            raise ValueError(f"config.json has block_out_channels = {widths!r}, not a list of widths")
        for width in widths:
            check_kind("config.json", "block_out_channels", width, int, "this UNet")

    @staticmethod
    def _attention_levels(config: dict, levels: int) -> tuple[bool, ...]:
        """Which levels have attention; the way up must mirror the way down."""
        ways = {}
        for name, of_way in (("down_block_types", 0), ("up_block_types", 1)):
            known = {RESNET_BLOCKS[of_way]: False, ATTENTION_BLOCKS[of_way]: True}
            types = config.get(name)
            if not _is_list(types) or len(types) != levels:
                raise ValueError(f"config.json must have as many {name} as block_out_channels, {levels}")
            for block in types:
                if block not in tuple(known):
                    raise ValueError(f"config.json has {block!r} in {name}, this UNet implements {_either(known)}")
            ways[name] = tuple(known[block] for block in types)
        if ways["down_block_types"] != ways["up_block_types"][::-1]:
            raise ValueError("config.json has up_block_types that do not mirror its down_block_types")
        return ways["down_block_types"]

    @property
    def size_multiple(self) -> int:
        """Height and width must be multiples of this, since each level but the last halves them."""
        return 2 ** (len(self.block_out_channels) - 1)

    def activation_bytes(self, batch: int, height: int, width: int, itemsize: int = 4) -> int:
        """About how much memory a forward pass needs on top of the weights: the skips, and what a layer works on.

        itemsize: bytes of a value, 2 in half precision
        Measured in float32 on the CPU, three images of 128 to 512 pixels took 0.98 to 1.6 times this.
        """
        pixels = batch * height * width
        sizes = [pixels // 4**level * dim for level, dim in enumerate(self.block_out_channels)]
        skips = sum(size * (layers + 1) for size, layers in zip(sizes, self.layers_per_block, strict=True))
        return (skips + 12 * max(sizes)) * itemsize

    def _check_kinds(self):
        """Refuse a value of another type than its field's, or of a list one that is: true, 3.0 or "3" instead of 3."""
        for field in fields(self):
            value, kind = getattr(self, field.name), (*get_args(field.type), field.type)[0]  # of a tuple, its entries'
            for part in value if type(value) is tuple else (value,):
                if kind in KINDS:
                    check_kind("config.json", field.name, part, kind, "this UNet")

    def _check_divisibility(self):
        if sum(self.layers_per_block) > MAX_LAYERS:
            raise ValueError(f"config.json has {sum(self.layers_per_block)} layers, this UNet at most {MAX_LAYERS}")
        if self.encoder_hid_dim % self.addition_embed_type_num_heads:
            dim, heads = self.encoder_hid_dim, self.addition_embed_type_num_heads
            raise ValueError(f"config.json has an encoder_hid_dim of {dim}, which does not divide into {heads} heads")
        if self.cross_attention_dim % TEXT_GROUPS:
            dim = self.cross_attention_dim
            raise ValueError(
                f"config.json has a cross_attention_dim of {dim}, which does not divide into {TEXT_GROUPS} groups"
            )
        for width, attention in zip(self.block_out_channels, self.attention, strict=True):
            named = f"config.json has {width} in block_out_channels, which does not divide into"
            if width % self.norm_num_groups:
                raise ValueError(f"{named} {self.norm_num_groups} groups")
            if attention and width % self.attention_head_dim:
                raise ValueError(f"{named} heads of {self.attention_head_dim}")


def published_config(name: str) -> dict:
    """The config.json of a published model, one of PUBLISHED."""
    stage, widths, layers = PUBLISHED[name]
    resnets = 1 if stage == 1 else 3
    attention = len(widths) - resnets
    return {
        **(STAGE_1_CONFIG if stage == 1 else STAGE_2_CONFIG),
        "addition_embed_type_num_heads": 64,
        "attention_head_dim": 64,
        "block_out_channels": list(widths),
        "cross_attention_dim": widths[-1],
        "down_block_types": [RESNET_BLOCKS[0]] * resnets + [ATTENTION_BLOCKS[0]] * attention,
        "encoder_hid_dim": 4096,
        "layers_per_block": layers if isinstance(layers, int) else list(layers),
        "sample_size": 64 if stage == 1 else 256,
        "time_embedding_dim": None if stage == 1 else widths[-1],
        "up_block_types": [ATTENTION_BLOCKS[1]] * attention + [RESNET_BLOCKS[1]] * resnets,
    }


def check_fixed(file: str, config: dict, fixed: dict[str, tuple], assumed: dict, implementing: str):
    """Refuse a field that has, or for diffusers would have, another value than those that are implemented."""
    for name, allowed in fixed.items():
        value = config.get(name, assumed.get(name, allowed[0]))
        if value not in allowed:
            raise ValueError(f"{file} has {name} = {value!r}, {implementing} implements {_either(allowed)}")


def check_kind(file: str, name: str, value, kind: type, implementing: str):
    """Refuse a value of another kind, see KINDS."""
    fits, expected = KINDS[kind]
    if not fits(value):
        raise ValueError(f"{file} has {name} = {value!r}, {implementing} implements {expected}")


def _per_level(config: dict, name: str, default, levels: int) -> tuple:
    """A field that is one value for all levels or one a level."""
    value = config.get(name, default)
    if not _is_list(value):
        return (value,) * levels
    if len(value) != levels:
        raise ValueError(f"config.json has {len(value)} values of {name} for {levels} levels")
    return tuple(value)


def _side(sample_size):
    """Of a square height and width, their one value; 64 when there is none."""
    if _is_list(sample_size) and len(sample_size) == 2 and sample_size[0] == sample_size[1]:
        return sample_size[0]
    return 64 if sample_size is None else sample_size


def _is_list(value) -> bool:
    return isinstance(value, (list, tuple))


def _either(values) -> str:
    """'a', 'b' or 'c'."""
    *first, last = [repr(value) for value in values]
    return f"{', '.join(first)} or {last}" if first else last
