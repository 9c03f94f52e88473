"""Super-resolution: four times a picture's sides, drawn under a prompt. Rombach et al. 2022, section 4.4; the x4-upscaler
of Stable Diffusion 2 (Stability-AI/stablediffusion, configs/stable-diffusion/x4-upscaling.yaml).

The picture stands beside the latent, which has its size, as three more channels of the UNet's input (Saharia et al. 2021, SR3,
arXiv 2104.07636). It is noised first, and the UNet is told how much (conditioning augmentation: Ho et al. 2021, arXiv
2106.15282, section 3), so that it trusts the picture's outlines and invents the detail: more of it, the higher the level.

Shapes: h x w, the picture's size and the latent's; 4h x 4w, the result's. Neither needs to be divisible by anything.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from minibooth.checkpoint.source import INDEX, Source
from minibooth.diffusion.images import to_image, to_rgb, to_tensor
from minibooth.diffusion.noise import gaussian, seeds_from
from minibooth.diffusion.pipeline import Condition, Pipeline
from minibooth.diffusion.scheduler import DDPMScheduler
from minibooth.errors import UserError, blaming

TILE = 256  # pixels of the picture: larger ones are drawn in parts
OVERLAP = 1 / 4  # of a tile, at least


def spans(length: int, tile: int, factor: int) -> list[tuple[int, Tensor]]:
    """Tiles along a side, as their starts, evenly spread, and weights of their `factor` times as many results.

    Every result's weights sum to 1, and each tile's fade towards its ends, where it knows least.
    """
    tile = min(tile, length)
    rest = length - tile
    starts = torch.linspace(0, rest, 1 + math.ceil(rest / (tile * (1 - OVERLAP)))).round().long().tolist()
    places = [slice(factor * start, factor * (start + tile)) for start in starts]
    window = torch.sin(torch.pi * (torch.arange(factor * tile, dtype=torch.float32) + 0.5) / (factor * tile)) ** 2
    total = torch.zeros(factor * length, dtype=torch.float32)
    for place in places:
        total[place] += window
    return [(start, window / total[place]) for start, place in zip(starts, places, strict=True)]


def tiled(function: Callable[[Tensor], Tensor], x: Tensor, tile: int, factor: int = 1) -> Tensor:
    """function(x [B, C, h, w]), `factor` times as large, put together from overlapping tiles (Bar-Tal et al. 2023).

    Memory is that of a tile and of the result, float32; one tile gives the function's numbers unchanged.
    """
    rows, columns = (spans(side, tile, factor) for side in x.shape[2:])
    whole: Any = None  # until the first part says how many channels
    for top, down in rows:
        for left, right in columns:
            part = function(x[:, :, top : top + tile, left : left + tile])
            if whole is None:
                whole = part.new_zeros(*part.shape[:2], *(factor * side for side in x.shape[2:]), dtype=torch.float32)
            place = whole[:, :, factor * top :, factor * left :][:, :, : len(down), : len(right)]
            place += part * (down[:, None] * right).to(part.device)
    return whole


class StableDiffusionUpscale(Pipeline):
    """The x4-upscaler: unet(x [B, 4 + 3, h, w], t, context, noise_level); `low_res_scheduler` noises the three."""

    kind, command = "a super-resolution model", "upscale"
    extra_channels = 3
    half_vae = False

    def __init__(self, source: Source, dtype: torch.dtype, device: torch.device | str):
        super().__init__(source, dtype, device)
        with blaming(f"{source.name}/low_res_scheduler/scheduler_config.json"):
            self.low_res_scheduler = DDPMScheduler.from_config(source.json("low_res_scheduler/scheduler_config.json"))
        self.max_noise_level: int = source.json(INDEX).get("max_noise_level", 350)
        levels = min(self.unet.config.num_class_embeds or 0, self.low_res_scheduler.num_train_timesteps)
        if self.max_noise_level not in range(levels):
            unknown = f"its UNet knows no noise level {self.max_noise_level!r} (max_noise_level, num_class_embeds)"
            raise UserError(f"{source.name} is no x4-upscaler: {unknown}")

    @torch.no_grad()
    def generate(
        self, prompts: str | Sequence[str], images: Image.Image | Sequence[Image.Image], noise_level: int = 20,
        negative_prompts: str | Sequence[str] | None = None, steps: int = 75, guidance_scale: float = 9.0,
        sampler: str | None = None, seed: int | None = None, tile: int = TILE,
    ) -> list[Image.Image]:  # fmt: skip
        """Each picture four times as wide and high.

        prompts, negative_prompts: one for all, or one for each picture. noise_level: 0 to `max_noise_level`; the higher, the
        freer. seed: picture i is drawn with seed + i, as by diffusers with torch.Generator().manual_seed(seed + i) where both
        sides are divisible by 4; diffusers resizes others, here each is taken as it is. tile: pixels of the picture that are
        drawn at a time, along a side. Raises UserError for what does not fit.
        """
        images = [images] if isinstance(images, Image.Image) else images
        texts = [[text] if isinstance(text, str) else text or [""] for text in (negative_prompts, prompts)]
        for words in texts:
            if len(words) not in (1, len(images)):
                raise UserError(f"{len(words)} prompts for {len(images)} pictures: give one, or one for each")
        conditions = [self.condition(words) for words in texts[guidance_scale <= 1 :]]
        pictures = []
        for i, (image, own_seed) in enumerate(zip(images, seeds_from(seed, len(images)), strict=True)):
            own = [tuple(each[i % len(each)][None] for each in condition) for condition in conditions]
            pictures.append(self.draw(image, own, own_seed, noise_level, steps, guidance_scale, sampler, tile))
        return pictures

    @torch.no_grad()
    def draw(
        self, image: Image.Image, conditions: Sequence[Condition], seed: int, noise_level: int = 20, steps: int = 75,
        guidance_scale: float = 9.0, sampler: str | None = None, tile: int = TILE,
    ) -> Image.Image:  # fmt: skip
        """A picture from encoded prompts, [1, ...] each: (unconditional and) conditional. The rest as in `generate`."""
        if not 0 <= noise_level <= self.max_noise_level:
            raise UserError(f"noise_level={noise_level} is not within 0 and {self.max_noise_level}")
        if tile < 8:
            raise UserError(f"tile={tile} is too small: take 8 pixels or more")
        level, generator = torch.tensor([noise_level]), [torch.Generator().manual_seed(seed)]
        low = to_tensor(to_rgb(image))[None]
        low = self.low_res_scheduler.add_noise(low, gaussian(low.shape, generator), level).to(self.device)
        noise = gaussian((1, self.channels, *low.shape[2:]), generator)  # one field for all tiles
        guided = self.guided([(*condition, level.to(self.device)) for condition in conditions], guidance_scale)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return tiled(lambda part: guided(part, t), torch.cat([x, low], dim=1), tile)

        return to_image(tiled(self.decode, self.denoise(predict, noise, steps, sampler, generator), tile, self.factor)[0])
