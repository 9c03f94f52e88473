"""What a folder's config.json says, as dataclasses: the fields we build from, and for every other key the one value we mean.

Defaults are those of the class that wrote the file (diffusers' UNet2DConditionModel and AutoencoderKL, transformers'
CLIPTextConfig), since published files leave out what equals the default of their day.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from minibooth.errors import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    """Base of the three: `from_dict` refuses by name whatever would change the network and is not implemented."""

    NEUTRAL: ClassVar[Mapping[str, Any]] = {}  # keys that are read, with the only value they may have
    CLASSES: ClassVar[tuple[str, ...]] = ()  # what `_class_name` may say

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """config.json's content -> the dataclass. Raises UserError for another class or an unsupported setting."""
        found = config.get("_class_name", cls.CLASSES[0])
        if found not in cls.CLASSES:
            raise UserError(f"config.json describes a {found}; supported here: {', '.join(cls.CLASSES)}")
        fields = {field.name for field in dataclasses.fields(cls)}
        values = {}
        for key, value in config.items():
            if key in fields:
                values[key] = tuple(value) if isinstance(value, list) else value
            elif not key.startswith("_") and value != (neutral := cls.NEUTRAL.get(key)) and (value or neutral):
                raise UserError(f"{cls.CLASSES[0]}: {key}={value!r} in config.json is not supported")
        return cls(**values)


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

    in_channels: int = 4
    out_channels: int = 4
    sample_size: int | tuple[int, int] = 64
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    layers_per_block: int = 2
    attention_head_dim: int | tuple[int, ...] = 8
    cross_attention_dim: int = 1280
    use_linear_projection: bool = False
    upcast_attention: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    transformer_layers_per_block: int | tuple[int, ...] = 1
    addition_embed_type: str | None = None
    addition_time_embed_dim: int = 256
    projection_class_embeddings_input_dim: int = 2816

    def __post_init__(self) -> None:
        if self.addition_embed_type not in (None, "text_time"):
            raise UserError(f"UNet2DConditionModel: addition_embed_type={self.addition_embed_type!r} is not supported")

    def per_level(self, value: int | tuple[int, ...]) -> tuple[int, ...]:
        """A setting that may be one for all levels, spread over them."""
        return (value,) * len(self.block_out_channels) if isinstance(value, int) else value


@dataclasses.dataclass(frozen=True)
class VAEConfig(Config):
    """vae/config.json."""

    CLASSES = ("AutoencoderKL",)
    NEUTRAL = dict(act_fn="silu", mid_block_add_attention=True, use_quant_conv=True, use_post_quant_conv=True)

    in_channels: int = 3
    out_channels: int = 3
    sample_size: int = 32
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (64,)
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    layers_per_block: int = 1
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    force_upcast: bool = True


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig(Config):
    """text_encoder/config.json; transformers writes many keys of generation and training that say nothing here."""

    CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512
    architectures: tuple[str, ...] = CLASSES

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Reads the `text_config` of a whole CLIP model too."""
        config = {"architectures": [], **(config.get("text_config") or config)}
        return super().from_dict({f.name: config[f.name] for f in dataclasses.fields(cls) if f.name in config})
