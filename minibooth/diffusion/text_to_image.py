"""Text to image: how the networks of one Stable Diffusion draw together. Rombach et al. 2022.

Shapes: B pictures, N prompt tokens, D width of their encoding, h x w latent size, H x W picture size.
"""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from minibooth.checkpoint.source import INDEX, Source
from minibooth.diffusion.images import to_image
from minibooth.diffusion.noise import gaussian, seeds_from
from minibooth.diffusion.pipeline import Condition, Pipeline
from minibooth.errors import UserError
from minibooth.models.clip import CLIPText


class StableDiffusion(Pipeline):
    """A Stable Diffusion 1 or 2."""

    kind, command = "a text-to-image model", "generate"
    schedule = {"steps_offset": 1, "clip_sample": False}  # files of 2022 have it wrong; diffusers' pipeline mends it, too

    def with_sizes(self, condition: Condition, sizes: Tensor) -> Condition:
        """The condition with `sizes` [B, 6] (see UNet) put in, for a model that is told of them."""
        return condition

    @torch.no_grad()
    def generate(
        self, prompts: str | Sequence[str], negative_prompts: str | Sequence[str] | None = None,
        height: int | None = None, width: int | None = None, steps: int = 50, guidance_scale: float = 7.5,
        sampler: str | None = None, seed: int | None = None, latents: Tensor | None = None,
    ) -> list[Image.Image]:  # fmt: skip
        """Draw a picture for each prompt.

        height, width: pixels, divisible by 8; the model's own size where not given. sampler: ddim where not given (XL: euler).
        seed: picture i is that of seed + i whatever the batch, and the one that diffusers draws with
        torch.Generator().manual_seed(seed + i). latents: the starting noise [B, 4, h, w], instead of the seed's.
        Raises UserError for sizes that do not fit.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        negative = [negative_prompts] if isinstance(negative_prompts, str) else negative_prompts
        if negative and len(negative) not in (1, len(prompts)):
            raise UserError(f"{len(negative)} negative prompts for {len(prompts)} prompts")
        seeds = seeds_from(seed, len(prompts))
        unconditional = self.unconditional(negative) if guidance_scale > 1 else None
        return self.draw(self.condition(prompts), unconditional, seeds, height, width, steps, guidance_scale, sampler, latents)

    @torch.no_grad()
    def draw(
        self, condition: Condition, unconditional: Condition | None, seeds: Sequence[int],
        height: int | None = None, width: int | None = None, steps: int = 50, guidance_scale: float = 7.5,
        sampler: str | None = None, latents: Tensor | None = None,
    ) -> list[Image.Image]:  # fmt: skip
        """A picture for each of B seeds, from encoded prompts, [B, ...] or [1, ...]; no guidance without `unconditional`.

        Raises UserError for sizes, or for a shape of `latents`, that do not fit.
        """
        B = len(seeds)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        if latents is None:
            latents = gaussian((B, self.channels, *self.latent_size(height, width)), generators)
        elif latents.dim() != 4 or latents.shape[:2] != (B, self.channels):
            raise UserError(f"latents {[*latents.shape]} do not fit {B} pictures of {self.channels} channels")
        H, W = (side * self.factor for side in latents.shape[2:])
        sizes = torch.tensor([[H, W, 0, 0, H, W]], device=self.device)
        told = [self.with_sizes(each, sizes) for each in (unconditional, condition) if each]
        conditions = [tuple(each.expand(B, *each.shape[1:]) for each in parts) for parts in told]
        latent = self.denoise(self.guided(conditions, guidance_scale), latents, steps, sampler, generators)
        return [to_image(self.decode(each)[0]) for each in latent.split(1)]  # one by one: it takes more memory than the UNet

    def latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """h and w of a picture's latent; the model's own for None. Raises UserError for sides not divisible by 8."""
        own = self.unet.config.sample_size
        sides = own if isinstance(own, tuple) else (own, own)
        H, W = (side * self.factor if given is None else given for given, side in zip((height, width), sides, strict=True))
        if H % 8 or W % 8 or min(H, W) <= 0:
            raise UserError(f"a picture of {W} x {H} pixels cannot be drawn: both sides must be divisible by 8")
        return H // self.factor, W // self.factor


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL's base model: two text encoders, and a UNet that is told of sizes. Podell et al. 2023."""

    text_encoder_2: CLIPText
    sampler, schedule = "euler", {}
    half_vae = False

    def __init__(self, source: Source, dtype: torch.dtype, device: torch.device | str):
        super().__init__(source, dtype, device)
        self.tokenizer_2 = source.tokenizer("tokenizer_2")
        pooled = len(getattr(self.text_encoder_2, "text_projection", self.text_encoder_2.text_model.final_layer_norm).weight)
        sizes, whole = 6 * self.unet.config.addition_time_embed_dim, self.unet.config.projection_class_embeddings_input_dim
        if pooled + sizes != whole:
            raise UserError(f"{source.name}: text_encoder_2 and sizes give {pooled} + {sizes} numbers, the UNet takes {whole}")

    def tokens(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """What `encode` takes: both tokenizers' ids [B, N], and the sizes of a whole picture [B, 6]."""
        (ids,), (h, w) = super().tokens(prompts), self.latent_size(None, None)
        whole = torch.tensor([h, w, 0, 0, h, w], device=self.device) * self.factor
        return ids, self.tokenizer_2(prompts).to(self.device), whole.expand(len(ids), 6)

    def encode(self, ids: Tensor, ids_2: Tensor, sizes: Tensor) -> Condition:  # type: ignore[override]
        """The UNet's conditioning: context [B, N, D1 + D2], pooled [B, P], and the sizes [B, 6]."""
        (first, _), (second, pooled) = self.text_encoder.states_and_pooled(ids), self.text_encoder_2.states_and_pooled(ids_2)
        return torch.cat([first, second], dim=-1).to(self.dtype), pooled.to(self.dtype), sizes

    def unconditional(self, negative_prompts: Sequence[str] | None) -> Condition:
        """Zeros where there are no negative prompts, as the published model was trained."""
        context, pooled, sizes = super().unconditional(negative_prompts)
        zeros = negative_prompts is None and self.source.json(INDEX).get("force_zeros_for_empty_prompt", True)
        return (context * 0, pooled * 0, sizes) if zeros else (context, pooled, sizes)

    def with_sizes(self, condition: Condition, sizes: Tensor) -> Condition:
        """The condition with other sizes."""
        return (*condition[:2], sizes)
