"""What the UNet and the VAE are made of: resnets, attention, and the one block that stacks them.

Attribute names are the keys of the published (diffusers) files, so that loading needs no table. Two containers look odd
for that reason: `to_out.0` and `ff.net.0.proj` / `ff.net.2`, whose missing numbers were dropout in the original code.

Shapes: x [B, C, h, w] features, time [B, T] embedded timestep, context [B, N, D] encoded prompt.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minibooth.models import ops
from minibooth.models.config import UNetConfig


class NormSiLU(nn.GroupNorm):
    """GroupNorm, then x * sigmoid(x): what stands before every convolution of a resnet."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + time))), He et al. 2016 as Ho et al. 2020, appendix B, use it."""

    def __init__(self, c_in: int, c_out: int, groups: int, eps: float, time_width: int = 0):
        super().__init__()
        self.norm1 = NormSiLU(groups, c_in, eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        if time_width:
            self.time_emb_proj = nn.Linear(time_width, c_out)
        self.norm2 = NormSiLU(groups, c_out, eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        x = x if skip is None else torch.cat([x, skip], dim=1)
        h = self.conv1(self.norm1(x))
        if time is not None:
            h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]
        return self.conv_shortcut(x) + self.conv2(self.norm2(h))


class Attention(nn.Module):
    """Multi-head attention from x to `context`, or to itself where there is none."""

    def __init__(self, width: int, heads: int, context_width: int = 0, bias: bool = False, upcast: bool = False):
        super().__init__()
        self.heads, self.upcast = heads, upcast
        self.to_q = nn.Linear(width, width // heads * heads, bias)  # heads that do not divide the width fit no weights
        self.to_k = nn.Linear(context_width or width, width, bias)
        self.to_v = nn.Linear(context_width or width, width, bias)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        return self.to_out[0](self.attend(q, k, v))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, N, D] of queries, keys and values."""
        return ops.attention(q, k, v, self.heads, upcast=self.upcast)


class SpatialAttention(Attention):
    """The VAE's attention: one head over all places of a normalised feature map, added to it."""

    def __init__(self, width: int, groups: int):
        super().__init__(width, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, width, eps=1e-6)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = super().forward(rearrange(self.group_norm(x), "b c h w -> b (h w) c"))
        return h.transpose(1, 2).reshape(x.shape) + x  # keeps the strides that diffusers has here, hence its convolutions' bits


class GEGLU(nn.Module):
    """A linear layer to twice the width, gated down to it."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        return ops.geglu(self.proj(x))


class TransformerBlock(nn.Module):
    """Self-attention, attention to the prompt, feed-forward; each normalised before and added.

    `cross`: to the prompt both times, as in the upper levels of the x4-upscaler, where places are too many for the first.
    """

    def __init__(self, width: int, heads: int, context_width: int, upcast: bool, cross: bool):
        super().__init__()
        self.cross = cross
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads, context_width * cross, upcast=upcast)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, heads, context_width, upcast=upcast)
        self.norm3 = nn.LayerNorm(width)
        self.ff = nn.ModuleDict({"net": nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))})

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x), context if self.cross else None)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff["net"](self.norm3(x))


class Transformer(nn.Module):
    """Transformer blocks over the places of a feature map, added to it. Rombach et al. 2022, section 3.3.

    `linear` projects as linear layers over tokens (SD 2 and later), otherwise as 1x1 convolutions over the map (SD 1).
    """

    def __init__(self, config: UNetConfig, level: int, cross: bool):
        super().__init__()
        self.linear = linear = config.use_linear_projection
        width, heads = config.block_out_channels[level], config.per_level(config.attention_head_dim)[level]
        depth = config.per_level(config.transformer_layers_per_block)[level]
        self.norm = nn.GroupNorm(config.norm_num_groups, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)
        shape = width, heads, config.cross_attention_dim, config.upcast_attention, cross
        self.transformer_blocks = nn.ModuleList(TransformerBlock(*shape) for _ in range(depth))
        self.proj_out = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm(x)
        h = h if self.linear else self.proj_in(h)
        h = rearrange(h, "b c h w -> b (h w) c")
        h = self.proj_in(h) if self.linear else h
        for block in self.transformer_blocks:
            h = block(h, context)
        h = self.proj_out(h) if self.linear else h
        h = rearrange(h, "b (h w) c -> b c h w", h=x.shape[2])
        return x + (h if self.linear else self.proj_out(h))


class Downsample(nn.Module):
    """Halves the map by a strided convolution; `one_sided` pads right and bottom only, as the VAE's encoder does."""

    def __init__(self, channels: int, one_sided: bool = False):
        super().__init__()
        self.one_sided = one_sided
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if one_sided else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.one_sided else x)


class Upsample(nn.Module):
    """Doubles the map (or brings it to `size`, where the way down rounded) by nearest neighbours, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size | None = None) -> Tensor:
        return self.conv(F.interpolate(x, size or [2 * n for n in x.shape[2:]], mode="nearest"))


class Block(nn.Module):
    """One resolution of a network: resnets, the first of them each followed by one of the attentions, then a resampling.

    Going down, every state is pushed on a stack; going up, each resnet reads one from it beside its input.
    """

    def __init__(
        self, resnets: Iterable[ResnetBlock], attentions: Iterable[nn.Module] = (),
        downsampler: Downsample | None = None, upsampler: Upsample | None = None,
    ):  # fmt: skip
        super().__init__()
        self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(resnets)
        self.downsamplers = nn.ModuleList([downsampler] if downsampler else [])
        self.upsamplers = nn.ModuleList([upsampler] if upsampler else [])

    def forward(
        self, x: Tensor, time: Tensor | None = None, context: Tensor | None = None,
        push: list[Tensor] | None = None, pop: list[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time, skip=pop.pop() if pop else None)
            if i < len(self.attentions):
                x = self.attentions[i](x, context)
            if push is not None:
                push.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            if push is not None:
                push.append(x)
        for upsample in self.upsamplers:
            x = upsample(x, pop[-1].shape[2:] if pop else None)
        return x
