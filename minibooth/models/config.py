"""What a folder's config.json says, as dataclasses: the fields we build from and, for other keys, the only value supported.

Defaults are those of the class that wrote the file (diffusers' UNet2DConditionModel and AutoencoderKL, transformers'
CLIPConfig, ViTConfig), since published files leave out what equals the default of their day.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any, ClassVar, Literal, Self, get_args, get_origin

from minibooth.errors import UserError

UNetBlock = Literal["CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]
ATTENDS = {kind: kind.startswith("Cross") for kind in get_args(UNetBlock)}  # whether they attend to the prompt


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is what a field's annotation says; whole numbers are at least 0, others above it and finite."""
    kinds = get_args(kind)
    if isinstance(kind, UnionType):
        return any(fits(value, each) for each in kinds)
    if get_origin(kind) is Literal:
        return value in kinds
    if kinds:  # a tuple's
        return isinstance(value, tuple) and (... in kinds or len(value) == len(kinds)) and all(fits(x, kinds[0]) for x in value)
    if kind is float:
        return type(value) in (int, float) and 0 < value < math.inf
    return type(value) is kind and (kind is not int or value >= 0)


@dataclasses.dataclass(frozen=True)
class Config:
    """Base of all. Raises UserError, with the key, for whatever would change the network and is not implemented."""

    NEUTRAL: ClassVar[Mapping[str, Any]] = {}  # keys that are read, with the only value they may have
    IGNORED: ClassVar[Sequence[str]] = ()  # keys that say nothing of the network
    CLASSES: ClassVar[tuple[str, ...]] = ()  # what `_class_name` may say

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """config.json's content -> the dataclass. Raises UserError for another class or an unsupported setting."""
        found = config.get("_class_name", cls.CLASSES[0])
        if found not in cls.CLASSES:
            raise UserError(f"config.json describes a {found}; supported here: {', '.join(cls.CLASSES)}")
        usual = {field.name: field.default for field in dataclasses.fields(cls)}
        values = {}
        for key, value in config.items():
            if key in usual and (value is not None or usual[key]):  # null: as if left out, where that says nothing
                values[key] = tuple(value) if isinstance(value, list) else value
            elif key.startswith("_") or key in cls.IGNORED:
                continue
            elif value != (neutral := cls.NEUTRAL.get(key)) and (value or neutral):
                raise UserError(f"{cls.CLASSES[0]}: {key}={value!r} in config.json is not supported")
        return cls(**values)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not fits(value := getattr(self, field.name), field.type):
                raise UserError(f"{self.CLASSES[0]}: {field.name}={value!r} in config.json is not supported")


@dataclasses.dataclass(frozen=True)
class UNetConfig(Config):
    """unet/config.json. `attention_head_dim` is, whatever its name says, the number of heads (one, or one per level)."""

    CLASSES = ("UNet2DConditionModel",)
    NEUTRAL = dict(
        act_fn="silu", attention_type="default", addition_embed_type_num_heads=64, conv_in_kernel=3, conv_out_kernel=3,
        downsample_padding=1, dropout=0.0, flip_sin_to_cos=True, freq_shift=0, mid_block_scale_factor=1,
        mid_block_type="UNetMidBlock2DCrossAttn", resnet_out_scale_factor=1.0, resnet_time_scale_shift="default",
        time_embedding_type="positional",
    )  # fmt: skip
    # of diffusers' EMAModel
    IGNORED = "decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup"

    in_channels: int = 4
    out_channels: int = 4
    sample_size: int | tuple[int, int] = 64
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[UNetBlock, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    up_block_types: tuple[UNetBlock, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    layers_per_block: int = 2
    attention_head_dim: int | tuple[int, ...] = 8
    cross_attention_dim: int = 1280
    use_linear_projection: bool = False
    upcast_attention: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    transformer_layers_per_block: int | tuple[int, ...] = 1
    only_cross_attention: bool | tuple[bool, ...] = False
    num_class_embeds: int | None = None
    addition_embed_type: Literal["text_time", None] = None
    addition_time_embed_dim: int = 0  # where there is such an embedding
    projection_class_embeddings_input_dim: int = 0

    def per_level(self, value: int | tuple[int, ...]) -> tuple[int, ...]:
        """A setting that may be one for all levels, spread over them."""
        return (value,) * len(self.block_out_channels) if isinstance(value, int) else value


@dataclasses.dataclass(frozen=True)
class VAEConfig(Config):
    """vae/config.json."""

    CLASSES = ("AutoencoderKL",)
    NEUTRAL = dict(act_fn="silu", mid_block_add_attention=True, use_quant_conv=True, use_post_quant_conv=True)
    IGNORED = "sample_size", "down_block_types", "up_block_types"

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    force_upcast: bool = True


@dataclasses.dataclass(frozen=True)
class TransformerConfig(Config):
    """What the encoders of text and of pictures share; transformers writes many more keys that say nothing here."""

    SECTION: ClassVar[str] = ""  # where a whole CLIP model's config.json says it
    CAUSAL: ClassVar[bool] = False  # whether a token sees only those before it

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Reads the section of a whole CLIP model too."""
        config = config.get(cls.SECTION) or config
        return super().from_dict({f.name: config[f.name] for f in dataclasses.fields(cls) if f.name in config})


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig(TransformerConfig):
    """text_encoder/config.json."""

    CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")
    SECTION = "text_config"
    CAUSAL = True

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    eos_token_id: int | tuple | None = 49407  # 2 in published files, for the largest id there is
    projection_dim: int = 512
    architectures: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class VisionConfig(TransformerConfig):
    """CLIP's image encoder."""

    CLASSES = ("CLIPVisionModel",)
    SECTION = "vision_config"
    PLAIN: ClassVar[bool] = False  # ViT as Dosovitskiy et al. have it: patches with a bias, and no norm before the layers

    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32


@dataclasses.dataclass(frozen=True)
class ViTConfig(VisionConfig):
    """config.json of a ViT, as DINO is published."""

    CLASSES = ("ViTModel",)
    SECTION = ""
    PLAIN = True

    patch_size: int = 16
    hidden_act: Literal["quick_gelu", "gelu"] = "gelu"
    layer_norm_eps: float = 1e-12
