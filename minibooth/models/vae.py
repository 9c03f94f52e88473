"""The autoencoder (KL-regularised) between pictures and latents. Rombach et al. 2022, section 3.1.

Shapes: B batch, H x W picture, Z latent channels, h x w = H/f x W/f latent, f = 2^(levels - 1): 8 for SD 1 and 2.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from minibooth.models.blocks import Block, Downsample, NormSiLU, ResnetBlock, SpatialAttention, Upsample
from minibooth.models.config import VAEConfig

EPS = 1e-6  # of every normalisation here; the UNet's resnets have 1e-5


@dataclass(frozen=True)
class Posterior:
    """The diagonal Gaussian q(z | picture) that the encoder returns; mean and std [B, Z, h, w]."""

    mean: Tensor
    std: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + std * noise, the noise drawn where the generator lives (Kingma & Welling 2014, eq. 10)."""
        device = generator.device if generator else self.mean.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)


class Encoder(nn.Module):
    """Pictures [B, 3, H, W] -> moments [B, 2Z, h, w] (before the quantising convolution)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for level, (c_in, c_out) in enumerate(pairwise([widths[0], *widths])):
            down = Downsample(c_out, one_sided=True) if level < len(widths) - 1 else None
            self.down_blocks.append(block(config.layers_per_block, c_in, c_out, groups, downsampler=down))
        self.mid_block = middle(widths[-1], groups)
        self.conv_norm_out = NormSiLU(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in (*self.down_blocks, self.mid_block):
            x = block(x)
        return self.conv_out(self.conv_norm_out(x))


class Decoder(nn.Module):
    """Latents [B, Z, h, w] -> pictures [B, 3, H, W]; one resnet more at each level than the encoder has."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = middle(widths[0], groups)
        self.up_blocks = nn.ModuleList()
        for level, (c_in, c_out) in enumerate(pairwise([widths[0], *widths])):
            up = Upsample(c_out) if level < len(widths) - 1 else None
            self.up_blocks.append(block(config.layers_per_block + 1, c_in, c_out, groups, upsampler=up))
        self.conv_norm_out = NormSiLU(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        for block in (self.mid_block, *self.up_blocks):
            x = block(x)
        return self.conv_out(self.conv_norm_out(x))


def block(resnets: int, c_in: int, c_out: int, groups: int, **more: Any) -> Block:
    """So many resnets, of which the first brings c_in channels to c_out, and what a `Block` has besides."""
    return Block([ResnetBlock(c, c_out, groups, EPS) for c in [c_in] + [c_out] * (resnets - 1)], **more)


def middle(width: int, groups: int) -> Block:
    """The lowest resolution: attention between two resnets."""
    return block(2, width, width, groups, attentions=[SpatialAttention(width, groups)])


class VAE(nn.Module):
    """encode: pictures in [-1, 1] -> Posterior; decode: latents as encode gives them -> pictures.

    scaling_factor: what brings latents to about unit variance; the diffusion model sees them times it, which is the caller's to
    apply. factor: picture pixels per latent pixel, along a side.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config, self.scaling_factor = config, config.scaling_factor
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, images: Tensor) -> Posterior:
        """[B, 3, H, W] in [-1, 1] -> the posterior over [B, Z, h, w]."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return Posterior(mean, torch.exp(0.5 * logvar.clamp(-30, 20)))

    def decode(self, latents: Tensor) -> Tensor:
        """[B, Z, h, w] -> [B, 3, H, W], nominally in [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents))
