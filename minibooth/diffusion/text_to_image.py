"""Text to image: the networks of one Stable Diffusion, and how they draw together. Rombach et al. 2022.

Shapes: B pictures, N prompt tokens, D width of their encoding, h x w latent size, H x W picture size.
"""

import secrets
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from minibooth.checkpoint.load import Source
from minibooth.diffusion.images import to_image
from minibooth.diffusion.noise import gaussian
from minibooth.diffusion.samplers import calls, trajectory
from minibooth.diffusion.scheduler import DDPMScheduler
from minibooth.errors import UserError
from minibooth.models.clip import CLIPText
from minibooth.models.tokenizer import Tokenizer
from minibooth.models.unet import UNet
from minibooth.models.vae import VAE


@dataclass
class StableDiffusion:
    """A Stable Diffusion 1 or 2. `release` frees a network's memory; `save` still writes it."""

    source: Source
    tokenizer: Tokenizer
    scheduler: DDPMScheduler
    text_encoder: CLIPText
    unet: UNet
    vae: VAE

    @classmethod
    def build(cls, source: Source, dtype: torch.dtype, device: torch.device | str, prediction_type: str | None = None):
        """Networks in `dtype` on `device`. Raises UserError for a checkpoint whose parts do not fit together."""
        schedule = source.json("scheduler/scheduler_config.json")
        unet, vae, text = (source.build(name, dtype, device) for name in ("unet", "vae", "text_encoder"))
        if unet.config.in_channels != vae.config.latent_channels:
            kind = "an inpainting model" if unet.config.in_channels == 9 else "not text-to-image"
            raise UserError(f"{source.name} is {kind}: its UNet takes {unet.config.in_channels} channels")
        scheduler = DDPMScheduler.from_config(schedule | ({"prediction_type": prediction_type} if prediction_type else {}))
        return cls(source, source.tokenizer(), scheduler, text, unet, vae)

    def save(self, folder: str | Path) -> None:
        """Write the diffusers layout, as it was read (`Source.save`): whole, or not at all."""
        self.source.save(Path(folder), {"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder})

    def release(self, name: str) -> None:
        """Give up "text_encoder" or "vae" once it has nothing left to do; `save` copies it from where it was read."""
        setattr(self, name, None)

    @property
    def device(self) -> torch.device:
        """Where the UNet is."""
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the UNet computes in."""
        return self.unet.conv_in.weight.dtype

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """The UNet's conditioning, [B, N, D]."""
        return self.text_encoder(self.tokenizer(prompts).to(self.device)).to(self.dtype)

    def generate(
        self,
        prompts: str | Sequence[str],
        negative_prompts: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int = 50,
        guidance_scale: float = 7.5,
        sampler: str = "ddim",
        seed: int | None = None,
        latents: Tensor | None = None,
    ) -> list[Image.Image]:
        """Draw a picture for each prompt.

        height, width: pixels, divisible by 8; the model's own size where not given. seed: picture i is that of seed + i
        whatever the batch, and the one that diffusers draws with torch.Generator().manual_seed(seed + i).
        latents: the starting noise [B, 4, h, w], instead of the seed's. Raises UserError for sizes that do not fit.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        negative = negative_prompts or ""
        negative = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        if len(negative) != len(prompts):
            raise UserError(f"{len(negative)} negative prompts for {len(prompts)} prompts")
        context = self.encode_prompts(prompts)
        unconditional = self.encode_prompts(negative) if guidance_scale > 1 else None
        first = secrets.randbits(32) if seed is None else seed
        seeds = range(first, first + len(prompts))
        return self.draw(context, unconditional, seeds, height, width, steps, guidance_scale, sampler, latents)

    @torch.no_grad()
    def draw(
        self,
        context: Tensor,
        unconditional: Tensor | None,
        seeds: Sequence[int],
        height: int | None = None,
        width: int | None = None,
        steps: int = 50,
        guidance_scale: float = 7.5,
        sampler: str = "ddim",
        latents: Tensor | None = None,
    ) -> list[Image.Image]:
        """A picture for each seed from encoded prompts, [B, N, D] or [1, N, D]; no guidance without `unconditional`."""
        B = len(seeds)
        conditions = [each.expand(B, -1, -1) for each in (unconditional, context) if each is not None]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        if latents is None:
            latents = gaussian((B, self.unet.config.in_channels, *self.latent_size(height, width)), generators)
        elif latents.shape[:2] != (B, self.unet.config.in_channels):
            raise UserError(f"latents {[*latents.shape]} do not fit {B} pictures of {self.unet.config.in_channels} channels")

        def predict(x: Tensor, t: Tensor) -> Tensor:
            copies = len(conditions)
            outputs = self.unet(x.to(self.dtype).repeat(copies, 1, 1, 1), t.repeat(copies), torch.cat(conditions)).chunk(copies)
            return torch.lerp(outputs[0], outputs[-1], guidance_scale)  # Ho & Salimans 2022, eq. 6

        x = latents.to(self.device, torch.float32)
        states = trajectory(predict, x, self.scheduler, steps, sampler, generators)
        x = deque(tqdm(states, total=calls(sampler, steps), leave=False, disable=None), maxlen=1).pop()
        pictures = self.vae.decode((x / self.vae.scaling_factor).to(self.vae.post_quant_conv.weight.dtype))
        return [to_image(picture) for picture in pictures]

    def latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """h and w of a picture's latent; the model's own for None. Raises UserError for sides not divisible by 8."""
        own = self.unet.config.sample_size
        sides = own if isinstance(own, tuple) else (own, own)
        H, W = (given or side * self.vae.factor for given, side in zip((height, width), sides, strict=True))
        if H % 8 or W % 8 or min(H, W) <= 0:
            raise UserError(f"a picture of {W} x {H} pixels cannot be drawn: both sides must be divisible by 8")
        return H // self.vae.factor, W // self.vae.factor
