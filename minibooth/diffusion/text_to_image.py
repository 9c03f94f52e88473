"""Text to image: the networks of one Stable Diffusion, and how they draw together. Rombach et al. 2022.

Shapes: B pictures, N prompt tokens, D width of their encoding, h x w latent size, H x W picture size.
"""

import secrets
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
    """A Stable Diffusion 1 or 2. A network may be given up (set to None) to free its memory; `save` still writes it."""

    source: Source
    tokenizer: Tokenizer
    scheduler: DDPMScheduler
    text_encoder: CLIPText | None
    unet: UNet
    vae: VAE | None

    @classmethod
    def build(cls, source: Source, dtype: torch.dtype, device: torch.device | str, prediction_type: str | None = None):
        """Networks in `dtype` on `device`. Raises UserError for a checkpoint whose parts do not fit together."""
        schedule = source.json("scheduler/scheduler_config.json")
        unet, vae, text = (source.build(name, dtype, device) for name in ("unet", "vae", "text_encoder"))
        if unet.config.in_channels != vae.config.latent_channels:
            kind = "an inpainting model" if unet.config.in_channels == 9 else "not text-to-image"
            raise UserError(f"{source.name} is {kind}: its UNet takes {unet.config.in_channels} channels")
        scheduler = DDPMScheduler.from_config(
            schedule | ({"prediction_type": prediction_type} if prediction_type else {})
        )
        return cls(source, source.tokenizer(), scheduler, text, unet, vae)

    def save(self, folder: str | Path) -> None:
        """Write the diffusers layout, as it was read (`Source.save`): whole, or not at all."""
        self.source.save(Path(folder), {"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder})

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
        return self.draw(context, unconditional, height, width, steps, guidance_scale, sampler, seed, latents)

    @torch.no_grad()
    def draw(
        self,
        context: Tensor,
        unconditional: Tensor | None,
        height: int | None = None,
        width: int | None = None,
        steps: int = 50,
        guidance_scale: float = 7.5,
        sampler: str = "ddim",
        seed: int | Sequence[int] | None = None,
        latents: Tensor | None = None,
    ) -> list[Image.Image]:
        """`generate` from encoded prompts [B, N, D], with one seed or B; without `unconditional` there is no guidance."""
        seed = secrets.randbits(32) if seed is None else seed
        seeds = range(seed, seed + len(context)) if isinstance(seed, int) else seed
        generators = [torch.Generator().manual_seed(each) for each in seeds]
        if latents is None:
            default, factor = self.unet.config.sample_size, self.vae.factor
            sides = default if isinstance(default, tuple) else (default, default)
            size = [given or side * factor for given, side in zip((height, width), sides, strict=True)]
            if any(side % 8 or side <= 0 for side in size):
                raise UserError(
                    f"a picture of {size[1]} x {size[0]} cannot be drawn: both sides must be divisible by 8"
                )
            shape = len(context), self.unet.config.in_channels, size[0] // factor, size[1] // factor
            latents = gaussian(shape, generators)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            x = x.to(self.dtype)
            if unconditional is None:
                return self.unet(x, t, context)
            without, within = self.unet(
                torch.cat([x, x]), torch.cat([t, t]), torch.cat([unconditional, context])
            ).chunk(2)
            return without + guidance_scale * (within - without)  # Ho & Salimans 2022, eq. 6

        x = latents.to(self.device, torch.float32)
        states = trajectory(predict, x, self.scheduler, steps, sampler, generators)
        for x in tqdm(states, total=calls(sampler, steps), leave=False, disable=None):
            pass
        pictures = self.vae.decode((x / self.vae.scaling_factor).to(self.vae.post_quant_conv.weight.dtype))
        return [to_image(picture) for picture in pictures]
