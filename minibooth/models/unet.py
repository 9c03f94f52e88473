"""The UNet of Stable Diffusion 1, 2, XL and x4: what predicts the noise (or the velocity) in a latent. Rombach et al. 2022.

Shapes: B batch, C channels that go in (x4: 4 + 3), h x w latent size, N prompt tokens, D width of their encoding, P of the
pooled one.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibooth.models import ops
from minibooth.models.blocks import Block, Downsample, NormSiLU, ResnetBlock, Transformer, Upsample
from minibooth.models.config import ATTENDS, UNetConfig


class TimestepEmbedding(nn.Module):
    """Two linear layers over the sinusoids of t."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.linear_1 = nn.Linear(width, out)
        self.linear_2 = nn.Linear(out, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class UNet(nn.Module):
    """unet(x [B, C, h, w], t, context [B, N, D], *added) -> [B, 4, h, w]; t is a number, or one per sample [B].

    added: what the model is conditioned on besides, as follows. h and w may be any.

    XL: the prompt as a whole, pooled [B, P], and sizes [B, 6]: height and width of the original picture, top and left of the
    crop, height and width to draw. Podell et al. 2023, sections 2.2 and 2.3.
    x4: how noisy the picture beside the latent is, noise_level, a whole number or one per sample [B].
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        widths, last, depth = config.block_out_channels, len(config.block_out_channels) - 1, config.layers_per_block
        crosses = config.per_level(config.only_cross_attention)
        time_width = 4 * widths[0]

        def resnet(c_in: int, c_out: int) -> ResnetBlock:
            return ResnetBlock(c_in, c_out, config.norm_num_groups, config.norm_eps, time_width)

        def transformers(count: int, level: int, cross: int) -> list[Transformer]:
            return [Transformer(config, level, bool(cross)) for _ in range(count)]

        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], time_width)
        if config.addition_embed_type == "text_time":
            self.add_embedding = TimestepEmbedding(config.projection_class_embeddings_input_dim, time_width)
        if config.num_class_embeds:
            self.class_embedding = nn.Embedding(config.num_class_embeds, time_width)

        self.down_blocks = nn.ModuleList()
        skips = [widths[0]]  # channels of the states that the way up will read
        for level, (width, kind) in enumerate(zip(widths, config.down_block_types, strict=True)):
            resnets = [resnet(c_in, width) for c_in in [skips[-1]] + [width] * (depth - 1)]
            attentions = transformers(depth * ATTENDS[kind], level, crosses[level])
            self.down_blocks.append(Block(resnets, attentions, Downsample(width) if level < last else None))
            skips += [width] * (depth + (level < last))

        width = widths[-1]
        self.mid_block = Block([resnet(width, width), resnet(width, width)], transformers(1, last, cross=False))

        self.up_blocks = nn.ModuleList()
        for level, kind in zip(range(last, -1, -1), config.up_block_types, strict=True):
            inputs = [width] + [widths[level]] * depth
            width = widths[level]
            resnets = [resnet(c_in + skips.pop(), width) for c_in in inputs]
            attentions = transformers((depth + 1) * ATTENDS[kind], level, crosses[level])
            self.up_blocks.append(Block(resnets, attentions, upsampler=Upsample(width) if level else None))

        self.conv_norm_out = NormSiLU(config.norm_num_groups, width, config.norm_eps)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor | float, context: Tensor, *added: Any) -> Tensor:
        t = torch.as_tensor(t, device=x.device).expand(len(x))
        time = self.time_embedding(ops.timestep_embedding(t, self.conv_in.out_channels).to(x.dtype))
        if hasattr(self, "add_embedding"):
            pooled, sizes = added
            angles = ops.timestep_embedding(sizes.flatten(), self.config.addition_time_embed_dim).reshape(len(x), -1)
            time = time + self.add_embedding(torch.cat([pooled, angles.to(x.dtype)], dim=1))
        if hasattr(self, "class_embedding"):
            (noise_level,) = added
            time = time + self.class_embedding(torch.as_tensor(noise_level, device=x.device).expand(len(x)))
        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            x = block(x, time, context, push=skips)
        x = self.mid_block(x, time, context)
        for block in self.up_blocks:
            x = block(x, time, context, pop=skips)
        return self.conv_out(self.conv_norm_out(x))
